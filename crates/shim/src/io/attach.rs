//! Clients that are attached to a process: its output goes to them beside the log, its input comes from them.
//!
//! A client brings FIFOs that it has opened at its end. It leaves by closing them, be it that it has seen enough, that it
//! was killed, or that the daemon it is a part of was. Nothing that a client does, or does not do, delays the process, its
//! log, or another client.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionread};
use stasis_shim_api::AttachRequest;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::copy;
use super::fifo::open_end;
use super::pipe::Pipe;
use crate::error::Error;

/// What an output FIFO holds for a client that is not reading just now; an unprivileged process may have as much. It is
/// the kernel's memory, not the shim's.
const FIFO_BYTES: usize = 1 << 20;

/// Clients of one process at a time. People attach; more than this are clients that someone forgot.
const CLIENTS_MAX: usize = 32;

/// One output of a process and the clients that read it.
#[derive(Clone, Debug)]
pub(super) struct Taps(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    taps: Mutex<Vec<Arc<Tap>>>,
    ended: watch::Sender<bool>,
    terminal: bool,
}

/// One client of one output.
#[derive(Debug)]
struct Tap {
    pipe: Pipe,
    /// Bytes that did not fit since the last that did.
    lost: Mutex<u64>,
}

/// The input of a process that clients feed, until it is closed.
#[derive(Clone, Debug)]
pub(super) struct Input(Arc<Mutex<Option<Arc<Pipe>>>>);

/// The clients of a process.
#[derive(Debug)]
pub(super) struct Clients {
    stdout: Taps,
    stderr: Taps,
    input: Option<Input>,
    tasks: JoinSet<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Taps {
    pub(super) fn new(terminal: bool) -> Taps {
        Taps(Arc::new(Shared { taps: Mutex::default(), ended: watch::Sender::new(false), terminal }))
    }

    /// Gives every client what fits its FIFO.
    pub(super) fn write(&self, bytes: &[u8]) {
        lock(&self.0.taps).retain(|tap| tap.write(bytes, self.0.terminal));
    }

    /// No more comes: the clients see the end.
    pub(super) fn end(&self) {
        lock(&self.0.taps).clear();
        self.0.ended.send_replace(true);
    }

    fn open(&self, path: &Path) -> Result<Arc<Tap>, Error> {
        let fifo = open_end(path, OFlags::WRONLY)?;
        // Less is as good, if sooner full.
        let _ = rustix::pipe::fcntl_setpipe_size(&fifo, FIFO_BYTES);
        Ok(Arc::new(Tap { pipe: Pipe::new(fifo)?, lost: Mutex::new(0) }))
    }

    /// Serves a client until it goes or the output ends.
    async fn serve(self, tap: Option<Arc<Tap>>) {
        let Some(tap) = tap else { return };
        let mut ended = self.0.ended.subscribe();
        lock(&self.0.taps).push(Arc::clone(&tap));
        tokio::select! {
            () = tap.pipe.hung_up() => {}
            // An error means that the output is gone altogether.
            _ = ended.wait_for(|ended| *ended) => {}
        }
        lock(&self.0.taps).retain(|other| !Arc::ptr_eq(other, &tap));
    }
}

impl Tap {
    /// Writes what fits. Whether the client is still there.
    fn write(&self, bytes: &[u8], terminal: bool) -> bool {
        let mut lost = lock(&self.lost);
        let mut rest = bytes;
        if *lost > 0 {
            let Some(begin) = self.resumes(bytes, terminal) else {
                *lost += bytes.len() as u64;
                return true;
            };
            rest = &bytes[begin..];
            let end = if terminal { "\r\n" } else { "\n" };
            let missing = *lost + begin as u64;
            let notice = format!("{end}[{missing} bytes are left out here: this client reads too slowly]{end}");
            // Short enough for a pipe to take it whole.
            if self.put(notice.as_bytes()) != Ok(notice.len()) {
                *lost += bytes.len() as u64;
                return true;
            }
        }
        match self.put(rest) {
            Ok(written) => *lost = (rest.len() - written) as u64,
            Err(Errno::AGAIN | Errno::INTR) => *lost = rest.len() as u64,
            Err(_) => return false,
        }
        true
    }

