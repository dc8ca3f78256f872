//! Tests of the store with real overlay mounts.

use super::archive::Archive;
use super::scene::{Scratch, essence, listing};
use crate::error::Error;
use crate::limits::Limits;
use crate::store::Snapshots;
use crate::{delete_paths, write_diff};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

fn id(letter: char) -> String {
    format!("sha256:{}", letter.to_string().repeat(64))
}

/// A store with layers, each on those before, named `a`, `b`, ….
struct Store {
    scratch: Scratch,
    store: Snapshots,
    layers: Vec<String>,
}

impl Store {
    fn new(layers: &[Vec<u8>]) -> Store {
        let scratch = Scratch::new();
        let store = Snapshots::open(scratch.path()).unwrap();
        let mut ids = Vec::new();
        for (layer, letter) in layers.iter().zip('a'..='f') {
            store.apply_layer(&id(letter), &layer[..], &ids).unwrap();
            ids.push(id(letter));
        }
        Store { scratch, store, layers: ids }
    }

    fn mount(&self, key: &str) -> std::path::PathBuf {
        let mounts = self.store.prepare(key, &self.layers).unwrap();
        self.scratch.mount(&format!("mnt-{key}"), &mounts)
    }

    fn unmount(&self, key: &str) {
        stasis_sys::mount::unmount(&self.scratch.path().join(format!("mnt-{key}"))).unwrap();
    }

    fn leftovers(&self) -> usize {
        fs::read_dir(self.scratch.path().join("snapshots/tmp")).unwrap().count()
    }
}

fn base() -> Vec<u8> {
    let archive = Archive::default().entry("./", b'5', 0o751, "", b"").dir("etc/").file("etc/passwd", b"root\n");
    let archive = archive.file("etc/group", b"root\n").entry("tmp/", b'5', 0o1777, "", b"").dir("usr/").dir("usr/bin/");
    let archive = archive.file("usr/bin/sh", b"sh").symlink("bin", "usr/bin").dir("opt/").dir("opt/a/");
    archive.file("opt/a/1", b"1").file("opt/a/2", b"2").entry("su", b'0', 0o4755, "", b"su").end()
}

#[test]
fn layers_are_merged_with_whiteouts_and_opaque_directories() {
    let second = Archive::default().file("etc/.wh.group", b"").file("opt/a/3", b"3").file("opt/a/.wh..wh..opq", b"");
    let second = second.file("bin/ls", b"ls").file("tmp/x", b"x").file(".wh.absent", b"").file(".wh.dir", b"").end();
    let store = Store::new(&[base(), second]);
    let root = store.mount("key");
    assert_eq!(listing(&root.join("etc")), ["f passwd"]);
    assert_eq!(listing(&root.join("opt/a")), ["f 3"], "a file of the same layer stays, in whatever order");
    assert_eq!(fs::read_link(root.join("bin")).unwrap(), Path::new("usr/bin"), "the merged /usr was torn apart");
    assert_eq!(listing(&root.join("usr/bin")), ["f ls", "f sh"]);
    let mode = |path: &str| fs::metadata(root.join(path)).unwrap().mode() & 0o7777;
    assert_eq!(mode("tmp"), 0o1777, "a directory that a layer does not mention lost its mode");
    assert_eq!(mode("su"), 0o4755);
    assert_eq!(mode(""), 0o751, "the mode of the root got lost");
    assert_eq!(store.leftovers(), 0);
}

#[test]
fn a_whiteout_hides_a_whole_directory_but_not_what_its_layer_puts_there() {
    let second = Archive::default().file(".wh.opt", b"").dir("opt/").file("opt/new", b"n").end();
    let third = Archive::default().dir("etc/").file("etc/new", b"n").file(".wh.etc", b"").end();
    let store = Store::new(&[base(), second, third]);
    let root = store.mount("key");
    assert_eq!(listing(&root.join("opt")), ["f new"]);
    assert_eq!(listing(&root.join("etc")), ["f new"]);
}

#[test]
fn a_file_replaces_a_directory_and_a_directory_a_file() {
    let second =
        Archive::default().file("opt", b"file").dir("su/").file("su/x", b"x").hard_link("sh", "usr/bin/sh").end();
    let third = Archive::default().dir("opt/").file("opt/y", b"y").end();
    let store = Store::new(&[base(), second, third]);
    let root = store.mount("key");
    assert_eq!(listing(&root.join("opt")), ["f y"], "what was hidden in between came back");
    assert_eq!(listing(&root.join("su")), ["f x"]);
    assert_eq!(fs::read(root.join("sh")).unwrap(), b"sh", "a hard link into the layer below");
}

