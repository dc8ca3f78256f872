//! The pod's part of the shim: its namespaces and its `/dev/shm`, over containerd's Sandbox API v1.
//!
//! Namespaces are pinned by bind mounts in the pod's directory and need no process. Only a shared PID namespace has one,
//! the built-in init; with it all processes of that namespace end.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::*;
use containerd_shim_protos::sandbox_async;
use stasis_shim_api::{NamespaceSource, SANDBOX_SPEC_URL, SandboxSpec, layout};
use stasis_sys::namespace::{self, Kind, NewNamespaces};
use stasis_sys::{mount, process};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::error::Error;
use crate::journal;
use crate::process::State;
use crate::server::{Shim, detached};

/// The kinds of namespaces that a pod can have pinned.
pub(crate) const ALL_KINDS: [Kind; 4] = [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Pid];

/// What containerd calls a sandbox that can take containers.
const READY: &str = "SANDBOX_READY";
/// What containerd calls any other.
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// How long the pod's init may take to be gone after SIGKILL; it waits for all processes of its namespace.
const INIT_LIMIT: Duration = Duration::from_secs(10);

/// How long the end of a container may take to be recorded once its processes are gone: its output is drained meanwhile.
const CONTAINER_LIMIT: Duration = Duration::from_secs(15);

/// Where the sandbox is in its life.
#[derive(Clone, Debug, Default)]
enum Phase {
    /// The shim serves no sandbox, or none yet.
    #[default]
    None,
    /// What is wanted is known.
    Created(Pod),
    /// Namespaces and mounts are there.
    Ready { pod: Pod, since: SystemTime, init: Option<i32> },
    /// Nothing is there any more.
    Stopped { pod: Pod, since: Option<SystemTime>, at: SystemTime },
}

/// A pod as its CreateSandbox described it.
#[derive(Clone, Debug)]
struct Pod {
    id: String,
    dir: PathBuf,
    /// None for a sandbox of containerd, which brings its namespaces itself.
    spec: Option<Arc<SandboxSpec>>,
}

impl Pod {
    /// The kinds of namespaces that are not the daemon's to let go of.
    fn own_kinds(&self) -> Vec<Kind> {
        let is_daemons = |kind: &Kind| {
            let source = self.spec.as_ref().map(|spec| match kind {
                Kind::Net => spec.network,
                Kind::Ipc => spec.ipc,
                Kind::Uts => spec.uts,
                Kind::Pid => spec.pid,
            });
            source == Some(NamespaceSource::Pinned)
        };
        ALL_KINDS.into_iter().filter(|kind| !is_daemons(kind)).collect()
    }
}

/// The sandbox of this shim.
#[derive(Debug, Default)]
pub(crate) struct Sandbox {
    phase: Mutex<Phase>,
    /// When it stopped.
    stopped: watch::Sender<Option<SystemTime>>,
}

