//! Archives of file systems in memory, which CRIU lets the host's tar unpack as root.
//!
//! Read as GNU tar writes them. Only what decides where something lands is kept; content is passed over.

use std::collections::BTreeSet;
use std::io::{self, Read};

use flate2::read::MultiGzDecoder;

const BLOCK: usize = 512;
/// Entries of one archive.
const ENTRIES_MAX: usize = 200_000;
/// A long name or an extended header.
const LONG_MAX: u64 = 64 * 1024;
/// Bytes of names that are remembered.
const NAMES_MAX: usize = 8 << 20;
/// What a compressed byte may become; gzip ends at 1032.
const RATIO_MAX: u64 = 1000;
/// What may come out before that counts.
const RATIO_FREE: u64 = 16 << 20;

/// What is in one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Device nodes: path, whether it is a block device, numbers.
    pub devices: Vec<(String, bool, u32, u32)>,
    /// Bytes of files.
    pub bytes: u64,
}

/// Goes through one. The error says in words what is refused.
pub(crate) fn read(compressed: impl Read) -> Result<Contents, String> {
    let mut reader = Reader { input: Counted::new(compressed), seen: Seen::default(), contents: Contents::default() };
    let mut long = Long::default();
    let mut entries = 0;
    while let Some(header) = reader.header()? {
        entries += 1;
        if entries > ENTRIES_MAX {
            return Err(format!("it has more than {ENTRIES_MAX} entries"));
        }
        reader.entry(&header, &mut long)?;
    }
    Ok(reader.contents)
}

/// What an entry before says of the next one.
#[derive(Default)]
struct Long {
    name: Option<String>,
    target: Option<String>,
}

#[derive(Default)]
struct Seen {
    files: BTreeSet<String>,
    links: BTreeSet<String>,
    bytes: usize,
}

struct Reader<R: Read> {
    input: Counted<R>,
    seen: Seen,
    contents: Contents,
}

impl<R: Read> Reader<R> {
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, String> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            match self.input.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err("it ends in the middle".to_owned()),
                Ok(read) => have += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) })
            .sum();
        if number(&block[148..156])? != sum {
            return Err("the checksum of an entry is wrong".to_owned());
        }
        Ok(Some(block))
    }

    fn entry(&mut self, header: &[u8; BLOCK], long: &mut Long) -> Result<(), String> {
        let size = number(&header[124..136])?;
        match header[156] {
            b'L' => long.name = Some(self.long_text(size)?),
            b'K' => long.target = Some(self.long_text(size)?),
            b'x' => self.extended(size, long)?,
            kind => {
                let Long { name, target } = std::mem::take(long);
                let name = match name {
                    Some(name) => name,
                    None => short_name(header)?,
                };
                let target = match target {
                    Some(target) => target,
                    None => text(&header[157..257])?,
                };
                self.file(kind, &name, &target, header, size)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, kind: u8, name: &str, target: &str, header: &[u8; BLOCK], size: u64) -> Result<(), String> {
        let shown: String = name.chars().take(80).collect();
        let path = inside(name).ok_or_else(|| format!("{shown:?} leads out of the file system"))?;
        if let Some(link) = ancestors(&path).find(|part| self.seen.links.contains(*part)) {
            return Err(format!("{shown:?} is behind the link {link:?}"));
        }
        self.seen.bytes += path.len();
        if self.seen.bytes > NAMES_MAX {
            return Err("its names are longer than is accepted".to_owned());
        }
        match kind {
            b'0' | 0 | b'7' => {
                self.seen.files.insert(path);
                self.content(size)?;
            }
            b'S' => {
                self.seen.files.insert(path);
                // The map of a sparse file goes on in blocks of its own.
                let mut more = header[482];
                while more != 0 {
                    let mut block = [0; BLOCK];
                    self.input.read_exact(&mut block).map_err(|error| error.to_string())?;
                    more = block[504];
                }
                self.content(size)?;
            }
            b'1' => {
                let there = inside(target).is_some_and(|target| self.seen.files.contains(&target));
                if !there {
                    return Err(format!("{shown:?} is a hard link to what is not in the archive before it"));
                }
                self.content(size)?;
            }
            b'2' => {
                self.seen.links.insert(path);
            }
            b'3' | b'4' => {
                let wide = |field: &[u8]| {
                    u32::try_from(number(field)?).map_err(|_| "a device's number is too large".to_owned())
                };
                let (major, minor) = (wide(&header[329..337])?, wide(&header[337..345])?);
                self.contents.devices.push((path, kind == b'4', major, minor));
            }
            b'5' | b'6' => {}
            other => return Err(format!("{shown:?} is of the unknown type {:?}", char::from(other))),
        }
        Ok(())
    }

    fn content(&mut self, size: u64) -> Result<(), String> {
        self.contents.bytes = self.contents.bytes.saturating_add(size);
        self.skip(size)
    }

    fn skip(&mut self, size: u64) -> Result<(), String> {
        let padded = size.checked_add(size.wrapping_neg() % BLOCK as u64).ok_or("a file is too large")?;
        let passed = io::copy(&mut Read::by_ref(&mut self.input).take(padded), &mut io::sink());
        match passed.map_err(|error| error.to_string())? {
            passed if passed == padded => Ok(()),
            _ => Err("it ends in the middle".to_owned()),
        }
    }

    fn long_bytes(&mut self, size: u64) -> Result<Vec<u8>, String> {
        if size > LONG_MAX {
            return Err("an extended header is too long".to_owned());
        }
        let padded = size + size.wrapping_neg() % BLOCK as u64;
        let mut bytes = vec![0; usize::try_from(padded).unwrap_or_default()];
        self.input.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        bytes.truncate(usize::try_from(size).unwrap_or_default());
        Ok(bytes)
    }

    fn long_text(&mut self, size: u64) -> Result<String, String> {
        let bytes = self.long_bytes(size)?;
        text(&bytes)
    }

    /// Records of `length key=value`, each with its line feed.
    fn extended(&mut self, size: u64, long: &mut Long) -> Result<(), String> {
        let bytes = self.long_bytes(size)?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let bad = "an extended header is malformed";
            let digits = rest.iter().position(|byte| *byte == b' ').ok_or(bad)?;
            let length: usize =
                std::str::from_utf8(&rest[..digits]).ok().and_then(|text| text.parse().ok()).ok_or(bad)?;
            let record = rest.get(digits + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or(bad)?;
            let (key, value) = record.split_at(record.iter().position(|byte| *byte == b'=').ok_or(bad)?);
            match key {
                b"path" => long.name = Some(text(&value[1..])?),
                b"linkpath" => long.target = Some(text(&value[1..])?),
                // What would change how much is read or where it lands.
                b"size" => return Err("an extended header tells another size".to_owned()),
                key if key.starts_with(b"GNU.sparse") => return Err("it has sparse files of another form".to_owned()),
                _ => {}
            }
            rest = &rest[length..];
        }
        Ok(())
    }
}

/// The path below the root of the file system; none if it is not.
fn inside(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    (!name.starts_with('/') && !parts.contains(&"..")).then(|| parts.join("/"))
}

/// The path and all that is above it.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rsplit_once('/').map(|(parent, _)| parent))
}

