//! Execution of an OCI runtime that has runc's command line (runc, crun): typed arguments in, results and errors out.
//!
//! It knows nothing of the Task API, of stdio or of who reaps: each call gives a [`Call`], which holds a
//! [`std::process::Command`] ready to be spawned. Whoever has an event loop of its own spawns it, waits in its own way
//! and hands the exit status to [`Call::finish`]; whoever can block uses [`Call::run`].

mod call;
mod error;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use call::Call;
pub use error::Error;

/// An OCI runtime's binary together with where it keeps the state of its containers.
#[derive(Clone, Debug)]
pub struct Runc {
    /// Path of the binary, or a name that is looked up in `PATH`.
    pub binary: PathBuf,
    /// State directory (`--root`).
    pub root: PathBuf,
    /// Where a call's log is kept as long as the call lasts; must exist.
    pub log_dir: PathBuf,
    /// Whether systemd makes the cgroups (`--systemd-cgroup`).
    pub systemd_cgroup: bool,
}

/// What `create`, `exec` and `restore` have in common: how the new process meets its surroundings.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// File into which the runtime writes the process ID.
    pub pid_file: &'a Path,
    /// Socket on which the runtime sends the terminal's master end; none without terminal. Then the process has the
    /// stdio of the call itself.
    pub console_socket: Option<&'a Path>,
}

/// How a container is created.
#[derive(Clone, Copy, Debug)]
pub struct CreateOptions<'a> {
    /// The OCI bundle.
    pub bundle: &'a Path,
    /// The first process.
    pub launch: Launch<'a>,
    /// Moves the root by `MS_MOVE` instead of `pivot_root`, for a root file system on a ramdisk.
    pub no_pivot: bool,
    /// Leaves the container in the session keyring of the call.
    pub no_new_keyring: bool,
}

/// What CRIU does with cgroups (`--manage-cgroups-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupMode {
    /// Neither recorded nor restored: somebody else owns the cgroup.
    Ignore,
    /// Restored where they do not exist yet.
    Soft,
}

/// How a container is checkpointed.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointOptions<'a> {
    /// Directory for the images.
    pub image_path: &'a Path,
    /// Directory for CRIU's log and other work files.
    pub work_path: &'a Path,
    /// Lets the container run afterwards.
    pub leave_running: bool,
    /// Keeps established TCP connections.
    pub tcp_established: bool,
    /// Lets connections to unix sockets outside the container be.
    pub external_unix_sockets: bool,
    /// Keeps file locks.
    pub file_locks: bool,
    /// What to do with cgroups; the runtime's own default if none is given.
    pub cgroup_mode: Option<CgroupMode>,
}

/// How a container is restored.
#[derive(Clone, Copy, Debug)]
pub struct RestoreOptions<'a> {
    /// The OCI bundle.
    pub bundle: &'a Path,
    /// Directory of the images.
    pub image_path: &'a Path,
    /// Directory for CRIU's log and other work files.
    pub work_path: &'a Path,
    /// The first process.
    pub launch: Launch<'a>,
    /// Keeps established TCP connections.
    pub tcp_established: bool,
    /// Keeps file locks.
    pub file_locks: bool,
    /// What to do with cgroups.
    pub cgroup_mode: CgroupMode,
    /// As in [`CreateOptions`].
    pub no_pivot: bool,
}

/// What `state` says (OCI runtime specification, section State).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct State {
    /// The container's ID.
    pub id: String,
    /// `creating`, `created`, `running`, `stopped`, or runc's own `paused`.
    pub status: String,
    /// ID of the first process; 0 when it has ended.
    #[serde(default)]
    pub pid: i32,
    /// The OCI bundle.
    pub bundle: PathBuf,
}

