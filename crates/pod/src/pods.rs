//! The engine: what it is configured with, what it holds in memory, and how operations are kept apart.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use stasis_cgroup::Cgroups;
use stasis_cni::Cni;
use stasis_cri_api::runtime::CgroupDriver;
use stasis_image::Images;
use stasis_task::{EventServer, Sandbox, ShimRuntime, Task};
use tracing::Instrument as _;

use crate::checkpoint::{CheckpointLimits, CheckpointPolicy, Queue, Retention};
use crate::error::{Error, Kind, Result};
use crate::events::Events;
use crate::observe::Counters;
use crate::record::{ContainerRecord, Phase, PodRecord};
use crate::spec::HostFacts;
use crate::stats::{Layer, Layers, Rate};
use crate::store::Store;

/// Which rights this node gives over checkpoints. Restore is a right apart from create: it runs foreign state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RestoreLevel {
    /// Neither checkpoint nor restore.
    None,
    /// Running containers may be checkpointed.
    CheckpointOnly,
    /// Containers may be created from checkpoints too.
    CheckpointRestore,
}

/// One runtime handler: the name that a RuntimeClass uses, and what it stands for.
#[derive(Clone, Debug)]
pub struct Handler {
    /// Runtime type (`io.containerd.stasis.v1`) or absolute path of a shim.
    pub runtime: String,
    /// OCI runtime that the shim executes.
    pub binary: PathBuf,
    /// What checkpoints of its containers may be asked for.
    pub checkpoint: CheckpointPolicy,
}

/// Rights over checkpoints; they can be changed while the engine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What is allowed.
    pub restore_level: RestoreLevel,
    /// Directories from which archives may be restored by path.
    pub archive_dirs: Vec<PathBuf>,
    /// Longest time that a checkpoint may take, and what applies if the caller sets no time.
    pub checkpoint_timeout_max: Duration,
    /// Why checkpoints cannot be made on this node, if so.
    pub checkpoint_unavailable: Option<String>,
}

/// What the engine is configured with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Durable state, `/var/lib/stasis`.
    pub root: PathBuf,
    /// State of this boot, `/run/stasis`.
    pub state: PathBuf,
    /// Runtime handlers by name.
    pub handlers: BTreeMap<String, Handler>,
    /// Handler of a pod that names none.
    pub default_handler: String,
    /// Who makes control groups.
    pub cgroup_driver: CgroupDriver,
    /// Rights over checkpoints, at first.
    pub policy: Policy,
    /// What checkpoints may use of the node.
    pub checkpoint_limits: CheckpointLimits,
    /// Which checkpoints stay.
    pub checkpoint_retention: Retention,
    /// CDI devices of this host.
    pub cdi: stasis_cdi::Registry,
    /// What makes checkpoints here, for the annotations of checkpoint images.
    pub engine_facts: stasis_checkpoint::EngineFacts,
}

/// Whether containers can be checkpointed on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checkpoints {
    /// They can.
    Available,
    /// The configured level forbids it.
    Forbidden,
    /// CRIU is missing or not good enough; why.
    Unavailable(String),
}

/// The engine. Cheap to clone; every clone is the same engine.
#[derive(Clone, Debug)]
pub struct Pods(pub(crate) Arc<Inner>);

/// State of the engine: opaque outside of this crate, public only because [`Pods`] dereferences to it.
#[derive(Debug)]
pub struct Inner {
    pub(crate) config: Config,
    policy: RwLock<Arc<Policy>>,
    pub(crate) images: Images,
    pub(crate) cni: Cni,
    pub(crate) runtime: Arc<ShimRuntime>,
    pub(crate) store: Store,
    pub(crate) cgroups: Cgroups,
    pub(crate) host: HostFacts,
    pub(crate) pods: Directory<Pod>,
    pub(crate) containers: Directory<Container>,
    pub(crate) names: Names,
    /// Where checkpoints wait for their turn.
    pub(crate) checkpoints: Queue,
    /// Held while the index of checkpoints is changed.
    pub(crate) checkpoint_index: tokio::sync::Mutex<()>,
    /// Wakes the one who measures writable layers.
    pub(crate) layers: Layers,
    pub(crate) counters: Counters,
    /// Tells what happens.
    pub(crate) events: Events,
    /// How many calls and operations run.
    operations: tokio::sync::watch::Sender<usize>,
    /// Hears the events of foreign shims for as long as the engine lives: nobody else needs them, but a shim that is not
    /// heard tries for seconds.
    _events: Mutex<EventServer>,
}

