//! Pods and containers: what CRI's calls mean, on top of images, networks and tasks.
//!
//! This crate knows CRI's messages, which are the configuration of record, but neither gRPC nor sockets: `cri` serves
//! it. It starts no processes itself but the loader of its AppArmor profile: tasks belong to `task`, network plugins to `cni`, layers to `image`.
//!
//! ```text
//!   Pods ── sandbox    run, stop, remove, status, list of pod sandboxes
//!        ├─ container  create, start, stop, remove, status, list of containers
//!        ├─ exec       ExecSync
//!        ├─ checkpoint the archive of a running container     restore  a container out of one
//!        ├─ monitor    waits for every running task and records its exit
//!        ├─ reconcile  after a start of the daemon: what is true, what is left over
//!        ├─ apparmor   our default profile, and which are loaded
//!        ├─ store      records in meta.redb                   state    what may follow what
//!        └─ spec       CRI configuration → OCI runtime specification
//! ```
//!
//! Invariants:
//! - An operation runs to its end or is undone, whether or not its caller still waits ([`Pods`] detaches it).
//! - Operations on one pod or one container follow each other; reads never wait for them.
//! - A record is durable before a call answers. What has no record is left over, and removed at the next start.
//! - An exit status is recorded before the shim is told to forget it.

mod apparmor;
mod checkpoint;
mod container;
mod error;
mod exec;
mod files;
mod monitor;
mod pods;
mod reconcile;
mod record;
mod restore;
mod sandbox;
pub mod spec;
mod state;
mod store;

pub use apparmor::APPARMOR_PARSERS;
pub use checkpoint::{CheckpointOptions, CheckpointReport};
pub use error::{Error, Kind, Result};
pub use pods::{Config, Handler, Pods, RestoreLevel};
