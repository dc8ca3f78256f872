//! The interface of the task layer: plain data and three traits.
//!
//! Refuses to know what a shim is: nothing here names a socket, a program or a protocol, apart from the two fields of
//! [`CreateOpts`] that say which shim is to serve.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::shim::oci;
use protobuf::Message as _;
use stasis_sys::mount::Mount;

use crate::error::Result;

/// Where the standard streams of a process go. Empty is "none".
///
/// A stream is the path of a FIFO, or for output of a container's first process a URI: see [`log_uri`](crate::log_uri);
/// our shim also takes [`ATTACHED`](stasis_shim_api::ATTACHED).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Io {
    /// Path of a FIFO.
    pub stdin: String,
    /// Path of a FIFO, or a URI.
    pub stdout: String,
    /// Path of a FIFO, or a URI; empty with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// A typed message that this layer only carries: protobuf's `Any`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Any {
    /// Which message `value` is.
    pub type_url: String,
    /// The message's bytes.
    pub value: Vec<u8>,
}

/// The options that `io.containerd.runc.v2` and our shim understand (`containerd.runc.v1.Options`), the part we use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Name or path of the OCI runtime's program; empty: the shim's default, `runc` in its `PATH`.
    pub binary_name: String,
    /// Directory of the OCI runtime's state; empty: the shim's default.
    pub root: String,
    /// Whether cgroups are made through systemd.
    pub systemd_cgroup: bool,
}

impl RunOptions {
    /// The options in the form in which a shim takes them.
    pub fn to_any(&self) -> Any {
        let message = oci::Options {
            binary_name: self.binary_name.clone(),
            root: self.root.clone(),
            systemd_cgroup: self.systemd_cgroup,
            ..Default::default()
        };
        Any { type_url: "containerd.runc.v1.Options".into(), value: message.write_to_bytes().unwrap_or_default() }
    }
}

/// What a new task is made of.
#[derive(Clone, Debug, Default)]
pub struct CreateOpts {
    /// The OCI runtime spec, JSON, written to the bundle as `config.json`.
    pub spec: Vec<u8>,
    /// Mounts that make the root file system; empty: the bundle's `rootfs` or the spec's root is used as it is.
    pub rootfs: Vec<Mount>,
    /// Standard streams of the first process.
    pub io: Io,
    /// Directory of CRIU's images. The task is then Created with nothing run, and its start is the restore.
    pub checkpoint: Option<PathBuf>,
    /// Whether `checkpoint` is a path of the caller's, who keeps it until the task was started. Without it the
    /// directory is the task's, and removed along with the bundle if it lies in there.
    pub restore_from_path: bool,
    /// Options for the start of the shim, on its standard input; and for the task, where `task_options` is none.
    pub runtime_options: Option<Any>,
    /// Options of the task: see [`RunOptions`].
    pub task_options: Option<Any>,
    /// Which shim: a name like `io.containerd.runc.v2`, or the absolute path of its program.
    pub runtime: String,
    /// The pod whose shim serves the task; `address` then says where.
    pub sandbox_id: Option<String>,
    /// Address of a running shim (`unix:///…`): none is started, and none is shut down when the task is gone.
    pub address: Option<String>,
    /// Version of the Task API at `address`, 2 or 3; 3 where none is given.
    pub version: Option<u32>,
    /// Directory of the task, made if need be; none: the default place (see the crate's documentation).
    pub bundle: Option<PathBuf>,
}

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its process ID on the host, 0 if it never ran.
    pub pid: u32,
    /// Exit status, or 128 + signal.
    pub status: u32,
    /// When it ended.
    pub timestamp: SystemTime,
}

/// Where a task is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not told by the shim.
    Unknown,
    /// Made, first process not yet run.
    Created,
    /// Running.
    Running,
    /// Ended, exit status at hand, not yet deleted.
    Stopped,
    /// Frozen.
    Paused,
    /// Being frozen.
    Pausing,
}

/// What a shim says of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Where it is in its life.
    pub status: Status,
    /// First process on the host, 0 if none.
    pub pid: u32,
    /// Present when `status` is [`Status::Stopped`].
    pub exit: Option<Exit>,
    /// The streams it was made with, and whether it has a terminal.
    pub io: Io,
    /// Directory of the task.
    pub bundle: PathBuf,
}

/// A further process in a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecSpec {
    /// `process` of the OCI runtime spec, JSON.
    pub process: Vec<u8>,
    /// Its streams: FIFOs or none.
    pub io: Io,
}

/// Options of [`Task::checkpoint_images`] (`containerd.runc.v1.CheckpointOptions`, the part we use).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckpointImages {
    /// Whether the task ends with its checkpoint.
    pub exit: bool,
    /// Keep established TCP connections.
    pub open_tcp: bool,
    /// Allow unix sockets whose other end is outside.
    pub external_unix_sockets: bool,
    /// Allow a terminal.
    pub terminal: bool,
    /// Keep file locks.
    pub file_locks: bool,
    /// Directory of CRIU's logs; none: the shim's choice.
    pub work_path: Option<PathBuf>,
}

