//! How much memory a container will give, before it is frozen.

use std::path::{Path, PathBuf};

use stasis_cgroup::Cgroup;
use stasis_criu::preflight::memory_bytes;
use stasis_shim_api::{Reason, ShimError};

use super::exhausted;
use super::job::internal;

/// Page images beyond one a process: shared memory segments, and processes started until the freeze. Images beyond these
/// become plain files on the worker's tmpfs.
const IMAGES_SLACK: usize = 16;
/// Most FIFOs that are made.
const IMAGES_MAX: usize = 4096;
/// What the memory may grow by until the freeze, beside an eighth of itself.
const MEMORY_SLACK: u64 = 8 << 20;
/// Bytes that must stay free where the archive goes, whatever the request says.
const SPACE_RESERVE: u64 = 64 << 20;
/// So many bytes may be written between two looks at what is free.
const SPACE_STEP: u64 = 64 << 20;
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
    pub(crate) fn of(cgroup: &Cgroup, buffer_max: Option<u64>) -> Result<Self, ShimError> {
        let processes = cgroup.procs().map_err(internal)?;
        if processes.is_empty() {
            let message = format!("there are no processes in the cgroup {}: nothing to checkpoint", cgroup.path());
            return Err(ShimError { reason: Reason::FailedPrecondition, message });
        }
        let memory = memory_bytes(&processes, cgroup.memory_bytes().ok());
        Ok(Self {
            bytes: memory + memory / 8 + MEMORY_SLACK,
            budget: (stasis_sys::memory::available() / BUDGET_SHARE).min(buffer_max.unwrap_or(u64::MAX)),
            images: (processes.len() + IMAGES_SLACK).min(IMAGES_MAX),
        })
    }
}

/// What must stay free on the file system of the archive.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    dir: PathBuf,
    reserve: u64,
}

impl Space {
    /// Of the file system on which `archive` will be.
    pub(crate) fn beside(archive: &Path, reserve: u64) -> Self {
        let dir = archive.parent().unwrap_or(Path::new("/")).to_owned();
        Self { dir, reserve: reserve.max(SPACE_RESERVE) }
    }

    /// The directory of the archive.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Refuses `bytes` that would eat into the reserve.
    pub(crate) fn check(&self, bytes: u64) -> Result<(), ShimError> {
        let dir = self.dir.display();
        let available = stasis_sys::file::available_bytes(&self.dir);
        let available = available.map_err(|error| internal(format!("cannot look at {dir}: {error}")))?;
        let needed = bytes.saturating_add(self.reserve);
        if available < needed {
            return Err(exhausted(format!(
                "{dir} has {available} bytes free and the checkpoint needs about {needed}, of which {} must stay free: \
                 free some space, or checkpoint to another directory",
                self.reserve
            )));
        }
        Ok(())
    }

    /// As [`Space::check`] of nothing more, each time that `written` passes another step.
    pub(crate) fn check_step(&self, written: u64, length: u64) -> Result<(), ShimError> {
        if Self::is_step(written, length) { self.check(0) } else { Ok(()) }
    }

    /// Whether `length` more bytes than `written` pass a step.
    pub(crate) fn is_step(written: u64, length: u64) -> bool {
        (written + length) / SPACE_STEP > written / SPACE_STEP
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_that_cannot_fit_is_refused() {
        let space = Space::beside(Path::new("/tmp/x.tar"), 0);
        space.check(0).unwrap();
        let error = space.check(u64::MAX / 2).unwrap_err();
        assert_eq!(error.reason, Reason::ResourceExhausted);
        assert!(error.message.contains("/tmp has"), "{error}");
        // A reserve that is not there any more is found on the way, at the next step.
        let space = Space::beside(Path::new("/tmp/x.tar"), u64::MAX);
        space.check_step(0, SPACE_STEP - 1).unwrap();
        assert_eq!(space.check_step(SPACE_STEP - 1, 1).unwrap_err().reason, Reason::ResourceExhausted);
    }
}
