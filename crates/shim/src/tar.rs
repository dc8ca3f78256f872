//! The `tar` that CRIU finds in a dump. It has a tmpfs of the container saved by one while the container is frozen, and with
//! GNU tar and the gzip that it starts that takes twice as long, for the few files that such a tmpfs has: devices in `/dev`,
//! nothing in a masked directory.
//!
//! Whatever is not as small, or not asked for in CRIU's very words, is left to the node's own tar, before a byte is written.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use flate2::Compression;
use flate2::write::GzEncoder;

/// The name under which CRIU looks for it.
pub(crate) const NAME: &str = "tar";

/// CRIU's arguments (4.2, `criu/filesystems.c`, `tmpfs_dump`). The directory is its standard input.
const ARGUMENTS: [&str; 11] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
    "--directory",
    "/proc/self/fd/0",
];

/// So much is put together in memory, uncompressed. More is rare, takes its time anyway, and may be sparse.
const SIZE_MAX: usize = 1 << 20;

/// Whether the program was called by this name.
pub(crate) fn is_called(program: Option<&OsString>) -> bool {
    program.is_some_and(|program| Path::new(program).file_name() == Some(OsStr::new(NAME)))
}

/// The program.
pub(crate) fn main(arguments: &[String]) -> ExitCode {
    match small_archive(arguments) {
        Some(archive) => match io::stdout().write_all(&archive).and_then(|()| io::stdout().flush()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("tar of the shim: cannot write: {error}");
                ExitCode::FAILURE
            }
        },
        None => {
            let error = other_tar(arguments).exec();
            eprintln!("tar of the shim: cannot start the node's own tar: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The archive, if it is asked for in CRIU's words and small.
fn small_archive(arguments: &[String]) -> Option<Vec<u8>> {
    let (last, options) = arguments.split_last()?;
    if last != "." || options != ARGUMENTS {
        return None;
    }
    let dir = io::stdin().as_fd().try_clone_to_owned().ok()?;
    archive(dir, SIZE_MAX).ok()
}

fn archive(dir: OwnedFd, size_max: usize) -> io::Result<Vec<u8>> {
    let mut small = Small { out: GzEncoder::new(Vec::new(), Compression::fast()), left: size_max };
    let written = stasis_snapshot::write_tree(dir, Path::new("the tmpfs"), &mut small);
    written.map_err(io::Error::other)?;
    small.out.finish()
}

/// The tar that comes after this one in `PATH`.
fn other_tar(arguments: &[String]) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let others: Vec<_> = std::env::split_paths(&path).skip(1).collect();
    let mut command = Command::new(NAME);
    command.args(arguments).env("PATH", std::env::join_paths(others).unwrap_or_default());
    command
}

/// Fails when it has become more than is kept in memory.
struct Small {
    out: GzEncoder<Vec<u8>>,
    left: usize,
}

impl Write for Small {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn archive_of(dir: &Path, size_max: usize) -> io::Result<Vec<u8>> {
        archive(fs::File::open(dir)?.into(), size_max)
    }

    #[test]
    fn what_is_written_comes_back_by_gnu_tar() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = |name: &str| from.path().join(name);
        fs::create_dir(path("dir")).unwrap();
        fs::write(path("dir/.wh.file"), "no whiteout").unwrap();
        fs::write(path(&format!("dir/{}", "long".repeat(40))), "a long name").unwrap();
        symlink("/proc/self/fd", path("fd")).unwrap();
        fs::hard_link(path("dir/.wh.file"), path("again")).unwrap();
        fs::set_permissions(from.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let device = Command::new("mknod").arg(path("null")).args(["c", "1", "3"]).status().unwrap();
        assert!(device.success());
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();

        let archive = archive_of(from.path(), SIZE_MAX).unwrap();
        let mut child = Command::new("tar")
            .args(["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"])
            .arg(to.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(child.wait().unwrap().success());

        fs::remove_file(path("socket")).unwrap();
        let compared = Command::new("diff").args(["-r", "--no-dereference"]).args([from.path(), to.path()]).output();
        assert_eq!(String::from_utf8_lossy(&compared.unwrap().stdout), "");
        assert_eq!(fs::metadata(to.path()).unwrap().permissions().mode() & 0o7777, 0o1777);
        assert_eq!(fs::metadata(to.path().join("null")).unwrap().rdev(), fs::metadata(path("null")).unwrap().rdev());
        let inode = |name: &str| fs::metadata(to.path().join(name)).unwrap().ino();
        assert_eq!(inode("again"), inode("dir/.wh.file"));
    }

    #[test]
    fn what_is_large_or_sparse_is_left_to_the_nodes_tar() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("sparse")).unwrap();
        assert!(archive_of(dir.path(), SIZE_MAX).is_ok());
        file.set_len(SIZE_MAX as u64).unwrap();
        assert!(archive_of(dir.path(), SIZE_MAX).is_err());
    }

    #[test]
    fn other_arguments_are_left_to_the_nodes_tar() {
        assert_eq!(small_archive(&[]), None);
        assert_eq!(small_archive(&["--version".to_owned()]), None);
        let mut arguments: Vec<String> = ARGUMENTS.iter().map(|argument| (*argument).to_owned()).collect();
        assert_eq!(small_archive(&arguments), None);
        arguments.push("..".to_owned());
        assert_eq!(small_archive(&arguments), None);
    }
}
