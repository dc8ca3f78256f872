//! The members of an image archive, one after the other: out of a tar (plain, gzip or zstd) or a directory.
//!
//! An archive is a stranger's. Only regular files count; a name is a key and never becomes a path on this node. The tar is read
//! without its extension headers: no member of an image archive needs them, and a header that renames or resizes the next
//! one would be read differently by different readers. `docker save`'s old form names a layer twice by a link; that
//! is kept as a link between names.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat};
use stasis_sys::path::{Root, open_beneath};

/// Most members of an archive.
const MEMBERS_MAX: usize = 100_000;
/// Deepest directory that is looked into: `blobs/sha256/`.
const DEPTH_MAX: usize = 3;
/// Most bytes of an extension header that is looked at.
const EXTENSION_BYTES_MAX: u64 = 64 << 10;

/// What a member is.
pub(crate) enum Member<'a> {
    /// A file, of which this many bytes can be read.
    File(&'a mut dyn Read, u64),
    /// The same as another member.
    Link(String),
}

/// Calls `each` with the name of every member, without a `./` in front.
pub(crate) fn each<E: From<io::Error>>(
    path: &Path,
    mut each: impl FnMut(&str, Member<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let file = File::open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        let root = Root::from_fd(file.into());
        return each_in_dir(&root, Path::new(""), 0, &mut 0, &mut each);
    }
    if !kind.is_file() {
        return Err(refuse("it is neither a file nor a directory").into());
    }
    each_in_tar(file, &mut each)
}

fn each_in_tar<E: From<io::Error>>(
    file: File,
    each: &mut impl FnMut(&str, Member<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let plain = stasis_snapshot::decompress(file).map_err(|e| refuse(&e.to_string()))?;
    let mut archive = tar::Archive::new(plain);
    let mut count = 0;
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry.map_err(|e| io::Error::new(e.kind(), format!("not a readable tar: {e}")))?;
        count_member(&mut count)?;
        let size = entry.header().entry_size()?;
        let kind = entry.header().entry_type();
        let name = entry.header().path_bytes();
        let name = std::str::from_utf8(&name).map_err(|_| refuse("a member's name is not UTF-8"))?;
        let name = name.strip_prefix("./").unwrap_or(name).to_owned();
        match kind {
            tar::EntryType::Regular | tar::EntryType::Continuous => each(&name, Member::File(&mut entry, size))?,
            tar::EntryType::Symlink | tar::EntryType::Link => {
                let target =
                    entry.header().link_name_bytes().map(|target| String::from_utf8_lossy(&target).into_owned());
                each(&name, Member::Link(target.unwrap_or_default()))?;
            }
            tar::EntryType::XHeader => check_extension(&mut entry, size)?,
            tar::EntryType::Directory | tar::EntryType::XGlobalHeader => {}
            other => return Err(refuse(&format!("member {name:?} is of type {other:?}")).into()),
        }
    }
    Ok(())
}

/// An extension that only adds times and the like may be passed over. One that changes the next member's name or size may not.
fn check_extension(entry: &mut impl Read, size: u64) -> io::Result<()> {
    if size > EXTENSION_BYTES_MAX {
        return Err(refuse("an extension header is larger than 64 KiB"));
    }
    let mut bytes = Vec::new();
    entry.take(EXTENSION_BYTES_MAX).read_to_end(&mut bytes)?;
    for record in bytes.split(|b| *b == b'\n') {
        // "<length> <key>=<value>"
        let key = record.splitn(2, |b| *b == b' ').nth(1).and_then(|rest| rest.split(|b| *b == b'=').next());
        if let Some(b"path" | b"linkpath" | b"size") = key {
            return Err(refuse("a member has its name or size in an extension header, which no image archive needs"));
        }
    }
    Ok(())
}

fn each_in_dir<E: From<io::Error>>(
    root: &Root,
    dir: &Path,
    depth: usize,
    count: &mut usize,
    each: &mut impl FnMut(&str, Member<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let here = match dir.as_os_str().is_empty() {
        true => root.open_file(Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?,
        false => open_beneath(root.as_fd(), dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?,
    };
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in rustix::fs::Dir::read_from(&here).map_err(io::Error::from)? {
        let entry = entry.map_err(io::Error::from)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            count_member(count)?;
            names.push(dir.join(entry.file_name().to_str().map_err(|_| refuse("a file's name is not UTF-8"))?));
        }
    }
    names.sort();
    for name in names {
        let text = name.to_str().unwrap_or_default();
        let place = match open_beneath(root.as_fd(), &name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) {
            // A link; a directory needs none.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => continue,
            place => place?,
        };
        let stat = fstat(&place).map_err(io::Error::from)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if depth < DEPTH_MAX => each_in_dir(root, &name, depth + 1, count, each)?,
            FileType::RegularFile => {
                let mut file = File::from(stasis_sys::path::reopen(&place, OFlags::RDONLY)?);
                each(text, Member::File(&mut file, stat.st_size.unsigned_abs()))?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn count_member(count: &mut usize) -> io::Result<()> {
    *count += 1;
    if *count > MEMBERS_MAX {
        return Err(refuse("it has more than 100000 members"));
    }
    Ok(())
}

fn refuse(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}
