//! A container: its bundle, its processes, and what can be done with them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use stasis_cgroup::Cgroup;
use stasis_oci_runtime::{Call, CreateOptions, Launch, Runc};
use stasis_sys::process::signal;

use crate::bundle::{Bundle, RuntimeOptions};
use crate::error::Error;
use crate::io::{Prepared, Stdio};
use crate::journal;
use crate::process::{Event, Exit, Process, State};
use crate::server::Shim;

/// How long a call of the OCI runtime may take: normally a tenth of a second, but hooks of the spec run within it. The
/// kubelet gives up after two minutes.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(110);

/// How long processes may take to be gone after SIGKILL: freeing a large memory takes seconds.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The pause between two looks at who is still there.
const KILL_PAUSE: Duration = Duration::from_millis(2);

/// Longest ID that is taken; containerd's limit.
const ID_MAX: usize = 76;

/// SIGKILL.
pub(crate) const KILL: u32 = 9;

/// A container of this pod.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its ID, which is the task's.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: Bundle,
    /// Options of its OCI runtime.
    pub(crate) options: RuntimeOptions,
    /// Its OCI runtime.
    pub(crate) runc: Runc,
    /// Its first process.
    pub(crate) init: Arc<Process>,
    /// Directory of CRIU's images that its start restores.
    pub(crate) images: Option<PathBuf>,
    execs: Mutex<HashMap<String, Exec>>,
    cgroup: OnceLock<Cgroup>,
    paused: AtomicBool,
    operations: Mutex<Operations>,
    /// Stdio of a container that waits to be restored.
    prepared: Mutex<Option<Prepared>>,
}

#[derive(Clone, Debug)]
struct Exec {
    process: Arc<Process>,
    /// The OCI process, JSON.
    spec: PathBuf,
}

/// Who works on a container. Nobody waits for anybody: who comes second is told so.
#[derive(Debug, Default, PartialEq, Eq)]
enum Operations {
    #[default]
    None,
    /// So many that get along with one another.
    Shared(u32),
    /// One that wants to be alone.
    Exclusive(&'static str),
}

/// The right to work on a container.
#[derive(Debug)]
pub(crate) struct Operation(Arc<Container>);

impl Container {
    /// Makes a container; with images it waits to be restored by its start. On an error nothing is left.
    pub(crate) async fn create(shim: &Arc<Shim>, request: CreateTaskRequest) -> Result<Arc<Container>, Error> {
        check_id(&request.id)?;
        let reserved = shim.reserve(&request.id)?;
        let dir = PathBuf::from(&request.bundle);
        let options = RuntimeOptions::parse(request.options.as_ref(), &shim.namespace)?;
        let stdio =
            Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        let container = Arc::new(Container {
            bundle: Bundle::open(&dir)?,
            runc: options.runc(&dir),
            init: Process::new(format!("container {}", request.id), stdio),
            images: Some(request.checkpoint).filter(|images| !images.is_empty()).map(PathBuf::from),
            id: request.id,
            options,
            execs: Mutex::default(),
            cgroup: OnceLock::new(),
            paused: AtomicBool::new(false),
            operations: Mutex::default(),
            prepared: Mutex::default(),
        });
        container.options.save(&container.bundle.dir)?;
        let prepared = Prepared::open(&container.init.stdio, &container.bundle.dir)?;
        container.bundle.mount_rootfs(&request.rootfs)?;
        let made = match &container.images {
            Some(_) => {
                *lock(&container.prepared) = Some(prepared);
                Ok(())
            }
            None => container.create_init(shim, prepared).await,
        };
        if let Err(error) = made {
            container.discard(shim).await;
            return Err(error);
        }
        reserved.fill(Arc::clone(&container));
        Ok(container)
    }

    async fn create_init(self: &Arc<Self>, shim: &Arc<Shim>, mut prepared: Prepared) -> Result<(), Error> {
        let _expecting = shim.reaper.expect();
        let pid_file = self.bundle.dir.join("init.pid");
        let mut call = self.runc.create(
            &self.id,
            &CreateOptions {
                bundle: &self.bundle.dir,
                launch: Launch { pid_file: &pid_file, console_socket: prepared.console_socket() },
                no_pivot: self.options.no_pivot,
                no_new_keyring: self.options.no_new_keyring,
            },
        );
        prepared.give(call.command());
        shim.reaper.run(call, CALL_LIMIT).await?;
        let pid = read_pid(&pid_file)?;
        self.adopt_init(shim, pid, Event::Created(pid))?;
        self.init.connect(prepared.run().await?);
        Ok(())
    }

