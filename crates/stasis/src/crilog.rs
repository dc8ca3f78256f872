//! Log files in CRI's format: parsing their lines, finding the last ones, following them through rotations.
//!
//! ```text
//! 2016-10-06T00:17:09.669794202Z stdout F a whole line
//! 2016-10-06T00:17:09.669794202Z stderr P the first part of a long li
//! 2016-10-06T00:17:10.113242941Z stderr F ne
//! ```

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Longest line that is kept in memory. The daemon splits lines at 16 KiB; a longer one is not CRI's, and is passed
/// on in pieces.
const LINE_MAX: usize = 1 << 20;

/// Which stream a line was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// One line of a log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    pub(crate) timestamp: &'a str,
    pub(crate) stream: Stream,
    /// The message goes on in the next line of the same stream.
    pub(crate) partial: bool,
    pub(crate) content: &'a [u8],
}

/// Reads a line, without its line break; none if it is not CRI's format.
pub(crate) fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let timestamp = std::str::from_utf8(parts.next()?).ok().filter(|t| t.parse::<jiff::Timestamp>().is_ok())?;
    let stream = match parts.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    // Tags are separated by colons; the first one says whether the line is whole.
    let partial = match parts.next()?.split(|b| *b == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Line { timestamp, stream, partial, content: parts.next()? })
}

/// Reads a log file as it grows.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    position: u64,
    /// A line whose end has not been written yet.
    pending: Vec<u8>,
}

impl Reader {
    /// Opens a log at its beginning, or before its last `tail` messages.
    pub(crate) fn open(path: &Path, tail: Option<usize>) -> io::Result<Self> {
        let mut file = BufReader::new(open(path)?);
        let position = match tail {
            Some(messages) => start_of_last(&mut file, messages)?,
            None => 0,
        };
        file.seek(SeekFrom::Start(position))?;
        Ok(Self { path: path.to_owned(), file, position, pending: Vec::new() })
    }

    /// Hands out all complete lines that are there now. Says whether there were any.
    pub(crate) fn drain<E: From<io::Error>>(
        &mut self,
        mut line: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut any = false;
        loop {
            let room = (LINE_MAX - self.pending.len()) as u64;
            let read = (&mut self.file).take(room).read_until(b'\n', &mut self.pending)?;
            self.position += read as u64;
            let ended = self.pending.last() == Some(&b'\n');
            if !ended && self.pending.len() < LINE_MAX {
                return Ok(any);
            }
            line(self.pending.strip_suffix(b"\n").unwrap_or(&self.pending))?;
            self.pending.clear();
            any = true;
        }
    }

    /// Hands out a last line that was never ended.
    pub(crate) fn rest<E>(&mut self, mut line: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let rest = std::mem::take(&mut self.pending);
        if rest.is_empty() { Ok(()) } else { line(&rest) }
    }

    /// Goes over to a new file at the same path, or back to the beginning of a shortened one. Says whether it did.
    /// The old file must have been drained: its last lines are written before the new one is made.
    pub(crate) fn follow_rotation(&mut self) -> io::Result<bool> {
        let now = match std::fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata,
            // Between the rename and the new file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let open_one = self.file.get_ref().metadata()?;
        if (now.dev(), now.ino()) != (open_one.dev(), open_one.ino()) {
            *self = Self { path: self.path.clone(), ..Self::open(&self.path, None)? };
            return Ok(true);
        }
        if now.len() < self.position {
            self.file.seek(SeekFrom::Start(0))?;
            self.position = 0;
            self.pending.clear();
            return Ok(true);
        }
        Ok(false)
    }
}

/// Opens a regular file, and neither follows a link at its end nor waits at a FIFO.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    #[allow(clippy::cast_possible_wrap, reason = "open(2) takes the same bits as an int")]
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    Ok(file)
}

