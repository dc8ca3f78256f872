//! Walking directory trees that strangers made: no link is followed, and neither the stack nor the number of open files
//! grows with the depth of the tree.

use crate::error::{Doing, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use stasis_sys::path::open_beneath;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A directory whose path is longer is moved up before it is removed, so that its path never gets too long for the kernel.
const DEEP_BYTES: usize = 2048;

/// How much a tree takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files, directories and links, the root of the tree included. A file with several names counts once.
    pub inodes: u64,
}

/// The names in a directory and the types of what they name, sorted by name.
pub(crate) fn list(dir: impl AsFd) -> io::Result<Vec<(OsString, FileType)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let file_type = match entry.file_type() {
            FileType::Unknown => FileType::from_raw_mode(statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode),
            known => known,
        };
        names.push((name.to_owned(), file_type));
    }
    names.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(names)
}

/// Opens a directory of a tree for reading. `rel` may be empty for the root.
pub(crate) fn open_dir(root: BorrowedFd<'_>, rel: &Path) -> io::Result<OwnedFd> {
    open_beneath(root, rel, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
}

/// A directory that waits to be walked: a path that is short enough for the kernel, and where it starts. New starts are
/// opened on the way down and closed on the way up, so their number is the depth in bytes by [`DEEP_BYTES`].
struct Waiting {
    start: Rc<OwnedFd>,
    rel: PathBuf,
}

/// Measures the tree at `path`, which may change meanwhile.
pub(crate) fn usage(path: &Path) -> Result<Usage> {
    let mut usage = Usage::default();
    each_inode(path, |stat| {
        usage.inodes += 1;
        usage.bytes += stat.st_blocks.unsigned_abs() * 512;
    })?;
    Ok(usage)
}

/// The lengths of all regular files of the tree at `path`, holes included: what a copy of their bytes takes. The tree may
/// change meanwhile.
///
/// # Errors
/// If the tree cannot be read.
pub fn apparent_bytes(path: &Path) -> Result<u64> {
    let mut bytes = 0u64;
    each_inode(path, |stat| {
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            bytes = bytes.saturating_add(stat.st_size.unsigned_abs());
        }
    })?;
    Ok(bytes)
}

/// Calls `visit` once for each inode of the tree at `path`, its root included. The tree may change meanwhile.
fn each_inode(path: &Path, mut visit: impl FnMut(&Stat)) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, path, flags, Mode::empty()).doing("opening", path)?;
    let mut linked = HashSet::new();
    let mut count = |stat: &Stat| {
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_directory || stat.st_nlink == 1 || linked.insert((stat.st_dev, stat.st_ino)) {
            visit(stat);
        }
    };
    let mut pending = vec![Waiting { start: Rc::new(root), rel: PathBuf::new() }];
    while let Some(Waiting { mut start, mut rel }) = pending.pop() {
        let dir = match open_dir(start.as_fd(), &rel) {
            // A running container removes files while we look.
            Err(error) if is_gone(&error) && !rel.as_os_str().is_empty() => continue,
            dir => dir.doing("measuring", path)?,
        };
        count(&fstat(&dir).doing("measuring", path)?);
        let names = list(&dir).doing("measuring", path)?;
        for (name, _) in names.iter().filter(|(_, file_type)| *file_type != FileType::Directory) {
            match statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {}
                stat => count(&stat.doing("measuring", path)?),
            }
        }
        if rel.as_os_str().len() > DEEP_BYTES {
            (start, rel) = (Rc::new(dir), PathBuf::new());
        }
        for (name, _) in names.into_iter().filter(|(_, file_type)| *file_type == FileType::Directory) {
            pending.push(Waiting { start: start.clone(), rel: rel.join(name) });
        }
    }
    Ok(())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Removes `name` in `parent` and all below it. That it is absent is no error.
pub(crate) fn remove(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(&parent, name, flags, Mode::empty())?;
    empty(&root)?;
    Ok(unlinkat(&parent, name, AtFlags::REMOVEDIR)?)
}

/// Removes all below a directory, files first; then the directories, of which each comes after the one it is in.
fn empty(root: &OwnedFd) -> io::Result<()> {
    let mut pending = vec![PathBuf::new()];
    let mut emptied = Vec::new();
    let mut moved = 0u64;
    while let Some(rel) = pending.pop() {
        let dir = open_dir(root.as_fd(), &rel)?;
        for (name, file_type) in list(&dir)? {
            if file_type != FileType::Directory {
                unlinkat(&dir, &name, AtFlags::empty())?;
            } else if rel.as_os_str().len() > DEEP_BYTES {
                moved += 1;
                let shallow = format!(".removing-{moved}-{}", &stasis_sys::file::random_id()[..16]);
                renameat(&dir, &name, root, &shallow)?;
                pending.push(PathBuf::from(shallow));
            } else {
                pending.push(rel.join(name));
            }
        }
        if !rel.as_os_str().is_empty() {
            emptied.push(rel);
        }
    }
    for rel in emptied.iter().rev() {
        unlinkat(root, rel, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mkdirat;
    use std::fs;

    #[test]
    fn a_tree_deeper_than_any_path_is_measured_and_removed_and_no_link_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut dir = openat(CWD, scratch.path(), flags, Mode::empty()).unwrap();
        let name = "d".repeat(100);
        mkdirat(&dir, "tree", Mode::RWXU).unwrap();
        dir = openat(&dir, "tree", flags, Mode::empty()).unwrap();
        for _ in 0..200 {
            mkdirat(&dir, &name, Mode::RWXU).unwrap();
            rustix::fs::symlinkat(&outside, &dir, "link").unwrap();
            dir = openat(&dir, &name, flags, Mode::empty()).unwrap();
        }
        let top = openat(CWD, scratch.path(), flags, Mode::empty()).unwrap();
        assert_eq!(usage(&scratch.path().join("tree")).unwrap().inodes, 401);
        remove(&top, OsStr::new("tree")).unwrap();
        remove(&top, OsStr::new("tree")).unwrap();
        assert!(!scratch.path().join("tree").exists());
        assert!(outside.join("file").exists());
    }

    #[test]
    fn usage_counts_each_inode_once() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("dir")).unwrap();
        fs::write(scratch.path().join("dir/file"), vec![1; 8192]).unwrap();
        fs::hard_link(scratch.path().join("dir/file"), scratch.path().join("again")).unwrap();
        let measured = usage(scratch.path()).unwrap();
        assert_eq!(measured.inodes, 3);
        assert!(measured.bytes >= 8192 && measured.bytes < 8192 * 4, "{measured:?}");
        fs::File::create(scratch.path().join("hole")).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(apparent_bytes(scratch.path()).unwrap(), 8192 + (1 << 40));
    }
}
