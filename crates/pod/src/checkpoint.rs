//! The archive of a running container: CRI CheckpointContainer, and the same with the options that CRI has no fields for.
//!
//! The daemon contributes what it knows about the container; the shim freezes, and writes. No memory of the container
//! passes through the daemon.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stasis_checkpoint::{ContainerDescription, ImageDescription, MountDescription, PodDescription, Profile};
use stasis_cri_api::runtime::PodSandboxConfig;
use stasis_shim_api::{CheckpointRequest, CriuOptions};
use tracing::info;

use crate::error::{Error, IoContext as _, Kind, Result};
use crate::exec::read_spec;
use crate::pods::{Container, Pods, RestoreLevel};
use crate::record::ContainerRecord;
use crate::sandbox::SANDBOX_RUNTIME;
use crate::state::{Operation, admit};

/// Directory of the archive's first members below the bundle, while a checkpoint is made.
const MEMBERS: &str = "checkpoint-members";
/// What the kubelet's own test of nodes takes as "this node cannot do it" (containerd's words).
const UNSUPPORTED: &str = "checkpoint/restore support not available";

/// What a checkpoint is to be.
#[derive(Clone, Debug)]
pub struct CheckpointOptions {
    /// Container ID, or a unique prefix of one.
    pub container_id: String,
    /// Absolute path of the archive.
    pub location: PathBuf,
    /// Time after which the container runs again in any case; none for the configured maximum.
    pub timeout: Option<Duration>,
    /// End the container once the archive is durable.
    pub stop: bool,
}

/// What a checkpoint cost.
#[derive(Clone, Debug)]
pub struct CheckpointReport {
    /// Path of the archive.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// How long the container did not run.
    pub frozen: Duration,
    /// The whole operation.
    pub total: Duration,
}

impl Pods {
    /// Writes the checkpoint of a running container to an archive. The container runs on, unless it is to be stopped.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it runs and nothing else holds it; `DeadlineExceeded` when the time is up;
    /// `ResourceExhausted` without space; `Internal` with CRIU's diagnosis. After every error the container runs as
    /// before, and no part of an archive is left.
    pub async fn checkpoint_container(&self, options: CheckpointOptions) -> Result<CheckpointReport> {
        let container = self.container(&options.container_id)?;
        let pods = self.clone();
        self.detached(async move {
            let _operation = container.operation.try_lock().map_err(|_| {
                Error::precondition(format!(
                    "container {} is held by another operation: try again after it",
                    container.id
                ))
            })?;
            let made = pods.checkpoint(&container, &options).await;
            let members = pods.bundle(&container.pod_id, &container.id).join(MEMBERS);
            crate::pods::remove_tree(&members).await.doing(format_args!("remove {}", members.display()))?;
            pods.counters.checkpoint(&made);
            made.map_err(|error| error.context(format_args!("checkpoint of container {}", container.id)))
        })
        .await
    }

    async fn checkpoint(&self, container: &Arc<Container>, options: &CheckpointOptions) -> Result<CheckpointReport> {
        self.allow_checkpoint()?;
        check_location(&options.location)?;
        admit(Operation::Checkpoint, container.record().phase(), &container.id)?;
        let pod = self.pod(&container.pod_id)?;
        let (handler, runtime) = self.handler(&pod.record().handler)?;
        if runtime.runtime != SANDBOX_RUNTIME {
            return Err(Error::precondition(format!(
                "containers of the runtime handler {handler:?} cannot be checkpointed: its shim is {}, and only \
                 {SANDBOX_RUNTIME} writes archives",
                runtime.runtime
            )));
        }
        let sandbox = pod
            .sandbox()
            .ok_or_else(|| Error::new(Kind::Unavailable, format!("container {} has no shim any more", container.id)))?;
        let record = container.record().clone();
        let members = self.bundle(&pod.id, &container.id).join(MEMBERS);
        std::fs::create_dir_all(&members).doing(format_args!("make {}", members.display()))?;
        let pod_config = pod.record().config.clone().unwrap_or_default();
        self.describe(&record, &pod_config)?
            .write_members(&members, Profile::Containerd)
            .map_err(|error| Error::internal(error.to_string()))?;
        let request = CheckpointRequest {
            id: container.id.clone(),
            archive: options.location.clone(),
            members,
            upper: self.images.upper_dir(&container.id),
            log: (!record.log_path.is_empty()).then(|| PathBuf::from(&record.log_path)),
            timeout_ms: self.timeout_ms(options.timeout),
            leave_running: !options.stop,
            criu: CriuOptions::default(),
        };
        let report = sandbox.checkpoint(&request).await?;
        info!(
            container = container.id,
            archive = %options.location.display(),
            bytes = report.archive_bytes,
            frozen_us = report.frozen_us,
            total_us = report.total_us,
            pages = report.pages_written,
            "checkpointed"
        );
        Ok(CheckpointReport {
            path: options.location.clone(),
            size_bytes: report.archive_bytes,
            frozen: Duration::from_micros(report.frozen_us),
            total: Duration::from_micros(report.total_us),
        })
    }

