//! Archives of a hostile party: each is refused with a reason, and leaves nothing behind.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Members, containerd, file, gzip, tar, zstd};
use proptest::prelude::*;
use stasis_checkpoint::{RestoreSource, extract, inspect, inspect_dir, read_metadata};

/// A header as a hostile writer makes it: any type, any size, a right checksum.
fn header(name: &[u8], kind: u8, size: &[u8], link: &[u8]) -> Vec<u8> {
    let mut block = vec![0u8; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[124..124 + size.len()].copy_from_slice(size);
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..263].copy_from_slice(b"ustar\0");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn plain(name: &str) -> Vec<u8> {
    header(name.as_bytes(), b'0', b"00000000000", b"")
}

/// An extended header with these records.
fn pax(records: &[u8]) -> Vec<u8> {
    let mut bytes = header(b"PaxHeaders/x", b'x', format!("{:011o}", records.len()).as_bytes(), b"");
    bytes.extend(records);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// A good archive with `entry` before its end.
fn with(entry: &[u8]) -> Vec<u8> {
    let mut bytes = tar(&containerd());
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(entry);
    bytes.extend([0; 1024]);
    bytes
}

fn check_refused(what: &str, bytes: &[u8], reason: &str) {
    let dir = tempfile::tempdir().unwrap();
    let error = extract(file(bytes), &dir.path().join("x")).expect_err(what).to_string();
    assert!(error.contains(reason), "{what}: {error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{what} left something behind");
    assert!(inspect(file(bytes)).is_err(), "{what} was inspected");
}

#[test]
fn entries_that_are_no_files_or_directories_are_refused() {
    let zero = b"00000000000";
    for (kind, reason) in [
        (b'1', "a hard link"),
        (b'2', "a symbolic link"),
        (b'3', "a character device"),
        (b'4', "a block device"),
        (b'6', "a FIFO"),
        (b'S', "a sparse file"),
        (b'7', "of type '7'"),
        (b'K', "of type 'K'"),
        (b'?', "of type '?'"),
    ] {
        check_refused(reason, &with(&header(b"ctr.log", kind, zero, b"/etc/shadow")), reason);
    }
}

#[test]
fn names_that_mean_something_elsewhere_are_refused() {
    for (name, reason) in [
        ("/etc/passwd", "absolute"),
        ("../config.dump", "leads upwards"),
        ("checkpoint/../../x", "leads upwards"),
        ("checkpoint/..", "leads upwards"),
        ("checkpoint/sub/core-1.img", "belongs to no checkpoint"),
        ("checkpoint//core-2.img", "belongs to no checkpoint"),
        ("checkpoint/.img", "belongs to no checkpoint"),
        ("checkpoint/core 1.img", "belongs to no checkpoint"),
        ("checkpoint/run.sh", "belongs to no checkpoint"),
        ("checkpoint/parent", "belongs to no checkpoint"),
        ("pre-checkpoint/core-1.img", "belongs to no checkpoint"),
        ("volumes/../x.tar", "leads upwards"),
        ("CONFIG.DUMP", "belongs to no checkpoint"),
        ("././config.dump", "belongs to no checkpoint"),
        (".", "belongs to no checkpoint"),
        ("", "belongs to no checkpoint"),
        ("checkpoint", "belongs to no checkpoint"),
        ("checkpoint/", "directory's name"),
        ("x.wh..wh..opq", "belongs to no checkpoint"),
    ] {
        check_refused(name, &with(&plain(name)), reason);
    }
    check_refused("not UTF-8", &with(&header(b"config\xff", b'0', b"", b"")), "the name");
    check_refused("a directory for a file", &with(&header(b"ctr.log/", b'5', b"", b"")), "belongs to no checkpoint");
}

#[test]
fn duplicates_are_refused_however_they_are_spelled() {
    for name in ["config.dump", "./config.dump", "checkpoint/inventory.img"] {
        check_refused(name, &with(&plain(name)), "occurs twice");
    }
    check_refused("by PAX", &with(&[pax(b"20 path=config.dump\n"), plain("ctr.log")].concat()), "occurs twice");
}

#[test]
fn headers_that_lie_are_refused() {
    let sized = |size: &[u8]| with(&header(b"ctr.log", b'0', size, b""));
    check_refused("a size beyond the end", &sized(b"00000100000"), "ends in the middle");
    check_refused("a huge size", &sized(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), "more than");
    check_refused("a negative size", &sized(&[0xff; 12]), "broken size");
    check_refused("a size that is no number", &sized(b"+0000000000"), "broken size");
    check_refused("JSON of 1 GiB", &with(&header(b"pod.dump", b'0', b"10000000000", b"")), "more than");
    check_refused(
        "a directory with content",
        &with(&header(b"volumes/", b'5', b"00000000001", b"")),
        "is a directory of",
    );
    let mut broken = plain("ctr.log");
    broken[0] = b'C';
    check_refused("a wrong checksum", &with(&broken), "checksum");
}

#[test]
fn extended_headers_bring_nothing_in() {
    let next = plain("ctr.log");
    let with_pax = |records: &[u8]| with(&[pax(records), next.clone()].concat());
    check_refused("a path upwards", &with_pax(b"14 path=../x/y\n"), "broken extended header");
    check_refused("a path upwards", &with_pax(b"15 path=../x/y\n"), "leads upwards");
    check_refused("a link", &with_pax(b"22 linkpath=/etc/shad\n"), "link");
    check_refused("a sparse map", &with_pax(b"22 GNU.sparse.major=1\n"), "sparse");
    check_refused("a size of words", &with_pax(b"11 size=-1\n"), "broken size");
    check_refused("a size for later", &with_pax(b"17 size=99999999\n"), "ends in the middle");
    check_refused("a zero in a name", &with_pax(b"11 path=\0x\n"), "the name");
    check_refused("a record without end", &with_pax(b"99 path=x\n"), "broken extended header");
    check_refused("a record of length 0", &with_pax(b"0 path=x\n"), "broken extended header");
    let many: Vec<u8> = (0..20).flat_map(|_| pax(b"13 comment=x\n")).collect();
    check_refused("headers without end", &with(&many), "extended headers before one entry");
    let big = header(b"x", b'x', b"00000400000", b"");
    check_refused("a large extended header", &with(&big), "an extended header of");
    let big = header(b"x", b'L', b"00000400000", b"");
    check_refused("a large long name", &with(&big), "an extended header of");
    let long = format!("{}\n", "9".repeat(400));
    let record = format!("{} path={long}", 10 + long.len() - 1);
    assert_eq!(record.len(), record.split(' ').next().unwrap().parse::<usize>().unwrap());
    check_refused("a long path", &with_pax(record.as_bytes()), "has 400 bytes");
}

#[test]
fn files_that_are_no_archives_are_refused() {
    check_refused("nothing", b"", "is no tar");
    check_refused("text", &b"hello ".repeat(200), "checksum");
    check_refused("xz", b"\xfd7zXZ\0\0\0", "xz");
    check_refused("bzip2", b"BZh9", "bzip2");
    check_refused("half a gzip", &gzip(&tar(&containerd()))[..200], "ends in the middle");
    check_refused("half a zstd", &zstd(&tar(&containerd()))[..200], "ends in the middle");
    check_refused("a broken gzip", &[&gzip(&tar(&containerd()))[..10], &[0xff; 500]].concat(), "decompress");
    check_refused("a broken zstd", &[&zstd(&tar(&containerd()))[..6], &[0xff; 500]].concat(), "decompress");
    let plain = tar(&containerd());
    check_refused("a tar without its end", &plain[..plain.len() - 1024], "ends in the middle");
    check_refused("half a tar", &plain[..plain.len() / 2], "ends in the middle");
}

#[test]
fn a_bomb_is_stopped_long_before_it_is_unpacked() {
    let mut tar = header(b"checkpoint/pages-1.img", b'0', b"10000000000", b"");
    let zeros = vec![0; 1 << 20];
    let mut encoder = zstd::Encoder::new(Vec::new(), 19).unwrap();
    std::io::Write::write_all(&mut encoder, &tar).unwrap();
    for _ in 0..1024 {
        std::io::Write::write_all(&mut encoder, &zeros).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 200_000, "{}", bomb.len());
    check_refused("a bomb", &bomb, "compressed bytes became");
    tar.clear();
}

#[test]
fn members_that_mean_two_things_are_refused() {
    let replaced = |name: &str, content: &str| -> Members {
        let replace = |(member, old): (String, Vec<u8>)| {
            if member == name { (member, content.as_bytes().to_vec()) } else { (member, old) }
        };
        containerd().into_iter().map(replace).collect()
    };
    let error = |members: &Members| read_metadata(file(&tar(members))).unwrap_err().to_string();
    assert!(error(&replaced("config.dump", r#"{"id":"a","id":"b","name":"x"}"#)).contains("occurs twice"));
    assert!(error(&replaced("spec.dump", "[]")).contains("no JSON object"));
    assert!(error(&replaced("spec.dump", "{")).contains("spec.dump"));
    assert!(error(&replaced("status.dump", r#"{"state":"x"}"#)).contains("status.dump"));
    let without = |name: &str| containerd().into_iter().filter(|(member, _)| member != name).collect::<Members>();
    assert!(error(&without("config.dump")).contains("has no config.dump"));
    assert!(error(&without("spec.dump")).contains("has no spec.dump"));
}

#[test]
fn a_directory_with_a_link_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    extract(file(&tar(&containerd())), &target).unwrap();
    std::fs::remove_file(target.join("container.log")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", target.join("container.log")).unwrap();
    let error = RestoreSource::open(&target).unwrap_err().to_string();
    assert!(error.contains("container.log") && error.contains("neither a regular file"), "{error}");
    assert!(inspect_dir(&target).is_err());
    std::fs::remove_file(target.join("container.log")).unwrap();
    std::fs::rename(target.join("checkpoint"), dir.path().join("y")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("y"), target.join("checkpoint")).unwrap();
    assert!(RestoreSource::open(&target).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Also the fuzz target's harness: whatever the bytes are, reading ends without a panic, and what is refused leaves
    /// nothing behind.
    #[test]
    fn mutated_archives_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
                                    cut in any::<prop::sample::Index>(), form in 0..3) {
        let mut bytes = tar(&containerd());
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(bytes.len() / 2 + cut.index(bytes.len()));
        let bytes = match form { 0 => bytes, 1 => gzip(&bytes), _ => zstd(&bytes) };
        let _ = inspect(file(&bytes));
        let dir = tempfile::tempdir().unwrap();
        if extract(file(&bytes), &dir.path().join("x")).is_err() {
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn mutated_compressed_streams_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), gz in any::<bool>()) {
        let plain = tar(&containerd());
        let mut bytes = if gz { gzip(&plain) } else { zstd(&plain) };
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = inspect(file(&bytes));
    }
}
