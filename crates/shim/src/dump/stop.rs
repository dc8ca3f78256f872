//! When the worker gives up: it is told to by SIGTERM (the shim's word, or its death), or its time is up.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use stasis_shim_api::{Reason, ShimError};
use stasis_sys::thread::signal_descriptor;

use super::job::internal;

/// The signs that the worker is to give up.
#[derive(Debug)]
pub(crate) struct Stop {
    signals: OwnedFd,
    deadline: Instant,
    timeout_ms: u64,
}

impl Stop {
    /// From now on SIGTERM and SIGINT no longer end the process. Called while it has one thread.
    pub(crate) fn new(started: Instant, timeout_ms: u64) -> Result<Self, ShimError> {
        let signals = signal_descriptor(&[Signal::TERM, Signal::INT]).map_err(internal)?;
        Ok(Self { signals, deadline: started + Duration::from_millis(timeout_ms), timeout_ms })
    }

    /// An error if the worker is to give up.
    pub(crate) fn check(&self) -> Result<(), ShimError> {
        self.wait(None, Duration::ZERO).map(drop)
    }

    /// Waits until `other` is readable (true) or `limit` is over (false).
    pub(crate) fn wait(&self, other: Option<BorrowedFd<'_>>, limit: Duration) -> Result<bool, ShimError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left.min(limit)).map_err(internal)?;
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(other.map(|other| PollFd::from_borrowed_fd(other, PollFlags::IN)));
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(internal(format!("waiting for CRIU: {error}"))),
        }
        if !fds[0].revents().is_empty() {
            let message = "the checkpoint was called off; the container runs".to_owned();
            return Err(ShimError { reason: Reason::DeadlineExceeded, message });
        }
        if fds.get(1).is_some_and(|other| !other.revents().is_empty()) {
            return Ok(true);
        }
        if left.is_zero() {
            let message = format!(
                "the checkpoint took longer than its {} ms and was given up; the container runs. Ask for more time, or \
                 look for a slow disk",
                self.timeout_ms
            );
            return Err(ShimError { reason: Reason::DeadlineExceeded, message });
        }
        Ok(false)
    }
}
