//! The stdio of a process, from where the Task API says it goes to the descriptors that the process gets.
//!
//! A process always gets an anonymous pipe, a terminal or `/dev/null`, and the shim copies: CRIU refuses named FIFOs and
//! host files as stdio, and the shim's copy of a log survives the daemon. An output is the path of a FIFO, or
//! `cri:///path` for a CRI log, or `file:///path` for the bare bytes; empty is `/dev/null`. An input is a FIFO. Attached clients
//! get every output; `attach://` is a stream that is theirs alone.

mod attach;
mod console;
mod copy;
mod fifo;
mod log;
mod pipe;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, pipe_with};
use stasis_shim_api::{ATTACHED, AttachRequest, CRI_LOG_SCHEME};
use stasis_sys::pty;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::error::Error;
use attach::{Clients, Input, Taps};
use console::Console;
use copy::Sink;
use fifo::{FifoWriter, Keeper};
use log::{LogFile, LogWriter};
use pipe::Pipe;

/// Scheme of an output that gets the bare bytes of the process.
const FILE_SCHEME: &str = "file://";

/// How long the answer to Wait may be put off because a reader does not take what the process has written.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Where the stdio of a process goes, in the words of the Task API.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// Stdio that is open on our side, for a process that does not run yet.
#[derive(Debug)]
pub(crate) struct Prepared {
    stdin: Option<(Pipe, Keeper)>,
    /// Whether the input is that of attached clients.
    attached_stdin: bool,
    outputs: Vec<(Option<Pipe>, Sink, &'static str)>,
    ends: Ends,
    input: Option<Pipe>,
    console: Option<Console>,
    logs: Vec<Arc<Mutex<LogFile>>>,
}

/// What the process gets; `/dev/null` where there is none.
#[derive(Debug, Default)]
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Stdio of a running process.
#[derive(Debug)]
pub(crate) struct Streams {
    ended: watch::Sender<bool>,
    drained: Vec<oneshot::Receiver<()>>,
    copies: Vec<JoinHandle<()>>,
    stdin: Option<Keeper>,
    terminal: Option<Arc<Pipe>>,
    clients: Clients,
    logs: Vec<Arc<Mutex<LogFile>>>,
}

impl Prepared {
    /// Opens everything; `dir` is where a console socket can be made.
    pub(crate) fn open(stdio: &Stdio, dir: &Path) -> Result<Prepared, Error> {
        let stdin = match stdio.stdin.as_str() {
            "" | ATTACHED => None,
            path => Some(fifo::open_input(Path::new(path))?),
        };
        let mut prepared = Prepared {
            stdin,
            attached_stdin: stdio.stdin == ATTACHED,
            outputs: Vec::new(),
            ends: Ends::default(),
            input: None,
            console: None,
            logs: Vec::new(),
        };
        if stdio.terminal {
            let sink = prepared.sink(&stdio.stdout, "stdout")?;
            prepared.outputs.push((None, sink, "stdout"));
            prepared.console = Some(Console::bind(dir)?);
            return Ok(prepared);
        }
        if prepared.stdin.is_some() || prepared.attached_stdin {
            let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::io("making a pipe")(e.into()))?;
            prepared.ends.stdin = Some(theirs);
            prepared.input = Some(Pipe::new(ours)?);
        }
        prepared.ends.stdout = prepared.output(&stdio.stdout, "stdout")?;
        prepared.ends.stderr = prepared.output(&stdio.stderr, "stderr")?;
        Ok(prepared)
    }

    /// Hands the process's ends to the command that starts it.
    pub(crate) fn give(&mut self, command: &mut Command) {
        let end = |end: Option<OwnedFd>| end.map_or_else(std::process::Stdio::null, std::process::Stdio::from);
        let ends = std::mem::take(&mut self.ends);
        command.stdin(end(ends.stdin)).stdout(end(ends.stdout)).stderr(end(ends.stderr));
    }

    /// Where the OCI runtime is to send the terminal.
    pub(crate) fn console_socket(&self) -> Option<&Path> {
        self.console.as_ref().map(Console::path)
    }

