//! The pod's side of our shim: Sandbox API v1, and the service that only our shim has.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use protobuf::{Message, MessageField};
use rustix::process::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_shim_api::{
    AttachRequest, CheckpointProgress, CheckpointReport, CheckpointRequest, METHOD_ATTACH, METHOD_CHECKPOINT,
    METHOD_PROGRESS, METHOD_REOPEN_LOG, ProgressRequest, ReopenLogRequest, SANDBOX_SPEC_URL, SERVICE, SandboxSpec,
    ShimError, layout,
};
use stasis_sys::process::Pidfd;
use tracing::warn;

use crate::binary::{to_message, to_time};
use crate::bundle::{self, blocking, check_id};
use crate::connection::{Connection, Endpoint, ExitWatch, Limit};
use crate::runtime::{SANDBOX_LIMIT, ended, to_its_end};
use crate::task::QUICK;
use crate::{Any, Error, Exit, Result, ShimRuntime, Task, binary};

/// After its answer a shim has nothing left to do but to end.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// Beyond the time for which a container may be frozen, a checkpoint compresses, hashes and syncs its archive.
const CHECKPOINT_FINISH: Duration = Duration::from_secs(30 * 60);

/// Version of the Task API that our shim speaks.
const TASK_VERSION: u32 = 3;

/// Digits of a process ID and a newline.
const PID_FILE_MAX: u64 = 32;

/// A pod in its shim. Cloning gives another handle of the same.
#[derive(Clone, Debug)]
pub struct Sandbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: String,
    dir: PathBuf,
    pid: u32,
    connection: Arc<Connection>,
    exit: ExitWatch,
    runtime: ShimRuntime,
}

/// See [`ShimRuntime::start_sandbox`].
pub(crate) async fn start(
    runtime: &ShimRuntime,
    pod_id: &str,
    runtime_name: &str,
    pod_dir: &Path,
    spec: &SandboxSpec,
) -> Result<Sandbox> {
    check_id(pod_id)?;
    let Some(bundle_path) = pod_dir.to_str().filter(|_| pod_dir.is_absolute()) else {
        let dir = pod_dir.display();
        return Err(Error::InvalidArgument(format!("the pod's directory {dir} must be an absolute path in UTF-8")));
    };
    match connect(runtime, pod_id, pod_dir).await {
        Ok(_) => return Err(Error::AlreadyExists(format!("the shim of pod {pod_id} runs already"))),
        Err(Error::NotFound(_) | Error::ShimLost(_)) => {}
        Err(error) => return Err(error),
    }
    let program = binary::find(runtime_name, runtime.config())?;
    let (dir, shim) = (pod_dir.to_owned(), program.clone());
    blocking(move || bundle::write_binary(&dir, &shim)).await?;
    let endpoint = binary::start(&program, pod_id, pod_dir, None, runtime.config()).await?;
    let (dir, at) = (pod_dir.to_owned(), endpoint.clone());
    let recorded = blocking(move || bundle::write_endpoint(&dir, &at)).await;
    let sandbox = Sandbox::new(runtime, pod_id, pod_dir, endpoint).await;
    let begun = match recorded {
        Ok(()) => sandbox.begin(bundle_path, spec).await,
        Err(error) => Err(error),
    };
    match begun {
        Ok(()) => Ok(sandbox),
        Err(error) => {
            let ended = sandbox.shutdown().await;
            let _ = ended.inspect_err(|error| warn!(pod_id, %error, "a shim that failed does not shut down"));
            Err(error.context(format_args!("starting the sandbox of pod {pod_id}")))
        }
    }
}

/// See [`ShimRuntime::connect_sandbox`].
pub(crate) async fn connect(runtime: &ShimRuntime, pod_id: &str, pod_dir: &Path) -> Result<Sandbox> {
    check_id(pod_id)?;
    let dir = pod_dir.to_owned();
    let endpoint = blocking(move || bundle::read_endpoint(&dir)).await?;
    reach(runtime, pod_id, pod_dir, endpoint).await
}

