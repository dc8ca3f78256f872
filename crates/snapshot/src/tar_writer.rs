//! Writes a tar archive: ustar, with PAX headers where ustar is too narrow, as Go's writer does. Deterministic.

use crate::tar_reader::PAX_XATTR_PREFIX;
use rustix::fs::{Stat, major, minor};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BLOCK_BYTES: u64 = 512;

/// What the fields of a ustar header can hold: names, numbers in 7 and in 11 octal digits.
const NAME_BYTES_MAX: usize = 100;
const OCTAL_7_MAX: u64 = 0o7_777_777;
const OCTAL_11_MAX: u64 = 0o77_777_777_777;

/// What an entry is, beyond its stat.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target<'a> {
    /// With its size; exactly as many bytes must follow by [`TarWriter::data`].
    File(u64),
    Directory,
    Symlink(&'a Path),
    HardLink(&'a Path),
    Char,
    Block,
    Fifo,
}

pub(crate) struct TarWriter<W> {
    out: W,
    entries: u64,
    bytes: u64,
    buffer: Vec<u8>,
}

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(out: W) -> TarWriter<W> {
        TarWriter { out, entries: 0, bytes: 0, buffer: vec![0; 256 << 10] }
    }

    pub(crate) fn entry(
        &mut self,
        path: &Path,
        stat: &Stat,
        target: Target<'_>,
        xattrs: &[(String, Vec<u8>)],
    ) -> io::Result<()> {
        let mut name = path.as_os_str().as_bytes().to_vec();
        if matches!(target, Target::Directory) {
            name.push(b'/');
        }
        let link = match target {
            Target::Symlink(link) | Target::HardLink(link) => link.as_os_str().as_bytes(),
            _ => b"",
        };
        let size = if let Target::File(size) = target { size } else { 0 };
        let (uid, gid) = (u64::from(stat.st_uid), u64::from(stat.st_gid));
        let fraction = stat.st_mtime_nsec;
        let seconds = u64::try_from(stat.st_mtime).ok().filter(|seconds| *seconds <= OCTAL_11_MAX);

        let mut pax = Vec::new();
        if name.len() > NAME_BYTES_MAX {
            record(&mut pax, "path", &name);
        }
        if link.len() > NAME_BYTES_MAX {
            record(&mut pax, "linkpath", link);
        }
        for (keyword, number, max) in
            [("uid", uid, OCTAL_7_MAX), ("gid", gid, OCTAL_7_MAX), ("size", size, OCTAL_11_MAX)]
        {
            if number > max {
                record(&mut pax, keyword, number.to_string().as_bytes());
            }
        }
        if fraction != 0 || seconds.is_none() {
            record(&mut pax, "mtime", decimal(stat.st_mtime, fraction).as_bytes());
        }
        for (attribute, value) in xattrs {
            record(&mut pax, &format!("{PAX_XATTR_PREFIX}{attribute}"), value);
        }
        if !pax.is_empty() {
            self.pax_header(&name, &pax)?;
        }

        let mut header = header(&name, link, target);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(if uid > OCTAL_7_MAX { 0 } else { uid });
        header.set_gid(if gid > OCTAL_7_MAX { 0 } else { gid });
        header.set_size(if size > OCTAL_11_MAX { 0 } else { size });
        header.set_mtime(seconds.unwrap_or(0));
        if matches!(target, Target::Char | Target::Block) {
            header.set_device_major(major(stat.st_rdev))?;
            header.set_device_minor(minor(stat.st_rdev))?;
        }
        self.header(&mut header)
    }

    /// An empty file that only its name means something of: a whiteout.
    pub(crate) fn marker(&mut self, path: &Path) -> io::Result<()> {
        let name = path.as_os_str().as_bytes();
        if name.len() > NAME_BYTES_MAX {
            let mut pax = Vec::new();
            record(&mut pax, "path", name);
            self.pax_header(name, &pax)?;
        }
        let mut header = header(name, b"", Target::File(0));
        header.set_mode(0o600);
        self.header(&mut header)
    }

    /// The content of the file whose entry was just written. What is missing of it is filled up with zeros, what is too
    /// much is left out.
    pub(crate) fn data(&mut self, source: &mut impl Read, size: u64) -> io::Result<()> {
        let mut left = size;
        while left > 0 {
            let want = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let got = match source.read(&mut self.buffer[..want]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                got => got?,
            };
            if got == 0 {
                io::copy(&mut io::repeat(0).take(left), &mut self.out)?;
                break;
            }
            self.out.write_all(&self.buffer[..got])?;
            left -= got as u64;
        }
        self.bytes += size;
        self.pad(size)
    }

    /// Ends the archive; gives the number of entries, and of bytes.
    pub(crate) fn finish(mut self) -> io::Result<(u64, u64)> {
        self.out.write_all(&[0; 2 * BLOCK_BYTES as usize])?;
        self.out.flush()?;
        Ok((self.entries, self.bytes + 2 * BLOCK_BYTES))
    }

    fn header(&mut self, header: &mut tar::Header) -> io::Result<()> {
        header.set_cksum();
        self.entries += 1;
        self.bytes += BLOCK_BYTES;
        self.out.write_all(header.as_bytes())
    }

    fn pax_header(&mut self, name: &[u8], records: &[u8]) -> io::Result<()> {
        let base = name.strip_suffix(b"/").unwrap_or(name).rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let mut header = header(&[b"PaxHeaders.0/", base].concat(), b"", Target::File(0));
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_mode(0o644);
        header.set_size(records.len() as u64);
        self.header(&mut header)?;
        self.entries -= 1;
        self.out.write_all(records)?;
        self.bytes += records.len() as u64;
        self.pad(records.len() as u64)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = size.next_multiple_of(BLOCK_BYTES) - size;
        self.bytes += padding;
        self.out.write_all(&[0; BLOCK_BYTES as usize][..padding as usize])
    }
}

