//! The privileged side: starts the helper, feeds it, and takes its word within limits.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stasis_sys::process::{Setup, prepare};

use crate::error::{Error, Reason, Refusal, Result};
use crate::feed;
use crate::grant::Grant;
use crate::helper::{ARCHIVE, MEMBERS, SUBCOMMAND};
use crate::plan::Verdict;

/// Largest verdict: 300 bytes a thread, for the 32768 that a host has by default.
const VERDICT_MAX: u64 = 16 << 20;
/// What is kept of the helper's error output.
const STDERR_MAX: u64 = 4096;
/// Longest time for an archive's small files. A verification takes a hundredth of a second.
const MEMBERS_LIMIT: Duration = Duration::from_secs(30);
/// Longest time for an archive, which may have to be decompressed.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(900);

/// The program that becomes the helper by [`SUBCOMMAND`].
#[derive(Clone, Debug)]
pub struct Helper {
    /// Its path.
    pub program: PathBuf,
}

impl Helper {
    /// This program itself, also after its file was replaced.
    pub fn this_program() -> Self {
        Self { program: "/proc/self/exe".into() }
    }
}

/// What is verified.
#[derive(Debug)]
pub enum Source<'a> {
    /// An archive, opened once, against its own specification.
    Archive(File),
    /// An archive that was unpacked into a directory of ours, against a request.
    Directory(&'a Path, &'a Grant),
}

/// Verifies; blocks until the helper has ended.
///
/// # Errors
/// If the helper could not do its work: the checkpoint is then not to be restored either.
pub fn run(helper: &Helper, source: Source<'_>) -> Result<Verdict> {
    let (argument, limit) = match &source {
        Source::Archive(_) => (ARCHIVE, ARCHIVE_LIMIT),
        Source::Directory(..) => (MEMBERS, MEMBERS_LIMIT),
    };
    let mut command = Command::new(&helper.program);
    command.args([OsString::from(SUBCOMMAND), argument.into()]).env_clear().current_dir("/");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    prepare(&mut command, Setup { new_session: true, only_stdio: true, ..Setup::default() });
    let failed = |why: String| Error::Helper { program: helper.program.display().to_string(), why };
    match source {
        Source::Archive(file) => {
            command.stdin(file);
            let child = command.spawn().map_err(|error| failed(format!("cannot be started: {error}")))?;
            finish(child, limit, || Ok(())).map_err(failed)
        }
        Source::Directory(dir, grant) => {
            let grant = serde_json::to_vec(grant).map_err(|error| failed(error.to_string()))?;
            command.stdin(Stdio::piped());
            let mut child = command.spawn().map_err(|error| failed(format!("cannot be started: {error}")))?;
            let pipe = child.stdin.take();
            let feed = move || match pipe {
                Some(pipe) => feed::write(dir, &grant, &mut BufWriter::new(pipe)),
                None => Ok(()),
            };
            finish(child, limit, feed).map_err(failed)
        }
    }
}

/// Feeds the helper, takes what it says, waits for its end.
fn finish(
    mut child: Child,
    limit: Duration,
    feed: impl FnOnce() -> io::Result<()> + Send,
) -> std::result::Result<Verdict, String> {
    let deadline = Instant::now() + limit;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let pidfd = stasis_sys::process::Pidfd::open(child.id().cast_signed()).map_err(|error| error.to_string());
    let (fed, said, complaint, timely) = std::thread::scope(|scope| {
        let feeder = scope.spawn(feed);
        let out = scope.spawn(|| read_limited(out, VERDICT_MAX));
        let err = scope.spawn(|| read_limited(err, STDERR_MAX));
        let timely = pidfd.as_ref().is_ok_and(|pidfd| ends_before(pidfd, deadline));
        if !timely {
            // Not reaped yet: the number is its own. The pipes end with it.
            let _ = child.kill();
        }
        (feeder.join(), out.join().unwrap_or_default(), err.join().unwrap_or_default(), timely)
    });
    let status = child.wait().map_err(|error| format!("cannot be waited for: {error}"))?;
    pidfd?;
    if !timely {
        return Err(format!("was killed after {} s", limit.as_secs()));
    }
    if status.success() {
        return serde_json::from_slice(&said).map_err(|error| format!("said what is no verdict: {error}"));
    }
    if status.signal().is_some() {
        // What is hostile ran it into its limits, or into a bug that then could do nothing.
        let why = format!("the verifier ended by {status}: the archive needs more than is accepted, or attacks it");
        return Ok(Verdict::Refused(Refusal::new(Reason::VerifierLimits, "archive", why)));
    }
    let complaint = String::from_utf8_lossy(&complaint).trim().to_owned();
    match fed {
        Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(format!("could not be fed: {error}")),
        _ => Err(format!("ended by {status}: {complaint}")),
    }
}

fn ends_before(pidfd: &impl AsFd, deadline: Instant) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let time =
            Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&time)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn read_limited(pipe: Option<impl Read>, limit: u64) -> Vec<u8> {
    let mut said = Vec::new();
    if let Some(pipe) = pipe {
        let mut pipe = pipe.take(limit);
        // What was said before an error counts; a torn verdict is none.
        let _ = pipe.read_to_end(&mut said);
        let _ = io::copy(&mut pipe.into_inner(), &mut io::sink());
    }
    said
}
