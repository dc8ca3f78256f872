//! The OCI runtime and CRIU below it: started, waited for, ended, and their failure explained.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::{Signal, WaitOptions, wait};
use stasis_cgroup::Cgroup;
use stasis_criu::diagnose;
use stasis_oci_runtime::{Call, CgroupMode, CheckpointOptions, Runc};
use stasis_shim_api::{Reason, ShimError};
use stasis_sys::process::{Pidfd, signal};

use super::job::{Job, internal};
use super::stop::Stop;
use super::{Failed, Work};
use crate::careful;

/// How long CRIU may take to let the container go by itself once the runtime above it is gone. Killed in a dump with
/// established connections it would break them.
const GRACE: Duration = Duration::from_secs(5);
/// The pause between two looks at processes that are to end.
const PAUSE: Duration = Duration::from_millis(1);
/// How much of the end of CRIU's log is read for the diagnosis.
const LOG_MAX: u64 = 8 << 20;

/// Diagnoses that another attempt may not have: processes that could not be stopped in time, and connections that were just
/// not accepted yet, as a busy server has them all the time.
const PASSING: [&str; 2] = ["criu-timeout", "in-flight"];

/// `runc checkpoint` and what it started.
#[derive(Debug)]
pub(crate) struct Engine {
    call: Option<Call>,
    pid: i32,
    ended: Pidfd,
    status: Option<ExitStatus>,
    /// Whether CRIU may have touched the container.
    past_gate: bool,
    /// The container, if CRIU may hold connections of it.
    connections: Option<Cgroup>,
}

impl Engine {
    /// Starts the checkpoint; CRIU then waits at the gate.
    pub(crate) fn start(job: &Job, work: &Work, cgroup: &Cgroup, mode: CgroupMode) -> Result<Self, ShimError> {
        let runc = Runc {
            binary: job.runc.clone(),
            root: job.runc_root.clone(),
            log_dir: work.runtime_logs.clone(),
            systemd_cgroup: false,
        };
        let options = CheckpointOptions {
            image_path: &work.images,
            work_path: &work.logs,
            leave_running: true,
            tcp_established: job.request.criu.tcp_established,
            external_unix_sockets: job.request.criu.external_unix_sockets,
            file_locks: job.request.criu.file_locks,
            cgroup_mode: Some(mode),
        };
        let mut call = runc.checkpoint(&job.request.id, &options);
        call.capture().map_err(internal)?;
        call.command().env("PATH", work.path()?);
        let pid = call.spawn().map_err(engine_error)?;
        let ended = Pidfd::open(pid).map_err(internal)?;
        let connections = job.request.criu.tcp_established.then(|| cgroup.clone());
        Ok(Self { call: Some(call), pid, ended, status: None, past_gate: false, connections })
    }

    /// Waits up to `limit` for the end: whether it has come.
    pub(crate) fn wait(&mut self, stop: &Stop, limit: Duration) -> Result<bool, ShimError> {
        if stop.wait(Some(self.ended.as_fd()), limit)? {
            self.reap(true);
        }
        Ok(self.status.is_some())
    }

    /// Waits for the end of the dump: whether it succeeded. [`Engine::failure`] finds out why not, once the container runs.
    ///
    /// # Errors
    /// If it is given up; CRIU has let the container go.
    pub(crate) fn finish(&mut self, stop: &Stop) -> Result<bool, ShimError> {
        self.past_gate = true;
        let ended = loop {
            match self.wait(stop, Duration::MAX) {
                Ok(false) => {}
                ended => break ended,
            }
        };
        // Before the caller thaws: a CRIU that is left alone puts the freeze back that it found.
        ended.inspect_err(|_| self.end())?;
        let succeeded = self.status.is_some_and(|status| status.success());
        if !succeeded && let Some(cgroup) = &self.connections {
            // One that was killed by somebody else has left them as one that we kill.
            hold(cgroup);
            careful::end_repair(cgroup);
        }
        Ok(succeeded)
    }

    /// Why the ended runtime failed: in CRIU's words if it came so far, else in the runtime's.
    pub(crate) fn failure(&mut self, logs: &Path) -> Failed {
        let (call, status) = (self.call.take(), self.status);
        let said = match (call, status) {
            (Some(call), Some(status)) => call.finish(status).err().map(engine_error),
            _ => None,
        };
        let said = said.unwrap_or_else(|| internal("the OCI runtime ended without a reason"));
        match read_tail(&logs.join("dump.log")) {
            Some(log) => {
                let diagnosis = diagnose(&log);
                let message = format!("the container cannot be checkpointed: {diagnosis}");
                Failed {
                    error: ShimError { reason: Reason::Engine, message },
                    passing: PASSING.contains(&diagnosis.code),
                }
            }
            None => said.into(),
        }
    }

    /// Takes the exit statuses of children that have ended; with `block`, until the runtime's is among them.
    fn reap(&mut self, block: bool) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == self.pid => {
                    self.status = Some(std::os::unix::process::ExitStatusExt::from_raw(status.as_raw()));
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) if block && self.status.is_none() => std::thread::sleep(PAUSE),
                _ => return,
            }
        }
    }

    /// Ends everything. CRIU gets time to let the container go by itself, if it holds it.
    fn end(&mut self) {
        let _ = self.ended.signal(Signal::KILL);
        self.reap(true);
        let give_up = Instant::now() + if self.past_gate { GRACE } else { Duration::ZERO };
        loop {
            self.reap(false);
            let left = children();
            if left.is_empty() {
                return;
            }
            if Instant::now() >= give_up {
                self.kill(left);
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Kills `left` and waits for their end.
    fn kill(&mut self, left: Vec<i32>) {
        if let Some(cgroup) = &self.connections {
            hold(cgroup);
        }
        for pid in left {
            let _ = signal(pid, Signal::KILL.as_raw());
        }
        while !children().is_empty() {
            self.reap(false);
            std::thread::sleep(PAUSE);
        }
        if let Some(cgroup) = &self.connections {
            careful::end_repair(cgroup);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.end();
        }
    }
}

/// Freezes the container, as long as that may take.
fn hold(cgroup: &Cgroup) {
    let end = Instant::now() + careful::HOLD_LIMIT;
    while !careful::hold(cgroup) && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
}

fn engine_error(error: stasis_oci_runtime::Error) -> ShimError {
    ShimError { reason: Reason::Engine, message: error.to_string() }
}

/// The children of this process: as subreaper, also those of a runtime that is gone.
fn children() -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// The end of a log; none if there is none, or it is empty.
pub(crate) fn read_tail(path: &Path) -> Option<String> {
    let text = stasis_sys::path::read_tail(path, LOG_MAX).ok().filter(|text| !text.is_empty())?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_tried_again() {
        let passes = |line: &str| PASSING.contains(&diagnose(line).code);
        assert!(passes(
            "(00.02) Error (criu/sk-inet.c:186): inet: In-flight connections can be ignored with the --skip-in-flight option."
        ));
        assert!(passes("(03.00) Error (criu/cr-dump.c:1): Timeout reached. Try to interrupt: 0"));
        assert!(!passes(
            "(00.02) Error (criu/sk-inet.c:1): inet: Connected TCP socket, consider using --tcp-established option."
        ));
    }
}
