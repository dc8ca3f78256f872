//! What is written: names, order, atomicity, members of a container, and the image.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use common::{IMAGE_ID, gzip, tar};
use serde_json::{Value, json};
use stasis_checkpoint::{
    ArchiveWriter, Codec, ContainerDescription, Dialect, EngineFacts, Form, ImageDescription, Member, MountDescription,
    PodDescription, Profile, extract, image_from_archive, inspect, is_partial, limits, marker, read_metadata,
};

fn description() -> ContainerDescription {
    ContainerDescription {
        id: common::ID.to_owned(),
        name: "counter".to_owned(),
        attempt: 3,
        pod: PodDescription {
            id: "pod-id".to_owned(),
            name: "pod-1".to_owned(),
            namespace: "default".to_owned(),
            uid: "uid-1".to_owned(),
        },
        image: ImageDescription {
            requested: "counter:1".to_owned(),
            digest_reference: format!("docker.io/library/counter@sha256:{IMAGE_ID}"),
            name: "docker.io/library/counter:1".to_owned(),
            id: format!("sha256:{IMAGE_ID}"),
        },
        runtime: "io.containerd.stasis.v1".to_owned(),
        annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        created_at: 1_767_323_045_000_000_000,
        started_at: 1_767_323_046_000_000_000,
        pid: 4711,
        mounts: vec![MountDescription {
            container_path: "/data".to_owned(),
            host_path: "/etc".to_owned(),
            readonly: true,
            ..MountDescription::default()
        }],
        spec: json!({"ociVersion": "1.2.1", "annotations": {"org.criu.config": "/run/x/criu.conf", "k": "v"}}),
        ..ContainerDescription::default()
    }
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// An archive as the worker writes it.
fn archive(dir: &Path, profile: Profile) -> std::path::PathBuf {
    let members = dir.join("members");
    fs::create_dir(&members).unwrap();
    description().write_members(&members, profile).unwrap();
    let path = dir.join("checkpoint-pod_ns-ctr-2026-01-02T03:04:05+01:00.tar");
    let mut writer = ArchiveWriter::create(&path, 1 << 20).unwrap();
    for name in ["config.dump", "spec.dump", "status.dump", "status", "bind.mounts"] {
        writer.add(&Member::parse(name).unwrap(), &fs::read(members.join(name)).unwrap()).unwrap();
    }
    writer.add(&Member::RootfsDiff, b"layer").unwrap();
    writer.add_from(&Member::Log(Dialect::Containerd), 3, &b"log that grew"[..]).unwrap();
    for image in ["core-1.img", "descriptors.json", "inventory.img", "pstree.img"] {
        let content = if image == "pstree.img" { common::pstree() } else { image.as_bytes().to_vec() };
        writer.add(&Member::Image(image.to_owned()), &content).unwrap();
    }
    writer.add(&Member::StatsDump, b"").unwrap();
    writer.add(&Member::DumpLog, b"ok").unwrap();
    writer.begin(&Member::Image("pages-1.img".to_owned()), 10_000).unwrap();
    writer.write_all(&[1; 4096]).unwrap();
    writer.write_all(&[2; 5904]).unwrap();
    let partial = names(dir).into_iter().find(|name| name.ends_with(".partial")).unwrap();
    assert!(partial.starts_with("checkpoint-pod_ns-ctr-2026-01-02T03:04:05+01:00.tar."), "{partial}");
    let name = path.file_name().unwrap();
    assert!(is_partial(partial.as_ref(), name) && !is_partial(name, name));
    for other in ["checkpoint-pod_ns-ctr-2026-01-02T03:04:05+01:00.tar2", "checkpoint"] {
        assert!(!is_partial(partial.as_ref(), other.as_ref()), "{other}");
    }
    assert!(!is_partial("a-partial-copy.tar".as_ref(), "a".as_ref()), "somebody else's file");
    let size = writer.finish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), size.bytes);
    path
}

#[test]
fn gnu_tar_lists_exactly_the_members_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = archive(dir.path(), Profile::Containerd);
    let output = Command::new("tar").arg("--force-local").arg("-tvf").arg(&path).output().expect("GNU tar is needed");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let listing = String::from_utf8(output.stdout).unwrap();
    let listed: Vec<&str> = listing.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
    let expected = "config.dump spec.dump status.dump status bind.mounts rootfs-diff.tar container.log checkpoint/ \
                    checkpoint/core-1.img checkpoint/descriptors.json checkpoint/inventory.img checkpoint/pstree.img \
                    stats-dump dump.log checkpoint/pages-1.img";
    assert_eq!(listed.join(" "), expected);
    assert!(listing.lines().all(|line| line.starts_with("-rw-------") || line.starts_with("drwx------")), "{listing}");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let log = Command::new("tar").arg("--force-local").arg("-xOf").arg(&path).arg("container.log").output().unwrap();
    assert_eq!(log.stdout, b"log");
}

