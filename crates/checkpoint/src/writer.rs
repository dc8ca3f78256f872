//! An archive written in one pass under a temporary name, made durable, and renamed.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::direct::ALIGNMENT;
use crate::error::{Doing, Error, Result};
use crate::member::Member;
use crate::output::{Form, Output, Written};
use crate::tar;

/// Random digits in a temporary name: two checkpoints to one path at a time do not meet.
const RANDOM_DIGITS: usize = 12;
/// So much of the name goes into a temporary one: with digits and suffix it stays under the usual 255 bytes.
const PARTIAL_NAME_MAX: usize = 200;

/// Content of this size and more starts at a whole block, so that it can go to the device straight from memory.
const ALIGNED_FROM: u64 = 4 << 20;

/// Writes the members of an archive, in the order of [`Member::order`]. Until [`ArchiveWriter::finish`] there is only a
/// file `<name>.<random>.partial` in the same directory, which is removed when the writer is dropped.
#[derive(Debug)]
pub struct ArchiveWriter {
    out: Option<Output>,
    path: PathBuf,
    partial: PathBuf,
    mtime: u64,
    rank: (usize, String),
    /// What is still missing of the member that was begun last.
    remaining: u64,
    padding: usize,
    has_image_dir: bool,
}

impl ArchiveWriter {
    /// Begins the archive that will be `path`. `expected` bytes are reserved on the disk.
    ///
    /// # Errors
    /// If the directory is not there or the space is not free.
    pub fn create(path: &Path, expected: u64) -> Result<Self> {
        Self::create_as(path, expected, Form::default())
    }

    /// As [`ArchiveWriter::create`], compressed or hashed on its way.
    ///
    /// # Errors
    /// As [`ArchiveWriter::create`].
    pub fn create_as(path: &Path, expected: u64, form: Form) -> Result<Self> {
        let partial = partial_name(path)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial);
        let file = file.doing_to("create", &partial)?;
        let mtime = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let mut writer = Self {
            out: None,
            path: path.to_owned(),
            partial,
            mtime,
            rank: (0, String::new()),
            remaining: 0,
            padding: 0,
            has_image_dir: false,
        };
        writer.out = Some(Output::new(file, expected, form).doing_to("reserve space for", path)?);
        Ok(writer)
    }

    /// Begins a member of exactly `size` bytes, which the caller then writes by [`Write`].
    ///
    /// # Errors
    /// If the member before is not complete, members come out of order, or no reader would take one of that size.
    pub fn begin(&mut self, member: &Member, size: u64) -> Result<()> {
        self.end_member()?;
        if size > member.size_max() {
            return Err(Error::malformed(
                member,
                format!("it has {size} bytes; {} can be read back", member.size_max()),
            ));
        }
        if matches!(member, Member::Image(_)) && !self.has_image_dir {
            self.header(&Member::ImageDir, 0)?;
            self.has_image_dir = true;
        }
        self.header(member, size)?;
        self.remaining = size;
        self.padding = tar::padding(size);
        Ok(())
    }

    /// Writes a whole member.
    ///
    /// # Errors
    /// As [`ArchiveWriter::begin`], and of writing.
    pub fn add(&mut self, member: &Member, content: &[u8]) -> Result<()> {
        self.begin(member, content.len() as u64)?;
        self.write_all(content).doing_to("write", &self.partial)
    }

    /// Writes a whole member of `size` bytes out of `content`, which may be longer: a log grows.
    ///
    /// # Errors
    /// If `content` is shorter, and as [`ArchiveWriter::add`].
    pub fn add_from(&mut self, member: &Member, size: u64, content: impl Read) -> Result<()> {
        self.begin(member, size)?;
        let copied = io::copy(&mut content.take(size), self).doing_to("write", &self.partial)?;
        if copied == size {
            Ok(())
        } else {
            Err(Error::malformed(member, format!("{copied} of {size} bytes are there")))
        }
    }

    /// [`ArchiveWriter::seal`] and [`Sealed::publish`].
    ///
    /// # Errors
    /// Those of both.
    pub fn finish(self) -> Result<Written> {
        self.seal()?.publish()
    }

    /// Ends the archive and makes it durable under its temporary name.
    ///
    /// # Errors
    /// If the last member is not complete, or anything could not be written: then there is no archive.
    pub fn seal(mut self) -> Result<Sealed> {
        self.end_member()?;
        let mut out = self.out.take().ok_or_else(|| Error::refused("the writer failed before"))?;
        out.write_all(&[0; 2 * tar::BLOCK]).doing_to("write", &self.partial)?;
        let written = out.finish().doing_to("write", &self.partial)?;
        Ok(Sealed { writer: self, written })
    }

    fn header(&mut self, member: &Member, size: u64) -> Result<()> {
        let rank = member.order();
        if rank <= self.rank && !self.rank.1.is_empty() {
            return Err(Error::malformed(member, format!("it comes after {}", self.rank.1)));
        }
        let mut header = Vec::new();
        if size >= ALIGNED_FROM {
            // Behind its header the content starts at a whole block of the device.
            header = self.filler()?;
        }
        header.extend(tar::encode(&rank.1, size, member.is_dir(), self.mtime)?);
        self.out()?.write_all(&header).doing_to("write", &self.partial.clone())?;
        self.rank = rank;
        Ok(())
    }

    /// What has to be before a header so that the content behind it is aligned.
    fn filler(&mut self) -> Result<Vec<u8>> {
        let mtime = self.mtime;
        let Some(position) = self.out()?.position() else { return Ok(Vec::new()) };
        let behind = position as usize % ALIGNMENT + tar::BLOCK;
        match behind.next_multiple_of(ALIGNMENT) - behind {
            0 => Ok(Vec::new()),
            // One block is too short for a filler.
            tar::BLOCK => tar::filler(tar::BLOCK + ALIGNMENT, mtime),
            length => tar::filler(length, mtime),
        }
    }

    fn end_member(&mut self) -> Result<()> {
        if self.remaining > 0 {
            return Err(Error::malformed(&self.rank.1, format!("{} bytes of it are missing", self.remaining)));
        }
        let padding = std::mem::take(&mut self.padding);
        self.out()?.write_all(&[0; tar::BLOCK][..padding]).doing_to("write", &self.partial.clone())
    }

    fn out(&mut self) -> Result<&mut Output> {
        self.out.as_mut().ok_or_else(|| Error::refused("the writer failed before"))
    }
}