/// The shim of a pod whose start was cut short before its address was recorded: it listens where ours always does.
async fn connect_unrecorded(runtime: &ShimRuntime, pod_id: &str, pod_dir: &Path) -> Result<Sandbox> {
    let socket = format!("unix://{}", pod_dir.join(layout::SOCKET).display());
    reach(runtime, pod_id, pod_dir, Endpoint::new(&socket, TASK_VERSION, "ttrpc")?).await
}

async fn reach(runtime: &ShimRuntime, pod_id: &str, pod_dir: &Path, endpoint: Endpoint) -> Result<Sandbox> {
    let sandbox = Sandbox::new(runtime, pod_id, pod_dir, endpoint).await;
    sandbox.ping().await?;
    Ok(sandbox)
}

/// See [`ShimRuntime::clean_sandbox`].
pub(crate) async fn clean(runtime: &ShimRuntime, pod_id: &str, pod_dir: &Path) -> Result<()> {
    let found = match connect(runtime, pod_id, pod_dir).await {
        Err(Error::NotFound(_)) => connect_unrecorded(runtime, pod_id, pod_dir).await,
        found => found,
    };
    match found {
        Ok(sandbox) => sandbox.shutdown_to_its_end().await,
        // Dead, stuck, or without an address: its start was cut short, or there never was one.
        Err(Error::ShimLost(_) | Error::DeadlineExceeded(_) | Error::NotFound(_)) => {
            clean_dead(runtime, pod_id, pod_dir).await
        }
        Err(error) => Err(error),
    }
}

async fn clean_dead(runtime: &ShimRuntime, pod_id: &str, pod_dir: &Path) -> Result<()> {
    let dir = pod_dir.to_owned();
    let program = match blocking(move || bundle::read_binary(&dir)).await {
        Err(Error::NotFound(_)) => return Ok(()),
        read => read?,
    };
    kill_unreachable(pod_id, read_pid(pod_dir).await).await?;
    binary::delete(&program, pod_id, pod_dir, runtime.config()).await?;
    let dir = pod_dir.to_owned();
    blocking(move || bundle::remove_shim(&dir)).await
}

/// Ends a shim that runs but does not listen, or nowhere that is known. The process must be the pod's by its arguments,
/// as its number may be somebody else's by now.
async fn kill_unreachable(pod_id: &str, pid: u32) -> Result<()> {
    let id = pod_id.to_owned();
    let process = blocking(move || {
        let process = i32::try_from(pid).ok().filter(|pid| *pid > 0).and_then(|pid| Pidfd::open(pid).ok());
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        Ok(process.filter(|_| arguments.split(|byte| *byte == 0).any(|argument| argument == id.as_bytes())))
    });
    let Some(process) = process.await? else { return Ok(()) };
    warn!(pod_id, pid, "killing a shim that does not answer");
    // It may end by itself meanwhile, which is as good.
    let _ = process.signal(Signal::KILL);
    if ended(process, SHUTDOWN_LIMIT).await {
        return Ok(());
    }
    Err(Error::DeadlineExceeded(format!("pod {pod_id}: the shim, process {pid}, outlives SIGKILL")))
}

async fn read_pid(pod_dir: &Path) -> u32 {
    let pid_file = pod_dir.join(layout::PID);
    let pid = blocking(move || {
        let text = stasis_sys::path::read_limited(&pid_file, PID_FILE_MAX).unwrap_or_default();
        Ok(String::from_utf8_lossy(&text).trim().parse().unwrap_or(0))
    });
    pid.await.unwrap_or(0)
}

impl Sandbox {
    async fn new(runtime: &ShimRuntime, id: &str, dir: &Path, endpoint: Endpoint) -> Self {
        let pid = read_pid(dir).await;
        let connection = runtime.connection(endpoint);
        let (id, dir, runtime) = (id.to_owned(), dir.to_owned(), runtime.clone());
        Self(Arc::new(Inner { id, dir, pid, connection, exit: ExitWatch::default(), runtime }))
    }

