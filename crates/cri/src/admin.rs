//! The administration interface stasis.v1: what operators do and CRI has no call for.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stasis_checkpoint::EngineFacts;
use stasis_cri_api::stasis::admin_server::Admin;
use stasis_cri_api::stasis::*;
use stasis_image::{Auth, Image, NewLayer};
use stasis_pod::CheckpointOptions;
use tonic::codegen::BoxStream;
use tonic::{Request, Status, async_trait};

use crate::progress::{self, Reports};
use crate::request::{absolute, required};
use crate::status::{from_checkpoint, from_image, from_pod, interrupted};
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
        progress::stream("PullImage", reference.clone(), |reports| async move {
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
        progress::stream("PushImage", image.clone(), |reports| async move {
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
        progress::stream("ImportImage", path, |reports| async move {
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
        progress::stream("ExportImage", image.clone(), |reports| async move {
            images.export(&image, &archive, image_reports(reports)).await.map_err(from_image)?;
            Ok(done(images.resolve(&image).map(|image| result_of(&image)).unwrap_or_default()))
        })
    }

    type CreateCheckpointStream = BoxStream<CheckpointProgress>;
    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Answer<Self::CreateCheckpointStream> {
        let CreateCheckpointRequest { container, path, stop, timeout_seconds } = request.into_inner();
        required(&container, "container")?;
        let location = absolute(&path, "path")?.to_owned();
        let timeout = (timeout_seconds > 0).then(|| Duration::from_secs(timeout_seconds.into()));
        let pods = self.0.pods.clone();
        progress::stream("CreateCheckpoint", container.clone(), |reports| async move {
            reports.send("", "preparing", false, || checkpoint_progress("preparing"));
            let options = CheckpointOptions { container_id: container, location, timeout, stop };
            let report = pods.checkpoint_container(options).await.map_err(from_pod)?;
            Ok(CheckpointProgress {
                bytes_done: report.size_bytes,
                bytes_total: report.size_bytes,
                done: Some(CheckpointResult {
                    path: report.path.display().to_string(),
                    size_bytes: report.size_bytes,
                    frozen_us: micros(report.frozen),
                    total_us: micros(report.total),
                }),
                ..checkpoint_progress("done")
            })
        })
    }

    type CheckpointToImageStream = BoxStream<ImageProgress>;
    async fn checkpoint_to_image(
        &self,
        request: Request<CheckpointToImageRequest>,
    ) -> Answer<Self::CheckpointToImageStream> {
        let CheckpointToImageRequest { path, reference } = request.into_inner();
        required(&reference, "reference")?;
        let archive = absolute(&path, "path")?.to_owned();
        let parts = Arc::clone(&self.0);
        progress::stream("CheckpointToImage", path, |reports| async move {
            let image = parts.image_of_checkpoint(archive, &reference, image_reports(reports)).await?;
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

/// Where a checkpoint lies on this node.
enum Place {
    Archive(PathBuf),
    Unpacked(PathBuf),
}

impl Place {
    fn inspect(&self) -> Result<stasis_checkpoint::Inspection, Status> {
        match self {
            Self::Archive(path) => stasis_checkpoint::inspect(open(path)?).map_err(from_checkpoint),
            Self::Unpacked(dir) => stasis_checkpoint::inspect_dir(dir).map_err(from_checkpoint),
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

impl Parts {
    /// Makes an image of an archive: its bytes become the one layer, the base image's configuration is carried over.
    async fn image_of_checkpoint(
        &self,
        archive: PathBuf,
        reference: &str,
        report: impl Fn(stasis_image::Progress) + Send + Sync + 'static,
    ) -> Result<Arc<Image>, Status> {
        let size = std::fs::metadata(&archive).map(|file| file.len()).unwrap_or_default();
        report(stasis_image::Progress { digest: None, phase: "reading", done: 0, total: size });
        let base = match self.base_of(archive.clone()).await? {
            Some(base) => Some(self.images.config_json(&base).await.map_err(from_image)?),
            None => None,
        };
        let made = tokio::task::spawn_blocking(move || {
            stasis_checkpoint::image_from_archive(&archive, base.as_deref(), &EngineFacts::default())
        });
        let parts = made.await.map_err(interrupted)?.map_err(from_checkpoint)?;
        let layer = NewLayer { file: parts.layer, media_type: parts.layer_media_type.to_owned() };
        let added = self.images.add(reference, parts.config_json, vec![layer], parts.annotations, report);
        added.await.map_err(from_image)
    }

    /// The image that a checkpointed container ran from, if this node has it.
    async fn base_of(&self, archive: PathBuf) -> Result<Option<Arc<Image>>, Status> {
        let metadata = tokio::task::spawn_blocking({
            let archive = archive.clone();
            move || stasis_checkpoint::read_metadata(open(&archive)?).map_err(from_checkpoint)
        });
        let config = metadata.await.map_err(interrupted)??.config;
        // Surest first: by digest or ID, then by name.
        let names = [config.rootfs_image_ref, config.rootfs_image_id, config.rootfs_image_name, config.rootfs_image];
        let base = names.iter().filter(|name| !name.is_empty()).find_map(|name| self.images.resolve(name));
        if base.is_none() {
            tracing::warn!(
                archive = %archive.display(),
                images = ?names,
                "the image of the checkpointed container is not on this node: the new image says nothing of its user",
            );
        }
        Ok(base)
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
