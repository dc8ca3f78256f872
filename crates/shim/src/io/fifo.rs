//! Named FIFOs, by which containerd's clients bring input and take output.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use stasis_sys::path::fd_path;

use super::pipe::Pipe;
use crate::error::Error;
use crate::journal;

/// How long a full FIFO is taken for a slow reader before it is asked whether there is a reader at all.
const STALL: Duration = Duration::from_secs(5);

/// One end of a FIFO that is held only so that the other never sees it closed.
pub(super) type Keeper = OwnedFd;

/// The output end of a FIFO. Without a reader a write neither fails nor waits for ever: the FIFO fills, and then what
/// comes is dropped, so that a client that died blocks no container.
#[derive(Debug)]
pub(super) struct FifoWriter {
    path: PathBuf,
    pipe: Pipe,
    reader: Option<Keeper>,
    lost: u64,
}

/// Opens a FIFO for input, together with a writer: as long as that is kept the input has no end, whoever else comes and
/// goes.
pub(super) fn open_input(path: &Path) -> Result<(Pipe, Keeper), Error> {
    let reader = open_end(path, OFlags::RDONLY)?;
    let keeper = open_end(path, OFlags::WRONLY)?;
    Ok((Pipe::new(reader)?, keeper))
}

impl FifoWriter {
    pub(super) fn open(path: &Path) -> Result<FifoWriter, Error> {
        // The reader first: without one, opening for writing fails.
        let reader = open_end(path, OFlags::RDONLY)?;
        let writer = open_end(path, OFlags::WRONLY)?;
        Ok(FifoWriter { path: path.to_path_buf(), pipe: Pipe::new(writer)?, reader: Some(reader), lost: 0 })
    }

    /// Writes everything, unless nobody reads.
    pub(super) async fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.pipe.write(bytes) {
                Ok(Some(written)) => bytes = &bytes[written..],
                Ok(None) => {
                    if !self.wait_for_reader().await {
                        return self.lose(bytes.len(), "nobody reads it");
                    }
                }
                Err(error) => return self.lose(bytes.len(), &error.to_string()),
            }
        }
    }

    /// Whether it makes sense to try again.
    async fn wait_for_reader(&mut self) -> bool {
        // Once output was lost for want of a reader, the container does not wait again until there is one.
        let patience = if self.lost > 0 { Duration::ZERO } else { STALL };
        if tokio::time::timeout(patience, self.pipe.writable()).await.is_ok() {
            return true;
        }
        let reader = self.has_reader();
        if reader {
            // It reads, if slowly.
            self.lost = 0;
        }
        reader
    }

    /// Lets go of our own reader for a moment: without any other the kernel then reports an error condition. What is in
    /// the FIFO stays there, because our writer is open.
    fn has_reader(&mut self) -> bool {
        self.reader = None;
        let mut fds = [PollFd::from_borrowed_fd(self.pipe.as_fd(), PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let alone = poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::ERR);
        self.reader =
            open(fd_path(&self.pipe), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok();
        !alone
    }

    fn lose(&mut self, bytes: usize, why: &str) {
        if self.lost == 0 {
            journal::line(format_args!("output to {} is dropped: {why}", self.path.display()));
        }
        self.lost = self.lost.saturating_add(bytes as u64);
    }
}

pub(super) fn open_end(path: &Path, access: OFlags) -> Result<OwnedFd, Error> {
    let failed = |error: rustix::io::Errno| match error {
        rustix::io::Errno::NOENT => Error::NotFound(format!("FIFO {} does not exist", path.display())),
        other => Error::io(format!("opening the FIFO {}", path.display()))(other.into()),
    };
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = open(path, flags, Mode::empty()).map_err(failed)?;
    match FileType::from_raw_mode(fstat(&fd).map_err(failed)?.st_mode) {
        FileType::Fifo => Ok(fd),
        _ => Err(Error::Invalid(format!("{} is no FIFO; for a file say file://{0}", path.display()))),
    }
}
