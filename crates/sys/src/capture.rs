//! Runs a program to its end: with a time limit, with what it said, and reaped.
//!
//! For programs that are asked something: plugins, OCI runtimes, shims at their start. What the program leaves running
//! behind it may go on; nothing waits for it. Calls block; asynchronous callers put them on a thread of their own.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;

use crate::process::{Pidfd, signal_group};

/// Read at once from a pipe: its default capacity.
const CHUNK: usize = 64 * 1024;

/// How far a program may go.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// After this the program and its process group are killed.
    pub time: Duration,
    /// More output than this, in bytes, and they are killed, too.
    pub stdout: usize,
    /// Of the error output, the last bytes are kept.
    pub stderr_tail: usize,
}

/// What a program said, and how it ended.
#[derive(Debug)]
pub struct Captured {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// The end of its error output.
    pub stderr: Vec<u8>,
}

/// Why a program did not get to an end of its own.
#[derive(Debug)]
pub enum Failure {
    /// It could not be started.
    Spawn(io::Error),
    /// The time was up; with the end of its error output.
    TimedOut(Duration, Vec<u8>),
    /// It said more than the limit.
    TooLong(usize),
    /// Its pipes could not be read or written, or it could not be waited for.
    Io(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Spawn(error) => write!(out, "cannot be started: {error}"),
            Failure::TimedOut(limit, stderr) => {
                write!(out, "was killed after {} s", limit.as_secs_f64())?;
                let stderr = String::from_utf8_lossy(stderr);
                if stderr.trim().is_empty() { Ok(()) } else { write!(out, ", having said: {}", stderr.trim()) }
            }
            Failure::TooLong(limit) => write!(out, "was killed: it said more than {limit} bytes"),
            Failure::Io(error) => write!(out, "cannot be followed: {error}"),
        }
    }
}

impl std::error::Error for Failure {}

/// Runs `command` in a process group of its own, with `input` on its standard input, until it ends. A process that it
/// left behind with the pipes still open is not waited for.
pub fn capture(command: &mut Command, input: &[u8], limits: &Limits) -> Result<Captured, Failure> {
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(Failure::Spawn)?;
    let mut running = match Running::new(&mut child, input) {
        Ok(running) => running,
        Err(error) => {
            kill_group(&mut child);
            return Err(Failure::Io(error));
        }
    };
    let followed = running.follow(limits);
    if followed.is_err() {
        kill_group(&mut child);
    }
    let (stdout, stderr) = (std::mem::take(&mut running.stdout), std::mem::take(&mut running.stderr));
    followed.map_err(|failure| match failure {
        Failure::TimedOut(limit, _) => Failure::TimedOut(limit, stderr.clone()),
        other => other,
    })?;
    let status = child.wait().map_err(Failure::Io)?;
    Ok(Captured { status, stdout, stderr })
}

/// The group, as a program that hangs may hang in a child of its own.
fn kill_group(child: &mut Child) {
    // Not reaped yet, so the number is still its own; a group that is gone already is what is wanted.
    let _ = signal_group(i32::try_from(child.id()).unwrap_or(i32::MAX), Signal::KILL);
    let _ = child.kill();
    let _ = child.wait();
}

