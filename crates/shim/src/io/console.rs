//! The socket on which the OCI runtime sends a process's terminal.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use stasis_sys::pty;
use tokio::net::UnixListener;

use super::pipe::Pipe;
use crate::error::Error;

/// The runtime has ended when the terminal is asked for, so it is there, or it never comes.
const RECEIVE_LIMIT: Duration = Duration::from_secs(5);

static CONSOLES: AtomicU64 = AtomicU64::new(0);

/// A listening socket for one terminal, removed when dropped.
#[derive(Debug)]
pub(super) struct Console {
    listener: UnixListener,
    path: PathBuf,
    /// Keeps [`Console::path`] valid.
    _dir: OwnedFd,
}

impl Console {
    /// Listens in `dir`. A bundle's path can be longer than a socket's may be, so the socket is named through the
    /// descriptor of its directory, which the runtime can do just as well.
    pub(super) fn bind(dir: &Path) -> Result<Console, Error> {
        let failed = |error| Error::io(format!("making a console socket in {}", dir.display()))(error);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(dir, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let number = CONSOLES.fetch_add(1, Ordering::Relaxed);
        let place = format!("/proc/{}/fd/{}/.console-{number}.sock", std::process::id(), opened.as_raw_fd());
        let path = PathBuf::from(place);
        // Left by a shim that died here.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        Ok(Console { listener, path, _dir: opened })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) async fn receive(self) -> Result<Pipe, Error> {
        let terminal = async {
            let (stream, _) = self.listener.accept().await?;
            loop {
                stream.readable().await?;
                match stream.try_io(tokio::io::Interest::READABLE, || pty::receive_descriptor(&stream)) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                    received => return received,
                }
            }
        };
        match tokio::time::timeout(RECEIVE_LIMIT, terminal).await {
            Ok(received) => Pipe::new(received.map_err(Error::io("receiving the terminal from the OCI runtime"))?),
            Err(_) => Err(Error::Internal("the OCI runtime sent no terminal".to_owned())),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // A name less in a directory that goes away with its container.
        let _ = fs::remove_file(&self.path);
    }
}
