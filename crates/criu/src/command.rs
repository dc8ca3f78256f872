//! Runs the `criu` binary for a short question, with a time limit and bounded output.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Longest answer that is kept of either stream; `criu check` says a few lines.
const OUTPUT_MAX: u64 = 64 * 1024;
/// How often an unfinished child is looked at. The answers take 3 to 50 ms.
const POLL: Duration = Duration::from_millis(2);

/// What a finished program said.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// The last line that says something, for an error.
    pub(crate) fn last_line(&self) -> String {
        let mut lines = self.stderr.lines().chain(self.stdout.lines()).map(str::trim);
        lines.rfind(|line| !line.is_empty()).map_or_else(|| self.status.to_string(), str::to_owned)
    }
}

/// Runs `binary` to its end and gives what it said; kills it after `limit`.
pub(crate) fn run<A: AsRef<OsStr>>(binary: &Path, arguments: &[A], limit: Duration) -> Result<Output> {
    let spawn_error = |source| Error::Spawn { binary: binary.to_owned(), source };
    let mut command = Command::new(binary);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(spawn_error)?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let Some(status) = wait(&mut child, limit).map_err(spawn_error)? else {
        let arguments =
            arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ");
        return Err(Error::TimedOut { binary: binary.to_owned(), arguments, seconds: limit.as_secs() });
    };
    Ok(Output { status, stdout: joined(stdout), stderr: joined(stderr) })
}

fn collect<R: Read + Send + 'static>(stream: Option<R>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // A stream that breaks has said what it has said; the rest is read away so that the writer can end.
            let _ = stream.by_ref().take(OUTPUT_MAX).read_to_end(&mut bytes);
            let _ = io::copy(&mut stream, &mut io::sink());
        }
        bytes
    })
}

fn joined(thread: thread::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
}

/// Waits up to `limit`, then kills and reaps; none means that it was killed.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_status_and_both_streams() {
        let output =
            run(Path::new("/bin/sh"), &["-c", "echo out; echo err >&2; exit 3"], Duration::from_secs(10)).unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let error = run(Path::new("/bin/sleep"), &["600"], Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run::<&str>(Path::new("/no/criu"), &[], Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains("/no/criu") && error.contains("No such file"), "{error}");
    }
}
