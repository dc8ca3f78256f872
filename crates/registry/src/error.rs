//! What can go wrong between us and a registry, in words for the person who asked for the image.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a pull or push failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no image reference.
    #[error("{text:?} is not an image reference: {reason}")]
    Reference {
        /// What was given.
        text: String,
        /// The rule that it breaks.
        reason: String,
    },
    /// The registry's `hosts.toml` cannot be used.
    #[error("registry host file {path}: {reason}")]
    HostsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No HTTP client could be made for the host.
    #[error("cannot set up TLS for registry {host}: {reason}")]
    Tls {
        /// The registry.
        host: String,
        /// What rustls said.
        reason: String,
    },
    /// No answer at all.
    #[error("registry {host} cannot be reached: {reason}{hint}")]
    Unreachable {
        /// The registry.
        host: String,
        /// What the system said.
        reason: String,
        /// What to try; empty or starts with "; ".
        hint: &'static str,
    },
    /// The credentials, or their absence, do not suffice.
    #[error("registry {host} refuses access to {repository}: {reason}")]
    Unauthorized {
        /// The registry.
        host: String,
        /// Repository of the image.
        repository: String,
        /// What the registry said.
        reason: String,
    },
    /// The registry answers, and has no such thing.
    #[error("{what} not found in registry {host}")]
    NotFound {
        /// The object: `library/redis:7`, or a blob's digest.
        what: String,
        /// The registry.
        host: String,
    },
    /// What came is not what was asked for.
    #[error("{what} from registry {host} has digest {actual} where {expected} was asked for; nothing of it is used")]
    Digest {
        /// The object.
        what: String,
        /// The registry.
        host: String,
        /// Digest that was asked for.
        expected: String,
        /// Digest of what came.
        actual: String,
    },
    /// The size in the manifest and that of the answer differ.
    #[error(
        "blob {digest} from registry {host} has {actual} bytes where its manifest says {expected}; nothing of it is used"
    )]
    Size {
        /// The blob.
        digest: String,
        /// The registry.
        host: String,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes by the registry, or those received so far.
        actual: u64,
    },
    /// The connection broke, and went on breaking.
    #[error("transfer of {digest} with registry {host} was interrupted at byte {at} of {total}: {reason}; try again")]
    Interrupted {
        /// The blob.
        digest: String,
        /// The registry.
        host: String,
        /// Bytes that had been transferred.
        at: u64,
        /// Bytes of the whole.
        total: u64,
        /// What the system said last.
        reason: String,
    },
    /// An answer, but not one we can use.
    #[error("registry {host} answered {status} to {request}: {reason}")]
    Refused {
        /// The registry.
        host: String,
        /// HTTP status.
        status: u16,
        /// What had been asked.
        request: String,
        /// What the registry said.
        reason: String,
    },
    /// An answer beyond its limit.
    #[error("{what} from registry {host} is larger than the {limit} bytes that are allowed for it")]
    TooLarge {
        /// The object.
        what: String,
        /// The registry.
        host: String,
        /// Most bytes allowed.
        limit: u64,
    },
    /// A manifest that is malformed, ambiguous, or of a kind we cannot run.
    #[error("manifest {digest}: {reason}")]
    Manifest {
        /// Digest of the document.
        digest: String,
        /// What is wrong.
        reason: String,
    },
    /// An index without an image for this machine.
    #[error("image index {digest} has no image for {wanted}; it has: {present}")]
    Platform {
        /// Digest of the index.
        digest: String,
        /// Our platform.
        wanted: String,
        /// What the index offers.
        present: String,
    },
    /// The receiver of the bytes went away; its own error says why.
    #[error("transfer of {digest} was given up by its receiver")]
    Abandoned {
        /// The blob.
        digest: String,
    },
    /// The local file that was to be pushed cannot be read.
    #[error("cannot read blob {digest} for the push: {source}")]
    Local {
        /// The blob.
        digest: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether another host that serves the same repository may do better.
    pub(crate) fn is_hosts_fault(&self) -> bool {
        !matches!(
            self,
            Error::Abandoned { .. } | Error::Local { .. } | Error::Reference { .. } | Error::Platform { .. }
        )
    }
}

/// An error with all its causes in one line; reqwest's own text names the URL and hides the reason.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
