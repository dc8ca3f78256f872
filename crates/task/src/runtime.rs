//! Tasks through shims: made, found again, removed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, Empty, Mount as MountMessage,
    ShutdownRequest,
};
use protobuf::MessageField;
use stasis_shim_api::SandboxSpec;
use stasis_sys::process::Pidfd;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::binary::to_message;
use crate::bundle::{Bundle, Record, blocking, check_id};
use crate::connection::{Connection, Connections, Endpoint, ExitWatch, Limit};
use crate::task::{QUICK, SLOW, ShimTask, TaskHandle};
use crate::{
    CreateOpts, Error, EventServer, Exit, PlatformRuntime, Result, Sandbox, State, Status, Task, binary, bundle,
    events, sandbox,
};

/// A shim with no task left ends at once; this is for a machine under load.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

const SIGKILL: u32 = 9;

/// How shims are found and started.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the tasks: the pods' directory. See the crate's documentation for what is made in there.
    pub state_dir: PathBuf,
    /// Where to look for the programs of shims, before `PATH`.
    pub shim_dirs: Vec<PathBuf>,
    /// Address of the daemon's socket, told to shims.
    pub address: String,
    /// containerd's namespace, told to shims: `k8s.io`.
    pub namespace: String,
    /// Environment of shims, beside what containerd sets. Of the daemon's own they get the `PATH` alone, unless it is
    /// given here.
    pub env: Vec<(OsString, OsString)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/run/stasis/pods".into(),
            shim_dirs: Vec::new(),
            address: "/run/stasis/stasis.sock".into(),
            namespace: "k8s.io".into(),
            env: Vec::new(),
        }
    }
}

/// The [`PlatformRuntime`] that runs tasks in shims. Cloning gives another handle of the same.
#[derive(Clone, Debug)]
pub struct ShimRuntime(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: Config,
    connections: Connections,
    tasks: Mutex<HashMap<String, Slot>>,
    groups: Mutex<HashMap<PathBuf, Weak<tokio::sync::Mutex<()>>>>,
}

/// An ID in use.
#[derive(Debug)]
enum Slot {
    Creating,
    Task(Arc<ShimTask>),
}

impl ShimRuntime {
    /// A runtime on that configuration. Touches nothing yet; tasks of an earlier daemon are found when they are asked
    /// for.
    pub fn new(config: Config) -> Self {
        Self(Arc::new(Shared {
            config,
            connections: Connections::default(),
            tasks: Mutex::default(),
            groups: Mutex::default(),
        }))
    }

    /// Starts our shim for a pod, in the pod's directory (absolute, 0700, made by the caller), and the sandbox in it.
    /// On an error no shim stays, and the directory is the caller's to remove.
    pub async fn start_sandbox(
        &self,
        pod_id: &str,
        runtime: &str,
        pod_dir: &Path,
        spec: &SandboxSpec,
    ) -> Result<Sandbox> {
        let (this, pod_id, runtime) = (self.clone(), pod_id.to_owned(), runtime.to_owned());
        let (pod_dir, spec) = (pod_dir.to_owned(), spec.clone());
        to_its_end(async move { sandbox::start(&this, &pod_id, &runtime, &pod_dir, &spec).await }).await
    }

    /// Finds the shim of a pod again after a restart of the daemon.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the pod's directory holds no shim's address, [`Error::ShimLost`] if nobody answers there.
    pub async fn connect_sandbox(&self, pod_id: &str, pod_dir: &Path) -> Result<Sandbox> {
        sandbox::connect(self, pod_id, pod_dir).await
    }

    /// Ends the shim of a pod in whatever state it is: shuts it down if it answers, else kills it and has its program's
    /// `delete` clean up after it. That there is none is no error.
    pub async fn clean_sandbox(&self, pod_id: &str, pod_dir: &Path) -> Result<()> {
        let (this, pod_id, pod_dir) = (self.clone(), pod_id.to_owned(), pod_dir.to_owned());
        to_its_end(async move { sandbox::clean(&this, &pod_id, &pod_dir).await }).await
    }

    /// Finds a task of an earlier daemon whose bundle is not in the default place.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the bundle holds no shim's address.
    pub async fn load(&self, task_id: &str, bundle: &Path) -> Result<Arc<dyn Task>> {
        check_id(task_id)?;
        if let Some(task) = self.known(task_id)? {
            return Ok(self.handle(task));
        }
        Ok(self.handle(self.read(task_id, Bundle { dir: bundle.into() }).await?))
    }