struct Running<'a> {
    process: Pidfd,
    stdin: Option<std::process::ChildStdin>,
    input: &'a [u8],
    out: Option<std::process::ChildStdout>,
    err: Option<std::process::ChildStderr>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl<'a> Running<'a> {
    fn new(child: &mut Child, input: &'a [u8]) -> io::Result<Self> {
        let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        for pipe in [stdin.as_ref().map(AsFd::as_fd), out.as_ref().map(AsFd::as_fd), err.as_ref().map(AsFd::as_fd)] {
            let Some(pipe) = pipe else { continue };
            fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?;
        }
        let process = Pidfd::open(i32::try_from(child.id()).map_err(io::Error::other)?)?;
        Ok(Self { process, stdin, input, out, err, stdout: Vec::new(), stderr: Vec::new() })
    }

    /// Until the process has ended and its pipes hold no more.
    fn follow(&mut self, limits: &Limits) -> Result<(), Failure> {
        let deadline = Instant::now() + limits.time;
        loop {
            let ended = self.wait(deadline.saturating_duration_since(Instant::now())).map_err(Failure::Io)?;
            self.write().map_err(Failure::Io)?;
            self.read(limits)?;
            if ended {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::TimedOut(limits.time, Vec::new()));
            }
        }
    }

    /// Waits for the process or one of the pipes; whether the process has ended.
    fn wait(&self, time: Duration) -> io::Result<bool> {
        let mut fds = vec![PollFd::new(&self.process, PollFlags::IN)];
        fds.extend(self.stdin.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        fds.extend(self.out.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        fds.extend(self.err.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let time =
            Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() };
        match poll(&mut fds, Some(&time)) {
            Ok(_) => Ok(fds[0].revents().contains(PollFlags::IN)),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(pipe) = &mut self.stdin else { return Ok(()) };
        while !self.input.is_empty() {
            match pipe.write(self.input) {
                Ok(written) => self.input = &self.input[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // A program need not read what it is given.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => return Err(error),
            }
        }
        self.stdin = None;
        Ok(())
    }

    fn read(&mut self, limits: &Limits) -> Result<(), Failure> {
        let too_long = |have: &Vec<u8>| have.len() > limits.stdout;
        if let Some(pipe) = &mut self.out
            && read_some(pipe, &mut self.stdout, &mut |have| too_long(have)).map_err(Failure::Io)?
        {
            self.out = None;
        }
        if too_long(&self.stdout) {
            return Err(Failure::TooLong(limits.stdout));
        }
        let mut keep_tail = |have: &mut Vec<u8>| {
            let surplus = have.len().saturating_sub(limits.stderr_tail);
            have.drain(..surplus);
            false
        };
        if let Some(pipe) = &mut self.err
            && read_some(pipe, &mut self.stderr, &mut keep_tail).map_err(Failure::Io)?
        {
            self.err = None;
        }
        Ok(())
    }
}

/// Reads what there is, handing it to `full` after each piece, until that says so; whether the end was met.
fn read_some(pipe: &mut impl Read, have: &mut Vec<u8>, full: &mut dyn FnMut(&mut Vec<u8>) -> bool) -> io::Result<bool> {
    let mut piece = [0u8; CHUNK];
    // At most as much as a pipe holds, so that a program that never stops to speak does not keep us from the clock.
    for _ in 0..16 {
        match pipe.read(&mut piece) {
            Ok(0) => return Ok(true),
            Ok(length) => have.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if full(have) {
            break;
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { time: Duration::from_secs(20), stdout: 1 << 20, stderr_tail: 8 };

    fn sh(script: &str, input: &[u8], limits: &Limits) -> Result<Captured, Failure> {
        capture(Command::new("/bin/sh").args(["-c", script]), input, limits)
    }

    #[test]
    fn input_output_errors_and_status_arrive() {
        let big = vec![b'x'; 300_000];
        let got = sh("cat; echo a long complaint >&2; exit 3", &big, &LIMITS).unwrap();
        assert_eq!(got.status.code(), Some(3));
        assert_eq!(got.stdout, big);
        assert_eq!(got.stderr, b"mplaint\n");
    }

    #[test]
    fn input_that_nobody_reads_is_no_error() {
        let got = sh("exec <&-; echo done", &vec![b'x'; 300_000], &LIMITS).unwrap();
        assert_eq!(got.stdout, b"done\n");
    }

    #[test]
    fn a_hanging_program_is_killed_with_its_children() {
        let limits = Limits { time: Duration::from_millis(300), ..LIMITS };
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! >{}; echo waiting >&2; wait", pid_file.display());
        let Err(Failure::TimedOut(_, stderr)) = sh(&script, b"", &limits) else { panic!("it ended") };
        assert_eq!(stderr, b"waiting\n");
        let pid = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
        // Gone already, or about to go; a sleep that was spared would take longer than the limit.
        let Ok(left) = Pidfd::open(pid) else { return };
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&left, PollFlags::IN)], Some(&limit)), Ok(1));
    }

    #[test]
    fn too_much_output_is_the_end() {
        assert!(matches!(sh("yes", b"", &LIMITS), Err(Failure::TooLong(1_048_576))));
    }

    #[test]
    fn a_process_left_behind_is_not_waited_for() {
        let got = sh("sleep 1000 & echo $!", b"", &LIMITS).unwrap();
        let pid: i32 = String::from_utf8(got.stdout).unwrap().trim().parse().unwrap();
        Pidfd::open(pid).expect("it still runs").signal(Signal::KILL).unwrap();
    }

    #[test]
    fn a_missing_program_is_a_failed_start() {
        let failure = capture(&mut Command::new("/no/such/program"), b"", &LIMITS).unwrap_err();
        assert!(failure.to_string().starts_with("cannot be started: "), "{failure}");
    }
}
