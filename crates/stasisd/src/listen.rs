//! The daemon's socket: bound with mode 0600 before anybody can connect, and an accept loop that nothing ends.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::Stream;

/// Longest path of a unix socket: `sockaddr_un` holds 108 bytes with the terminating zero (unix(7)).
const PATH_MAX: usize = 107;
/// Connections that may wait for accept; the kernel's usual `somaxconn` cuts it further.
const BACKLOG: i32 = 4096;
/// Pause after a failed accept: with no file descriptor left, trying again at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound socket; its file goes when this does.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Binds `path` with mode 0600. A file left by a dead daemon is replaced, a living one's is not.
    ///
    /// Must be called inside the tokio runtime.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        refuse_long(path)?;
        remove_stale(path)?;
        let describe = || format!("cannot listen on {}", path.display());
        let listener = bind_private(path).with_context(describe)?;
        let inode = std::fs::symlink_metadata(path).with_context(describe)?.ino();
        let listener = std::os::unix::net::UnixListener::from(listener);
        Ok(Self { listener: UnixListener::from_std(listener).with_context(describe)?, path: path.to_owned(), inode })
    }

    /// Connections of our own user and of root, for ever: a failed accept is logged and tried again.
    pub(crate) fn connections(self) -> impl Stream<Item = io::Result<UnixStream>> {
        futures_util::stream::unfold(self, |socket| async move {
            let connection = socket.accept().await;
            Some((Ok(connection), socket))
        })
    }

    async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) if is_trusted(&stream) => return stream,
                Ok(_) => tracing::warn!("refused a connection of another user"),
                Err(error) => {
                    tracing::error!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    /// Removes the file, unless another daemon has put its own there since.
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Mode 0600 keeps others out; this holds even where somebody loosened the mode by hand.
fn is_trusted(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw())
}

fn refuse_long(path: &Path) -> anyhow::Result<()> {
    let length = path.as_os_str().len();
    if length > PATH_MAX {
        bail!(
            "cannot listen on {}: the path has {length} bytes, a unix socket takes at most {PATH_MAX}; \
             choose a shorter --listen or --state",
            path.display(),
        );
    }
    Ok(())
}

/// Removes a socket on which nobody answers.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let file_type = match std::fs::symlink_metadata(path) {
        Ok(file) => file.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    };
    if !file_type.is_socket() {
        bail!(
            "cannot listen on {}: there is a file that is no socket; remove it or choose another --listen",
            path.display()
        );
    }
    match StdUnixStream::connect(path) {
        Ok(_) => bail!("another process answers on {}; stop it or choose another --listen", path.display()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {}", path.display()))
        }
        Err(error) => {
            Err(error).with_context(|| format!("cannot tell whether the socket {} is in use", path.display()))
        }
    }
}

/// Until `listen`, connecting is refused: nobody gets in between `bind` and `chmod`.
fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let first = Socket::bind(&path).unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert_eq!(error, format!("another process answers on {}; stop it or choose another --listen", path.display()));
        drop(first);
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        assert!(Socket::bind(&path).unwrap_err().to_string().contains("no socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_explained() {
        let error = Socket::bind(Path::new(&format!("/tmp/{}", "x".repeat(200)))).unwrap_err().to_string();
        assert!(error.contains("the path has 205 bytes, a unix socket takes at most 107"), "{error}");
    }

    #[tokio::test]
    async fn connections_come_through() {
        use tokio_stream::StreamExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut connections = Box::pin(Socket::bind(&path).unwrap().connections());
        let _client = StdUnixStream::connect(&path).unwrap();
        connections.next().await.unwrap().unwrap();
    }
}
