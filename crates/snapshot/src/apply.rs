//! Applies a layer to a directory. The layer is hostile; see the OCI image spec, layer.md, "Applying Changesets".
//!
//! What keeps it inside: every path is resolved by the kernel under the root, so links lead nowhere else; the last
//! component is never followed; a file is made anew, after whatever had its name is gone, and its owner, mode, times and
//! attributes are set on the descriptor that made it. There is no moment between a check and its use, because there are
//! no checks of paths at all.
//!
//! Whiteouts come in two ways. On a plain directory (a lowest layer, an upper directory), they become overlayfs's own. On
//! an overlay mount of the layers below, what they name is removed, and the kernel writes the whiteouts; parents that the
//! layer does not mention then keep their owner and mode, and links below are followed, as on a merged `/usr`.

use crate::error::{Doing, Error, Result};
use crate::limits::Limits;
use crate::overlay::{
    AUFS_PREFIX, OPAQUE_NAME, WHITEOUT_PREFIX, is_whiteout, is_xattr_allowed, make_opaque, make_whiteout,
};
use crate::tar_reader::{DataError, Entry, Kind, TarReader, Time};
use crate::tree;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmod, chownat,
    fchmod, fchown, fsetxattr, fstat, futimens, linkat, makedev, mkdirat, mknodat, openat, readlinkat, statat,
    symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use stasis_sys::path::{Root, fd_path, open_beneath};
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// The mode of a directory that a layer needs but does not mention.
const IMPLIED_DIRECTORY_MODE: u32 = 0o755;

/// How many links may be followed while a missing directory is made, as in the kernel's own resolution.
const LINKS_MAX: u32 = 40;

/// How deep a directory is searched for what an opaque whiteout hides; the deepest real trees are a tenth of it.
const DEPTH_MAX: u32 = 512;

/// What becomes of whiteouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whiteouts {
    /// They are written as overlayfs writes them.
    Written,
    /// What they name is removed; the root is an overlay mount.
    CarriedOut,
}

/// Applies the uncompressed archive `source` to `root`, reading it to its end.
pub(crate) fn apply(root: &Root, source: impl Read, whiteouts: Whiteouts, limits: Limits) -> Result<()> {
    let mut reader = TarReader::new(source, limits);
    let mut applier =
        Applier { root, whiteouts, made: HashSet::new(), hasher: RandomState::new(), directory_times: Vec::new() };
    while let Some(entry) = reader.next_entry()? {
        applier.entry(&mut reader, &entry)?;
    }
    applier.set_directory_times();
    Ok(())
}

struct Applier<'a> {
    root: &'a Root,
    whiteouts: Whiteouts,
    /// What this layer made, as hashes of directory and name: whiteouts concern the layers below only, in whatever order
    /// they come. The hash is keyed, so nobody can make two collide; it keeps hostile names from filling the memory.
    made: HashSet<u64>,
    hasher: RandomState,
    /// Set at the end, since making files in a directory changes its time.
    directory_times: Vec<(PathBuf, Time)>,
}

/// Where an entry goes: the directory, and the name in it.
struct Place {
    path: PathBuf,
    parent: OwnedFd,
    name: OsString,
    key: u64,
}

impl Place {
    fn stat(&self) -> Result<Option<Stat>> {
        match statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Error::io("examining", &self.path, error)),
        }
    }

    /// Opens what was just made here, without following a link.
    fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        openat(&self.parent, &self.name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .doing("opening", &self.path)
    }
}

