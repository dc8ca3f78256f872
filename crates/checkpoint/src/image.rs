//! The checkpoint as an OCI image: one layer whose root holds the members, and annotations that mark it.
//!
//! The archive's own bytes are the layer, so making an image copies nothing. The mark is the manifest's annotation; each
//! reader looks for its own, so all three are written. The image's configuration carries what the kubelet reads of the
//! base image: without `User` it takes a container for root's and refuses it under `runAsNonRoot`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Doing, Error, Result};
use crate::inspect::{Inspection, inspect};
use crate::json;
use crate::member::Dialect;
use crate::metadata::read_metadata;
use crate::reader::{Compression, Source};

/// Keys of the base image's `config` that are carried over. Its labels are not: they could steer the next reader.
const CARRIED: [&str; 6] = ["User", "Env", "Entrypoint", "Cmd", "WorkingDir", "StopSignal"];

/// The annotations that mark a checkpoint image.
const MARKS: [(Dialect, &str); 3] = [
    (Dialect::Containerd, "org.criu.checkpoint.container.name"),
    (Dialect::CriO, "io.kubernetes.cri-o.annotations.checkpoint.name"),
    (Dialect::Podman, "io.podman.annotations.checkpoint.runtime.name"),
];
/// Where podman puts the container's name.
const PODMAN_NAME: &str = "io.podman.annotations.checkpoint.name";
/// Largest configuration of a base image.
const CONFIG_MAX: usize = 4 << 20;

/// A checkpoint image is recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointMark {
    /// Name of the container that was checkpointed; empty if the mark does not say.
    pub container_name: String,
    /// In whose words the image is marked.
    pub dialect: Dialect,
}

/// Recognises a checkpoint image by the annotations of its manifest or index. If several mark it, containerd's wins.
pub fn marker(annotations: &BTreeMap<String, String>) -> Option<CheckpointMark> {
    let (dialect, value) = MARKS.iter().find_map(|(dialect, key)| Some((*dialect, annotations.get(*key)?)))?;
    let name = if dialect == Dialect::Podman { annotations.get(PODMAN_NAME) } else { Some(value) };
    Some(CheckpointMark { container_name: name.cloned().unwrap_or_default(), dialect })
}

/// What made the checkpoint, for the informative annotations; what is unknown is left out.
#[derive(Clone, Debug, Default)]
pub struct EngineFacts {
    /// Version of CRIU.
    pub criu_version: Option<stasis_criu::Version>,
    /// Name and version of the OCI runtime.
    pub runtime: Option<(String, String)>,
    /// Version of the kernel.
    pub kernel: Option<String>,
    /// `v1` or `v2`.
    pub cgroup_version: Option<String>,
}

/// The parts of a checkpoint image; a manifest puts them together.
#[derive(Clone, Debug)]
pub struct ImageParts {
    /// The image's configuration.
    pub config_json: Vec<u8>,
    /// Digest of the configuration, `sha256:…`.
    pub config_digest: String,
    /// The layer's blob: the archive itself.
    pub layer: PathBuf,
    /// Media type of the layer.
    pub layer_media_type: &'static str,
    /// Digest of the layer's blob.
    pub layer_digest: String,
    /// Digest of the layer uncompressed; the same for an uncompressed archive.
    pub diff_id: String,
    /// Size of the layer's blob.
    pub layer_size: u64,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
}

/// The digests of an archive, found while it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// `sha256:…` of the file.
    pub digest: String,
    /// The same of the archive before its compression.
    pub diff_id: String,
}

/// Makes an image of an archive. `base_config` is the JSON configuration of the image that the container ran from, and
/// `base_digest` the digest of that image's manifest. What is in `known` is not found out again.
///
/// # Errors
/// If the archive is none, or the configuration is no JSON.
pub fn image_from_archive(
    archive: &Path,
    base_config: Option<&[u8]>,
    base_digest: Option<&str>,
    facts: &EngineFacts,
    known: Option<Digests>,
) -> Result<ImageParts> {
    let open = || File::open(archive).doing_to("open", archive);
    let config_dump = read_metadata(open()?)?.config;
    let inspection = inspect(open()?)?;
    let compression = Compression::of(&mut open()?)?;
    let layer_media_type = match compression {
        Compression::None => "application/vnd.oci.image.layer.v1.tar",
        Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        Compression::Lz4 => {
            return Err(Error::refused(
                "it is compressed by lz4, which images cannot be; decompress it first (lz4 -d)",
            ));
        }
    };
    let layer_size = open()?.metadata().doing_to("look at", archive)?.len();
    let Digests { digest: layer_digest, diff_id } = match known {
        Some(known) => known,
        None => {
            let layer = digest(open()?).doing_to("read", archive)?;
            let diff_id = match compression {
                Compression::None => layer.clone(),
                _ => digest(Source::new(open()?)?).doing_to("decompress", archive)?,
            };
            Digests { digest: layer, diff_id }
        }
    };
    let base = base_config.map(base_config_of).transpose()?.unwrap_or_default();
    let created = &config_dump.checkpointed_time;
    let config = json::pretty("image config", &config_json(&base, &diff_id, created))?;
    let mut annotations = annotations(&inspection, facts);
    if let Some(base) = base_digest {
        set(&mut annotations, &["org.criu.checkpoint.rootfsImageSha"], base);
    }
    let id = &config_dump.rootfs_image_id;
    set(&mut annotations, &["org.criu.checkpoint.rootfsImageID"], id);
    set(&mut annotations, &["io.kubernetes.cri-o.annotations.checkpoint.rootfsImageID"], id);
    set(&mut annotations, &["io.podman.annotations.checkpoint.rootfsImageID"], id);
    Ok(ImageParts {
        config_digest: sha256_name(&Sha256::digest(&config)),
        config_json: config,
        layer: archive.to_owned(),
        layer_media_type,
        layer_digest,
        diff_id,
        layer_size,
        annotations,
    })
}

