//! What the daemon and the shim say to each other beyond containerd's Task and Sandbox APIs.
//!
//! The Task and Sandbox services carry everything that any shim can do. What only ours can do travels in two ways:
//!
//! - as the `options` of `Sandbox.CreateSandbox`: a [`SandboxSpec`] in JSON, with the type URL [`SANDBOX_SPEC_URL`];
//! - over a third ttrpc service on the same socket, [`SERVICE`], whose payloads are JSON documents.
//!
//! The types here are plain data; sockets and processes are the business of the two sides.

pub mod plan;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Name of the ttrpc service that only our shim serves.
pub const SERVICE: &str = "stasis.shim.v1.Shim";
/// [`SERVICE`] method: [`CheckpointRequest`] to [`CheckpointReport`].
pub const METHOD_CHECKPOINT: &str = "Checkpoint";
/// [`SERVICE`] method: [`ReopenLogRequest`] to an empty JSON object.
pub const METHOD_REOPEN_LOG: &str = "ReopenLog";
/// Method: [`ProgressRequest`] to [`CheckpointProgress`] or null.
pub const METHOD_PROGRESS: &str = "CheckpointProgress";
/// [`SERVICE`] method: [`AttachRequest`] to an empty JSON object.
pub const METHOD_ATTACH: &str = "Attach";
/// Type URL of a [`SandboxSpec`] inside a protobuf `Any`; the value is its JSON.
pub const SANDBOX_SPEC_URL: &str = "stasis.shim.v1/SandboxSpec";

/// Scheme of a stdout or stderr URI that makes the shim write a CRI log file: `cri:///var/log/pods/…/0.log`.
pub const CRI_LOG_SCHEME: &str = "cri://";

/// A stream that only attached clients have. As stdin the shim keeps it open, with nothing in it until a client comes; as
/// stdout or stderr it goes nowhere while there is no client.
pub const ATTACHED: &str = "attach://";

/// Longest message in one line of a CRI log, in bytes; longer ones are split and tagged `P` (containerd's default).
pub const CRI_LOG_LINE_MAX: usize = 16 * 1024;

/// Where the shim finds or pins the things of one pod, below the pod's directory.
pub mod layout {
    /// Directory of the pinned namespaces: files `net`, `ipc`, `uts`, `pid`.
    pub const NAMESPACES: &str = "ns";
    /// Mount point of the pod's `/dev/shm`.
    pub const SHM: &str = "shm";
    /// Socket of the shim, mode 0600.
    pub const SOCKET: &str = "shim.sock";
    /// Process ID of the shim, in decimal.
    pub const PID: &str = "shim.pid";
    /// Log of the shim.
    pub const LOG: &str = "shim.log";
    /// Directory of freeze markers: one file for each container that is or may be frozen.
    pub const MARKERS: &str = "frozen";
    /// Directory of container bundles, one a container.
    pub const BUNDLES: &str = "bundles";
}

/// Where a pod's namespace comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamespaceSource {
    /// A new namespace, pinned below the pod's directory.
    New,
    /// A namespace that the daemon has pinned there already, and lets go of itself.
    Pinned,
    /// The host's; nothing is pinned.
    Host,
    /// Not shared by the pod: each container makes its own (PID namespaces in CRI mode CONTAINER).
    PerContainer,
}

/// The pod's part of a sandbox: what `Sandbox.CreateSandbox` is to set up. The bundle path of that request is the
/// pod's directory, absolute, mode 0700.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxSpec {
    /// Network namespace; a new one has `lo` up. A pinned one has its sysctls already.
    pub network: NamespaceSource,
    /// IPC namespace.
    pub ipc: NamespaceSource,
    /// UTS namespace.
    pub uts: NamespaceSource,
    /// PID namespace; a new one is shared by all containers and gets the built-in init.
    pub pid: NamespaceSource,
    /// Host name, set in a new UTS namespace.
    pub hostname: Option<String>,
    /// Namespaced sysctls by dotted name, written inside the new namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Size of the pod's `/dev/shm` in bytes; none is mounted where the IPC namespace is the host's.
    pub shm_size_bytes: u64,
}

/// Ends the current log file of a container and begins it again under the same path (after a rotation).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReopenLogRequest {
    /// Task ID, which is the container's ID.
    pub id: String,
}

/// Attaches a client to the first process of a container, by FIFOs that the client has made and opened.
///
/// An output FIFO gets what the process writes from now on, beside the log. It ends with the process's output. A client
/// that does not keep up loses what does not fit its FIFO, and is told how much; it never delays the process, its log or
/// other clients. A client leaves by closing its ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Task ID, which is the container's ID.
    pub id: String,
    /// FIFO of the client's input; only where the stdin of the container is [`ATTACHED`].
    pub stdin: Option<PathBuf>,
    /// FIFO of standard output, or of the terminal.
    pub stdout: Option<PathBuf>,
    /// FIFO of the error output; there is none with a terminal.
    pub stderr: Option<PathBuf>,
    /// Whether the end of the client's input is the end of the container's (CRI `stdin_once`).
    pub ends_stdin: bool,
}

