//! The administration interface stasis.v1: what operators do and CRI has no call for.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stasis_cri_api::stasis::admin_server::Admin;
use stasis_cri_api::stasis::*;
use stasis_image::{Auth, Image};
use stasis_pod::{CheckpointOptions, CheckpointReport, ImageTarget, Keep, Progress, Retention};
use tonic::codegen::BoxStream;
use tonic::{Request, Status, async_trait};

use crate::progress::{self, Reports};
use crate::request::{absolute, required};
use crate::status::{from_image, from_pod, interrupted};
use crate::telemetry::Telemetry;
use crate::{Answer, Parts, call};

/// The service.
#[derive(Debug)]
pub(crate) struct AdminCalls(pub(crate) Arc<Parts>, pub(crate) Arc<Telemetry>);

#[async_trait]
impl Admin for AdminCalls {
    async fn doctor(&self, _: Request<DoctorRequest>) -> Answer<DoctorResponse> {
        call::read("Doctor", "", async {
            let doctor = Arc::clone(&self.0.doctor);
            let findings = tokio::task::spawn_blocking(move || doctor()).await.map_err(interrupted)?;
            Ok(DoctorResponse { findings })
        })
        .await
    }

    async fn dump(&self, _: Request<DumpRequest>) -> Answer<DumpResponse> {
        call::read("Dump", "", async {
            let mut state = self.0.pods.dump();
            let calls = self.1.open().into_iter().map(|open| {
                serde_json::json!({ "method": open.method, "seconds": open.age().as_secs_f64(), "trace": open.trace })
            });
            state["calls"] = calls.collect();
            state["version"] = self.0.version.as_str().into();
            state["images"] = self.0.images.list().len().into();
            Ok(DumpResponse { json: state.to_string() })
        })
        .await
    }

    type PullImageStream = BoxStream<ImageProgress>;
    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<Self::PullImageStream> {
        let PullImageRequest { reference, credentials } = request.into_inner();
        required(&reference, "reference")?;
        let images = self.0.images.clone();
        progress::stream(self.0.pods.operation(), "PullImage", reference.clone(), |reports| async move {
            let pulled = images.pull(&reference, credentials.map(auth), image_reports(reports)).await;
            let image = pulled.map_err(from_image)?;
            Ok(done(result_of(&image)))
        })
    }

    type PushImageStream = BoxStream<ImageProgress>;
    async fn push_image(&self, request: Request<PushImageRequest>) -> Answer<Self::PushImageStream> {
        let PushImageRequest { image, target, credentials } = request.into_inner();
        required(&image, "image")?;
        let images = self.0.images.clone();
        progress::stream(self.0.pods.operation(), "PushImage", image.clone(), |reports| async move {
            let target = Some(target.as_str()).filter(|target| !target.is_empty());
            let digest = images.push(&image, target, credentials.map(auth), image_reports(reports)).await;
            let digest = digest.map_err(from_image)?.to_string();
            let image_id = images.resolve(&image).map(|image| image.id.clone()).unwrap_or_default();
            let references = vec![target.unwrap_or(&image).to_owned()];
            Ok(done(ImageResult { image_id, digest, references }))
        })
    }

    type ImportImageStream = BoxStream<ImageProgress>;
    async fn import_image(&self, request: Request<ImportImageRequest>) -> Answer<Self::ImportImageStream> {
        let ImportImageRequest { path, reference } = request.into_inner();
        let archive = absolute(&path, "path")?.to_owned();
        let images = self.0.images.clone();
        progress::stream(self.0.pods.operation(), "ImportImage", path, |reports| async move {
            let reference = Some(reference.as_str()).filter(|reference| !reference.is_empty());
            let imported = images.import(&archive, reference, image_reports(reports)).await;
            let imported = imported.map_err(from_image)?;
            let first = imported.first().ok_or_else(|| {
                Status::failed_precondition(format!("{} holds no image for this machine", archive.display()))
            })?;
            let references = imported.iter().flat_map(|image| image.references.clone()).collect();
            Ok(done(ImageResult { references, ..result_of(first) }))
        })
    }