/// What a container may do to its files.
fn change(root: &Path) {
    fs::remove_file(root.join("etc/group")).unwrap();
    fs::remove_dir_all(root.join("opt")).unwrap();
    fs::create_dir(root.join("opt")).unwrap();
    fs::write(root.join("opt/new"), "new").unwrap();
    fs::write(root.join("etc/passwd"), "changed").unwrap();
    fs::set_permissions(root.join("usr/bin/sh"), fs::Permissions::from_mode(0o4711)).unwrap();
    chown(root.join("tmp"), Some(7), Some(8)).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1770)).unwrap();
    fs::remove_file(root.join("su")).unwrap();
    fs::create_dir(root.join("su")).unwrap();
    fs::write(root.join("su/file"), "x").unwrap();
    fs::hard_link(root.join("su/file"), root.join("linked")).unwrap();
    fs::remove_file(root.join("bin")).unwrap();
    symlink("/nowhere", root.join("bin")).unwrap();
    fs::rename(root.join("etc"), root.join("etc2")).unwrap_err();
    rustix::fs::setxattr(root.join("su"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
}

#[test]
fn what_is_cut_from_one_container_and_applied_to_another_is_the_same() {
    let store = Store::new(&[base()]);
    let first = store.mount("first");
    change(&first);
    let mut diff = Vec::new();
    write_diff(&store.store.upper_dir("first"), &mut diff).unwrap();

    store.store.prepare("second", &store.layers).unwrap();
    store.store.apply_diff("second", &diff[..], Limits::LAYER).unwrap();
    assert_eq!(essence(&store.mount("second")), essence(&first), "through a mount");

    store.store.prepare("third", &store.layers).unwrap();
    crate::apply_diff(&store.store.upper_dir("third"), &diff[..], Limits::LAYER).unwrap();
    assert_eq!(essence(&store.mount("third")), essence(&first), "into the upper directory");

    let layer = id('f');
    store.store.apply_layer(&layer, &diff[..], &store.layers).unwrap();
    let mounts = store.store.prepare("fourth", &[store.layers[0].clone(), layer]).unwrap();
    assert_eq!(essence(&store.scratch.mount("mnt-fourth", &mounts)), essence(&first), "as a layer");
}

#[test]
fn paths_are_deleted_from_a_snapshot() {
    let store = Store::new(&[base()]);
    store.store.prepare("key", &store.layers).unwrap();
    let paths = ["/etc/group", "opt", "absent", "/su/absent", "usr/bin/sh"].map(str::to_owned);
    store.store.delete_paths("key", &paths).unwrap();
    assert!(store.store.delete_paths("key", &["../x".to_owned()]).is_err());
    assert!(store.store.delete_paths("key", &["/".to_owned()]).is_err());
    let root = store.mount("key");
    assert_eq!(listing(&root.join("etc")), ["f passwd"]);
    assert!(!root.join("opt").exists() && !root.join("usr/bin/sh").exists() && root.join("su").exists());
    store.unmount("key");

    store.store.prepare("other", &store.layers).unwrap();
    let (upper, lowers) = (store.store.upper_dir("other"), store.store.view_paths(&store.layers).unwrap());
    delete_paths(&upper, &lowers, &paths).unwrap();
    assert_eq!(listing(&upper), listing(&store.store.upper_dir("key")));
    assert_eq!(fs::read_dir(upper.parent().unwrap()).unwrap().count(), 3, "a work directory was left");
}

#[test]
fn a_snapshot_is_prepared_once_and_found_again() {
    let store = Store::new(&[base()]);
    let mounts = store.store.prepare("key", &store.layers).unwrap();
    fs::write(store.store.upper_dir("key").join("written"), vec![1; 8192]).unwrap();
    assert_eq!(store.store.prepare("key", &store.layers).unwrap(), mounts);
    assert!(matches!(store.store.prepare("key", &[]), Err(Error::KeyTaken { .. })));
    assert_eq!(store.store.usage("key").unwrap().inodes, 2);

    let again = Snapshots::open(store.scratch.path()).unwrap();
    assert_eq!(again.active().unwrap(), [("key".to_owned(), store.layers.clone())]);
    assert_eq!(again.mounts("key").unwrap(), mounts);
    assert!(matches!(again.remove_layer(&id('a')), Err(Error::LayerInUse { .. })));
    again.remove("key").unwrap();
    again.remove("key").unwrap();
    assert!(matches!(again.mounts("key"), Err(Error::NoSnapshot { .. })));
    assert!(matches!(again.usage("key"), Err(Error::NoSnapshot { .. })));
    again.remove_layer(&id('a')).unwrap();
    again.remove_layer(&id('a')).unwrap();
    assert!(again.layers().unwrap().is_empty() && again.active().unwrap().is_empty());
    assert_eq!(store.leftovers(), 0);
}

#[test]
fn a_snapshot_without_layers_is_a_bind_mount() {
    let store = Store::new(&[]);
    let root = store.mount("key");
    fs::write(root.join("file"), "x").unwrap();
    assert_eq!(fs::read(store.store.upper_dir("key").join("file")).unwrap(), b"x");
    store.store.apply_diff("key", &Archive::default().file("more", b"m").end()[..], Limits::LAYER).unwrap();
    assert_eq!(listing(&root), ["f file", "f more"]);
}

#[test]
fn layers_are_listed_measured_and_not_unpacked_twice() {
    let store = Store::new(&[base()]);
    let stats = store.store.apply_layer(&id('a'), io::repeat(1), &[]).unwrap();
    assert_eq!(stats.inodes, 14);
    assert!(store.store.has_layer(&id('a')) && !store.store.has_layer(&id('b')) && !store.store.has_layer("../x"));
    assert_eq!(store.store.layers().unwrap(), [id('a')]);
    assert!(matches!(store.store.prepare("key", &[id('b')]), Err(Error::NoLayer { .. })));
    assert!(matches!(store.store.apply_layer("sha256:x", &base()[..], &[]), Err(Error::InvalidChainId { .. })));
    for key in ["", ".", "..", "a/b", ".hidden", &"k".repeat(129), "a b"] {
        assert!(matches!(store.store.prepare(key, &[]), Err(Error::InvalidKey { .. })), "{key}");
        assert!(!store.store.upper_dir(key).exists());
    }
}

#[test]
fn a_reader_that_fails_at_its_end_leaves_no_layer() {
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the digest is another"))
        }
    }
    let store = Store::new(&[base()]);
    for parents in [vec![], store.layers.clone()] {
        let archive = base();
        let error = store.store.apply_layer(&id('b'), archive[..].chain(Fails), &parents).unwrap_err();
        assert!(error.to_string().contains("the digest is another"), "{error}");
        assert!(!store.store.has_layer(&id('b')));
        assert_eq!(store.leftovers(), 0);
    }
}

