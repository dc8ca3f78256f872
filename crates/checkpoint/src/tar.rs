//! Headers of tar: the one form that is written, and the forms that are read.
//!
//! Written is POSIX ustar, with sizes of 8 GiB and more in base 256 (which Go and GNU tar read). Read are ustar and GNU
//! headers of regular files and directories, extended headers (PAX) of which only `path` and `size` count, and GNU's
//! long names. This module knows no member names.

use std::io::Read;

use crate::error::{Error, Result, read_error};
use crate::limits;

/// Everything in a tar comes in such blocks.
pub(crate) const BLOCK: usize = 512;

/// Largest size that fits the octal field.
const OCTAL_SIZE_MAX: u64 = 0o77_777_777_777;

/// A file or directory as its header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) is_dir: bool,
}

/// Bytes that fill the last block of a file of `size` bytes.
pub(crate) fn padding(size: u64) -> usize {
    let over = (size % BLOCK as u64) as usize;
    if over == 0 { 0 } else { BLOCK - over }
}

/// The header of a regular file (mode 0600) or directory (0700) of root. `name` is one of ours: at most 100 bytes.
pub(crate) fn encode(name: &str, size: u64, is_dir: bool, mtime: u64) -> Result<[u8; BLOCK]> {
    let mut block = [0u8; BLOCK];
    let name = if is_dir { format!("{name}/") } else { name.to_owned() };
    let field = block.get_mut(..name.len()).filter(|field| field.len() <= 100);
    field.ok_or_else(|| Error::refused(format!("{name:?} is too long for a member")))?.copy_from_slice(name.as_bytes());
    let mut text = |at: usize, value: &[u8]| block[at..at + value.len()].copy_from_slice(value);
    text(100, if is_dir { b"0000700\0" } else { b"0000600\0" });
    text(108, b"0000000\0");
    text(116, b"0000000\0");
    match size {
        0..=OCTAL_SIZE_MAX => text(124, format!("{size:011o}\0").as_bytes()),
        _ => {
            text(124, &[0x80, 0, 0, 0]);
            text(128, &size.to_be_bytes());
        }
    }
    text(136, format!("{:011o}\0", mtime.min(OCTAL_SIZE_MAX)).as_bytes());
    text(156, if is_dir { b"5" } else { b"0" });
    text(257, b"ustar\x0000");
    text(265, b"root");
    text(297, b"root");
    let sum = checksum(&block);
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

/// An extended header that says nothing: a comment of `length` bytes, which is a multiple of [`BLOCK`] and at least two of
/// them. It moves what follows to a place in the archive.
pub(crate) fn filler(length: usize, mtime: u64) -> Result<Vec<u8>> {
    let content = length - BLOCK;
    let mut filler = encode("padding", content as u64, false, mtime)?;
    filler[156] = b'x';
    let sum = checksum(&filler);
    filler[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut filler = filler.to_vec();
    filler.extend(format!("{content} comment=").as_bytes());
    filler.resize(length - 1, b' ');
    filler.push(b'\n');
    Ok(filler)
}

/// Reads the next header and what belongs to it; none at the end of the archive.
///
/// # Errors
/// [`Error::Refused`] for anything but regular files and directories, for broken headers and for a missing end.
pub(crate) fn read_header(input: &mut impl Read) -> Result<Option<Header>> {
    let mut extended = Extended::default();
    for _ in 0..=limits::EXTENDED_HEADERS_MAX {
        let Some(block) = read_block(input)? else { return Ok(None) };
        let raw = Raw(&block);
        raw.check_sum()?;
        match raw.kind() {
            b'x' => extended.read_pax(&read_extension(input, raw.size()?)?)?,
            // Global headers are a comment of the writer (git, for example); nothing in them counts.
            b'g' => drop(read_extension(input, raw.size()?)?),
            b'L' => extended.path = Some(long_name(read_extension(input, raw.size()?)?)?),
            b'0' | 0 => return extended.header(&raw, false).map(Some),
            b'5' => return extended.header(&raw, true).map(Some),
            kind => return Err(Error::refused(format!("{:?} is {}", raw.name(), describe(kind)))),
        }
    }
    Err(Error::refused(format!("more than {} extended headers before one entry", limits::EXTENDED_HEADERS_MAX)))
}

fn describe(kind: u8) -> String {
    match kind {
        b'1' => "a hard link".to_owned(),
        b'2' => "a symbolic link".to_owned(),
        b'3' => "a character device".to_owned(),
        b'4' => "a block device".to_owned(),
        b'6' => "a FIFO".to_owned(),
        b'S' => "a sparse file".to_owned(),
        other => format!("of type {:?}; only regular files and directories are accepted", char::from(other)),
    }
}

/// The next block; none for a block of zeros, which ends an archive.
fn read_block(input: &mut impl Read) -> Result<Option<[u8; BLOCK]>> {
    let mut block = [0u8; BLOCK];
    input.read_exact(&mut block).map_err(read_error)?;
    Ok((block != [0; BLOCK]).then_some(block))
}

fn read_extension(input: &mut impl Read, size: u64) -> Result<Vec<u8>> {
    if size > limits::EXTENDED_HEADER_MAX {
        return Err(Error::refused(format!("an extended header of {size} bytes")));
    }
    let mut content = vec![0; size as usize + padding(size)];
    input.read_exact(&mut content).map_err(read_error)?;
    content.truncate(size as usize);
    Ok(content)
}

fn long_name(mut name: Vec<u8>) -> Result<String> {
    while name.last() == Some(&0) {
        name.pop();
    }
    text(&name)
}

fn text(bytes: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    text.map(str::to_owned).ok_or_else(|| Error::refused(format!("the name {:?}", String::from_utf8_lossy(bytes))))
}

/// What extended headers say about the next file.
#[derive(Default)]
struct Extended {
    path: Option<String>,
    size: Option<u64>,
}

impl Extended {
    /// Records `"<length> <key>=<value>\n"`.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<()> {
        let broken = || Error::refused("a broken extended header");
        while !records.is_empty() {
            let space = records.iter().position(|byte| *byte == b' ').ok_or_else(broken)?;
            let length: usize = decimal(&records[..space]).and_then(|n| n.try_into().ok()).ok_or_else(broken)?;
            let record = records.get(space + 1..length).ok_or_else(broken)?;
            let record = record.strip_suffix(b"\n").ok_or_else(broken)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(broken)?;
            self.set(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match key {
            b"path" => self.path = Some(text(value)?),
            b"size" => self.size = Some(decimal(value).ok_or_else(|| Error::refused("a broken size"))?),
            b"linkpath" => return Err(Error::refused("a link in an extended header")),
            sparse if sparse.starts_with(b"GNU.sparse.") => return Err(Error::refused("a sparse file")),
            _ => {}
        }
        Ok(())
    }

    fn header(self, raw: &Raw<'_>, is_dir: bool) -> Result<Header> {
        let name = match self.path {
            Some(path) => path,
            None => text(&raw.name())?,
        };
        let size = self.size.map_or_else(|| raw.size(), Ok)?;
        if is_dir && size != 0 {
            return Err(Error::refused(format!("{name:?} is a directory of {size} bytes")));
        }
        // Before POSIX a directory was a file whose name ends in a slash. Both readings are in use, so neither is taken.
        if !is_dir && name.ends_with('/') {
            return Err(Error::refused(format!("{name:?} is a file with a directory's name")));
        }
        Ok(Header { name, size, is_dir })
    }
}

/// A header block as it came.
struct Raw<'a>(&'a [u8; BLOCK]);

impl Raw<'_> {
    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn check_sum(&self) -> Result<()> {
        let broken = || Error::refused("a header with a wrong checksum");
        let stated = octal(&self.0[148..156]).ok_or_else(broken)?;
        if stated == u64::from(checksum(self.0)) { Ok(()) } else { Err(broken()) }
    }

    fn size(&self) -> Result<u64> {
        let field = &self.0[124..136];
        let size = match field[0] {
            // Base 256: 0x80, then a big-endian number. What does not fit 64 bits is no size of ours.
            0x80 if field[1..4] == [0; 3] => field[4..].try_into().ok().map(u64::from_be_bytes),
            0x80.. => None,
            _ => octal(field),
        };
        size.ok_or_else(|| Error::refused("a header with a broken size"))
    }

    /// ustar splits long names into two fields; GNU uses the second field otherwise.
    fn name(&self) -> Vec<u8> {
        let until_zero = |field: &[u8]| field.iter().take_while(|byte| **byte != 0).copied().collect::<Vec<u8>>();
        let name = until_zero(&self.0[..100]);
        let prefix = until_zero(&self.0[345..500]);
        if &self.0[257..263] == b"ustar\0" && !prefix.is_empty() { [prefix, vec![b'/'], name].concat() } else { name }
    }
}

/// Sum of the bytes of a header with blanks in place of the sum itself.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let all: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    let own: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
    all - own + 8 * u32::from(b' ')
}

