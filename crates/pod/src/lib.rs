//! Pods and containers: what CRI's calls mean, on top of images, networks and tasks.
//!
//! This crate knows CRI's messages, which are the configuration of record, but neither gRPC nor sockets: `cri` serves
//! it. It starts no processes itself but the loader of its AppArmor profile: tasks belong to `task`, network plugins to `cni`, layers to `image`.
//!
//! ```text
//!   Pods ── sandbox    run, stop, remove, status, list of pod sandboxes
//!        ├─ container  create, start, stop, remove, status, list of containers
//!        ├─ exec       ExecSync                               stream   exec and attach with streams, ports
//!        ├─ stats      what containers and pods use         metrics  the same as the metrics of cAdvisor
//!        ├─ events     tells what happens to those who listen
//!        ├─ update     new limits for what exists
//!        ├─ checkpoint the archive of a running container     restore  a container out of one
//!        ├─ observe    metrics of the engine itself, and its state for debugging
//!        ├─ monitor    waits for every running task and records its exit
//!        ├─ reconcile  after a start of the daemon: what is true, what is left over
//!        ├─ apparmor   our default profile, and which are loaded
//!        ├─ volumes    images as volumes                      target   PID namespaces of other containers
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
mod events;
mod exec;
mod files;
mod metrics;
mod monitor;
mod observe;
mod pods;
mod reconcile;
mod record;
mod restore;
mod sandbox;
mod signal;
pub mod spec;
mod state;
mod stats;
mod store;
mod stream;
mod target;
mod update;
mod volumes;

pub use apparmor::APPARMOR_PARSERS;
pub use checkpoint::{
    ANNOTATION_PREFIX, CheckpointEntry, CheckpointLimits, CheckpointOptions, CheckpointPolicy, CheckpointReport,
    ImageTarget, Keep, OPTIONS, Preflight, Progress, ProgressReport, Retention,
};
pub use error::{Error, Kind, Result};
pub use events::EventReader;
pub use pods::{Checkpoints, Config, Handler, Operation, Pods, Policy, RestoreLevel};
pub use stasis_task::Streams;
pub use stream::{Control, Session};