impl std::ops::Deref for Pods {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// A pod sandbox in memory.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) record: RwLock<PodRecord>,
    /// The shim; none once the pod is stopped or its shim is lost.
    pub(crate) sandbox: RwLock<Option<Sandbox>>,
    /// Held by stop and remove.
    pub(crate) operation: tokio::sync::Mutex<()>,
    /// Processor time of the last reading.
    pub(crate) rate: Rate,
}

/// A container in memory.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) pod_id: String,
    pub(crate) record: RwLock<ContainerRecord>,
    /// The task, while there is one.
    pub(crate) task: RwLock<Option<Arc<dyn Task>>>,
    /// Held by start, checkpoint and remove.
    pub(crate) operation: tokio::sync::Mutex<()>,
    /// Held while a change of the record is written; true once the record is to be deleted, and must not come back.
    removed: tokio::sync::Mutex<bool>,
    /// The phase, for those who wait for the exit.
    phase: tokio::sync::watch::Sender<Phase>,
    /// Processor time of the last reading.
    pub(crate) rate: Rate,
    /// Size of the writable layer.
    pub(crate) layer: Layer,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pod {
    pub(crate) fn new(record: PodRecord, sandbox: Option<Sandbox>) -> Self {
        Self {
            id: record.id.clone(),
            record: RwLock::new(record),
            sandbox: RwLock::new(sandbox),
            operation: tokio::sync::Mutex::default(),
            rate: Rate::default(),
        }
    }

    pub(crate) fn record(&self) -> RwLockReadGuard<'_, PodRecord> {
        self.record.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sandbox(&self) -> Option<Sandbox> {
        self.sandbox.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives a ready pod its shim, which was found again.
    pub(crate) fn set_sandbox(&self, sandbox: Sandbox) {
        *self.sandbox.write().unwrap_or_else(PoisonError::into_inner) = Some(sandbox);
    }

    /// Takes the sandbox away: from now on the pod has no shim.
    pub(crate) fn take_sandbox(&self) -> Option<Sandbox> {
        self.sandbox.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Changes the record, durably; memory follows the disk.
    pub(crate) async fn update(&self, store: &Store, change: impl FnOnce(&mut PodRecord)) -> Result<()> {
        let mut record = self.record().clone();
        change(&mut record);
        store.put_pod(&record).await?;
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = record;
        Ok(())
    }
}

impl Container {
    pub(crate) fn new(record: ContainerRecord) -> Self {
        Self {
            id: record.id.clone(),
            pod_id: record.pod_id.clone(),
            phase: tokio::sync::watch::Sender::new(record.phase()),
            record: RwLock::new(record),
            task: RwLock::new(None),
            operation: tokio::sync::Mutex::default(),
            removed: tokio::sync::Mutex::default(),
            rate: Rate::default(),
            layer: Layer::default(),
        }
    }

    pub(crate) fn record(&self) -> RwLockReadGuard<'_, ContainerRecord> {
        self.record.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn task(&self) -> Option<Arc<dyn Task>> {
        self.task.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_task(&self, task: Option<Arc<dyn Task>>) {
        *self.task.write().unwrap_or_else(PoisonError::into_inner) = task;
    }

    /// Changes the record, durably; memory follows the disk, then those who wait for the phase are told.
    pub(crate) async fn update(&self, store: &Store, change: impl FnOnce(&mut ContainerRecord)) -> Result<()> {
        let removed = self.removed.lock().await;
        if *removed {
            return Err(Error::new(Kind::NotFound, format!("container {} is removed", self.id)));
        }
        let mut record = self.record().clone();
        change(&mut record);
        store.put_container(&record).await?;
        let phase = record.phase();
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = record;
        self.phase.send_replace(phase);
        Ok(())
    }

    /// Takes no more changes of the record: it is about to be deleted.
    pub(crate) async fn set_removed(&self) {
        *self.removed.lock().await = true;
    }

    /// Waits for its turn to do something with the container.
    ///
    /// # Errors
    /// `NotFound` if it was removed meanwhile.
    pub(crate) async fn turn(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        let turn = self.operation.lock().await;
        if *self.removed.lock().await {
            return Err(Error::new(Kind::NotFound, format!("container {} is removed", self.id)));
        }
        Ok(turn)
    }

    /// Waits until the container has exited.
    pub(crate) async fn exited(&self) {
        // An error means that the container was removed, which it is not before its exit.
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Exited).await;
    }

    /// Waits until the container has exited; false if `limit` passes before.
    pub(crate) async fn exited_within(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.exited()).await.is_ok()
    }
}

/// Objects by ID. The lock is held for memory only.
#[derive(Debug)]
pub(crate) struct Directory<T> {
    entries: RwLock<HashMap<String, Arc<T>>>,
}

impl<T> Default for Directory<T> {
    fn default() -> Self {
        Self { entries: RwLock::default() }
    }
}

impl<T> Directory<T> {
    pub(crate) fn get(&self, id: &str) -> Option<Arc<T>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn insert(&self, id: &str, object: T) -> Arc<T> {
        let object = Arc::new(object);
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.insert(id.to_owned(), Arc::clone(&object));
        object
    }

    pub(crate) fn remove(&self, id: &str) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The object whose ID is `id` or begins with it, if there is one.
    ///
    /// CRI's clients send whole IDs; people and crictl send prefixes.
    ///
    /// # Errors
    /// `InvalidArgument` if several IDs begin with it.
    pub(crate) fn find(&self, id: &str) -> Result<Option<Arc<T>>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(object) = entries.get(id) {
            return Ok(Some(Arc::clone(object)));
        }
        if id.is_empty() {
            return Ok(None);
        }
        let mut matches = entries.iter().filter(|(key, _)| key.starts_with(id));
        match (matches.next(), matches.next()) {
            (Some((one, _)), Some((other, _))) => {
                Err(Error::invalid(format!("{id} is the beginning of several IDs, of {one} and {other} among them")))
            }
            (found, _) => Ok(found.map(|(_, object)| Arc::clone(object))),
        }
    }
}