    /// Takes over a first process that the OCI runtime has made.
    pub(crate) fn adopt_init(self: &Arc<Self>, shim: &Arc<Shim>, pid: i32, event: Event) -> Result<(), Error> {
        let ended = shim.reaper.watch(pid);
        self.init.apply(event);
        let (container, shim) = (Arc::clone(self), Arc::clone(shim));
        // A process that is gone by now has no cgroup to be found by; nothing is left in it either, unless it shares its
        // PID namespace, and then Delete removes the cgroup.
        match shim.cgroups.of_pid(pid.unsigned_abs()) {
            Ok(cgroup) if shim.is_own_cgroup(&cgroup) => {}
            Ok(cgroup) => drop(self.cgroup.set(cgroup)),
            Err(error) => journal::debug(format_args!("container {}: {error}", self.id)),
        }
        tokio::spawn(async move {
            let clean_up = async {
                // In a PID namespace that the container shares nobody else ends its other processes.
                if let Err(error) = container.kill_cgroup().await {
                    journal::line(format_args!("container {}: {error}", container.id));
                }
            };
            container.init.record_end(ended, clean_up).await;
        });
        Ok(())
    }

    /// Lets the first process go, or restores it.
    pub(crate) async fn start(self: &Arc<Self>, shim: &Arc<Shim>) -> Result<i32, Error> {
        let _operation = self.begin("start")?;
        match self.init.state() {
            State::Waiting => crate::restore::restore(shim, self).await,
            State::Created { pid } => {
                shim.reaper.run_captured(self.runc.start(&self.id), CALL_LIMIT).await?;
                self.init.apply(Event::Started(pid));
                Ok(pid)
            }
            State::Running { .. } => Err(Error::Precondition(format!("container {} is running already", self.id))),
            State::Stopped { .. } => Err(Error::Precondition(format!("container {} has ended", self.id))),
        }
    }

    /// Sends a signal to the first process, or to all.
    pub(crate) fn kill(&self, number: u32, all: bool) -> Result<(), Error> {
        if all {
            let number = i32::try_from(number).map_err(|_| Error::Invalid(format!("{number} is no signal")))?;
            for pid in self.pids()? {
                // Gone meanwhile, which is as good.
                let _ = signal(pid, number);
            }
        } else {
            self.init.kill(number)?;
        }
        if number == KILL && self.paused.swap(false, Ordering::Relaxed) {
            self.existing_cgroup()?.thaw()?;
        }
        Ok(())
    }

    /// Removes a container that does not run, with all that the shim made for it.
    pub(crate) async fn delete(self: &Arc<Self>, shim: &Arc<Shim>) -> Result<(i32, Option<Exit>), Error> {
        let _operation = self.begin("delete")?;
        let state = self.init.state();
        if matches!(state, State::Running { .. }) {
            return Err(Error::Precondition(format!("container {} is running: kill it before the delete", self.id)));
        }
        if !matches!(state, State::Waiting) {
            let force = !matches!(state, State::Stopped { .. });
            self.delete_in_runtime(shim, force).await?;
        }
        let exit = match state {
            State::Stopped { exit, .. } => Some(exit),
            State::Created { .. } => Some(self.init.wait().await),
            State::Waiting | State::Running { .. } => None,
        };
        self.bundle.unmount_rootfs()?;
        self.init.disconnect();
        lock(&self.execs).clear();
        shim.forget(&self.id);
        Ok((state.pid(), exit))
    }

    /// Removes the OCI runtime's state; that there is none is no error.
    pub(crate) async fn delete_in_runtime(&self, shim: &Shim, force: bool) -> Result<(), Error> {
        // A restore that died can leave a bind mount of the root file system in there, which a delete would empty.
        let state = self.runc.root.join(&self.id);
        stasis_sys::mount::unmount_all_below(&state).map_err(Error::io("the OCI runtime's state directory"))?;
        match shim.reaper.run_captured(self.runc.delete(&self.id, force), CALL_LIMIT).await {
            Err(Error::Runtime(error)) if error.is_not_found() => Ok(()),
            done => done.map(drop),
        }
    }

    /// Takes back a container that could not be made.
    async fn discard(&self, shim: &Shim) {
        let undone = async {
            self.delete_in_runtime(shim, true).await?;
            self.bundle.unmount_rootfs()
        };
        if let Err(error) = undone.await {
            journal::line(format_args!("taking back container {}: {error}", self.id));
        }
    }

