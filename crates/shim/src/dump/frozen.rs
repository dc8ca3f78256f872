//! A frozen container, which runs again however this ends.

use std::fs;
use std::time::{Duration, Instant};

use stasis_cgroup::Cgroup;
use stasis_shim_api::{Reason, ShimError};

use super::job::{Event, emit, internal, micros};
use super::stop::Stop;

/// How long a process may stay between vfork and exec; usually it is a millisecond.
const VFORK_LIMIT: Duration = Duration::from_secs(5);
/// The pause between two attempts, in which the container runs.
const VFORK_PAUSE: Duration = Duration::from_millis(1);
/// Where the kernel waits for the child of a vfork, by name; the first since 5.10.
const VFORK_WAITS: [&str; 3] = ["kernel_clone", "_do_fork", "wait_for_vfork_done"];

/// Exists as long as the container is frozen; dropping it thaws.
#[derive(Debug)]
pub(crate) struct Frozen {
    cgroup: Cgroup,
    since: Instant,
    thawed: bool,
    /// Nobody was told of this freeze.
    silent: bool,
}

impl Frozen {
    /// Freezes the container's own cgroup: with a frozen parent CRIU would wait for ever. It also would for a process
    /// between vfork and exec (posix_spawn, Go's os/exec): that waits for its child where no debugger can stop it, while
    /// CRIU has stopped the child. Such a moment is short, so the container is let go and frozen again.
    pub(crate) fn freeze(cgroup: &Cgroup, stop: &Stop) -> Result<Self, ShimError> {
        let give_up = Instant::now() + VFORK_LIMIT;
        loop {
            let since = Instant::now();
            let refused = |message| ShimError { reason: Reason::FailedPrecondition, message };
            cgroup.freeze().map_err(|error| refused(error.to_string()))?;
            let mut frozen = Self { cgroup: cgroup.clone(), since, thawed: false, silent: true };
            let Some(thread) = in_vfork(cgroup)? else {
                frozen.silent = false;
                emit(&Event::Frozen);
                return Ok(frozen);
            };
            drop(frozen);
            if Instant::now() >= give_up {
                return Err(refused(format!(
                    "thread {thread} has been between vfork and exec for {} s: a container cannot be checkpointed then",
                    VFORK_LIMIT.as_secs()
                )));
            }
            stop.wait(None, VFORK_PAUSE)?;
        }
    }

    /// CRIU lets the processes go for the time it holds them itself, and freezes them again. If it did not, files and
    /// memory may be of different instants.
    pub(crate) fn check(&self) -> Result<(), ShimError> {
        if self.cgroup.is_frozen().map_err(internal)? {
            return Ok(());
        }
        let path = self.cgroup.path();
        Err(internal(format!("the container in {path} was set running by somebody during its checkpoint")))
    }

    /// Lets the container run; returns for how long it did not, in microseconds.
    pub(crate) fn thaw(mut self) -> Result<u64, ShimError> {
        self.thaw_now().map_err(internal)
    }

    fn thaw_now(&mut self) -> stasis_cgroup::Result<u64> {
        match self.cgroup.thaw() {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        self.thawed = true;
        let frozen_us = micros(self.since.elapsed());
        if !self.silent {
            emit(&Event::Thawed { frozen_us });
        }
        Ok(frozen_us)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.thawed {
            // If even this fails, the shim tries again until the kernel says that it worked.
            let _ = self.thaw_now();
        }
    }
}

/// A thread of the frozen container that waits for the child of its vfork.
fn in_vfork(cgroup: &Cgroup) -> Result<Option<String>, ShimError> {
    for pid in cgroup.procs().map_err(internal)? {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            // A kernel that does not say leaves it to CRIU's own time limit.
            let waits_in = fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
            if VFORK_WAITS.contains(&waits_in.trim()) {
                return Ok(Some(task.file_name().to_string_lossy().into_owned()));
            }
        }
    }
    Ok(None)
}
