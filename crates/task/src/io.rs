//! Where streams go: URIs of logs, and FIFOs between a process and the daemon.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use stasis_shim_api::CRI_LOG_SCHEME;
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};

use crate::bundle::blocking;
use crate::{Error, Io, Result, binary};

/// Where a container's output goes so that it ends up in the file `path`: for our shim in the CRI log format
/// (`cri://…`); for any other as it comes (`file://…`), since other shims know nothing of CRI.
pub fn log_uri(runtime: &str, path: &Path) -> String {
    let scheme = if binary::is_ours(runtime) { CRI_LOG_SCHEME } else { "file://" };
    format!("{scheme}{}", path.display())
}

/// Which streams a process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Error output; with a terminal there is none.
    pub stderr: bool,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// FIFOs for a process's streams, in a directory of their own, with our ends of them. Removed with the value; ends that
/// were taken out go on working.
///
/// The shim opens its ends at the process's start at the latest. Until then a FIFO without a writer would read as ended,
/// so the value holds the other ends, too, and lets go of them in [`Fifos::connected`], which therefore must be called
/// after the start: only then does the end of the output show.
#[derive(Debug)]
pub struct Fifos {
    dir: PathBuf,
    io: Io,
    stdin: Option<Sender>,
    stdout: Option<Receiver>,
    stderr: Option<Receiver>,
    held: (Option<Receiver>, Option<Sender>, Option<Sender>),
}

impl Fifos {
    /// Makes the directory `dir`, which must not exist, mode 0700, and the FIFOs in it.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing stays then.
    pub async fn create(dir: &Path, streams: Streams) -> Result<Self> {
        let mut fifos = Self {
            dir: dir.into(),
            io: Io { terminal: streams.terminal, ..Io::default() },
            stdin: None,
            stdout: None,
            stderr: None,
            held: (None, None, None),
        };
        let new = dir.to_owned();
        blocking(move || {
            use std::os::unix::fs::DirBuilderExt as _;
            let made = std::fs::DirBuilder::new().mode(0o700).create(&new);
            made.map_err(|error| Error::io("cannot make", new.display(), error))
        })
        .await?;
        if streams.stdin {
            let (path, receiver, sender) = fifo(dir, "stdin")?;
            (fifos.io.stdin, fifos.held.0, fifos.stdin) = (path, Some(receiver), Some(sender));
        }
        if streams.stdout {
            let (path, receiver, sender) = fifo(dir, "stdout")?;
            (fifos.io.stdout, fifos.stdout, fifos.held.1) = (path, Some(receiver), Some(sender));
        }
        if streams.stderr && !streams.terminal {
            let (path, receiver, sender) = fifo(dir, "stderr")?;
            (fifos.io.stderr, fifos.stderr, fifos.held.2) = (path, Some(receiver), Some(sender));
        }
        Ok(fifos)
    }

    /// The paths, as a process takes them.
    pub fn io(&self) -> Io {
        self.io.clone()
    }

    /// Our end of the standard input, once.
    pub fn take_stdin(&mut self) -> Option<Sender> {
        self.stdin.take()
    }

    /// Our end of the standard output, once.
    pub fn take_stdout(&mut self) -> Option<Receiver> {
        self.stdout.take()
    }

    /// Our end of the error output, once.
    pub fn take_stderr(&mut self) -> Option<Receiver> {
        self.stderr.take()
    }

    /// The process was started: from now on our ends see when the others close theirs.
    pub fn connected(&mut self) {
        self.held = (None, None, None);
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        // A few names in a tmpfs. What cannot be removed here goes with the directory above it.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Makes one and opens both its ends.
fn fifo(dir: &Path, name: &str) -> Result<(String, Receiver, Sender)> {
    let path = dir.join(name);
    let failed = |error: std::io::Error| Error::io("cannot make the FIFO", path.display(), error);
    let text = path.to_str().ok_or_else(|| failed(std::io::Error::other("its path is not UTF-8")))?.to_owned();
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).map_err(|error| failed(error.into()))?;
    // Neither blocks: the receiver needs no sender, and the sender has the receiver.
    let receiver = OpenOptions::new().open_receiver(&path).map_err(failed)?;
    let sender = OpenOptions::new().open_sender(&path).map_err(failed)?;
    Ok((text, receiver, sender))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn logs_are_cri_only_for_our_shim() {
        let path = Path::new("/var/log/pods/x/0.log");
        assert_eq!(log_uri("io.containerd.stasis.v1", path), "cri:///var/log/pods/x/0.log");
        assert_eq!(log_uri("io.containerd.runc.v2", path), "file:///var/log/pods/x/0.log");
    }

    #[tokio::test]
    async fn output_ends_when_the_process_closes_it_and_not_before() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("exec");
        let mut fifos = Fifos::create(&dir, Streams { stdout: true, stdin: true, ..Streams::default() }).await.unwrap();
        let mut ours = fifos.take_stdout().unwrap();
        let mut theirs = OpenOptions::new().open_sender(&fifos.io().stdout).unwrap();
        let mut their_stdin = OpenOptions::new().open_receiver(&fifos.io().stdin).unwrap();
        fifos.connected();
        theirs.write_all(b"hello").await.unwrap();
        drop(theirs);
        let mut text = String::new();
        ours.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        let mut our_stdin = fifos.take_stdin().unwrap();
        our_stdin.write_all(b"input").await.unwrap();
        drop(our_stdin);
        text.clear();
        their_stdin.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "input");
        drop(fifos);
        assert!(!dir.exists());
    }
}
