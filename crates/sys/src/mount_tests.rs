//! Tests of the mounts, on real ones; they need root.

use super::*;
use std::fs;

/// A directory whose mounts go away with it.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    fn dir(&self, name: &str) -> PathBuf {
        let dir = self.0.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        unmount_all_below(self.0.path()).unwrap();
    }
}

fn parse(options: &str) -> Options {
    Options::parse(&[options.to_owned()])
}

#[test]
fn options_are_sorted_and_later_ones_win() {
    let options = parse("ro,nosuid,rw,rbind,rprivate,size=1k,noatime");
    assert_eq!(options.mount_flags(), MountFlags::NOSUID | MountFlags::NOATIME);
    assert_eq!(options.bind, Some(Bind::Recursive));
    assert_eq!(options.propagation, [(MountPropagation::Private, true)]);
    assert_eq!(options.data, ["size=1k"]);
    assert_eq!(parse("lowerdir=/a\\,b,ro").data, ["lowerdir=/a\\,b"]);
    assert_eq!(parse("defaults,"), Options::default());
}

#[test]
fn lower_dirs_are_unescaped() {
    assert_eq!(lower_dirs("/a:/b\\:c:/d\\\\"), ["/a", "/b:c", "/d\\"]);
}

#[test]
fn mountinfo_is_read_deepest_first_with_escapes_decoded() {
    let mountinfo = b"20 1 254:0 / / rw - ext4 /dev/vda rw\n\
        30 20 0:20 / /run/pod\\040one rw - tmpfs tmpfs rw\n\
        31 30 0:21 / /run/pod\\040one/shm rw - tmpfs tmpfs rw\n\
        32 31 0:22 / /run/pod\\040one/shm rw - tmpfs tmpfs rw\n\
        33 20 0:23 / /run/pod\\040onetwo rw - tmpfs tmpfs rw\n";
    let points = mount_points_below(mountinfo, Path::new("/run/pod one"));
    assert_eq!(points, ["/run/pod one/shm", "/run/pod one/shm", "/run/pod one"].map(PathBuf::from));
}

#[test]
fn a_tmpfs_is_mounted_found_and_unmounted() {
    let scratch = Scratch::new();
    let target = scratch.dir("with space");
    tmpfs(&target, 1 << 20, 0o1777, &["noexec"]).unwrap();
    tmpfs(&target, 1 << 20, 0o700, &[]).unwrap();
    fs::create_dir(target.join("sub")).unwrap();
    tmpfs(&target.join("sub"), 1 << 20, 0o700, &[]).unwrap();
    assert_eq!(mounts_below(scratch.0.path()).unwrap(), [target.join("sub"), target.clone(), target.clone()]);
    unmount_all_below(scratch.0.path()).unwrap();
    assert_eq!(mounts_below(scratch.0.path()).unwrap(), [] as [PathBuf; 0]);
    unmount(&target).unwrap();
    unmount(&scratch.0.path().join("absent")).unwrap();
}

#[test]
fn a_bind_mount_can_be_read_only() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.dir("source"), scratch.dir("target"));
    let m = Mount {
        fs_type: "bind".to_owned(),
        source: source.to_str().unwrap().to_owned(),
        options: vec!["rbind".to_owned(), "ro".to_owned(), "rprivate".to_owned()],
    };
    mount(&m, &target).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    assert_eq!(fs::read(target.join("file")).unwrap(), b"x");
    assert_eq!(fs::write(target.join("file"), "y").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
}

fn check_overlay(scratch: &Scratch, lowers: &[PathBuf]) {
    for (number, lower) in lowers.iter().enumerate() {
        fs::write(lower.join(format!("file{number}")), "x").unwrap();
    }
    let joined: Vec<&str> = lowers.iter().map(|lower| lower.to_str().unwrap()).collect();
    let (upper, work, target) = (scratch.dir("upper"), scratch.dir("work"), scratch.dir("target"));
    let m = Mount {
        fs_type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![
            "nosuid".to_owned(),
            format!("lowerdir={}", joined.join(":")),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
        ],
    };
    mount(&m, &target).unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), lowers.len());
    fs::write(target.join("new"), "y").unwrap();
    assert_eq!(fs::read(upper.join("new")).unwrap(), b"y");
    assert!(rustix::fs::statvfs(&target).unwrap().f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID));
}

#[test]
fn an_overlay_of_few_layers_is_mounted() {
    let scratch = Scratch::new();
    let lowers = [scratch.dir("lower0"), scratch.dir("lower1")];
    check_overlay(&scratch, &lowers);
}

#[test]
fn an_overlay_whose_options_exceed_a_page_is_mounted() {
    let scratch = Scratch::new();
    let lowers: Vec<PathBuf> = (0..100).map(|number| scratch.dir(&format!("lower-{number:0>60}"))).collect();
    check_overlay(&scratch, &lowers);
}

#[test]
fn an_overlay_of_paths_too_long_for_fsconfig_is_mounted() {
    let scratch = Scratch::new();
    let deep = format!("{}/{}", "a".repeat(200), "b".repeat(100));
    let lowers: Vec<PathBuf> = (0..20).map(|number| scratch.dir(&format!("{deep}/{number}"))).collect();
    check_overlay(&scratch, &lowers);
}

#[test]
fn a_refused_mount_says_what_was_tried() {
    let scratch = Scratch::new();
    let target = scratch.dir("target");
    let m = Mount { fs_type: "tmpfs".to_owned(), source: "tmpfs".to_owned(), options: vec!["nonsense=1".to_owned()] };
    let message = mount(&m, &target).unwrap_err().to_string();
    assert!(message.contains("mounting tmpfs") && message.contains(target.to_str().unwrap()), "{message}");
    let long = Mount {
        fs_type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![format!("lowerdir={}", "/absent:".repeat(1000))],
    };
    let message = mount(&long, &target).unwrap_err().to_string();
    assert!(message.contains("lowerdir+ /absent"), "{message}");
    let lowers = vec![format!("/{}", "./".repeat(100)); 30].join(":");
    let unknown = Mount { options: vec![format!("lowerdir={lowers}"), "nonsense=1".to_owned()], ..long };
    let message = mount(&unknown, &target).unwrap_err().to_string();
    assert!(message.contains("nonsense=1"), "{message}");
}