/// Names in use, each with the ID that has it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names(Arc<Mutex<HashMap<String, String>>>);

/// A name held for an object in the making; given back unless it is kept.
#[derive(Debug)]
pub(crate) struct Reservation {
    names: Names,
    /// The name and the ID.
    held: Option<(String, String)>,
}

impl Names {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds `name` for `id`.
    pub(crate) fn reserve(&self, kind: &str, name: String, id: &str) -> Result<Reservation> {
        let mut names = self.lock();
        if let Some(holder) = names.get(&name) {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!(
                    "the {kind} name {name:?} is taken by {holder}: remove that {kind} first, or use another name or attempt"
                ),
            ));
        }
        names.insert(name.clone(), id.to_owned());
        Ok(Reservation { names: self.clone(), held: Some((name, id.to_owned())) })
    }

    /// Gives a name back if `id` has it.
    pub(crate) fn release(&self, name: &str, id: &str) {
        let mut names = self.lock();
        if names.get(name).is_some_and(|holder| holder == id) {
            names.remove(name);
        }
    }
}

impl Reservation {
    /// The object is there: the name stays taken.
    pub(crate) fn keep(mut self) {
        self.held = None;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some((name, id)) = &self.held {
            self.names.release(name, id);
        }
    }
}

impl Pods {
    /// Opens the engine on its parts: reads the records, finds the running shims again, and clears away what a crash
    /// left. The node's kernel is probed once, here.
    ///
    /// # Errors
    /// Where the records cannot be read, or no control groups are mounted.
    pub async fn open(
        config: Config,
        images: Images,
        cni: Cni,
        runtime: Arc<ShimRuntime>,
        db: Arc<redb::Database>,
    ) -> Result<Self> {
        let events = runtime.serve_events(|id| tracing::info!(task = id, "a shim reports that memory ran out")).await?;
        let cgroups = Cgroups::probe().map_err(|error| Error::precondition(error.to_string()))?;
        let inner = Inner {
            store: Store::open(db)?,
            host: HostFacts::detect(),
            checkpoints: Queue::new(config.checkpoint_limits.clone()),
            policy: RwLock::new(Arc::new(config.policy.clone())),
            config,
            images,
            cni,
            runtime,
            cgroups,
            pods: Directory::default(),
            containers: Directory::default(),
            names: Names::default(),
            checkpoint_index: tokio::sync::Mutex::default(),
            layers: Layers::default(),
            counters: Counters::default(),
            events: Events::default(),
            operations: tokio::sync::watch::Sender::new(0),
            _events: Mutex::new(events),
        };
        let pods = Self(Arc::new(inner));
        pods.reconcile().await?;
        pods.watch_layers();
        Ok(pods)
    }

    /// The rights over checkpoints that hold now.
    pub(crate) fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether containers can be checkpointed now.
    pub fn checkpoints_possible(&self) -> Checkpoints {
        let policy = self.policy();
        match (policy.restore_level, &policy.checkpoint_unavailable) {
            (RestoreLevel::None, _) => Checkpoints::Forbidden,
            (_, Some(why)) => Checkpoints::Unavailable(why.clone()),
            (_, None) => Checkpoints::Available,
        }
    }

