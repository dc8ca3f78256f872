//! A checkpoint as an OCI image in the local store: of a running container in one go, or of an archive that is there.
//!
//! The archive's bytes are the layer. In one go they are written into the store's own directory and hashed on their way,
//! so that nothing is read or copied again; what is left of a crash there is cleared by the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stasis_checkpoint::{Digests, ImageParts};
use stasis_image::{Image, KnownLayer, NewLayer, Progress};

use super::{CheckpointOptions, CheckpointReport};
use crate::error::{Error, Kind, Result};
use crate::pods::Pods;

/// What a checkpoint image is to be.
#[derive(Clone, Debug)]
pub struct ImageTarget {
    /// Its reference, with a tag.
    pub reference: String,
    /// Whether its manifest names the base image's layers before the checkpoint's own, so that one pull brings all. Peers
    /// take the form with one layer.
    pub self_contained: bool,
}

impl Pods {
    /// Checkpoints a running container into an image. `options.location` is not looked at.
    ///
    /// # Errors
    /// As [`Pods::checkpoint_container`], and of making an image; then there is neither image nor archive.
    pub async fn checkpoint_to_image(
        &self,
        mut options: CheckpointOptions,
        target: &ImageTarget,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<(CheckpointReport, Arc<Image>)> {
        // Before a container is frozen for nothing.
        stasis_image::check_new_reference(&target.reference)?;
        let archive = Unfinished(self.images.new_layer_path());
        options.location = archive.0.clone();
        let report = self.checkpoint_with_digests(options).await?;
        let image = self.make_image(&archive.0, target, report.digests.clone(), progress).await?;
        self.remember_image(&report, &target.reference).await?;
        Ok((report, image))
    }

    /// Makes an image of an archive. On the file system of the store it is not copied: nobody may write to it afterwards.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no archive, and of making an image.
    pub async fn image_of_archive(
        &self,
        archive: &Path,
        target: &ImageTarget,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Arc<Image>> {
        let size = std::fs::metadata(archive).map(|file| file.len()).unwrap_or_default();
        progress(Progress { digest: None, phase: "reading", done: 0, total: size });
        self.make_image(archive, target, None, progress).await
    }

    pub(super) async fn make_image(
        &self,
        archive: &Path,
        target: &ImageTarget,
        digests: Option<Digests>,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Arc<Image>> {
        let base = self.base_of_archive(archive).await?;
        let base_config = match &base {
            Some(base) => Some(self.images.config_json(base).await?),
            None => None,
        };
        let base_digest = base.as_ref().map(|base| base.manifest.to_string());
        let (path, facts) = (archive.to_owned(), self.config.engine_facts.clone());
        let known = digests.clone();
        let parts = blocking(move || {
            stasis_checkpoint::image_from_archive(&path, base_config.as_deref(), base_digest.as_deref(), &facts, known)
        });
        let ImageParts { config_json, layer, layer_media_type, layer_digest, diff_id, layer_size, annotations, .. } =
            parts.await?.map_err(|error| archive_error(&error, archive))?;
        let known = digests.map(|_| KnownLayer { digest: layer_digest, diff_id, size: layer_size });
        let layer = NewLayer { file: layer, media_type: layer_media_type.to_owned(), known };
        let below = match (target.self_contained, base) {
            (false, _) => None,
            (true, Some(base)) => Some(base),
            (true, None) => {
                return Err(Error::precondition(
                    "the image that the container ran from is not on this node, so a checkpoint image cannot hold its \
                     layers: pull it, or make the plain form",
                ));
            }
        };
        let added = self.images.add(&target.reference, config_json, below, vec![layer], annotations, progress);
        Ok(added.await?)
    }

    /// The image that a checkpointed container ran from, if this node has it.
    async fn base_of_archive(&self, archive: &Path) -> Result<Option<Arc<Image>>> {
        let path = archive.to_owned();
        let metadata = blocking(move || {
            let file = std::fs::File::open(&path)
                .map_err(|source| stasis_checkpoint::Error::Io { what: format!("open {}", path.display()), source })?;
            stasis_checkpoint::read_metadata(file)
        });
        let config = metadata.await?.map_err(|error| archive_error(&error, archive))?.config;
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
        Ok(base.map(|base| self.images.base_of(&base).unwrap_or(base)))
    }
}

/// A file that goes away unless it was moved.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::internal(format!("making an image ended abnormally: {error}")))
}

fn archive_error(error: &stasis_checkpoint::Error, archive: &Path) -> Error {
    use std::io::ErrorKind;

    use stasis_checkpoint::Error as Archive;
    let kind = match error {
        Archive::Refused(_) | Archive::Malformed { .. } | Archive::Missing(_) => Kind::InvalidArgument,
        Archive::NoSpace { .. } => Kind::ResourceExhausted,
        Archive::Io { source, .. } => match source.kind() {
            ErrorKind::NotFound => Kind::NotFound,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
            _ => Kind::Internal,
        },
    };
    Error::new(kind, format!("{}: {error}", archive.display()))
}
