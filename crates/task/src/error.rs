//! What can go wrong with tasks, in words for the person who reads it.
//!
//! Errors are cloneable: many callers may wait for one event.

use std::fmt::Display;

use stasis_shim_api::ShimError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something with a task failed. The kinds are those of ttrpc's status codes, which are gRPC's.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No such task, process or shim.
    #[error("{0}")]
    NotFound(String),
    /// The ID is in use.
    #[error("{0}")]
    AlreadyExists(String),
    /// Its state does not allow it.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The caller's mistake.
    #[error("{0}")]
    InvalidArgument(String),
    /// The shim does not do this.
    #[error("{0}")]
    Unimplemented(String),
    /// The time was up. Whether the shim has done it is unknown.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// The shim says that it cannot serve now.
    #[error("{0}")]
    Unavailable(String),
    /// There is no connection to the shim: it is dead, or closed it. Exit statuses not yet seen are lost with it.
    #[error("{0}")]
    ShimLost(String),
    /// A shim could not be found, started or spoken to.
    #[error("{0}")]
    Start(String),
    /// Our shim refused or failed an operation of its own service.
    #[error("{0}")]
    Shim(#[source] ShimError),
    /// The state directory or another local object.
    #[error("{0}")]
    Io(String),
    /// Any other failure in the shim or the OCI runtime.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// A failed system call: what was done, on which object, what the system said.
    pub(crate) fn io(doing: impl Display, object: impl Display, error: impl Display) -> Self {
        Self::Io(format!("{doing} {object}: {error}"))
    }

    /// The same error, saying first what was tried on which object.
    pub(crate) fn context(self, tried: impl Display) -> Self {
        let say = |message: String| format!("{tried}: {message}");
        match self {
            Self::NotFound(message) => Self::NotFound(say(message)),
            Self::AlreadyExists(message) => Self::AlreadyExists(say(message)),
            Self::FailedPrecondition(message) => Self::FailedPrecondition(say(message)),
            Self::InvalidArgument(message) => Self::InvalidArgument(say(message)),
            Self::Unimplemented(message) => Self::Unimplemented(say(message)),
            Self::DeadlineExceeded(message) => Self::DeadlineExceeded(say(message)),
            Self::Unavailable(message) => Self::Unavailable(say(message)),
            Self::ShimLost(message) => Self::ShimLost(say(message)),
            Self::Start(message) => Self::Start(say(message)),
            Self::Io(message) => Self::Io(say(message)),
            Self::Other(message) => Self::Other(say(message)),
            // Its reader takes the structure, and the message names the object.
            Self::Shim(error) => Self::Shim(error),
        }
    }

    /// Whether the connection to the shim is gone, so that what it knew can no longer be asked.
    pub fn is_shim_lost(&self) -> bool {
        matches!(self, Self::ShimLost(_))
    }

    /// Whether the object of the call does not exist, or has ended already.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }
}
