//! One end of a pipe, FIFO or terminal, read and written without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::Error;

/// An end of a pipe, FIFO or terminal that is ours alone.
#[derive(Debug)]
pub(super) struct Pipe(AsyncFd<OwnedFd>);

impl Pipe {
    /// Makes the descriptor non-blocking: its open file description must not be shared with a process that minds.
    #[expect(
        deprecated,
        reason = "the replacement is unsafe for types that may change their descriptor; OwnedFd does not"
    )]
    pub(super) fn new(fd: OwnedFd) -> Result<Pipe, Error> {
        let open = || {
            fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
            io::Result::Ok(())
        };
        open().and_then(|()| AsyncFd::new(fd)).map(Pipe).map_err(Error::io("watching a pipe"))
    }

    /// Waits until a read would say something.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut ready| ready.retain_ready())
    }

    /// Reads what is there; `None` when that is nothing for now, 0 at the end.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self.0.try_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?)) {
            Ok(length) => Ok(Some(length)),
            Err(error) if is_transient(&error) => Ok(None),
            // A terminal says so when nobody has its other end open any more.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(Some(0)),
            Err(error) => Err(error),
        }
    }

    /// Writes what fits; `None` when that is nothing for now.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        match self.0.try_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?)) {
            Ok(length) => Ok(Some(length)),
            Err(error) if is_transient(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until a write would take something, or fail.
    pub(super) async fn writable(&self) -> io::Result<()> {
        self.0.writable().await.map(|mut ready| ready.retain_ready())
    }

    /// Waits until nobody has the other end of this writer open any more.
    pub(super) async fn hung_up(&self) {
        // An error of the reactor's is the end of the shim.
        let _ = self.0.ready(Interest::ERROR).await;
    }

    /// Writes everything, waiting for the reader as long as it takes.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write(bytes)? {
                Some(written) => bytes = &bytes[written..],
                None => self.writable().await?,
            }
        }
        Ok(())
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
