//! The one error of this crate: a kind, which `cri` maps to a gRPC code, and words for the person who reads it.

use std::fmt;

/// Result of an operation on pods or containers.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure an [`Error`] is; each is one gRPC status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such pod, container or image.
    NotFound,
    /// The request breaks a rule of CRI or of ours.
    InvalidArgument,
    /// The name is taken.
    AlreadyExists,
    /// The object is not in a state that allows it, or the node lacks what it needs.
    FailedPrecondition,
    /// A policy of this node forbids it.
    PermissionDenied,
    /// The time was up.
    DeadlineExceeded,
    /// No space, or a limit was met.
    ResourceExhausted,
    /// Something that may come back is not there now: a registry, a shim.
    Unavailable,
    /// Not built.
    Unimplemented,
    /// Everything else.
    Internal,
    /// Where a client expects this very code: the kubelet, of a node that cannot checkpoint.
    Unknown,
}

/// Why an operation on a pod or container failed.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: String,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The kind of failure.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    pub(crate) fn precondition(message: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// The same error, with what was being done in front.
    pub(crate) fn context(self, what: impl fmt::Display) -> Self {
        Self { kind: self.kind, message: format!("{what}: {}", self.message) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Puts what was being done in front of a system error.
pub(crate) trait IoContext<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::new(kind_of(&error), format!("cannot {what}: {error}")))
    }
}

fn kind_of(error: &std::io::Error) -> Kind {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
        _ => Kind::Internal,
    }
}

impl From<stasis_task::Error> for Error {
    fn from(error: stasis_task::Error) -> Self {
        use stasis_shim_api::Reason;
        use stasis_task::Error as Task;
        let kind = match &error {
            Task::NotFound(_) => Kind::NotFound,
            Task::AlreadyExists(_) => Kind::AlreadyExists,
            Task::FailedPrecondition(_) => Kind::FailedPrecondition,
            Task::InvalidArgument(_) => Kind::InvalidArgument,
            Task::Unimplemented(_) => Kind::Unimplemented,
            Task::DeadlineExceeded(_) => Kind::DeadlineExceeded,
            Task::Unavailable(_) | Task::ShimLost(_) => Kind::Unavailable,
            Task::Shim(error) => match error.reason {
                Reason::NotFound => Kind::NotFound,
                Reason::FailedPrecondition | Reason::Busy => Kind::FailedPrecondition,
                Reason::DeadlineExceeded => Kind::DeadlineExceeded,
                Reason::ResourceExhausted => Kind::ResourceExhausted,
                Reason::Engine | Reason::Internal => Kind::Internal,
            },
            Task::Start(_) | Task::Io(_) | Task::Other(_) => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<stasis_image::Error> for Error {
    fn from(error: stasis_image::Error) -> Self {
        use stasis_image::Kind as Image;
        let kind = match error.kind() {
            Image::InvalidArgument => Kind::InvalidArgument,
            Image::NotFound => Kind::NotFound,
            Image::PermissionDenied => Kind::PermissionDenied,
            Image::FailedPrecondition => Kind::FailedPrecondition,
            Image::Unavailable => Kind::Unavailable,
            Image::ResourceExhausted => Kind::ResourceExhausted,
            Image::DataLoss | Image::Internal => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<stasis_cni::Error> for Error {
    fn from(error: stasis_cni::Error) -> Self {
        let kind = match &error {
            stasis_cni::Error::NotReady(_) => Kind::FailedPrecondition,
            stasis_cni::Error::InvalidArgument(_) => Kind::InvalidArgument,
            stasis_cni::Error::NoSpace(_) => Kind::ResourceExhausted,
            stasis_cni::Error::Plugin(_) | stasis_cni::Error::Cache(_) => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<stasis_checkpoint::Error> for Error {
    fn from(error: stasis_checkpoint::Error) -> Self {
        use stasis_checkpoint::Error as Archive;
        let kind = match &error {
            Archive::Refused(_) | Archive::Malformed { .. } | Archive::Missing(_) => Kind::InvalidArgument,
            Archive::NoSpace { .. } => Kind::ResourceExhausted,
            Archive::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Kind::NotFound,
            Archive::Io { source, .. } => kind_of(source),
        };
        Self::new(kind, error.to_string())
    }
}

impl From<crate::spec::SpecError> for Error {
    fn from(error: crate::spec::SpecError) -> Self {
        use crate::spec::SpecError;
        let kind = match &error {
            SpecError::Unsupported { .. } => Kind::Unimplemented,
            SpecError::Host { .. } => Kind::FailedPrecondition,
            _ => Kind::InvalidArgument,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<redb::Error> for Error {
    fn from(error: redb::Error) -> Self {
        let kind = match &error {
            redb::Error::Io(error) => kind_of(error),
            _ => Kind::Internal,
        };
        Self::new(kind, format!("the state database failed: {error}"))
    }
}
