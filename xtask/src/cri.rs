//! A direct CRI client: gRPC over a unix socket, the same for every runtime. Knows nothing of who listens.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use stasis_cri_api::runtime::image_service_client::ImageServiceClient;
use stasis_cri_api::runtime::runtime_service_client::RuntimeServiceClient;
use stasis_cri_api::runtime::*;
use stasis_cri_api::stasis::admin_client::AdminClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Longest call: a gigabyte of memory on a busy machine.
const CALL: Duration = Duration::from_secs(300);

/// How often a log is looked at while something is awaited in it.
const POLL: Duration = Duration::from_millis(2);

/// The services behind one socket.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
    /// The bare service, for calls that have no method here.
    pub runtime: RuntimeServiceClient<Channel>,
    /// The bare service, for calls that have no method here.
    pub images: ImageServiceClient<Channel>,
}

/// A container and where its log is.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its ID.
    pub id: String,
    /// Its log file.
    pub log: PathBuf,
}

/// A pod sandbox and what it was made of.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its ID.
    pub id: String,
    /// What it was asked for with.
    pub config: PodSandboxConfig,
}

impl Cri {
    /// Connects to the socket at `path`.
    pub async fn connect(path: &Path) -> Result<Self> {
        let socket = path.to_path_buf();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The authority of the address is required and unused.
        let endpoint = Endpoint::from_static("http://localhost").timeout(CALL);
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel.with_context(|| format!("connect to {}", path.display()))?;
        let (runtime, images) = (RuntimeServiceClient::new(channel.clone()), ImageServiceClient::new(channel.clone()));
        Ok(Self { channel, runtime, images })
    }

    /// The administration interface; only stasisd has one.
    pub fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel.clone())
    }

    /// `NAME VERSION` of the runtime.
    pub async fn version(&mut self) -> Result<String> {
        let version = self.runtime.version(VersionRequest { version: "v1".into() }).await.map_err(said)?.into_inner();
        Ok(format!("{} {}", version.runtime_name, version.runtime_version))
    }

    /// Whether the runtime and its network are ready; if not, the reason is the error.
    pub async fn ready(&mut self) -> Result<()> {
        let status = self.runtime.status(StatusRequest { verbose: false }).await.map_err(said)?.into_inner();
        let conditions = status.status.map(|status| status.conditions).unwrap_or_default();
        match conditions.iter().find(|condition| {
            !condition.status && ["RuntimeReady", "NetworkReady"].contains(&condition.r#type.as_str())
        }) {
            Some(missing) => bail!("{} is not met: {} {}", missing.r#type, missing.reason, missing.message),
            None => Ok(()),
        }
    }

    /// PullImage; returns the image's ID.
    pub async fn pull(&mut self, reference: &str) -> Result<String> {
        let request = PullImageRequest { image: Some(image(reference)), auth: None, sandbox_config: None };
        let answer = self.images.pull_image(request).await.map_err(said);
        Ok(answer.with_context(|| format!("pull {reference}"))?.into_inner().image_ref)
    }

    /// RemoveImage.
    pub async fn remove_image(&mut self, reference: &str) -> Result<()> {
        let request = RemoveImageRequest { image: Some(image(reference)) };
        self.images.remove_image(request).await.map_err(said).with_context(|| format!("remove {reference}"))?;
        Ok(())
    }

    /// ListImages: the tags of each image, or its ID.
    pub async fn list_images(&mut self) -> Result<Vec<String>> {
        let answer = self.images.list_images(ListImagesRequest { filter: None }).await.map_err(said)?.into_inner();
        Ok(answer.images.into_iter().map(|image| image.repo_tags.into_iter().next().unwrap_or(image.id)).collect())
    }

    /// RunPodSandbox with the default runtime handler.
    pub async fn run_pod(&mut self, config: PodSandboxConfig) -> Result<Pod> {
        self.run_pod_with(config, "").await
    }

    /// RunPodSandbox with a runtime handler.
    pub async fn run_pod_with(&mut self, config: PodSandboxConfig, handler: &str) -> Result<Pod> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let answer = self.runtime.run_pod_sandbox(request).await.map_err(said).context("RunPodSandbox")?;
        Ok(Pod { id: answer.into_inner().pod_sandbox_id, config })
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&mut self, id: &str) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.stop_pod_sandbox(request).await.map_err(said).context("StopPodSandbox")?;
        Ok(())
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&mut self, id: &str) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.remove_pod_sandbox(request).await.map_err(said).context("RemovePodSandbox")?;
        Ok(())
    }

    /// ListPodSandbox: the IDs of all pods.
    pub async fn list_pods(&mut self) -> Result<Vec<String>> {
        let answer = self.runtime.list_pod_sandbox(ListPodSandboxRequest { filter: None }).await.map_err(said)?;
        Ok(answer.into_inner().items.into_iter().map(|pod| pod.id).collect())
    }

    /// PodSandboxStatus.
    pub async fn pod_status(&mut self, id: &str) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer = self.runtime.pod_sandbox_status(request).await.map_err(said).context("PodSandboxStatus")?;
        answer.into_inner().status.context("PodSandboxStatus has no status")
    }

    /// The pod's address in its network.
    pub async fn pod_address(&mut self, id: &str) -> Result<String> {
        Ok(self.pod_status(id).await?.network.map(|network| network.ip).unwrap_or_default())
    }

    /// CreateContainer.
    pub async fn create(&mut self, pod: &Pod, config: ContainerConfig) -> Result<Container> {
        let log = Path::new(&pod.config.log_directory).join(&config.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self.runtime.create_container(request).await.map_err(said).context("CreateContainer")?;
        Ok(Container { id: answer.into_inner().container_id, log })
    }

    /// StartContainer.
    pub async fn start(&mut self, container: &Container) -> Result<()> {
        let request = StartContainerRequest { container_id: container.id.clone() };
        self.runtime.start_container(request).await.map_err(said).context("StartContainer")?;
        Ok(())
    }

    /// StopContainer with a grace period in seconds.
    pub async fn stop(&mut self, container: &Container, grace: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: container.id.clone(), timeout: grace };
        self.runtime.stop_container(request).await.map_err(said).context("StopContainer")?;
        Ok(())
    }

    /// RemoveContainer.
    pub async fn remove(&mut self, container: &Container) -> Result<()> {
        let request = RemoveContainerRequest { container_id: container.id.clone() };
        self.runtime.remove_container(request).await.map_err(said).context("RemoveContainer")?;
        Ok(())
    }

    /// ContainerStatus.
    pub async fn status(&mut self, container: &Container) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
        let answer = self.runtime.container_status(request).await.map_err(said).context("ContainerStatus")?;
        answer.into_inner().status.context("ContainerStatus has no status")
    }

    /// ListContainers: those that pass a filter.
    pub async fn list(&mut self, filter: ContainerFilter) -> Result<Vec<stasis_cri_api::runtime::Container>> {
        let request = ListContainersRequest { filter: Some(filter) };
        Ok(self.runtime.list_containers(request).await.map_err(said)?.into_inner().containers)
    }

    /// CheckpointContainer, which leaves the container running.
    pub async fn checkpoint(&mut self, container: &Container, archive: &Path) -> Result<()> {
        let request = CheckpointContainerRequest {
            container_id: container.id.clone(),
            location: archive.display().to_string(),
            timeout: 0,
        };
        self.runtime.checkpoint_container(request).await.map_err(said).context("CheckpointContainer")?;
        Ok(())
    }

    /// ExecSync; returns standard output, and an exit code other than 0 is an error.
    pub async fn exec(&mut self, container: &Container, command: &[&str]) -> Result<String> {
        let request = ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 30,
        };
        let what = || format!("ExecSync {}", command.join(" "));
        let answer = self.runtime.exec_sync(request).await.map_err(said).with_context(what)?.into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if answer.exit_code != 0 {
            bail!("{} ended with code {}: {}", what(), answer.exit_code, text(&answer.stderr));
        }
        Ok(text(&answer.stdout))
    }
}

