//! What can go wrong in the shim, and how it is said: as a ttrpc status with containerd's meanings, or as a
//! [`ShimError`] of our own service.

use std::fmt::Display;
use std::io;

use stasis_shim_api::{Reason, ShimError};
use ttrpc::{Code, get_status};

/// An operation of the shim that was refused or failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No such container, process or thing.
    #[error("{0}")]
    NotFound(String),
    /// It is there already.
    #[error("{0} exists already")]
    Exists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not in a state that allows it.
    #[error("{0}")]
    Precondition(String),
    /// Another operation holds the container.
    #[error("container {id}: {running} is in progress; try again when it has ended")]
    Busy {
        /// The container.
        id: String,
        /// What holds it.
        running: &'static str,
    },
    /// Not built, or not possible here.
    #[error("{0} is not supported by this shim")]
    Unsupported(&'static str),
    /// The time was up.
    #[error("{0}")]
    Deadline(String),
    /// The OCI runtime failed.
    #[error(transparent)]
    Runtime(#[from] stasis_oci_runtime::Error),
    /// The OCI runtime failed because of CRIU, whose log says more.
    #[error("{runtime}; {diagnosis}")]
    Criu {
        /// What the OCI runtime said.
        runtime: stasis_oci_runtime::Error,
        /// What CRIU's log says.
        diagnosis: String,
    },
    /// A cgroup could not be used.
    #[error(transparent)]
    Cgroup(#[from] stasis_cgroup::Error),
    /// The checkpoint worker refused or failed.
    #[error(transparent)]
    Worker(#[from] ShimError),
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// What must not happen.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// For `map_err`: says what was tried.
    pub(crate) fn io(what: impl Display) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what: what.to_string(), source }
    }

    fn code(&self) -> Code {
        match self {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::Precondition(_) | Error::Busy { .. } => Code::FAILED_PRECONDITION,
            Error::Unsupported(_) => Code::UNIMPLEMENTED,
            Error::Deadline(_) => Code::DEADLINE_EXCEEDED,
            Error::Runtime(error) if error.is_not_found() => Code::NOT_FOUND,
            Error::Runtime(_) | Error::Criu { .. } => Code::UNKNOWN,
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => Code::RESOURCE_EXHAUSTED,
            Error::Worker(error) => match error.reason {
                Reason::NotFound => Code::NOT_FOUND,
                Reason::FailedPrecondition | Reason::Busy => Code::FAILED_PRECONDITION,
                Reason::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
                Reason::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
                Reason::Engine => Code::UNKNOWN,
                Reason::Internal => Code::INTERNAL,
            },
            Error::Cgroup(_) | Error::Io { .. } | Error::Internal(_) => Code::INTERNAL,
        }
    }

    /// The form of our own service: the status message is the JSON of a [`ShimError`].
    pub(crate) fn into_extension_status(self) -> ttrpc::Error {
        let code = self.code();
        let error = ShimError::from(self);
        let message = serde_json::to_string(&error).unwrap_or(error.message);
        ttrpc::Error::RpcStatus(get_status(code, message))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(get_status(error.code(), error.to_string()))
    }
}

impl From<Error> for ShimError {
    fn from(error: Error) -> ShimError {
        let reason = match &error {
            Error::Worker(worker) => worker.reason,
            Error::NotFound(_) => Reason::NotFound,
            Error::Exists(_) | Error::Invalid(_) | Error::Precondition(_) | Error::Unsupported(_) => {
                Reason::FailedPrecondition
            }
            Error::Busy { .. } => Reason::Busy,
            Error::Deadline(_) => Reason::DeadlineExceeded,
            Error::Runtime(error) if error.is_not_found() => Reason::NotFound,
            Error::Runtime(_) | Error::Criu { .. } => Reason::Engine,
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => Reason::ResourceExhausted,
            Error::Cgroup(_) | Error::Io { .. } | Error::Internal(_) => Reason::Internal,
        };
        ShimError { reason, message: error.to_string() }
    }
}