    /// Prepares a further process.
    pub(crate) fn add_exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        check_id(&request.exec_id)?;
        if !matches!(self.init.state(), State::Running { .. }) {
            return Err(Error::Precondition(format!("container {} is not running: nothing can run in it", self.id)));
        }
        let name = format!("exec {} in container {}", request.exec_id, self.id);
        let mut execs = lock(&self.execs);
        if execs.contains_key(&request.exec_id) {
            return Err(Error::Exists(name));
        }
        let spec = self.bundle.dir.join(format!("exec-{}.json", request.exec_id));
        fs::write(&spec, &request.spec.value).map_err(Error::io(format!("writing {}", spec.display())))?;
        let stdio =
            Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        execs.insert(request.exec_id, Exec { process: Process::new(name, stdio), spec });
        Ok(())
    }

    /// Runs a further process.
    pub(crate) async fn start_exec(self: &Arc<Self>, shim: &Arc<Shim>, exec_id: &str) -> Result<i32, Error> {
        let _operation = self.share()?;
        let exec = self.exec(exec_id)?;
        if exec.process.state() != State::Waiting {
            return Err(Error::Precondition(format!("{} was started before", exec.process.name)));
        }
        let _expecting = shim.reaper.expect();
        let mut prepared = Prepared::open(&exec.process.stdio, &self.bundle.dir)?;
        let pid_file = self.bundle.dir.join(format!("exec-{exec_id}.pid"));
        let launch = Launch { pid_file: &pid_file, console_socket: prepared.console_socket() };
        let mut call = self.runc.exec(&self.id, &exec.spec, &launch);
        prepared.give(call.command());
        let pid = self.run_exec(shim, call, &pid_file).await?;
        let ended = shim.reaper.watch(pid);
        exec.process.apply(Event::Started(pid));
        // Only then may its end be recorded, which waits for its output.
        let connected = prepared.run().await;
        let failed = match connected {
            Ok(streams) => {
                exec.process.connect(streams);
                None
            }
            Err(error) => {
                let _ = exec.process.kill(KILL);
                Some(error)
            }
        };
        let process = Arc::clone(&exec.process);
        tokio::spawn(async move { process.record_end(ended, async {}).await });
        failed.map_or(Ok(pid), Err)
    }

    async fn run_exec(&self, shim: &Shim, call: Call, pid_file: &Path) -> Result<i32, Error> {
        let ran = shim.reaper.run(call, CALL_LIMIT).await;
        let pid = ran.and_then(|_| read_pid(pid_file));
        // Not needed any more, and not there if the runtime failed before it was written.
        let _ = fs::remove_file(pid_file);
        pid
    }

    /// Forgets a further process that does not run.
    pub(crate) fn delete_exec(&self, exec_id: &str) -> Result<(i32, Option<Exit>), Error> {
        let exec = self.exec(exec_id)?;
        let exit = match exec.process.state() {
            State::Stopped { exit, .. } => Some(exit),
            State::Waiting => None,
            State::Created { .. } | State::Running { .. } => {
                return Err(Error::Precondition(format!(
                    "{} is running: kill it before the delete",
                    exec.process.name
                )));
            }
        };
        exec.process.disconnect();
        lock(&self.execs).remove(exec_id);
        // The bundle goes away with the container anyway.
        let _ = fs::remove_file(&exec.spec);
        Ok((exec.process.state().pid(), exit))
    }

