//! Containers: create, start, stop, remove, status, list.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use stasis_cri_api::runtime::{
    self as cri, CgroupDriver, Container as ContainerEntry, ContainerConfig, ContainerEventType, ContainerFilter,
    ContainerResources, ContainerState, ContainerStatus, ContainerStatusResponse, ContainerUser, ImageSpec,
    LinuxContainerUser, NamespaceMode, PodSandboxConfig,
};
use stasis_image::Image;
use stasis_shim_api::{ATTACHED, layout};
use stasis_task::{CreateOpts, Io, PlatformRuntime as _, RunOptions, Task};
use tracing::{info, warn};

use crate::apparmor;
use crate::error::{Error, IoContext as _, Kind, Result};
use crate::files::{self, Paths};
use crate::pods::{Container, Pod, Pods, remove_tree};
use crate::record::{ContainerRecord, Phase, now};
use crate::restore::Restore;
use crate::signal::{self, SIGKILL, SIGTERM};
use crate::spec::{self, ContainerInput, Namespaces, PidNamespace, PodFiles};
use crate::state::{Admission, Event, Operation, admit, apply};
use crate::target;
use crate::volumes;

/// How long a container may take to vanish after SIGKILL: the kernel ends it at once unless it waits for a device.
const KILL_LIMIT: Duration = Duration::from_secs(60);
/// How long a task that was killed is waited for before it is killed again.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// What a new container stands on.
pub(crate) struct Source {
    /// ID of the image that the request names; empty for an archive by path.
    pub(crate) image_id: String,
    /// The image of the root file system.
    pub(crate) base: Arc<Image>,
    /// What to restore, if it is a checkpoint.
    pub(crate) restore: Option<Restore>,
}

impl Pods {
    /// Makes a container in a pod, not yet running: CRI CreateContainer.
    ///
    /// An image that is a checkpoint, or the path of an archive, makes a container that goes on where the checkpoint
    /// was taken once it is started.
    ///
    /// # Errors
    /// `NotFound` for the pod or the image, `AlreadyExists` for the name, `InvalidArgument` for the configuration,
    /// `PermissionDenied` where this node forbids restores. Nothing is left behind.
    pub async fn create_container(&self, pod_id: &str, config: ContainerConfig) -> Result<String> {
        let (pods, pod_id) = (self.clone(), pod_id.to_owned());
        self.detached(async move { pods.create(&pod_id, config).await }).await
    }

    async fn create(&self, pod_id: &str, config: ContainerConfig) -> Result<String> {
        let pod = self.pod(pod_id)?;
        if pod.sandbox().is_none() {
            return Err(Error::precondition(format!("cannot create a container in pod {}: it is not ready", pod.id)));
        }
        // The pod's own configuration, not the copy that CreateContainer carries: a request must not be able to claim
        // for a container what its pod was not granted.
        let pod_config = pod.record().config.clone().unwrap_or_default();
        spec::validate_container(&config)?;
        if let Some(target) = target::requested(&config) {
            self.running_target(&pod, target)?;
        }
        let id = stasis_sys::file::random_id();
        let reservation = self.names.reserve("container", container_name(&pod.id, &config), &id)?;
        let volumes: Vec<usize> = volumes::requested(&config).map(|(place, ..)| place).collect();
        let made = async {
            let source = self.source(&id, &config).await?;
            self.build(&pod, &id, config, &pod_config, source).await
        };
        let added = match made.await {
            Ok(record) => self.add(&pod, record).await,
            Err(error) => Err(error),
        };
        match added {
            Ok(()) => {
                reservation.keep();
                self.tell(ContainerEventType::ContainerCreatedEvent, &id, &pod.id);
                Ok(id)
            }
            Err(error) => {
                self.release_volumes(&pod.id, &id, volumes).await;
                self.discard_container(&pod.id, &id).await;
                Err(error)
            }
        }
    }

