//! Reading an archive of anybody's: one pass, and everything unexpected is refused.
//!
//! Accepted are regular files and directories with the names of the three dialects ([`Member`]), each once, within the
//! caps of [`crate::limits`]. Refused are links, devices, sparse files, absolute names, `..`, duplicates, unknown names,
//! and compressed streams that grow beyond reason. What follows the end of the archive is ignored: containerd 2.1
//! leaves the tail of an older, longer file there.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use flate2::bufread::MultiGzDecoder;

use crate::error::{Doing, Error, Result, read_error};
use crate::limits;
use crate::member::Member;
use crate::tar;

/// How an archive is compressed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: containerd's, CRI-O's and our form.
    None,
    /// gzip, on podman's request.
    Gzip,
    /// zstd, podman's default.
    Zstd,
    /// lz4 in frames, by our own option only.
    Lz4,
}

impl Compression {
    /// Finds out by the first bytes of a file, and leaves the file at its start.
    ///
    /// # Errors
    /// If the file is of no known kind; xz is named, since podman could write it once.
    pub fn of(file: &mut File) -> Result<Self> {
        let mut start = Vec::new();
        file.rewind().doing("read the archive")?;
        Read::by_ref(file).take(512).read_to_end(&mut start).doing("read the archive")?;
        file.rewind().doing("read the archive")?;
        match &start[..] {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            [0x04, 0x22, 0x4d, 0x18, ..] => Ok(Self::Lz4),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
                Err(Error::refused("it is compressed by xz; decompress it first (xz -d) or use zstd"))
            }
            [b'B', b'Z', b'h', ..] => Err(Error::refused("it is compressed by bzip2; decompress it first or use zstd")),
            tar if tar.len() == 512 => Ok(Self::None),
            _ => Err(Error::refused(format!("it has {} bytes and is no tar", start.len()))),
        }
    }
}

/// A stream that can pass over bytes.
pub trait Skip: Read {
    /// Passes over `count` bytes; that they are not there shows at the next read.
    ///
    /// # Errors
    /// Of reading.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        io::copy(&mut self.take(count), &mut io::sink()).map(drop)
    }
}

impl Skip for &[u8] {}

/// The uncompressed bytes of an archive.
#[derive(Debug)]
pub struct Source {
    stream: Stream,
    /// The same open file as in the stream, to see how far that has read.
    file: File,
    produced: u64,
}

enum Stream {
    Plain(BufReader<File>),
    Gzip(Box<MultiGzDecoder<BufReader<File>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<File>>>),
    Lz4(Box<lz4_flex::frame::FrameDecoder<BufReader<File>>>),
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Gzip(_) => "Gzip",
            Self::Zstd(_) => "Zstd",
            Self::Lz4(_) => "Lz4",
        })
    }
}

/// Size of the reads from the file.
const READ_BUFFER: usize = 256 * 1024;

impl Source {
    /// Reads `file`, opened once by the caller, from its start.
    ///
    /// # Errors
    /// As [`Compression::of`].
    pub fn new(mut file: File) -> Result<Self> {
        let compression = Compression::of(&mut file)?;
        let buffered = BufReader::with_capacity(READ_BUFFER, file.try_clone().doing("read the archive")?);
        let stream = match compression {
            Compression::None => Stream::Plain(buffered),
            Compression::Gzip => Stream::Gzip(Box::new(MultiGzDecoder::new(buffered))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered).doing("read the archive")?;
                decoder.window_log_max(limits::ZSTD_WINDOW_LOG_MAX).doing("read the archive")?;
                Stream::Zstd(Box::new(decoder))
            }
            Compression::Lz4 => Stream::Lz4(Box::new(lz4_flex::frame::FrameDecoder::new(buffered))),
        };
        Ok(Self { stream, file, produced: 0 })
    }

    /// A bomb is a small file that becomes a large one.
    fn check_ratio(&mut self) -> io::Result<()> {
        if matches!(self.stream, Stream::Plain(_)) || self.produced < limits::RATIO_FREE {
            return Ok(());
        }
        let consumed = self.file.stream_position()?;
        if self.produced / limits::RATIO_MAX > consumed {
            let message = format!("{consumed} compressed bytes became {}", self.produced);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(())
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.stream {
            Stream::Plain(stream) => stream.read(buffer)?,
            Stream::Gzip(stream) => stream.read(buffer)?,
            Stream::Zstd(stream) => stream.read(buffer)?,
            Stream::Lz4(stream) => stream.read(buffer)?,
        };
        self.produced += read as u64;
        self.check_ratio()?;
        Ok(read)
    }
}

