//! `logs`: reads the log file itself, as the kubelet does. The daemon is asked only where it lies.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use stasis_cri_api::runtime::{ContainerState, ContainerStatus, ContainerStatusRequest};
use tokio::time::Instant;

use crate::cli::Logs;
use crate::client::Client;
use crate::crilog::{Reader, Stream, parse};
use crate::failure::{Failure, Result};
use crate::lookup;

/// How often a log that is followed is looked at. inotify would not see a rotation on every file system.
const POLL: Duration = Duration::from_millis(100);

/// How often the daemon is asked whether the container still runs.
const STATUS_POLL: Duration = Duration::from_secs(1);

pub(crate) async fn logs(client: &Client, options: &Logs) -> Result<()> {
    let id = lookup::container(client, &options.container).await?;
    let status = status(client, &id).await?;
    if status.log_path.is_empty() {
        return Err(Failure::State(format!(
            "{} has no log: its pod or it was made without a log path",
            options.container
        )));
    }
    let path = PathBuf::from(&status.log_path);
    let failed = |source| Failure::Io { what: "read the log", path: path.clone(), source };
    let mut reader = Reader::open(&path, options.tail).map_err(failed)?;
    let mut printer = Printer::new(options.timestamps, io::stdout(), io::stderr());
    print_all(&mut reader, &mut printer, &path)?;
    if options.follow {
        follow(client, &id, &mut reader, &mut printer, &path).await?;
    }
    reader.rest(|line| printer.line(line).map_err(Failure::Output))?;
    printer.flush().map_err(Failure::Output)
}

async fn follow(
    client: &Client,
    id: &str,
    reader: &mut Reader,
    printer: &mut Printer<impl io::Write, impl io::Write>,
    path: &Path,
) -> Result<()> {
    let failed = |source| Failure::Io { what: "read the log", path: path.to_owned(), source };
    let mut asked = Instant::now();
    let mut ended = false;
    loop {
        let any = print_all(reader, printer, path)?;
        if any || reader.follow_rotation().map_err(failed)? {
            continue;
        }
        if ended {
            return Ok(());
        }
        if asked.elapsed() >= STATUS_POLL {
            asked = Instant::now();
            // Once more round after the end: its last lines may have come in between.
            ended = match status(client, id).await {
                Ok(status) => status.state == i32::from(ContainerState::ContainerExited),
                Err(Failure::Daemon { code: tonic::Code::NotFound, .. }) => true,
                Err(failure) => return Err(failure),
            };
            continue;
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn status(client: &Client, id: &str) -> Result<ContainerStatus> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    let mut runtime = client.runtime.clone();
    Ok(client.call("ask for the container", runtime.container_status(request)).await?.status.unwrap_or_default())
}

/// What is there now. Says whether there was anything.
fn print_all(reader: &mut Reader, printer: &mut Printer<impl io::Write, impl io::Write>, path: &Path) -> Result<bool> {
    /// Reading and writing fail in different words.
    enum Side {
        Read(io::Error),
        Write(io::Error),
    }
    impl From<io::Error> for Side {
        fn from(error: io::Error) -> Self {
            Self::Read(error)
        }
    }
    let drained = reader.drain(|line| printer.line(line).map_err(Side::Write)).and_then(|any| {
        printer.flush().map_err(Side::Write)?;
        Ok(any)
    });
    drained.map_err(|side| match side {
        Side::Read(source) => Failure::Io { what: "read the log", path: path.to_owned(), source },
        Side::Write(error) => Failure::Output(error),
    })
}

/// Puts each line where the container had put it.
struct Printer<O: io::Write, E: io::Write> {
    timestamps: bool,
    stdout: io::BufWriter<O>,
    stderr: io::BufWriter<E>,
    /// The last line of a stream was a part, so that the next one goes on without a new time.
    continued: [bool; 2],
}

impl<O: io::Write, E: io::Write> Printer<O, E> {
    fn new(timestamps: bool, stdout: O, stderr: E) -> Self {
        let (stdout, stderr) = (io::BufWriter::new(stdout), io::BufWriter::new(stderr));
        Self { timestamps, stdout, stderr, continued: [false; 2] }
    }

    /// A line that is not of CRI's format is printed as it is.
    fn line(&mut self, raw: &[u8]) -> io::Result<()> {
        let Some(line) = parse(raw) else {
            self.stdout.write_all(raw)?;
            return self.stdout.write_all(b"\n");
        };
        let (to, continued): (&mut dyn io::Write, _) = match line.stream {
            Stream::Stdout => (&mut self.stdout, &mut self.continued[0]),
            Stream::Stderr => (&mut self.stderr, &mut self.continued[1]),
        };
        if self.timestamps && !*continued {
            to.write_all(line.timestamp.as_bytes())?;
            to.write_all(b" ")?;
        }
        to.write_all(line.content)?;
        *continued = line.partial;
        if line.partial { Ok(()) } else { to.write_all(b"\n") }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()?;
        self.stderr.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_kept_apart_and_parts_joined() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut printer = Printer::new(true, &mut out, &mut err);
        let time = "2016-10-06T00:17:09Z";
        for line in ["stdout P a", "stderr F oops", "stdout P b", "stdout F c", "stdout F d"] {
            printer.line(format!("{time} {line}").as_bytes()).unwrap();
        }
        printer.line(b"no format").unwrap();
        printer.flush().unwrap();
        drop(printer);
        assert_eq!(String::from_utf8(out).unwrap(), format!("{time} abc\n{time} d\nno format\n"));
        assert_eq!(String::from_utf8(err).unwrap(), format!("{time} oops\n"));
    }
}