    fn allow_checkpoint(&self) -> Result<()> {
        if self.policy().restore_level == RestoreLevel::None {
            return Err(Error::new(
                Kind::PermissionDenied,
                "this node does not allow checkpoints: set `level` under [checkpoint] in the configuration of stasisd",
            ));
        }
        match &self.config.checkpoint_unavailable {
            Some(why) => Err(Error::new(Kind::Unknown, format!("{UNSUPPORTED}: {why}"))),
            None => Ok(()),
        }
    }

    /// "Timeout of zero means to use the CRI default", which is our maximum; the maximum caps every other.
    fn timeout_ms(&self, asked: Option<Duration>) -> u64 {
        let max = self.policy().checkpoint_timeout_max;
        let timeout = asked.filter(|asked| !asked.is_zero()).map_or(max, |asked| asked.min(max));
        u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)
    }

    fn describe(&self, record: &ContainerRecord, pod: &PodSandboxConfig) -> Result<ContainerDescription> {
        let config = record.config.clone().unwrap_or_default();
        let metadata = config.metadata.unwrap_or_default();
        let pod_metadata = pod.metadata.clone().unwrap_or_default();
        let spec = serde_json::to_value(read_spec(&self.bundle(&record.pod_id, &record.id))?)
            .map_err(|error| Error::internal(format!("cannot write the OCI spec: {error}")))?;
        Ok(ContainerDescription {
            id: record.id.clone(),
            name: metadata.name,
            attempt: metadata.attempt,
            pod: PodDescription {
                id: record.pod_id.clone(),
                name: pod_metadata.name,
                namespace: pod_metadata.namespace,
                uid: pod_metadata.uid,
            },
            image: self.describe_image(record),
            runtime: SANDBOX_RUNTIME.to_owned(),
            labels: config.labels.into_iter().collect(),
            annotations: config.annotations.into_iter().collect(),
            created_at: record.created_at,
            started_at: record.started_at,
            restored_at: if record.restored { record.started_at } else { 0 },
            pid: record.pid,
            log_path: record.log_path.clone(),
            mounts: config
                .mounts
                .into_iter()
                .map(|mount| MountDescription {
                    readonly: mount.readonly,
                    selinux_relabel: mount.selinux_relabel,
                    propagation: mount.propagation,
                    container_path: mount.container_path,
                    host_path: mount.host_path,
                })
                .collect(),
            spec,
        })
    }

    /// The image that the root file system stands on: of a restored container the base, not the checkpoint.
    fn describe_image(&self, record: &ContainerRecord) -> ImageDescription {
        let base = self.images.resolve(&record.base_image_id);
        let requested = record.config.as_ref().and_then(|config| config.image.as_ref());
        let requested = requested.filter(|_| !record.restored).map(|image| {
            if image.user_specified_image.is_empty() { image.image.clone() } else { image.user_specified_image.clone() }
        });
        let reference = base.as_ref().and_then(|image| image.references.first().cloned());
        let name = reference.clone().unwrap_or_else(|| record.base_image_id.clone());
        ImageDescription {
            requested: requested.unwrap_or_else(|| name.clone()),
            digest_reference: base.and_then(|image| image.repo_digests.first().cloned()).unwrap_or_default(),
            name,
            id: record.base_image_id.clone(),
        }
    }
}

fn check_location(location: &Path) -> Result<()> {
    if !location.is_absolute() || location.file_name().is_none() {
        return Err(Error::invalid(format!(
            "the archive's location {:?} must be an absolute path of a file",
            location.display().to_string()
        )));
    }
    match location.parent() {
        Some(parent) if parent.is_dir() => Ok(()),
        parent => Err(Error::invalid(format!(
            "the archive's directory {} is not there: make it first",
            parent.unwrap_or(Path::new("/")).display()
        ))),
    }
}