    /// Where in `bytes` a client that has missed something goes on: at a line, and not before it has read half of what is
    /// there, so that it does not get a notice a line.
    fn resumes(&self, bytes: &[u8], terminal: bool) -> Option<usize> {
        let unread = ioctl_fionread(self.pipe.as_fd()).unwrap_or(0);
        if unread > FIFO_BYTES as u64 / 2 {
            return None;
        }
        match terminal {
            true => Some(0),
            false => bytes.iter().position(|byte| *byte == b'\n').map(|end| end + 1),
        }
    }

    /// Past the reactor, which hears of room in the FIFO later than it is there.
    fn put(&self, bytes: &[u8]) -> Result<usize, Errno> {
        if bytes.is_empty() { Ok(0) } else { rustix::io::write(self.pipe.as_fd(), bytes) }
    }
}

impl Input {
    pub(super) fn new(pipe: Arc<Pipe>) -> Input {
        Input(Arc::new(Mutex::new(Some(pipe))))
    }

    /// The process sees the end of its input.
    pub(super) fn close(&self) {
        lock(&self.0).take();
    }

    /// Copies a client's input until its end, or until the process takes no more.
    async fn feed(self, source: Pipe, ends: bool) {
        while let Some(bytes) = copy::next(&source).await {
            // Held for this piece only: another client may close it.
            let Some(target) = lock(&self.0).clone() else { break };
            if target.write_all(&bytes).await.is_err() {
                break;
            }
        }
        if ends {
            self.close();
        }
    }
}

impl Clients {
    pub(super) fn new(stdout: Taps, stderr: Taps, input: Option<Input>) -> Clients {
        Clients { stdout, stderr, input, tasks: JoinSet::new() }
    }

    /// The process sees the end of its input; not on a terminal, where it is typed.
    pub(super) fn close_input(&self) {
        if let Some(input) = self.input.as_ref().filter(|_| !self.stdout.0.terminal) {
            input.close();
        }
    }

    pub(super) fn attach(&mut self, request: &AttachRequest) -> Result<(), Error> {
        while self.tasks.try_join_next().is_some() {}
        if self.tasks.len() >= CLIENTS_MAX {
            return Err(Error::Precondition(format!(
                "container {} has {CLIENTS_MAX} attached clients: detach one first",
                request.id
            )));
        }
        let input = match (&request.stdin, &self.input) {
            (None, _) => None,
            (Some(path), Some(input)) => Some((Pipe::new(open_end(path, OFlags::RDONLY)?)?, input.clone())),
            (Some(_), None) => {
                return Err(Error::Precondition(format!("container {} was made without an input", request.id)));
            }
        };
        let stdout = request.stdout.as_deref().map(|path| self.stdout.open(path)).transpose()?;
        let stderr = request.stderr.as_deref().map(|path| self.stderr.open(path)).transpose()?;
        let reads = stdout.is_some() || stderr.is_some();
        let (of_stdout, of_stderr, ends) = (self.stdout.clone(), self.stderr.clone(), request.ends_stdin);
        self.tasks.spawn(async move {
            let feeding = async {
                if let Some((source, input)) = input {
                    input.feed(source, ends).await;
                }
                // A client that also reads is there as long as it does.
                if reads {
                    std::future::pending::<()>().await;
                }
            };
            let reading = async {
                if !reads {
                    std::future::pending::<()>().await;
                }
                tokio::join!(of_stdout.serve(stdout), of_stderr.serve(stderr))
            };
            tokio::select! {
                () = feeding => {}
                _ = reading => {}
            }
        });
        Ok(())
    }
}
