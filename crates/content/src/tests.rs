//! Tests of the store, in a directory of their own.

use super::*;
use proptest::prelude::*;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;

struct Store {
    root: tempfile::TempDir,
    content: Content,
}

impl Store {
    fn new() -> Store {
        let root = tempfile::tempdir().unwrap();
        let content = Content::open(root.path()).unwrap();
        Store { root, content }
    }

    fn ingest_count(&self) -> usize {
        fs::read_dir(self.root.path().join("content/ingest")).unwrap().count()
    }

    fn put(&self, bytes: &[u8]) -> Digest {
        let mut writer = self.content.writer().unwrap();
        writer.write_all(bytes).unwrap();
        writer.commit(None, Some(bytes.len() as u64)).unwrap().0
    }
}

#[test]
fn a_blob_is_stored_under_its_known_digest() {
    let store = Store::new();
    let digest = store.put(b"abc");
    // FIPS 180-2, appendix B.1.
    assert_eq!(digest.as_str(), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert!(store.content.has(&digest));
    assert_eq!(store.content.size(&digest).unwrap(), 3);
    assert_eq!(store.content.read(&digest, 3).unwrap(), b"abc");
    assert_eq!(store.content.list().unwrap(), std::slice::from_ref(&digest));
    store.content.verify(&digest).unwrap();
    assert_eq!(store.put(b"abc"), digest, "a second time is fine");
    assert_eq!(store.ingest_count(), 0);
    store.content.delete(&digest).unwrap();
    store.content.delete(&digest).unwrap();
    assert!(!store.content.has(&digest));
    assert!(matches!(store.content.open_blob(&digest), Err(Error::NotFound { .. })));
}

#[test]
fn what_was_not_expected_is_discarded_and_named() {
    let store = Store::new();
    let (wanted, other) = (Digest::of(b"wanted"), Digest::of(b"other"));
    let mut writer = store.content.writer().unwrap();
    writer.write_all(b"other").unwrap();
    let message = writer.commit(Some(&wanted), None).unwrap_err().to_string();
    assert!(message.contains(wanted.as_str()) && message.contains(other.as_str()), "{message}");
    let mut writer = store.content.writer().unwrap();
    writer.write_all(b"wanted").unwrap();
    assert!(matches!(writer.commit(Some(&wanted), Some(7)), Err(Error::Size { expected: 7, actual: 6 })));
    assert!(store.content.list().unwrap().is_empty());
    assert_eq!(store.ingest_count(), 0);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let store = Store::new();
    let mut writer = store.content.writer().unwrap();
    writer.write_all(b"half").unwrap();
    assert_eq!(store.ingest_count(), 1);
    drop(writer);
    assert_eq!(store.ingest_count(), 0);
}

#[test]
fn what_a_crash_left_is_removed_at_the_next_opening() {
    let store = Store::new();
    let kept = store.put(b"kept");
    let mut writer = store.content.writer().unwrap();
    writer.write_all(b"half").unwrap();
    // A killed process runs no destructor.
    std::mem::forget(writer);
    assert_eq!(store.ingest_count(), 1);
    let again = Content::open(store.root.path()).unwrap();
    assert_eq!(store.ingest_count(), 0);
    assert_eq!(again.list().unwrap(), [kept]);
}

#[test]
fn a_blob_that_changed_on_disk_is_not_believed() {
    let store = Store::new();
    let digest = store.put(b"abc");
    fs::write(store.content.path(&digest), b"abd").unwrap();
    assert!(matches!(store.content.read(&digest, 10), Err(Error::Corrupt { .. })));
    assert!(matches!(store.content.verify(&digest), Err(Error::Corrupt { .. })));
    assert!(matches!(store.content.read(&digest, 2), Err(Error::TooLarge { size: 3, limit: 2, .. })));
}

#[test]
fn a_file_becomes_a_blob_that_nobody_can_change_any_more() {
    let store = Store::new();
    let path = store.root.path().join("file");
    fs::write(&path, b"abc").unwrap();
    let (digest, size) = store.content.add_file(&path, None).unwrap();
    assert_eq!((size, &digest), (3, &Digest::of(b"abc")));
    fs::write(&path, b"xyz").unwrap();
    assert_eq!(store.content.read(&digest, 10).unwrap(), b"abc");
    assert!(matches!(store.content.add_file(&path, Some(&Digest::of(b"abc"))), Err(Error::Digest { .. })));
    assert_eq!(store.ingest_count(), 0);
}

#[test]
fn a_link_is_not_taken_for_a_file() {
    let store = Store::new();
    let (path, link) = (store.root.path().join("file"), store.root.path().join("link"));
    fs::write(&path, b"abc").unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(store.content.add_file(&link, None).is_err());
    assert!(store.content.add_file(store.root.path(), None).is_err());
    assert_eq!(store.ingest_count(), 0);
}

#[test]
fn directories_are_closed_to_others() {
    let store = Store::new();
    for dir in ["content", "content/blobs", "content/blobs/sha256", "content/ingest"] {
        let mode = fs::metadata(store.root.path().join(dir)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700, "{dir}");
    }
}

#[test]
fn an_open_blob_can_be_read_after_its_deletion() {
    let store = Store::new();
    let digest = store.put(b"abc");
    let mut file = store.content.open_blob(&digest).unwrap();
    store.content.delete(&digest).unwrap();
    let mut text = String::new();
    file.seek(SeekFrom::Start(1)).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bc");
}

#[test]
fn digests_of_other_forms_are_refused() {
    let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let good: Digest = format!("sha256:{hex}").parse().unwrap();
    assert_eq!(good.hex(), hex);
    let json = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), good);
    let upper = hex.to_uppercase();
    let bad = [
        hex.to_owned(),
        format!("sha256:{upper}"),
        format!("sha512:{hex}"),
        format!("sha256:{hex}0"),
        "sha256:../../../x".to_owned(),
    ];
    for text in bad {
        assert!(text.parse::<Digest>().is_err(), "{text}");
        assert!(serde_json::from_str::<Digest>(&format!("{text:?}")).is_err(), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn bytes_come_back_however_they_were_cut(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 0..20)) {
        let store = Store::new();
        let mut writer = store.content.writer().unwrap();
        for piece in &pieces {
            writer.write_all(piece).unwrap();
        }
        let whole = pieces.concat();
        let (digest, size) = writer.commit(Some(&Digest::of(&whole)), Some(whole.len() as u64)).unwrap();
        prop_assert_eq!(size, whole.len() as u64);
        prop_assert_eq!(store.content.read(&digest, size).unwrap(), whole);
    }
}