    /// Serves what shims tell on their own at `<address>.ttrpc`, until the value is dropped; `out_of_memory` is called
    /// with the task's ID. Everything else that shims tell is dropped: it is known from their answers.
    ///
    /// Without it foreign shims work, but try for seconds to tell each event.
    pub async fn serve_events(&self, out_of_memory: impl Fn(&str) + Send + Sync + 'static) -> Result<EventServer> {
        events::serve(&format!("{}.ttrpc", self.config().address), Box::new(out_of_memory)).await
    }

    pub(crate) fn config(&self) -> &Config {
        &self.0.config
    }

    pub(crate) fn connection(&self, endpoint: Endpoint) -> Arc<Connection> {
        self.0.connections.get(endpoint, &self.config().namespace)
    }

    /// The known tasks of one shim.
    pub(crate) fn tasks_at(&self, connection: &Arc<Connection>) -> Vec<Arc<dyn Task>> {
        let slots = self.slots();
        let tasks = slots.values().filter_map(|slot| match slot {
            Slot::Task(task) if task.connection.endpoint == connection.endpoint => Some(Arc::clone(task)),
            _ => None,
        });
        tasks.map(|task| self.handle(task)).collect()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a foreign shim is started and given a task, and while one is ended with its last task: the tasks of a
    /// pod, whose bundles are beside each other, may share one, and a start must not be answered by one about to end.
    async fn hold_group(&self, bundle: &Path) -> tokio::sync::OwnedMutexGuard<()> {
        let group = {
            let mut groups = self.0.groups.lock().unwrap_or_else(PoisonError::into_inner);
            groups.retain(|_, group| group.strong_count() > 0);
            let key = bundle.parent().unwrap_or(bundle).to_owned();
            let known = groups.get(&key).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let new = Arc::default();
                groups.insert(key, Arc::downgrade(&new));
                new
            })
        };
        group.lock_owned().await
    }

    fn bundle_dir(&self, task_id: &str, opts: &CreateOpts) -> PathBuf {
        let default_dir = || Bundle::default_dir(&self.config().state_dir, opts.sandbox_id.as_deref(), task_id);
        opts.bundle.clone().unwrap_or_else(default_dir)
    }

    fn handle(&self, task: Arc<ShimTask>) -> Arc<dyn Task> {
        Arc::new(TaskHandle { task, runtime: self.clone() })
    }

    fn known(&self, task_id: &str) -> Result<Option<Arc<ShimTask>>> {
        match self.slots().get(task_id) {
            Some(Slot::Task(task)) => Ok(Some(Arc::clone(task))),
            Some(Slot::Creating) => Err(Error::FailedPrecondition(format!("task {task_id} is still being created"))),
            None => Ok(None),
        }
    }

    /// A task by ID, in memory or on disk.
    async fn find(&self, task_id: &str) -> Result<Arc<ShimTask>> {
        check_id(task_id)?;
        if let Some(task) = self.known(task_id)? {
            return Ok(task);
        }
        let (state_dir, id) = (self.config().state_dir.clone(), task_id.to_owned());
        let bundle =
            blocking(move || Ok(Bundle::list(&state_dir)?.into_iter().find(|(found, _)| *found == id))).await?;
        match bundle {
            Some((_, bundle)) => self.read(task_id, bundle).await,
            None => Err(Error::NotFound(format!("there is no task {task_id}"))),
        }
    }

    /// Reads a task of an earlier daemon from its bundle; its shim may be dead.
    async fn read(&self, task_id: &str, bundle: Bundle) -> Result<Arc<ShimTask>> {
        let from = bundle.clone();
        let record = match blocking(move || from.read_record()).await {
            Err(Error::NotFound(_)) => self.finish_record(task_id, &bundle).await?,
            read => read?,
        };
        let task = self.task(task_id, bundle, record, false);
        match task.state().await {
            Err(error @ (Error::ShimLost(_) | Error::NotFound(_))) => debug!(task_id, %error, "task without a shim"),
            other => drop(other?),
        }
        // Somebody else may have read it, too: one of them counts, as it is the one that sees the exit.
        match self.slots().entry(task_id.to_owned()).or_insert_with(|| Slot::Task(Arc::clone(&task))) {
            Slot::Task(known) => Ok(Arc::clone(known)),
            Slot::Creating => Err(Error::FailedPrecondition(format!("task {task_id} is still being created"))),
        }
    }

    /// Completes the record of a task whose creation was cut short before it was said where its shim listens: a pod's
    /// listens where the pod says; else a second start says where the first one's does, or starts one that can be shut
    /// down.
    async fn finish_record(&self, task_id: &str, bundle: &Bundle) -> Result<Record> {
        let dir = bundle.dir.clone();
        let (binary, of_pod) = blocking(move || Ok((bundle::read_binary(&dir)?, bundle::pod_endpoint(&dir)?))).await?;
        let endpoint = match of_pod {
            Some(endpoint) => endpoint,
            None => binary::start(&binary, task_id, &bundle.dir, None, self.config()).await?,
        };
        let bundle = bundle.clone();
        blocking(move || bundle::write_endpoint(&bundle.dir, &endpoint).and_then(|()| bundle.read_record())).await
    }

    fn task(&self, task_id: &str, bundle: Bundle, record: Record, restores: bool) -> Arc<ShimTask> {
        Arc::new(ShimTask {
            id: task_id.into(),
            bundle,
            connection: self.connection(record.endpoint.clone()),
            record,
            pid: AtomicU32::new(0),
            restores: AtomicBool::new(restores),
            exit: ExitWatch::default(),
        })
    }

    async fn create_reserved(&self, task_id: &str, opts: CreateOpts) -> Result<Arc<ShimTask>> {
        check_opts(&opts)?;
        let program = binary::find(&opts.runtime, self.config())?;
        let dir = self.bundle_dir(task_id, &opts);
        let sandbox_id = opts.address.as_ref().map(|_| opts.sandbox_id.clone().unwrap_or_default());
        let (spec, binary, sandbox) = (opts.spec.clone(), program.clone(), sandbox_id.clone());
        let bundle = blocking(move || Bundle::create(dir, &spec, &binary, sandbox.as_deref())).await?;
        let endpoint = match self.endpoint(task_id, &opts, &program, &bundle).await {
            Ok(endpoint) => endpoint,
            Err(error) => {
                self.remove_bundle(&bundle).await;
                return Err(error);
            }
        };
        let record = Record { endpoint, binary: program, sandbox_id };
        let task = self.task(task_id, bundle, record, opts.checkpoint.is_some());
        let created = match self.write_endpoint(&task).await {
            Ok(()) => create_in_shim(&task, &opts).await,
            Err(error) => Err(error),
        };
        match created {
            Ok(()) => Ok(task),
            Err(error) => {
                self.undo_create(&task).await;
                Err(error)
            }
        }
    }

    /// The shim that is to serve: a running one, or a new one.
    async fn endpoint(&self, id: &str, opts: &CreateOpts, program: &Path, bundle: &Bundle) -> Result<Endpoint> {
        match &opts.address {
            Some(address) => Endpoint::new(address, opts.version.unwrap_or(3), "ttrpc"),
            None => binary::start(program, id, &bundle.dir, opts.runtime_options.as_ref(), self.config()).await,
        }
    }

    async fn write_endpoint(&self, task: &Arc<ShimTask>) -> Result<()> {
        let task = Arc::clone(task);
        blocking(move || bundle::write_endpoint(&task.bundle.dir, &task.record.endpoint)).await
    }

    /// Takes back what a failed create did, as far as it goes. The error to tell is the first one.
    async fn undo_create(&self, task: &Arc<ShimTask>) {
        let mut deleted = task.delete("").await;
        if deleted.as_ref().is_err_and(|error| !error.is_not_found() && !error.is_shim_lost()) {
            let _ = task.kill("", SIGKILL, true).await;
            deleted = task.delete("").await;
        }
        if let Err(error) = &deleted
            && !error.is_not_found()
        {
            debug!(task_id = task.id, %error, "the shim does not delete a task that could not be created");
            if error.is_shim_lost() {
                let cleaned = binary::delete(&task.record.binary, &task.id, &task.bundle.dir, self.config()).await;
                let _ = cleaned.inspect_err(|error| warn!(task_id = task.id, %error, "cannot clean up"));
            }
        }
        self.end_own_shim(task).await;
        self.remove_bundle(&task.bundle).await;
    }

    async fn remove_bundle(&self, bundle: &Bundle) {
        let bundle = bundle.clone();
        if let Err(error) = blocking(move || bundle.remove()).await {
            warn!(%error, "a bundle stays behind");
        }
    }

    async fn delete_to_its_end(&self, task_id: &str) -> Result<Exit> {
        let task = self.find(task_id).await?;
        end_if_never_run(&task).await;
        let exit = match task.delete("").await {
            Err(error) if error.is_shim_lost() => {
                warn!(task_id, %error, "cleaning up after a dead shim");
                let cleaned = binary::delete(&task.record.binary, task_id, &task.bundle.dir, self.config()).await?;
                Ok(task.exit.seen().unwrap_or(cleaned))
            }
            // The shim forgot it already: an earlier delete was interrupted after that.
            Err(error) if error.is_not_found() => task.exit.seen().ok_or(error),
            other => Ok(other?),
        };
        let held = self.hold_group(&task.bundle.dir).await;
        self.end_own_shim(&task).await;
        drop(held);
        let bundle = task.bundle.clone();
        blocking(move || bundle.remove()).await?;
        self.slots().remove(task_id);
        exit
    }

    /// Ends the shim of a task that is gone, if it was started for tasks and this was its last one.
    async fn end_own_shim(&self, task: &Arc<ShimTask>) {
        if task.record.sandbox_id.is_some() || self.serves_others(task).await {
            return;
        }
        let request = ConnectRequest { id: task.id.clone(), ..Default::default() };
        let shim: Result<ConnectResponse> = task.call("Connect", &request, QUICK).await;
        let process = shim.ok().and_then(|shim| Pidfd::open(shim.shim_pid.try_into().ok()?).ok());
        let request = ShutdownRequest { id: task.id.clone(), ..Default::default() };
        match task.call::<Empty>("Shutdown", &request, QUICK).await {
            Err(error) if !error.is_shim_lost() => {
                return warn!(task_id = task.id, %error, "the shim does not shut down");
            }
            _ => {}
        }
        if let Some(process) = process
            && !ended(process, SHUTDOWN_LIMIT).await
        {
            let address = &task.record.endpoint.address;
            return warn!(task_id = task.id, address, "the shim still runs after its shutdown");
        }
        remove_socket(task).await;
    }

    async fn serves_others(&self, task: &ShimTask) -> bool {
        let here = |other: &ShimTask| other.id != task.id && other.record.endpoint == task.record.endpoint;
        if self.slots().values().any(|slot| matches!(slot, Slot::Task(other) if here(other))) {
            return true;
        }
        let (state_dir, id, endpoint) =
            (self.config().state_dir.clone(), task.id.clone(), task.record.endpoint.clone());
        let on_disk = blocking(move || {
            let others = Bundle::list(&state_dir)?.into_iter().filter(|(other, _)| *other != id);
            Ok(others.filter_map(|(_, bundle)| bundle.read_record().ok()).any(|record| record.endpoint == endpoint))
        });
        // Rather a shim too many than one too few.
        on_disk.await.unwrap_or(true)
    }
}

