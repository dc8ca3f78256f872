//! What a verified checkpoint will be once it is restored: the shim compares what came up with it.

use serde::{Deserialize, Serialize};

/// Name of the plan's file in the bundle of a container that is restored, in JSON.
pub const FILE: &str = "restore-plan.json";

/// What a verified checkpoint will be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Threads, those of the first process first.
    pub threads: Vec<PlannedThread>,
    /// Processes, zombies included.
    pub processes: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// Where something is mounted, in the order of the images.
    pub mounts: Vec<String>,
    /// Numbers of the open descriptors of each process, by its ID in the container.
    pub descriptors: Vec<(u32, Vec<u32>)>,
}

/// A thread as it will be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedThread {
    /// Its ID in the container's PID namespace.
    pub tid: u32,
    /// The ID of its process.
    pub pid: u32,
    /// Real, effective, saved and file system user.
    pub uids: [u32; 4],
    /// The same of the group.
    pub gids: [u32; 4],
    /// Supplementary groups, in ascending order.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub capabilities: [u64; 5],
    /// Whether no program can give it more.
    pub no_new_privileges: bool,
    /// Seccomp's mode: 0, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Number of its seccomp filters.
    pub filters: u32,
    /// Its security label.
    pub label: Option<String>,
}