fn octal(field: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    let octal = digits.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok().filter(|_| octal) }
}

fn decimal(field: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(field).ok()?;
    if digits.bytes().all(|digit| digit.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, size: u64, is_dir: bool) {
        let block = encode(name, size, is_dir, 1_700_000_000).unwrap();
        let read = read_header(&mut &block[..]).unwrap().unwrap();
        assert_eq!(read.name.trim_end_matches('/'), name);
        assert_eq!((read.size, read.is_dir), (size, is_dir));
    }

    #[test]
    fn what_is_written_is_read() {
        check("config.dump", 0, false);
        check("checkpoint/pages-1.img", OCTAL_SIZE_MAX, false);
        check("checkpoint/pages-1.img", OCTAL_SIZE_MAX + 1, false);
        check("checkpoint/pages-1.img", u64::MAX, false);
        check("checkpoint", 0, true);
        assert!(encode(&"x".repeat(101), 0, false, 0).is_err());
    }

    #[test]
    fn padding_fills_the_last_block() {
        assert_eq!([0, 1, 511, 512, 513].map(padding), [0, 511, 1, 0, 511]);
    }

    #[test]
    fn a_filler_changes_nothing_but_the_place() {
        for length in [2 * BLOCK, 7 * BLOCK, 9 * BLOCK] {
            let mut bytes = filler(length, 0).unwrap();
            assert_eq!(bytes.len(), length);
            bytes.extend(encode("config.dump", 5, false, 0).unwrap());
            let read = read_header(&mut &bytes[..]).unwrap().unwrap();
            assert_eq!(read, Header { name: "config.dump".to_owned(), size: 5, is_dir: false });
        }
    }

    #[test]
    fn a_changed_header_is_noticed() {
        let mut block = encode("config.dump", 5, false, 0).unwrap();
        block[0] = b'd';
        assert!(read_header(&mut &block[..]).unwrap_err().to_string().contains("checksum"));
    }
}
