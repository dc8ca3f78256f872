//! The sizes of writable layers, measured in the background: a tree of a million files takes seconds to walk.
//!
//! A new container is measured at once; then each that runs again and again, and one that has ended once more.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stasis_snapshot::Usage;
use tokio::time::Instant;
use tracing::debug;

use crate::pods::{Container, Pods};
use crate::record::{Phase, now};

/// How old a measurement gets at least: as containerd's.
const INTERVAL: Duration = Duration::from_secs(10);

/// How many times as long as the last pass took is waited for the next: measuring takes at most a tenth of a processor.
const REST: u32 = 9;

/// The result of a measurement.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// When, in nanoseconds since the epoch.
    pub(crate) at: i64,
    pub(crate) usage: Usage,
}

/// The last measurement of a layer.
#[derive(Debug, Default)]
pub(crate) struct Layer(Mutex<Option<Measured>>);

impl Layer {
    pub(crate) fn get(&self) -> Option<Measured> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, measured: Measured) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(measured);
    }
}

/// Wakes the one who measures. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layers(Arc<tokio::sync::Notify>);

impl Layers {
    /// A container was made: it is measured now.
    pub(crate) fn added(&self) {
        self.0.notify_one();
    }
}

/// Which layers a pass measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// Those never measured.
    New,
    /// Those that may have changed.
    Changing,
}

impl Pods {
    /// Begins to measure, for as long as the engine lives.
    pub(crate) fn watch_layers(&self) {
        let (engine, layers) = (Arc::downgrade(&self.0), self.layers.clone());
        tokio::spawn(async move {
            let mut next = Instant::now();
            loop {
                let pass = tokio::select! {
                    () = tokio::time::sleep_until(next) => Pass::Changing,
                    () = layers.0.notified() => Pass::New,
                };
                let Some(pods) = engine.upgrade().map(Pods) else { return };
                let begin = Instant::now();
                if pods.off_the_async_threads(move |pods| pods.measure(pass)).await.is_err() {
                    return;
                }
                if pass == Pass::Changing {
                    next = Instant::now() + INTERVAL.max(begin.elapsed() * REST);
                }
            }
        });
    }

    fn measure(&self, pass: Pass) {
        for container in self.containers.all() {
            if !is_due(&container, pass) {
                continue;
            }
            // The time before the walk: what ends meanwhile is then measured once more.
            let at = now();
            match self.images.usage(&container.id) {
                Ok(usage) => container.layer.set(Measured { at, usage }),
                // It may have been removed meanwhile.
                Err(error) => debug!(container = container.id, %error, "cannot measure a writable layer"),
            }
        }
    }
}

fn is_due(container: &Container, pass: Pass) -> bool {
    let Some(last) = container.layer.get() else { return true };
    let record = container.record();
    pass == Pass::Changing
        && match record.phase() {
            Phase::Created => false,
            Phase::Running => true,
            Phase::Exited => last.at <= record.finished_at,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::ContainerRecord;

    #[test]
    fn a_layer_is_measured_while_it_may_change_and_once_more_at_its_end() {
        let container = |phase: Phase, finished_at| {
            let mut record = ContainerRecord { finished_at, ..ContainerRecord::default() };
            record.set_phase(phase);
            Container::new(record)
        };
        let check = |phase, finished_at, measured: Option<i64>, new, changing| {
            let container = container(phase, finished_at);
            if let Some(at) = measured {
                container.layer.set(Measured { at, usage: Usage::default() });
            }
            assert_eq!((is_due(&container, Pass::New), is_due(&container, Pass::Changing)), (new, changing));
        };
        check(Phase::Created, 0, None, true, true);
        check(Phase::Created, 0, Some(5), false, false);
        check(Phase::Running, 0, Some(5), false, true);
        check(Phase::Exited, 9, Some(5), false, true);
        check(Phase::Exited, 9, Some(10), false, false);
    }
}
