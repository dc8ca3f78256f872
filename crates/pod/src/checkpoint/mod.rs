//! The archive of a running container: CRI CheckpointContainer, and the same with the options that CRI has no fields for.
//!
//! The daemon contributes what it knows about the container; the shim freezes, and writes. No memory of the container
//! passes through the daemon.

mod image;
mod index;
mod limits;
mod options;
mod preflight;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stasis_checkpoint::{ContainerDescription, Digests, ImageDescription, Member, MountDescription, PodDescription};
use stasis_cri_api::runtime::{Mount, PodSandboxConfig};
use stasis_shim_api::{CheckpointRequest, Tree, layout};
use stasis_task::Sandbox;
use tracing::{info, warn};

pub use self::image::ImageTarget;
pub use self::index::{CheckpointEntry, Keep, Retention};
pub use self::limits::CheckpointLimits;
pub(crate) use self::limits::Queue;
use self::limits::{Turn, check_location};
use self::options::Settings;
pub use self::options::{ANNOTATION_PREFIX, CheckpointPolicy, OPTIONS};
pub use self::preflight::Preflight;

use crate::error::{Error, IoContext as _, Kind, Result};
use crate::exec::read_spec;
use crate::pods::{Checkpoints, Container, Pods, blocking, remove_tree};
use crate::record::{ContainerRecord, now};
use crate::sandbox::SANDBOX_RUNTIME;
use crate::state::{Operation, admit};

/// What the name of the directory of an archive's first members begins with, below the bundle, while a checkpoint is made.
/// Each has its own: a worker whose daemon was killed may still read one.
const MEMBERS: &str = "checkpoint-members-";
/// How often the shim is asked how far it is: as often as an eye can follow.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Directory of the logs of CRIU that were kept, below the root directory; one a container.
const FAILURE_LOGS: &str = "checkpoint-logs";
/// So many logs of CRIU stay, the newest ones: each has up to a few megabytes, and containers come and go.
const FAILURE_LOGS_MAX: usize = 32;
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
    /// What [`OPTIONS`] lists, by name: the caller's choice, which comes before the pod's and the configuration's.
    pub options: BTreeMap<String, String>,
    /// Who is told now and then how far it is.
    pub progress: Option<Progress>,
}

/// Is told the phase (`waiting`, `preparing`, `frozen`, `writing`), the bytes written, and the bytes there will be or 0.
#[derive(Clone)]
pub struct Progress(pub Arc<ProgressReport>);

/// Takes phase, bytes written, bytes in all.
pub type ProgressReport = dyn Fn(&str, u64, u64) + Send + Sync;

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Progress")
    }
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
    /// Whether the container runs on.
    pub left_running: bool,
    pub(crate) digests: Option<Digests>,
    /// Reference of the image that the pod or the configuration asks for beside the archive.
    image: Option<String>,
    /// The row in the index, but for its ID and where it lies.
    pub(crate) entry: CheckpointEntry,
}

impl Pods {
    /// Writes the checkpoint of a running container to an archive. The container runs on, unless it is to be stopped.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it runs and nothing else holds it; `DeadlineExceeded` when the time is up;
    /// `ResourceExhausted` without space; `Internal` with CRIU's diagnosis. After every error the container runs as
    /// before, and no part of an archive is left.
    pub async fn checkpoint_container(&self, options: CheckpointOptions) -> Result<CheckpointReport> {
        self.container(&options.container_id)?;
        let location = options.location.clone();
        blocking(move || Ok(check_location(&location))).await.doing("look at the archive's directory")??;
        let pods = self.clone();
        self.detached(async move {
            let report = pods.write_archive(&options, false).await?;
            pods.remember_archive(&report).await?;
            if let Some(reference) = report.image.clone() {
                let target = ImageTarget { reference, self_contained: false };
                pods.make_image(&report.path, &target, report.digests.clone(), |_| {}).await?;
                pods.remember_image(&report, &target.reference).await?;
            }
            Ok(report)
        })
        .await
    }

    /// Writes an archive that is not in the index yet; with `digest`, with the digests that an image needs. To be
    /// detached: a container may be stopped for it.
    async fn write_archive(&self, options: &CheckpointOptions, digest: bool) -> Result<CheckpointReport> {
        let container = self.container(&options.container_id)?;
        let _operation = container.operation.try_lock().map_err(|_| {
            Error::precondition(format!("container {} is held by another operation: try again after it", container.id))
        })?;
        let members = format!("{MEMBERS}{}", stasis_sys::file::random_id());
        let members = self.bundle(&container.pod_id, &container.id).join(members);
        let made = self.checkpoint(&container, options, digest, members.clone()).await;
        if let Err(error) = remove_tree(&members).await {
            // It goes with the bundle; the checkpoint is what it is.
            warn!(container = container.id, %error, "cannot remove {}", members.display());
        }
        self.counters.checkpoint(&made);
        made.map_err(|error| error.context(format_args!("checkpoint of container {}", container.id)))
    }

