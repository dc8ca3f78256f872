//! Root file systems of containers: a writable layer on an image's layers, and looks into either.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stasis_snapshot::Usage;
use stasis_sys::mount::Mount;

use crate::error::{Error, Result, io_error, snapshot_error};
use crate::{Image, Images, blocking};

impl Images {
    /// Makes a writable layer `key` on an image and returns the mounts that make the root file system. From then on the image's
    /// layers stay, even if the image is removed.
    pub async fn prepare_rootfs(&self, image: &Image, key: &str) -> Result<Vec<Mount>> {
        let gate = self.inner.leases.gate.clone().lock_owned().await;
        let (inner, key, layers) = (self.inner.clone(), key.to_owned(), image.chain_ids.clone());
        let id = image.id.clone();
        blocking(move || {
            let _gate = gate;
            // The image may have been removed since it was looked up.
            if !layers.iter().all(|layer| inner.snapshots.has_layer(layer)) {
                return Err(Error::NotFound { name: id });
            }
            inner.snapshots.prepare(&key, &layers).map_err(snapshot_error(format!("make the root file system {key}")))
        })
        .await
    }

    /// The mounts of a root file system that was prepared.
    pub fn rootfs_mounts(&self, key: &str) -> Result<Vec<Mount>> {
        self.inner.snapshots.mounts(key).map_err(snapshot_error(format!("find the root file system {key}")))
    }

    /// The writable layer of a root file system, in overlayfs' own form.
    pub fn upper_dir(&self, key: &str) -> PathBuf {
        self.inner.snapshots.upper_dir(key)
    }

    /// Applies a layer (a tar, compressed or not) to the writable layer of a root file system that is not mounted: what a
    /// checkpoint carries of it. Blocks.
    pub fn apply_diff(&self, key: &str, tar: impl io::Read) -> Result<()> {
        let applied = self.inner.snapshots.apply_diff(key, tar, stasis_snapshot::Limits::LAYER);
        applied.map_err(snapshot_error(format!("apply a layer to the root file system {key}")))
    }

    /// Deletes files, each with all below it, from a root file system that is not mounted. Blocks.
    pub fn delete_paths(&self, key: &str, paths: &[String]) -> Result<()> {
        let deleted = self.inner.snapshots.delete_paths(key, paths);
        deleted.map_err(snapshot_error(format!("delete files of the root file system {key}")))
    }

    /// Deletes a root file system, which must not be mounted any more, and the layers that only it still needed. One that
    /// is not there is no error.
    pub async fn remove_rootfs(&self, key: &str) -> Result<()> {
        let (inner, key) = (self.inner.clone(), key.to_owned());
        blocking(move || {
            let needed: BTreeMap<String, Vec<String>> =
                inner.snapshots.active().map_err(snapshot_error("list the root file systems"))?.into_iter().collect();
            inner.snapshots.remove(&key).map_err(snapshot_error(format!("delete the root file system {key}")))?;
            // Only a container that outlived its image leaves layers to collect.
            let images = inner.store.list();
            let orphaned = needed.get(&key).is_some_and(|layers| {
                layers.last().is_some_and(|top| !images.iter().any(|image| image.chain_ids.contains(top)))
            });
            if orphaned { crate::gc::collect(&inner) } else { Ok(()) }
        })
        .await
    }

    /// Keys of all root file systems.
    pub fn rootfs_keys(&self) -> Result<Vec<String>> {
        let active = self.inner.snapshots.active().map_err(snapshot_error("list the root file systems"))?;
        Ok(active.into_iter().map(|(key, _)| key).collect())
    }

    /// What a root file system's writable layer takes on disk.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        self.inner.snapshots.usage(key).map_err(snapshot_error(format!("measure the root file system {key}")))
    }

    /// Reads a file of an image as a container would see it before it runs: whiteouts, opaque directories and links are
    /// honoured across layers, and nothing outside of the image is ever touched. `None` if there is no such file; an error if it
    /// is not a regular file or has more than `limit` bytes.
    pub fn read_rootfs_file(&self, image: &Image, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        if image.chain_ids.is_empty() {
            return Ok(None);
        }
        let view = self.inner.snapshots.open_view(&image.chain_ids);
        let view = view.map_err(snapshot_error(format!("look into image {}", image.id)))?;
        match view.read(Path::new(path), limit) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(io_error(format!("read {path} of image {}", image.id))(error)),
        }
    }

    /// The directory with the members of a checkpoint, if the image is one: its manifest says so, and it has one layer, or that
    /// on the layers of its base image.
    pub fn checkpoint_dir(&self, image: &Image) -> Option<PathBuf> {
        let layer = image.checkpoint_layer()?;
        Some(self.inner.snapshots.layer_dir(&image.chain_ids[layer]))
    }

    /// The image below the checkpoint in a self-contained checkpoint image: the same configuration on the layers below.
    pub fn base_of(&self, image: &Image) -> Option<Arc<Image>> {
        let layers = image.checkpoint_layer().filter(|layers| *layers > 0)?;
        Some(Arc::new(Image { chain_ids: image.chain_ids[..layers].to_vec(), ..image.clone() }))
    }
}