impl Applier<'_> {
    fn entry<R: Read>(&mut self, reader: &mut TarReader<R>, entry: &Entry) -> Result<()> {
        let path = inside(&entry.path)?;
        let Some(name) = path.file_name() else {
            return self.root_entry(entry);
        };
        if path
            .parent()
            .is_some_and(|parent| parent.components().any(|part| starts_with(part.as_os_str(), AUFS_PREFIX)))
        {
            return Ok(());
        }
        if name == OPAQUE_NAME {
            return self.opaque(path.parent().unwrap_or(Path::new("")));
        }
        if starts_with(name, AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT_PREFIX.as_bytes()) {
            return self.whiteout(entry, &path, OsStr::from_bytes(hidden));
        }
        let place = self.place(path)?;
        self.make(reader, entry, &place)?;
        self.made.insert(place.key);
        Ok(())
    }

    /// The layer's own root, `./`.
    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Directory {
            return Err(Error::entry(&entry.path, "the root must be a directory"));
        }
        let dir = self.directory(Path::new(""))?;
        set_metadata(&dir, entry).doing("setting the owner, mode and attributes of", Path::new("/"))?;
        self.directory_times.push((PathBuf::new(), entry.mtime));
        Ok(())
    }

    fn make<R: Read>(&mut self, reader: &mut TarReader<R>, entry: &Entry, place: &Place) -> Result<()> {
        match &entry.kind {
            Kind::File(_) => {
                self.clear(place)?;
                make_file(reader, entry, place)
            }
            Kind::Directory => self.make_directory(entry, place),
            Kind::HardLink(target) => self.make_hard_link(entry, place, target),
            Kind::Symlink(target) => {
                self.clear(place)?;
                symlinkat(target, &place.parent, &place.name).doing("making the link", &place.path)?;
                set_link_metadata(entry, place)
            }
            Kind::Char { major: 0, minor: 0 } => Err(Error::entry(&entry.path, "the device 0/0 is overlayfs's own")),
            Kind::Char { major, minor } => {
                self.make_node(entry, place, FileType::CharacterDevice, makedev(*major, *minor))
            }
            Kind::Block { major, minor } => {
                self.make_node(entry, place, FileType::BlockDevice, makedev(*major, *minor))
            }
            Kind::Fifo => self.make_node(entry, place, FileType::Fifo, 0),
        }
    }

    fn make_directory(&mut self, entry: &Entry, place: &Place) -> Result<()> {
        let there = place.stat()?;
        let is_directory = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !there.as_ref().is_some_and(is_directory) {
            self.clear(place)?;
            mkdirat(&place.parent, &place.name, Mode::RWXU).doing("making the directory", &place.path)?;
        }
        let dir = place.open(OFlags::RDONLY | OFlags::DIRECTORY)?;
        // What had the name before hid a directory of the layers below, and so must this one.
        if self.whiteouts == Whiteouts::Written && there.is_some_and(|stat| !is_directory(&stat)) {
            make_opaque(&dir).doing("making opaque", &place.path)?;
        }
        set_metadata(&dir, entry).doing("setting the owner, mode and attributes of", &place.path)?;
        self.directory_times.push((place.path.clone(), entry.mtime));
        Ok(())
    }

    fn make_hard_link(&mut self, entry: &Entry, place: &Place, target: &Path) -> Result<()> {
        let refuse = |reason: String| Error::entry(&entry.path, reason);
        let shown = target.display();
        let (parent, name) = self
            .root
            .open_parent(&inside(target)?)
            .map_err(|error| refuse(format!("its hard link's target {shown} cannot be found: {error}")))?;
        let stat = statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| refuse(format!("its hard link's target {shown} cannot be found: {error}")))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory || is_whiteout(&stat) {
            return Err(refuse(format!("its hard link's target {shown} is a directory or a whiteout")));
        }
        if place.stat()?.is_some_and(|there| (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino)) {
            return Ok(());
        }
        self.clear(place)?;
        // Without AT_SYMLINK_FOLLOW: a link to a symbolic link is a second name of that.
        linkat(&parent, &name, &place.parent, &place.name, AtFlags::empty()).doing("linking", &place.path)
    }

    fn make_node(&mut self, entry: &Entry, place: &Place, kind: FileType, device: u64) -> Result<()> {
        self.clear(place)?;
        mknodat(&place.parent, &place.name, kind, Mode::RUSR | Mode::WUSR, device)
            .doing("making the device", &place.path)?;
        set_link_metadata(entry, place)?;
        // By way of the descriptor, as a device cannot be opened without consequences, and chmod would follow a link.
        let node = place.open(OFlags::PATH)?;
        chmod(fd_path(&node), Mode::from_raw_mode(entry.mode)).doing("setting the mode of", &place.path)
    }

    /// Makes way for an entry.
    fn clear(&mut self, place: &Place) -> Result<()> {
        tree::remove(&place.parent, &place.name).doing("replacing", &place.path)
    }

    /// `.wh.name`.
    fn whiteout(&mut self, entry: &Entry, path: &Path, hidden: &OsStr) -> Result<()> {
        if hidden.is_empty() || hidden == "." || hidden == ".." {
            return Err(Error::entry(&entry.path, "a whiteout that names no file"));
        }
        let path = path.with_file_name(hidden);
        let place = match self.whiteouts {
            Whiteouts::Written => self.place(path)?,
            Whiteouts::CarriedOut => match self.existing_place(path)? {
                Some(place) => place,
                None => return Ok(()),
            },
        };
        let is_made = self.made.contains(&place.key);
        let is_directory =
            place.stat()?.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if is_made && !is_directory {
            return Ok(());
        }
        if is_directory {
            let dir = place.open(OFlags::RDONLY | OFlags::DIRECTORY)?;
            self.prune(&dir, &place.path, DEPTH_MAX)?;
            if is_made || !self.removed_if_empty(&place)? {
                return self.hide_below(&dir, &place.path);
            }
        } else {
            self.clear(&place)?;
        }
        match self.whiteouts {
            Whiteouts::Written => make_whiteout(&place.parent, &place.name).doing("whiting out", &place.path),
            Whiteouts::CarriedOut => Ok(()),
        }
    }

    /// `.wh..wh..opq` in `path`.
    fn opaque(&mut self, path: &Path) -> Result<()> {
        if self.whiteouts == Whiteouts::Written {
            self.make_parents(path, LINKS_MAX)?;
        }
        let dir = match self.directory(path) {
            Err(Error::Io { source, .. }) if is_absent(&source) && self.whiteouts == Whiteouts::CarriedOut => {
                return Ok(());
            }
            dir => dir?,
        };
        self.prune(&dir, path, DEPTH_MAX)?;
        self.hide_below(&dir, path)
    }

    fn hide_below(&self, dir: &OwnedFd, path: &Path) -> Result<()> {
        match self.whiteouts {
            Whiteouts::Written => make_opaque(dir).doing("making opaque", path),
            Whiteouts::CarriedOut => Ok(()),
        }
    }

    /// Removes from `dir` what this layer did not make.
    fn prune(&self, dir: &OwnedFd, path: &Path, depth: u32) -> Result<()> {
        if depth == 0 {
            return Err(Error::entry(path, format!("directories are nested more than {DEPTH_MAX} deep")));
        }
        for (name, kind) in tree::list(dir).doing("listing", path)? {
            let is_made = self.made.contains(&self.key(dir, &name).doing("examining", path)?);
            if kind != FileType::Directory {
                if !is_made {
                    unlinkat(dir, &name, AtFlags::empty()).doing("removing a file of", path)?;
                }
                continue;
            }
            let child = tree::open_dir(dir.as_fd(), Path::new(&name)).doing("opening a directory of", path)?;
            self.prune(&child, &path.join(&name), depth - 1)?;
            if !is_made {
                remove_if_empty(dir, &name).doing("removing a directory of", path)?;
            }
        }
        Ok(())
    }

    fn removed_if_empty(&self, place: &Place) -> Result<bool> {
        remove_if_empty(&place.parent, &place.name).doing("removing", &place.path)
    }

    fn place(&mut self, path: PathBuf) -> Result<Place> {
        if let Some(place) = self.existing_place(path.clone())? {
            return Ok(place);
        }
        self.make_parents(path.parent().unwrap_or(Path::new("")), LINKS_MAX)?;
        let missing = || Error::io("finding the directory of", &path, Errno::NOTDIR);
        self.existing_place(path.clone())?.ok_or_else(missing)
    }

    /// `None` when its directory is not there.
    fn existing_place(&self, path: PathBuf) -> Result<Option<Place>> {
        match self.root.open_parent(&path) {
            Ok((parent, name)) => {
                let key = self.key(&parent, &name).doing("examining the directory of", &path)?;
                Ok(Some(Place { path, parent, name, key }))
            }
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(Error::io("finding the directory of", &path, error)),
        }
    }

    fn key(&self, parent: impl AsFd, name: &OsStr) -> io::Result<u64> {
        let stat = fstat(parent)?;
        Ok(self.hasher.hash_one((stat.st_dev, stat.st_ino, name)))
    }

    /// Makes a directory that the layer does not mention, and what is missing above it. Links are followed, also one whose
    /// target is yet to be made: `var/run` may come before `run`.
    fn make_parents(&self, path: &Path, links: u32) -> Result<()> {
        let mut so_far = PathBuf::new();
        for component in path.components() {
            so_far.push(component);
            match self.root.open_dir(&so_far) {
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("making the directory", &so_far, error)),
            }
            let (parent, name) = self.root.open_parent(&so_far).doing("making the directory", &so_far)?;
            match readlinkat(&parent, &name, Vec::new()) {
                Ok(target) if links > 0 => {
                    let target = Path::new(OsStr::from_bytes(target.to_bytes()));
                    self.make_parents(&so_far.parent().unwrap_or(Path::new("")).join(target), links - 1)?;
                }
                Ok(_) => return Err(Error::io("making the directory", &so_far, Errno::LOOP)),
                Err(Errno::NOENT) => {
                    mkdirat(&parent, &name, Mode::RWXU).doing("making the directory", &so_far)?;
                    let dir = tree::open_dir(parent.as_fd(), Path::new(&name)).doing("opening", &so_far)?;
                    // Not by the mode of mkdir, from which the umask is taken away.
                    fchmod(&dir, Mode::from_raw_mode(IMPLIED_DIRECTORY_MODE)).doing("setting the mode of", &so_far)?;
                }
                Err(error) => return Err(Error::io("making the directory", &so_far, error)),
            }
        }
        Ok(())
    }

    fn directory(&self, path: &Path) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        self.root.open_file(path, flags, Mode::empty()).doing("opening", path)
    }

    /// A directory that something else has replaced in the meantime is passed over.
    fn set_directory_times(&self) {
        for (path, time) in &self.directory_times {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            if let Ok(dir) = self.root.open_file(path, flags, Mode::empty()) {
                let _ = futimens(&dir, &timestamps(*time));
            }
        }
    }
}

