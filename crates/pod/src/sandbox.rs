//! Pod sandboxes: run, stop, remove, status, list.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stasis_cni::PodNetwork;
use stasis_cri_api::runtime::{
    ContainerEventType, LinuxPodSandboxStatus, Namespace, NamespaceMode, PodIp, PodSandbox, PodSandboxConfig,
    PodSandboxFilter, PodSandboxMetadata, PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus,
    PodSandboxStatusResponse,
};
use stasis_shim_api::{NamespaceSource, SandboxSpec, layout};
use stasis_sys::namespace::{self, Kind, NewNamespaces};
use tracing::{info, warn};

use crate::container::matches_labels;
use crate::error::{Error, IoContext as _, Result};
use crate::files;
use crate::monitor::end_group;
use crate::pods::{Pod, Pods, blocking, remove_tree};
use crate::record::{PodRecord, now};
use crate::spec;

/// Runtime type of the shim that holds the namespaces of every pod, whatever shim runs its containers.
pub(crate) const SANDBOX_RUNTIME: &str = "io.containerd.stasis.v1";
/// Size of a pod's `/dev/shm`: what containerd and Docker give.
const SHM_BYTES: u64 = 64 * 1024 * 1024;

impl Pods {
    /// Makes a pod sandbox and brings it up: CRI RunPodSandbox.
    ///
    /// # Errors
    /// `AlreadyExists` if the name is taken; `InvalidArgument` for a configuration that breaks a rule;
    /// `FailedPrecondition` where the network is not configured. Nothing is left behind.
    pub async fn run_pod_sandbox(&self, config: PodSandboxConfig, handler: &str) -> Result<String> {
        let (pods, handler) = (self.clone(), handler.to_owned());
        self.detached(async move { pods.run(config, &handler).await }).await
    }

    async fn run(&self, config: PodSandboxConfig, handler: &str) -> Result<String> {
        spec::validate_pod(&config)?;
        let (handler, _) = self.handler(handler)?;
        let id = stasis_sys::file::random_id();
        let reservation = self.names.reserve("pod", pod_name(&config), &id)?;
        match self.set_up(&id, config, handler).await {
            Ok(()) => {
                reservation.keep();
                Ok(id)
            }
            Err(error) => {
                // What fails of it is logged, and tried again at the next start.
                let _ = self.tear_down(&id).await;
                Err(error)
            }
        }
    }

    async fn set_up(&self, id: &str, config: PodSandboxConfig, handler: String) -> Result<()> {
        let dir = self.pod_dir(id);
        make_pod_dir(&dir).doing(format_args!("make the pod's directory {}", dir.display()))?;
        if !config.log_directory.is_empty() {
            std::fs::create_dir_all(&config.log_directory).doing(format_args!("make {}", config.log_directory))?;
        }
        let (spec, network_sysctls) = sandbox_spec(&config);
        if spec.network == NamespaceSource::Pinned {
            pin_network(&dir, network_sysctls).await?;
        }
        // Side by side: neither needs the other. Both are waited for, as the clean-up after a failure must be the last.
        let starting = self.runtime.start_sandbox(id, SANDBOX_RUNTIME, &dir, &spec);
        let (sandbox, ips) = futures_util::future::join(starting, self.connect_network(id, &config)).await;
        let (sandbox, ips) = (sandbox?, ips?);
        files::write(&dir, &config, &ips)?;
        let record = PodRecord {
            id: id.to_owned(),
            handler,
            created_at: now(),
            ready: true,
            ips: ips.iter().map(ToString::to_string).collect(),
            network_released: files::host_network(&config),
            shim_pid: sandbox.pid(),
            config: Some(config),
        };
        self.store.put_pod(&record).await?;
        let pod = self.pods.insert(id, Pod::new(record, Some(sandbox)));
        self.tell(ContainerEventType::ContainerCreatedEvent, id, id);
        self.tell(ContainerEventType::ContainerStartedEvent, id, id);
        self.watch_sandbox(pod);
        Ok(())
    }

