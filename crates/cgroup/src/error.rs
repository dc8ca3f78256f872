//! What can go wrong, in words for the one who operates the node.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a cgroup failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is mounted.
    #[error("no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup")]
    NoCgroups,
    /// A path that does not stay below the root, or that the kernel would refuse.
    #[error("cgroup path {path:?} is not valid: {reason}")]
    InvalidPath {
        /// The path as it was given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An operation that would hit every process of the host.
    #[error("{action} the root cgroup of {} is refused: it holds processes that are not ours", hierarchy.display())]
    Root {
        /// What was asked for.
        action: &'static str,
        /// The mount point of the hierarchy.
        hierarchy: PathBuf,
    },
    /// The controller that the operation needs is not there.
    #[error("cgroup {path}: the host has no {controller} controller; enable it in the kernel or mount it")]
    NoController {
        /// The cgroup.
        path: String,
        /// The missing controller.
        controller: &'static str,
    },
    /// The kernel refused.
    #[error("{action} {}: {source}", file.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the kernel that we cannot make sense of.
    #[error("{}: expected {expected}, found {found:?}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What should have been in it.
        expected: &'static str,
        /// The beginning of what was in it.
        found: String,
    },
    /// The freeze was given up and taken back.
    #[error(
        "cgroup {path} did not freeze within {limit:?} and was thawed again; \
         look for a process in uninterruptible sleep (state D) there"
    )]
    NotFrozen {
        /// The cgroup.
        path: String,
        /// How long was waited.
        limit: Duration,
    },
    /// Processes that outlive SIGKILL.
    #[error("cgroup {path}: {count} processes are still there {limit:?} after SIGKILL, the first is {first}")]
    StillAlive {
        /// The cgroup.
        path: String,
        /// How many are left.
        count: usize,
        /// The ID of one of them.
        first: u32,
        /// How long was waited.
        limit: Duration,
    },
}

impl Error {
    /// For `map_err`: says what was tried on which file.
    pub(crate) fn io(action: &'static str, file: &Path) -> impl FnOnce(io::Error) -> Error {
        let file = file.to_path_buf();
        move |source| Error::Io { action, file, source }
    }

    /// Whether the cgroup, or the process, was not there.
    pub fn is_not_found(&self) -> bool {
        // The kernel says ENODEV to who reads a file of a cgroup that was removed after the file was opened.
        matches!(self, Error::Io { source, .. }
            if source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()))
    }
}