    async fn checkpoint(
        &self,
        container: &Arc<Container>,
        options: &CheckpointOptions,
        digest: bool,
        members: PathBuf,
    ) -> Result<CheckpointReport> {
        let started = Instant::now();
        self.allow_checkpoint()?;
        admit(Operation::Checkpoint, container.record().phase(), &container.id)?;
        let pod = self.pod(&container.pod_id)?;
        let (handler, runtime) = self.handler(&pod.record().handler)?;
        let pod_config = pod.record().config.clone().unwrap_or_default();
        let settings = Settings::resolve(&runtime.checkpoint, &pod_config.annotations, &options.options)?;
        if digest {
            settings.check_for_image()?;
        }
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
        if let Some(Progress(tell)) = &options.progress {
            tell("waiting", 0, 0);
        }
        // Who removes the container waits for this operation; it has nothing to wait for once the container has ended.
        let turn = tokio::select! {
            turn = self.checkpoints.turn(self.timeout(options.timeout)) => turn?,
            () = container.exited() => {
                return Err(Error::precondition("it ended while its checkpoint waited for its turn"));
            }
        };
        let record = container.record().clone();
        std::fs::create_dir(&members).doing(format_args!("make {}", members.display()))?;
        self.describe(&record, &pod_config)?
            .write_members(&members, settings.profile)
            .map_err(|error| Error::internal(error.to_string()))?;
        let trees = self.trees(&settings, &record)?;
        let image = settings.image.clone();
        let mut request = self.request(&record, &options.location, members, trees, settings, &turn)?;
        request.digest |= digest;
        let report = {
            let work = sandbox.checkpoint(&request);
            let watch = watch(&sandbox, &container.id, options.progress.as_ref());
            tokio::select! {
                report = work => report?,
                never = watch => match never {},
            }
        };
        drop(turn);
        info!(
            container = container.id,
            archive = %options.location.display(),
            bytes = report.archive_bytes,
            pages = report.pages_written,
            frozen_us = report.frozen_us,
            criu_freezing_us = report.freezing_us,
            criu_frozen_us = report.criu_frozen_us,
            memory_dump_us = report.memory_dump_us,
            memory_write_us = report.memory_write_us,
            worker_us = report.total_us,
            "checkpointed"
        );
        Ok(CheckpointReport {
            path: options.location.clone(),
            size_bytes: report.archive_bytes,
            frozen: Duration::from_micros(report.frozen_us),
            total: started.elapsed(),
            left_running: request.leave_running,
            digests: report.digest.zip(report.diff_id).map(|(digest, diff_id)| Digests { digest, diff_id }),
            entry: entry(&record, &pod_config, report.archive_bytes),
            image,
        })
    }

    fn request(
        &self,
        record: &ContainerRecord,
        location: &Path,
        members: PathBuf,
        trees: Vec<Tree>,
        settings: Settings,
        turn: &Turn<'_>,
    ) -> Result<CheckpointRequest> {
        let logs = self.config.root.join(FAILURE_LOGS);
        if settings.keep_criu_log {
            std::fs::create_dir_all(&logs).doing(format_args!("make {}", logs.display()))?;
            keep_newest(&logs, FAILURE_LOGS_MAX).doing(format_args!("tidy {}", logs.display()))?;
        }
        Ok(CheckpointRequest {
            id: record.id.clone(),
            archive: location.to_owned(),
            members,
            upper: self.images.upper_dir(&record.id),
            log: (settings.log && !record.log_path.is_empty()).then(|| PathBuf::from(&record.log_path)),
            timeout_ms: u64::try_from(turn.left.as_millis()).unwrap_or(u64::MAX),
            leave_running: settings.leave_running,
            compression: settings.compression(),
            trees,
            buffer_max: Some(turn.buffer_max),
            space_reserve: turn.reserve,
            digest: settings.image.is_some(),
            failure_log: settings.keep_criu_log.then(|| logs.join(format!("{}.log", record.id))),
            criu: settings.criu,
        })
    }

    /// The directories outside the root file system that go into the archive.
    fn trees(&self, settings: &Settings, record: &ContainerRecord) -> Result<Vec<Tree>> {
        let mut trees = Vec::new();
        let shm = self.pod_dir(&record.pod_id).join(layout::SHM);
        if settings.dev_shm && shm.is_dir() {
            trees.push(Tree { member: Member::DevShm.name().into_owned(), dir: shm });
        }
        let mounts = record.config.as_ref().map(|config| config.mounts.as_slice()).unwrap_or_default();
        trees.extend(volume_trees(&settings.volumes, mounts)?);
        Ok(trees)
    }

    fn allow_checkpoint(&self) -> Result<()> {
        match self.checkpoints_possible() {
            Checkpoints::Available => Ok(()),
            Checkpoints::Forbidden => Err(Error::new(
                Kind::PermissionDenied,
                "this node does not allow checkpoints: set `level` under [checkpoint] in the configuration of stasisd",
            )),
            Checkpoints::Unavailable(why) => Err(Error::new(Kind::Unknown, format!("{UNSUPPORTED}: {why}"))),
        }
    }

