//! What is cut from an upper directory and applied elsewhere is the same tree again.

use super::scene::{Scratch, essence, tree};
use crate::limits::Limits;
use crate::{apply_diff, write_diff, write_diff_filtered};
use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// A file to make. Directories that are missing are made; what cannot be made, as it is there already, is left out.
#[derive(Debug, Clone)]
struct Plan {
    path: PathBuf,
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattr: Option<(String, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum What {
    File(Vec<u8>),
    Dir {
        opaque: bool,
    },
    Link(Vec<u8>),
    /// A second name for an earlier file.
    Again(prop::sample::Index),
    Device(bool, u8, u8),
    Fifo,
    Whiteout,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let any_byte = prop::sample::select((1u8..=255).filter(|byte| *byte != b'/').collect::<Vec<_>>());
    let name = prop_oneof![
        4 => prop::sample::select(vec!["a", "b", "c", "dir"]).prop_map(|name| name.as_bytes().to_vec()),
        1 => prop::collection::vec(any_byte, 1..255),
    ];
    name.prop_filter("no name", |name| name != b"." && name != b".." && !name.starts_with(b".wh."))
}

fn what() -> impl Strategy<Value = What> {
    prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..1500).prop_map(What::File),
        3 => any::<bool>().prop_map(|opaque| What::Dir { opaque }),
        2 => prop::collection::vec(1u8..=255, 1..300).prop_map(What::Link),
        2 => any::<prop::sample::Index>().prop_map(What::Again),
        1 => (any::<bool>(), 1u8..=255, any::<u8>()).prop_map(|(block, major, minor)| What::Device(block, major, minor)),
        1 => Just(What::Fifo),
        1 => Just(What::Whiteout),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let path = prop::collection::vec(name(), 1..5);
    let owner = prop_oneof![Just(0u32), 0u32..70_000, 2_097_150u32..2_097_155, Just(u32::MAX - 1)];
    // What ext4 and tmpfs both keep.
    let seconds = prop_oneof![-1_000_000i64..4_000_000_000, Just(-1), Just(0)];
    let xattr = prop::option::weighted(0.3, ("user\\.[a-z]{1,20}", prop::collection::vec(any::<u8>(), 0..200)));
    (path, what(), 0u32..0o10000, (owner.clone(), owner), (seconds, 0u32..1_000_000_000), xattr).prop_map(
        |(path, what, mode, owner, mtime, xattr)| Plan {
            path: path.into_iter().map(OsString::from_vec).collect(),
            what,
            mode,
            owner,
            mtime,
            xattr,
        },
    )
}

/// Makes the files, then sets times from the last to the first, so that those of directories stay.
fn grow(root: &Path, plans: &[Plan]) {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut made: Vec<(PathBuf, (i64, u32))> = Vec::new();
    for plan in plans {
        let path = root.join(&plan.path);
        if fs::symlink_metadata(&path).is_ok() || fs::create_dir_all(path.parent().unwrap()).is_err() {
            continue;
        }
        if !make(&path, &plan.what, &files) {
            continue;
        }
        if matches!(plan.what, What::File(_)) {
            files.push(path.clone());
        }
        if !matches!(plan.what, What::Whiteout | What::Again(_)) {
            decorate(&path, plan);
            made.push((path, plan.mtime));
        }
    }
    for (path, (seconds, nanoseconds)) in made.iter().rev() {
        let time = Timespec { tv_sec: *seconds, tv_nsec: (*nanoseconds).into() };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn make(path: &Path, what: &What, files: &[PathBuf]) -> bool {
    let node = |kind, major: u8, minor: u8| {
        let device = rustix::fs::makedev(major.into(), minor.into());
        rustix::fs::mknodat(CWD, path, kind, Mode::RUSR, device).is_ok()
    };
    match what {
        What::File(content) => fs::write(path, content).is_ok(),
        What::Dir { opaque } => {
            let made = fs::create_dir(path).is_ok();
            if made && *opaque {
                rustix::fs::setxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
            }
            made
        }
        What::Link(target) => symlink(OsString::from_vec(target.clone()), path).is_ok(),
        What::Again(index) => !files.is_empty() && fs::hard_link(index.get(files), path).is_ok(),
        What::Device(block, major, minor) => {
            node(if *block { FileType::BlockDevice } else { FileType::CharacterDevice }, *major, *minor)
        }
        What::Fifo => node(FileType::Fifo, 0, 0),
        What::Whiteout => node(FileType::CharacterDevice, 0, 0),
    }
}

fn decorate(path: &Path, plan: &Plan) {
    let (uid, gid) = (Uid::from_raw(plan.owner.0), Gid::from_raw(plan.owner.1));
    rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).unwrap();
    let metadata = fs::symlink_metadata(path).unwrap();
    if metadata.is_symlink() {
        return;
    }
    if let (Some((name, value)), true) = (&plan.xattr, metadata.is_file() || metadata.is_dir()) {
        rustix::fs::setxattr(path, name.as_str(), value, XattrFlags::empty()).unwrap();
    }
    fs::set_permissions(path, fs::Permissions::from_mode(plan.mode)).unwrap();
}

/// Cuts `from`, applies it to a new directory, and compares.
fn check(from: &Path) -> Vec<u8> {
    let mut layer = Vec::new();
    let stats = write_diff(from, &mut layer).unwrap();
    assert_eq!(stats.bytes, layer.len() as u64);
    let to = Scratch::new();
    apply_diff(to.path(), &layer[..], Limits::LAYER).unwrap();
    let (mut expected, mut got) = (tree(from), tree(to.path()));
    // Without the roots, which are no part of a layer; a whiteout's owner, mode and time mean nothing.
    for nodes in [&mut expected, &mut got] {
        nodes.remove(Path::new(""));
        for node in nodes.values_mut().filter(|node| node.kind == 'c' && node.content == [0; 8]) {
            (node.mode, node.owner, node.mtime) = (0, (0, 0), (0, 0));
        }
    }
    assert_eq!(got, expected);
    let mut again = Vec::new();
    write_diff(to.path(), &mut again).unwrap();
    assert!(again == layer, "the same tree gave other bytes");
    layer
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_comes_back(plans in prop::collection::vec(plan(), 0..40)) {
        let scratch = Scratch::new();
        grow(scratch.path(), &plans);
        check(scratch.path());
    }
}

#[test]
fn what_gnu_tar_reads_is_what_we_wrote() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    fs::create_dir_all(from.join("d".repeat(150)).join("e")).unwrap();
    fs::write(from.join("d".repeat(150)).join("e/file"), vec![7; 1000]).unwrap();
    fs::hard_link(from.join("d".repeat(150)).join("e/file"), from.join("z")).unwrap();
    symlink("t".repeat(200), from.join("link")).unwrap();
    rustix::fs::setxattr(from.join("z"), "user.name", b"a\nb", XattrFlags::empty()).unwrap();
    fs::set_permissions(from.join("z"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::lchown(from.join("link"), Some(3_000_000), Some(5)).unwrap();
    let layer = check(&from);
    let path = scratch.path().join("layer.tar");
    fs::write(&path, layer).unwrap();
    let tar = std::process::Command::new("tar")
        .args(["--extract", "--xattrs", "--xattrs-include=*", "--same-owner", "--preserve-permissions", "--file"])
        .arg(&path)
        .arg("--directory")
        .arg(&to)
        .output()
        .expect("this test needs GNU tar");
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    assert_eq!(essence(&to), essence(&from));
}

#[test]
fn what_gnu_tar_wrote_is_what_we_read() {
    for format in ["gnu", "posix", "ustar", "v7"] {
        let scratch = Scratch::new();
        let (from, to) = (scratch.dir("from"), scratch.dir("to"));
        // Names that are too long for ustar and v7 are for the others.
        let long = if format == "gnu" || format == "posix" { "d".repeat(150) } else { "d".repeat(50) };
        fs::create_dir_all(from.join(&long)).unwrap();
        fs::write(from.join(&long).join("file"), vec![7; 1000]).unwrap();
        fs::hard_link(from.join(&long).join("file"), from.join("z")).unwrap();
        symlink(&long, from.join("link")).unwrap();
        fs::set_permissions(from.join("z"), fs::Permissions::from_mode(0o2755)).unwrap();
        for path in [from.join("z"), from.join("link")] {
            let time = Timespec { tv_sec: 1_234_567_890, tv_nsec: if format == "posix" { 5000 } else { 0 } };
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        }
        let tar = std::process::Command::new("tar")
            .args(["--create", "--numeric-owner", "--sort=name", "--file", "-", "--format", format, "--directory"])
            .arg(&from)
            .arg(".")
            .output()
            .expect("this test needs GNU tar");
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        apply_diff(&to, &tar.stdout[..], Limits::LAYER).unwrap();
        assert_eq!(essence(&to), essence(&from), "{format}");
    }
}

#[test]
fn sockets_and_filtered_paths_are_left_out() {
    let scratch = Scratch::new();
    let from = scratch.dir("from");
    std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
    fs::create_dir_all(from.join("proc/1")).unwrap();
    fs::write(from.join("file"), "x").unwrap();
    let mut layer = Vec::new();
    let stats = write_diff_filtered(&from, &mut layer, |path| path != Path::new("proc")).unwrap();
    assert_eq!(stats.entries, 1);
    let to = scratch.dir("to");
    apply_diff(&to, &layer[..], Limits::LAYER).unwrap();
    assert_eq!(super::scene::listing(&to), ["f file"]);
}

#[test]
fn a_large_file_comes_back() {
    let scratch = Scratch::new();
    let from = scratch.dir("from");
    let content: Vec<u8> = (0..3_000_001u32).map(|number| (number * 7 % 251) as u8).collect();
    fs::write(from.join("large"), content).unwrap();
    check(&from);
}