    /// Connects the pod unless it is in the host's network; returns its addresses.
    async fn connect_network(&self, id: &str, config: &PodSandboxConfig) -> Result<Vec<IpAddr>> {
        if files::host_network(config) {
            return Ok(Vec::new());
        }
        let network = self.pod_network(id, config);
        let added = self.cni.add(&network).await?;
        if added.ips.is_empty() {
            return Err(Error::precondition(format!(
                "the network plugins gave pod {id} no address: the last plugin's result has no `ips`"
            )));
        }
        Ok(added.ips)
    }

    /// Gives back the network of a pod and lets go of its namespace.
    async fn disconnect_network(&self, id: &str) -> Result<()> {
        let netns = self.netns(id);
        self.cni.del(id, Some(&netns)).await?;
        blocking(move || namespace::unpin(&netns)).await.doing("let go of the pod's network namespace")
    }

    fn pod_network(&self, id: &str, config: &PodSandboxConfig) -> PodNetwork {
        let metadata = config.metadata.clone().unwrap_or_default();
        PodNetwork {
            id: id.to_owned(),
            netns: self.netns(id),
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            port_mappings: port_mappings(config),
            ..PodNetwork::default()
        }
    }

    pub(crate) fn netns(&self, id: &str) -> PathBuf {
        self.pod_dir(id).join(layout::NAMESPACES).join("net")
    }