    /// "Timeout of zero means to use the CRI default", which is our maximum; the maximum caps every other.
    fn timeout(&self, asked: Option<Duration>) -> Duration {
        let max = self.policy().checkpoint_timeout_max;
        asked.filter(|asked| !asked.is_zero()).map_or(max, |asked| asked.min(max))
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

/// Asks the shim now and then how far the checkpoint is, and tells `progress`; without one it only waits.
async fn watch(sandbox: &Sandbox, id: &str, progress: Option<&Progress>) -> std::convert::Infallible {
    let Some(Progress(tell)) = progress else { return std::future::pending().await };
    loop {
        if let Ok(Some(now)) = sandbox.checkpoint_progress(id).await {
            tell(&now.phase, now.bytes_done, now.bytes_total);
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    }
}

/// The row of a new checkpoint in the index, but for its ID and where it lies.
fn entry(record: &ContainerRecord, pod: &PodSandboxConfig, size_bytes: u64) -> CheckpointEntry {
    let metadata = pod.metadata.clone().unwrap_or_default();
    let name = record.config.as_ref().and_then(|config| config.metadata.as_ref()).map(|metadata| metadata.name.clone());
    CheckpointEntry {
        container_id: record.id.clone(),
        container: name.unwrap_or_default(),
        pod: metadata.name,
        namespace: metadata.namespace,
        pod_uid: metadata.uid,
        size_bytes,
        created_at: now(),
        ..CheckpointEntry::default()
    }
}

/// Removes all files in `dir` but the newest. Another checkpoint may do the same at this moment.
fn keep_newest(dir: &Path, most: usize) -> std::io::Result<()> {
    let age = |entry: std::fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
    let mut files: Vec<_> = std::fs::read_dir(dir)?.flatten().filter_map(age).collect();
    files.sort();
    let surplus = files.len().saturating_sub(most);
    files[..surplus].iter().try_for_each(|(_, path)| match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
}

/// The volumes that go into the archive, each with a member of its own.
fn volume_trees(volumes: &[String], mounts: &[Mount]) -> Result<Vec<Tree>> {
    let mut trees: Vec<Tree> = Vec::new();
    for volume in volumes {
        let path = volume.trim_end_matches('/');
        let mount = mounts.iter().find(|mount| mount.container_path.trim_end_matches('/') == path);
        let dir = mount.map(|mount| PathBuf::from(&mount.host_path)).filter(|dir| dir.is_dir()).ok_or_else(|| {
            let known: Vec<&str> = mounts.iter().map(|mount| mount.container_path.as_str()).collect();
            Error::invalid(format!("include-volumes: {volume} is no mount of a directory; there are: {known:?}"))
        })?;
        let member = volume_member(path)?;
        if trees.iter().any(|tree| tree.member == member) {
            return Err(Error::invalid(format!(
                "include-volumes: {volume} and another volume would both be {member} in the archive; name one of them"
            )));
        }
        trees.push(Tree { member, dir });
    }
    Ok(trees)
}

/// The member for a volume: its path in the container with dashes, as podman names volumes by plain words.
fn volume_member(volume: &str) -> Result<String> {
    let name = volume.trim_matches('/').replace('/', "-");
    let member = Member::parse(&format!("volumes/{name}.tar"));
    member.map(|member| member.name().into_owned()).ok_or_else(|| {
        Error::invalid(format!(
            "include-volumes: {volume} has no name for an archive: letters, digits, dots, underscores and dashes only"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_logs_stay() {
        let dir = tempfile::tempdir().unwrap();
        for age in 0..5u64 {
            let file = std::fs::File::create(dir.path().join(format!("{age}.log"))).unwrap();
            file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        keep_newest(dir.path(), 2).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["0.log", "1.log"]);
        keep_newest(dir.path(), 2).unwrap();
    }

    #[test]
    fn each_volume_has_a_member_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mount = |path: &str| Mount {
            container_path: path.to_owned(),
            host_path: dir.path().to_str().unwrap().to_owned(),
            ..Mount::default()
        };
        let mounts = [mount("/srv/data"), mount("/srv-data/"), mount("/cache")];
        let volumes = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let trees = volume_trees(&names, &mounts).map_err(|error| error.to_string())?;
            Ok::<_, String>(trees.into_iter().map(|tree| tree.member).collect::<Vec<_>>())
        };
        let members = ["volumes/srv-data.tar", "volumes/cache.tar"].map(str::to_owned);
        assert_eq!(volumes(&["/srv/data/", "/cache"]).unwrap(), members);
        assert_eq!(volumes(&["/srv-data"]).unwrap(), members[..1]);
        for (both, expected) in [
            (["/srv/data", "/srv-data"], "would both be volumes/srv-data.tar"),
            (["/cache", "/cache"], "would both be volumes/cache.tar"),
            (["/cache", "/absent"], "/absent is no mount of a directory"),
        ] {
            let error = volumes(&both).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