    /// Commits the record of a container, unless its pod was stopped or removed while it was made.
    async fn add(&self, pod: &Pod, record: ContainerRecord) -> Result<()> {
        let _operation = pod.operation.lock().await;
        if self.pods.get(&pod.id).is_none() || pod.sandbox().is_none() {
            return Err(Error::precondition(format!("pod {} was stopped while the container was made", pod.id)));
        }
        self.store.put_container(&record).await?;
        let id = record.id.clone();
        self.containers.insert(&id, Container::new(record));
        self.layers.added();
        Ok(())
    }

    /// Finds the image, and where it is a checkpoint what to restore.
    async fn source(&self, id: &str, config: &ContainerConfig) -> Result<Source> {
        let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
        if name.is_empty() {
            return Err(Error::invalid("the container's configuration names no image"));
        }
        if Path::new(name).is_absolute() {
            return self.archive_source(id, Path::new(name)).await;
        }
        let image = self.images.resolve(name).ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("image {name} is not on this node: pull it before creating the container"),
            )
        })?;
        match self.images.checkpoint_dir(&image) {
            Some(dir) => self.image_source(id, &image, &dir).await,
            None => Ok(Source { image_id: image.id.clone(), base: image, restore: None }),
        }
    }

    async fn build(
        &self,
        pod: &Pod,
        id: &str,
        config: ContainerConfig,
        pod_config: &PodSandboxConfig,
        source: Source,
    ) -> Result<ContainerRecord> {
        // A host path may be on a volume that hangs.
        let config = tokio::task::spawn_blocking(move || {
            let mut config = config;
            spec::resolve_mount_sources(&mut config).map(|()| config)
        });
        let config = config.await.map_err(|error| Error::internal(format!("a path was not resolved: {error}")))??;
        if let Some(restore) = &source.restore {
            restore.check_request(&config, &self.cdi_edits(&config)?)?;
        }
        self.images.prepare_rootfs(&source.base, id).await?;
        let bundle = self.bundle(&pod.id, id);
        // Not its parents: they go with the pod.
        std::fs::create_dir(&bundle).doing(format_args!("make the bundle {}", bundle.display()))?;
        let log_path = log_path(pod_config, &config);
        if let Some(dir) = log_path.as_deref().and_then(Path::parent) {
            tokio::fs::create_dir_all(dir).await.doing(format_args!("make the log's directory {}", dir.display()))?;
        }
        let cgroups_path = self.cgroups_path(pod_config, &pod.id, id)?;
        let volume_image_ids = self.mount_volumes(&pod.id, id, &config).await?;
        let spec = self.spec(pod, id, &config, pod_config, &source.base, &cgroups_path)?;
        if let Some(profile) = spec.process().as_ref().and_then(|process| process.apparmor_profile().clone()) {
            apparmor::ensure(profile).await?;
        }
        let user = user_of(&spec);
        write_spec(&bundle, &spec)?;
        let mut checkpoint = PathBuf::new();
        if let Some(restore) = &source.restore {
            let shm = self.pod_dir(&pod.id).join(stasis_shim_api::layout::SHM);
            restore.apply(&self.images, id, log_path.as_deref(), &shm).await?;
            checkpoint = restore.images_dir();
        }
        let record = ContainerRecord {
            id: id.to_owned(),
            pod_id: pod.id.clone(),
            image_ref: image_ref(&source),
            image_id: source.image_id,
            base_image_id: source.base.id.clone(),
            created_at: now(),
            log_path: log_path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            restored: source.restore.is_some(),
            checkpoint: checkpoint.to_string_lossy().into_owned(),
            cgroups_path,
            stop_signal: stop_signal(&config, &source.base),
            config: Some(config),
            user: Some(user),
            volume_image_ids,
            ..ContainerRecord::default()
        };
        Ok(record)
    }

    fn cgroups_path(&self, pod_config: &PodSandboxConfig, pod_id: &str, id: &str) -> Result<String> {
        let parent = pod_config.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()).unwrap_or_default();
        let default = default_cgroup_parent(pod_id);
        let parent = match (parent, self.config.cgroup_driver) {
            ("", CgroupDriver::Cgroupfs) => &default,
            (parent, _) => parent,
        };
        Ok(spec::cgroups_path(self.config.cgroup_driver, parent, id)?)
    }

    /// What the CDI devices of a request need. No annotation names one: those of a request are words for people, and those
    /// of an archive a stranger's (CVE-2026-53492).
    fn cdi_edits(&self, config: &ContainerConfig) -> Result<stasis_cdi::Edits> {
        let names = config.cdi_devices.iter().map(|device| device.name.as_str());
        Ok(self.config.cdi.edits(names).map_err(spec::cdi::refused)?)
    }

    /// The OCI spec of a container.
    pub(crate) fn spec(
        &self,
        pod: &Pod,
        id: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
        image: &Image,
        cgroups_path: &str,
    ) -> Result<Spec> {
        let passwd = self.images.read_rootfs_file(image, "/etc/passwd", spec::ACCOUNT_FILE_MAX as u64)?;
        let group = self.images.read_rootfs_file(image, "/etc/group", spec::ACCOUNT_FILE_MAX as u64)?;
        let dir = self.pod_dir(&pod.id);
        let paths = Paths::of(&dir);
        let host_ipc = files::namespaces(pod_config).is_some_and(|options| options.ipc() == NamespaceMode::Node);
        let input = ContainerInput {
            id,
            pod_id: &pod.id,
            pod: pod_config,
            config,
            image: &image.config,
            passwd: passwd.as_deref(),
            group: group.as_deref(),
            namespaces: container_namespaces(&dir, pod_config, config, self.target_pin(&pod.id, id))?,
            volumes: self.volumes_dir(&pod.id, id),
            cdi: self.cdi_edits(config)?,
            cgroups_path: cgroups_path.to_owned(),
            cgroup_v2: self.cgroups.mode() == stasis_cgroup::Mode::V2,
            files: PodFiles {
                hosts: Some(paths.hosts),
                hostname: Some(paths.hostname),
                resolv_conf: Some(paths.resolv_conf),
                shm: (!host_ipc).then(|| dir.join(layout::SHM)),
            },
            criu_config: self.bundle(&pod.id, id).join("criu.conf"),
            host: &self.host,
            privileged_without_host_devices: false,
        };
        Ok(spec::container_spec(&input)?)
    }

    /// Runs a created container: CRI StartContainer.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it is created. A container that cannot be started is exited afterwards, with the
    /// reason `StartError` and the runtime's words.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let pods = self.clone();
        self.detached(async move {
            let _turn = container.turn().await?;
            admit(Operation::Start, container.record().phase(), &container.id)?;
            let pod = pods.pod(&container.pod_id)?;
            let started = pods.start(&pod, &container).await;
            if container.record().restored {
                pods.counters.restore(&started);
            }
            match started {
                Ok(()) => Ok(()),
                Err(error) => {
                    // What stays is taken away with the container.
                    let _ = pods.forget_task(&container).await;
                    let event = Event::StartFailed { message: error.to_string(), at: now() };
                    container.update(&pods.store, |record| apply(record, event)).await?;
                    pods.tell(ContainerEventType::ContainerStoppedEvent, &container.id, &pod.id);
                    Err(error)
                }
            }
        })
        .await
    }

    async fn start(&self, pod: &Pod, container: &Arc<Container>) -> Result<()> {
        let sandbox = pod.sandbox().ok_or_else(|| {
            Error::precondition(format!("cannot start container {}: pod {} is not ready", container.id, pod.id))
        })?;
        let handler_name = pod.record().handler.clone();
        let (_, handler) = self.handler(&handler_name)?;
        let record = container.record().clone();
        let bundle = self.bundle(&pod.id, &container.id);
        let config = record.config.clone().unwrap_or_default();
        self.pin_target(pod, &container.id, &config).await?;
        let text = bundle.join("config.json");
        let ours = handler.runtime == crate::sandbox::SANDBOX_RUNTIME;
        let options = RunOptions {
            binary_name: handler.binary.to_string_lossy().into_owned(),
            root: self.oci_root().to_string_lossy().into_owned(),
            systemd_cgroup: self.config.cgroup_driver == CgroupDriver::Systemd,
        };
        let opts = CreateOpts {
            spec: std::fs::read(&text).doing(format_args!("read {}", text.display()))?,
            rootfs: self.images.rootfs_mounts(&container.id)?.into_iter().map(mount).collect(),
            io: container_io(&handler.runtime, &record, &config),
            checkpoint: (!record.checkpoint.is_empty()).then(|| PathBuf::from(&record.checkpoint)),
            restore_from_path: !record.checkpoint.is_empty(),
            runtime_options: None,
            task_options: Some(options.to_any()),
            runtime: handler.runtime,
            sandbox_id: Some(pod.id.clone()),
            address: ours.then(|| sandbox.address().to_owned()),
            version: ours.then(|| sandbox.version()),
            bundle: Some(bundle),
        };
        let task = self.runtime.create(&container.id, opts).await?;
        container.set_task(Some(Arc::clone(&task)));
        let pid = task.start().await?;
        container.update(&self.store, |record| apply(record, Event::Started { pid, at: now() })).await?;
        self.tell(ContainerEventType::ContainerStartedEvent, &container.id, &pod.id);
        self.watch_task(Arc::clone(container), task);
        if record.restored {
            self.release_checkpoint(&container.id).await;
        }
        Ok(())
    }

    /// Ends a container: first asked by its stop signal, after `timeout` seconds by force. CRI StopContainer.
    ///
    /// # Errors
    /// `NotFound`; `DeadlineExceeded` if it does not end even by force.
    pub async fn stop_container(&self, id: &str, timeout: i64) -> Result<()> {
        let container = self.container(id)?;
        let pods = self.clone();
        self.detached(async move { pods.stop(&container, Duration::from_secs(timeout.max(0).unsigned_abs())).await })
            .await
    }

    async fn stop(&self, container: &Arc<Container>, grace: Duration) -> Result<()> {
        if container.record().phase() == Phase::Created {
            // It may be about to run.
            drop(container.operation.lock().await);
        }
        if admit(Operation::Stop, container.record().phase(), &container.id)? == Admission::Fulfilled {
            return Ok(());
        }
        if !grace.is_zero() {
            let signal = match container.record().stop_signal {
                0 => SIGTERM,
                signal => signal,
            };
            self.signal(container, signal, false).await?;
            if container.exited_within(grace).await {
                return Ok(());
            }
            info!(container = container.id, grace = grace.as_secs(), "did not end in its grace period; killing it");
        }
        self.signal(container, SIGKILL, true).await?;
        if container.exited_within(KILL_LIMIT).await {
            return Ok(());
        }
        Err(Error::new(
            Kind::DeadlineExceeded,
            format!(
                "container {} (pid {}) has not ended {} s after SIGKILL: a process waits in the kernel, see /proc/PID/stack",
                container.id,
                container.record().pid,
                KILL_LIMIT.as_secs()
            ),
        ))
    }

    /// Ends a container by force.
    pub(crate) async fn end_now(&self, container: &Arc<Container>) -> Result<()> {
        self.stop(container, Duration::ZERO).await
    }

    /// Sends a signal; that there is nothing left to signal is fine.
    async fn signal(&self, container: &Container, signal: u32, all: bool) -> Result<()> {
        let Some(task) = container.task() else { return Ok(()) };
        match task.kill(signal, all).await {
            Err(error) if !error.is_not_found() && !error.is_shim_lost() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Removes a container, by force if it runs: CRI RemoveContainer. Idempotent.
    ///
    /// # Errors
    /// Where something could not be taken away: the call can be repeated.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some(container) = self.containers.find(id)? else { return Ok(()) };
        let pods = self.clone();
        self.detached(async move { pods.remove_now(&container).await }).await
    }

    async fn remove_now(&self, container: &Arc<Container>) -> Result<()> {
        self.take_away(container).await?;
        container.set_removed().await;
        self.store.delete_container(&container.id).await?;
        self.forget_container(container);
        Ok(())
    }

    /// Takes away everything of a container but its record.
    pub(crate) async fn take_away(&self, container: &Arc<Container>) -> Result<()> {
        self.end_now(container).await?;
        let _operation = container.operation.lock().await;
        self.forget_task(container).await?;
        self.images.remove_rootfs(&container.id).await?;
        let record = container.record().clone();
        self.release_volumes_of(&record).await;
        self.discard_container(&container.pod_id, &container.id).await;
        Ok(())
    }

    /// Forgets a container whose record is deleted: its name is free.
    pub(crate) fn forget_container(&self, container: &Container) {
        self.containers.remove(&container.id);
        let record = container.record();
        if let Some(config) = &record.config {
            self.names.release(&container_name(&record.pod_id, config), &container.id);
        }
        drop(record);
        self.tell(ContainerEventType::ContainerDeletedEvent, &container.id, &container.pod_id);
    }

    /// Has the shim forget a task, if there is one: its exit has been recorded, or does not matter.
    ///
    /// # Errors
    /// Where the shim has the task still: the call can be repeated.
    pub(crate) async fn forget_task(&self, container: &Container) -> Result<()> {
        let Some(task) = container.task() else { return Ok(()) };
        match discard_task(&*task).await {
            Err(error) if !error.is_shim_lost() => {
                warn!(container = container.id, %error, "cannot delete the task of a container");
                Err(error.into())
            }
            _ => {
                container.set_task(None);
                Ok(())
            }
        }
    }

    /// Takes away what a container has on this host without a record: snapshot, bundle, extracted checkpoint.
    pub(crate) async fn discard_container(&self, pod_id: &str, id: &str) {
        self.release_checkpoint(id).await;
        if let Err(error) = self.images.remove_rootfs(id).await {
            warn!(container = id, %error, "cannot remove the root file system of a container");
        }
        self.unpin_target(pod_id, id).await;
        let bundle = self.bundle(pod_id, id);
        if let Err(error) = stasis_sys::mount::unmount_all_below(&bundle) {
            warn!(container = id, %error, "cannot unmount the bundle of a container");
        } else if let Err(error) = remove_tree(&bundle).await {
            warn!(container = id, %error, "cannot remove the bundle of a container");
        }
    }

    /// Begins the log of a container anew after its file was renamed: CRI ReopenContainerLog.
    ///
    /// # Errors
    /// `FailedPrecondition` unless the container runs.
    pub async fn reopen_container_log(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        admit(Operation::ReopenLog, container.record().phase(), &container.id)?;
        let sandbox = self.pod(&container.pod_id)?.sandbox();
        let sandbox = sandbox
            .ok_or_else(|| Error::new(Kind::Unavailable, format!("container {} has no shim any more", container.id)))?;
        Ok(sandbox.reopen_log(&container.id).await?)
    }

    /// Containers that pass `filter`, the newest first: CRI ListContainers.
    pub fn list_containers(&self, filter: Option<&ContainerFilter>) -> Vec<ContainerEntry> {
        let mut list: Vec<ContainerEntry> = self
            .containers
            .all()
            .iter()
            .filter_map(|container| {
                let record = container.record();
                filter.is_none_or(|filter| passes(&record, filter)).then(|| entry(&record))
            })
            .collect();
        list.sort_by(|a, b| b.created_at.cmp(&a.created_at).then_with(|| a.id.cmp(&b.id)));
        list
    }

    /// IDs of the images that containers need though their status does not name them as their image, so that a collector
    /// of unused images would take them away: those that restored containers stand on, without which the checkpoint could
    /// not be restored again, and those of image volumes, without which a container could not be made anew.
    pub fn needed_images(&self) -> HashSet<String> {
        let mut needed = HashSet::new();
        for container in self.containers.all() {
            let record = container.record();
            needed.extend(record.restored.then(|| record.base_image_id.clone()));
            needed.extend(record.volume_image_ids.iter().cloned());
        }
        needed
    }

    /// State of a container: CRI ContainerStatus.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container_status(&self, id: &str, verbose: bool) -> Result<ContainerStatusResponse> {
        let container = self.container(id)?;
        let record = container.record();
        let mut info = HashMap::new();
        if verbose {
            let text = serde_json::json!({
                "sandboxID": record.pod_id,
                "pid": record.pid,
                "restored": record.restored,
                "baseImage": record.base_image_id,
                "cgroupsPath": record.cgroups_path,
                "bundle": self.bundle(&record.pod_id, &record.id),
            });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(ContainerStatusResponse { status: Some(status(&record)), info })
    }
}