#[test]
fn large_content_is_aligned_and_read_by_gnu_tar() {
    let dir = tempfile::tempdir().unwrap();
    let memory: Vec<u8> = (0..5 << 20).map(|at: u32| (at >> 9) as u8).collect();
    // Each of the eight places in a block at which a header can end up.
    for before in 0..8 {
        let path = dir.path().join("a.tar");
        let mut writer = ArchiveWriter::create(&path, 0).unwrap();
        writer.add(&Member::ConfigDump, &vec![b'{'; 512 * before]).unwrap();
        writer.add(&Member::Image("pages-1.img".to_owned()), &memory).unwrap();
        writer.add(&Member::Image("pages-2.img".to_owned()), &memory[1..]).unwrap();
        writer.finish().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.chunks(4096).any(|block| memory.starts_with(block)), "aligned");
        let output = Command::new("tar").arg("-xOf").arg(&path).arg("checkpoint/pages-1.img").output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty() && output.stdout == memory);
        let output = Command::new("tar").arg("-tf").arg(&path).output().unwrap();
        assert_eq!(output.stdout, b"config.dump\ncheckpoint/\ncheckpoint/pages-1.img\ncheckpoint/pages-2.img\n");
        let target = dir.path().join(before.to_string());
        stasis_checkpoint::extract(File::open(&path).unwrap(), &target).unwrap();
        assert!(fs::read(target.join("checkpoint/pages-2.img")).unwrap() == memory[1..]);
    }
}

#[test]
fn our_own_reader_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = archive(dir.path(), Profile::Containerd);
    let inspection = inspect(File::open(&path).unwrap()).unwrap();
    assert_eq!((inspection.dialect, inspection.container.as_str()), (Dialect::Containerd, "counter"));
    assert_eq!((inspection.memory_bytes, inspection.processes), (10_000, Some(2)));
    assert_eq!(inspection.mounts, []);
}

#[test]
fn a_writer_given_up_leaves_nothing_and_the_old_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    fs::write(&path, "old").unwrap();
    let mut writer = ArchiveWriter::create(&path, 0).unwrap();
    writer.add(&Member::ConfigDump, b"{}").unwrap();
    drop(writer);
    let mut writer = ArchiveWriter::create(&path, 0).unwrap();
    writer.begin(&Member::ConfigDump, 10).unwrap();
    writer.write_all(b"short").unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("5 bytes of it are missing"));
    assert_eq!(names(dir.path()), ["a.tar"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    ArchiveWriter::create(&path, 0).unwrap().finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), [0; 1024]);
}

#[test]
fn members_out_of_order_too_long_or_too_short_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let new = || ArchiveWriter::create(&dir.path().join("a.tar"), 0).unwrap();
    let mut writer = new();
    writer.add(&Member::SpecDump, b"{}").unwrap();
    assert!(writer.add(&Member::ConfigDump, b"{}").unwrap_err().to_string().contains("after spec.dump"));
    assert!(new().add_from(&Member::DumpLog, 10, &b"short"[..]).is_err());
    drop(writer);
    let mut writer = new();
    writer.begin(&Member::ConfigDump, 2).unwrap();
    assert!(writer.write_all(b"{} ").is_err());
    drop(writer);
    let missing = ArchiveWriter::create(Path::new("/no/such/dir/a.tar"), 0).unwrap_err().to_string();
    assert!(missing.contains("/no/such/dir"), "{missing}");
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn a_name_of_255_bytes_has_room_for_a_partial_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x".repeat(255));
    ArchiveWriter::create(&path, 0).unwrap().finish().unwrap();
    assert!(path.is_file());
}

fn read(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap()
}

