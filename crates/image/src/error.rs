//! What can go wrong with an image, in words for the person who asked for it.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure an [`Error`] is, for callers that answer by status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong.
    InvalidArgument,
    /// No such image, here or in the registry.
    NotFound,
    /// The registry refuses the credentials, or their absence.
    PermissionDenied,
    /// The image exists and cannot be used here: malformed, of another platform, of another kind.
    FailedPrecondition,
    /// The registry is away; trying again may help.
    Unavailable,
    /// No space on the disk.
    ResourceExhausted,
    /// Bytes are not what their digest says.
    DataLoss,
    /// Everything else.
    Internal,
}

/// Why an operation on images failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry, or the way to it.
    #[error(transparent)]
    Registry(#[from] stasis_registry::Error),
    /// No image by that name here.
    #[error("image {name} is not on this node")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// The request contradicts itself.
    #[error("{reason}")]
    Invalid {
        /// Why, and what to do.
        reason: String,
    },
    /// An image that we cannot run.
    #[error("image {name} cannot be used: {reason}")]
    Unusable {
        /// Manifest digest or reference.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A layer that cannot be unpacked.
    #[error("layer {digest} cannot be unpacked: {reason}")]
    Layer {
        /// The layer's blob.
        digest: String,
        /// What is wrong, from the applier or the decompressor.
        reason: String,
        /// No space was left.
        full: bool,
    },
    /// A directory that an image volume is to show.
    #[error("image {image} has no directory {}{}", path.display(), if *missing { "" } else { ": it is a file, and only directories can be volumes" })]
    SubPath {
        /// ID of the image.
        image: String,
        /// What was asked for.
        path: PathBuf,
        /// Nothing is there; otherwise it is no directory.
        missing: bool,
    },
    /// An image archive that cannot be imported or written.
    #[error("image archive {path}: {reason}")]
    Archive {
        /// File or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// The failure is the request's (no such file), not ours.
        kind: Kind,
    },
    /// The blob store.
    #[error("cannot {doing}: {source}")]
    Content {
        /// What was tried.
        doing: String,
        /// What the store said.
        source: stasis_content::Error,
    },
    /// The layer store.
    #[error("cannot {doing}: {source}")]
    Snapshot {
        /// What was tried.
        doing: String,
        /// What the store said.
        source: stasis_snapshot::Error,
    },
    /// The database.
    #[error("cannot {doing} in the state database: {source}")]
    State {
        /// What was tried.
        doing: &'static str,
        /// What the database said.
        source: Box<redb::Error>,
    },
    /// A record of another version of this program.
    #[error("image record {key} in the state database: {reason}")]
    Record {
        /// Key of the record: the image's ID.
        key: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A system call.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried, on which object.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// The kind of failure.
    pub fn kind(&self) -> Kind {
        use stasis_registry::Error as R;
        match self {
            Error::Registry(error) => match error {
                R::Reference { .. } => Kind::InvalidArgument,
                R::NotFound { .. } => Kind::NotFound,
                R::Unauthorized { .. } => Kind::PermissionDenied,
                R::Unreachable { .. } | R::Interrupted { .. } => Kind::Unavailable,
                R::Refused { status, .. } if *status == 429 || *status >= 500 => Kind::Unavailable,
                R::Digest { .. } | R::Size { .. } => Kind::DataLoss,
                R::Manifest { .. } | R::Platform { .. } | R::TooLarge { .. } | R::HostsFile { .. } | R::Tls { .. } => {
                    Kind::FailedPrecondition
                }
                R::Refused { .. } | R::Abandoned { .. } | R::Local { .. } => Kind::Internal,
            },
            Error::NotFound { .. } | Error::SubPath { missing: true, .. } => Kind::NotFound,
            Error::SubPath { .. } => Kind::InvalidArgument,
            Error::Invalid { .. } => Kind::InvalidArgument,
            Error::Archive { kind, .. } => *kind,
            Error::Layer { full: true, .. } => Kind::ResourceExhausted,
            Error::Unusable { .. } | Error::Layer { .. } | Error::Record { .. } => Kind::FailedPrecondition,
            Error::Content { source, .. } if is_full(source) => Kind::ResourceExhausted,
            Error::Snapshot { source, .. } if is_full(source) => Kind::ResourceExhausted,
            Error::Content { source: stasis_content::Error::Digest { .. }, .. } => Kind::DataLoss,
            Error::Io { source, .. } if is_full(source) => Kind::ResourceExhausted,
            Error::Content { .. } | Error::Snapshot { .. } | Error::State { .. } | Error::Io { .. } => Kind::Internal,
        }
    }
}

/// Whether an error, or what caused it, is that the disk or a quota is full.
pub(crate) fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && matches!(io.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Puts what was being done in front of a system error.
pub(crate) fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Io { doing, source }
}

pub(crate) fn content_error(doing: impl Into<String>) -> impl FnOnce(stasis_content::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Content { doing, source }
}

pub(crate) fn snapshot_error(doing: impl Into<String>) -> impl FnOnce(stasis_snapshot::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Snapshot { doing, source }
}

pub(crate) fn state_error<E: Into<redb::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::State { doing, source: Box::new(source.into()) }
}
