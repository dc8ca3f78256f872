//! What is durable about a pod and a container: protobuf messages, so that fields can be added without a migration.
//!
//! The configurations are CRI's messages as they came. Field numbers are never used again for something else.

use stasis_cri_api::runtime::{ContainerConfig, LinuxContainerUser, PodSandboxConfig};

/// A pod sandbox.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PodRecord {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) config: Option<PodSandboxConfig>,
    /// Runtime handler, resolved: never empty.
    #[prost(string, tag = "3")]
    pub(crate) handler: String,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "4")]
    pub(crate) created_at: i64,
    #[prost(bool, tag = "5")]
    pub(crate) ready: bool,
    /// Addresses in the pod's network, the primary one first.
    #[prost(string, repeated, tag = "6")]
    pub(crate) ips: Vec<String>,
    /// Whether the network has been torn down (or never was set up).
    #[prost(bool, tag = "7")]
    pub(crate) network_released: bool,
    #[prost(uint32, tag = "8")]
    pub(crate) shim_pid: u32,
}

/// A container.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ContainerRecord {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(string, tag = "2")]
    pub(crate) pod_id: String,
    #[prost(message, optional, tag = "3")]
    pub(crate) config: Option<ContainerConfig>,
    /// ID of the image that the request named: `sha256:…` of its configuration; empty for an archive by path.
    #[prost(string, tag = "4")]
    pub(crate) image_id: String,
    /// ID of the image that the root file system stands on: the same, or a checkpoint's base.
    #[prost(string, tag = "5")]
    pub(crate) base_image_id: String,
    /// Reference of the image in status answers: a repository digest where there is one.
    #[prost(string, tag = "6")]
    pub(crate) image_ref: String,
    #[prost(int64, tag = "7")]
    pub(crate) created_at: i64,
    #[prost(int64, tag = "8")]
    pub(crate) started_at: i64,
    #[prost(int64, tag = "9")]
    pub(crate) finished_at: i64,
    #[prost(uint32, tag = "10")]
    pub(crate) pid: u32,
    #[prost(int32, tag = "11")]
    pub(crate) exit_code: i32,
    #[prost(string, tag = "12")]
    pub(crate) reason: String,
    #[prost(string, tag = "13")]
    pub(crate) message: String,
    #[prost(enumeration = "Phase", tag = "14")]
    pub(crate) phase: i32,
    /// Absolute path of the log; empty if the request asked for none.
    #[prost(string, tag = "15")]
    pub(crate) log_path: String,
    /// Directory of CRIU images to start from; empty for an ordinary start, and after the restore.
    #[prost(string, tag = "16")]
    pub(crate) checkpoint: String,
    /// Whether the container came out of a checkpoint.
    #[prost(bool, tag = "17")]
    pub(crate) restored: bool,
    #[prost(string, tag = "18")]
    pub(crate) cgroups_path: String,
    /// Signal that asks it to end, as the image or the request names it; 0 for SIGTERM.
    #[prost(uint32, tag = "19")]
    pub(crate) stop_signal: u32,
    /// Identity with which the first process begins.
    #[prost(message, optional, tag = "20")]
    pub(crate) user: Option<LinuxContainerUser>,
    /// IDs of the images of its image volumes.
    #[prost(string, repeated, tag = "21")]
    pub(crate) volume_image_ids: Vec<String>,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Phase {
    Created = 0,
    Running = 1,
    Exited = 2,
}

/// Now, in nanoseconds since the epoch.
pub(crate) fn now() -> i64 {
    nanoseconds(std::time::SystemTime::now())
}

/// Nanoseconds since the epoch; 0 before it.
pub(crate) fn nanoseconds(time: std::time::SystemTime) -> i64 {
    time.duration_since(std::time::UNIX_EPOCH).ok().and_then(|d| i64::try_from(d.as_nanos()).ok()).unwrap_or(0)
}
