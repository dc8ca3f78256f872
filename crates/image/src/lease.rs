//! What an operation in progress still needs, so that garbage collection leaves it alone; and who works on which blob.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::Inner;

/// All leases in force.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    held: Mutex<BTreeMap<u64, Holding>>,
    /// Held by garbage collection from the look at what is needed to the last deletion, and by all who begin to need
    /// something that may already be there. Otherwise a blob could go between "it is there" and "I need it".
    pub(crate) gate: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct Holding {
    names: HashSet<String>,
    /// The operation finds out only by reading what it needs: nothing at all is collected meanwhile.
    everything: bool,
}

/// What an operation holds; given up when the last clone goes. Blocking threads hold clones, so that a cancelled operation
/// keeps what it needs until its last thread has noticed.
#[derive(Debug, Clone)]
pub(crate) struct Lease(Arc<Held>);

#[derive(Debug)]
struct Held {
    id: u64,
    inner: Weak<Inner>,
    succeeded: std::sync::atomic::AtomicBool,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Holding>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All names that leases hold; `None` if one of them holds everything.
    pub(crate) fn names(&self) -> Option<HashSet<String>> {
        let held = self.lock();
        if held.values().any(|holding| holding.everything) {
            return None;
        }
        Some(held.values().flat_map(|holding| holding.names.iter().cloned()).collect())
    }
}

impl Lease {
    /// A lease on nothing yet, or on everything.
    pub(crate) async fn new(inner: &Arc<Inner>, everything: bool) -> Lease {
        let _gate = inner.leases.gate.lock().await;
        let mut held = inner.leases.lock();
        let id = held.last_key_value().map_or(0, |(id, _)| id + 1);
        held.insert(id, Holding { everything, ..Holding::default() });
        drop(held);
        Lease(Arc::new(Held { id, inner: Arc::downgrade(inner), succeeded: false.into() }))
    }

    /// Holds blobs (by digest) and layers (by chain ID) from now on, those that exist and those that are about to.
    pub(crate) async fn protect(&self, names: impl IntoIterator<Item = String>) {
        let Some(inner) = self.0.inner.upgrade() else { return };
        let _gate = inner.leases.gate.lock().await;
        if let Some(holding) = inner.leases.lock().get_mut(&self.0.id) {
            holding.names.extend(names);
        }
    }

    /// All that was made is recorded: nothing is left to collect.
    pub(crate) fn succeeded(&self) {
        self.0.succeeded.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let everything = inner.leases.lock().remove(&self.id).is_some_and(|holding| holding.everything);
        if everything || !self.succeeded.load(std::sync::atomic::Ordering::Relaxed) {
            crate::gc::collect_later(inner);
        }
    }
}

/// Locks by name, for work that must not be done twice at once: the download of a blob, the unpacking of a layer.
#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    pub(crate) async fn lock(&self, name: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(name).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::new(tokio::sync::Mutex::new(()));
                locks.insert(name.to_owned(), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}
