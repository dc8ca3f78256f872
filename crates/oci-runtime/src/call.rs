//! One call of the runtime, from its arguments to what became of it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use serde::Deserialize;
use stasis_sys::capture::{Failure, Limits, capture};

use crate::{Error, Runc};

/// Largest log or output of a call that is read: a few lines are normal, `features` prints some kilobytes, and a hook
/// that floods its error output must not fill our memory.
const OUTPUT_MAX: usize = 1 << 20;

/// How much of the error output is kept: runc's words are at its end.
const STDERR_TAIL: usize = 8 * 1024;

/// Tells the logs of calls apart that run at the same time.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// A call of the runtime, ready to be spawned. Its log is removed when it is dropped.
#[derive(Debug)]
pub struct Call {
    command: Command,
    binary: PathBuf,
    what: String,
    log: PathBuf,
    output: Option<Output>,
}

/// Where the output of a call goes that does not hand its stdio to a container: memory that has no name.
#[derive(Debug)]
struct Output {
    stdout: File,
    stderr: File,
}

impl Call {
    pub(crate) fn new(runc: &Runc, verb: &'static str, id: &str) -> Call {
        let number = CALLS.fetch_add(1, Ordering::Relaxed);
        let log = runc.log_dir.join(format!(".runtime-{verb}-{}-{number}.json", std::process::id()));
        let name = runc.binary.file_name().unwrap_or(runc.binary.as_os_str()).to_string_lossy();
        let mut command = Command::new(&runc.binary);
        command.arg("--root").arg(&runc.root).arg("--log").arg(&log).args(["--log-format", "json"]);
        if runc.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb);
        let what = format!("{name} {verb} {id}").trim_end().to_owned();
        Call { command, binary: runc.binary.clone(), what, log, output: None }
    }

    pub(crate) fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.command.args(args);
        self
    }

    pub(crate) fn flag(&mut self, flag: &str, given: bool) -> &mut Self {
        if given { self.arg(flag) } else { self }
    }

    /// The command, to give it stdio or something to do before it executes.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Keeps the call's output for [`Call::finish`] and gives it no input. Not for calls whose stdio a container inherits.
    pub fn capture(&mut self) -> io::Result<()> {
        let memory =
            |name: &str| -> io::Result<File> { Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into()) };
        let output = Output { stdout: memory("stdout")?, stderr: memory("stderr")? };
        self.command.stdin(Stdio::null()).stdout(output.stdout.try_clone()?).stderr(output.stderr.try_clone()?);
        self.output = Some(output);
        Ok(())
    }

    /// Spawns the command; our copies of the stdio that it was given are closed then. The caller reaps the process and says
    /// how it ended by [`Call::finish`].
    pub fn spawn(&mut self) -> Result<i32, Error> {
        let spawned = self.command.spawn();
        self.command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match spawned {
            // A process ID fits an i32 (pid_max is 2^22).
            Ok(child) => Ok(child.id().cast_signed()),
            Err(source) => Err(self.spawn_error(source)),
        }
    }

    /// What became of the call: its output where that was captured, or an error in the runtime's words.
    pub fn finish(self, status: ExitStatus) -> Result<Vec<u8>, Error> {
        let output = |memory: &File| read_memory(memory).map_err(|source| self.io_error(source));
        match (&self.output, status.success()) {
            (None, true) => Ok(Vec::new()),
            (None, false) => Err(self.failed(status, b"")),
            (Some(captured), true) => output(&captured.stdout),
            (Some(captured), false) => Err(self.failed(status, &output(&captured.stderr)?)),
        }
    }

    /// Runs the call to its end, at most for `limit`; then it and its process group are killed. Blocks.
    pub fn run(mut self, limit: Duration) -> Result<Vec<u8>, Error> {
        let limits = Limits { time: limit, stdout: OUTPUT_MAX, stderr_tail: STDERR_TAIL };
        match capture(&mut self.command, b"", &limits) {
            Ok(captured) if captured.status.success() => Ok(captured.stdout),
            Ok(captured) => Err(self.failed(captured.status, &captured.stderr)),
            Err(Failure::Spawn(source)) => Err(self.spawn_error(source)),
            Err(Failure::TimedOut(limit, _)) => Err(self.timed_out(limit)),
            Err(other) => Err(self.io_error(io::Error::other(other))),
        }
    }

    /// The error of a call that the caller killed because its time was up.
    pub fn timed_out(&self, limit: Duration) -> Error {
        Error::TimedOut { command: self.what.clone(), limit }
    }

    fn failed(&self, status: ExitStatus, stderr: &[u8]) -> Error {
        let said = String::from_utf8_lossy(stderr).trim().to_owned();
        let message = match last_error(&self.log) {
            Some(message) => message,
            None if said.is_empty() => "no message".to_owned(),
            None => said,
        };
        Error::Failed { command: self.what.clone(), status, message }
    }

    fn spawn_error(&self, source: io::Error) -> Error {
        Error::Spawn { binary: self.binary.clone(), source }
    }

    fn io_error(&self, source: io::Error) -> Error {
        Error::Io { command: self.what.clone(), source }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Most calls log nothing, so there is no file.
        let _ = fs::remove_file(&self.log);
    }
}

fn read_memory(mut memory: &File) -> io::Result<Vec<u8>> {
    memory.rewind()?;
    let mut bytes = Vec::new();
    memory.take(OUTPUT_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The message of the last line with level error or worse.
fn last_error(log: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let mut text = String::new();
    File::open(log).ok()?.take(OUTPUT_MAX as u64).read_to_string(&mut text).ok()?;
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))
        .map(|line| line.msg)
}
