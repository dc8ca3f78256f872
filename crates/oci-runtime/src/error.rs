//! What can go wrong with a call of the runtime.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A call of the OCI runtime that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary could not be started.
    #[error("cannot run the OCI runtime {}: {source}; check that it is installed and that the configured path is right", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It did not end in time and was killed.
    #[error("{command} did not end within {limit:?} and was killed")]
    TimedOut {
        /// Runtime, verb and container.
        command: String,
        /// How long it had.
        limit: Duration,
    },
    /// It ended with an error.
    #[error("{command}: {message} ({status})")]
    Failed {
        /// Runtime, verb and container.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// Its own words: the last error of its log, else its error output.
        message: String,
    },
    /// Its output is not what was asked for.
    #[error("cannot read what the OCI runtime printed for {verb}: {source}")]
    Output {
        /// The verb.
        verb: &'static str,
        /// Where the JSON is wrong.
        source: serde_json::Error,
    },
    /// A file or process of the call could not be handled.
    #[error("{command}: {source}")]
    Io {
        /// Runtime, verb and container.
        command: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// Whether the runtime knows no such container.
    pub fn is_not_found(&self) -> bool {
        // runc: "container does not exist"; crun: "container `x` does not exist".
        matches!(self, Error::Failed { message, .. } if message.contains("does not exist"))
    }

    /// Whether the runtime said that the process or container has ended already.
    pub fn is_already_stopped(&self) -> bool {
        const WORDS: [&str; 3] = ["process already finished", "container not running", "no such process"];
        matches!(self, Error::Failed { message, .. } if WORDS.iter().any(|words| message.contains(words)))
    }
}
