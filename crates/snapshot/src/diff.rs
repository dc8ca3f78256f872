//! Cuts a layer from an overlay's upper directory: what changed over the layers below, as an OCI layer (image spec,
//! layer.md); or writes a plain tree. The same tree gives the same bytes: names are sorted, and nothing of this machine or
//! moment goes in.

use crate::error::{Doing, Error, Result};
use crate::overlay::{OPAQUE_NAME, WHITEOUT_PREFIX, is_opaque, is_whiteout, is_xattr_allowed};
use crate::tar_writer::{TarWriter, Target};
use crate::tree;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, Stat, fgetxattr, flistxattr, fstat, readlinkat};
use rustix::io::Errno;
use stasis_sys::path::{Root, open_beneath, reopen};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The buffers for extended attributes: the kernel gives no more than this, of names and of one value.
const XATTR_BUFFER_BYTES: usize = 64 << 10;

/// What a written layer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiffStats {
    /// Entries: files, directories, links, whiteouts.
    pub entries: u64,
    /// Bytes of the archive.
    pub bytes: u64,
}

/// Writes what is in `upper` as an uncompressed layer. Sockets are left out, as they mean nothing without their process;
/// the root directory itself too. A file that shrinks while it is read is filled up with zeros: freeze the container first.
pub fn write_diff(upper: &Path, out: impl Write) -> Result<DiffStats> {
    write_diff_filtered(upper, out, |_| true)
}

/// As [`write_diff`], but leaves out each path, relative to `upper`, that `keep` says no to, and all below it.
pub fn write_diff_filtered(upper: &Path, out: impl Write, mut keep: impl FnMut(&Path) -> bool) -> Result<DiffStats> {
    let root = Root::open(upper).doing("opening", upper)?;
    let mut diff = Diff { root, upper, form: Form::Layer, out: TarWriter::new(out), linked: HashMap::new() };
    diff.below_root(&mut keep)?;
    diff.finish()
}

/// Writes the tree in `dir` with the attributes of `dir` itself, as `tar .` would: no name means anything, and there are no
/// overlay's marks. Sockets are left out. `shown` is its path in messages.
///
/// # Errors
/// If it cannot be read or written, and if another file system is mounted in it.
pub fn write_tree(dir: OwnedFd, shown: &Path, out: impl Write) -> Result<DiffStats> {
    let root = fstat(&dir).doing("examining", shown)?;
    let form = Form::Tree { device: root.st_dev };
    let mut tree =
        Diff { root: Root::from_fd(dir), upper: shown, form, out: TarWriter::new(out), linked: HashMap::new() };
    tree.visit(Path::new(ROOT_NAME))?;
    tree.below_root(&mut |_| true)?;
    tree.finish()
}

/// What a tree's own root is called in an archive.
const ROOT_NAME: &str = ".";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Overlay's marks become those of layers.
    Layer,
    /// All is what it is, on this one device.
    Tree { device: u64 },
}