fn short_name(header: &[u8; BLOCK]) -> Result<String, String> {
    let name = text(&header[..100])?;
    // GNU's own form has times where the other has the beginning of the name.
    let posix = &header[257..263] == b"ustar\0";
    let prefix = if posix { text(&header[345..500])? } else { String::new() };
    Ok(if prefix.is_empty() { name } else { format!("{prefix}/{name}") })
}

fn text(field: &[u8]) -> Result<String, String> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8(field[..end].to_vec()).map_err(|_| "a name is no UTF-8".to_owned())
}

/// Octal, or base 256 for large ones.
fn number(field: &[u8]) -> Result<u64, String> {
    if field.first().is_some_and(|first| *first == 0x80) {
        let bytes = &field[1..];
        let (high, low) = bytes.split_at(bytes.len().saturating_sub(8));
        if high.iter().any(|byte| *byte != 0) {
            return Err("a number is too large".to_owned());
        }
        return Ok(low.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
    }
    let text: Vec<u8> = field.iter().copied().filter(|byte| !matches!(byte, 0 | b' ')).collect();
    text.iter()
        .try_fold(0u64, |number, digit| match digit {
            b'0'..=b'7' => number.checked_mul(8).map(|number| number + u64::from(digit - b'0')),
            _ => None,
        })
        .ok_or_else(|| "a number is malformed".to_owned())
}

/// Decompresses, and watches what becomes of it.
struct Counted<R: Read> {
    stream: MultiGzDecoder<Counting<R>>,
    produced: u64,
}

struct Counting<R> {
    input: R,
    consumed: u64,
}

impl<R: Read> Counted<R> {
    fn new(input: R) -> Self {
        Self { stream: MultiGzDecoder::new(Counting { input, consumed: 0 }), produced: 0 }
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.consumed += read as u64;
        Ok(read)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.produced += read as u64;
        if self.produced > RATIO_FREE && self.produced / RATIO_MAX > self.stream.get_ref().consumed {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is a bomb: too much comes out of it"));
        }
        Ok(read)
    }
}
