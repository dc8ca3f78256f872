//! What is asked of CRIU and what it says: a private configuration file an operation, a probe of the binary, the
//! diagnosis of its log, and the few of its image files that the rest of Stasis reads.
//!
//! This crate knows nothing of containers, archives or OCI runtimes. It runs `criu` only to probe it; dumps and
//! restores go through the OCI runtime.

mod command;
pub mod config;
mod diagnosis;
pub mod image;
pub mod kdat;
pub mod preflight;
mod probe;
mod stats;
mod wire;

use std::io;
use std::path::PathBuf;

pub use config::{NetworkLock, OperationConfig};
pub use diagnosis::{Diagnosis, Known, diagnose, known_failures};
pub use probe::{MIN_VERSION, Probe, Version, probe};
pub use stats::{DumpStats, RestoreStats, Stats};

/// What can go wrong when CRIU is configured, probed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary could not be started.
    #[error("cannot run {}: {source}; install criu {MIN_VERSION} or newer and check the configured path", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The binary did not end in time.
    #[error("{} {arguments} did not end within {seconds} s and was killed", binary.display())]
    TimedOut {
        /// The binary.
        binary: PathBuf,
        /// Its arguments.
        arguments: String,
        /// The limit.
        seconds: u64,
    },
    /// The binary answered in a way that is not CRIU's.
    #[error("{} --version said {answer:?}, which is not CRIU's answer; check the configured path", binary.display())]
    NotCriu {
        /// The binary.
        binary: PathBuf,
        /// What it said instead, shortened.
        answer: String,
    },
    /// A value cannot be written into CRIU's configuration file.
    #[error("the value of CRIU option {name} holds a blank, quote, '#' or control character: {value:?}")]
    Value {
        /// Name of the option.
        name: &'static str,
        /// The value.
        value: String,
    },
    /// An image file is not what its name says.
    #[error("CRIU image {file} is malformed: {why}")]
    Image {
        /// Name of the image file.
        file: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The kernel probe cache could not be made.
    #[error("cannot make CRIU's kernel probe cache {}: {why}", path.display())]
    ProbeCache {
        /// The cache.
        path: PathBuf,
        /// What failed.
        why: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