struct Diff<'a, W> {
    root: Root,
    upper: &'a Path,
    form: Form,
    out: TarWriter<W>,
    /// The first name of each file that has several.
    linked: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Diff<'_, W> {
    fn below_root(&mut self, keep: &mut impl FnMut(&Path) -> bool) -> Result<()> {
        let mut pending = self.children(Path::new(""))?;
        while let Some(path) = pending.pop() {
            if keep(&path) && self.visit(&path)? {
                pending.append(&mut self.children(&path)?);
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<DiffStats> {
        let (entries, bytes) = self.out.finish().doing("writing the archive of", self.upper)?;
        Ok(DiffStats { entries, bytes })
    }

    /// The paths of a directory's children, last one first, to be taken from the end.
    fn children(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let dir = tree::open_dir(self.root.as_fd(), path).doing("opening", &self.shown(path))?;
        let names = tree::list(&dir).doing("listing", &self.shown(path))?;
        Ok(names.into_iter().rev().map(|(name, _)| path.join(name)).collect())
    }

    /// Writes one path; says whether it is a directory to go into.
    fn visit(&mut self, path: &Path) -> Result<bool> {
        let place = open_beneath(self.root.as_fd(), path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
            .doing("opening", &self.shown(path))?;
        let stat = fstat(&place).doing("examining", &self.shown(path))?;
        match self.form {
            Form::Layer if is_whiteout(&stat) => {
                self.write_whiteout(path)?;
                return Ok(false);
            }
            Form::Tree { device } if stat.st_dev != device => {
                let error = io::Error::new(io::ErrorKind::CrossesDevices, "another file system is mounted there");
                return Err(Error::io("examining", &self.shown(path), error));
            }
            _ => {}
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&(stat.st_dev, stat.st_ino)) {
                let written = self.out.entry(path, &stat, Target::HardLink(first), &[]);
                written.doing("writing", &self.shown(path))?;
                return Ok(false);
            }
            if kind != FileType::Socket {
                self.linked.insert((stat.st_dev, stat.st_ino), path.to_path_buf());
            }
        }
        let written = match kind {
            FileType::Directory => return self.write_directory(path, &place, &stat).map(|()| true),
            FileType::RegularFile => return self.write_file(path, &place, &stat).map(|()| false),
            FileType::Symlink => {
                let target = readlinkat(&place, "", Vec::new()).doing("reading the link", &self.shown(path))?;
                self.out.entry(path, &stat, Target::Symlink(Path::new(OsStr::from_bytes(target.to_bytes()))), &[])
            }
            FileType::CharacterDevice => self.out.entry(path, &stat, Target::Char, &[]),
            FileType::BlockDevice => self.out.entry(path, &stat, Target::Block, &[]),
            FileType::Fifo => self.out.entry(path, &stat, Target::Fifo, &[]),
            _ => Ok(()),
        };
        written.doing("writing", &self.shown(path)).map(|()| false)
    }

    fn write_whiteout(&mut self, path: &Path) -> Result<()> {
        let mut name = std::ffi::OsString::from(WHITEOUT_PREFIX);
        name.push(path.file_name().unwrap_or_default());
        self.out.marker(&path.with_file_name(name)).doing("writing", &self.shown(path))
    }

    fn write_directory(&mut self, path: &Path, place: &OwnedFd, stat: &Stat) -> Result<()> {
        let dir = reopen(place, OFlags::RDONLY | OFlags::DIRECTORY).doing("opening", &self.shown(path))?;
        let xattrs = xattrs(&dir).doing("reading the attributes of", &self.shown(path))?;
        self.out.entry(path, stat, Target::Directory, &xattrs).doing("writing", &self.shown(path))?;
        if self.form == Form::Layer && is_opaque(&dir).doing("reading the attributes of", &self.shown(path))? {
            self.out.marker(&path.join(OPAQUE_NAME)).doing("writing", &self.shown(path))?;
        }
        Ok(())
    }

    fn write_file(&mut self, path: &Path, place: &OwnedFd, stat: &Stat) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOATIME;
        let mut file = File::from(reopen(place, flags).doing("opening", &self.shown(path))?);
        let xattrs = xattrs(&file).doing("reading the attributes of", &self.shown(path))?;
        let size = stat.st_size.unsigned_abs();
        self.out.entry(path, stat, Target::File(size), &xattrs).doing("writing", &self.shown(path))?;
        self.out.data(&mut file, size).doing("writing", &self.shown(path))
    }

    /// The path in messages.
    fn shown(&self, path: &Path) -> PathBuf {
        self.upper.join(path)
    }
}

/// The attributes that belong into a layer, sorted by name.
fn xattrs(file: impl rustix::fd::AsFd) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0u8; XATTR_BUFFER_BYTES];
    let length = match flistxattr(&file, &mut names[..]) {
        Err(Errno::NOTSUP) => 0,
        length => length?,
    };
    let mut found = Vec::new();
    for name in names[..length].split(|byte| *byte == 0) {
        let Ok(name) = str::from_utf8(name) else { continue };
        // An equals sign ends the name in a PAX record.
        if !is_xattr_allowed(name) || name.contains('=') {
            continue;
        }
        let mut value = vec![0u8; XATTR_BUFFER_BYTES];
        let length = fgetxattr(&file, name, &mut value[..])?;
        value.truncate(length);
        found.push((name.to_owned(), value));
    }
    found.sort();
    Ok(found)
}
