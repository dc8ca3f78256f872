//! End-to-end tests of the daemon: a table of contents.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod always_thawed;
mod cdi;
mod checkpoint;
mod daemon_dies;
mod events;
mod forged;
mod gone;
mod hostile;
mod kept;
mod life;
mod observe;
mod options;
mod peers;
mod refusals;
mod security;
mod shim_dies;
mod streaming;
mod target;
mod travel;
mod usage;
mod volumes;
mod workloads;
