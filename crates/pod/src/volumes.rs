//! Image volumes: mounts of a request that name an image instead of a path of the host.
//!
//! Each is mounted below the pod's directory when its container is made, and unmounted when the container is removed. The
//! layers are held by a snapshot beside the container's own, so that the image can be removed meanwhile. A checkpoint has
//! nothing of an image volume but its place: it is mounted from outside, as any volume is.

use std::path::{Path, PathBuf};

use stasis_cri_api::runtime::{ContainerConfig, Mount};
use stasis_image::Image;
use tracing::{info, warn};

use crate::error::{Error, IoContext as _, Kind, Result};
use crate::pods::{Pods, remove_tree};
use crate::record::ContainerRecord;

/// Directory of the image volumes below a pod's: `<container>/<place of the mount in the request>`.
const DIRECTORY: &str = "volumes";

/// How the kubelet knows that a container failed for its image volume (cri-api, `errors.ErrImageVolumeMountFailed`).
const FAILED: &str = "ImageVolumeMountFailed";

/// The mounts of a request that name an image, with their places in it.
pub(crate) fn requested(config: &ContainerConfig) -> impl Iterator<Item = (usize, &Mount, &str)> {
    let mounts = config.mounts.iter().enumerate();
    mounts.filter_map(|(place, mount)| Some((place, mount, mount.image.as_ref()?.image.as_str())))
}

/// Where the image volume at `place` in a request is, in the directory of the container's image volumes.
pub(crate) fn path(dir: &Path, place: usize) -> PathBuf {
    dir.join(place.to_string())
}

fn key(id: &str, place: usize) -> String {
    format!("{id}.volume-{place}")
}

impl Pods {
    /// The directory of a container's image volumes.
    pub(crate) fn volumes_dir(&self, pod_id: &str, id: &str) -> PathBuf {
        self.pod_dir(pod_id).join(DIRECTORY).join(id)
    }

    /// Mounts the image volumes of a container, and returns the IDs of their images.
    ///
    /// # Errors
    /// `NotFound` for an image that is not here or a directory that it does not have; what was mounted stays, for
    /// [`Pods::release_volumes`].
    pub(crate) async fn mount_volumes(&self, pod_id: &str, id: &str, config: &ContainerConfig) -> Result<Vec<String>> {
        let dir = self.volumes_dir(pod_id, id);
        let mut images = Vec::new();
        for (place, mount, name) in requested(config) {
            let target = path(&dir, place);
            std::fs::create_dir_all(&target).doing(format_args!("make {}", target.display()))?;
            let mounted = self.mount_volume(mount, name, &key(id, place), &target).await;
            let image = mounted.map_err(|error| {
                Error::new(error.kind(), format!("{FAILED}: mount {:?}: {error}", mount.container_path))
            })?;
            images.push(image.id.clone());
        }
        Ok(images)
    }

    async fn mount_volume(&self, mount: &Mount, name: &str, key: &str, target: &Path) -> Result<std::sync::Arc<Image>> {
        let image = self.images.resolve(name).ok_or_else(|| {
            let words = format!("image {name} is not on this node: pull it before creating the container");
            Error::new(Kind::NotFound, words)
        })?;
        self.images.mount_volume(&image, key, target, Path::new(&mount.image_sub_path)).await?;
        Ok(image)
    }

    /// As [`Pods::release_volumes`], of a recorded container.
    pub(crate) async fn release_volumes_of(&self, record: &ContainerRecord) {
        let places: Vec<usize> = record.config.iter().flat_map(|c| requested(c).map(|(place, ..)| place)).collect();
        self.release_volumes(&record.pod_id, &record.id, places).await;
    }

    /// Unmounts the image volumes at `places` of a container that has no process, and lets go of their layers.
    pub(crate) async fn release_volumes(&self, pod_id: &str, id: &str, places: impl IntoIterator<Item = usize>) {
        let mut places = places.into_iter().peekable();
        if places.peek().is_none() {
            return;
        }
        let dir = self.volumes_dir(pod_id, id);
        if let Err(error) = stasis_sys::mount::unmount_all_below(&dir) {
            warn!(container = id, %error, "cannot unmount the image volumes of a container");
            return;
        }
        if let Err(error) = remove_tree(&dir).await {
            warn!(container = id, %error, "cannot remove the image volumes of a container");
        }
        for place in places {
            if let Err(error) = self.images.remove_rootfs(&key(id, place)).await {
                warn!(container = id, %error, "cannot let go of the layers of an image volume");
            }
        }
    }

    /// Unmounts image volumes whose container is gone: the daemon ended while it was made. Their layers are let go of with
    /// all others that no container stands for.
    pub(crate) async fn clear_volumes(&self) {
        for pod in self.pods.all() {
            let dir = self.pod_dir(&pod.id).join(DIRECTORY);
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let id = entry.file_name().to_string_lossy().into_owned();
                if self.containers.get(&id).is_some() {
                    continue;
                }
                info!(container = id, "unmounting image volumes that no container stands for");
                if let Err(error) = stasis_sys::mount::unmount_all_below(&entry.path()) {
                    warn!(container = id, %error, "cannot unmount image volumes that no container stands for");
                } else if let Err(error) = remove_tree(&entry.path()).await {
                    warn!(container = id, %error, "cannot remove image volumes that no container stands for");
                }
            }
        }
    }
}