/// Options of CRIU that a checkpoint may carry. The daemon has checked who may ask for what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriuOptions {
    /// Keep file locks. On by default, as in CRI-O.
    pub file_locks: bool,
    /// Keep established TCP connections.
    pub tcp_established: bool,
    /// Restore TCP connections closed.
    pub tcp_close: bool,
    /// Leave out connections that are not accepted yet.
    pub skip_in_flight: bool,
    /// Link deleted but open files back into their directories.
    pub link_remap: bool,
    /// Allow processes whose terminal, or session, is another process's outside the container.
    pub shell_job: bool,
    /// Allow connections to unix sockets outside the container.
    pub external_unix_sockets: bool,
    /// Largest deleted but open file whose content is kept, in bytes; none for CRIU's own limit.
    pub ghost_limit: Option<u64>,
    /// Record control groups also where a restore of ours does not need them.
    pub record_cgroups: bool,
    /// Mounts, by their place in the container, that are left out of the dump.
    pub skip_mounts: Vec<String>,
}

impl Default for CriuOptions {
    fn default() -> Self {
        Self {
            file_locks: true,
            tcp_established: false,
            tcp_close: false,
            skip_in_flight: false,
            link_remap: false,
            shell_job: false,
            external_unix_sockets: false,
            ghost_limit: None,
            record_cgroups: false,
            skip_mounts: Vec::new(),
        }
    }
}

/// How an archive is compressed as a whole, after the thaw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all: what every reader takes.
    #[default]
    None,
    /// zstd, as podman writes it by default.
    Zstd {
        /// zstd's own level.
        level: i32,
        /// Threads; 0 for one beside the writer.
        threads: u32,
    },
    /// lz4, which no other reader takes.
    Lz4,
}

/// A directory outside the root file system that is copied in the same freeze.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tree {
    /// Name of the member of the archive.
    pub member: String,
    /// The directory.
    pub dir: PathBuf,
}

/// A checkpoint of one running container into one archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Task ID, which is the container's ID.
    pub id: String,
    /// Where the archive goes: written under a temporary name in the same directory, made durable, renamed. 0600.
    pub archive: PathBuf,
    /// Directory with members that the caller wrote (`config.dump`, `spec.dump`, `status.dump`, `status`, …); each
    /// regular file in it becomes a member of the archive, in the order of the archive's format.
    pub members: PathBuf,
    /// Upper directory of the container's root file system, cut in the same freeze as its memory.
    pub upper: PathBuf,
    /// The container's current log, copied as `container.log`; none if it has none.
    pub log: Option<PathBuf>,
    /// Time after which the container runs again whatever happens, in milliseconds.
    pub timeout_ms: u64,
    /// Whether the container goes on running afterwards; else it is killed once the archive is durable.
    pub leave_running: bool,
    /// Options of CRIU.
    pub criu: CriuOptions,
    /// How the archive is compressed.
    #[serde(default)]
    pub compression: Compression,
    /// Directories that are copied along, such as the pod's `/dev/shm` and volumes.
    #[serde(default)]
    pub trees: Vec<Tree>,
    /// Most memory that may be reserved for the pages, in bytes; what is beyond goes to the disk. Never more than a quarter
    /// of what is free, which is the bound if this is none.
    #[serde(default)]
    pub buffer_max: Option<u64>,
    /// Bytes that must stay free where the archive goes.
    #[serde(default)]
    pub space_reserve: u64,
    /// Whether the archive is hashed while it is written.
    #[serde(default)]
    pub digest: bool,
    /// Where CRIU's log is kept if the dump fails, the end of it; none to drop it.
    #[serde(default)]
    pub failure_log: Option<PathBuf>,
}

/// Asks how far the checkpoint of a container is; the answer is a [`CheckpointProgress`], or null if there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProgressRequest {
    /// Task ID, which is the container's ID.
    pub id: String,
}

/// How far a checkpoint is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointProgress {
    /// `preparing`, `frozen` or `writing`.
    pub phase: String,
    /// Bytes of the archive that are written.
    pub bytes_done: u64,
    /// Bytes that it will have, about; 0 if that is not known yet.
    pub bytes_total: u64,
}

/// What a checkpoint cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// From the freezer's write to the thaw, in microseconds.
    pub frozen_us: u64,
    /// From the call to the durable archive, in microseconds.
    pub total_us: u64,
    /// Size of the archive in bytes.
    pub archive_bytes: u64,
    /// Pages of memory that CRIU wrote.
    pub pages_written: u64,
    /// How long CRIU took to stop the processes, in microseconds.
    #[serde(default)]
    pub freezing_us: u64,
    /// How long CRIU held them, in microseconds.
    #[serde(default)]
    pub criu_frozen_us: u64,
    /// How long CRIU read memory, in microseconds.
    #[serde(default)]
    pub memory_dump_us: u64,
    /// How long CRIU wrote memory, in microseconds.
    #[serde(default)]
    pub memory_write_us: u64,
    /// `sha256:…` of the archive, if it was asked for.
    #[serde(default)]
    pub digest: Option<String>,
    /// The same of the archive before its compression.
    #[serde(default)]
    pub diff_id: Option<String>,
}

/// Why the shim refused or failed an operation of [`SERVICE`]; the JSON of it is the message of the ttrpc status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ShimError {
    /// What kind of failure.
    pub reason: Reason,
    /// For people: what was tried, on what, what was said, what to do.
    pub message: String,
}

/// Kind of a [`ShimError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// No such container.
    NotFound,
    /// The container is not in a state that allows it.
    FailedPrecondition,
    /// The time was up; the container runs again.
    DeadlineExceeded,
    /// Another operation holds the container.
    Busy,
    /// No space, or a limit was met.
    ResourceExhausted,
    /// CRIU or the OCI runtime failed; the message holds the diagnosis.
    Engine,
    /// Anything else.
    Internal,
}
