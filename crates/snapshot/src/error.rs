//! What can go wrong with snapshots and layers, in words for the one who operates the node.

use std::io;
use std::path::{Path, PathBuf};

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a snapshot or a layer failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A place that overlayfs could not be told of.
    #[error("{} cannot be the root: its path must be UTF-8 without comma, colon and backslash", path.display())]
    InvalidRoot {
        /// What was given.
        path: PathBuf,
    },
    /// A chain ID that is none.
    #[error("{id:?} is not a chain ID: it must be `sha256:` and 64 lower-case hexadecimal digits")]
    InvalidChainId {
        /// What was given.
        id: String,
    },
    /// A key that could not be a file name.
    #[error(
        "{key:?} is not a snapshot key: it must be 1 to 128 letters, digits, `-`, `_` or `.`, and not begin with a dot"
    )]
    InvalidKey {
        /// What was given.
        key: String,
    },
    /// A layer that was never applied, or was removed.
    #[error("layer {chain_id} is not unpacked here; pull its image again")]
    NoLayer {
        /// The layer.
        chain_id: String,
    },
    /// A writable snapshot that is not there.
    #[error("there is no snapshot {key}")]
    NoSnapshot {
        /// The snapshot.
        key: String,
    },
    /// A key that is taken by another thing.
    #[error("snapshot {key} exists already, on other layers; remove it first")]
    KeyTaken {
        /// The snapshot.
        key: String,
    },
    /// A layer that a container stands on.
    #[error("layer {chain_id} is in use by snapshot {key}; remove that first")]
    LayerInUse {
        /// The layer.
        chain_id: String,
        /// One of its users.
        key: String,
    },
    /// A layer that cannot be right, or is not safe to unpack.
    #[error("the layer is refused at entry {name:?}: {reason}")]
    Entry {
        /// The entry's name as it stands in the archive, shortened.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A stream that is no archive, or ends too early.
    #[error("the layer is not a valid tar archive: {reason}")]
    Archive {
        /// What is wrong.
        reason: String,
    },
    /// A layer that asks for more than is allowed.
    #[error("the layer is refused: it has more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The stream could not be read: the source failed, or its compression is broken.
    #[error("reading the layer: {source}")]
    Read {
        /// What the source said.
        source: io::Error,
    },
    /// The system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory; one with a relative path is inside the layer.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Error {
        Error::Io { action, path: path.to_path_buf(), source: source.into() }
    }

    pub(crate) fn entry(name: &Path, reason: impl Into<String>) -> Error {
        Error::Entry { name: name.to_string_lossy().chars().take(200).collect(), reason: reason.into() }
    }

    pub(crate) fn archive(reason: impl Into<String>) -> Error {
        Error::Archive { reason: reason.into() }
    }
}

/// Says what was tried on which path when a call of the system fails.
pub(crate) trait Doing<T> {
    fn doing(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| Error::io(action, path, error))
    }
}
