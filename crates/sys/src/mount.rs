//! Mounts: made from containerd's triple of type, source and options, found in `/proc/self/mountinfo`, and removed.
//!
//! Targets and sources are paths of our own; a path that another party chose is first resolved by [`crate::path`].

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_bind_recursive, mount_change,
    mount_remount, move_mount,
};
use std::ffi::{CString, OsString};
use std::fmt::Display;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::path::fd_path;

/// `mount(2)` takes one page of data; one byte of it is the terminating zero.
const MOUNT_DATA_MAX: usize = 4095;

/// `fsconfig(2)` takes strings of at most 256 bytes, terminating zero included.
const FSCONFIG_STRING_MAX: usize = 255;

/// How often [`unmount_all_below`] looks again for mounts that appeared in the meantime. Mounts stacked on one another
/// are taken off in one round, so more than a few rounds means that somebody mounts against us.
const UNMOUNT_ROUNDS: u32 = 16;

/// What to mount, in containerd's words: the file system's type, its source, and options as `mount(8)` takes them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mount {
    /// `overlay`, `tmpfs`, `bind`, …
    pub fs_type: String,
    /// A path, a device, or a word that the file system shows in mountinfo.
    pub source: String,
    /// `ro`, `nosuid`, `rbind`, `rprivate`, …; what is no general option is handed to the file system.
    pub options: Vec<String>,
}

/// Options sorted by who acts on them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    flags: Vec<Flag>,
    bind: Option<Bind>,
    propagation: Vec<(MountPropagation, bool)>,
    data: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bind {
    Plain,
    Recursive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MountPropagation {
    Private,
    Shared,
    Slave,
    Unbindable,
}

/// A general mount option that both mount interfaces know, each by its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flag {
    name: &'static str,
    flag: MountFlags,
    /// What `fsmount(2)` calls it; empty for an option of the superblock, which `fsconfig(2)` takes by name.
    attribute: MountAttrFlags,
}

const fn flag(name: &'static str, flag: MountFlags, attribute: MountAttrFlags) -> Flag {
    Flag { name, flag, attribute }
}

/// `(the option, the option that takes it back)`.
const FLAGS: [(Flag, &str); 11] = [
    (flag("ro", MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY), "rw"),
    (flag("nosuid", MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID), "suid"),
    (flag("nodev", MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV), "dev"),
    (flag("noexec", MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC), "exec"),
    (flag("noatime", MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME), "atime"),
    (flag("nodiratime", MountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME), "diratime"),
    (flag("relatime", MountFlags::RELATIME, MountAttrFlags::MOUNT_ATTR_RELATIME), "norelatime"),
    (flag("strictatime", MountFlags::STRICTATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME), "nostrictatime"),
    (flag("sync", MountFlags::SYNCHRONOUS, MountAttrFlags::empty()), "async"),
    (flag("dirsync", MountFlags::DIRSYNC, MountAttrFlags::empty()), "nodirsync"),
    (flag("lazytime", MountFlags::LAZYTIME, MountAttrFlags::empty()), "nolazytime"),
];

impl Options {
    /// As `mount(8)`: a later option overrides an earlier one.
    fn parse(options: &[String]) -> Options {
        let mut parsed = Options::default();
        for option in options.iter().flat_map(|option| option_words(option)) {
            parsed.add(option);
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        use MountPropagation::{Private, Shared, Slave, Unbindable};
        match option {
            "" | "defaults" => {}
            "bind" => self.bind = Some(Bind::Plain),
            "rbind" => self.bind = Some(Bind::Recursive),
            "private" => self.propagation.push((Private, false)),
            "rprivate" => self.propagation.push((Private, true)),
            "shared" => self.propagation.push((Shared, false)),
            "rshared" => self.propagation.push((Shared, true)),
            "slave" => self.propagation.push((Slave, false)),
            "rslave" => self.propagation.push((Slave, true)),
            "unbindable" => self.propagation.push((Unbindable, false)),
            "runbindable" => self.propagation.push((Unbindable, true)),
            other => match FLAGS.iter().find(|(flag, undo)| flag.name == other || *undo == other) {
                Some((flag, undo)) => {
                    self.flags.retain(|set| set.name != flag.name);
                    if *undo != other {
                        self.flags.push(*flag);
                    }
                }
                None => self.data.push(other.to_owned()),
            },
        }
    }

    fn mount_flags(&self) -> MountFlags {
        self.flags.iter().fold(MountFlags::empty(), |all, flag| all | flag.flag)
    }

    fn attributes(&self) -> MountAttrFlags {
        self.flags.iter().fold(MountAttrFlags::empty(), |all, flag| all | flag.attribute)
    }
}

/// One string may hold several options with commas between them; an overlay path may hold an escaped comma (`\,`).
fn option_words(options: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, byte) in options.bytes().enumerate() {
        if byte == b',' && !escaped {
            words.push(&options[start..at]);
            start = at + 1;
        }
        escaped = byte == b'\\' && !escaped;
    }
    words.push(&options[start..]);
    words
}

