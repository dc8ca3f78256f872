//! What `/proc` says of a container's processes: descriptors, sockets, limits. Processes may end at any time.

use std::io;

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dir, Mode, OFlags, openat, readlinkat};

/// Descriptors of one container that are counted: looking at a million of them would take seconds.
const DESCRIPTORS_MAX: u64 = 100_000;

/// What open descriptors of sockets are links to.
const SOCKET: &[u8] = b"socket:";

/// Open descriptors of a set of processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptors {
    pub(super) open: u64,
    pub(super) sockets: u64,
}

/// Counts the descriptors of `processes`, up to [`DESCRIPTORS_MAX`].
pub(super) fn descriptors(processes: &[u32]) -> Descriptors {
    let mut counted = Descriptors::default();
    for pid in processes {
        // A process that ends meanwhile has none.
        let _ = count(*pid, &mut counted);
    }
    counted
}

fn count(pid: u32, counted: &mut Descriptors) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir: OwnedFd = openat(CWD, format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        if entry.file_name().to_bytes().first() == Some(&b'.') {
            continue;
        }
        if counted.open >= DESCRIPTORS_MAX {
            return Ok(());
        }
        counted.open += 1;
        if readlinkat(&dir, entry.file_name(), Vec::new()).is_ok_and(|link| link.to_bytes().starts_with(SOCKET)) {
            counted.sockets += 1;
        }
    }
    Ok(())
}

/// The soft limit of open files of a process; none if it is unlimited or the process is gone.
pub(super) fn open_files_limit(pid: u32) -> Option<u64> {
    parse_open_files(&std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?)
}

/// `Max open files            1024                 524288               files`.
fn parse_open_files(limits: &str) -> Option<u64> {
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_descriptors_and_sockets_are_counted() {
        let me = [std::process::id()];
        let before = descriptors(&me);
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let after = descriptors(&me);
        // Other tests of this process open and close files, too; the pair is there all the while.
        assert!(after.sockets >= 2 && after.open > after.sockets, "{before:?} {after:?}");
        assert_eq!(descriptors(&[u32::MAX >> 2]), Descriptors::default(), "no such process");
    }

    #[test]
    fn the_limit_of_open_files_is_found() {
        let limits = "Limit   Soft Limit Hard Limit Units\nMax open files            1024     524288   files\n";
        assert_eq!(parse_open_files(limits), Some(1024));
        assert_eq!(parse_open_files("Max open files unlimited unlimited files\n"), None);
        assert!(open_files_limit(std::process::id()).is_some());
    }
}