/// Where the last `messages` messages begin. A message may be several lines.
fn start_of_last(file: &mut BufReader<File>, messages: usize) -> io::Result<u64> {
    let mut starts: VecDeque<u64> = VecDeque::new();
    let (mut position, mut begins) = (0u64, true);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = file.take(LINE_MAX as u64).read_until(b'\n', &mut line)?;
        if read == 0 {
            break;
        }
        if begins {
            starts.push_back(position);
            if starts.len() > messages {
                starts.pop_front();
            }
        }
        position += read as u64;
        begins = !parse(line.strip_suffix(b"\n").unwrap_or(&line)).is_some_and(|l| l.partial);
    }
    Ok(starts.front().copied().unwrap_or(position))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const TIME: &str = "2016-10-06T00:17:09.669794202Z";

    #[test]
    fn lines_of_the_format() {
        let text = format!("{TIME} stdout F hello  world ");
        let line = parse(text.as_bytes()).unwrap();
        assert_eq!((line.timestamp, line.stream, line.partial), (TIME, Stream::Stdout, false));
        assert_eq!(line.content, b"hello  world ");
        assert_eq!(parse(format!("{TIME} stderr P:x part").as_bytes()).unwrap().stream, Stream::Stderr);
        assert!(parse(format!("{TIME} stderr P:x part").as_bytes()).unwrap().partial);
        assert_eq!(parse(format!("{TIME} stdout F ").as_bytes()).unwrap().content, b"");
        for bad in [
            "",
            "x",
            "now stdout F x",
            &format!("{TIME} stdin F x"),
            &format!("{TIME} stdout X x"),
            &format!("{TIME} stdout F"),
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    fn drained(reader: &mut Reader) -> Vec<String> {
        let mut lines = Vec::new();
        let sink = |line: &[u8]| -> io::Result<()> {
            lines.push(String::from_utf8_lossy(line).into_owned());
            Ok(())
        };
        reader.drain(sink).unwrap();
        lines
    }

    fn log(lines: &[&str]) -> String {
        lines.iter().map(|l| format!("{TIME} stdout {l}\n")).collect()
    }

    #[test]
    fn the_last_messages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, log(&["F a", "P b1", "P b2", "F b3", "F c"])).unwrap();
        let tail = |n| drained(&mut Reader::open(&path, Some(n)).unwrap()).len();
        assert_eq!([0, 1, 2, 3, 99].map(tail), [0, 1, 4, 5, 5]);
    }

    #[test]
    fn rotation_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, log(&["F a"])).unwrap();
        let mut reader = Reader::open(&path, None).unwrap();
        assert_eq!(drained(&mut reader).len(), 1);
        assert!(!reader.follow_rotation().unwrap());

        // The kubelet renames; the runtime writes on into the renamed file until it is told to reopen.
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        assert!(!reader.follow_rotation().unwrap(), "no new file yet");
        let mut old = OpenOptions::new().append(true).open(dir.path().join("0.log.1")).unwrap();
        old.write_all(log(&["F b"]).as_bytes()).unwrap();
        std::fs::write(&path, log(&["F c"])).unwrap();
        assert_eq!(drained(&mut reader), [format!("{TIME} stdout F b")]);
        assert!(reader.follow_rotation().unwrap());
        assert_eq!(drained(&mut reader), [format!("{TIME} stdout F c")]);

        // Truncated in place.
        std::fs::write(&path, "").unwrap();
        assert!(reader.follow_rotation().unwrap());
        assert!(drained(&mut reader).is_empty());
    }

    #[test]
    fn a_line_is_handed_out_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut file = File::create(&path).unwrap();
        let mut reader = Reader::open(&path, None).unwrap();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(drained(&mut reader), ["one"]);
        file.write_all(b"o\nend").unwrap();
        assert_eq!(drained(&mut reader), ["two"]);
        let mut rest = Vec::new();
        let sink = |line: &[u8]| -> io::Result<()> {
            rest.extend_from_slice(line);
            Ok(())
        };
        reader.rest(sink).unwrap();
        assert_eq!(rest, b"end");
    }

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/hostname", &link).unwrap();
        assert!(Reader::open(&link, None).is_err());
        assert!(Reader::open(Path::new("/dev/zero"), None).is_err());
        assert!(Reader::open(dir.path(), None).is_err());
    }

    proptest! {
        /// Whatever a container writes comes out as it was.
        #[test]
        fn content_survives(content in any::<Vec<u8>>(), partial in any::<bool>()) {
            prop_assume!(!content.contains(&b'\n'));
            let mut line = format!("{TIME} stderr {} ", if partial { "P" } else { "F" }).into_bytes();
            line.extend_from_slice(&content);
            let parsed = parse(&line).unwrap();
            prop_assert_eq!(parsed.content, &content[..]);
            prop_assert_eq!(parsed.partial, partial);
        }

        #[test]
        fn no_line_is_too_odd(line in any::<Vec<u8>>()) {
            let _ = parse(&line);
        }
    }
}
