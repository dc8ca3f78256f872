//! Paths that another party chose, resolved by the kernel under a directory of ours.
//!
//! A path out of an image, an archive or a container's file system may hold `..`, absolute links and links that are
//! swapped while we look. Joining strings and checking prefixes cannot be made safe; `openat2(2)` can. This module
//! knows nothing of what the files mean.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat2};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

/// How often a resolution is tried again when the kernel says that a rename elsewhere disturbed it (`EAGAIN`).
/// The kernel asks callers to retry; without a bound, a hostile renamer could hold us here.
const RESOLVE_ATTEMPTS: u32 = 128;

/// The longest path that is accepted, in bytes: the kernel's `PATH_MAX`. Also bounds the work of [`Root::create_dir_all`].
const PATH_BYTES_MAX: usize = 4096;

/// A directory opened once. Every path given to it is resolved as if it were the root of the file system: absolute
/// paths and links start at it, `..` stops at it, and magic links of `/proc` are refused.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
}

impl Root {
    /// Opens `path`, which is our own and trusted. Its last component must be a directory and no link.
    pub fn open(path: &Path) -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Root { dir: open(path, flags, Mode::empty())? })
    }

    /// Takes a directory that is open already.
    pub fn from_fd(dir: OwnedFd) -> Root {
        Root { dir }
    }

    /// The directory itself.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Opens `rel` under the root. `O_CLOEXEC` is always set; links inside the root are followed unless `flags` says
    /// `NOFOLLOW`, which concerns the last component only.
    pub fn open_file(&self, rel: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        resolve(self.dir.as_fd(), rel, flags, mode, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    /// Opens the directory that holds `rel`, and gives the last component with it, for the calls that take both
    /// (`mknodat`, `linkat`, `unlinkat`, …). A path whose last component is `..`, or that is the root itself, is
    /// refused as invalid input.
    pub fn open_parent(&self, rel: &Path) -> io::Result<(OwnedFd, OsString)> {
        let (parent, name) = split(rel)?;
        Ok((self.open_dir(&parent)?, name))
    }

    /// Opens the directory `rel`, as a place for other calls (`O_PATH`).
    pub fn open_dir(&self, rel: &Path) -> io::Result<OwnedFd> {
        self.open_file(rel, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
    }

    /// Makes `rel` and what is missing above it, each with `mode` (less the umask), and opens it as a place (`O_PATH`).
    /// A link on the way is followed inside the root; one that leads nowhere is an error, it is not created through.
    pub fn create_dir_all(&self, rel: &Path, mode: Mode) -> io::Result<OwnedFd> {
        match self.open_dir(rel) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => return done,
        }
        let mut so_far = PathBuf::new();
        let mut dir = self.open_dir(Path::new("."))?;
        for component in rel.components() {
            so_far.push(component);
            dir = match (self.open_dir(&so_far), component) {
                (Err(error), Component::Normal(name)) if error.kind() == io::ErrorKind::NotFound => {
                    match mkdirat(&dir, name, mode) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    self.open_dir(&so_far)?
                }
                (opened, _) => opened?,
            };
        }
        Ok(dir)
    }

    /// Reads the regular file `rel` whole. Anything but a regular file is refused without being opened, so that a FIFO
    /// or a device cannot block us or be disturbed; more than `limit` bytes is an error.
    pub fn read(&self, rel: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let place = self.open_file(rel, OFlags::PATH, Mode::empty())?;
        read_place(&place, rel, limit)
    }
}

/// Opens `rel` below `dir`: no `..` that leaves it, no absolute path, no link at all.
pub fn open_beneath(dir: BorrowedFd<'_>, rel: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    resolve(dir, rel, flags, mode, how)
}

/// Reads a regular file of our own tree whole, with the limits of [`Root::read`].
pub fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let place = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    read_place(&place, path, limit)
}

fn resolve(dir: BorrowedFd<'_>, rel: &Path, flags: OFlags, mode: Mode, how: ResolveFlags) -> io::Result<OwnedFd> {
    if rel.as_os_str().len() >= PATH_BYTES_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    let rel = if rel.as_os_str().is_empty() { Path::new(".") } else { rel };
    for _ in 0..RESOLVE_ATTEMPTS {
        match openat2(dir, rel, flags | OFlags::CLOEXEC, mode, how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
    Err(Errno::AGAIN.into())
}

fn split(rel: &Path) -> io::Result<(PathBuf, OsString)> {
    let mut components = rel.components();
    match components.next_back() {
        Some(Component::Normal(name)) => Ok((components.as_path().to_path_buf(), name.to_os_string())),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{}: the path must end in a name, not in `..` or the root", rel.display()),
        )),
    }
}