    /// Ends the processes of a pod and gives back its network: CRI StopPodSandbox. Idempotent.
    ///
    /// # Errors
    /// Where a plugin or a kill failed: the call can be repeated.
    pub async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        // "must not return an error if all relevant resources have already been reclaimed"
        let Some(pod) = self.pods.find(id)? else { return Ok(()) };
        let pods = self.clone();
        self.detached(async move {
            let _operation = pod.operation.lock().await;
            pods.stop_pod(&pod).await
        })
        .await
    }

    async fn stop_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let kills =
            self.containers_of(&pod.id).into_iter().map(|container| async move { self.end_now(&container).await });
        futures_util::future::try_join_all(kills).await?;
        let (ready, released) = (pod.record().ready, pod.record().network_released);
        let sandbox = pod.take_sandbox();
        let disconnecting = async { if released { Ok(()) } else { self.disconnect_network(&pod.id).await } };
        let ending = async {
            if let Some(sandbox) = &sandbox {
                // A shim that ends amid the deletion of a task would be taken for dead.
                for container in self.containers_of(&pod.id) {
                    let _operation = container.operation.lock().await;
                    let _ = self.forget_task(&container).await;
                }
                end_sandbox(sandbox).await;
            }
        };
        let (disconnected, ()) = futures_util::future::join(disconnecting, ending).await;
        let newly_released = !released && disconnected.is_ok();
        if ready || newly_released {
            pod.update(&self.store, |record| {
                record.ready = false;
                record.network_released |= newly_released;
            })
            .await?;
            if ready {
                self.tell(ContainerEventType::ContainerStoppedEvent, &pod.id, &pod.id);
            }
        }
        disconnected
    }

    /// Removes a pod sandbox with its containers, by force if they run: CRI RemovePodSandbox. Idempotent.
    ///
    /// # Errors
    /// Where something could not be taken away: the call can be repeated.
    pub async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        let Some(pod) = self.pods.find(id)? else { return Ok(()) };
        let pods = self.clone();
        self.detached(async move {
            let _operation = pod.operation.lock().await;
            pods.stop_pod(&pod).await?;
            let containers = pods.containers_of(&pod.id);
            for container in &containers {
                pods.take_away(container).await?;
            }
            pods.tear_down(&pod.id).await?;
            for container in &containers {
                container.set_removed().await;
            }
            pods.store.delete_pod(&pod.id, containers.iter().map(|container| container.id.clone()).collect()).await?;
            for container in &containers {
                pods.forget_container(container);
            }
            pods.pods.remove(&pod.id);
            let name = pod_name(pod.record().config.as_ref().unwrap_or(&PodSandboxConfig::default()));
            pods.names.release(&name, &pod.id);
            pods.tell(ContainerEventType::ContainerDeletedEvent, &pod.id, &pod.id);
            Ok(())
        })
        .await
    }

    /// Takes away everything that a pod may have on this host, in any state of its making. Goes as far as it can.
    ///
    /// # Errors
    /// The first thing that failed; it can be tried again.
    pub(crate) async fn tear_down(&self, id: &str) -> Result<()> {
        let dir = self.pod_dir(id);
        let network = self.cni.del(id, Some(&self.netns(id))).await;
        let network = network
            .map_err(Error::from)
            .inspect_err(|error| warn!(pod = id, %error, "cannot give back the network of a pod"));
        let shim = self.runtime.clean_sandbox(id, &dir).await.map_err(Error::from);
        let shim = shim.inspect_err(|error| warn!(pod = id, %error, "cannot end the shim of a pod"));
        let parent = self.cgroups.at(&crate::container::default_cgroup_parent(id));
        let group = end_group(parent).await.doing(format_args!("remove the control group of pod {id}"));
        let group = group.inspect_err(|error| warn!(pod = id, %error, "cannot remove the control group of a pod"));
        let mounts = dir.clone();
        let unmounted = blocking(move || stasis_sys::mount::unmount_all_below(&mounts)).await;
        let files = match unmounted {
            Ok(()) => remove_tree(&dir).await.doing(format_args!("remove the directory {}", dir.display())),
            Err(error) => Err(error).doing(format_args!("unmount what is below {}", dir.display())),
        };
        let files = files.inspect_err(|error| warn!(pod = id, %error, "cannot remove the directory of a pod"));
        network.and(shim).and(group).and(files)
    }

    /// Marks a pod not ready when its shim is gone.
    pub(crate) fn watch_sandbox(&self, pod: Arc<Pod>) {
        let Some(sandbox) = pod.sandbox() else { return };
        let pods = self.clone();
        tokio::spawn(async move {
            let _ended = sandbox.wait().await;
            if pod.take_sandbox().is_none() {
                return; // stopped by us
            }
            warn!(pod = pod.id, "the shim of a pod is gone; the pod is not ready any more");
            if let Err(error) = pod.update(&pods.store, |record| record.ready = false).await {
                warn!(pod = pod.id, %error, "cannot record that a pod is not ready");
            }
            pods.tell(ContainerEventType::ContainerStoppedEvent, &pod.id, &pod.id);
        });
    }

    /// State of a pod sandbox: CRI PodSandboxStatus.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn pod_sandbox_status(&self, id: &str, verbose: bool) -> Result<PodSandboxStatusResponse> {
        let pod = self.pod(id)?;
        let record = pod.record();
        let config = record.config.clone().unwrap_or_default();
        let network = record.ips.split_first().map(|(ip, others)| PodSandboxNetworkStatus {
            ip: ip.clone(),
            additional_ips: others.iter().map(|ip| PodIp { ip: ip.clone() }).collect(),
        });
        let mut info = std::collections::HashMap::new();
        if verbose {
            let text = serde_json::json!({
                "pid": record.shim_pid,
                "runtimeHandler": record.handler,
                "directory": self.pod_dir(&record.id),
                "netns": self.netns(&record.id),
            });
            info.insert("info".to_owned(), text.to_string());
        }
        let status = PodSandboxStatus {
            id: record.id.clone(),
            metadata: config.metadata.clone(),
            state: pod_state(&record).into(),
            created_at: record.created_at,
            network: Some(network.unwrap_or_default()),
            linux: Some(LinuxPodSandboxStatus {
                namespaces: Some(Namespace { options: files::namespaces(&config).cloned() }),
            }),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            runtime_handler: record.handler.clone(),
        };
        Ok(PodSandboxStatusResponse { status: Some(status), info, ..Default::default() })
    }

    /// Pod sandboxes that pass `filter`, the newest first: CRI ListPodSandbox.
    pub fn list_pod_sandboxes(&self, filter: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
        let mut list: Vec<PodSandbox> = self
            .pods
            .all()
            .iter()
            .filter_map(|pod| {
                let record = pod.record();
                filter.is_none_or(|filter| passes(&record, filter)).then(|| entry(&record))
            })
            .collect();
        list.sort_by(|a, b| b.created_at.cmp(&a.created_at).then_with(|| a.id.cmp(&b.id)));
        list
    }
}

