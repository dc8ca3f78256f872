//! The server: what the shim knows of its pod, and the services over it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::{sandbox_async, shim_async};
use stasis_cgroup::{Cgroup, Cgroups};
use stasis_shim_api::{CheckpointProgress, layout};
use stasis_sys::process;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::args::Args;
use crate::container::Container;
use crate::error::Error;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::{checkpoint, extension, journal, sandbox, task};

/// The Task service by containerd 2's name; messages and methods are those of version 2.
const TASK_V3: &str = "containerd.task.v3.Task";
/// The Task service by containerd 1's name.
const TASK_V2: &str = "containerd.task.v2.Task";

/// OOM score adjustment of the shim: it should die after everything else that can. Lower than its own the system may
/// not allow.
const OOM_SCORE_ADJ: &str = "-999";

/// After so many steps of tasks the reactor is asked for news, so that a container that writes without end delays nobody.
const EVENT_INTERVAL: u32 = 16;

/// How long the answer to the request that ends the shim has to get out. It is one write, of a task that can run.
const LINGER: Duration = Duration::from_millis(1);

/// How often a shim that nobody has used yet looks whether its directory is still there.
const UNUSED_CHECK: Duration = Duration::from_millis(100);

/// Everything the shim knows of its pod.
#[derive(Debug)]
pub(crate) struct Shim {
    /// The pod's directory.
    pub(crate) dir: PathBuf,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Who waits for children.
    pub(crate) reaper: Arc<Reaper>,
    /// The cgroup hierarchies.
    pub(crate) cgroups: Cgroups,
    /// The pod's namespaces.
    pub(crate) sandbox: Sandbox,
    own_cgroup: Option<Cgroup>,
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    /// How far checkpoints are, by container.
    progress: Mutex<HashMap<String, CheckpointProgress>>,
    /// Told whenever the making of a container has ended, well or not.
    settled: Notify,
    end: Notify,
}

/// An ID that is taken, by a container that is being made.
#[derive(Debug)]
pub(crate) struct Reserved {
    shim: Arc<Shim>,
    id: String,
}

impl Shim {
    /// How far the checkpoint of a container is; none if there is none.
    pub(crate) fn progress(&self, id: &str) -> Option<CheckpointProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Notes how far the checkpoint of a container is, or that it has ended.
    pub(crate) fn set_progress(&self, id: &str, progress: Option<CheckpointProgress>) {
        let mut all = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Some(progress) => all.insert(id.to_owned(), progress),
            None => all.remove(id),
        };
    }
}

/// Serves on the socket that is standard input until a client ends the shim.
pub(crate) fn serve(args: &Args) -> Result<(), Error> {
    if args.debug {
        journal::enable_debug();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(EVENT_INTERVAL)
        .build()
        .map_err(Error::io("starting the event loop"))?;
    runtime.block_on(run(args))
}

async fn run(args: &Args) -> Result<(), Error> {
    let listener = process::take_stdin().map(StdListener::from).map_err(Error::io("taking over the socket"))?;
    process::become_subreaper().map_err(Error::io("becoming the parent of orphans"))?;
    // Refused without CAP_SYS_RESOURCE; the shim then is as likely a victim as its starter.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        journal::debug(format_args!("the OOM score stays as it is: {error}"));
    }
    let dir = std::env::current_dir().map_err(Error::io("finding the working directory"))?;
    let cgroups = Cgroups::probe()?;
    checkpoint::thaw_marked(&dir, &cgroups).await;
    let shim = Arc::new(Shim {
        dir,
        namespace: args.namespace.clone(),
        reaper: Arc::default(),
        own_cgroup: cgroups.of_pid(std::process::id()).ok(),
        cgroups,
        sandbox: Sandbox::default(),
        containers: Mutex::default(),
        progress: Mutex::default(),
        settled: Notify::new(),
        end: Notify::new(),
    });
    let reaper = tokio::spawn(Arc::clone(&shim.reaper).reap_for_ever());
    tokio::spawn(ignore_termination());
    listener.set_nonblocking(true).map_err(Error::io("listening"))?;
    let listener = UnixListener::from_std(listener).map_err(Error::io("listening"))?;
    let mut server = services(&shim).add_listener(listener.into());
    server.start().await.map_err(|error| Error::Internal(format!("serving: {error}")))?;
    tokio::select! {
        () = shim.end.notified() => tokio::time::sleep(LINGER).await,
        () = abandoned(&shim) => journal::line(format_args!("the pod's directory is gone, and nobody used the shim")),
        failed = reaper => failed.map_err(|error| Error::Internal(error.to_string()))??,
    }
    // Their names are for those who look for a living shim.
    for name in [layout::SOCKET, layout::PID] {
        let _ = fs::remove_file(shim.dir.join(name));
    }
    Ok(())
}