/// `place` was opened with `O_PATH`, which never blocks; only a regular file is then opened for reading. The magic link
/// names that very inode, so nothing can be swapped in between.
fn read_place(place: &OwnedFd, name: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let stat = fstat(place)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{}: not a regular file", name.display())));
    }
    let mut file = File::from(reopen(place, OFlags::RDONLY)?);
    let mut bytes = Vec::with_capacity(usize::try_from(limit.min(stat.st_size.unsigned_abs())).unwrap_or(0));
    Read::by_ref(&mut file).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{}: larger than the limit of {limit} bytes", name.display()),
        ));
    }
    Ok(bytes)
}

/// Opens the inode behind `place`, an `O_PATH` descriptor, with other flags. `place` must not be a symbolic link.
pub fn reopen(place: impl AsFd, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(open(fd_path(place), flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// The name by which system calls that take only a path reach the inode behind a descriptor.
pub fn fd_path(place: impl AsFd) -> PathBuf {
    use rustix::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", place.as_fd().as_raw_fd()))
}

/// The last `most` bytes of a regular file of our own tree; the whole of a shorter one. A link is not followed.
pub fn read_tail(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut file = File::from(open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?);
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn check_stays_inside(link_target: &str) {
        let outer = tempfile::tempdir().unwrap();
        fs::write(outer.path().join("secret"), "outside").unwrap();
        let inner = outer.path().join("root");
        fs::create_dir(&inner).unwrap();
        symlink(link_target, inner.join("link")).unwrap();
        let root = Root::open(&inner).unwrap();
        assert!(root.read(Path::new("link/secret"), 100).is_err(), "{link_target} led outside");
        fs::write(inner.join("secret"), "inside").unwrap();
        let read = root.read(Path::new("link/secret"), 100);
        assert!(read.is_err() || read.as_deref().unwrap() == b"inside", "{link_target} led outside");
    }

    #[test]
    fn links_and_dots_stay_inside_the_root() {
        for target in ["..", "../..", "/", "/..", "/proc/self/root/tmp", "."] {
            check_stays_inside(target);
        }
    }

    #[test]
    fn create_dir_all_makes_directories_inside_only() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("root");
        fs::create_dir(&inner).unwrap();
        symlink("..", inner.join("up")).unwrap();
        symlink("/nowhere", inner.join("dangling")).unwrap();
        let root = Root::open(&inner).unwrap();
        let mode = Mode::from_raw_mode(0o755);
        root.create_dir_all(Path::new("a/b/../c"), mode).unwrap();
        assert!(inner.join("a/b").is_dir() && inner.join("a/c").is_dir());
        root.create_dir_all(Path::new("/up/x"), mode).unwrap();
        root.create_dir_all(Path::new("../../y"), mode).unwrap();
        assert!(inner.join("x").is_dir() && inner.join("y").is_dir());
        assert!(root.create_dir_all(Path::new("dangling/z"), mode).is_err());
        let mut names: Vec<_> = fs::read_dir(outer.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["root"]);
    }

    #[test]
    fn read_refuses_what_is_not_a_small_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::write(dir.path().join("big"), vec![0; 11]).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(root.read(Path::new("fifo"), 10).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(root.read(Path::new("."), 10).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(root.read(Path::new("big"), 10).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(root.read(Path::new("big"), 11).unwrap().len(), 11);
        assert_eq!(read_limited(&fifo, 10).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn open_beneath_follows_no_link_at_all() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        let open = |rel: &str| open_beneath(root.as_fd(), Path::new(rel), OFlags::RDONLY, Mode::empty());
        assert!(open("file").is_ok());
        assert!(open("link").is_err());
        assert!(open("../file").is_err());
        assert!(open("/etc/hostname").is_err());
    }

    #[test]
    fn open_parent_splits_off_the_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(root.open_parent(Path::new("/a/b")).unwrap().1, "b");
        assert_eq!(root.open_parent(Path::new("b/.")).unwrap().1, "b");
        for bad in ["", "/", "a/..", ".", ".."] {
            assert_eq!(root.open_parent(Path::new(bad)).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
    }
}