    /// Begins to copy. With a terminal the OCI runtime must have ended well, and so have sent it.
    pub(crate) async fn run(self) -> Result<Streams, Error> {
        let terminal = match self.console {
            Some(console) => Some(Arc::new(console.receive().await?)),
            None => None,
        };
        let (ended, watching) = watch::channel(false);
        let input = self.input.map(Arc::new).or_else(|| terminal.clone());
        let (of_stdout, of_stderr) = (Taps::new(terminal.is_some()), Taps::new(terminal.is_some()));
        let fed = input.clone().filter(|_| self.attached_stdin).map(Input::new);
        let mut streams = Streams {
            ended,
            drained: Vec::new(),
            copies: Vec::new(),
            stdin: None,
            terminal: terminal.clone(),
            clients: Clients::new(of_stdout.clone(), of_stderr.clone(), fed),
            logs: self.logs,
        };
        for (pipe, sink, stream) in self.outputs {
            let taps = if stream == "stderr" { of_stderr.clone() } else { of_stdout.clone() };
            let Some(source) = pipe.map(Arc::new).or_else(|| terminal.clone()) else { continue };
            let (drained, receiver) = oneshot::channel();
            streams.drained.push(receiver);
            streams.copies.push(tokio::spawn(copy::output(source, sink, taps, watching.clone(), drained)));
        }
        if let Some((reader, keeper)) = self.stdin
            && let Some(target) = input
        {
            streams.stdin = Some(keeper);
            streams.copies.push(tokio::spawn(copy::input(reader, target)));
        }
        Ok(streams)
    }

    fn output(&mut self, target: &str, stream: &'static str) -> Result<Option<OwnedFd>, Error> {
        if target.is_empty() {
            return Ok(None);
        }
        let sink = self.sink(target, stream)?;
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::io("making a pipe")(e.into()))?;
        self.outputs.push((Some(Pipe::new(ours)?), sink, stream));
        Ok(Some(theirs))
    }

    fn sink(&mut self, target: &str, stream: &'static str) -> Result<Sink, Error> {
        if target.is_empty() || target == ATTACHED {
            return Ok(Sink::Nowhere);
        }
        if let Some(path) = target.strip_prefix(CRI_LOG_SCHEME) {
            return Ok(Sink::Log(LogWriter::cri(self.log(path)?, stream)));
        }
        if let Some(path) = target.strip_prefix(FILE_SCHEME) {
            return Ok(Sink::Log(LogWriter::raw(self.log(path)?)));
        }
        if target.contains("://") {
            return Err(Error::Invalid(format!(
                "{stream} {target:?}: only cri:///path, file:///path and the path of a FIFO are known"
            )));
        }
        Ok(Sink::Fifo(FifoWriter::open(Path::new(target))?))
    }

    /// Both streams of a process usually share one file.
    fn log(&mut self, path: &str) -> Result<Arc<Mutex<LogFile>>, Error> {
        let path = PathBuf::from(path);
        if let Some(open) = self.logs.iter().find(|log| log::lock(log).path() == path) {
            return Ok(Arc::clone(open));
        }
        let log = Arc::new(Mutex::new(LogFile::open(path)?));
        self.logs.push(Arc::clone(&log));
        Ok(log)
    }
}

impl Streams {
    /// After the process has ended: waits until what it wrote has arrived, at most for [`DRAIN_LIMIT`].
    pub(crate) fn drain(&mut self) -> impl Future<Output = ()> + Send + use<> {
        self.ended.send_replace(true);
        let drained = std::mem::take(&mut self.drained);
        async move {
            let all = async {
                for one in drained {
                    // A copy that is gone has nothing left to bring.
                    let _ = one.await;
                }
            };
            let _ = tokio::time::timeout(DRAIN_LIMIT, all).await;
        }
    }

    /// Lets the process see the end of its input once its FIFO has no other writer.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
        self.clients.close_input();
    }

    /// Attaches a client.
    pub(crate) fn attach(&mut self, request: &AttachRequest) -> Result<(), Error> {
        self.clients.attach(request)
    }

    /// Sets the terminal's size in characters.
    pub(crate) fn resize(&self, columns: u32, rows: u32) -> Result<(), Error> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| Error::Precondition("the process has no terminal to resize".to_owned()))?;
        let size =
            |value: u32| u16::try_from(value).map_err(|_| Error::Invalid(format!("{value} characters are too many")));
        pty::set_window_size(terminal.as_ref(), size(rows)?, size(columns)?).map_err(Error::io("resizing the terminal"))
    }

    /// Begins the log files anew under their paths.
    pub(crate) fn reopen_logs(&self) -> Result<(), Error> {
        self.logs.iter().try_for_each(|log| log::lock(log).reopen())
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for copy in &self.copies {
            copy.abort();
        }
    }
}
