//! A corpus of hostile archives. Each is applied to a plain directory, to a snapshot on a layer, and as a layer on another;
//! each must be refused, or do its harm to itself alone. A canary beside the root, and the layer below, must not change.

use super::archive::Archive;
use super::scene::{Scratch, tree};
use crate::apply_diff;
use crate::limits::{Limits, PATH_BYTES_MAX, XATTRS_MAX};
use crate::store::Snapshots;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

const LOWER: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const UPPER: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

/// The ways in which an archive reaches a file system.
const WAYS: [&str; 3] = ["plain", "snapshot", "layer"];

/// What was written in one of the ways.
struct Applied {
    _scratch: Scratch,
    root: PathBuf,
    way: &'static str,
}

fn lower() -> Vec<u8> {
    Archive::default().dir("below/").file("below/file", b"below").symlink("link-below", "below").end()
}

/// Applies what `build` makes, given the absolute path of the canary. `refusal` is a part of the error's text; the empty
/// text is that of no error.
fn check(refusal: &str, build: impl Fn(&str) -> Vec<u8>) -> Vec<Applied> {
    WAYS.into_iter().filter_map(|way| check_one(way, refusal, &build)).collect()
}

fn check_one(way: &'static str, refusal: &str, build: impl Fn(&str) -> Vec<u8>) -> Option<Applied> {
    let scratch = Scratch::new();
    let (canary, plain) = (scratch.dir("canary"), scratch.dir("plain"));
    fs::write(canary.join("file"), "canary").unwrap();
    fs::set_permissions(canary.join("file"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::create_dir(canary.join("dir")).unwrap();
    let archive = build(canary.to_str().unwrap());
    let store = Snapshots::open(scratch.path()).unwrap();
    store.apply_layer(LOWER, &lower()[..], &[]).unwrap();
    store.prepare("key", &[LOWER.to_owned()]).unwrap();
    let outside = || (tree(&canary), tree(&store.layer_dir(LOWER)));
    let before = outside();

    let (result, root) = match way {
        "plain" => (apply_diff(&plain, &archive[..], Limits::LAYER), plain),
        "snapshot" => (store.apply_diff("key", &archive[..], Limits::LAYER), store.upper_dir("key")),
        _ => (store.apply_layer(UPPER, &archive[..], &[LOWER.to_owned()]).map(drop), store.layer_dir(UPPER)),
    };
    assert_eq!(outside(), before, "{way}: something outside was changed");
    assert_eq!(fs::read_dir(scratch.path().join("snapshots/tmp")).unwrap().count(), 0, "{way}: something was left");
    let message = result.err().map(|error| error.to_string()).unwrap_or_default();
    assert_eq!(message.is_empty(), refusal.is_empty(), "{way}: {message:?}, expected {refusal:?}");
    assert!(message.contains(refusal), "{way}: {message:?} does not say {refusal:?}");
    assert!(refusal.is_empty() || !store.has_layer(UPPER), "a refused layer is there");
    refusal.is_empty().then_some(Applied { _scratch: scratch, root, way })
}

#[test]
fn writing_through_a_link_stays_inside() {
    for applied in check("", |canary| Archive::default().symlink("l", canary).file("l/file", b"owned").end()) {
        // The link's target is made inside, where it means what it says to a process in the container.
        let target = fs::read_link(applied.root.join("l")).unwrap();
        let inside = applied.root.join(target.strip_prefix("/").unwrap()).join("file");
        assert_eq!(fs::read(inside).unwrap(), b"owned", "{}", applied.way);
    }
}

#[test]
fn writing_through_a_chain_of_relative_links_stays_inside() {
    check("", |_| {
        Archive::default().dir("d/").symlink("d/up", "../../..").symlink("l", "d/up/canary").file("l/file", b"x").end()
    });
}

#[test]
fn a_file_whose_name_is_a_link_replaces_the_link() {
    for applied in check("", |canary| {
        Archive::default().symlink("l", &format!("{canary}/file")).entry("l", b'0', 0o4777, "", b"owned").end()
    }) {
        let metadata = fs::symlink_metadata(applied.root.join("l")).unwrap();
        assert!(metadata.is_file());
        assert_eq!(metadata.mode() & 0o7777, 0o4777);
    }
}

#[test]
fn a_directory_whose_name_is_a_link_does_not_change_its_target() {
    for applied in check("", |canary| {
        Archive::default().symlink("l", &format!("{canary}/dir")).entry("l/", b'5', 0o777, "", b"").end()
    }) {
        assert!(fs::symlink_metadata(applied.root.join("l")).unwrap().is_dir());
    }
}

#[test]
fn a_hard_link_to_the_outside_is_refused() {
    check("cannot be found", |canary| Archive::default().hard_link("h", &format!("{canary}/file")).end());
    check("`..`", |_| Archive::default().hard_link("h", "../canary/file").end());
    check("cannot be found", |canary| Archive::default().symlink("l", canary).hard_link("h", "l/file").end());
}

#[test]
fn a_hard_link_to_a_link_is_not_followed() {
    for applied in check("", |canary| {
        let archive = Archive::default().symlink("l", &format!("{canary}/file")).hard_link("h", "l");
        archive.file("h", b"owned").end()
    }) {
        assert!(fs::symlink_metadata(applied.root.join("l")).unwrap().is_symlink());
        assert!(fs::symlink_metadata(applied.root.join("h")).unwrap().is_file());
    }
}

#[test]
fn a_hard_link_to_a_directory_or_to_nothing_is_refused() {
    check("is a directory", |_| Archive::default().dir("d/").hard_link("h", "d").end());
    check("cannot be found", |_| Archive::default().hard_link("h", "nothing").end());
    check("no target", |_| Archive::default().hard_link("h", "").end());
}

#[test]
fn a_hard_link_to_itself_keeps_the_file() {
    for applied in check("", |_| Archive::default().file("f", b"x").hard_link("f", "./f").end()) {
        assert_eq!(fs::read(applied.root.join("f")).unwrap(), b"x");
    }
}

#[test]
fn names_with_dots_are_refused() {
    for name in ["../../canary/file", "..", "a/../../canary/file", "a/..", "/../canary/file"] {
        check("`..`", |_| Archive::default().file(name, b"x").end());
        check("`..`", |_| Archive::default().pax(&[("path", name.as_bytes())]).file("harmless", b"x").end());
    }
}

#[test]
fn absolute_names_are_taken_below_the_root() {
    for applied in check("", |canary| Archive::default().file(&format!("/{canary}//./file"), b"x").end()) {
        assert_eq!(fs::read_dir(&applied.root).unwrap().count(), 1);
    }
}

#[test]
fn a_parent_that_becomes_a_link_in_between_leads_nowhere() {
    check("", |canary| {
        Archive::default().dir("d/").file("d/file", b"x").symlink("d", canary).file("d/file", b"owned").end()
    });
}

#[test]
fn the_times_of_a_directory_that_became_a_link_are_not_set_outside() {
    check("", |canary| Archive::default().dir("d/").symlink("d", &format!("{canary}/dir")).end());
}

#[test]
fn a_parent_that_is_a_file_is_refused() {
    check("Not a directory", |_| Archive::default().file("f", b"x").file("f/file", b"x").end());
}

#[test]
fn a_loop_of_links_is_refused() {
    check("symbolic links", |_| Archive::default().symlink("a", "b").symlink("b", "a").file("a/x", b"").end());
}

#[test]
fn whiteouts_of_dots_and_of_nothing_are_refused() {
    for name in [".wh.", ".wh...", "d/.wh.."] {
        check("names no file", |_| Archive::default().dir("d/").file(name, b"").end());
    }
}

#[test]
fn a_whiteout_through_a_link_stays_inside() {
    check("", |canary| Archive::default().symlink("l", canary).file("l/.wh.file", b"").end());
    check("", |canary| Archive::default().symlink("l", canary).file("l/.wh..wh..opq", b"").end());
}

#[test]
fn a_whiteout_of_a_link_removes_the_link() {
    check("", |canary| Archive::default().file(".wh.link-below", b"").symlink("x", canary).file(".wh.x", b"").end());
}

#[test]
fn a_device_that_means_a_whiteout_is_refused() {
    check("overlayfs's own", |_| Archive::default().device("c", b'3', 0, 0).end());
}

#[test]
fn devices_and_fifos_are_made_and_never_opened() {
    for applied in check("", |_| {
        // A second entry replaces the FIFO instead of writing into it, which would wait for a reader for ever.
        let archive = Archive::default().device("null", b'3', 1, 3).device("disk", b'4', 254, 0);
        archive.entry("fifo", b'6', 0o622, "", b"").entry("pipe", b'6', 0o644, "", b"").file("pipe", b"x").end()
    }) {
        let metadata = |name: &str| fs::symlink_metadata(applied.root.join(name)).unwrap();
        assert!(metadata("null").file_type().is_char_device() && metadata("null").rdev() == 0x103);
        assert!(metadata("disk").file_type().is_block_device());
        assert!(metadata("fifo").file_type().is_fifo() && metadata("fifo").mode() & 0o7777 == 0o622);
        assert!(metadata("pipe").is_file());
    }
}

#[test]
fn overlayfs_and_security_attributes_are_not_taken() {
    for applied in check("", |_| {
        let records: [(&str, &[u8]); 6] = [
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("SCHILY.xattr.security.selinux", b"system_u:object_r:shadow_t:s0"),
            ("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0"),
            ("SCHILY.xattr.user.kept", b"line\nbreak = \0"),
        ];
        Archive::default().pax(&records).dir("d/").end()
    }) {
        let names: Vec<_> = tree(&applied.root)[&PathBuf::from("d")].xattrs.clone();
        assert_eq!(names, [("user.kept".to_owned(), b"line\nbreak = \0".to_vec())], "{}", applied.way);
    }
}

#[test]
fn a_huge_extended_header_is_refused_before_it_is_read() {
    for kind in [b'x', b'L', b'K', b'g'] {
        check("extended header", |_| {
            let archive = Archive::default().with_header(b"", |header| {
                header.as_old_mut().linkflag = [kind];
                header.set_size(8 << 30);
            });
            archive.unfinished()
        });
    }
}

#[test]
fn malformed_pax_records_are_refused() {
    for records in ["999 path=x\n", "0 path=x\n", "11 path=x\n", "path=x\n", "12 path: xxx\n", "-3 a=b\n", "9 pa=x\n9"]
    {
        check("PAX", |_| Archive::default().entry("pax", b'x', 0o644, "", records.as_bytes()).file("f", b"").end());
    }
    for (keyword, value) in [("size", "1e3"), ("size", "-1"), ("uid", "+0"), ("mtime", "now"), ("mtime", "1.x")] {
        check("PAX", |_| Archive::default().pax(&[(keyword, value.as_bytes())]).file("f", b"").end());
    }
    check("extended header", |_| Archive::default().pax(&[("path", b"x")]).end());
}

#[test]
fn a_pax_size_is_the_size_for_all_that_follows() {
    // A reader that goes by the header's own size would take the content for an entry.
    for applied in check("", |_| {
        let smuggled = Archive::default().file("smuggled", b"").unfinished();
        let archive = Archive::default().pax(&[("size", smuggled.len().to_string().as_bytes())]);
        let archive = archive.with_header(b"", |header| header.as_old_mut().name[..4].copy_from_slice(b"file"));
        archive.raw(&smuggled).end()
    }) {
        assert!(!applied.root.join("smuggled").exists());
        assert_eq!(fs::metadata(applied.root.join("file")).unwrap().len(), 512);
    }
}

#[test]
fn data_behind_an_entry_that_has_none_is_refused() {
    for kind in [b'1', b'2', b'5', b'6'] {
        check("has data", |_| Archive::default().file("f", b"").entry("x", kind, 0o644, "f", b"data").end());
    }
}

#[test]
fn sparse_files_and_unknown_types_are_refused() {
    check("sparse", |_| {
        Archive::default()
            .with_header(b"", |header| {
                header.as_old_mut().name[0] = b's';
                header.as_old_mut().linkflag = [b'S'];
                header.set_size(10 << 30);
            })
            .end()
    });
    check("sparse", |_| Archive::default().pax(&[("GNU.sparse.major", b"1")]).file("s", b"").end());
    check("unknown type", |_| Archive::default().entry("v", b'V', 0o644, "", b"").end());
}

#[test]
fn claimed_sizes_are_not_believed() {
    check("in the middle", |_| {
        let header = |header: &mut tar::Header| {
            header.as_old_mut().name[0] = b'f';
            header.set_size(8 << 30);
        };
        Archive::default().with_header(b"", header).unfinished()
    });
    check("more than", |_| {
        let header = |header: &mut tar::Header| {
            header.as_old_mut().name[0] = b'f';
            header.set_size(1 << 62);
        };
        Archive::default().with_header(b"", header).unfinished()
    });
}

#[test]
fn too_long_names_and_names_with_zero_bytes_are_refused() {
    let long = "x/".repeat(PATH_BYTES_MAX);
    check("longer than", |_| Archive::default().pax(&[("path", long.as_bytes())]).file("f", b"").end());
    check("longer than", |_| Archive::default().pax(&[("linkpath", long.as_bytes())]).symlink("f", "x").end());
    check("zero byte", |_| Archive::default().pax(&[("path", b"a\0b")]).file("f", b"").end());
    check("File name too long", |_| {
        Archive::default().pax(&[("path", "x".repeat(300).as_bytes())]).file("f", b"").end()
    });
}

#[test]
fn too_many_attributes_are_refused() {
    check("extended attributes", |_| {
        let names: Vec<String> = (0..=XATTRS_MAX).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
        let records: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
        Archive::default().pax(&records).file("f", b"").end()
    });
}

#[test]
fn owners_out_of_range_are_refused() {
    for id in ["4294967295", "4294967296", "18446744073709551615"] {
        check("out of range", |_| Archive::default().pax(&[("uid", id.as_bytes())]).file("f", b"").end());
        check("out of range", |_| Archive::default().pax(&[("gid", id.as_bytes())]).file("f", b"").end());
    }
}

#[test]
fn broken_framing_is_refused() {
    check("checksum", |_| Archive::default().raw(&[7; 512]).end());
    check("in the middle", |_| Archive::default().file("f", b"x").raw(&[0; 512]).file("g", b"x").end());
    check("in the middle", |_| Archive::default().file("f", b"x").unfinished()[..700].to_vec());
    check("in the middle", |_| Archive::default().file("f", b"x").unfinished()[..100].to_vec());
}

#[test]
fn the_root_itself_can_be_nothing_else() {
    check("must be a directory", |canary| Archive::default().symlink("./", canary).end());
    check("must be a directory", |_| Archive::default().hard_link("/", "below/file").end());
}

#[test]
fn duplicates_and_changes_of_type_end_as_the_last_entry_says() {
    for applied in check("", |_| {
        let archive = Archive::default().file("x", b"1").dir("x/").file("x/y", b"2").file("x", b"3").dir("x/");
        archive.file("z", b"old").hard_link("h", "z").file("z", b"new").end()
    }) {
        assert_eq!(fs::read_dir(applied.root.join("x")).unwrap().count(), 0);
        assert_eq!(fs::read(applied.root.join("h")).unwrap(), b"old", "a replaced file was written through its link");
        assert_eq!(fs::read(applied.root.join("z")).unwrap(), b"new");
    }
}

#[test]
fn entry_and_byte_limits_are_kept() {
    let scratch = Scratch::new();
    let archive = Archive::default().file("a", &[1; 2048]).file("b", b"").end();
    let apply = |limits| apply_diff(scratch.path(), &archive[..], limits).map_err(|error| error.to_string());
    let error = apply(Limits { entries: 1, bytes: 1 << 20 }).unwrap_err();
    assert!(error.contains("more than 1 entries"), "{error}");
    let error = apply(Limits { entries: 10, bytes: 3000 }).unwrap_err();
    assert!(error.contains("more than 3000 bytes"), "{error}");
    apply(Limits { entries: 2, bytes: archive.len() as u64 }).unwrap();
}

#[test]
fn a_deep_tree_made_through_links_is_applied_measured_and_removed() {
    // Each link shortens the names that lead on; so the tree gets deeper than a path can be.
    for applied in check("", |_| {
        let step = format!("{}/", "d".repeat(60)).repeat(50);
        let mut archive = Archive::default();
        let mut from = String::new();
        for level in 0..12 {
            let name = format!("{from}{step}");
            archive = archive.pax(&[("path", name.as_bytes())]).dir("x");
            archive = archive.pax(&[("path", format!("l{level}").as_bytes()), ("linkpath", name.as_bytes())]);
            archive = archive.symlink("x", "x");
            from = format!("l{level}/");
        }
        archive.end()
    }) {
        assert!(applied.root.join("d".repeat(60)).is_dir());
        drop(applied);
    }
}
