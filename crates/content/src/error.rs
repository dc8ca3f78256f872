//! What can go wrong with a blob.

use crate::Digest;
use std::io;
use std::path::{Path, PathBuf};

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a blob failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text that should be a digest.
    #[error("{text:?} is not a digest: it must be `sha256:` and 64 lower-case hexadecimal digits")]
    NotADigest {
        /// The text.
        text: String,
    },
    /// What was received is not what was asked for.
    #[error("the content has the digest {actual}, expected was {expected}; it was discarded, fetch it again")]
    Digest {
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// What was received is shorter or longer than was announced.
    #[error("the content is {actual} bytes long, expected were {expected}; it was discarded, fetch it again")]
    Size {
        /// What was announced.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// There is no such blob.
    #[error("blob {digest} is not in the content store")]
    NotFound {
        /// The blob.
        digest: Digest,
    },
    /// A blob that is to be held in memory, but is too large for it.
    #[error("blob {digest} is {size} bytes long, at most {limit} are allowed for its kind")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size in bytes.
        size: u64,
        /// The caller's limit in bytes.
        limit: u64,
    },
    /// A blob that changed on disk.
    #[error("blob {digest} is corrupt: {} has the digest {actual}; remove it and fetch it again", path.display())]
    Corrupt {
        /// What the bytes should have.
        digest: Digest,
        /// What they have.
        actual: Digest,
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }
}
