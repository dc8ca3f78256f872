//! What can go wrong with an archive.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with an archive. [`Error::Refused`] and [`Error::Malformed`] blame the archive, the others the host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive holds something that is not accepted, whatever its meaning.
    #[error("the archive is refused: {0}")]
    Refused(String),
    /// A part of the archive is not what its name says.
    #[error("{member} of the checkpoint is malformed: {why}")]
    Malformed {
        /// The member.
        member: String,
        /// What is wrong.
        why: String,
    },
    /// A member that is needed is missing.
    #[error("the checkpoint has no {0}: it is incomplete, or no checkpoint of a container")]
    Missing(&'static str),
    /// There is not enough space.
    #[error("{} has {available} bytes free, {needed} are needed beside a reserve of {reserve}", path.display())]
    NoSpace {
        /// Where.
        path: PathBuf,
        /// What is free.
        available: u64,
        /// What is needed.
        needed: u64,
        /// What must stay free.
        reserve: u64,
    },
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn refused(why: impl Into<String>) -> Self {
        Self::Refused(why.into())
    }

    pub(crate) fn malformed(member: impl Display, why: impl Display) -> Self {
        Self::Malformed { member: member.to_string(), why: why.to_string() }
    }
}

/// Says what was tried when the system refused.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl Display) -> Result<T>;
    fn doing_to(self, what: &str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|source| Error::Io { what: what.to_string(), source: source.into() })
    }

    fn doing_to(self, what: &str, path: &Path) -> Result<T> {
        self.doing(format_args!("{what} {}", path.display()))
    }
}

/// A stream that cannot be decompressed is the archive's fault, everything else the host's.
pub(crate) fn read_error(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::refused("it ends in the middle"),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::Other => {
            Error::refused(format!("it cannot be decompressed: {error}"))
        }
        _ => Error::Io { what: "read the archive".to_owned(), source: error },
    }
}