#[async_trait]
impl PlatformRuntime for ShimRuntime {
    fn id(&self) -> &str {
        "shim"
    }

    async fn create(&self, task_id: &str, opts: CreateOpts) -> Result<Arc<dyn Task>> {
        check_id(task_id)?;
        {
            let mut slots = self.slots();
            if slots.contains_key(task_id) {
                return Err(Error::AlreadyExists(format!("there is a task {task_id} already")));
            }
            slots.insert(task_id.into(), Slot::Creating);
        }
        let (this, id) = (self.clone(), task_id.to_owned());
        to_its_end(async move {
            let _held = match opts.address {
                Some(_) => None,
                None => Some(this.hold_group(&this.bundle_dir(&id, &opts)).await),
            };
            let created = this.create_reserved(&id, opts).await;
            let mut slots = this.slots();
            match created {
                Ok(task) => {
                    slots.insert(id, Slot::Task(Arc::clone(&task)));
                    Ok(this.handle(task))
                }
                Err(error) => {
                    slots.remove(&id);
                    Err(error.context(format_args!("creating task {id}")))
                }
            }
        })
        .await
    }

    async fn get(&self, task_id: &str) -> Result<Arc<dyn Task>> {
        Ok(self.handle(self.find(task_id).await?))
    }

    async fn tasks(&self, all: bool) -> Result<Vec<Arc<dyn Task>>> {
        if all {
            let state_dir = self.config().state_dir.clone();
            // Side by side: one shim that hangs must not hold up the rest.
            let mut reading = JoinSet::new();
            for (id, bundle) in blocking(move || Bundle::list(&state_dir)).await? {
                let this = self.clone();
                if !self.slots().contains_key(&id) {
                    reading.spawn(async move { (this.read(&id, bundle).await, id) });
                }
            }
            while let Some(read) = reading.join_next().await {
                if let Ok((Err(error), id)) = read {
                    warn!(id, %error, "a task of an earlier daemon cannot be read");
                }
            }
        }
        let slots = self.slots();
        let tasks = slots.values().filter_map(|slot| match slot {
            Slot::Task(task) => Some(Arc::clone(task)),
            Slot::Creating => None,
        });
        Ok(tasks.map(|task| self.handle(task)).collect())
    }