impl Sandbox {
    /// Whether the shim is needed without any container.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(*self.phase(), Phase::Ready { .. })
    }

    /// CRIU sets the host name of the dump in the UTS namespace that a restored container joins; sets the pod's again.
    pub(crate) fn restore_hostname(&self, uts: &Path) -> Result<(), Error> {
        let hostname = match &*self.phase() {
            Phase::Ready { pod, .. } if pod.dir.join(layout::NAMESPACES).join("uts") == uts => {
                pod.spec.as_ref().and_then(|spec| spec.hostname.clone())
            }
            _ => None,
        };
        match hostname {
            Some(hostname) => {
                namespace::set_hostname(uts, &hostname).map_err(Error::io("restoring the pod's host name"))
            }
            None => Ok(()),
        }
    }

    fn create(&self, request: CreateSandboxRequest, default_dir: &Path) -> Result<(), Error> {
        let spec = match request.options.as_ref() {
            Some(options) if options.type_url == SANDBOX_SPEC_URL => {
                let spec: SandboxSpec = serde_json::from_slice(&options.value)
                    .map_err(|error| Error::Invalid(format!("the sandbox specification cannot be read: {error}")))?;
                check_sysctls(&spec)?;
                Some(Arc::new(spec))
            }
            _ => None,
        };
        let dir =
            Some(request.bundle_path).filter(|dir| !dir.is_empty()).map_or(default_dir.to_path_buf(), PathBuf::from);
        if !dir.is_absolute() {
            return Err(Error::Invalid(format!("the pod's directory {} is not absolute", dir.display())));
        }
        let mut phase = self.phase();
        match *phase {
            Phase::None => *phase = Phase::Created(Pod { id: request.sandbox_id, dir, spec }),
            _ => return Err(Error::Exists("the sandbox of this shim".to_owned())),
        }
        Ok(())
    }

    async fn start(&self, shim: &Arc<Shim>) -> Result<SystemTime, Error> {
        let pod = match &*self.phase() {
            Phase::Created(pod) => pod.clone(),
            Phase::None => return Err(Error::Precondition("there is no sandbox to start: create it first".to_owned())),
            _ => return Err(Error::Precondition("the sandbox was started before".to_owned())),
        };
        let init = match pod.spec.as_deref() {
            Some(spec) => set_up(&pod.dir, spec).inspect_err(|_| {
                // What failed is reported; the rest goes as far as it can.
                let _ = take_down(&pod.dir, &pod.own_kinds());
            })?,
            None => None,
        };
        let since = SystemTime::now();
        *self.phase() = Phase::Ready { pod, since, init };
        if let Some(init) = init {
            let (shim, ended) = (Arc::clone(shim), shim.reaper.watch(init));
            tokio::spawn(async move {
                if ended.await.is_ok() {
                    shim.sandbox.record_stop();
                }
            });
        }
        Ok(since)
    }

    /// Ends all processes of the pod, then its namespaces and mounts. What is gone already is no error.
    async fn stop(&self, shim: &Arc<Shim>) -> Result<(), Error> {
        for container in shim.containers() {
            let state = container.init.state();
            if matches!(state, State::Running { .. } | State::Created { .. }) {
                container.kill_cgroup().await?;
                let ended = tokio::time::timeout(CONTAINER_LIMIT, container.init.wait()).await;
                ended.map_err(|_| Error::Deadline(format!("container {} did not end", container.id)))?;
            }
        }
        let (pod, init) = match &*self.phase() {
            Phase::Ready { pod, init, .. } => (pod.clone(), *init),
            Phase::Stopped { pod, .. } => (pod.clone(), None),
            Phase::None | Phase::Created(_) => return Ok(()),
        };
        if let Some(init) = init {
            // If it has ended and was reaped, its phase is Stopped.
            process::signal(init, 9).map_err(Error::io("ending the pod's init"))?;
            let stopped = tokio::time::timeout(INIT_LIMIT, self.wait()).await;
            stopped.map_err(|_| Error::Deadline("the pod's init did not end".to_owned()))?;
        }
        take_down(&pod.dir, &pod.own_kinds())?;
        self.record_stop();
        Ok(())
    }

    async fn wait(&self) -> SystemTime {
        let mut stopped = self.stopped.subscribe();
        loop {
            if let Some(at) = *stopped.borrow_and_update() {
                return at;
            }
            if stopped.changed().await.is_err() {
                // The sender is a field of self.
                std::future::pending::<()>().await;
            }
        }
    }

    fn record_stop(&self) {
        let mut phase = self.phase();
        if let Phase::Ready { pod, since, .. } = &*phase {
            let at = SystemTime::now();
            *phase = Phase::Stopped { pod: pod.clone(), since: Some(*since), at };
            self.stopped.send_replace(Some(at));
        }
    }

    fn status(&self) -> Result<SandboxStatusResponse, Error> {
        let mut response = SandboxStatusResponse { pid: std::process::id(), ..Default::default() };
        let mut info = HashMap::from([("shim_pid".to_owned(), std::process::id().to_string())]);
        let (pod, state, since, at) = match &*self.phase() {
            Phase::None => return Err(Error::NotFound("this shim has no sandbox".to_owned())),
            Phase::Created(pod) => (pod.clone(), NOT_READY, None, None),
            Phase::Ready { pod, since, init } => {
                info.extend(init.map(|pid| ("init_pid".to_owned(), pid.to_string())));
                (pod.clone(), READY, Some(*since), None)
            }
            Phase::Stopped { pod, since, at } => (pod.clone(), NOT_READY, *since, Some(*at)),
        };
        response.sandbox_id = pod.id;
        response.state = state.to_owned();
        response.info = info;
        response.created_at = since.map(Into::into).into();
        response.exited_at = at.map(Into::into).into();
        Ok(response)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes namespaces, `/dev/shm` and the init of a pod; returns the init's process ID.
fn set_up(dir: &Path, spec: &SandboxSpec) -> Result<Option<i32>, Error> {
    let namespaces = dir.join(layout::NAMESPACES);
    let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(&namespaces);
    made.map_err(Error::io(format!("creating {}", namespaces.display())))?;
    let wanted = [(Kind::Net, spec.network), (Kind::Ipc, spec.ipc), (Kind::Uts, spec.uts)];
    let is_new = |(kind, source): &(Kind, NamespaceSource)| (*source == NamespaceSource::New).then_some(*kind);
    let kinds: Vec<Kind> = wanted.iter().filter_map(is_new).collect();
    let sysctls: Vec<(&str, &str)> = spec.sysctls.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    if !kinds.is_empty() {
        let hostname = spec.hostname.as_deref().filter(|_| spec.uts == NamespaceSource::New);
        namespace::pin_new(&namespaces, &NewNamespaces { kinds: &kinds, hostname, sysctls: &sysctls })
            .map_err(Error::io("the pod's namespaces"))?;
    }
    if spec.ipc == NamespaceSource::New {
        let shm = dir.join(layout::SHM);
        let made = fs::DirBuilder::new().recursive(true).create(&shm);
        made.and_then(|()| mount::tmpfs(&shm, spec.shm_size_bytes, 0o1777, &["noexec"]))
            .map_err(Error::io("the pod's /dev/shm"))?;
    }
    match spec.pid {
        NamespaceSource::New => Ok(Some(namespace::pod_init(&namespaces).map_err(Error::io("the pod's init"))?)),
        NamespaceSource::Pinned | NamespaceSource::Host | NamespaceSource::PerContainer => Ok(None),
    }
}

/// Takes off what [`set_up`] mounted: `/dev/shm` and the namespaces of these kinds. What is not there is no error.
pub(crate) fn take_down(dir: &Path, kinds: &[Kind]) -> Result<(), Error> {
    mount::unmount_all_below(&dir.join(layout::SHM)).map_err(Error::io("the pod's /dev/shm"))?;
    for kind in kinds {
        let pin = dir.join(layout::NAMESPACES).join(kind.name());
        namespace::unpin(&pin).map_err(Error::io("the pod's namespaces"))?;
    }
    Ok(())
}

/// A sysctl outside the pod's own namespaces would be the host's.
fn check_sysctls(spec: &SandboxSpec) -> Result<(), Error> {
    for name in spec.sysctls.keys() {
        let dotted = name.replace('/', ".");
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
        let uts = ["kernel.hostname", "kernel.domainname"];
        let source = if dotted.starts_with("net.") {
            spec.network
        } else if ipc.iter().any(|prefix| dotted.starts_with(prefix)) {
            spec.ipc
        } else if uts.contains(&dotted.as_str()) {
            spec.uts
        } else {
            NamespaceSource::Host
        };
        if source != NamespaceSource::New {
            return Err(Error::Invalid(format!(
                "sysctl {name} is refused: it belongs to no namespace of the pod's own, so it would change the host"
            )));
        }
    }
    Ok(())
}

/// The ttrpc service.
#[derive(Debug)]
pub(crate) struct Service(pub(crate) Arc<Shim>);

#[async_trait]
impl sandbox_async::Sandbox for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, r: CreateSandboxRequest) -> ttrpc::Result<CreateSandboxResponse> {
        self.0.sandbox.create(r, &self.0.dir)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(&self, _: &TtrpcContext, _: StartSandboxRequest) -> ttrpc::Result<StartSandboxResponse> {
        let shim = Arc::clone(&self.0);
        let since = detached(async move { shim.sandbox.start(&shim).await }).await?;
        let created_at = Some(since.into()).into();
        Ok(StartSandboxResponse { pid: std::process::id(), created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        // The words of Go, which OCI uses.
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, _: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        let shim = Arc::clone(&self.0);
        detached(async move { shim.sandbox.stop(&shim).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, _: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        let exited_at = Some(self.0.sandbox.wait().await.into()).into();
        Ok(WaitSandboxResponse { exited_at, ..Default::default() })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, _: SandboxStatusRequest) -> ttrpc::Result<SandboxStatusResponse> {
        Ok(self.0.sandbox.status()?)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> ttrpc::Result<PingResponse> {
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let shim = Arc::clone(&self.0);
        detached(async move {
            shim.sandbox.stop(&shim).await?;
            for container in shim.containers() {
                if let Err(error) = container.delete(&shim).await {
                    journal::line(format_args!("shutting down: {error}"));
                }
            }
            shim.shut_down();
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        Err(Error::Unsupported("SandboxMetrics").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_in_the_pods_own_namespaces() {
        let check = |name: &str, network: NamespaceSource, ipc: NamespaceSource, accepted: bool| {
            let spec = SandboxSpec {
                network,
                ipc,
                uts: NamespaceSource::Host,
                pid: NamespaceSource::Host,
                hostname: None,
                sysctls: [(name.to_owned(), "1".to_owned())].into(),
                shm_size_bytes: 0,
            };
            assert_eq!(check_sysctls(&spec).is_ok(), accepted, "{name}");
        };
        use NamespaceSource::{Host, New};
        check("net.ipv4.ip_forward", New, New, true);
        check("net/ipv4/ip_forward", New, New, true);
        check("net.ipv4.ip_forward", Host, New, false);
        check("kernel.shmmax", New, New, true);
        check("kernel.shmmax", New, Host, false);
        check("kernel.hostname", New, New, false);
        check("vm.overcommit_memory", New, New, false);
    }
}