/// Has a shim end and forget a task. A restore that is under way has processes only later than it can be asked to end, so
/// that one kill may not be enough.
pub(crate) async fn discard_task(task: &dyn Task) -> stasis_task::Result<()> {
    let deadline = tokio::time::Instant::now() + KILL_LIMIT;
    loop {
        match task.delete().await {
            Err(stasis_task::Error::FailedPrecondition(_)) if tokio::time::Instant::now() < deadline => {}
            Err(error) if !error.is_not_found() => return Err(error),
            _ => return Ok(()),
        }
        match task.kill(SIGKILL, true).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let _ = tokio::time::timeout(KILL_AGAIN, task.wait()).await;
    }
}

/// The name that must be unique among containers.
pub(crate) fn container_name(pod_id: &str, config: &ContainerConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!("{pod_id}/{}_{}", metadata.name, metadata.attempt)
}

/// Parent of a pod's control groups where the request names none; removed with the pod.
pub(crate) fn default_cgroup_parent(pod_id: &str) -> String {
    format!("/stasis/{pod_id}")
}

fn log_path(pod_config: &PodSandboxConfig, config: &ContainerConfig) -> Option<PathBuf> {
    let relative = (!config.log_path.is_empty() && !pod_config.log_directory.is_empty()).then_some(&config.log_path)?;
    Some(Path::new(&pod_config.log_directory).join(relative))
}

