//! Small files that survive a crash, and a few facts about file systems. Knows nothing of what is in the files.

use rustix::fs::{Mode, OFlags, fchmod, open, statvfs};
use rustix::rand::{GetRandomFlags, getrandom};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Replaces `path` by a file that holds `bytes`, with exactly the permission bits of `mode`. After a crash at any moment
/// the path names either the old content or the new; on an error the old content stays and no temporary file is left.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes, mode, File::sync_all)?;
    sync_dir(parent(path))
}

/// As [`write_atomic`], for what need not outlive the machine's run: nothing waits for the disk. A crash of this process
/// loses nothing; after one of the machine the file may be empty.
pub fn write_volatile(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes, mode, |_| Ok(()))
}

fn replace(path: &Path, bytes: &[u8], mode: u32, finish: fn(&File) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_name(path)?;
    let written = write_new(&temporary, bytes, mode).and_then(|file| finish(&file));
    written.and_then(|()| fs::rename(&temporary, path)).inspect_err(|_| {
        // The file may not exist, when creating it was what failed.
        let _ = fs::remove_file(&temporary);
    })
}

/// Moves to the first whole line within the last `most` bytes of a file's first `length`; returns how many bytes of these
/// follow. A line that is longer than that is left out.
pub fn seek_to_last_lines(file: &mut File, length: u64, most: u64) -> io::Result<u64> {
    if length <= most {
        file.rewind()?;
        return Ok(length);
    }
    // From the byte before, which may be the end of a line.
    let mut at = length - most - 1;
    file.seek(SeekFrom::Start(at))?;
    let mut buffer = [0; 8192];
    while at < length {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        if let Some(end) = buffer[..read].iter().position(|byte| *byte == b'\n') {
            at = (at + end as u64 + 1).min(length);
            file.seek(SeekFrom::Start(at))?;
            return Ok(length - at);
        }
        at += read as u64;
    }
    Ok(0)
}

/// Makes the names in a directory durable: files created, renamed or removed in it.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// 32 random bytes as 64 hexadecimal digits: the form of pod, container and task IDs.
pub fn random_id() -> String {
    let mut bytes = [0u8; 32];
    let mut filled = 0;
    while filled < bytes.len() {
        // The kernel's generator gives up to 256 bytes at once and fails only when it is absent or interrupted.
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty()).unwrap_or(0);
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that may still be written, without the share reserved for root, on the file system that holds `path`.
pub fn available_bytes(path: &Path) -> io::Result<u64> {
    let stat = statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(open(path, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(bytes)?;
    // Not by the mode of open, from which the umask is taken away.
    fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?;
    Ok(file)
}

fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{}: not a file name", path.display())))?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", &random_id()[..16]));
    Ok(path.with_file_name(temporary))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(dir: &Path) -> Vec<OsString> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn write_atomic_replaces_content_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomic(&path, b"old", 0o600).unwrap();
        write_atomic(&path, b"new", 0o666).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o666);
        write_volatile(&path, b"newest", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newest");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("occupied");
        fs::create_dir(&path).unwrap();
        assert!(write_atomic(&path, b"x", 0o600).is_err());
        assert!(write_volatile(&path, b"x", 0o600).is_err());
        assert_eq!(names(dir.path()), ["occupied"]);
        assert!(path.is_dir());
    }

    #[test]
    fn the_last_lines_are_whole() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one\ntwo\nthree\nfou").unwrap();
        let mut last = |length, most| {
            let left = seek_to_last_lines(&mut file, length, most).unwrap();
            let mut bytes = Vec::new();
            (&file).take(left).read_to_end(&mut bytes).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        assert_eq!(last(17, 100), "one\ntwo\nthree\nfou");
        assert_eq!(last(17, 9), "three\nfou", "exactly from the beginning of a line");
        assert_eq!(last(17, 8), "fou", "the line that is cut is left out");
        assert_eq!(last(14, 10), "two\nthree\n", "what was written later does not count");
        assert_eq!(last(17, 2), "");
    }

    #[test]
    fn random_ids_are_64_hex_digits_and_differ() {
        let (a, b) = (random_id(), random_id());
        assert_ne!(a, b);
        assert!(a.len() == 64 && a.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()));
    }

    #[test]
    fn available_bytes_answers_for_a_real_file_system() {
        assert!(available_bytes(Path::new("/")).unwrap() > 0);
        assert!(available_bytes(Path::new("/no/such/place")).is_err());
    }
}
