//! Who ended, when and how: the one place that waits for children.
//!
//! The shim is the subreaper of all that runs in its pod, so children appear that it never spawned: a container's first
//! process is a child of the OCI runtime, which exits. Its process ID is known only after it may have ended. So exits
//! that nobody waits for are kept as long as somebody has said, by [`Reaper::expect`], that an unknown process is coming.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use stasis_oci_runtime::Call;
use stasis_sys::process;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::Error;
use crate::journal;

/// How long a process that was killed may take until it is gone before the shim stops waiting for it.
const KILLED_LIMIT: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Exit code or signal.
    pub(crate) status: ExitStatus,
    /// When the shim learned of it.
    pub(crate) at: SystemTime,
}

impl Ended {
    /// The exit status as containerd counts: the code, or 128 and the signal.
    pub(crate) fn code(&self) -> u32 {
        let signal = || self.status.signal().map_or(255, |signal| 128 + signal);
        self.status.code().unwrap_or_else(signal).unsigned_abs()
    }
}

#[derive(Debug, Default)]
struct Book {
    waiting: HashMap<i32, oneshot::Sender<Ended>>,
    unclaimed: HashMap<i32, Ended>,
    expecting: usize,
}

/// Waits for all children of the process.
#[derive(Debug, Default)]
pub(crate) struct Reaper(Mutex<Book>);

/// As long as this lives, exits of unknown children are kept for [`Reaper::watch`].
#[derive(Debug)]
pub(crate) struct Expecting(Arc<Reaper>);

impl Reaper {
    /// Announces a child that is not known yet.
    pub(crate) fn expect(self: &Arc<Self>) -> Expecting {
        self.book().expecting += 1;
        Expecting(Arc::clone(self))
    }

    /// The exit of a child: one just spawned, or one that was announced. The receiver fails if the shim ends first.
    pub(crate) fn watch(&self, pid: i32) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        let mut book = self.book();
        match book.unclaimed.remove(&pid) {
            // The receiver is in our hands, so the send cannot fail.
            Some(ended) => drop(sender.send(ended)),
            None => drop(book.waiting.insert(pid, sender)),
        }
        receiver
    }

    /// Runs a call of the OCI runtime to its end. It is killed when the time is up.
    pub(crate) async fn run(&self, call: Call, limit: Duration) -> Result<Vec<u8>, Error> {
        self.run_unless(call, limit, std::future::pending()).await
    }

    /// As [`Reaper::run`]; the call is also killed when `objection` comes, which is then the error.
    pub(crate) async fn run_unless(
        &self,
        mut call: Call,
        limit: Duration,
        objection: impl Future<Output = Error>,
    ) -> Result<Vec<u8>, Error> {
        let pid = call.spawn()?;
        let mut ended = self.watch(pid);
        let error = tokio::select! {
            biased;
            ended = &mut ended => {
                let ended = ended.map_err(|_| Error::Internal("the shim is ending".to_owned()))?;
                return Ok(call.finish(ended.status)?);
            }
            error = objection => error,
            () = tokio::time::sleep(limit) => call.timed_out(limit).into(),
        };
        // Not reaped, so the number is still its own.
        let _ = process::signal(pid, 9);
        let _ = tokio::time::timeout(KILLED_LIMIT, ended).await;
        Err(error)
    }

    /// As [`Reaper::run`], for calls whose stdio is not a container's.
    pub(crate) async fn run_captured(&self, mut call: Call, limit: Duration) -> Result<Vec<u8>, Error> {
        call.capture().map_err(Error::io("making memory for a program's output"))?;
        self.run(call, limit).await
    }

    /// Reaps for as long as the shim runs.
    pub(crate) async fn reap_for_ever(self: Arc<Self>) -> Result<(), Error> {
        let mut children = signal(SignalKind::child()).map_err(Error::io("watching for SIGCHLD"))?;
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return Err(Error::Internal("no more signals arrive".to_owned()));
            }
        }
    }

    fn reap(&self) {
        loop {
            match process::reap_any() {
                Ok(Some((pid, status))) => self.record(pid, Ended { status, at: SystemTime::now() }),
                Ok(None) => return,
                Err(error) => return journal::line(format_args!("cannot wait for children: {error}")),
            }
        }
    }

    fn record(&self, pid: i32, ended: Ended) {
        let mut book = self.book();
        match book.waiting.remove(&pid) {
            // Who no longer listens has lost interest.
            Some(waiting) => drop(waiting.send(ended)),
            None if book.expecting > 0 => drop(book.unclaimed.insert(pid, ended)),
            None => {}
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Expecting {
    fn drop(&mut self) {
        let mut book = self.0.book();
        book.expecting -= 1;
        if book.expecting == 0 {
            // A number can mean another process by the next time.
            book.unclaimed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(raw: i32) -> Ended {
        Ended { status: ExitStatus::from_raw(raw), at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn exit_codes_are_containerds() {
        assert_eq!(ended(3 << 8).code(), 3);
        assert_eq!(ended(9).code(), 137);
    }

    #[test]
    fn an_exit_before_the_watch_is_kept_only_while_expected() {
        let reaper = Arc::new(Reaper::default());
        reaper.record(7, ended(0));
        let expecting = reaper.expect();
        assert!(reaper.watch(7).try_recv().is_err(), "nobody had announced it");
        reaper.record(8, ended(1 << 8));
        assert_eq!(reaper.watch(8).try_recv().unwrap().code(), 1);
        reaper.record(9, ended(0));
        drop(expecting);
        let _expecting = reaper.expect();
        assert!(reaper.watch(9).try_recv().is_err(), "it may be another process by now");
    }
}