/// Mounts `m` on `target`. An overlay whose options are longer than a page is mounted through `fsopen(2)`, which takes
/// each lower directory by itself (Linux 6.5).
pub fn mount(m: &Mount, target: &Path) -> io::Result<()> {
    let options = Options::parse(&m.options);
    let mounted = match options.bind {
        Some(how) => mount_bind(&m.source, target, how, &options),
        None if m.fs_type == "bind" => mount_bind(&m.source, target, Bind::Plain, &options),
        None => mount_new(m, target, &options),
    };
    mounted.map_err(|error| {
        let what = format!("mounting {} ({}) on {}", m.fs_type, m.source, target.display());
        describe(&what, &error)
    })?;
    for (kind, recursive) in &options.propagation {
        set_propagation(target, *kind, *recursive)
            .map_err(|error| describe(format!("changing the propagation of {}", target.display()), &error.into()))?;
    }
    Ok(())
}

/// Mounts `m` nowhere, and gives its root directory. The mount is seen by nobody else, and is gone when the last
/// descriptor in it is closed, even by a crash. Not for bind mounts.
pub fn open_detached(m: &Mount) -> io::Result<OwnedFd> {
    mount_detached(m, &Options::parse(&m.options))
        .map_err(|error| describe(format!("mounting {} ({})", m.fs_type, m.source), &error))
}

/// Shows `source`, a file or a directory without the mounts below it, at `target` as well.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    rustix::mount::mount_bind(source, target)
        .map_err(|error| describe(format!("binding {} to {}", source.display(), target.display()), &error.into()))
}

/// Mounts a tmpfs of at most `size_bytes`, its root with the permission bits `mode`, `nosuid` and `nodev`, and with
/// `extra` options as [`Mount::options`].
pub fn tmpfs(target: &Path, size_bytes: u64, mode: u32, extra: &[&str]) -> io::Result<()> {
    let mut options = vec!["nosuid".to_owned(), "nodev".to_owned()];
    options.extend([format!("size={size_bytes}"), format!("mode={:o}", mode & 0o7777)]);
    options.extend(extra.iter().map(|option| (*option).to_owned()));
    mount(&Mount { fs_type: "tmpfs".to_owned(), source: "tmpfs".to_owned(), options }, target)
}

/// Keeps mounts made at and below `target` from reaching other namespaces, and theirs from reaching it.
pub fn make_private(target: &Path) -> io::Result<()> {
    set_propagation(target, MountPropagation::Private, true)
        .map_err(|error| describe(format!("making {} private", target.display()), &error.into()))
}

/// Takes the topmost mount off `target`, at once for all who look it up from now on (`MNT_DETACH`), without following a
/// link in its last component. That nothing is mounted there, or nothing is there, is no error.
pub fn unmount(target: &Path) -> io::Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(describe(format!("unmounting {}", target.display()), &error.into())),
    }
}

/// The mount points at and below `path` in our mount namespace, deepest first; one on which several mounts are stacked
/// comes several times.
pub fn mounts_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    Ok(mount_points_below(&std::fs::read("/proc/self/mountinfo")?, &path))
}

/// Unmounts everything at and below `path`.
pub fn unmount_all_below(path: &Path) -> io::Result<()> {
    for _ in 0..UNMOUNT_ROUNDS {
        let points = mounts_below(path)?;
        if points.is_empty() {
            return Ok(());
        }
        for point in points {
            unmount(&point)?;
        }
    }
    let message = format!("{}: mounts appear there faster than they are removed", path.display());
    Err(io::Error::new(io::ErrorKind::ResourceBusy, message))
}

fn mount_bind(source: &str, target: &Path, how: Bind, options: &Options) -> io::Result<()> {
    match how {
        Bind::Plain => rustix::mount::mount_bind(source, target)?,
        Bind::Recursive => mount_bind_recursive(source, target)?,
    }
    // The first call ignores flags; a second one sets them, on the top mount only.
    let flags = options.mount_flags();
    if flags.is_empty() {
        return Ok(());
    }
    mount_remount(target, MountFlags::BIND | flags, "").map_err(|error| {
        // Without its flags, such as `ro`, the mount must not stay.
        let _ = unmount(target);
        error.into()
    })
}