    type ExportImageStream = BoxStream<ImageProgress>;
    async fn export_image(&self, request: Request<ExportImageRequest>) -> Answer<Self::ExportImageStream> {
        let ExportImageRequest { image, path } = request.into_inner();
        required(&image, "image")?;
        let archive = absolute(&path, "path")?.to_owned();
        let images = self.0.images.clone();
        progress::stream(self.0.pods.operation(), "ExportImage", image.clone(), |reports| async move {
            images.export(&image, &archive, image_reports(reports)).await.map_err(from_image)?;
            Ok(done(images.resolve(&image).map(|image| result_of(&image)).unwrap_or_default()))
        })
    }

    type CreateCheckpointStream = BoxStream<CheckpointProgress>;
    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Answer<Self::CreateCheckpointStream> {
        let request = request.into_inner();
        required(&request.container, "container")?;
        let location = match (request.path.as_str(), request.image.as_str()) {
            ("", "") => return Err(Status::invalid_argument("neither path nor image is set: say where it is to go")),
            ("", _) => PathBuf::new(),
            (path, "") => absolute(path, "path")?.to_owned(),
            _ => return Err(Status::invalid_argument("path and image are both set: a checkpoint goes to one of them")),
        };
        if request.push && request.image.is_empty() {
            return Err(Status::invalid_argument("push is set, and image is not: only images are pushed"));
        }
        let parts = Arc::clone(&self.0);
        progress::stream(self.0.pods.operation(), "CreateCheckpoint", request.container.clone(), |reports| async move {
            parts.create_checkpoint(request, location, reports).await
        })
    }

    async fn preflight_checkpoint(
        &self,
        request: Request<PreflightCheckpointRequest>,
    ) -> Answer<PreflightCheckpointResponse> {
        let PreflightCheckpointRequest { container, options, directory } = request.into_inner();
        call::read("PreflightCheckpoint", &container, async {
            required(&container, "container")?;
            let directory = (!directory.is_empty()).then(|| absolute(&directory, "directory")).transpose()?;
            let options = options.into_iter().collect();
            let found = self.0.pods.preflight_checkpoint(&container, &options, directory).await.map_err(from_pod)?;
            let json = serde_json::to_string(&found).map_err(|error| Status::internal(error.to_string()))?;
            Ok(PreflightCheckpointResponse { json })
        })
        .await
    }

    async fn list_checkpoints(&self, _: Request<ListCheckpointsRequest>) -> Answer<ListCheckpointsResponse> {
        call::read("ListCheckpoints", "", async {
            let entries = self.0.pods.checkpoints().await.map_err(from_pod)?;
            Ok(ListCheckpointsResponse { checkpoints: entries.into_iter().map(entry).collect() })
        })
        .await
    }

    async fn remove_checkpoints(
        &self,
        request: Request<RemoveCheckpointsRequest>,
    ) -> Answer<RemoveCheckpointsResponse> {
        let names = request.into_inner().names;
        call::change("RemoveCheckpoints", &names.join(" "), async {
            let removed = self.0.pods.remove_checkpoints(&names).await.map_err(from_pod)?;
            Ok(RemoveCheckpointsResponse { removed: removed.into_iter().map(entry).collect() })
        })
        .await
    }

    async fn prune_checkpoints(&self, request: Request<PruneCheckpointsRequest>) -> Answer<RemoveCheckpointsResponse> {
        let PruneCheckpointsRequest { keep, max_age_seconds, dry_run } = request.into_inner();
        let retention = (keep > 0 || max_age_seconds > 0).then(|| Retention {
            container: Keep { count: keep.into(), bytes: 0 },
            max_age: Duration::from_secs(max_age_seconds),
            ..Retention::default()
        });
        call::change("PruneCheckpoints", "", async {
            let removed = self.0.pods.prune_checkpoints(retention.as_ref(), dry_run).await.map_err(from_pod)?;
            Ok(RemoveCheckpointsResponse { removed: removed.into_iter().map(entry).collect() })
        })
        .await
    }

