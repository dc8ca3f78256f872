//! What goes wrong, in one line and a hint, and the exit code of it.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use tonic::{Code, Status};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{address:?} is not the address of a socket")]
    Address { address: String },
    #[error("there is no socket at {path}")]
    NoSocket { path: PathBuf },
    #[error("{path} is not a socket")]
    NotASocket { path: PathBuf },
    #[error("nothing answers at {path}")]
    Refused { path: PathBuf },
    #[error("no permission to use {path}")]
    Permission { path: PathBuf },
    #[error("cannot connect to {path}: {source}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("{path} does not speak CRI: {reason}")]
    NotCri { path: PathBuf, reason: String },
    #[error("{path} is the socket of {runtime}, not of stasisd")]
    OtherRuntime { path: PathBuf, runtime: String },
    #[error("there is no {kind} {wanted:?}")]
    NotFound { kind: &'static str, wanted: String },
    #[error("more than one {kind} fits {wanted:?}: {candidates}")]
    Ambiguous { kind: &'static str, wanted: String, candidates: String },
    #[error("cannot {what}: no answer within {seconds} s")]
    TimedOut { what: String, seconds: u64 },
    #[error("cannot {what}: the daemon went away: {reason}")]
    Lost { what: String, reason: String },
    #[error("cannot {what}: {message}")]
    Daemon { what: String, code: Code, message: String },
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    State(String),
    #[error("cannot read the checkpoint {path}: {source}")]
    Archive { path: PathBuf, source: stasis_checkpoint::Error },
    #[error("the daemon's answer is not what this version understands: {0}")]
    Answer(String),
}

/// Result of a command.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

const UNREACHABLE: u8 = 3;
const NOT_FOUND: u8 = 4;
const TIMED_OUT: u8 = 5;

impl Failure {
    /// A call of the daemon that failed.
    pub(crate) fn daemon(what: impl Into<String>, status: &Status) -> Self {
        // A status of the daemon has no source; one that our side made of a broken connection has.
        if let Some(source) = status.source() {
            return Self::Lost { what: what.into(), reason: innermost(source) };
        }
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            message => message.to_owned(),
        };
        Self::Daemon { what: what.into(), code: status.code(), message }
    }

    /// What to do, if there is something to say.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Address { .. } => "give --address unix:///path/of/the/socket",
            Self::NoSocket { .. } | Self::Refused { .. } => {
                "is stasisd running? Start it with `systemctl start stasis`, or give its socket with --address"
            }
            Self::Permission { .. } => "the socket is for root: try sudo",
            Self::NotASocket { .. } | Self::NotCri { .. } | Self::OtherRuntime { .. } => {
                "give the socket of stasisd with --address, or unset STASIS_ADDRESS"
            }
            Self::NotFound { kind: "container", .. } => "`stasis ps -a` lists all containers",
            Self::NotFound { kind: "pod", .. } => "`stasis pods` lists all pods",
            Self::NotFound { kind: "image", .. } => "`stasis images` lists all images; `stasis pull` fetches one",
            Self::Ambiguous { .. } => "give more of the ID",
            Self::TimedOut { .. } => "give more time with --timeout",
            Self::Daemon { code: Code::Unimplemented, .. } => "the daemon is older than this program: `stasis version`",
            Self::Lost { .. } => "its log says why: `journalctl -u stasis`",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// The exit code of the process.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Address { .. } => 2,
            Self::NoSocket { .. }
            | Self::NotASocket { .. }
            | Self::Refused { .. }
            | Self::Permission { .. }
            | Self::Connect { .. }
            | Self::NotCri { .. }
            | Self::OtherRuntime { .. }
            | Self::Lost { .. } => UNREACHABLE,
            Self::NotFound { .. } | Self::Ambiguous { .. } | Self::Daemon { code: Code::NotFound, .. } => NOT_FOUND,
            Self::TimedOut { .. } | Self::Daemon { code: Code::DeadlineExceeded, .. } => TIMED_OUT,
            _ => 1,
        }
    }

    /// Whether it means no more than that whoever read our output has had enough (`stasis ps | head -1`).
    pub(crate) fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The lines for standard error.
    pub(crate) fn text(&self) -> String {
        let one_line = printable(&self.to_string());
        match self.hint() {
            Some(hint) => format!("error: {one_line}\nhint: {hint}"),
            None => format!("error: {one_line}"),
        }
    }
}

/// The error that started it: "transport error" alone helps nobody.
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// Text that may come from strangers (names, references, messages of engines) without what moves the cursor: line
/// breaks become `; `, other control characters `?`.
pub(crate) fn printable(text: &str) -> String {
    let lines: Vec<&str> = text.split('\n').map(str::trim_end).filter(|l| !l.is_empty()).collect();
    lines.join("; ").chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