    /// Gives other rights over checkpoints, for the operations that begin from now on.
    pub fn set_policy(&self, policy: Policy) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
    }

    /// The driver of control groups, for CRI's RuntimeConfig.
    pub fn cgroup_driver(&self) -> CgroupDriver {
        self.config.cgroup_driver
    }

    /// Runs an operation to its end, whether or not the caller still waits: a client that gives up must not leave half
    /// a container behind.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let running = self.operation();
        let operation = async move {
            let _running = running;
            operation.await
        };
        tokio::spawn(operation.in_current_span())
            .await
            .unwrap_or_else(|error| Err(Error::internal(format!("the operation ended abnormally: {error}"))))
    }

    /// Waits until the state database takes no more records, as a write to it has failed. The daemon must then start anew.
    pub async fn broken(&self) {
        self.store.failure().await;
    }

    /// Counts a call, or work on images that a call began, as an operation.
    pub fn operation(&self) -> Operation {
        self.operations.send_modify(|running| *running += 1);
        Operation(self.clone())
    }

    /// Waits until no operation runs: for the end of the daemon, once no calls come in any more.
    pub async fn drained(&self) {
        // An error means that the engine is gone, and its operations with it.
        let _ = self.operations.subscribe().wait_for(|running| *running == 0).await;
    }

    /// How many calls and operations run.
    pub(crate) fn running_operations(&self) -> usize {
        *self.operations.borrow()
    }

    pub(crate) fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        self.pods.find(id)?.ok_or_else(|| Error::new(Kind::NotFound, format!("no pod sandbox {id}")))
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers.find(id)?.ok_or_else(|| Error::new(Kind::NotFound, format!("no container {id}")))
    }

    pub(crate) fn handler(&self, name: &str) -> Result<(String, Handler)> {
        let name = if name.is_empty() { &self.config.default_handler } else { name };
        match self.config.handlers.get(name) {
            Some(handler) => Ok((name.to_owned(), handler.clone())),
            None => Err(Error::invalid(format!(
                "no runtime handler {name:?}: the configuration has {:?}",
                self.config.handlers.keys().collect::<Vec<_>>()
            ))),
        }
    }

    pub(crate) fn pod_dir(&self, pod_id: &str) -> PathBuf {
        self.config.state.join("pods").join(pod_id)
    }

    pub(crate) fn bundle(&self, pod_id: &str, container_id: &str) -> PathBuf {
        self.pod_dir(pod_id).join(stasis_shim_api::layout::BUNDLES).join(container_id)
    }

    /// Where the OCI runtime keeps its state.
    pub(crate) fn oci_root(&self) -> PathBuf {
        self.config.state.join("runc")
    }

    pub(crate) fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.containers.all().into_iter().filter(|container| container.pod_id == pod_id).collect()
    }
}

/// Something that runs for a caller, counted until it is dropped: the end of the daemon waits for it.
#[derive(Debug)]
pub struct Operation(Pods);

impl Drop for Operation {
    fn drop(&mut self) {
        self.0.operations.send_modify(|running| *running -= 1);
    }
}

/// Runs a short piece of work with the file system off the asynchronous threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

/// Removes a directory tree if it is there. Nothing may be mounted below it.
pub(crate) async fn remove_tree(path: &Path) -> std::io::Result<()> {
    match tokio::fs::remove_dir_all(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_until_it_is_given_back() {
        let names = Names::default();
        let first = names.reserve("pod", "a".into(), "1").expect("free");
        let error = names.reserve("pod", "a".into(), "2").expect_err("taken");
        assert_eq!(error.kind(), Kind::AlreadyExists);
        assert!(error.to_string().contains("taken by 1"), "{error}");
        drop(first);
        names.reserve("pod", "a".into(), "3").expect("free again").keep();
        assert!(names.reserve("pod", "a".into(), "4").is_err());
        names.release("a", "1");
        assert!(names.reserve("pod", "a".into(), "4").is_err(), "it is not 1 that has it");
        names.release("a", "3");
        assert!(names.reserve("pod", "a".into(), "5").is_ok());
    }

    #[test]
    fn a_prefix_finds_one_object_only() {
        let directory = Directory::default();
        directory.insert("abc1", 1);
        directory.insert("abd2", 2);
        assert_eq!(directory.find("abc").expect("one").as_deref(), Some(&1));
        assert_eq!(directory.find("ab").expect_err("several").kind(), Kind::InvalidArgument);
        assert_eq!(directory.find("").expect("none").as_deref(), None);
    }
}