fn base_config_of(bytes: &[u8]) -> Result<Value> {
    if bytes.len() > CONFIG_MAX {
        return Err(Error::malformed("base image config", format!("it has {} bytes", bytes.len())));
    }
    json::parse("base image config", bytes)
}

fn config_json(base: &Value, diff_id: &str, created: &str) -> Value {
    let mut config = Map::new();
    for key in CARRIED {
        if let Some(value) = base.get("config").and_then(|config| config.get(key)) {
            config.insert(key.to_owned(), value.clone());
        }
    }
    let text = |key: &str, default: &str| base.get(key).and_then(Value::as_str).unwrap_or(default).to_owned();
    json!({
        "created": created,
        "architecture": text("architecture", architecture()),
        "os": text("os", "linux"),
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": created, "created_by": "stasis checkpoint" }],
    })
}

fn annotations(of: &Inspection, facts: &EngineFacts) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let criu = facts.criu_version.map(|version| version.to_string()).unwrap_or_default();
    let criu_number = facts.criu_version.map(|version| version.number().to_string()).unwrap_or_default();
    let (runtime, runtime_version) = facts.runtime.clone().unwrap_or_else(|| (of.runtime.clone(), String::new()));
    let kernel = facts.kernel.clone().unwrap_or_default();
    let cgroup = facts.cgroup_version.clone().unwrap_or_default();
    const CRI_O: &str = "io.kubernetes.cri-o.annotations.checkpoint";
    const PODMAN: &str = "io.podman.annotations.checkpoint";
    const CRIU: &str = "org.criu.checkpoint";
    let rows: [(&[&str], &[&str], &str); 13] = [
        (&[CRIU], &["container.name"], &of.container),
        (&[CRI_O, PODMAN], &["name"], &of.container),
        (&[CRIU], &["pod.name"], &of.pod),
        (&[CRIU], &["pod.namespace"], &of.namespace),
        (&[CRIU], &["engine.name"], "stasis"),
        (&[CRIU], &["engine.version"], env!("CARGO_PKG_VERSION")),
        (&[CRIU], &["rootfsImageUserRequested"], &of.image),
        (&[CRIU, CRI_O, PODMAN], &["rootfsImageName", "rawImageName"], &of.image),
        (&[CRIU, PODMAN], &["runtime.name"], &runtime),
        (&[CRIU, PODMAN], &["runtime.version"], &runtime_version),
        (&[CRIU, PODMAN], &["host.arch"], architecture()),
        (&[CRIU, PODMAN], &["host.kernel"], &kernel),
        (&[CRIU, CRI_O], &["criu.version"], &criu),
    ];
    for (families, keys, value) in rows {
        for (family, key) in families.iter().flat_map(|family| keys.iter().map(move |key| (family, key))) {
            set(&mut all, &[family, key], value);
        }
    }
    set(&mut all, &[CRIU, "cgroup.version"], &cgroup);
    set(&mut all, &[PODMAN, "cgroups.version"], &cgroup);
    set(&mut all, &[PODMAN, "criu.version"], &criu_number);
    if let Some((_, sha)) = of.image_ref.split_once('@') {
        set(&mut all, &[CRIU, "rootfsImageSha"], sha);
    }
    // Marks must not be empty: readers look whether they are there.
    for (_, mark) in MARKS {
        all.entry(mark.to_owned()).or_insert_with(|| "unknown".to_owned());
    }
    all
}

fn set(annotations: &mut BTreeMap<String, String>, key: &[&str], value: &str) {
    if !value.is_empty() {
        annotations.insert(key.join("."), value.to_owned());
    }
}

/// Go's name of this machine's architecture, which OCI uses.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Digest of all that `stream` gives.
fn digest(mut stream: impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(sha256_name(&hash.finalize())),
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The name by which OCI knows a SHA-256 hash.
pub(crate) fn sha256_name(hash: &[u8]) -> String {
    format!("sha256:{}", Hex(hash))
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