    async fn begin(&self, bundle_path: &str, spec: &SandboxSpec) -> Result<()> {
        let value = serde_json::to_vec(spec).map_err(|error| Error::InvalidArgument(error.to_string()))?;
        let options = Any { type_url: SANDBOX_SPEC_URL.into(), value };
        let request = CreateSandboxRequest {
            sandbox_id: self.0.id.clone(),
            bundle_path: bundle_path.into(),
            options: MessageField::some(to_message(&options)),
            ..Default::default()
        };
        self.call::<CreateSandboxResponse>("CreateSandbox", &request, SANDBOX_LIMIT).await?;
        let request = StartSandboxRequest { sandbox_id: self.0.id.clone(), ..Default::default() };
        self.call::<StartSandboxResponse>("StartSandbox", &request, SANDBOX_LIMIT).await.map(drop)
    }

    async fn call<A: Message>(&self, method: &str, request: &impl Message, limit: Limit) -> Result<A> {
        let answer = self.0.connection.sandbox(method, request, limit).await;
        answer.map_err(|error| error.context(format_args!("pod {}: {method}", self.0.id)))
    }

    /// The pod's ID.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Directory of the pod.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Address of the shim, for [`CreateOpts::address`](crate::CreateOpts::address).
    pub fn address(&self) -> &str {
        &self.0.connection.endpoint.address
    }

    /// Version of its Task API, for [`CreateOpts::version`](crate::CreateOpts::version).
    pub fn version(&self) -> u32 {
        self.0.connection.endpoint.version
    }

    /// Process ID of the shim; 0 if it wrote none.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// Whether the shim answers.
    pub async fn ping(&self) -> Result<()> {
        let request = PingRequest { sandbox_id: self.0.id.clone(), ..Default::default() };
        self.call::<PingResponse>("PingSandbox", &request, QUICK).await.map(drop)
    }

    /// Ends the pod's processes and lets go of its namespaces; the shim goes on answering.
    pub async fn stop(&self) -> Result<()> {
        let request = StopSandboxRequest { sandbox_id: self.0.id.clone(), ..Default::default() };
        self.call::<StopSandboxResponse>("StopSandbox", &request, SANDBOX_LIMIT).await.map(drop)
    }

    /// Ends the shim itself and waits until it is gone. After a shim that is dead already, its program cleans up.
    pub async fn shutdown(&self) -> Result<()> {
        let this = self.clone();
        to_its_end(async move { this.shutdown_to_its_end().await }).await
    }

    async fn shutdown_to_its_end(&self) -> Result<()> {
        // Opened before the request, while its answer can still prove that the number is the shim's.
        let process = self.process();
        let request = ShutdownSandboxRequest { sandbox_id: self.0.id.clone(), ..Default::default() };
        match self.call::<ShutdownSandboxResponse>("ShutdownSandbox", &request, SANDBOX_LIMIT).await {
            Ok(_) => {}
            Err(error) if error.is_shim_lost() => {
                return clean_dead(&self.0.runtime, &self.0.id, &self.0.dir).await;
            }
            Err(error) => return Err(error),
        }
        if let Some(process) = process
            && !ended(process, SHUTDOWN_LIMIT).await
        {
            let (pid, seconds) = (self.0.pid, SHUTDOWN_LIMIT.as_secs());
            return Err(Error::DeadlineExceeded(format!(
                "pod {}: the shim, process {pid}, still runs {seconds} s after its shutdown",
                self.0.id
            )));
        }
        let dir = self.0.dir.clone();
        blocking(move || bundle::remove_shim(&dir)).await
    }

    fn process(&self) -> Option<Pidfd> {
        i32::try_from(self.0.pid).ok().filter(|pid| *pid > 0).and_then(|pid| Pidfd::open(pid).ok())
    }

