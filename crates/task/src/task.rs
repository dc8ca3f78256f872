//! Tasks and processes as requests to a shim.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci;
use containerd_shim_protos::types::task::Status as WireStatus;
use protobuf::{Message, MessageField};

use crate::binary::{to_message, to_time};
use crate::bundle::{Bundle, Record};
use crate::connection::{Connection, ExitWatch, Limit};
use crate::{
    Any, CheckpointImages, Error, ExecSpec, Exit, Io, PlatformRuntime, Process, Result, ShimRuntime, State, Status,
    Task,
};

/// What needs no more than a look or a signal.
pub(crate) const QUICK: Limit = Limit::Of(Duration::from_secs(10));

/// What runs the OCI runtime or takes off mounts; the kubelet gives up on us after two minutes.
pub(crate) const SLOW: Limit = Limit::Of(Duration::from_secs(100));

/// What reads or writes a container's memory.
const MEMORY: Limit = Limit::Of(Duration::from_secs(30 * 60));

/// Type of the OCI runtime spec's parts in an `Any`: their JSON.
const SPEC_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1";

/// A task of a shim, as the runtime keeps it.
#[derive(Debug)]
pub(crate) struct ShimTask {
    pub(crate) id: String,
    pub(crate) bundle: Bundle,
    pub(crate) record: Record,
    pub(crate) connection: Arc<Connection>,
    pub(crate) pid: AtomicU32,
    /// Whether its start is a restore.
    pub(crate) restores: AtomicBool,
    pub(crate) exit: ExitWatch,
}

impl ShimTask {
    /// A request about this task.
    pub(crate) async fn call<A: Message>(&self, method: &str, request: &impl Message, limit: Limit) -> Result<A> {
        let answer = self.connection.task(method, request, limit).await;
        answer.map_err(|error| error.context(format_args!("task {}: {method}", self.id)))
    }

    pub(crate) async fn state(&self) -> Result<State> {
        let request = StateRequest { id: self.id.clone(), ..Default::default() };
        let answer: StateResponse = self.call("State", &request, QUICK).await?;
        self.pid.store(answer.pid, Ordering::Relaxed);
        let status = to_status(answer.status.enum_value_or_default());
        let exit = Exit { pid: answer.pid, status: answer.exit_status, timestamp: to_time(&answer.exited_at) };
        Ok(State {
            status,
            pid: answer.pid,
            exit: (status == Status::Stopped).then_some(exit),
            io: Io { stdin: answer.stdin, stdout: answer.stdout, stderr: answer.stderr, terminal: answer.terminal },
            bundle: answer.bundle.into(),
        })
    }

    /// Has the shim forget the ended task, or with an exec ID one of its processes.
    pub(crate) async fn delete(&self, exec_id: &str) -> Result<Exit> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let answer: DeleteResponse = match self.call("Delete", &request, SLOW).await {
            // runc's shim says no more than that it failed, also for the one reason that is the caller's.
            Err(Error::Other(said)) if exec_id.is_empty() && self.runs().await => {
                return Err(Error::FailedPrecondition(said));
            }
            answer => answer?,
        };
        Ok(Exit { pid: answer.pid, status: answer.exit_status, timestamp: to_time(&answer.exited_at) })
    }

    async fn runs(&self) -> bool {
        let state = self.state().await.map(|state| state.status);
        matches!(state, Ok(Status::Running | Status::Paused | Status::Pausing))
    }

    pub(crate) async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let request = KillRequest { id: self.id.clone(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        self.call::<Empty>("Kill", &request, QUICK).await.map(drop)
    }

    async fn start(&self, exec_id: &str, limit: Limit) -> Result<u32> {
        let request = StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.call::<StartResponse>("Start", &request, limit).await?.pid)
    }

    async fn wait(self: &Arc<Self>, exec_id: &str, watch: &ExitWatch, pid: u32) -> Result<Exit> {
        let task = Arc::clone(self);
        let request = WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let ask = || async move {
            let answer: WaitResponse = task.call("Wait", &request, Limit::None).await?;
            Ok(Exit { pid, status: answer.exit_status, timestamp: to_time(&answer.exited_at) })
        };
        watch.wait(ask).await
    }

    /// Waits for the end of the first process.
    pub(crate) async fn wait_for_first(self: &Arc<Self>) -> Result<Exit> {
        let pid = || self.pid.load(Ordering::Relaxed);
        // The pid of a restored task is known only after its start; this is asked once, and possibly before.
        let exit = self.wait("", &self.exit, pid()).await?;
        Ok(Exit { pid: if exit.pid == 0 { pid() } else { exit.pid }, ..exit })
    }

    async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let request =
            ResizePtyRequest { id: self.id.clone(), exec_id: exec_id.into(), width, height, ..Default::default() };
        self.call::<Empty>("ResizePty", &request, QUICK).await.map(drop)
    }

    async fn close_stdin(&self, exec_id: &str) -> Result<()> {
        let request =
            CloseIORequest { id: self.id.clone(), exec_id: exec_id.into(), stdin: true, ..Default::default() };
        self.call::<Empty>("CloseIO", &request, QUICK).await.map(drop)
    }
}

/// What callers hold: the task, and the runtime that knows how to remove it.
#[derive(Debug)]
pub(crate) struct TaskHandle {
    pub(crate) task: Arc<ShimTask>,
    pub(crate) runtime: ShimRuntime,
}

#[async_trait]
impl Task for TaskHandle {
    fn id(&self) -> &str {
        &self.task.id
    }

    fn pid(&self) -> u32 {
        self.task.pid.load(Ordering::Relaxed)
    }