    async fn pin_checkpoint(&self, request: Request<PinCheckpointRequest>) -> Answer<PinCheckpointResponse> {
        let PinCheckpointRequest { name, unpin } = request.into_inner();
        call::change("PinCheckpoint", &name, async {
            let pinned = self.0.pods.pin_checkpoint(&name, !unpin).await.map_err(from_pod)?;
            Ok(PinCheckpointResponse { checkpoint: Some(entry(pinned)) })
        })
        .await
    }

    type CheckpointToImageStream = BoxStream<ImageProgress>;
    async fn checkpoint_to_image(
        &self,
        request: Request<CheckpointToImageRequest>,
    ) -> Answer<Self::CheckpointToImageStream> {
        let CheckpointToImageRequest { path, reference, self_contained } = request.into_inner();
        required(&reference, "reference")?;
        let archive = absolute(&path, "path")?.to_owned();
        let pods = self.0.pods.clone();
        progress::stream(self.0.pods.operation(), "CheckpointToImage", path, |reports| async move {
            let target = ImageTarget { reference, self_contained };
            let image = pods.image_of_archive(&archive, &target, image_reports(reports)).await.map_err(from_pod)?;
            Ok(done(result_of(&image)))
        })
    }

    async fn inspect_checkpoint(
        &self,
        request: Request<InspectCheckpointRequest>,
    ) -> Answer<InspectCheckpointResponse> {
        let source = request.into_inner().source;
        call::read("InspectCheckpoint", &source, async {
            required(&source, "source")?;
            let place = self.0.checkpoint_place(&source)?;
            let inspection = tokio::task::spawn_blocking(move || place.inspect()).await.map_err(interrupted)??;
            let json = serde_json::to_string(&inspection).map_err(|error| Status::internal(error.to_string()))?;
            Ok(InspectCheckpointResponse { json })
        })
        .await
    }
}

impl Parts {
    /// Checkpoints a container to `location`, or to an image, which is then pushed if that is asked for.
    async fn create_checkpoint(
        &self,
        request: CreateCheckpointRequest,
        location: PathBuf,
        reports: Reports<CheckpointProgress>,
    ) -> Result<CheckpointProgress, Status> {
        let CreateCheckpointRequest { container, timeout_seconds, options, image: reference, push, .. } = request;
        let options = CheckpointOptions {
            container_id: container,
            location,
            timeout: (timeout_seconds > 0).then(|| Duration::from_secs(timeout_seconds.into())),
            options: options.into_iter().collect(),
            progress: Some(checkpoint_reports(reports.clone())),
        };
        if reference.is_empty() {
            let report = self.pods.checkpoint_container(options).await.map_err(from_pod)?;
            return Ok(checkpoint_done(report, None));
        }
        let target = ImageTarget { reference: reference.clone(), self_contained: request.self_contained };
        let stored = self.pods.checkpoint_to_image(options, target, blob_reports(reports.clone()));
        let (report, image) = stored.await.map_err(from_pod)?;
        let mut result = result_of(&image);
        if push {
            let credentials = request.credentials.map(auth);
            let pushed = self.images.push(&reference, None, credentials, blob_reports(reports)).await;
            result.digest = pushed.map_err(from_image)?.to_string();
        }
        Ok(checkpoint_done(report, Some(result)))
    }
}

/// The last message of a checkpoint.
fn checkpoint_done(report: CheckpointReport, image: Option<ImageResult>) -> CheckpointProgress {
    let path = if image.is_some() { String::new() } else { report.path.display().to_string() };
    CheckpointProgress {
        bytes_done: report.size_bytes,
        bytes_total: report.size_bytes,
        done: Some(CheckpointResult {
            path,
            size_bytes: report.size_bytes,
            frozen_us: micros(report.frozen),
            total_us: micros(report.total),
            left_running: report.left_running,
            image,
        }),
        ..checkpoint_progress("done")
    }
}