    /// The first process for an empty ID, else a further one.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        match exec_id {
            "" => Ok(Arc::clone(&self.init)),
            exec_id => Ok(self.exec(exec_id)?.process),
        }
    }

    fn exec(&self, exec_id: &str) -> Result<Exec, Error> {
        let exec = lock(&self.execs).get(exec_id).cloned();
        exec.ok_or_else(|| Error::NotFound(format!("container {} has no process {exec_id}", self.id)))
    }

    /// All processes.
    pub(crate) fn pids(&self) -> Result<Vec<i32>, Error> {
        match self.cgroup.get() {
            Some(cgroup) => Ok(cgroup.procs()?.into_iter().map(u32::cast_signed).collect()),
            None => Ok(Vec::new()),
        }
    }

    /// Freezes all processes.
    pub(crate) fn pause(self: &Arc<Self>) -> Result<(), Error> {
        let _operation = self.begin("pause")?;
        if !matches!(self.init.state(), State::Running { .. }) {
            return Err(Error::Precondition(format!("container {} is not running", self.id)));
        }
        self.existing_cgroup()?.freeze()?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Thaws them.
    pub(crate) fn resume(self: &Arc<Self>) -> Result<(), Error> {
        let _operation = self.begin("resume")?;
        self.existing_cgroup()?.thaw()?;
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Changes limits; `resources` is `linux.resources` of the OCI spec in JSON.
    pub(crate) async fn update(self: &Arc<Self>, shim: &Shim, resources: &[u8]) -> Result<(), Error> {
        let _operation = self.begin("update")?;
        let path = self.bundle.dir.join("resources.json");
        fs::write(&path, resources).map_err(Error::io(format!("writing {}", path.display())))?;
        shim.reaper.run_captured(self.runc.update(&self.id, &path), CALL_LIMIT).await.map(drop)
    }

    /// The cgroup of a container that has run.
    pub(crate) fn existing_cgroup(&self) -> Result<&Cgroup, Error> {
        let missing = || Error::Precondition(format!("container {} has no cgroup of its own", self.id));
        self.cgroup.get().ok_or_else(missing)
    }

    /// Makes the cgroup known that the OCI runtime is about to make.
    pub(crate) fn expect_cgroup(&self, shim: &Shim) {
        if let Some(cgroup) = self.bundle.cgroup(&shim.cgroups, self.options.systemd_cgroup) {
            // It may be known from an earlier try.
            let _ = self.cgroup.set(cgroup);
        }
    }

    /// Ends everything in the container's cgroup and waits until it is gone. Without a cgroup there is nothing.
    pub(crate) async fn kill_cgroup(&self) -> Result<(), Error> {
        let Some(cgroup) = self.cgroup.get() else { return Ok(()) };
        let end = tokio::time::Instant::now() + KILL_LIMIT;
        loop {
            let alive = cgroup.procs()?;
            let Some(first) = alive.first() else { return Ok(()) };
            if tokio::time::Instant::now() >= end {
                let count = alive.len();
                let message = format!("container {}: {count} processes outlive SIGKILL, the first is {first}", self.id);
                return Err(Error::Deadline(message));
            }
            for pid in alive {
                // Gone meanwhile, which is as good.
                let _ = signal(pid.cast_signed(), KILL.cast_signed());
            }
            if cgroup.is_frozen()? {
                cgroup.thaw()?;
            }
            tokio::time::sleep(KILL_PAUSE).await;
        }
    }

    /// The stdio that a restore is to use.
    pub(crate) fn take_prepared(&self) -> Result<Prepared, Error> {
        match lock(&self.prepared).take() {
            Some(prepared) => Ok(prepared),
            // A restore was tried before and has used it up.
            None => Prepared::open(&self.init.stdio, &self.bundle.dir),
        }
    }

    /// Begins an operation that no other may overlap.
    pub(crate) fn begin(self: &Arc<Self>, name: &'static str) -> Result<Operation, Error> {
        let mut operations = lock(&self.operations);
        match *operations {
            Operations::None => *operations = Operations::Exclusive(name),
            Operations::Shared(_) => return Err(self.busy("the start of a process")),
            Operations::Exclusive(running) => return Err(self.busy(running)),
        }
        Ok(Operation(Arc::clone(self)))
    }

    /// Begins an operation that gets along with others of its kind.
    fn share(self: &Arc<Self>) -> Result<Operation, Error> {
        let mut operations = lock(&self.operations);
        match *operations {
            Operations::None => *operations = Operations::Shared(1),
            Operations::Shared(count) => *operations = Operations::Shared(count + 1),
            Operations::Exclusive(running) => return Err(self.busy(running)),
        }
        Ok(Operation(Arc::clone(self)))
    }

    fn busy(&self, running: &'static str) -> Error {
        Error::Busy { id: self.id.clone(), running }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let mut operations = lock(&self.0.operations);
        *operations = match *operations {
            Operations::Shared(count) if count > 1 => Operations::Shared(count - 1),
            _ => Operations::None,
        };
    }
}

/// The process ID that the OCI runtime wrote.
pub(crate) fn read_pid(path: &Path) -> Result<i32, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("reading {}", path.display())))?;
    let pid = text.trim().parse().ok().filter(|pid| *pid > 0);
    pid.ok_or_else(|| Error::Internal(format!("{}: {text:?} is no process ID", path.display())))
}

/// IDs become parts of file names.
fn check_id(id: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > ID_MAX || !id.bytes().all(plain) || id.starts_with('.') {
        return Err(Error::Invalid(format!(
            "{id:?} is no ID: letters, digits, dots, dashes, underscores, up to {ID_MAX}"
        )));
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