fn container_namespaces(
    dir: &Path,
    pod: &PodSandboxConfig,
    config: &ContainerConfig,
    target_pin: PathBuf,
) -> Result<Namespaces> {
    let pinned = |name: &str| dir.join(layout::NAMESPACES).join(name);
    let pod_options = files::namespaces(pod).cloned().unwrap_or_default();
    let own = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()?.namespace_options.as_ref());
    let own = own.unwrap_or(&pod_options);
    let shared = |mode: NamespaceMode, name: &str| (mode != NamespaceMode::Node).then(|| pinned(name));
    Ok(Namespaces {
        net: shared(pod_options.network(), "net"),
        uts: shared(pod_options.network(), "uts"),
        ipc: shared(pod_options.ipc(), "ipc"),
        pid: match own.pid() {
            NamespaceMode::Pod if pod_options.pid() == NamespaceMode::Pod => PidNamespace::Path(pinned("pid")),
            NamespaceMode::Pod => {
                return Err(Error::invalid(
                    "the container asks for the pod's PID namespace, but the pod has none of its own",
                ));
            }
            NamespaceMode::Container => PidNamespace::Private,
            NamespaceMode::Node => PidNamespace::Host,
            NamespaceMode::Target => PidNamespace::Path(target_pin),
        },
    })
}

