//! The only crate with unsafe code: mounts, namespaces, processes, descriptors, and paths resolved under a root.
//!
//! It knows nothing of pods, containers or images. Every `unsafe` block says why it is sound; all other crates of the
//! workspace are denied `unsafe`.
#![allow(unsafe_code)]

pub mod capture;
pub mod confine;
pub mod file;
pub mod memory;
pub mod mount;
pub mod namespace;
pub mod path;
pub mod process;
pub mod pty;
pub mod socket;
pub mod thread;