/// A pod's configuration as the kubelet would send it.
pub fn pod_config(name: &str, logs: &Path, cgroup_parent: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: logs.join(name).display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// A container's configuration as the kubelet would send it; without `arguments` the image's own command runs.
pub fn container_config(name: &str, reference: &str, arguments: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(image(reference)),
        args: arguments.iter().map(|word| (*word).to_owned()).collect(),
        log_path: format!("{name}/0.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// The kubelet's default: the pod shares network and IPC, each container has its own processes.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}

fn image(reference: &str) -> ImageSpec {
    ImageSpec {
        image: reference.to_owned(),
        user_specified_image: reference.to_owned(),
        annotations: HashMap::new(),
        ..ImageSpec::default()
    }
}

/// The messages of a container's log so far, without time and stream; none if there is no log yet.
pub fn messages(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    // A line that is being written has no end yet.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(|line| line.splitn(4, ' ').nth(3).map(str::to_owned)).collect()
}

/// The messages of a container's log with their times.
pub fn stamped_messages(log: &Path) -> Result<Vec<(jiff::Timestamp, String)>> {
    let text = fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| -> Result<(jiff::Timestamp, String)> {
        let mut words = line.splitn(4, ' ');
        let time = words.next().unwrap_or_default();
        let time = time.parse().with_context(|| format!("no CRI log line: {line}"))?;
        Ok((time, words.nth(2).unwrap_or_default().to_owned()))
    };
    whole.lines().map(parse).collect()
}

/// Waits until `found` sees in the log's messages what it looks for.
pub async fn await_message<T>(
    log: &Path,
    limit: Duration,
    what: &str,
    found: impl Fn(&[String]) -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let messages = messages(log);
        if let Some(result) = found(&messages) {
            return Ok(result);
        }
        if Instant::now() > deadline {
            let last = messages.last().map_or("nothing", String::as_str);
            bail!("no {what} in {} within {limit:?}; last there: {last}", log.display());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// A gRPC status in words.
#[derive(Debug)]
struct Said(Status);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.code(), self.0.message())
    }
}

impl std::error::Error for Said {}

fn said(status: Status) -> anyhow::Error {
    Said(status).into()
}

/// The code and the words with which a runtime refused a call of [`Cri`].
///
/// # Errors
/// The call's own result where it was not refused by a runtime.
pub fn refusal<T: fmt::Debug>(result: Result<T>) -> Result<(Code, String)> {
    let error = match result {
        Ok(value) => bail!("it was not refused, the answer is {value:?}"),
        Err(error) => error,
    };
    let Said(status) = error.downcast::<Said>()?;
    Ok((status.code(), status.message().to_owned()))
}
