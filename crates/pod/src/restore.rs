//! A container out of a checkpoint: found, checked against the request, its writable layer and log carried over.
//!
//! The archive is a hostile party's claim. It decides what runs inside the container and nothing else: mounts,
//! devices, labels, annotations, limits and security come from the request alone, and what the archive says of them is
//! compared. CRIU itself runs later, at the start of the task.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use stasis_checkpoint::{RestoreSource, limits};
use stasis_cri_api::runtime::ContainerConfig;
use stasis_image::{Image, Images};
use stasis_snapshot::Limits;
use tracing::{info, warn};

use crate::container::Source;
use crate::error::{Error, IoContext as _, Kind, Result};
use crate::pods::{Pods, RestoreLevel, blocking, remove_tree};

/// Most that is put into a pod's `/dev/shm`; the tmpfs itself allows less.
const SHM_MAX: u64 = 64 << 30;
/// Suffix of the snapshot that keeps a checkpoint image's layer while a container waits for its start.
const KEY_SUFFIX: &str = ".checkpoint";

/// A checkpoint to start from.
pub(crate) struct Restore {
    source: RestoreSource,
    /// For people: the image's name or the archive's path.
    name: String,
}

impl Pods {
    /// A container's source where the request's image is a checkpoint image whose layer lies in `dir`.
    pub(crate) async fn image_source(&self, id: &str, image: &Arc<Image>, dir: &Path) -> Result<Source> {
        let name = image.references.first().unwrap_or(&image.id).clone();
        self.allow_restore(&name)?;
        // Keeps the layer until the start, even if the image is removed meanwhile.
        self.images.prepare_rootfs(image, &checkpoint_key(id)).await?;
        let source = open(dir, &name)?;
        let base = self.base(&source, &name, Some(image))?;
        Ok(Source { image_id: image.id.clone(), base, restore: Some(Restore { source, name }) })
    }

    /// A container's source where the request's image is the path of an archive.
    pub(crate) async fn archive_source(&self, id: &str, path: &Path) -> Result<Source> {
        let name = path.display().to_string();
        self.allow_restore(&name)?;
        let archive = self.open_archive(path)?;
        let dir = self.extracted(id);
        let target = dir.clone();
        let extracted = blocking(move || Ok(stasis_checkpoint::extract(archive, &target))).await;
        extracted.doing(format_args!("read {name}"))?.map_err(|error| refused(error, &name))?;
        let source = open(&dir, &name)?;
        let base = self.base(&source, &name, None)?;
        Ok(Source { image_id: String::new(), base, restore: Some(Restore { source, name }) })
    }

    fn allow_restore(&self, name: &str) -> Result<()> {
        if self.policy().restore_level == RestoreLevel::CheckpointRestore {
            return Ok(());
        }
        warn!(audit = true, checkpoint = name, verdict = "refused", "restores are not allowed on this node");
        Err(Error::new(
            Kind::PermissionDenied,
            format!(
                "{name} is a checkpoint, and this node does not allow restores: set `level = \"checkpoint_restore\"` \
                 under [checkpoint] in the configuration of stasisd to allow them"
            ),
        ))
    }