/// Ends a shim that has no running tasks left. What it says is not decisive: its remains are cleared by path.
async fn end_sandbox(sandbox: &stasis_task::Sandbox) {
    if let Err(error) = sandbox.stop().await {
        info!(%error, "a shim did not stop its sandbox in order");
    }
    if let Err(error) = sandbox.shutdown().await {
        info!(%error, "a shim did not shut down in order");
    }
}

fn make_pod_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700);
    builder.recursive(true).create(dir)?;
    builder.create(dir.join(layout::BUNDLES))
}

/// The name that must be unique among pods: as containerd's, so that logs read alike.
pub(crate) fn pod_name(config: &PodSandboxConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    let PodSandboxMetadata { name, uid, namespace, attempt } = metadata;
    format!("{name}_{namespace}_{uid}_{attempt}")
}

/// Makes the network namespace of a pod, so that its connection need not wait for the shim.
async fn pin_network(dir: &Path, sysctls: BTreeMap<String, String>) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let dir = dir.join(layout::NAMESPACES);
    let made = blocking(move || {
        std::fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let sysctls: Vec<(&str, &str)> = sysctls.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        namespace::pin_new(&dir, &NewNamespaces { kinds: &[Kind::Net], hostname: None, sysctls: &sysctls })
    });
    made.await.doing("make the pod's network namespace")
}

/// What the shim is to set up, and the sysctls of the network namespace if that is made here.
fn sandbox_spec(config: &PodSandboxConfig) -> (SandboxSpec, BTreeMap<String, String>) {
    let options = files::namespaces(config).cloned().unwrap_or_default();
    let own = |mode: NamespaceMode, source: NamespaceSource| match mode {
        NamespaceMode::Node => NamespaceSource::Host,
        _ => source,
    };
    let network = own(options.network(), NamespaceSource::Pinned);
    let sysctls = config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default().into_iter();
    let (network_sysctls, sysctls) = sysctls.partition(|(name, _)| {
        network == NamespaceSource::Pinned && (name.starts_with("net.") || name.starts_with("net/"))
    });
    let spec = SandboxSpec {
        network,
        ipc: own(options.ipc(), NamespaceSource::New),
        // It follows the network's: a host name belongs to the address that it stands for.
        uts: own(options.network(), NamespaceSource::New),
        pid: match options.pid() {
            NamespaceMode::Pod => NamespaceSource::New,
            NamespaceMode::Node => NamespaceSource::Host,
            NamespaceMode::Container | NamespaceMode::Target => NamespaceSource::PerContainer,
        },
        hostname: (network == NamespaceSource::Pinned).then(|| files::hostname(config)),
        sysctls,
        shm_size_bytes: SHM_BYTES,
    };
    (spec, network_sysctls)
}

fn port_mappings(config: &PodSandboxConfig) -> Vec<stasis_cni::PortMapping> {
    use stasis_cri_api::runtime::Protocol;
    let mappings = config.port_mappings.iter().filter(|mapping| mapping.host_port > 0);
    mappings
        .filter_map(|mapping| {
            Some(stasis_cni::PortMapping {
                host_port: u16::try_from(mapping.host_port).ok()?,
                container_port: u16::try_from(mapping.container_port).ok()?,
                protocol: match mapping.protocol() {
                    Protocol::Tcp => "tcp",
                    Protocol::Udp => "udp",
                    Protocol::Sctp => "sctp",
                }
                .to_owned(),
                host_ip: mapping.host_ip.clone(),
            })
        })
        .collect()
}

fn pod_state(record: &PodRecord) -> PodSandboxState {
    if record.ready { PodSandboxState::SandboxReady } else { PodSandboxState::SandboxNotready }
}

fn entry(record: &PodRecord) -> PodSandbox {
    let config = record.config.as_ref();
    PodSandbox {
        id: record.id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        state: pod_state(record).into(),
        created_at: record.created_at,
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        runtime_handler: record.handler.clone(),
    }
}

fn passes(record: &PodRecord, filter: &PodSandboxFilter) -> bool {
    let config = record.config.as_ref();
    record.id.starts_with(&filter.id)
        && filter.state.is_none_or(|state| state.state() == pod_state(record))
        && config.is_some_and(|config| matches_labels(&config.labels, &filter.label_selector))
}
