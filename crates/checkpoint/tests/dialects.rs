//! Archives of the three dialects are read, inspected, unpacked and opened for a restore.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Read;

use common::{ID, IMAGE_ID, Members, containerd, cri_o, file, gzip, podman, tar, zstd};
use stasis_checkpoint::{ConfigDump, Dialect, RestoreSource, extract, inspect, inspect_dir, read_metadata};

fn check_read(members: &Members, dialect: Dialect) {
    let plain = tar(members);
    // containerd leaves the tail of an older file behind the end.
    let trailing = [&plain[..], &[0x5a; 5000]].concat();
    for bytes in [plain.clone(), trailing, gzip(&plain), zstd(&plain)] {
        let metadata = read_metadata(file(&bytes)).unwrap();
        assert_eq!(metadata.dialect, dialect);
        assert_eq!(metadata.config.id, ID);
        assert!(metadata.log.is_some());
        let inspection = inspect(file(&bytes)).unwrap();
        assert_eq!(inspection.container_id, ID);
        assert!(serde_json::to_string(&inspection).unwrap().contains(&format!("\"dialect\":\"{dialect}\"")));
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/checkpoint");
        let extracted = extract(file(&bytes), &target).unwrap();
        assert_eq!(extracted.bytes, inspection.total_bytes);
        let from_dir = inspect_dir(&target).unwrap();
        assert_eq!(from_dir.total_bytes, inspection.total_bytes);
        assert!(RestoreSource::open(&target).unwrap().images_dir().join("inventory.img").is_file());
        // A second archive never mixes with a first.
        assert!(extract(file(&bytes), &target).is_err());
        assert!(target.is_dir());
    }
}

#[test]
fn all_dialects_in_all_compressions_are_read() {
    check_read(&containerd(), Dialect::Containerd);
    check_read(&cri_o(), Dialect::CriO);
    check_read(&podman(), Dialect::Podman);
}

#[test]
fn inspection_tells_what_is_inside() {
    let inspection = inspect(file(&tar(&containerd()))).unwrap();
    assert_eq!((inspection.container.as_str(), inspection.pod.as_str()), ("counter", "pod-1"));
    assert_eq!((inspection.namespace.as_str(), inspection.processes), ("default", Some(2)));
    assert_eq!((inspection.threads, inspection.memory_bytes), (Some(3), 8192));
    assert_eq!(inspection.mounts.len(), 6);
    let inspection = inspect(file(&tar(&podman()))).unwrap();
    assert_eq!((inspection.container.as_str(), inspection.image.as_str()), ("eager_bell", "counter"));
    assert_eq!(inspection.image_ref, IMAGE_ID);
}

fn source(members: &Members) -> (tempfile::TempDir, RestoreSource) {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    extract(file(&tar(members)), &target).unwrap();
    let source = RestoreSource::open(&target).unwrap();
    (dir, source)
}

#[test]
fn the_base_image_is_named_by_digest_or_id_where_the_archive_has_one() {
    let check = |members: &Members, sure: &str, others: &[&str]| {
        let (_dir, source) = source(members);
        let config = &source.metadata().config;
        assert_eq!(config.base_candidates(), [sure]);
        let names: Vec<String> = std::iter::once(sure).chain(others.iter().copied()).map(str::to_owned).collect();
        assert_eq!(config.base_names(), names);
    };
    let by_digest = format!("docker.io/library/counter@sha256:{IMAGE_ID}");
    check(&containerd(), &by_digest, &["docker.io/library/counter:1"]);
    let id = format!("sha256:{IMAGE_ID}");
    check(&cri_o(), &id, &["localhost/counter:1", "counter:1"]);
    check(&podman(), &id, &["localhost/counter:1", "counter"]);
}

#[test]
fn without_digest_and_id_names_are_what_there_is() {
    let config = ConfigDump { rootfs_image_name: "localhost/counter:1".into(), ..ConfigDump::default() };
    assert_eq!(config.base_candidates(), ["localhost/counter:1"]);
    assert!(ConfigDump::default().base_candidates().is_empty());
}

#[test]
fn mounts_from_outside_must_be_in_the_request() {
    let (_dir, source) = source(&containerd());
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    assert_eq!(source.missing_mounts(&[]), ["/data", account]);
    assert_eq!(source.missing_mounts(&["/data/", "/more"]), [account]);
    assert!(source.missing_mounts(&[account, "//data/."]).is_empty());
    assert_eq!(source.missing_mounts(&["/data/..", account]), ["/data"]);
}

#[test]
fn log_and_deleted_files_are_found_in_each_dialect() {
    for (members, text) in [(containerd(), "stdout F 1"), (cri_o(), "old log"), (podman(), "log")] {
        let (_dir, source) = source(&members);
        let mut log = String::new();
        source.open_log().unwrap().unwrap().read_to_string(&mut log).unwrap();
        assert!(log.contains(text), "{log}");
    }
    assert_eq!(source(&cri_o()).1.deleted_files().unwrap(), ["/etc/motd", "/usr/share/doc/x"]);
    assert!(source(&containerd()).1.deleted_files().unwrap().is_empty());
}