fn entry(of: stasis_pod::CheckpointEntry) -> CheckpointEntry {
    CheckpointEntry {
        id: of.id,
        container_id: of.container_id,
        container: of.container,
        pod: of.pod,
        namespace: of.namespace,
        path: of.path,
        image: of.image,
        size_bytes: of.size_bytes,
        created_at: of.created_at,
        pinned: of.pinned,
    }
}

/// The receiver of the progress of a checkpoint.
fn checkpoint_reports(reports: Reports<CheckpointProgress>) -> Progress {
    Progress(Arc::new(move |phase, bytes_done, bytes_total| {
        let phase = phase.to_owned();
        reports.send("", &phase.clone(), false, || CheckpointProgress { phase, bytes_done, bytes_total, done: None });
    }))
}

/// The receiver of the progress of a checkpoint's image.
fn blob_reports(reports: Reports<CheckpointProgress>) -> impl Fn(stasis_image::Progress) + Send + Sync + 'static {
    move |progress| {
        let complete = progress.total > 0 && progress.done >= progress.total;
        let subject = progress.digest.unwrap_or_default();
        reports.send(&subject, progress.phase, complete, || CheckpointProgress {
            phase: progress.phase.into(),
            bytes_done: progress.done,
            bytes_total: progress.total,
            done: None,
        });
    }
}

/// Where a checkpoint lies on this node.
enum Place {
    Archive(PathBuf),
    Unpacked(PathBuf),
}

impl Place {
    fn inspect(&self) -> Result<stasis_checkpoint::Inspection, Status> {
        match self {
            Self::Archive(path) => stasis_checkpoint::inspect(open(path)?).map_err(|error| from_pod(error.into())),
            Self::Unpacked(dir) => stasis_checkpoint::inspect_dir(dir).map_err(|error| from_pod(error.into())),
        }
    }
}

impl Parts {
    /// A path is an archive, anything else an image.
    fn checkpoint_place(&self, source: &str) -> Result<Place, Status> {
        if Path::new(source).is_absolute() {
            return Ok(Place::Archive(source.into()));
        }
        let image = self.images.resolve(source).ok_or_else(|| {
            Status::not_found(format!("{source} is neither an absolute path nor an image on this node"))
        })?;
        let dir = self.images.checkpoint_dir(&image).ok_or_else(|| {
            Status::failed_precondition(format!("image {source} is not marked as a checkpoint by any annotation"))
        })?;
        Ok(Place::Unpacked(dir))
    }
}

fn open(archive: &Path) -> Result<File, Status> {
    File::open(archive).map_err(|error| {
        let message = format!("cannot open the archive {}: {error}", archive.display());
        match error.kind() {
            std::io::ErrorKind::NotFound => Status::not_found(message),
            _ => Status::invalid_argument(message),
        }
    })
}

fn auth(credentials: RegistryCredentials) -> Auth {
    Auth { username: credentials.username, password: credentials.password, ..Auth::default() }
}

/// The receiver of an image operation's progress, which sends it on.
fn image_reports(reports: Reports<ImageProgress>) -> impl Fn(stasis_image::Progress) + Send + Sync + 'static {
    move |progress| {
        let digest = progress.digest.unwrap_or_default();
        let complete = progress.total > 0 && progress.done >= progress.total;
        reports.send(&digest, progress.phase, complete, || ImageProgress {
            digest: digest.clone(),
            phase: progress.phase.into(),
            bytes_done: progress.done,
            bytes_total: progress.total,
            done: None,
        });
    }
}

fn result_of(image: &Image) -> ImageResult {
    ImageResult { image_id: image.id.clone(), digest: image.target.to_string(), references: image.references.clone() }
}

/// The last message of an image operation.
fn done(result: ImageResult) -> ImageProgress {
    ImageProgress { phase: "done".into(), done: Some(result), ..ImageProgress::default() }
}

fn checkpoint_progress(phase: &str) -> CheckpointProgress {
    CheckpointProgress { phase: phase.into(), ..CheckpointProgress::default() }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
