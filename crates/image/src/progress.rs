//! Reports on long operations.

use std::fmt;
use std::sync::Arc;

/// A report. One with `digest` is about one blob, one without about the whole operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The blob.
    pub digest: Option<String>,
    /// `resolving`, `downloading`, `exists`, `unpacking`, `uploading`, `reading` or `writing`.
    pub phase: &'static str,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all; 0 where that is not known.
    pub total: u64,
}

/// Where reports go; shared with blocking threads.
#[derive(Clone)]
pub(crate) struct Report(Arc<dyn Fn(Progress) + Send + Sync>);

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Report")
    }
}

impl Report {
    pub(crate) fn new(to: impl Fn(Progress) + Send + Sync + 'static) -> Report {
        Report(Arc::new(to))
    }

    pub(crate) fn whole(&self, phase: &'static str) {
        (self.0)(Progress { digest: None, phase, done: 0, total: 0 });
    }

    pub(crate) fn blob(&self, digest: &str, phase: &'static str, done: u64, total: u64) {
        (self.0)(Progress { digest: Some(digest.to_owned()), phase, done, total });
    }
}
