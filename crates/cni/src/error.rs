//! What can go wrong with a pod's network.

use std::fmt;
use std::io::ErrorKind;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why no pod can be connected now. The reason is one line, for the `NetworkReady` condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct NotReady {
    /// What is missing or broken, where, and what to do.
    pub reason: String,
}

/// Why connecting or disconnecting a pod failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// There is no usable configuration.
    #[error("the pod network is not ready: {0}")]
    NotReady(#[from] NotReady),
    /// A plugin failed.
    #[error("{0}")]
    Plugin(Box<PluginFailure>),
    /// An argument that cannot be given to a plugin.
    #[error("{0}")]
    InvalidArgument(String),
    /// The cache could not be read or written.
    #[error("{0}")]
    Cache(String),
    /// The cache could not be written for want of space. Nothing was added to a network.
    #[error("{0}")]
    NoSpace(String),
}

impl Error {
    pub(crate) fn cache(doing: &str, path: &std::path::Path, error: impl fmt::Display) -> Self {
        Self::Cache(format!("{doing} {}: {error}", path.display()))
    }

    pub(crate) fn write(path: &std::path::Path, error: &std::io::Error) -> Self {
        let message = format!("cannot write {}: {error}", path.display());
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::NoSpace(message),
            _ => Self::Cache(message),
        }
    }
}

/// A failed run of a plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PluginFailure {
    /// The plugin's type, which is its program's name.
    pub plugin: String,
    /// `ADD`, `DEL`, `CHECK`, `GC`, `STATUS`.
    pub command: String,
    /// Name of the network.
    pub network: String,
    /// The pod; empty if it was about none.
    pub id: String,
    /// The plugin's error code (section 5: below 100 of the specification, from 100 on its own); none if it gave none.
    pub code: Option<u64>,
    /// What it said, or what became of it.
    pub message: String,
    /// What it said besides; may be empty.
    pub details: String,
    /// End of its error output; may be empty.
    pub stderr: String,
    /// What could not be taken back after a failed `ADD`; may be empty. It is tried again at the next delete.
    pub not_undone: String,
}

impl fmt::Display for PluginFailure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "CNI plugin {} ({} in network {}", self.plugin, self.command, self.network)?;
        if !self.id.is_empty() {
            write!(out, ", pod {}", self.id)?;
        }
        write!(out, "): {}", self.message)?;
        if !self.details.is_empty() {
            write!(out, "; {}", self.details)?;
        }
        if let Some(code) = self.code {
            write!(out, " (code {code})")?;
        }
        if !self.stderr.is_empty() {
            write!(out, "; it wrote: {}", self.stderr)?;
        }
        if !self.not_undone.is_empty() {
            write!(out, "; taking it back failed, too: {}", self.not_undone)?;
        }
        Ok(())
    }
}