fn container_io(runtime: &str, record: &ContainerRecord, config: &ContainerConfig) -> Io {
    // Other shims know no clients that come and go.
    let attached = if runtime == crate::sandbox::SANDBOX_RUNTIME { ATTACHED } else { "" };
    let log = match record.log_path.as_str() {
        "" => attached.to_owned(),
        path => stasis_task::log_uri(runtime, Path::new(path)),
    };
    Io {
        stdin: if config.stdin { attached.to_owned() } else { String::new() },
        stderr: if config.tty { String::new() } else { log.clone() },
        stdout: log,
        terminal: config.tty,
    }
}

fn mount(mount: stasis_sys::mount::Mount) -> stasis_task::Mount {
    stasis_task::Mount { fs_type: mount.fs_type, source: mount.source, options: mount.options }
}

/// The signal that asks a container to end: the request's, else the image's, else 0 for SIGTERM.
fn stop_signal(config: &ContainerConfig, image: &Image) -> u32 {
    if config.stop_signal() != cri::Signal::RuntimeDefault {
        return signal::of_request(config.stop_signal()).unwrap_or(0);
    }
    let named = image.config.config().as_ref().and_then(|config| config.stop_signal().clone());
    named.and_then(|name| signal::number(&name)).unwrap_or(0)
}

