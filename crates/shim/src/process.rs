//! One process of a container, its first or a further one: its state, who waits for it, and its stdio.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use stasis_shim_api::AttachRequest;
use stasis_sys::process::signal;
use tokio::sync::{oneshot, watch};

use crate::error::Error;
use crate::io::{Stdio, Streams};
use crate::reaper::Ended;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 and the signal.
    pub(crate) status: u32,
    /// When.
    pub(crate) at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Known, but not there: a further process before its start, or a container to be restored.
    Waiting,
    /// There, and held by the OCI runtime.
    Created {
        /// Its process ID.
        pid: i32,
    },
    /// Running.
    Running {
        /// Its process ID.
        pid: i32,
    },
    /// Ended.
    Stopped {
        /// The process ID that it had; 0 if it never ran.
        pid: i32,
        /// How it ended.
        exit: Exit,
    },
}

/// What happens to a process.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// The OCI runtime has made it and holds it.
    Created(i32),
    /// It was let go, or came into being running.
    Started(i32),
    /// It ended.
    Ended(Exit),
}

impl State {
    /// The state after an event. News of an end may overtake the news of the start, so an end is final.
    pub(crate) fn after(self, event: Event) -> State {
        match (self, event) {
            (State::Stopped { .. }, _) => self,
            (_, Event::Created(pid)) => State::Created { pid },
            (_, Event::Started(pid)) => State::Running { pid },
            (_, Event::Ended(exit)) => State::Stopped { pid: self.pid(), exit },
        }
    }

    /// The process ID; 0 if there is none.
    pub(crate) fn pid(self) -> i32 {
        match self {
            State::Waiting => 0,
            State::Created { pid } | State::Running { pid } | State::Stopped { pid, .. } => pid,
        }
    }
}

/// A process, shared by all who ask about it.
#[derive(Debug)]
pub(crate) struct Process {
    /// How people call it: `container x`, or `exec y in container x`.
    pub(crate) name: String,
    /// What the Task API said of its stdio.
    pub(crate) stdio: Stdio,
    state: watch::Sender<State>,
    /// Whether it is reaped, so that its process ID may be anybody's, while its output is still on the way.
    reaped: AtomicBool,
    streams: Mutex<Option<Streams>>,
}

impl Process {
    pub(crate) fn new(name: String, stdio: Stdio) -> Arc<Process> {
        let state = watch::Sender::new(State::Waiting);
        Arc::new(Process { name, stdio, state, reaped: AtomicBool::new(false), streams: Mutex::new(None) })
    }

    pub(crate) fn state(&self) -> State {
        *self.state.borrow()
    }

    pub(crate) fn apply(&self, event: Event) {
        self.state.send_modify(|state| *state = state.after(event));
    }

    /// Gives it its stdio, from when on it is copied.
    pub(crate) fn connect(&self, streams: Streams) {
        *self.streams() = Some(streams);
    }

    /// Lets go of its stdio, also of copies for processes that it left behind.
    pub(crate) fn disconnect(&self) {
        self.streams().take();
    }

    /// Waits until it has ended and what it wrote has arrived.
    pub(crate) async fn wait(&self) -> Exit {
        let mut states = self.state.subscribe();
        loop {
            if let State::Stopped { exit, .. } = *states.borrow_and_update() {
                return exit;
            }
            if states.changed().await.is_err() {
                // The sender is a field of self.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Records its end, after `clean_up` and after its output has arrived.
    pub(crate) async fn record_end(&self, ended: oneshot::Receiver<Ended>, clean_up: impl Future<Output = ()>) {
        let Ok(ended) = ended.await else { return };
        self.reaped.store(true, Ordering::Relaxed);
        clean_up.await;
        let drained = self.streams().as_mut().map(Streams::drain);
        if let Some(drained) = drained {
            drained.await;
        }
        self.apply(Event::Ended(Exit { status: ended.code(), at: ended.at }));
    }

    /// Sends a signal. As it is our child and not reaped, its process ID is its own.
    pub(crate) fn kill(&self, number: u32) -> Result<(), Error> {
        let number = i32::try_from(number).map_err(|_| Error::Invalid(format!("{number} is no signal")))?;
        match self.state() {
            State::Waiting => Err(Error::Precondition(format!("{} has not been started", self.name))),
            State::Created { pid } | State::Running { pid } if !self.reaped.load(Ordering::Relaxed) => {
                signal(pid, number).map_err(Error::io(format!("sending signal {number} to {}", self.name)))
            }
            _ => Err(Error::NotFound(format!("{}: process already finished", self.name))),
        }
    }

    /// Sets the size of its terminal.
    pub(crate) fn resize(&self, columns: u32, rows: u32) -> Result<(), Error> {
        self.with_streams(|streams| streams.resize(columns, rows))
    }

    /// Ends its input.
    pub(crate) fn close_stdin(&self) -> Result<(), Error> {
        self.with_streams(|streams| {
            streams.close_stdin();
            Ok(())
        })
    }

    /// Attaches a client to it.
    pub(crate) fn attach(&self, request: &AttachRequest) -> Result<(), Error> {
        self.with_streams(|streams| streams.attach(request))
    }

    /// Begins its log files anew.
    pub(crate) fn reopen_logs(&self) -> Result<(), Error> {
        self.with_streams(|streams| streams.reopen_logs())
    }

    fn with_streams(&self, act: impl FnOnce(&mut Streams) -> Result<(), Error>) -> Result<(), Error> {
        match self.streams().as_mut() {
            Some(streams) => act(streams),
            None => Err(Error::Precondition(format!("{} is not running", self.name))),
        }
    }

    fn streams(&self) -> MutexGuard<'_, Option<Streams>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_final() {
        let exit = Exit { status: 3, at: SystemTime::UNIX_EPOCH };
        let created = State::Waiting.after(Event::Created(7));
        assert_eq!(created, State::Created { pid: 7 });
        assert_eq!(created.after(Event::Started(7)), State::Running { pid: 7 });
        let stopped = created.after(Event::Ended(exit));
        assert_eq!(stopped, State::Stopped { pid: 7, exit });
        assert_eq!(stopped.after(Event::Started(7)), stopped);
        assert_eq!(State::Waiting.after(Event::Ended(exit)).pid(), 0);
    }
}
