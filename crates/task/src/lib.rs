//! Tasks and processes behind one interface, whatever shim runs them.
//!
//! The interface is [`PlatformRuntime`], [`Task`] and [`Process`]; its shape is containerd's. The one implementation,
//! [`ShimRuntime`], starts shims by runtime name or absolute path, as containerd does, and speaks the Task API (v3, or
//! v2 where a shim says so) over ttrpc. Our own shim serves a whole pod: [`Sandbox`] is the client of that side of it.
//!
//! A task lives in its shim, not here. What this crate keeps on disk is what it takes to find the shim again after a
//! restart of the daemon; it knows nothing of CRI, images or pods' states.
//!
//! # A bundle
//!
//! ```text
//! <bundle>/config.json        the OCI spec, written at create
//! <bundle>/rootfs/            where the shim mounts the root file system
//! <bundle>/bootstrap.json     {"version":3,"address":"unix:///…","protocol":"ttrpc"}: where the shim listens
//! <bundle>/shim-binary-path   the shim's program, to clean up after it when it is dead
//! <bundle>/sandbox            the pod's ID, where the shim belongs to a pod and outlives the task
//! <bundle>/log                what a shim of one task says in its log
//! ```
//!
//! By default the bundle is `<state_dir>/<sandbox id>/bundles/<task id>`, or `<state_dir>/<task id>/bundles/<task id>`
//! for a task without a sandbox.

mod api;
mod binary;
mod bundle;
mod connection;
mod error;
mod events;
mod io;
mod runtime;
mod sandbox;
mod task;

pub use api::{
    Any, CheckpointImages, CreateOpts, ExecSpec, Exit, Io, PlatformRuntime, Process, RunOptions, State, Status, Task,
};
pub use error::{Error, Result};
pub use events::EventServer;
pub use io::{Fifos, Streams, log_uri};
pub use runtime::{Config, ShimRuntime};
pub use sandbox::Sandbox;
pub use stasis_sys::mount::Mount;