/// Ends when the pod's directory is removed before anybody has used the shim. The daemon may have been killed in the
/// middle of the start, and have cleared away the directory at its next start without having heard of this process.
async fn abandoned(shim: &Shim) {
    loop {
        if shim.sandbox.is_ready() || !shim.containers.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return std::future::pending().await;
        }
        // A removed directory has no names any more.
        if fs::metadata(".").is_ok_and(|facts| std::os::unix::fs::MetadataExt::nlink(&facts) == 0) {
            return;
        }
        tokio::time::sleep(UNUSED_CHECK).await;
    }
}

fn services(shim: &Arc<Shim>) -> ttrpc::r#async::Server {
    let task = || shim_async::create_task(Arc::new(task::Service(Arc::clone(shim))));
    let older = task().remove(TASK_V3).map(|service| (TASK_V2.to_owned(), service));
    ttrpc::r#async::Server::new()
        .register_service(task())
        .register_service(older.into_iter().collect())
        .register_service(sandbox_async::create_sandbox(Arc::new(sandbox::Service(Arc::clone(shim)))))
        .register_service(extension::service(shim))
}

/// The shim ends when its pod is gone and not before: who stops the daemon's service must not stop the pods with it.
async fn ignore_termination() {
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
        let Ok(mut signals) = signal(kind) else { continue };
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                journal::line(format_args!("signal {} is ignored: the pod is alive", kind.as_raw_value()));
            }
        });
    }
}

/// Runs `work` to its end: ttrpc drops what it does for a client that goes away, and half a create is worse than one that
/// nobody asked about.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work).await.map_err(|error| Error::Internal(error.to_string()))?
}

impl Shim {
    /// A container by its ID.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = self.table().get(id).cloned().flatten();
        found.ok_or_else(|| Error::NotFound(format!("container {id} is not in this pod's shim")))
    }

    /// A container by its ID; one that is being made is waited for. A daemon that was killed amid a create and came back
    /// would otherwise hear that there is none, and have one a moment later.
    pub(crate) async fn settled_container(&self, id: &str) -> Result<Arc<Container>, Error> {
        loop {
            let mut settled = std::pin::pin!(self.settled.notified());
            settled.as_mut().enable();
            if !matches!(self.table().get(id), Some(None)) {
                return self.container(id);
            }
            settled.await;
        }
    }

    /// All containers.
    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.table().values().flatten().cloned().collect()
    }

    /// Takes an ID for a container to be made.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Result<Reserved, Error> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(Error::Exists(format!("container {id}")));
        }
        table.insert(id.to_owned(), None);
        Ok(Reserved { shim: Arc::clone(self), id: id.to_owned() })
    }

    /// Forgets a container.
    pub(crate) fn forget(&self, id: &str) {
        self.table().remove(id);
    }

    /// Whether nothing would be lost with the shim.
    pub(crate) fn is_idle(&self) -> bool {
        self.table().is_empty() && !self.sandbox.is_ready()
    }

    /// Ends the shim once the current request is answered.
    pub(crate) fn shut_down(&self) {
        self.end.notify_one();
    }

    /// Whether a cgroup is the shim's own, which a container without one of its own is in.
    pub(crate) fn is_own_cgroup(&self, cgroup: &Cgroup) -> bool {
        self.own_cgroup.as_ref().is_some_and(|own| own.path() == cgroup.path())
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reserved {
    /// Puts the container in its place.
    pub(crate) fn fill(self, container: Arc<Container>) {
        self.shim.table().insert(self.id.clone(), Some(container));
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut table = self.shim.table();
        if matches!(table.get(&self.id), Some(None)) {
            table.remove(&self.id);
        }
        self.shim.settled.notify_waiters();
    }
}