/// Puts the OCI spec of a container into its bundle.
pub(crate) fn write_spec(bundle: &Path, spec: &Spec) -> Result<()> {
    let text = serde_json::to_vec(spec);
    let text = text.map_err(|error| Error::internal(format!("cannot write the OCI spec: {error}")))?;
    let path = bundle.join("config.json");
    std::fs::write(&path, text).doing(format_args!("write {}", path.display()))
}

/// The identity with which the first process begins.
fn user_of(spec: &Spec) -> LinuxContainerUser {
    let user = spec.process().as_ref().map(|process| process.user().clone()).unwrap_or_default();
    LinuxContainerUser {
        uid: user.uid().into(),
        gid: user.gid().into(),
        supplemental_groups: user.additional_gids().iter().flatten().map(|gid| i64::from(*gid)).collect(),
    }
}

/// What status answers call the image: a repository digest where there is one, else its ID.
fn image_ref(source: &Source) -> String {
    if source.image_id.is_empty() || source.restore.is_some() {
        return if source.image_id.is_empty() { source.base.id.clone() } else { source.image_id.clone() };
    }
    source.base.repo_digests.first().unwrap_or(&source.base.id).clone()
}

fn cri_state(record: &ContainerRecord) -> ContainerState {
    match record.phase() {
        Phase::Created => ContainerState::ContainerCreated,
        Phase::Running => ContainerState::ContainerRunning,
        Phase::Exited => ContainerState::ContainerExited,
    }
}

