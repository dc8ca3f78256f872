//! Why a configuration makes no OCI specification.

use std::io;
use std::path::PathBuf;

/// A CRI configuration that cannot become an OCI specification, in words for whoever wrote the pod.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// The request is wrong, on any host.
    #[error("{field}: {reason}")]
    Invalid {
        /// Field of the CRI message.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The request is right, but asks for something that is not built yet.
    #[error("{field} is not supported yet: {reason}")]
    Unsupported {
        /// Field of the CRI message.
        field: String,
        /// What to do without it.
        reason: String,
    },
    /// The request is right, but this host lacks what it needs.
    #[error("{field} cannot be honoured on this host: {reason}")]
    Host {
        /// Field of the CRI message.
        field: String,
        /// What is missing and how to get along.
        reason: String,
    },
    /// A file of the host that the request names could not be read.
    #[error("{field}: cannot read {path}: {source}")]
    Io {
        /// Field of the CRI message.
        field: String,
        /// Path on the host.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl SpecError {
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn host(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Host { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn io(field: impl Into<String>, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { field: field.into(), path: path.into(), source }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, SpecError>;
