//! Files of one cgroup directory, read relative to its descriptor into one buffer, and the shapes that they have.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::{Pressure, Stall};
use crate::error::{Error, Result};

/// Largest file of accounts that is read: `memory.stat` has 2 KiB, `io.stat` 100 bytes for each device of the host.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Room for nearly every file at first.
const BUFFER_BYTES: usize = 8 << 10;

/// Limits from here on are "none": the kernel rounds the greatest number down to a page.
const UNLIMITED: u64 = 1 << 62;

/// An open cgroup directory.
pub(super) struct Files {
    dir: OwnedFd,
    path: PathBuf,
    buffer: Vec<u8>,
}

impl Files {
    pub(super) fn open(path: &Path) -> Result<Files> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = openat(CWD, path, flags, Mode::empty());
        let dir = opened.map_err(|errno| Error::io("opening the cgroup", path)(errno.into()))?;
        Ok(Files { dir, path: path.to_owned(), buffer: vec![0; BUFFER_BYTES] })
    }

    /// The text of a file; none where this kernel, or this cgroup, does not have it.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<&str>> {
        let length = match self.fill(name) {
            // The second is said of pressure files where the kernel was told not to keep them.
            Err(Errno::NOENT | Errno::OPNOTSUPP) => return Ok(None),
            filled => filled.map_err(|errno| Error::io("reading", &self.path.join(name))(errno.into()))?,
        };
        match std::str::from_utf8(&self.buffer[..length]) {
            Ok(text) => Ok(Some(text)),
            Err(_) => {
                let error = io::Error::new(io::ErrorKind::InvalidData, "it is no text");
                Err(Error::io("reading", &self.path.join(name))(error))
            }
        }
    }

    fn fill(&mut self, name: &str) -> std::result::Result<usize, Errno> {
        let file = openat(&self.dir, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?;
        let mut length = 0;
        loop {
            if length == self.buffer.len() {
                if length >= FILE_BYTES_MAX {
                    return Err(Errno::FBIG);
                }
                self.buffer.resize(2 * length, 0);
            }
            match rustix::io::read(&file, &mut self.buffer[length..]) {
                Ok(0) => return Ok(length),
                Ok(more) => length += more,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// A file that holds one number.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(self.malformed(name, "a number")),
        }
    }

    /// A file that holds a limit: a number, or the kernel's words for "none".
    pub(super) fn limit(&mut self, name: &str) -> Result<Option<u64>> {
        match self.text(name)?.map(str::trim) {
            None | Some("max") => Ok(None),
            Some(_) => Ok(self.number(name)?.filter(|limit| *limit < UNLIMITED)),
        }
    }

    /// A pressure file; none where the kernel does not have it.
    pub(super) fn pressure(&mut self, name: &str) -> Result<Option<Pressure>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match pressure(text) {
            Some(pressure) => Ok(Some(pressure)),
            None => Err(self.malformed(name, "lines `some` and `full`")),
        }
    }

    pub(super) fn malformed(&self, name: &str, expected: &'static str) -> Error {
        let end = self.buffer.iter().position(|byte| *byte == 0).unwrap_or(self.buffer.len()).min(64);
        let found = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        Error::Malformed { file: self.path.join(name), expected, found }
    }
}

/// The pairs of a file of `key value` lines. Lines of another shape are passed over: the kernel adds to these files.
pub(super) fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`; the kernel's total is in microseconds.
pub(super) fn pressure(text: &str) -> Option<Pressure> {
    let mut pressure = None;
    for line in text.lines() {
        let (kind, rest) = line.split_once(' ')?;
        let pressure: &mut Pressure = pressure.get_or_insert_default();
        match kind {
            "some" => pressure.some = stall(rest)?,
            "full" => pressure.full = stall(rest)?,
            _ => {}
        }
    }
    pressure
}

fn stall(text: &str) -> Option<Stall> {
    let mut stall = Stall::default();
    for field in text.split_whitespace() {
        let (name, value) = field.split_once('=')?;
        match name {
            "avg10" => stall.avg10 = value.parse().ok()?,
            "avg60" => stall.avg60 = value.parse().ok()?,
            "avg300" => stall.avg300 = value.parse().ok()?,
            "total" => stall.total = value.parse::<u64>().ok()?.checked_mul(1000)?,
            _ => {}
        }
    }
    Some(stall)
}

/// `8:16`, the numbers of a device.
pub(super) fn device_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The sizes of huge pages of this host, as the names of the controller's files have them (`2MB`, `1GB`).
pub(super) fn huge_page_sizes() -> &'static [String] {
    static SIZES: OnceLock<Vec<String>> = OnceLock::new();
    SIZES.get_or_init(|| {
        let listed = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
        let mut sizes: Vec<u64> = listed
            .filter_map(|entry| {
                entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
            })
            .collect();
        sizes.sort_unstable();
        sizes.into_iter().map(size_name).collect()
    })
}

pub(super) fn size_name(kibibytes: u64) -> String {
    match kibibytes {
        size if size % (1 << 20) == 0 => format!("{}GB", size >> 20),
        size if size % (1 << 10) == 0 => format!("{}MB", size >> 10),
        size => format!("{size}KB"),
    }
}