fn header(name: &[u8], link: &[u8], target: Target<'_>) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(match target {
        Target::File(_) => tar::EntryType::Regular,
        Target::Directory => tar::EntryType::Directory,
        Target::Symlink(_) => tar::EntryType::Symlink,
        Target::HardLink(_) => tar::EntryType::Link,
        Target::Char => tar::EntryType::Char,
        Target::Block => tar::EntryType::Block,
        Target::Fifo => tar::EntryType::Fifo,
    });
    for number in [tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_size, tar::Header::set_mtime] {
        number(&mut header, 0);
    }
    let fields = header.as_old_mut();
    fill(&mut fields.name, name);
    fill(&mut fields.linkname, link);
    header
}

/// As much of a name as there is room for; a PAX record has all of it.
fn fill(field: &mut [u8; NAME_BYTES_MAX], name: &[u8]) {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
}

/// `length keyword=value\n`; the length counts itself.
fn record(pax: &mut Vec<u8>, keyword: &str, value: &[u8]) {
    let rest = keyword.len() + value.len() + " =\n".len();
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    pax.extend_from_slice(format!("{length} {keyword}=").as_bytes());
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

/// Seconds with a fraction that counts forward, as one decimal number.
fn decimal(seconds: i64, nanoseconds: u64) -> String {
    let (sign, whole, fraction) = match (seconds < 0, nanoseconds) {
        (false, _) => ("", seconds.unsigned_abs(), nanoseconds),
        (true, 0) => ("-", seconds.unsigned_abs(), 0),
        (true, _) => ("-", seconds.unsigned_abs() - 1, 1_000_000_000 - nanoseconds),
    };
    if fraction == 0 {
        return format!("{sign}{whole}");
    }
    format!("{sign}{whole}.{fraction:09}").trim_end_matches('0').to_owned()
}
