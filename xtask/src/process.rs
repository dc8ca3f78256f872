//! Child processes with a time limit, whose error output reaches the message. Knows nothing of what they do.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a child is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(5);

/// Lines of error output that a message repeats: enough for the cause, not a screenful.
const STDERR_LINES: usize = 20;

/// For programs that answer at once: probes, `--version`.
pub const SHORT: Duration = Duration::from_secs(20);

/// For programs that load and unpack packages.
pub const LONG: Duration = Duration::from_secs(600);

/// For compilers and test runs.
pub const BUILD: Duration = Duration::from_secs(2 * 3600);

/// What a finished program said.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

/// Runs a program to its end and returns its standard output; anything but exit code 0 is an error.
pub fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let said = ask(command, limit)?;
    if !said.status.success() {
        bail!("{} ended with {}: {}", shown(command), said.status, tail(&said.stderr));
    }
    Ok(said.stdout)
}

/// Runs a program to its end and returns what it said, whatever its exit code.
pub fn ask(command: &mut Command, limit: Duration) -> Result<Said> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {}", shown(command)))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = wait(&mut child, limit).with_context(|| shown(command))?;
    let text =
        |reader: thread::JoinHandle<Vec<u8>>| String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned();
    Ok(Said { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Runs a program that speaks to the terminal itself; anything but exit code 0 is an error.
pub fn show(command: &mut Command, limit: Duration) -> Result<()> {
    command.stdin(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("start {}", shown(command)))?;
    let status = wait(&mut child, limit).with_context(|| shown(command))?;
    if !status.success() {
        bail!("{} ended with {status}", shown(command));
    }
    Ok(())
}

/// Waits for a child; at the end of `limit` it is killed, reaped, and that is the error.
pub fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().context("wait for the process")? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill().context("kill the process")?;
            child.wait().context("reap the process")?;
            bail!("no end after {} seconds, killed", limit.as_secs());
        }
        thread::sleep(POLL);
    }
}

/// The command line as a person would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The last lines of an output, trimmed.
pub fn tail(output: &str) -> String {
    let lines: Vec<&str> = output.trim_end().lines().collect();
    lines[lines.len().saturating_sub(STDERR_LINES)..].join("\n")
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A read error ends the output early; the exit status decides about success.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_its_error_output() {
        let error = run(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"]), SHORT).unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains("no such thing") && message.contains("exit status: 3"), "{message}");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let error = ask(Command::new("sleep").arg("100"), Duration::from_millis(50)).unwrap_err();
        assert!(format!("{error:#}").contains("killed"), "{error:#}");
    }
}