/// Content of the member that was begun last.
impl Write for ArchiveWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.remaining {
            return Err(io::Error::other(format!("{} got more bytes than its size", self.rank.1)));
        }
        let out = self.out.as_mut().ok_or_else(|| io::Error::other("the writer failed before"))?;
        let written = out.write(bytes)?;
        self.remaining -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An archive that is whole and durable, and has not its name yet. It is removed when this is dropped.
#[derive(Debug)]
pub struct Sealed {
    writer: ArchiveWriter,
    written: Written,
}

impl Sealed {
    /// Gives the archive its name; what had that name before is replaced.
    ///
    /// # Errors
    /// If it could not be renamed: then there is no archive.
    pub fn publish(self) -> Result<Written> {
        let path = &self.writer.path;
        fs::rename(&self.writer.partial, path).doing_to("rename the archive to", path)?;
        // The name is the archive's from here on; dropping finds no partial file.
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        stasis_sys::file::sync_dir(dir).doing_to("make durable", dir)?;
        Ok(self.written)
    }
}

impl Drop for ArchiveWriter {
    fn drop(&mut self) {
        match fs::remove_file(&self.partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // Nobody is left to tell; whoever lists the directory sees the suffix.
            }
            _ => {}
        }
    }
}

/// Whether `file` is a name that a writer of the archive `name` gives to what it has not finished.
pub fn is_partial(file: &OsStr, name: &OsStr) -> bool {
    let rest = file.as_bytes().strip_prefix(beginning(name));
    let random = rest.and_then(|rest| rest.strip_prefix(b".")?.strip_suffix(b".partial"));
    random.is_some_and(|random| random.len() == RANDOM_DIGITS && random.iter().all(u8::is_ascii_hexdigit))
}

/// The kubelet's names can be so long that nothing fits behind them.
fn beginning(name: &OsStr) -> &[u8] {
    let name = name.as_bytes();
    &name[..name.len().min(PARTIAL_NAME_MAX)]
}

fn partial_name(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::refused(format!("{} is no file name", path.display())))?;
    let mut partial = OsStr::from_bytes(beginning(name)).to_os_string();
    partial.push(format!(".{}.partial", &stasis_sys::file::random_id()[..RANDOM_DIGITS]));
    Ok(path.with_file_name(partial))
}