impl Skip for Source {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match (&mut self.stream, i64::try_from(count)) {
            (Stream::Plain(stream), Ok(offset)) => stream.seek_relative(offset),
            (Stream::Plain(stream), Err(_)) => stream.seek(SeekFrom::End(0)).map(drop),
            _ => io::copy(&mut self.take(count), &mut io::sink()).map(drop),
        }
    }
}

/// A member as it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which.
    pub member: Member,
    /// Its size in bytes; 0 for a directory.
    pub size: u64,
}

/// The members of an archive in the order in which they come. Between two calls of [`ArchiveReader::next_entry`] the
/// reader is the content of the last one.
#[derive(Debug)]
pub struct ArchiveReader<R> {
    input: R,
    seen: HashSet<Member>,
    entries: u64,
    total: u64,
    remaining: u64,
    padding: u64,
    ended: bool,
}

impl<R: Skip> ArchiveReader<R> {
    /// Reads the tar that `input` is.
    pub fn new(input: R) -> Self {
        Self { input, seen: HashSet::new(), entries: 0, total: 0, remaining: 0, padding: 0, ended: false }
    }

    /// Goes to the next member, past what is unread of the last one; none at the end.
    ///
    /// # Errors
    /// [`Error::Refused`], and of reading.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        loop {
            if self.ended {
                return Ok(None);
            }
            self.input.skip(self.remaining + std::mem::take(&mut self.padding)).map_err(read_error)?;
            self.remaining = 0;
            let Some(header) = tar::read_header(&mut self.input)? else {
                self.ended = true;
                return Ok(None);
            };
            self.entries += 1;
            if self.entries > limits::ENTRIES_MAX {
                return Err(Error::refused(format!("it has more than {} entries", limits::ENTRIES_MAX)));
            }
            let Some(member) = accept(&header)? else { continue };
            self.account(&member, header.size)?;
            return Ok(Some(Entry { member, size: header.size }));
        }
    }

    /// Reads the whole content of the current member.
    ///
    /// # Errors
    /// If the archive ends before it does.
    pub fn content(&mut self) -> Result<Vec<u8>> {
        let expected = self.remaining;
        let mut content = Vec::new();
        self.read_to_end(&mut content).map_err(read_error)?;
        if content.len() as u64 == expected { Ok(content) } else { Err(Error::refused("it ends in the middle")) }
    }

    fn account(&mut self, member: &Member, size: u64) -> Result<()> {
        if size > member.size_max() {
            return Err(Error::refused(format!("{member} has {size} bytes, more than {}", member.size_max())));
        }
        self.total += size;
        if self.total > limits::TOTAL_MAX {
            return Err(Error::refused(format!("it has more than {} bytes", limits::TOTAL_MAX)));
        }
        if !self.seen.insert(member.clone()) {
            return Err(Error::refused(format!("{member} occurs twice")));
        }
        self.remaining = size;
        self.padding = tar::padding(size) as u64;
        Ok(())
    }
}

impl<R: Read> Read for ArchiveReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.input.read(&mut buffer[..room])?;
        self.remaining -= read as u64;
        Ok(read)
    }
}

/// The member that a header stands for; none for the archive's own root.
fn accept(header: &tar::Header) -> Result<Option<Member>> {
    let shown = || header.name.chars().take(80).collect::<String>();
    if header.name.len() > limits::NAME_MAX {
        return Err(Error::refused(format!("the name {:?}… has {} bytes", shown(), header.name.len())));
    }
    if header.name.starts_with('/') {
        return Err(Error::refused(format!("the name {:?} is absolute", shown())));
    }
    if header.name.split('/').any(|part| part == "..") {
        return Err(Error::refused(format!("the name {:?} leads upwards", shown())));
    }
    let name = header.name.strip_prefix("./").unwrap_or(&header.name);
    let name = if header.is_dir { name.strip_suffix('/').unwrap_or(name) } else { name };
    if header.is_dir && matches!(name, "" | ".") {
        return Ok(None);
    }
    let member = Member::parse(name).filter(|member| member.is_dir() == header.is_dir);
    let unknown = || Error::refused(format!("{:?} belongs to no checkpoint of a container", shown()));
    member.map(Some).ok_or_else(unknown)
}
