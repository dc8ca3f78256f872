//! A frozen container, which runs again however this ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use stasis_cgroup::Cgroup;
use stasis_shim_api::{Reason, ShimError};

use super::job::{Event, emit, internal, micros};

/// How long the freeze was that has ended, in microseconds.
static LAST: AtomicU64 = AtomicU64::new(0);

/// Exists as long as the container is frozen; dropping it thaws.
#[derive(Debug)]
pub(crate) struct Frozen {
    cgroup: Cgroup,
    since: Instant,
    thawed: bool,
}

impl Frozen {
    /// Freezes the container's own cgroup: with a frozen parent CRIU would wait for ever.
    pub(crate) fn freeze(cgroup: &Cgroup) -> Result<Self, ShimError> {
        let since = Instant::now();
        cgroup
            .freeze()
            .map_err(|error| ShimError { reason: Reason::FailedPrecondition, message: error.to_string() })?;
        let frozen = Self { cgroup: cgroup.clone(), since, thawed: false };
        emit(&Event::Frozen);
        Ok(frozen)
    }

    /// CRIU lets the processes go for the time it holds them itself, and freezes them again. If it did not, files and
    /// memory may be of different instants.
    pub(crate) fn check(&self, cgroup: &Cgroup) -> Result<(), ShimError> {
        if cgroup.is_frozen().map_err(internal)? {
            return Ok(());
        }
        Err(internal(format!("the container in {} was set running by somebody during its checkpoint", cgroup.path())))
    }

    /// Lets the container run.
    pub(crate) fn thaw(mut self) -> Result<(), ShimError> {
        self.thaw_now().map_err(internal)
    }

    fn thaw_now(&mut self) -> stasis_cgroup::Result<()> {
        match self.cgroup.thaw() {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        self.thawed = true;
        let frozen_us = micros(self.since.elapsed());
        LAST.store(frozen_us, Ordering::Relaxed);
        emit(&Event::Thawed { frozen_us });
        Ok(())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.thawed {
            // If even this fails, the shim tries again until the kernel says that it worked.
            let _ = self.thaw_now();
        }
    }
}

/// How long the freeze was that has ended, in microseconds.
pub(crate) fn last_us() -> u64 {
    LAST.load(Ordering::Relaxed)
}
