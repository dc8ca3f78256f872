//! One pass over a tar archive: ustar, GNU and PAX (POSIX.1-2017, pax, "pax Interchange Format").
//!
//! The crate `tar` decodes the fields of a header block; the framing is our own, because two readers that disagree about
//! where an entry ends can be made to see different files in one archive, and because nothing here may grow with what an
//! archive claims. Where a PAX header and the entry's own give different values, the PAX header's counts, as POSIX says.
//! What readers are known to disagree on is refused: data behind an entry that has none, sparse files, unknown types, an
//! empty block in the middle. It knows nothing of the file system.

use crate::error::{Error, Result};
use crate::limits::{EXTENDED_HEADER_BYTES_MAX, Limits, NAME_BYTES_MAX, PATH_BYTES_MAX, XATTR_BYTES_MAX, XATTRS_MAX};
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

const BLOCK_BYTES: usize = 512;

/// Prefix of the PAX records for extended attributes, as star, GNU tar and Go write them.
pub(crate) const PAX_XATTR_PREFIX: &str = "SCHILY.xattr.";

/// A file of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The name as it stands there; nothing is known about it but that it is not too long and has no zero byte.
    pub(crate) path: PathBuf,
    pub(crate) kind: Kind,
    /// Permission bits, with set-user-ID, set-group-ID and the sticky bit.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// All that the archive has, in its order: what may be set is decided elsewhere.
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// With the number of bytes that follow.
    File(u64),
    Directory,
    Symlink(PathBuf),
    /// With the name of an earlier entry.
    HardLink(PathBuf),
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Since 1970; the nanoseconds count forward from a second that may be negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

pub(crate) struct TarReader<R> {
    source: R,
    limits: Limits,
    entries: u64,
    bytes: u64,
    name_bytes: u64,
    /// What is left of the current entry's data, and of the padding behind it.
    data_left: u64,
    padding: u64,
    buffer: Vec<u8>,
}