    async fn delete(&self, task_id: &str) -> Result<Exit> {
        let (this, id) = (self.clone(), task_id.to_owned());
        to_its_end(async move { this.delete_to_its_end(&id).await }).await
    }
}

fn check_opts(opts: &CreateOpts) -> Result<()> {
    let refuse = |what: String| Err(Error::InvalidArgument(what));
    if opts.spec.is_empty() {
        return refuse("a task needs an OCI spec".into());
    }
    if let Some(bundle) = opts.bundle.as_ref().filter(|bundle| !bundle.is_absolute()) {
        return refuse(format!("the bundle {} must be an absolute path", bundle.display()));
    }
    match &opts.checkpoint {
        Some(dir) if !dir.is_absolute() || dir.to_str().is_none() => {
            refuse(format!("the checkpoint {} must be an absolute path in UTF-8", dir.display()))
        }
        None if opts.restore_from_path => refuse("a restore from a path needs the path of a checkpoint".into()),
        _ => Ok(()),
    }
}

async fn create_in_shim(task: &ShimTask, opts: &CreateOpts) -> Result<()> {
    let mount = |mount: &stasis_sys::mount::Mount| MountMessage {
        type_: mount.fs_type.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
        ..Default::default()
    };
    let Some(bundle) = task.bundle.dir.to_str() else {
        return Err(Error::InvalidArgument(format!("the bundle {} is not UTF-8", task.bundle.dir.display())));
    };
    // As containerd: a shim that knows no options of a task's own gets the runtime's.
    let options = opts.task_options.as_ref().or(opts.runtime_options.as_ref());
    let request = CreateTaskRequest {
        id: task.id.clone(),
        bundle: bundle.into(),
        rootfs: opts.rootfs.iter().map(mount).collect(),
        terminal: opts.io.terminal,
        stdin: opts.io.stdin.clone(),
        stdout: opts.io.stdout.clone(),
        stderr: opts.io.stderr.clone(),
        checkpoint: opts.checkpoint.as_deref().and_then(Path::to_str).unwrap_or_default().into(),
        options: options.map(to_message).map_or_else(MessageField::none, MessageField::some),
        ..Default::default()
    };
    let answer: CreateTaskResponse = task.connection.task("Create", &request, SLOW).await?;
    task.pid.store(answer.pid, Ordering::Relaxed);
    Ok(())
}

