//! What an archive holds, for people and programs.

use std::fs::File;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use stasis_criu::{Stats, image::processes};

use crate::error::Result;
use crate::member::{Dialect, Member};
use crate::metadata::{ArchiveMetadata, IDENTITY, Survey};

/// CRIU's pages are the kernel's.
const PAGE: u64 = 4096;

/// What an archive holds. All of it is the archive's claim.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Whose archive it is.
    pub dialect: Dialect,
    /// Container ID.
    pub container_id: String,
    /// Container name.
    pub container: String,
    /// Pod name, if known.
    pub pod: String,
    /// Kubernetes namespace, if known.
    pub namespace: String,
    /// Runtime.
    pub runtime: String,
    /// Image as the user named it.
    pub image: String,
    /// Image by digest or ID.
    pub image_ref: String,
    /// RFC 3339.
    pub created: String,
    /// RFC 3339.
    pub checkpointed: String,
    /// Whether it had come out of a checkpoint before.
    pub restored: bool,
    /// Number of processes; none if the process tree could not be read.
    pub processes: Option<usize>,
    /// Number of threads.
    pub threads: Option<u64>,
    /// Bytes of memory pages.
    pub memory_bytes: u64,
    /// Bytes of the writable layer as stored.
    pub rootfs_diff_bytes: u64,
    /// Bytes of all members.
    pub total_bytes: u64,
    /// Version of CRIU, if the archive names it.
    pub criu_version: Option<String>,
    /// CRIU's statistics.
    pub stats: Option<Stats>,
    /// Mounts of the spec.
    pub mounts: Vec<MountFacts>,
    /// All members.
    pub members: Vec<MemberSize>,
}

/// A mount of the spec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MountFacts {
    /// Where in the container.
    pub destination: String,
    /// Type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where from.
    pub source: String,
}

/// A member and its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemberSize {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Inspects an archive.
///
/// # Errors
/// As [`crate::read_metadata`].
pub fn inspect(archive: File) -> Result<Inspection> {
    Survey::of_archive(archive, &wanted()).and_then(|survey| describe(&survey))
}

/// Inspects a directory that holds the members: an unpacked checkpoint image or archive.
///
/// # Errors
/// As [`inspect`].
pub fn inspect_dir(dir: &Path) -> Result<Inspection> {
    Survey::of_dir(dir, &wanted()).and_then(|survey| describe(&survey))
}

fn wanted() -> Vec<Member> {
    let mut wanted = IDENTITY.to_vec();
    wanted.extend([Member::Image("pstree.img".to_owned()), Member::StatsDump]);
    wanted
}

fn describe(survey: &Survey) -> Result<Inspection> {
    let metadata = survey.metadata()?;
    let tree = survey.content(&Member::Image("pstree.img".to_owned())).and_then(|image| processes(image).ok());
    let stats = survey.content(&Member::StatsDump).and_then(|file| Stats::decode(file).ok());
    let pages: u64 = survey.sizes.iter().filter(|(member, _)| member.is_pages()).map(|(_, size)| *size).sum();
    let written =
        stats.as_ref().and_then(|stats| stats.dump.as_ref()).map_or(0, |dump| dump.pages_written.saturating_mul(PAGE));
    let (container, pod, namespace) = names(&metadata);
    let config = metadata.config;
    let first = |candidates: [&String; 3]| candidates.into_iter().find(|name| !name.is_empty()).cloned();
    Ok(Inspection {
        dialect: metadata.dialect,
        container,
        pod,
        namespace,
        image: first([&config.rootfs_image, &config.raw_image_name, &config.rootfs_image_name]).unwrap_or_default(),
        image_ref: first([&config.rootfs_image_ref, &config.rootfs_image_id, &config.rootfs_image]).unwrap_or_default(),
        container_id: config.id,
        runtime: config.runtime,
        created: config.created_time,
        checkpointed: config.checkpointed_time,
        restored: config.restored,
        processes: tree.as_ref().map(Vec::len),
        threads: tree.as_ref().map(|tree| tree.iter().map(|process| u64::from(process.threads)).sum()),
        memory_bytes: pages.max(written),
        rootfs_diff_bytes: survey.size(&Member::RootfsDiff).unwrap_or(0),
        total_bytes: survey.sizes.iter().map(|(_, size)| size).sum(),
        criu_version: annotation(&metadata.spec, "org.criu.checkpoint.criu.version"),
        stats,
        mounts: mounts(&metadata.spec),
        members: survey.sizes.iter().map(|(member, bytes)| member_size(member, *bytes)).collect(),
    })
}

fn member_size(member: &Member, bytes: u64) -> MemberSize {
    MemberSize { name: member.name().into_owned(), bytes }
}

/// Container, pod and namespace: from the status or annotations, else from the compound name.
fn names(metadata: &ArchiveMetadata) -> (String, String, String) {
    let name = metadata.config.name.strip_prefix("k8s_").unwrap_or(&metadata.config.name);
    let parts: Vec<&str> = name.split('_').collect();
    let part = |at: usize| if parts.len() == 5 { parts[at].to_owned() } else { String::new() };
    let container = metadata.status.as_ref().map(|status| status.metadata.name.clone()).filter(|name| !name.is_empty());
    let container = container.unwrap_or_else(|| if parts.len() == 5 { part(0) } else { name.to_owned() });
    let spec = &metadata.spec;
    let pod = annotation(spec, "io.kubernetes.cri.sandbox-name").unwrap_or_else(|| part(1));
    let namespace = annotation(spec, "io.kubernetes.cri.sandbox-namespace").unwrap_or_else(|| part(2));
    (container, pod, namespace)
}

fn annotation(spec: &Value, key: &str) -> Option<String> {
    spec.get("annotations")?.get(key)?.as_str().map(str::to_owned)
}

fn mounts(spec: &Value) -> Vec<MountFacts> {
    let text = |mount: &Value, key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mounts = spec.get("mounts").and_then(Value::as_array);
    let facts = |mount| MountFacts {
        destination: text(mount, "destination"),
        kind: text(mount, "type"),
        source: text(mount, "source"),
    };
    mounts.map(|mounts| mounts.iter().map(facts).collect()).unwrap_or_default()
}