/// What extended headers said about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(source: R, limits: Limits) -> TarReader<R> {
        let buffer = vec![0; 128 << 10];
        TarReader { source, limits, entries: 0, bytes: 0, name_bytes: 0, data_left: 0, padding: 0, buffer }
    }

    /// The next entry, after what is left of the one before. `None` at the end of the archive; the source has then been
    /// read to its end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut extended = Extended::default();
        let mut pending = false;
        loop {
            self.skip_data()?;
            let Some(header) = self.header()? else {
                return if pending { Err(Error::archive("it ends after an extended header")) } else { Ok(None) };
            };
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(Error::Limit { what: "entries", limit: self.limits.entries });
            }
            match header.entry_type().as_byte() {
                b'x' => extended.read_pax(&self.extended_header(&header)?)?,
                b'L' => extended.path = Some(gnu_name(self.extended_header(&header)?)),
                b'K' => extended.link = Some(gnu_name(self.extended_header(&header)?)),
                // Go's reader, and so every runtime, takes a global header for a comment, which is what git writes.
                b'g' => drop(self.extended_header(&header)?),
                _ => return self.entry(&header, extended).map(Some),
            }
            pending = true;
        }
    }

    /// Hands the data of the current entry to `sink`, piece by piece.
    pub(crate) fn data(&mut self, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> std::result::Result<(), DataError> {
        while self.data_left > 0 {
            let want = self.buffer.len().min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
            let mut buffer = std::mem::take(&mut self.buffer);
            let done = self.fill(&mut buffer[..want]).map_err(DataError::Source).and_then(|()| {
                self.data_left -= want as u64;
                sink(&buffer[..want]).map_err(DataError::Sink)
            });
            self.buffer = buffer;
            done?;
        }
        Ok(())
    }

    fn entry(&mut self, header: &tar::Header, extended: Extended) -> Result<Entry> {
        let name = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        self.name_bytes += name.len() as u64;
        if self.name_bytes > NAME_BYTES_MAX {
            return Err(Error::Limit { what: "bytes of names", limit: NAME_BYTES_MAX });
        }
        let is_directory_by_name = name.last() == Some(&b'/');
        let path = checked_path(name)?;
        let refuse = |reason: &str| Error::entry(&path, reason);
        let fields = header.as_old();
        // Some writers leave a field blank for zero.
        let number = |raw: &[u8], value: io::Result<u64>| match value {
            Err(_) if raw.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
            value => value.map_err(|error| refuse(&error.to_string())),
        };
        let size = extended.size.map_or_else(|| number(&fields.size, header.entry_size()), Ok)?;
        let kind = kind(header, &path, is_directory_by_name, extended.link, size)?;
        let id = |value: u64| match u32::try_from(value) {
            // The largest number means "leave it" to chown(2).
            Ok(value) if value != u32::MAX => Ok(value),
            _ => Err(refuse("a user or group ID is out of range")),
        };
        let uid = id(extended.uid.map_or_else(|| number(&fields.uid, header.uid()), Ok)?)?;
        let gid = id(extended.gid.map_or_else(|| number(&fields.gid, header.gid()), Ok)?)?;
        let mode = number(&fields.mode, header.mode().map(u64::from))? as u32 & 0o7777;
        let mtime = match extended.mtime {
            Some(time) => time,
            None => Time { seconds: number(&fields.mtime, header.mtime())?.cast_signed(), nanoseconds: 0 },
        };
        self.expect_data(size)?;
        Ok(Entry { path, kind, mode, uid, gid, mtime, xattrs: extended.xattrs })
    }

    /// A header block whose sum is right, or `None` at the end.
    fn header(&mut self) -> Result<Option<tar::Header>> {
        let mut block = [0; BLOCK_BYTES];
        if !self.block(&mut block)? {
            return Ok(None);
        }
        if block == [0; BLOCK_BYTES] {
            if self.block(&mut block)? && block != [0; BLOCK_BYTES] {
                return Err(Error::archive("an empty block stands in the middle"));
            }
            self.drain()?;
            return Ok(None);
        }
        let header = tar::Header::from_byte_slice(&block).clone();
        // POSIX: the sum of all bytes, those of the sum itself taken as spaces.
        let sum = block.iter().map(|byte| u32::from(*byte)).sum::<u32>()
            - block[148..156].iter().map(|byte| u32::from(*byte)).sum::<u32>()
            + 8 * u32::from(b' ');
        if header.cksum().ok() != Some(sum) {
            return Err(Error::archive("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn extended_header(&mut self, header: &tar::Header) -> Result<Vec<u8>> {
        let size = header.entry_size().map_err(|error| Error::archive(error.to_string()))?;
        if size > EXTENDED_HEADER_BYTES_MAX {
            return Err(Error::Limit { what: "bytes in an extended header", limit: EXTENDED_HEADER_BYTES_MAX });
        }
        self.expect_data(size)?;
        let mut content = Vec::with_capacity(size as usize);
        self.data(|bytes| {
            content.extend_from_slice(bytes);
            Ok(())
        })
        .map_err(DataError::into_read)?;
        Ok(content)
    }

    fn expect_data(&mut self, size: u64) -> Result<()> {
        if size > self.limits.bytes {
            return Err(Error::Limit { what: "bytes", limit: self.limits.bytes });
        }
        self.data_left = size;
        self.padding = size.next_multiple_of(BLOCK_BYTES as u64) - size;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<()> {
        self.data(|_| Ok(())).map_err(DataError::into_read)?;
        self.data_left = std::mem::take(&mut self.padding);
        self.data(|_| Ok(())).map_err(DataError::into_read)
    }

    /// Fills a block; `false` when the source ends instead.
    fn block(&mut self, block: &mut [u8; BLOCK_BYTES]) -> Result<bool> {
        let first = loop {
            match self.source.read(&mut block[..1]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => break done.map_err(|source| Error::Read { source })?,
            }
        };
        if first == 0 {
            return Ok(false);
        }
        self.fill(&mut block[1..])?;
        self.count(1)?;
        Ok(true)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.source.read_exact(buffer).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Error::archive("it ends in the middle of an entry"),
            _ => Error::Read { source },
        })?;
        self.count(buffer.len())
    }

    /// Whoever compares the digest of the stream must get to see all of it, what follows the archive too.
    fn drain(&mut self) -> Result<()> {
        loop {
            match self.source.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => self.count(length)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Read { source }),
            }
        }
    }

    fn count(&mut self, bytes: usize) -> Result<()> {
        self.bytes += bytes as u64;
        if self.bytes > self.limits.bytes {
            return Err(Error::Limit { what: "bytes", limit: self.limits.bytes });
        }
        Ok(())
    }
}

/// Which side of a copy failed.
#[derive(Debug)]
pub(crate) enum DataError {
    Source(Error),
    Sink(io::Error),
}

impl DataError {
    fn into_read(self) -> Error {
        match self {
            DataError::Source(error) => error,
            DataError::Sink(source) => Error::Read { source },
        }
    }
}