fn make_file<R: Read>(reader: &mut TarReader<R>, entry: &Entry, place: &Place) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let made = open_beneath(place.parent.as_fd(), Path::new(&place.name), flags, Mode::RUSR | Mode::WUSR);
    let mut file = File::from(made.doing("making the file", &place.path)?);
    reader.data(|bytes| file.write_all(bytes)).map_err(|error| match error {
        DataError::Source(error) => error,
        DataError::Sink(error) => Error::io("writing", &place.path, error),
    })?;
    set_metadata(&file, entry).doing("setting the owner, mode and attributes of", &place.path)?;
    futimens(&file, &timestamps(entry.mtime)).doing("setting the time of", &place.path)
}

/// In this order: a change of the owner takes away set-user-ID and file capabilities.
fn set_metadata(file: impl AsFd, entry: &Entry) -> io::Result<()> {
    fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_xattr_allowed(name)) {
        match fsetxattr(&file, name.as_str(), value, XattrFlags::empty()) {
            Err(Errno::NOTSUP) => tracing::warn!(
                entry = %entry.path.display(), attribute = name,
                "the file system cannot hold this extended attribute; the file is unpacked without it"
            ),
            done => done?,
        }
    }
    Ok(fchmod(&file, Mode::from_raw_mode(entry.mode))?)
}

/// For what has no descriptor that owner and time could be set on.
fn set_link_metadata(entry: &Entry, place: &Place) -> Result<()> {
    let (owner, group) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    chownat(&place.parent, &place.name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
        .doing("setting the owner of", &place.path)?;
    utimensat(&place.parent, &place.name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .doing("setting the time of", &place.path)
}

fn timestamps(time: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() },
    }
}

fn remove_if_empty(parent: impl AsFd, name: &OsStr) -> io::Result<bool> {
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A name of the archive as a path below the root: `/` and `.` fall away, `..` is refused. The kernel would keep it inside
/// anyway; but no honest writer makes such a name.
pub(crate) fn inside(name: &Path) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(Error::entry(name, "a name with `..`")),
        }
    }
    Ok(path)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn starts_with(name: &OsStr, prefix: &str) -> bool {
    name.as_bytes().starts_with(prefix.as_bytes())
}
