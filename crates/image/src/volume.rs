//! Images as volumes: the files of an image, or of a directory in it, mounted read-only where a container finds them.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use stasis_sys::mount;
use stasis_sys::path::{Root, fd_path};

use crate::error::{Error, Result, io_error, snapshot_error};
use crate::{Image, Images, blocking};

/// Options of every image volume. A set-user-ID bit or a device node in a stranger's image is of no use to its reader.
const OPTIONS: [&str; 2] = ["nosuid", "nodev"];

impl Images {
    /// Mounts an image on the directory `target`, or the directory `sub_path` in it unless that is empty. From then on the
    /// image's layers stay until [`Images::remove_rootfs`] of `key`, even if the image is removed.
    ///
    /// Links in `sub_path` are followed inside the image alone. An error may leave a mount on `target`.
    pub async fn mount_volume(&self, image: &Image, key: &str, target: &Path, sub_path: &Path) -> Result<()> {
        self.prepare_rootfs(image, key).await?;
        let (inner, key, id) = (self.inner.clone(), key.to_owned(), image.id.clone());
        let (target, sub_path) = (target.to_owned(), sub_path.to_owned());
        blocking(move || {
            let doing = format!("mount image {id} as a volume");
            let mut volume = inner.snapshots.read_only_mount(&key).map_err(snapshot_error(&doing))?;
            volume.options.extend(OPTIONS.map(str::to_owned));
            mount::mount(&volume, &target).map_err(io_error(&doing))?;
            if sub_path.as_os_str().is_empty() { Ok(()) } else { show_only(&id, &target, &sub_path) }
        })
        .await
    }
}

/// Mounts the directory `sub_path` of the volume on `target` over that volume. A mount of a directory has the flags of the
/// mount that it was found in.
fn show_only(id: &str, target: &Path, sub_path: &Path) -> Result<()> {
    let doing = || format!("find {} in image {id}", sub_path.display());
    let root = Root::open(target).map_err(io_error(doing()))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let dir = root.open_file(&relative(sub_path), flags, Mode::empty()).map_err(|error| {
        let missing = is_absent(&error);
        if missing || error.kind() == io::ErrorKind::NotADirectory {
            return Error::SubPath { image: id.to_owned(), path: sub_path.to_owned(), missing };
        }
        io_error(doing())(error)
    })?;
    mount::bind(&fd_path(&dir), target).map_err(io_error(doing()))
}

/// Nothing is there, or a link that leads to itself or through `/proc`.
fn is_absent(error: &io::Error) -> bool {
    let looped = io::Error::from(rustix::io::Errno::LOOP).raw_os_error();
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == looped
}

/// A leading slash means the root of the image.
fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}