/// Makes tasks and finds them again.
///
/// The methods that change something run to their end even when the caller's future is dropped.
#[async_trait]
pub trait PlatformRuntime: Send + Sync {
    /// Name of the implementation.
    fn id(&self) -> &str;

    /// Makes a task, its first process not yet run. On an error nothing is left behind.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`](crate::Error::AlreadyExists) for an ID in use; else what the shim or its start said.
    async fn create(&self, task_id: &str, opts: CreateOpts) -> Result<Arc<dyn Task>>;

    /// The task of that ID, also one that an earlier daemon made.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound); a task whose shim is dead is found, its methods say
    /// [`Error::ShimLost`](crate::Error::ShimLost).
    async fn get(&self, task_id: &str) -> Result<Arc<dyn Task>>;

    /// All tasks known to this daemon; with `all`, also those that an earlier one left in the state directory.
    async fn tasks(&self, all: bool) -> Result<Vec<Arc<dyn Task>>>;

    /// Removes a task that has ended, or whose shim is dead, with all that belongs to it.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`](crate::Error::FailedPrecondition) while it runs.
    /// [`Error::NotFound`](crate::Error::NotFound) if it is not, or no more, known; its bundle is gone then, too.
    ///
    /// Of a task whose shim died before anybody saw the end, the exit is what the shim's clean-up says: it killed it.
    async fn delete(&self, task_id: &str) -> Result<Exit>;
}

/// A container's processes, seen through its shim.
#[async_trait]
pub trait Task: Send + Sync {
    /// ID of the task, which is the container's.
    fn id(&self) -> &str;
    /// First process on the host; 0 before it exists.
    fn pid(&self) -> u32;
    /// Directory of the task.
    fn bundle(&self) -> &Path;
    /// What the shim says of it now.
    async fn state(&self) -> Result<State>;
    /// Runs the first process, or lets a restored one go on. Gives its process ID.
    async fn start(&self) -> Result<u32>;
    /// Sends a signal to the first process, or to all. [`Error::NotFound`](crate::Error::NotFound) if it has ended.
    async fn kill(&self, signal: u32, all: bool) -> Result<()>;
    /// Waits for the end of the first process, without limit. Any number of callers; each may be dropped.
    ///
    /// # Errors
    /// [`Error::ShimLost`](crate::Error::ShimLost) when the connection to the shim ends: how the process ended is
    /// then unknown, and none is made up.
    async fn wait(&self) -> Result<Exit>;
    /// As [`PlatformRuntime::delete`].
    async fn delete(&self) -> Result<Exit>;
    /// Prepares a further process; it runs at [`Process::start`].
    async fn exec(&self, exec_id: &str, spec: ExecSpec) -> Result<Arc<dyn Process>>;
    /// Freezes all processes.
    async fn pause(&self) -> Result<()>;
    /// Thaws them.
    async fn resume(&self) -> Result<()>;
    /// All processes on the host.
    async fn pids(&self) -> Result<Vec<u32>>;
    /// Sets the size of the terminal, in characters.
    async fn resize_pty(&self, width: u32, height: u32) -> Result<()>;
    /// Closes the first process's standard input.
    async fn close_stdin(&self) -> Result<()>;
    /// Changes limits; `resources` is `linux.resources` of the OCI runtime spec, JSON.
    async fn update(&self, resources: &[u8]) -> Result<()>;
    /// Writes CRIU's images into the directory `path`, in the way of any shim (our archives go through
    /// [`Sandbox::checkpoint`](crate::Sandbox::checkpoint)).
    async fn checkpoint_images(&self, path: &Path, options: CheckpointImages) -> Result<()>;
}

/// A further process in a task.
#[async_trait]
pub trait Process: Send + Sync {
    /// Its ID, unique in the task.
    fn id(&self) -> &str;
    /// Process ID on the host; 0 before the start.
    fn pid(&self) -> u32;
    /// Runs it. Gives its process ID.
    async fn start(&self) -> Result<u32>;
    /// Waits for its end, as [`Task::wait`].
    async fn wait(&self) -> Result<Exit>;
    /// Sends it a signal. [`Error::NotFound`](crate::Error::NotFound) if it has ended.
    async fn kill(&self, signal: u32) -> Result<()>;
    /// Forgets it, once ended.
    async fn delete(&self) -> Result<Exit>;
    /// Sets the size of the terminal, in characters.
    async fn resize_pty(&self, width: u32, height: u32) -> Result<()>;
    /// Closes its standard input.
    async fn close_stdin(&self) -> Result<()>;
}