    /// Waits, without limit, for the end of the sandbox. Any number of callers; each may be dropped.
    ///
    /// # Errors
    /// [`Error::ShimLost`] when the connection to the shim ends before that.
    pub async fn wait(&self) -> Result<Exit> {
        let this = self.clone();
        let request = WaitSandboxRequest { sandbox_id: self.0.id.clone(), ..Default::default() };
        let ask = || async move {
            let answer: WaitSandboxResponse = this.call("WaitSandbox", &request, Limit::None).await?;
            Ok(Exit { pid: this.0.pid, status: answer.exit_status, timestamp: to_time(&answer.exited_at) })
        };
        self.0.exit.wait(ask).await
    }

    /// Writes a checkpoint archive of one container.
    ///
    /// # Errors
    /// What the shim refused or failed is [`Error::Shim`].
    pub async fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointReport> {
        let limit = Duration::from_millis(request.timeout_ms).saturating_add(CHECKPOINT_FINISH);
        self.call_own(METHOD_CHECKPOINT, request, Limit::Of(limit)).await
    }

    /// How far the checkpoint of a container is; none if there is none.
    ///
    /// # Errors
    /// If the shim is lost.
    pub async fn checkpoint_progress(&self, task_id: &str) -> Result<Option<CheckpointProgress>> {
        self.call_own(METHOD_PROGRESS, &ProgressRequest { id: task_id.into() }, QUICK).await
    }

    /// Begins the log file of a container anew under the same path, after a rotation.
    pub async fn reopen_log(&self, task_id: &str) -> Result<()> {
        let request = ReopenLogRequest { id: task_id.into() };
        self.call_own::<serde_json::Value>(METHOD_REOPEN_LOG, &request, QUICK).await.map(drop)
    }

    /// Attaches the FIFOs of a client to a container.
    ///
    /// # Errors
    /// What the shim refused or failed is [`Error::Shim`].
    pub async fn attach(&self, request: &AttachRequest) -> Result<()> {
        self.call_own::<serde_json::Value>(METHOD_ATTACH, request, QUICK).await.map(drop)
    }

    /// The tasks of this pod that this daemon made or has read.
    pub fn tasks(&self) -> Vec<Arc<dyn Task>> {
        self.0.runtime.tasks_at(&self.0.connection)
    }

    /// A request to the service of our own, JSON in and out.
    async fn call_own<A: DeserializeOwned>(&self, method: &str, request: &impl Serialize, limit: Limit) -> Result<A> {
        let tried = format!("pod {}: {method}", self.0.id);
        let payload =
            serde_json::to_vec(request).map_err(|error| Error::InvalidArgument(format!("{tried}: {error}")))?;
        let answer = self.0.connection.call_raw(SERVICE, method, payload, limit).await;
        let answer = answer.map_err(|error| own_error(error).context(&tried))?;
        serde_json::from_slice(&answer)
            .map_err(|error| Error::Other(format!("{tried}: the shim's answer cannot be understood: {error}")))
    }
}

/// The status of our own service carries a [`ShimError`] as its message, whatever its code.
fn own_error(error: Error) -> Error {
    if error.is_shim_lost() {
        return error;
    }
    match serde_json::from_str::<ShimError>(&error.to_string()) {
        Ok(said) => Error::Shim(said),
        Err(_) => error,
    }
}

#[cfg(test)]
mod tests {
    use stasis_shim_api::Reason;

    use super::*;

    #[test]
    fn the_shims_own_errors_keep_their_reason() {
        let said = ShimError { reason: Reason::Busy, message: "another checkpoint runs".into() };
        let status = Error::Unavailable(serde_json::to_string(&said).unwrap());
        assert!(matches!(own_error(status), Error::Shim(error) if error == said));
        assert!(matches!(own_error(Error::Unimplemented("no such method".into())), Error::Unimplemented(_)));
    }
}