#[test]
fn members_say_what_the_peers_look_for() {
    let dir = tempfile::tempdir().unwrap();
    description().write_members(dir.path(), Profile::Containerd).unwrap();
    let config = read(dir.path(), "config.dump");
    assert_eq!(config["name"], "counter_pod-1_default_uid-1_3");
    assert_eq!(config["rootfsImageRef"], format!("docker.io/library/counter@sha256:{IMAGE_ID}"));
    assert_eq!(config["rootfsImageID"], IMAGE_ID);
    assert_eq!(config["createdTime"], "2026-01-02T03:04:05Z");
    assert_eq!((&config["restoredTime"], &config["restored"]), (&json!("0001-01-01T00:00:00Z"), &json!(false)));
    let spec = read(dir.path(), "spec.dump");
    assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-id"], "pod-id");
    assert_eq!(spec["annotations"]["io.kubernetes.cri-o.Annotations"], r#"{"a":"b"}"#);
    assert_eq!((&spec["annotations"]["org.criu.config"], &spec["annotations"]["k"]), (&Value::Null, &json!("v")));
    let status = read(dir.path(), "status.dump");
    assert_eq!((&status["metadata"]["name"], &status["metadata"]["attempt"]), (&json!("counter"), &json!(3)));
    assert_eq!((&status["state"], &status["created_at"]), (&json!(1), &json!(1_767_323_045_000_000_000_i64)));
    assert_eq!(status["mounts"], json!([{"container_path": "/data", "host_path": "/etc", "readonly": true}]));
    assert_eq!(status["labels"], Value::Null, "zero values are left out");
    let binds = read(dir.path(), "bind.mounts");
    assert_eq!(binds[0]["file_type"], "directory");
    assert_eq!(read(dir.path(), "status")["Version"], "v1");
    for name in names(dir.path()) {
        assert_eq!(fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o7777, 0o600);
    }
}

#[test]
fn the_profile_of_cri_o_has_its_names() {
    let dir = tempfile::tempdir().unwrap();
    description().write_members(dir.path(), Profile::CriO).unwrap();
    let config = read(dir.path(), "config.dump");
    assert_eq!(config["name"], "k8s_counter_pod-1_default_uid-1_3");
    assert_eq!(config["rootfsImageRef"], IMAGE_ID);
}

#[test]
fn an_archive_becomes_an_image_of_its_own_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = archive(dir.path(), Profile::Containerd);
    let base = json!({"architecture": "arm64", "os": "linux", "config": {
        "User": "1000", "Env": ["A=b"], "Entrypoint": ["/c"], "Labels": {"io.x": "y"}, "StopSignal": "SIGINT"}});
    let facts = EngineFacts { criu_version: stasis_criu::Version::parse("4.2.1"), ..EngineFacts::default() };
    let parts = image_from_archive(&path, Some(&serde_json::to_vec(&base).unwrap()), None, &facts, None).unwrap();
    assert_eq!(parts.layer_media_type, "application/vnd.oci.image.layer.v1.tar");
    assert_eq!((parts.layer_size, &parts.layer_digest), (fs::metadata(&path).unwrap().len(), &parts.diff_id));
    let sum = Command::new("sha256sum").arg(&path).output().unwrap();
    assert!(String::from_utf8_lossy(&sum.stdout).contains(&parts.diff_id["sha256:".len()..]));
    let config: Value = serde_json::from_slice(&parts.config_json).unwrap();
    assert_eq!((&config["architecture"], &config["config"]["User"]), (&json!("arm64"), &json!("1000")));
    assert_eq!(config["config"]["Labels"], Value::Null);
    assert_eq!(config["rootfs"]["diff_ids"], json!([parts.diff_id]));
    let annotations = &parts.annotations;
    for key in [
        "org.criu.checkpoint.container.name",
        "io.kubernetes.cri-o.annotations.checkpoint.name",
        "io.podman.annotations.checkpoint.name",
    ] {
        assert_eq!(annotations[key], "counter", "{key}");
    }
    assert_eq!(annotations["io.podman.annotations.checkpoint.runtime.name"], "io.containerd.stasis.v1");
    assert_eq!(annotations["io.podman.annotations.checkpoint.criu.version"], "40201");
    assert_eq!(annotations["org.criu.checkpoint.rootfsImageID"], IMAGE_ID);
    assert_eq!(annotations["org.criu.checkpoint.pod.namespace"], "default");
    let mark = marker(annotations).unwrap();
    assert_eq!((mark.container_name.as_str(), mark.dialect), ("counter", Dialect::Containerd));
}