impl Extended {
    /// Records of the form `length keyword=value\n`, where the length counts all of it, and the value may be binary.
    fn read_pax(&mut self, records: &[u8]) -> Result<()> {
        let malformed = || Error::archive("a PAX header is malformed");
        let mut rest = records;
        while !rest.is_empty() {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(malformed)?;
            let length: usize =
                str::from_utf8(&rest[..space]).ok().and_then(|text| text.parse().ok()).ok_or_else(malformed)?;
            let record = rest.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n"));
            let record = record.ok_or_else(malformed)?;
            rest = &rest[length..];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            let keyword = str::from_utf8(&record[..equals]).map_err(|_| malformed())?;
            self.set(keyword, &record[equals + 1..])?;
        }
        Ok(())
    }

    fn set(&mut self, keyword: &str, value: &[u8]) -> Result<()> {
        let number = || {
            let text = str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            let number = text.and_then(|text| text.parse::<u64>().ok());
            number.ok_or_else(|| Error::archive(format!("the PAX record {keyword:?} is no number")))
        };
        match keyword {
            "path" => self.path = Some(value.to_vec()),
            "linkpath" => self.link = Some(value.to_vec()),
            "size" => self.size = Some(number()?),
            "uid" => self.uid = Some(number()?),
            "gid" => self.gid = Some(number()?),
            "mtime" => self.mtime = Some(Time::parse(value).ok_or_else(|| Error::archive("a PAX time is no number"))?),
            _ if keyword.starts_with("GNU.sparse.") => {
                return Err(Error::archive("sparse files are not allowed in layers"));
            }
            _ => {
                if let Some(name) = keyword.strip_prefix(PAX_XATTR_PREFIX) {
                    self.add_xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn add_xattr(&mut self, name: &str, value: &[u8]) -> Result<()> {
        if self.xattrs.len() >= XATTRS_MAX {
            return Err(Error::Limit { what: "extended attributes on an entry", limit: XATTRS_MAX as u64 });
        }
        if value.len() > XATTR_BYTES_MAX {
            return Err(Error::Limit { what: "bytes in an extended attribute", limit: XATTR_BYTES_MAX as u64 });
        }
        self.xattrs.push((name.to_owned(), value.to_vec()));
        Ok(())
    }
}

impl Time {
    /// A decimal number with or without a sign and a fraction.
    fn parse(text: &[u8]) -> Option<Time> {
        let text = str::from_utf8(text).ok()?;
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let negative = whole.starts_with('-');
        let seconds: i64 = whole.parse().ok()?;
        if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let nanoseconds: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
        if negative && nanoseconds > 0 {
            return Some(Time { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds });
        }
        Some(Time { seconds, nanoseconds })
    }
}

fn kind(
    header: &tar::Header,
    path: &Path,
    is_directory_by_name: bool,
    long_link: Option<Vec<u8>>,
    size: u64,
) -> Result<Kind> {
    let refuse = |reason: &str| Error::entry(path, reason);
    let link = || match long_link.or_else(|| header.link_name_bytes().map(|name| name.into_owned())) {
        Some(link) if !link.is_empty() => checked_path(link),
        _ => Err(refuse("the link has no target")),
    };
    let device = || -> Result<(u32, u32)> {
        let part = |field: io::Result<Option<u32>>| field.ok().flatten().ok_or_else(|| refuse("no device number"));
        Ok((part(header.device_major())?, part(header.device_minor())?))
    };
    let kind = match header.entry_type().as_byte() {
        // Version 7 archives know no type for a directory but the slash at the end of its name.
        b'0' | b'\0' if is_directory_by_name => Kind::Directory,
        b'0' | b'\0' | b'7' => Kind::File(size),
        b'1' => Kind::HardLink(link()?),
        b'2' => Kind::Symlink(link()?),
        b'3' => device().map(|(major, minor)| Kind::Char { major, minor })?,
        b'4' => device().map(|(major, minor)| Kind::Block { major, minor })?,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => return Err(refuse("sparse files are not allowed in layers")),
        other => return Err(refuse(&format!("unknown type {:?}", char::from(other)))),
    };
    if size != 0 && !matches!(kind, Kind::File(_)) {
        return Err(refuse("an entry that is no file has data"));
    }
    Ok(kind)
}

/// GNU's long names end in a zero byte that counts.
fn gnu_name(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

fn checked_path(name: Vec<u8>) -> Result<PathBuf> {
    let path = PathBuf::from(OsString::from_vec(name));
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.len() > PATH_BYTES_MAX {
        return Err(Error::entry(&path, format!("a name is longer than {PATH_BYTES_MAX} bytes")));
    }
    if bytes.contains(&0) {
        return Err(Error::entry(&path, "a name holds a zero byte"));
    }
    Ok(path)
}
