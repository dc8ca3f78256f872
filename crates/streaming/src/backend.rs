//! What the runtime gives: processes with pipes, and connections into pods.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::net::unix::pipe;

use crate::error::Error;

/// Which streams a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Error output.
    pub stderr: bool,
    /// A terminal, which has no error output of its own.
    pub tty: bool,
}

/// What a URL stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A command in a container.
    Exec {
        /// The container's ID.
        container: String,
        /// The command with its arguments.
        command: Vec<String>,
        /// The streams.
        streams: Streams,
    },
    /// The streams of a container's first process.
    Attach {
        /// The container's ID.
        container: String,
        /// The streams.
        streams: Streams,
    },
    /// TCP connections into a pod.
    PortForward {
        /// The pod's ID.
        pod: String,
        /// The ports of a WebSocket client; a SPDY client names them itself.
        ports: Vec<u16>,
    },
}

impl Request {
    /// The first part of its URL's path.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Request::Exec { .. } => "exec",
            Request::Attach { .. } => "attach",
            Request::PortForward { .. } => "portforward",
        }
    }

    /// "One of stdin, stdout, and stderr MUST be true", and "if tty is true, stderr MUST be false" (CRI).
    pub(crate) fn check(&self) -> Result<(), Error> {
        let (Request::Exec { streams, .. } | Request::Attach { streams, .. }) = self else { return Ok(()) };
        if streams.tty && streams.stderr {
            return Err(Error::Invalid("tty and stderr cannot both be set: a terminal has one output"));
        }
        if !streams.stdin && !streams.stdout && !streams.stderr {
            return Err(Error::Invalid("one of stdin, stdout and stderr must be set"));
        }
        Ok(())
    }
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Why something could not be done, in words for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What runs behind the URLs.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a container.
    async fn exec(&self, container: &str, command: Vec<String>, streams: Streams) -> Result<Session, Failure>;
    /// Attaches to a container.
    async fn attach(&self, container: &str, streams: Streams) -> Result<Session, Failure>;
    /// Connects to a port inside a pod's network.
    async fn connect(&self, pod: &str, port: u16) -> Result<TcpStream, Failure>;
}

/// A process and our ends of its streams; those that were not asked for are absent.
pub struct Session {
    /// What is written here is its input.
    pub stdin: Option<pipe::Sender>,
    /// Its output.
    pub stdout: Option<pipe::Receiver>,
    /// Its error output.
    pub stderr: Option<pipe::Receiver>,
    /// Whether the client goes when its input ends, and leaves the process as it is.
    pub detaches_with_stdin: bool,
    /// Everything else about it.
    pub control: Arc<dyn Control>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

/// A process behind a [`Session`].
#[async_trait]
pub trait Control: Send + Sync {
    /// Sets the size of its terminal.
    async fn resize(&self, size: Size);
    /// Its input has ended: the pipe was dropped before.
    async fn close_stdin(&self);
    /// Waits for its end and gives its exit code; none of a process that was attached to.
    async fn wait(&self) -> Result<Option<u32>, Failure>;
    /// The client has gone without waiting for the end.
    async fn abandon(&self);
}