#[test]
fn a_compressed_archive_has_two_digests() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar.gz");
    let plain = tar(&common::cri_o());
    fs::write(&path, gzip(&plain)).unwrap();
    let parts = image_from_archive(&path, None, None, &EngineFacts::default(), None).unwrap();
    assert_eq!(parts.layer_media_type, "application/vnd.oci.image.layer.v1.tar+gzip");
    assert_ne!(parts.diff_id, parts.layer_digest);
    fs::write(&path, &plain).unwrap();
    assert_eq!(image_from_archive(&path, None, None, &EngineFacts::default(), None).unwrap().diff_id, parts.diff_id);
}

#[test]
fn memory_full_of_zeros_is_read_back_however_it_is_compressed() {
    const ZEROS: u64 = 400 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zeros.tar");
    let form = Form { codec: Some(Codec::Zstd { level: 1, threads: 0 }), digest: true };
    let mut writer = ArchiveWriter::create_as(&path, ZEROS + (1 << 20), form).unwrap();
    for (name, content) in common::containerd() {
        if ["config.dump", "spec.dump"].contains(&name.as_str()) {
            writer.add(&Member::parse(&name).unwrap(), &content).unwrap();
        }
    }
    writer.add(&Member::Image("inventory.img".to_owned()), b"inventory").unwrap();
    writer.add_from(&Member::Image("pages-1.img".to_owned()), ZEROS, std::io::repeat(0)).unwrap();
    let written = writer.finish().unwrap();
    assert!(written.bytes < ZEROS / 900, "{written:?}");
    extract(File::open(&path).unwrap(), &dir.path().join("extracted")).unwrap();
    let pages = fs::metadata(dir.path().join("extracted/checkpoint/pages-1.img")).unwrap();
    assert_eq!(pages.len(), ZEROS);
    // As the layer of an image, which has limits of its own.
    let mut layer = stasis_snapshot::decompress(File::open(&path).unwrap()).unwrap();
    assert!(std::io::copy(&mut layer, &mut std::io::sink()).unwrap() > ZEROS);
}

#[test]
fn an_archive_of_lz4_is_read_and_becomes_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar.lz4");
    let mut writer = ArchiveWriter::create_as(&path, 0, Form { codec: Some(Codec::Lz4), digest: false }).unwrap();
    for (name, content) in common::containerd() {
        if ["config.dump", "spec.dump"].contains(&name.as_str()) {
            writer.add(&Member::parse(&name).unwrap(), &content).unwrap();
        }
    }
    writer.add(&Member::Image("inventory.img".to_owned()), b"inventory").unwrap();
    writer.finish().unwrap();
    extract(File::open(&path).unwrap(), &dir.path().join("extracted")).unwrap();
    assert_eq!(fs::read(dir.path().join("extracted/checkpoint/inventory.img")).unwrap(), b"inventory");
    let error = image_from_archive(&path, None, None, &EngineFacts::default(), None).unwrap_err();
    assert!(error.to_string().contains("lz4"), "{error}");
}

#[test]
fn what_no_reader_takes_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ArchiveWriter::create(&dir.path().join("a.tar"), 0).unwrap();
    let error = writer.begin(&Member::ConfigDump, limits::JSON_MAX + 1).unwrap_err();
    assert!(error.to_string().contains("can be read back"), "{error}");
}

#[test]
fn any_of_the_three_marks_is_recognised() {
    let mark = |pairs: &[(&str, &str)]| {
        marker(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    };
    let of = |pairs: &[(&str, &str)]| mark(pairs).map(|mark| (mark.container_name, mark.dialect));
    assert_eq!(of(&[("org.criu.checkpoint.container.name", "a")]), Some(("a".to_owned(), Dialect::Containerd)));
    assert_eq!(of(&[("io.kubernetes.cri-o.annotations.checkpoint.name", "b")]), Some(("b".to_owned(), Dialect::CriO)));
    assert_eq!(
        of(&[
            ("io.podman.annotations.checkpoint.runtime.name", "crun"),
            ("io.podman.annotations.checkpoint.name", "c")
        ]),
        Some(("c".to_owned(), Dialect::Podman))
    );
    assert_eq!(mark(&[("org.opencontainers.image.title", "x")]), None);
    assert_eq!(mark(&[]), None);
}

#[test]
fn metadata_come_from_the_archive_alone() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = read_metadata(File::open(archive(dir.path(), Profile::CriO)).unwrap()).unwrap();
    assert_eq!(metadata.status.unwrap().metadata.name, "counter");
    assert!(metadata.has_rootfs_diff);
}