    /// Opens an archive below one of the configured directories, once; links are not followed, and it must be root's.
    fn open_archive(&self, path: &Path) -> Result<File> {
        let policy = self.policy();
        let below = policy.archive_dirs.iter().find_map(|dir| Some((dir, path.strip_prefix(dir).ok()?)));
        let Some((dir, relative)) = below else {
            return Err(Error::new(
                Kind::PermissionDenied,
                format!(
                    "archives may not be restored from {}: add its directory to `archive_dirs` under [checkpoint] in \
                     the configuration of stasisd, which has {:?}",
                    path.display(),
                    policy.archive_dirs
                ),
            ));
        };
        let root = File::open(dir).doing(format_args!("open {}", dir.display()))?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = stasis_sys::path::open_beneath(std::os::fd::AsFd::as_fd(&root), relative, flags, Mode::empty());
        let file = File::from(file.map_err(|error| {
            let kind =
                if error.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::InvalidArgument };
            Error::new(kind, format!("cannot open the archive {}: {error}", path.display()))
        })?);
        let facts = file.metadata().doing(format_args!("look at {}", path.display()))?;
        let complaint = if !facts.is_file() {
            "it is not a regular file"
        } else if facts.uid() != 0 {
            "it does not belong to root"
        } else if facts.mode() & 0o022 != 0 {
            "others than root may write it"
        } else {
            return Ok(file);
        };
        Err(Error::new(Kind::PermissionDenied, format!("the archive {} is refused: {complaint}", path.display())))
    }

    /// The image that the checkpointed container stood on, found on this node by digest or ID.
    ///
    /// `itself` is the checkpoint image, which may bring its base along.
    fn base(&self, source: &RestoreSource, name: &str, itself: Option<&Image>) -> Result<Arc<Image>> {
        let config = &source.metadata().config;
        let base = config.base_candidates().iter().find_map(|candidate| self.images.resolve(candidate));
        // A container that came out of a self-contained checkpoint image stands on the layers below that checkpoint.
        let base = base.and_then(|image| match self.images.checkpoint_dir(&image) {
            Some(_) => self.images.base_of(&image),
            None => Some(image),
        });
        base.or_else(|| self.images.base_of(itself?)).ok_or_else(|| {
            // People pull by name; the ID says which of the images of that name it must be.
            let (ids, names): (Vec<_>, Vec<_>) =
                config.base_names().into_iter().partition(|name| name.starts_with("sha256:"));
            let image = match (names.first(), ids.first()) {
                (Some(name), Some(id)) => format!("{name} ({id})"),
                (Some(only), None) | (None, Some(only)) => only.clone(),
                (None, None) => "an image that it does not name".to_owned(),
            };
            Error::precondition(format!(
                "{name} was taken of a container of {image}, which is not on this node: pull that image, then create \
                 the container again"
            ))
        })
    }

    fn extracted(&self, id: &str) -> PathBuf {
        self.extracted_root().join(id)
    }

    fn extracted_root(&self) -> PathBuf {
        self.config.root.join("restore")
    }

    /// Lets go of what a container was to start from: it runs, or is removed.
    pub(crate) async fn release_checkpoint(&self, id: &str) {
        if let Err(error) = self.images.remove_rootfs(&checkpoint_key(id)).await {
            warn!(container = id, %error, "cannot let go of a checkpoint image's layer");
        }
        if let Err(error) = remove_tree(&self.extracted(id)).await {
            warn!(container = id, %error, "cannot remove an extracted checkpoint");
        }
    }

    /// Removes extracted archives whose container is gone.
    pub(crate) async fn clear_extracted_archives(&self) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(self.extracted_root()) else { return Ok(()) };
        for entry in entries.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            if self.containers.get(&id).is_none() {
                info!(container = id, "removing an extracted checkpoint that no container stands for");
                remove_tree(&entry.path()).await.doing(format_args!("remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }
}

impl Restore {
    /// Compares what the archive claims with what the request grants, `cdi` being what its CDI devices need.
    pub(crate) fn check_request(&self, config: &ContainerConfig, cdi: &stasis_cdi::Edits) -> Result<()> {
        let of_request = config.mounts.iter().map(|mount| mount.container_path.as_str());
        let granted: Vec<&str> =
            of_request.chain(cdi.mounts.iter().map(|mount| mount.container_path.as_str())).collect();
        let missing = self.source.missing_mounts(&granted);
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{} was taken of a container with mounts that this request does not have: {}. Add them to the request; \
             what is mounted there is the request's choice",
            self.name,
            missing.join(", ")
        )))
    }

    /// Puts the writable layer onto the root file system of container `id`, and the log so far into `log`.
    /// The content of `/dev/shm` goes into `shm`, the one of the pod, if it has one.
    pub(crate) async fn apply(&self, images: &Images, id: &str, log: Option<&Path>, shm: &Path) -> Result<()> {
        let (source, name) = (self.source.clone(), self.name.clone());
        let (images, id, log) = (images.clone(), id.to_owned(), log.map(Path::to_owned));
        let shm = shm.to_owned();
        let work = move || {
            if let Some(layer) = source.open_layer().map_err(|error| refused(error, &name))? {
                images.apply_diff(&id, layer)?;
            }
            // After the layer, as CRI-O and podman do it: a file may be in both.
            let deleted = source.deleted_files().map_err(|error| refused(error, &name))?;
            if !deleted.is_empty() {
                images.delete_paths(&id, &deleted)?;
            }
            if let Some(content) = source.open_dev_shm().map_err(|error| refused(error, &name))?
                && shm.is_dir()
            {
                let limits = Limits { bytes: SHM_MAX, ..Limits::LAYER };
                let applied = stasis_snapshot::apply_diff(&shm, content, limits);
                applied.map_err(|error| Error::invalid(format!("cannot restore from {name}: {error}")))?;
            }
            match (source.open_log().map_err(|error| refused(error, &name))?, log) {
                (Some(old), Some(new)) => carry_log(old, &new),
                _ => Ok(()),
            }
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|error| Err(Error::internal(format!("the restore ended abnormally: {error}"))))
    }

    /// Directory of CRIU's images.
    pub(crate) fn images_dir(&self) -> PathBuf {
        self.source.images_dir()
    }
}

fn open(dir: &Path, name: &str) -> Result<RestoreSource> {
    RestoreSource::open(dir).map_err(|error| refused(error, name))
}

fn refused(error: stasis_checkpoint::Error, name: &str) -> Error {
    Error::from(error).context(format_args!("cannot restore from {name}"))
}

/// Copies the log so far to the log of the request, which continues it. A log that has lines already is kept.
fn carry_log(mut old: File, new: &Path) -> Result<()> {
    let doing = format!("carry the log over to {}", new.display());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(new, flags, Mode::from_raw_mode(0o640)).map_err(std::io::Error::from).doing(&doing)?;
    let mut file = File::from(file);
    let facts = file.metadata().doing(&doing)?;
    if !facts.is_file() || facts.len() > 0 {
        return Ok(());
    }
    let length = old.metadata().doing(&doing)?.len();
    let length = stasis_sys::file::seek_to_last_lines(&mut old, length, limits::LOG_CARRIED_MAX).doing(&doing)?;
    std::io::copy(&mut old.take(length), &mut file).doing(&doing)?;
    file.flush().doing(&doing)
}

fn checkpoint_key(id: &str) -> String {
    format!("{id}{KEY_SUFFIX}")
}

/// The container that a snapshot's key stands for: all of them begin with its ID, which has no dot.
pub(crate) fn container_of_key(key: &str) -> &str {
    key.split('.').next().unwrap_or(key)
}