fn mount_new(m: &Mount, target: &Path, options: &Options) -> io::Result<()> {
    let data = options.data.join(",");
    if data.len() > MOUNT_DATA_MAX {
        return mount_by_fsopen(m, target, options);
    }
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(m.source.as_str(), target, m.fs_type.as_str(), options.mount_flags(), data.as_c_str())?)
}

fn mount_by_fsopen(m: &Mount, target: &Path, options: &Options) -> io::Result<()> {
    let mounted = mount_detached(m, options)?;
    Ok(move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn mount_detached(m: &Mount, options: &Options) -> io::Result<OwnedFd> {
    let fs = fsopen(m.fs_type.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    configure(&fs, m, options).map_err(|error| with_kernel_log(&fs, error))?;
    Ok(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, options.attributes())?)
}

fn configure(fs: &OwnedFd, m: &Mount, options: &Options) -> io::Result<()> {
    fsconfig_set_string(fs, "source", m.source.as_str())?;
    for flag in options.flags.iter().filter(|flag| flag.attribute.is_empty() || flag.name == "ro") {
        fsconfig_set_flag(fs, flag.name)?;
    }
    for option in &options.data {
        match option.split_once('=') {
            Some(("lowerdir", lowers)) if m.fs_type == "overlay" => {
                for lower in lower_dirs(lowers) {
                    set_path(fs, "lowerdir+", &lower)?;
                }
            }
            Some((key @ ("upperdir" | "workdir"), dir)) => set_path(fs, key, dir)?,
            Some((key, value)) => {
                fsconfig_set_string(fs, key, value).map_err(|error| describe(option, &error.into()))?;
            }
            None => fsconfig_set_flag(fs, option.as_str()).map_err(|error| describe(option, &error.into()))?,
        }
    }
    Ok(fsconfig_create(fs)?)
}

/// A path too long for `fsconfig(2)` is given by the descriptor's name.
fn set_path(fs: &OwnedFd, key: &str, dir: &str) -> io::Result<()> {
    let set = if dir.len() <= FSCONFIG_STRING_MAX {
        fsconfig_set_string(fs, key, dir)
    } else {
        open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|dir| fsconfig_set_string(fs, key, fd_path(&dir)))
    };
    set.map_err(|error| describe(format!("{key} {dir}"), &error.into()))
}

/// `lowerdir=` separates by colons and escapes with a backslash; `lowerdir+` takes one path as it is.
fn lower_dirs(lowers: &str) -> Vec<String> {
    let mut dirs = vec![String::new()];
    let mut characters = lowers.chars();
    while let Some(character) = characters.next() {
        let dir = dirs.last_mut().expect("starts with one element and only grows");
        match character {
            '\\' => dir.extend(characters.next()),
            ':' => dirs.push(String::new()),
            other => dir.push(other),
        }
    }
    dirs
}

/// The file system's own words about a refused option, which the kernel keeps for the reader of the descriptor.
fn with_kernel_log(fs: &OwnedFd, error: io::Error) -> io::Error {
    let mut buffer = [0u8; 1024];
    let mut lines = Vec::new();
    while let Ok(length @ 1..) = rustix::io::read(fs, &mut buffer) {
        lines.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned());
    }
    if lines.is_empty() { error } else { io::Error::new(error.kind(), format!("{error}: {}", lines.join("; "))) }
}

fn set_propagation(target: &Path, kind: MountPropagation, recursive: bool) -> Result<(), Errno> {
    let kind = match kind {
        MountPropagation::Private => MountPropagationFlags::PRIVATE,
        MountPropagation::Shared => MountPropagationFlags::SHARED,
        MountPropagation::Slave => MountPropagationFlags::DOWNSTREAM,
        MountPropagation::Unbindable => MountPropagationFlags::UNBINDABLE,
    };
    mount_change(target, if recursive { kind | MountPropagationFlags::REC } else { kind })
}

fn describe(what: impl Display, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn mount_points_below(mountinfo: &[u8], path: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo
        .split(|byte| *byte == b'\n')
        // proc(5): ID, parent ID, major:minor, root, mount point, …
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(decode_octal)
        .filter(|point| point.starts_with(path))
        .collect();
    points.reverse();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    points
}

/// mountinfo writes space, tab, newline and backslash as a backslash and three octal digits.
pub fn decode_octal(field: &[u8]) -> PathBuf {
    let mut decoded = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                decoded.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = &after[3..];
            }
            _ => {
                decoded.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(decoded))
}

#[cfg(test)]
#[path = "mount_tests.rs"]
mod tests;
