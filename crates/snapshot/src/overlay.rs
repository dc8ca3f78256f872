//! What overlayfs writes into an upper directory, and how an OCI layer says the same.
//!
//! Sources: kernel, Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"; OCI image spec,
//! layer.md, "Whiteouts".

use rustix::fd::AsFd;
use rustix::fs::{FileType, Mode, Stat, XattrFlags, fgetxattr, fsetxattr, mknodat};
use rustix::io::Errno;
use stasis_sys::mount::Mount;
use std::ffi::OsStr;
use std::path::Path;

/// In a layer, `.wh.name` says that `name` of the layers below is gone.
pub(crate) const WHITEOUT_PREFIX: &str = ".wh.";

/// In a layer, a file of this name says that of its directory nothing of the layers below is seen.
pub(crate) const OPAQUE_NAME: &str = ".wh..wh..opq";

/// Names of this form are aufs's own book-keeping, found in old images. They mean nothing to anyone else.
pub(crate) const AUFS_PREFIX: &str = ".wh..wh.";

const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// Whether an inode in an upper directory is a whiteout: a character device 0/0.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Makes a whiteout.
pub(crate) fn make_whiteout(parent: impl AsFd, name: &OsStr) -> Result<(), Errno> {
    mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0)
}

/// Hides what the layers below have in a directory.
pub(crate) fn make_opaque(dir: impl AsFd) -> Result<(), Errno> {
    fsetxattr(dir, OPAQUE_XATTR, b"y", XattrFlags::empty())
}

/// Whether a directory hides what is below. We mount without `userxattr`, so `user.overlay.*` is the container's own.
pub(crate) fn is_opaque(dir: impl AsFd) -> Result<bool, Errno> {
    let mut value = [0u8; 8];
    match fgetxattr(dir, OPAQUE_XATTR, &mut value) {
        Ok(length) => Ok(value[..length] == *b"y"),
        // Longer values exist; they mean other things.
        Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Which extended attributes go into layers and come out of them: file capabilities and what users attach to their files.
/// Not `trusted.*` (it steers overlayfs), not `security.selinux` (labels belong to a node), not `system.*`.
pub(crate) fn is_xattr_allowed(name: &str) -> bool {
    name == "security.capability" || (name.starts_with("user.") && !name.starts_with("user.overlay."))
}

/// The mount of layers, topmost first, and of a writable pair of directories, or read-only without one.
///
/// `redirect_dir` and `metacopy` are off, because an upper directory that makes use of them means nothing without its
/// mount, and we cut layers from it; `index` is off as in containerd, so that lower layers may be shared and moved.
pub(crate) fn mount(lowers: &[&Path], writable: Option<(&Path, &Path)>) -> Mount {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let lowers: Vec<String> = lowers.iter().map(|lower| text(lower)).collect();
    let mut options = vec!["index=off".to_owned(), "redirect_dir=off".to_owned(), "metacopy=off".to_owned()];
    options.push(format!("lowerdir={}", lowers.join(":")));
    match writable {
        Some((upper, work)) => {
            options.extend([format!("upperdir={}", text(upper)), format!("workdir={}", text(work))]);
        }
        None => options.push("ro".to_owned()),
    }
    Mount { fs_type: "overlay".to_owned(), source: "overlay".to_owned(), options }
}