    fn bundle(&self) -> &Path {
        &self.task.bundle.dir
    }

    async fn state(&self) -> Result<State> {
        self.task.state().await
    }

    async fn start(&self) -> Result<u32> {
        let limit = if self.task.restores.load(Ordering::Relaxed) { MEMORY } else { SLOW };
        let pid = self.task.start("", limit).await?;
        self.task.pid.store(pid, Ordering::Relaxed);
        Ok(pid)
    }

    async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        self.task.kill("", signal, all).await
    }

    async fn wait(&self) -> Result<Exit> {
        self.task.wait_for_first().await
    }

    async fn delete(&self) -> Result<Exit> {
        self.runtime.delete(&self.task.id).await
    }

    async fn exec(&self, exec_id: &str, spec: ExecSpec) -> Result<Arc<dyn Process>> {
        crate::bundle::check_id(exec_id)?;
        let process = Any { type_url: format!("{SPEC_URL}/Process"), value: spec.process };
        let request = ExecProcessRequest {
            id: self.task.id.clone(),
            exec_id: exec_id.into(),
            terminal: spec.io.terminal,
            stdin: spec.io.stdin,
            stdout: spec.io.stdout,
            stderr: spec.io.stderr,
            spec: MessageField::some(to_message(&process)),
            ..Default::default()
        };
        self.task.call::<Empty>("Exec", &request, SLOW).await?;
        let task = Arc::clone(&self.task);
        Ok(Arc::new(ProcessHandle { task, id: exec_id.into(), pid: AtomicU32::new(0), exit: ExitWatch::default() }))
    }

    async fn pause(&self) -> Result<()> {
        let request = PauseRequest { id: self.task.id.clone(), ..Default::default() };
        self.task.call::<Empty>("Pause", &request, SLOW).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        let request = ResumeRequest { id: self.task.id.clone(), ..Default::default() };
        self.task.call::<Empty>("Resume", &request, SLOW).await.map(drop)
    }

    async fn pids(&self) -> Result<Vec<u32>> {
        let request = PidsRequest { id: self.task.id.clone(), ..Default::default() };
        let answer: PidsResponse = self.task.call("Pids", &request, QUICK).await?;
        Ok(answer.processes.iter().map(|process| process.pid).collect())
    }

    async fn resize_pty(&self, width: u32, height: u32) -> Result<()> {
        self.task.resize("", width, height).await
    }

    async fn close_stdin(&self) -> Result<()> {
        self.task.close_stdin("").await
    }

    async fn update(&self, resources: &[u8]) -> Result<()> {
        let resources = Any { type_url: format!("{SPEC_URL}/LinuxResources"), value: resources.into() };
        let request = UpdateTaskRequest {
            id: self.task.id.clone(),
            resources: MessageField::some(to_message(&resources)),
            ..Default::default()
        };
        self.task.call::<Empty>("Update", &request, SLOW).await.map(drop)
    }

    async fn checkpoint_images(&self, path: &Path, options: CheckpointImages) -> Result<()> {
        let text = |path: &Path| {
            let text = path.to_str().map(str::to_owned);
            text.ok_or_else(|| Error::InvalidArgument(format!("the path {} is not UTF-8", path.display())))
        };
        let path = text(path)?;
        let options = oci::CheckpointOptions {
            exit: options.exit,
            open_tcp: options.open_tcp,
            external_unix_sockets: options.external_unix_sockets,
            terminal: options.terminal,
            file_locks: options.file_locks,
            image_path: path.clone(),
            work_path: options.work_path.as_deref().map(text).transpose()?.unwrap_or_default(),
            ..Default::default()
        };
        let value = options.write_to_bytes().map_err(|error| Error::InvalidArgument(error.to_string()))?;
        let options = Any { type_url: "containerd.runc.v1.CheckpointOptions".into(), value };
        let request = CheckpointTaskRequest {
            id: self.task.id.clone(),
            path,
            options: MessageField::some(to_message(&options)),
            ..Default::default()
        };
        self.task.call::<Empty>("Checkpoint", &request, MEMORY).await.map(drop)
    }
}

/// A further process of a task.
#[derive(Debug)]
struct ProcessHandle {
    task: Arc<ShimTask>,
    id: String,
    pid: AtomicU32,
    exit: ExitWatch,
}

#[async_trait]
impl Process for ProcessHandle {
    fn id(&self) -> &str {
        &self.id
    }

    fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    async fn start(&self) -> Result<u32> {
        let pid = self.task.start(&self.id, SLOW).await?;
        self.pid.store(pid, Ordering::Relaxed);
        Ok(pid)
    }

    async fn wait(&self) -> Result<Exit> {
        self.task.wait(&self.id, &self.exit, self.pid()).await
    }

    async fn kill(&self, signal: u32) -> Result<()> {
        self.task.kill(&self.id, signal, false).await
    }

    async fn delete(&self) -> Result<Exit> {
        self.task.delete(&self.id).await
    }

    async fn resize_pty(&self, width: u32, height: u32) -> Result<()> {
        self.task.resize(&self.id, width, height).await
    }

    async fn close_stdin(&self) -> Result<()> {
        self.task.close_stdin(&self.id).await
    }
}

fn to_status(status: WireStatus) -> Status {
    match status {
        WireStatus::CREATED => Status::Created,
        WireStatus::RUNNING => Status::Running,
        WireStatus::STOPPED => Status::Stopped,
        WireStatus::PAUSED => Status::Paused,
        WireStatus::PAUSING => Status::Pausing,
        _ => Status::Unknown,
    }
}
