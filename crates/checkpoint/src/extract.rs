//! Unpacking an archive into a fresh directory of our own.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, mkdirat};

use crate::error::{Doing, Error, Result, read_error};
use crate::limits;
use crate::member::Member;
use crate::reader::{ArchiveReader, Entry, Skip, Source};

/// Size of the copies.
const COPY_BUFFER: usize = 1 << 20;

/// What came out of an archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Members, directories included.
    pub members: u64,
    /// Bytes of their content.
    pub bytes: u64,
}

/// Unpacks `archive`, opened once by the caller, into `target`, which must not exist and becomes a directory of mode
/// 0700; what is missing above it is made likewise. On an error nothing stays.
///
/// # Errors
/// [`Error::Refused`] for an archive that [`crate::reader`] does not accept, [`Error::NoSpace`], and of writing.
pub fn extract(archive: File, target: &Path) -> Result<Extracted> {
    let mut reader = ArchiveReader::new(Source::new(archive)?);
    if let Some(parent) = target.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).doing_to("create", parent)?;
    }
    DirBuilder::new().mode(0o700).create(target).doing_to("create", target)?;
    extract_all(&mut reader, target).inspect_err(|_| {
        // The first error is the one to report.
        let _ = fs::remove_dir_all(target);
    })
}

fn extract_all<R: Skip>(reader: &mut ArchiveReader<R>, target: &Path) -> Result<Extracted> {
    let dir = File::open(target).doing_to("open", target)?;
    let mut extracted = Extracted::default();
    while let Some(entry) = reader.next_entry()? {
        check_space(target, entry.size)?;
        extracted.members += 1;
        extracted.bytes += entry.size;
        if entry.member.is_dir() {
            make_dir(&dir, &entry.member, target)?;
        } else {
            write_file(reader, &dir, &entry, target)?;
        }
    }
    Ok(extracted)
}

fn check_space(target: &Path, needed: u64) -> Result<()> {
    let available = stasis_sys::file::available_bytes(target).doing_to("see how much is free at", target)?;
    if needed.saturating_add(limits::SPACE_RESERVE) > available {
        let path = target.to_owned();
        return Err(Error::NoSpace { path, available, needed, reserve: limits::SPACE_RESERVE });
    }
    Ok(())
}

fn make_dir(dir: &File, member: &Member, target: &Path) -> Result<()> {
    let name = member.name();
    match mkdirat(dir, &*name, Mode::RWXU) {
        // Made before, for a member in it.
        Err(rustix::io::Errno::EXIST) => Ok(()),
        done => done.doing(format_args!("create {}/{name}", target.display())),
    }
}

fn write_file<R: Skip>(reader: &mut ArchiveReader<R>, dir: &File, entry: &Entry, target: &Path) -> Result<()> {
    let parent = match entry.member {
        Member::Image(_) => Some(Member::ImageDir),
        Member::Volume(_) => Some(Member::VolumeDir),
        _ => None,
    };
    if let Some(parent) = parent {
        make_dir(dir, &parent, target)?;
    }
    let name = entry.member.name();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let file = stasis_sys::path::open_beneath(dir.as_fd(), Path::new(&*name), flags, Mode::RUSR | Mode::WUSR);
    let mut file = File::from(file.doing(format_args!("create {}/{name}", target.display()))?);
    copy(reader, &mut file, entry, target)
}

/// As `io::copy`, but an error says which side it is of.
fn copy(reader: &mut impl Read, file: &mut File, entry: &Entry, target: &Path) -> Result<()> {
    let mut buffer = vec![0; COPY_BUFFER.min(usize::try_from(entry.size).unwrap_or(COPY_BUFFER)).max(1)];
    let mut copied = 0;
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(read_error(error)),
        };
        file.write_all(&buffer[..read]).doing(format_args!("write {}/{}", target.display(), entry.member))?;
        copied += read as u64;
    }
    if copied == entry.size {
        Ok(())
    } else {
        Err(Error::refused(format!("it ends in the middle of {}", entry.member)))
    }
}
