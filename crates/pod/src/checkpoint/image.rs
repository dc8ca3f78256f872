//! A checkpoint as an OCI image in the local store: of a running container in one go, or of an archive that is there.
//!
//! The archive's bytes are the layer. In one go they are written into the store's own directory and hashed on their way,
//! so that nothing is read or copied again; what is left of a crash there is cleared by the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stasis_checkpoint::{Digests, ImageParts};
use stasis_image::{Image, KnownLayer, NewLayer, Progress};

use super::{CheckpointOptions, CheckpointReport};
use crate::error::{Error, IoContext as _, Result};
use crate::pods::{Pods, blocking};

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
        target: ImageTarget,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<(CheckpointReport, Arc<Image>)> {
        // Before a container is frozen for nothing.
        stasis_image::check_new_reference(&target.reference)?;
        let base_id = self.container(&options.container_id)?.record().base_image_id.clone();
        if target.self_contained && self.images.resolve(&base_id).is_none() {
            return Err(no_base());
        }
        let pods = self.clone();
        self.detached(async move {
            let archive = Unfinished(pods.images.new_layer_path());
            options.location = archive.0.clone();
            let report = pods.write_archive(&options, true).await?;
            let image = pods.make_image(&archive.0, &target, report.digests.clone(), progress).await?;
            pods.remember_image(&report, &target.reference).await?;
            Ok((report, image))
        })
        .await
    }

    /// Makes an image of an archive, of which it is a copy.
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
        let parts = blocking(move || {
            Ok(stasis_checkpoint::image_from_archive(
                &path,
                base_config.as_deref(),
                base_digest.as_deref(),
                &facts,
                digests,
            ))
        });
        let parts = parts.await.doing("make an image")?;
        let ImageParts { config_json, layer, layer_media_type, layer_digest, diff_id, layer_size, annotations, .. } =
            parts.map_err(|error| Error::from(error).context(archive.display()))?;
        let known = Some(KnownLayer { digest: layer_digest, diff_id, size: layer_size });
        let layer = NewLayer { file: layer, media_type: layer_media_type.to_owned(), known };
        let below = match (target.self_contained, base) {
            (false, _) => None,
            (true, Some(base)) => Some(base),
            (true, None) => return Err(no_base()),
        };
        let added = self.images.add(&target.reference, config_json, below, vec![layer], annotations, progress);
        Ok(added.await?)
    }

    /// The image that a checkpointed container ran from, if this node has it.
    async fn base_of_archive(&self, archive: &Path) -> Result<Option<Arc<Image>>> {
        let path = archive.to_owned();
        let metadata = blocking(move || {
            let file = std::fs::File::open(&path)
                .map_err(|source| stasis_checkpoint::Error::Io { what: format!("open {}", path.display()), source });
            Ok(file.and_then(stasis_checkpoint::read_metadata))
        });
        let metadata = metadata.await.doing("read the archive")?;
        let config = metadata.map_err(|error| Error::from(error).context(archive.display()))?.config;
        let names = config.base_candidates();
        let base = names.iter().find_map(|name| self.images.resolve(name));
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

fn no_base() -> Error {
    Error::precondition(
        "the image that the container ran from is not on this node, so a checkpoint image cannot hold its layers: pull \
         it, or make the plain form",
    )
}