/// What `features` says, as far as anybody here asks (OCI runtime specification, Features Structure).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Features {
    /// Oldest version of the specification whose configurations it takes.
    pub oci_version_min: String,
    /// Newest one.
    pub oci_version_max: String,
    /// Mount options it knows.
    #[serde(default)]
    pub mount_options: Vec<String>,
    /// Facts by name, such as `org.opencontainers.runc.version` or `org.opencontainers.runc.checkpoint.enabled`.
    #[serde(default)]
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl Runc {
    /// Creates a container; its first process waits for [`Runc::start`]. Without console socket it gets the call's stdio,
    /// so that errors are in the call's log alone.
    pub fn create(&self, id: &str, options: &CreateOptions<'_>) -> Call {
        let mut call = self.call("create", id);
        call.args([OsStr::new("--bundle"), options.bundle.as_os_str()]);
        launch(&mut call, &options.launch);
        call.flag("--no-pivot", options.no_pivot).flag("--no-new-keyring", options.no_new_keyring);
        call.arg(id);
        call
    }

    /// Lets the first process of a created container go.
    pub fn start(&self, id: &str) -> Call {
        self.simple("start", id)
    }

    /// Sends a signal to the first process.
    pub fn kill(&self, id: &str, signal: i32) -> Call {
        let mut call = self.simple("kill", id);
        call.arg(signal.to_string());
        call
    }

    /// Removes a stopped container's state and cgroup; with `force` it is killed first.
    pub fn delete(&self, id: &str, force: bool) -> Call {
        let mut call = self.call("delete", id);
        call.flag("--force", force).arg(id);
        call
    }

    /// Runs another process in a container, detached; `process` is a file with the OCI process in JSON.
    pub fn exec(&self, id: &str, process: &Path, options: &Launch<'_>) -> Call {
        let mut call = self.call("exec", id);
        call.arg("--detach").args([OsStr::new("--process"), process.as_os_str()]);
        launch(&mut call, options);
        call.arg(id);
        call
    }

    /// Asks for a container's state; the output is for [`State::parse`].
    pub fn state(&self, id: &str) -> Call {
        self.simple("state", id)
    }

    /// Asks for the processes of a container; the output is for [`parse_pids`].
    pub fn ps(&self, id: &str) -> Call {
        let mut call = self.call("ps", id);
        call.args(["--format", "json"]).arg(id);
        call
    }

    /// Changes the limits of a container; `resources` is a file with the OCI `linux.resources` in JSON.
    pub fn update(&self, id: &str, resources: &Path) -> Call {
        let mut call = self.call("update", id);
        call.args([OsStr::new("--resources"), resources.as_os_str()]).arg(id);
        call
    }

    /// Writes a container's processes to images.
    pub fn checkpoint(&self, id: &str, options: &CheckpointOptions<'_>) -> Call {
        let mut call = self.call("checkpoint", id);
        call.args([OsStr::new("--image-path"), options.image_path.as_os_str()])
            .args([OsStr::new("--work-path"), options.work_path.as_os_str()])
            .flag("--leave-running", options.leave_running)
            .flag("--tcp-established", options.tcp_established)
            .flag("--ext-unix-sk", options.external_unix_sockets)
            .flag("--file-locks", options.file_locks);
        if let Some(mode) = options.cgroup_mode {
            call.args(["--manage-cgroups-mode", mode.word()]);
        }
        call.arg(id);
        call
    }

    /// Makes a running container out of images, detached. The call's stdio stands in for what the images recorded as
    /// pipes.
    pub fn restore(&self, id: &str, options: &RestoreOptions<'_>) -> Call {
        let mut call = self.call("restore", id);
        call.arg("--detach")
            .args([OsStr::new("--bundle"), options.bundle.as_os_str()])
            .args([OsStr::new("--image-path"), options.image_path.as_os_str()])
            .args([OsStr::new("--work-path"), options.work_path.as_os_str()])
            .args(["--manage-cgroups-mode", options.cgroup_mode.word()])
            .flag("--tcp-established", options.tcp_established)
            .flag("--file-locks", options.file_locks)
            .flag("--no-pivot", options.no_pivot);
        launch(&mut call, &options.launch);
        call.arg(id);
        call
    }

    /// Asks what the runtime can do; the output is for [`Features::parse`].
    pub fn features(&self) -> Call {
        self.call("features", "")
    }

    fn simple(&self, verb: &'static str, id: &str) -> Call {
        let mut call = self.call(verb, id);
        call.arg(id);
        call
    }

    fn call(&self, verb: &'static str, id: &str) -> Call {
        Call::new(self, verb, id)
    }
}

impl CgroupMode {
    fn word(self) -> &'static str {
        match self {
            CgroupMode::Ignore => "ignore",
            CgroupMode::Soft => "soft",
        }
    }
}

impl State {
    /// Reads the output of [`Runc::state`].
    pub fn parse(output: &[u8]) -> Result<State, Error> {
        parse("state", output)
    }
}

impl Features {
    /// Reads the output of [`Runc::features`].
    pub fn parse(output: &[u8]) -> Result<Features, Error> {
        parse("features", output)
    }
}

/// Reads the output of [`Runc::ps`].
pub fn parse_pids(output: &[u8]) -> Result<Vec<i32>, Error> {
    // runc says `null` where there is none.
    Ok(parse::<Option<Vec<i32>>>("ps", output)?.unwrap_or_default())
}

fn parse<T: serde::de::DeserializeOwned>(verb: &'static str, output: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(output).map_err(|source| Error::Output { verb, source })
}

fn launch(call: &mut Call, options: &Launch<'_>) {
    call.args([OsStr::new("--pid-file"), options.pid_file.as_os_str()]);
    if let Some(socket) = options.console_socket {
        call.args([OsStr::new("--console-socket"), socket.as_os_str()]);
    }
}

#[cfg(test)]
mod tests;