/// The first process of a task that was made and not started is there already, waiting. runc's shim deletes it only
/// after having waited for its streams in vain, so it is ended first. What fails here the deletion will tell.
async fn end_if_never_run(task: &Arc<ShimTask>) {
    if task.exit.seen().is_none()
        && let Ok(State { status: Status::Created, .. }) = task.state().await
        && task.kill("", SIGKILL, false).await.is_ok()
    {
        let _ = timeout(SHUTDOWN_LIMIT, task.wait_for_first()).await;
    }
}

/// A dead shim cannot remove its socket, and runc's of containerd 2.0 to 2.2 forgets it. Only a socket is removed,
/// whatever the address says.
async fn remove_socket(task: &ShimTask) {
    let path = PathBuf::from(task.record.endpoint.address.trim_start_matches("unix://"));
    let removed = blocking(move || {
        use std::os::unix::fs::FileTypeExt as _;
        let is_socket = path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket());
        if is_socket { std::fs::remove_file(&path) } else { Ok(()) }
            .map_err(|error| Error::io("cannot remove the socket", path.display(), error))
    });
    let _ = removed.await.inspect_err(|error| warn!(task_id = task.id, %error, "a socket stays behind"));
}

/// Runs work that must not stop halfway when its caller gives up.
pub(crate) async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Other(format!("the work ended early: {error}"))),
    }
}

/// Waits for the end of a process that is not our child.
pub(crate) async fn ended(process: Pidfd, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec { tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
    let waited = blocking(move || {
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).map_err(|error| Error::Io(error.to_string()))
    });
    waited.await.is_ok_and(|ready| ready > 0)
}

/// Limit of a request that the Sandbox service answers once it has done its work.
pub(crate) const SANDBOX_LIMIT: Limit = SLOW;
