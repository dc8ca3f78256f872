//! How many checkpoints a node takes at a time, how long one waits for its turn, and what each may use.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::error::{Error, Kind, Result};

/// What checkpoints may use of a node, from the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointLimits {
    /// Checkpoints at a time; 0 for half as many as there are processors, since each keeps two busy while it is frozen.
    pub parallel: usize,
    /// Memory for the pages of all of them together, in bytes; 0 for a quarter of what is free.
    pub buffer_bytes: u64,
    /// Bytes that must stay free where archives are written.
    pub reserve_bytes: u64,
}

impl Default for CheckpointLimits {
    fn default() -> Self {
        Self { parallel: 0, buffer_bytes: 0, reserve_bytes: 128 << 20 }
    }
}

/// Share of the free memory that all checkpoints together may reserve.
const BUFFER_SHARE: u64 = 4;

/// Where checkpoints queue.
#[derive(Debug)]
pub(crate) struct Queue {
    slots: Semaphore,
    parallel: usize,
    limits: CheckpointLimits,
}

/// A checkpoint's turn, and what it may use; given back when dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    _slot: SemaphorePermit<'a>,
    /// What is left of its time.
    pub(crate) left: Duration,
    /// Memory for pages, in bytes.
    pub(crate) buffer_max: u64,
    /// Bytes that must stay free where the archive goes.
    pub(crate) reserve: u64,
}

impl Queue {
    pub(crate) fn new(limits: CheckpointLimits) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let parallel = if limits.parallel == 0 { (processors / 2).max(1) } else { limits.parallel };
        Self { slots: Semaphore::new(parallel), parallel, limits }
    }

    /// Waits for a turn; waiting is part of the `timeout`.
    ///
    /// # Errors
    /// `DeadlineExceeded` if none comes in time.
    pub(crate) async fn turn(&self, timeout: Duration) -> Result<Turn<'_>> {
        let started = Instant::now();
        let late = || {
            Error::new(
                Kind::DeadlineExceeded,
                format!(
                    "it waited {} s behind the {} checkpoints that this node takes at a time, and was not begun: try \
                     again, allow more time, or raise `parallel` under [checkpoint]",
                    timeout.as_secs_f64(),
                    self.parallel
                ),
            )
        };
        let slot = tokio::time::timeout(timeout, self.slots.acquire()).await.map_err(|_| late())?;
        let slot = slot.map_err(|error| Error::internal(error.to_string()))?;
        let left = timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(late());
        }
        let all = match self.limits.buffer_bytes {
            0 => stasis_sys::memory::available() / BUFFER_SHARE,
            bytes => bytes,
        };
        Ok(Turn { _slot: slot, left, buffer_max: all / self.parallel as u64, reserve: self.limits.reserve_bytes })
    }
}

/// Refuses a place that archives cannot be written to.
pub(crate) fn check_location(location: &Path) -> Result<()> {
    if !location.is_absolute() || location.file_name().is_none() {
        return Err(Error::invalid(format!(
            "the archive's location {:?} must be an absolute path of a file",
            location.display().to_string()
        )));
    }
    match location.parent() {
        Some(parent) if parent.is_dir() => Ok(()),
        parent => Err(Error::invalid(format!(
            "the archive's directory {} is not there: make it first",
            parent.map_or_else(|| PathBuf::from("/"), Path::to_owned).display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_checkpoint_waits_for_its_turn_and_no_longer_than_its_time() {
        let limits = CheckpointLimits { parallel: 2, buffer_bytes: 1000, reserve_bytes: 7 };
        let queue = Queue::new(limits);
        let first = queue.turn(Duration::from_secs(60)).await.unwrap();
        let _second = queue.turn(Duration::from_secs(60)).await.unwrap();
        assert_eq!((first.buffer_max, first.reserve), (500, 7), "together they keep to the budget");
        let error = queue.turn(Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        let waiting = queue.turn(Duration::from_secs(60));
        let (_, third) = tokio::join!(async { drop(first) }, waiting);
        assert!(third.unwrap().left > Duration::ZERO);
    }
}
