//! Walking directory trees that strangers made: no link is followed, and neither the stack nor the number of open files
//! grows with the depth of the tree.

use crate::error::{Doing, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use stasis_sys::path::{Root, open_beneath};
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

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

/// Measures the tree at `root`.
pub(crate) fn usage(path: &Path) -> Result<Usage> {
    let root = Root::open(path).doing("opening", path)?;
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(rel) = pending.pop() {
        let shown = path.join(&rel);
        let dir = match open_dir(root.as_fd(), &rel) {
            // A running container removes files while we look.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !rel.as_os_str().is_empty() => continue,
            dir => dir.doing("measuring", &shown)?,
        };
        let mut count = |stat: rustix::fs::Stat| {
            if stat.st_nlink == 1
                || FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                || linked.insert((stat.st_dev, stat.st_ino))
            {
                usage.inodes += 1;
                usage.bytes += stat.st_blocks.unsigned_abs() * 512;
            }
        };
        count(rustix::fs::fstat(&dir).doing("measuring", &shown)?);
        for (name, file_type) in list(&dir).doing("measuring", &shown)? {
            if file_type == FileType::Directory {
                pending.push(rel.join(name));
                continue;
            }
            match statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {}
                stat => count(stat.doing("measuring", &shown)?),
            }
        }
    }
    Ok(usage)
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
    use rustix::fs::{CWD, mkdirat};
    use std::fs;

    #[test]
    fn a_tree_deeper_than_any_path_is_removed_and_no_link_followed() {
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
    }
}