fn image_spec(record: &ContainerRecord) -> Option<ImageSpec> {
    record.config.as_ref().and_then(|config| config.image.clone())
}

fn entry(record: &ContainerRecord) -> ContainerEntry {
    let config = record.config.as_ref();
    ContainerEntry {
        id: record.id.clone(),
        pod_sandbox_id: record.pod_id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        image: image_spec(record),
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.clone(),
        state: cri_state(record).into(),
        created_at: record.created_at,
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
    }
}

pub(crate) fn status(record: &ContainerRecord) -> ContainerStatus {
    let config = record.config.clone().unwrap_or_default();
    let resources = config.linux.and_then(|linux| linux.resources);
    ContainerStatus {
        id: record.id.clone(),
        metadata: config.metadata,
        state: cri_state(record).into(),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: record.finished_at,
        exit_code: record.exit_code,
        image: config.image,
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.clone(),
        reason: record.reason.clone(),
        message: record.message.clone(),
        labels: config.labels,
        annotations: config.annotations,
        mounts: config.mounts,
        log_path: record.log_path.clone(),
        resources: resources.map(|linux| ContainerResources { linux: Some(linux), windows: None }),
        user: record.user.clone().map(|linux| ContainerUser { linux: Some(linux) }),
        stop_signal: signal::of_status(record.stop_signal).into(),
    }
}

fn passes(record: &ContainerRecord, filter: &ContainerFilter) -> bool {
    record.id.starts_with(&filter.id)
        && record.pod_id.starts_with(&filter.pod_sandbox_id)
        && filter.state.is_none_or(|state| state.state() == cri_state(record))
        && record.config.as_ref().is_some_and(|config| matches_labels(&config.labels, &filter.label_selector))
}

/// Whether `labels` have every pair of `selector`: "All labels are ANDed" (CRI).
pub(crate) fn matches_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}