#[test]
fn what_a_crash_left_is_removed_at_the_next_opening() {
    let store = Store::new(&[base()]);
    let half = store.scratch.dir("snapshots/tmp/half/fs/deep");
    fs::write(half.join("file"), "x").unwrap();
    Snapshots::open(store.scratch.path()).unwrap();
    assert_eq!(store.leftovers(), 0);
    assert!(store.store.has_layer(&id('a')));
}

#[test]
fn gzip_and_zstd_are_unpacked() {
    let scratch = Scratch::new();
    let store = Snapshots::open(scratch.path()).unwrap();
    let zstd = zstd::encode_all(&base()[..], 1).unwrap();
    let mut gzip = Vec::new();
    flate2::read::GzEncoder::new(&base()[..], flate2::Compression::fast()).read_to_end(&mut gzip).unwrap();
    store.apply_layer(&id('a'), &base()[..], &[]).unwrap();
    store.apply_layer(&id('b'), &zstd[..], &[]).unwrap();
    store.apply_layer(&id('c'), &gzip[..], &[]).unwrap();
    let plain = essence(&store.layer_dir(&id('a')));
    assert_eq!(essence(&store.layer_dir(&id('b'))), plain);
    assert_eq!(essence(&store.layer_dir(&id('c'))), plain);
}

#[test]
fn a_view_shows_the_merged_layers_and_leaves_no_mount() {
    let second = Archive::default().file("etc/.wh.group", b"").file("etc/passwd", b"second").end();
    let store = Store::new(&[base(), second]);
    let view = store.store.open_view(&store.layers).unwrap();
    assert_eq!(view.read(Path::new("/etc/passwd"), 100).unwrap(), b"second");
    assert!(view.read(Path::new("etc/group"), 100).is_err());
    let single = store.store.open_view(&store.layers[..1]).unwrap();
    assert_eq!(single.read(Path::new("etc/group"), 100).unwrap(), b"root\n");
    assert!(stasis_sys::mount::mounts_below(store.scratch.path()).unwrap().is_empty());
}

#[test]
fn directories_are_closed_to_others() {
    let store = Store::new(&[base()]);
    store.store.prepare("key", &store.layers).unwrap();
    for dir in ["snapshots", "snapshots/layers", "snapshots/active", "snapshots/tmp", "snapshots/active/key"] {
        let mode = fs::metadata(store.scratch.path().join(dir)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700, "{dir}");
    }
    assert!(matches!(Snapshots::open(Path::new("/tmp/a:b")), Err(Error::InvalidRoot { .. })));
}

#[test]
fn many_layers_are_mounted() {
    let scratch = Scratch::new();
    let store = Snapshots::open(scratch.path()).unwrap();
    let mut layers = Vec::new();
    for number in 0..60 {
        let layer = format!("sha256:{number:0>64}");
        let archive = Archive::default().file(&format!("file{number}"), b"x").end();
        store.apply_layer(&layer, &archive[..], &layers).unwrap();
        layers.push(layer);
    }
    let mounts = store.prepare("key", &layers).unwrap();
    assert_eq!(listing(&scratch.mount("mnt", &mounts)).len(), 60);
}
