//! Archives for tests, built by the `tar` crate so that they do not depend on the code under test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs::File;
use std::io::{Seek, Write};

pub const ID: &str = "6a3b0d5f0f0e4f0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b";
pub const IMAGE_ID: &str = "e1f2d3c4b5a697887766554433221100ffeeddccbbaa99887766554433221100";

/// `pstree.img` of two processes, the first with two threads.
pub fn pstree() -> Vec<u8> {
    let mut image = vec![0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50];
    let first: &[u8] = &[0x08, 1, 0x10, 0, 0x18, 1, 0x20, 1, 0x28, 1, 0x28, 9];
    let second: &[u8] = &[0x08, 7, 0x10, 1, 0x18, 1, 0x20, 1, 0x28, 7];
    for message in [first, second] {
        image.extend((message.len() as u32).to_le_bytes());
        image.extend(message);
    }
    image
}

pub fn spec(annotations: &str) -> String {
    format!(
        r#"{{"ociVersion":"1.2.1","annotations":{annotations},"mounts":[
        {{"destination":"/proc","type":"proc","source":"proc"}},
        {{"destination":"/dev/shm","type":"bind","source":"/run/x/shm","options":["rbind"]}},
        {{"destination":"/etc/hosts","type":"bind","source":"/run/x/hosts","options":["rbind"]}},
        {{"destination":"/data/","type":"bind","source":"/srv/data","options":["rbind","ro"]}},
        {{"destination":"/tmp","type":"tmpfs","source":"tmpfs"}},
        {{"destination":"/var/run/secrets/kubernetes.io/serviceaccount","source":"/x","options":["bind"]}}]}}"#
    )
}

/// Members of each dialect: `(name, content)`; a name that ends in a slash is a directory.
pub type Members = Vec<(String, Vec<u8>)>;

fn members(list: &[(&str, &[u8])]) -> Members {
    list.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect()
}

/// containerd's: alphabetical, as it walks a directory.
pub fn containerd() -> Members {
    let config = format!(
        r#"{{"id":"{ID}","name":"counter_pod-1_default_uid-1_2","rootfsImage":"docker.io/library/counter:1","rootfsImageRef":"docker.io/library/counter@sha256:{IMAGE_ID}","rootfsImageName":"docker.io/library/counter:1","runtime":"io.containerd.runc.v2","createdTime":"2026-01-02T03:04:05Z","checkpointedTime":"2026-01-02T03:05:05Z","restoredTime":"0001-01-01T00:00:00Z","restored":false}}"#
    );
    let status = r#"{"id":"x","metadata":{"name":"counter","attempt":2},"state":1,"created_at":1767323045000000000,"image":{"image":"docker.io/library/counter:1","user_specified_image":"counter:1"},"image_ref":"docker.io/library/counter@sha256:x","labels":{"a":"b"},"mounts":[{"container_path":"/data","host_path":"/srv/data","readonly":true}]}"#;
    let annotations = r#"{"io.kubernetes.cri.sandbox-id":"s","io.kubernetes.cri.sandbox-name":"pod-1","io.kubernetes.cri.sandbox-namespace":"default"}"#;
    members(&[
        ("checkpoint/", b""),
        ("checkpoint/core-1.img", b"core"),
        ("checkpoint/descriptors.json", b"[]"),
        ("checkpoint/inventory.img", b"inventory"),
        ("checkpoint/pages-1.img", &[7; 8192]),
        ("checkpoint/pstree.img", &pstree()),
        ("config.dump", config.as_bytes()),
        ("container.log", b"2026-01-02T03:04:05.0Z stdout F 1\n"),
        ("dump.log", b"(00.00) ok\n"),
        ("rootfs-diff.tar", b""),
        ("spec.dump", spec(annotations).as_bytes()),
        ("stats-dump", b""),
        ("status", br#"{"Version":"v1"}"#),
        ("status.dump", status.as_bytes()),
    ])
}

pub fn cri_o() -> Members {
    let config = format!(
        r#"{{"id":"{ID}","name":"k8s_counter_pod-1_default_uid-1_0","rootfsImage":"counter:1","rootfsImageRef":"{IMAGE_ID}","rootfsImageName":"localhost/counter:1","runtime":"runc","createdTime":"2026-01-02T03:04:05Z","checkpointedTime":"2026-01-02T03:05:05Z","restoredTime":"0001-01-01T00:00:00Z","restored":false}}"#
    );
    members(&[
        ("stats-dump", b""),
        ("dump.log", b"(00.00) ok\n"),
        ("checkpoint/", b""),
        ("checkpoint/inventory.img", b"inventory"),
        ("checkpoint/pages-1.img", &[7; 4096]),
        ("config.dump", config.as_bytes()),
        ("spec.dump", spec(r#"{"io.kubernetes.cri-o.Annotations":"{}"}"#).as_bytes()),
        ("bind.mounts", br#"[{"source":"/srv/data","destination":"/data","file_type":"directory","permissions":493}]"#),
        ("deleted.files", br#"["/etc/motd","/usr/share/doc/x"]"#),
        ("rootfs-diff.tar", b""),
        ("io.kubernetes.cri-o.LogPath", b"old log\n"),
    ])
}

pub fn podman() -> Members {
    let config = format!(
        r#"{{"id":"{ID}","name":"eager_bell","pod":"","rootfsImageID":"{IMAGE_ID}","rootfsImageName":"localhost/counter:1","RawImageName":"counter","runtime":"crun","createdTime":"2026-01-02T03:04:05Z","namedVolumes":[{{"volumeName":"v"}}]}}"#
    );
    members(&[
        ("./", b""),
        ("./checkpoint/", b""),
        ("./checkpoint/inventory.img", b"inventory"),
        ("./checkpoint/tmpfs-dev-72.tar.gz.img", b"x"),
        ("./config.dump", config.as_bytes()),
        ("./spec.dump", spec("{}").as_bytes()),
        ("./network.status", br#"{"podman":{}}"#),
        ("./devshm-checkpoint.tar", b""),
        ("./volumes/", b""),
        ("./volumes/v.tar", b"volume"),
        ("./deleted.files", b"[]"),
        ("./ctr.log", b"log\n"),
    ])
}

pub fn tar(members: &Members) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_entry_type(if name.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular });
        // Not append_data, which would mend the names.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// An open file that holds `bytes` and has no name.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}
