//! How much memory a container will give, before it is frozen.

use std::fs;
use std::path::Path;

use stasis_cgroup::Cgroup;
use stasis_shim_api::{Reason, ShimError};

use super::exhausted;
use super::job::internal;

/// Largest `/proc/<pid>/status` that is read.
const STATUS_MAX: u64 = 64 * 1024;
/// Page images beyond one a process: shared memory segments, and processes started until the freeze. Images beyond these
/// become plain files on the worker's tmpfs.
const IMAGES_SLACK: usize = 16;
/// Most FIFOs that are made.
const IMAGES_MAX: usize = 4096;
/// What the memory may grow by until the freeze, beside an eighth of itself.
const MEMORY_SLACK: u64 = 8 << 20;
/// Bytes that must stay free where the archive goes.
const SPACE_RESERVE: u64 = 64 << 20;
/// Share of the node's free memory that a checkpoint may reserve.
const BUDGET_SHARE: u64 = 4;

/// What to expect of a container.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    /// Bytes of memory, rather too many.
    pub(crate) bytes: u64,
    /// Bytes that may be reserved for it.
    pub(crate) budget: u64,
    /// Number of page images.
    pub(crate) images: usize,
}

impl Estimate {
    /// Looks at the processes in `cgroup`.
    pub(crate) fn of(cgroup: &Cgroup) -> Result<Self, ShimError> {
        let processes = cgroup.procs().map_err(internal)?;
        if processes.is_empty() {
            let message = format!("there are no processes in the cgroup {}: nothing to checkpoint", cgroup.path());
            return Err(ShimError { reason: Reason::FailedPrecondition, message });
        }
        let memory: u64 = processes.iter().map(|pid| resident(*pid)).sum();
        Ok(Self {
            bytes: memory + memory / 8 + MEMORY_SLACK,
            budget: available_memory() / BUDGET_SHARE,
            images: (processes.len() + IMAGES_SLACK).min(IMAGES_MAX),
        })
    }

    /// Refuses a checkpoint that will not fit the disk, before anything is frozen.
    pub(crate) fn check_space(&self, archive: &Path) -> Result<(), ShimError> {
        let dir = archive.parent().unwrap_or(Path::new("/"));
        let available = stasis_sys::file::available_bytes(dir);
        let available = available.map_err(|error| internal(format!("cannot look at {}: {error}", dir.display())))?;
        if available < self.bytes + SPACE_RESERVE {
            return Err(exhausted(format!(
                "{} has {available} bytes free and the checkpoint needs about {}: free some space, or checkpoint to \
                 another directory",
                dir.display(),
                self.bytes + SPACE_RESERVE
            )));
        }
        Ok(())
    }
}

/// Anonymous, shared and swapped memory of a process in bytes; none of one that has ended. Pages of files are in the
/// files, and changed private ones count as anonymous.
fn resident(pid: u32) -> u64 {
    let status = stasis_sys::path::read_limited(Path::new(&format!("/proc/{pid}/status")), STATUS_MAX);
    let status = status.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    ["RssAnon:", "RssShmem:", "VmSwap:"].iter().filter_map(|key| kilobytes(&status, key)).sum::<u64>() * 1024
}

/// `MemAvailable`; a node that does not say reserves nothing, and pages go to the disk.
fn available_memory() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kilobytes(&meminfo, "MemAvailable:").unwrap_or(0) * 1024
}

/// The number in the line `key <number> kB`.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_seen() {
        let grown = vec![1u8; 32 << 20];
        let seen = resident(std::process::id());
        assert!(seen >= grown.len() as u64, "{seen}");
        assert_eq!(resident(u32::MAX), 0);
        assert!(available_memory() > 0);
    }

    #[test]
    fn a_checkpoint_that_cannot_fit_is_refused() {
        let estimate = Estimate { bytes: u64::MAX / 2, budget: 0, images: 1 };
        let error = estimate.check_space(Path::new("/tmp/x.tar")).unwrap_err();
        assert_eq!(error.reason, Reason::ResourceExhausted);
        assert!(error.message.contains("/tmp has"), "{error}");
    }
}
