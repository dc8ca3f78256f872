//! Small images made in memory.

use std::io::Write as _;

use stasis_registry::{
    Access, Auth, Config, DOCKER_CONFIG, DOCKER_LAYER_GZIP, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_LAYER,
    OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_MANIFEST, Registry, sha256,
};

/// A layer as a blob.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) media_type: &'static str,
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: String,
}

/// An image as blobs.
#[derive(Clone)]
pub(crate) struct Built {
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) media_type: &'static str,
}

/// A tar of files: `(path, content)`; a path that ends in `/` is a directory, and `.wh.` names are whiteouts.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        let is_dir = path.ends_with('/');
        header.set_entry_type(if is_dir { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(if is_dir { 0o755 } else { 0o644 });
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn plain_layer(files: &[(&str, &[u8])]) -> Layer {
    let blob = tar(files);
    Layer { media_type: OCI_LAYER, diff_id: sha256(&blob), blob }
}

pub(crate) fn gzip_layer(files: &[(&str, &[u8])]) -> Layer {
    let plain = tar(files);
    Layer { media_type: OCI_LAYER_GZIP, diff_id: sha256(&plain), blob: gzip(&plain) }
}

pub(crate) fn zstd_layer(files: &[(&str, &[u8])]) -> Layer {
    let plain = tar(files);
    Layer { media_type: OCI_LAYER_ZSTD, diff_id: sha256(&plain), blob: zstd::encode_all(&plain[..], 1).unwrap() }
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An OCI image of layers, lowest first. `mark` makes its configuration, and so its ID, different from others'.
pub(crate) fn image(layers: &[Layer], mark: &str) -> Built {
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    let config = serde_json::json!({
        "architecture": architecture(), "os": "linux",
        "config": { "User": "redis", "Env": ["PATH=/bin"], "Labels": { "mark": mark, "io.stasis.x": "reserved" } },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    with_config(layers, config.to_string().into_bytes(), (OCI_MANIFEST, OCI_CONFIG))
}

/// The same image with Docker's media types. Its layers must be gzip.
pub(crate) fn docker_image(layers: &[Layer], mark: &str) -> Built {
    let layers: Vec<Layer> =
        layers.iter().map(|layer| Layer { media_type: DOCKER_LAYER_GZIP, ..layer.clone() }).collect();
    with_config(&layers, image(&layers, mark).config, (DOCKER_MANIFEST, DOCKER_CONFIG))
}

pub(crate) fn with_config(layers: &[Layer], config: Vec<u8>, types: (&'static str, &str)) -> Built {
    let descriptors: Vec<_> = layers
        .iter()
        .map(|layer| serde_json::json!({ "mediaType": layer.media_type, "digest": sha256(&layer.blob), "size": layer.blob.len() }))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": types.0,
        "config": { "mediaType": types.1, "digest": sha256(&config), "size": config.len() },
        "layers": descriptors,
    });
    Built { config, layers: layers.to_vec(), manifest: manifest.to_string().into_bytes(), media_type: types.0 }
}

impl Built {
    pub(crate) fn id(&self) -> String {
        sha256(&self.config)
    }

    pub(crate) fn digest(&self) -> String {
        sha256(&self.manifest)
    }

    /// Blobs by digest: configuration and layers.
    pub(crate) fn blobs(&self) -> Vec<(String, Vec<u8>)> {
        let layers = self.layers.iter().map(|layer| layer.blob.clone());
        layers.chain([self.config.clone()]).map(|blob| (sha256(&blob), blob)).collect()
    }

    /// Pushes the blobs, and the manifest under a tag.
    pub(crate) async fn push(&self, reference: &str, auth: Option<&Auth>) {
        let session = session(reference, auth);
        for (digest, blob) in self.blobs() {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&blob).unwrap();
            session.push_blob(&digest, blob.len() as u64, file.into(), |_| {}).await.expect("push a blob");
        }
        let tag = session.reference().tag().unwrap().to_owned();
        session.push_manifest(&tag, self.media_type, self.manifest.clone()).await.expect("push a manifest");
    }
}

/// Pushes an index of images that are there: `(architecture, image)`.
pub(crate) async fn push_index(reference: &str, entries: &[(&str, &Built)]) -> String {
    let manifests: Vec<_> = entries
        .iter()
        .map(|(architecture, image)| {
            serde_json::json!({
                "mediaType": image.media_type, "digest": image.digest(), "size": image.manifest.len(),
                "platform": { "os": "linux", "architecture": architecture },
            })
        })
        .collect();
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, "annotations": { "of": "the index" },
    });
    let bytes = index.to_string().into_bytes();
    let session = session(reference, None);
    let tag = session.reference().tag().unwrap().to_owned();
    session.push_manifest(&tag, OCI_INDEX, bytes.clone()).await.expect("push an index");
    sha256(&bytes)
}

fn session(reference: &str, auth: Option<&Auth>) -> stasis_registry::Session {
    let reference = reference.parse().expect("reference");
    Registry::new(Config::default()).session(&reference, auth, Access::Push).expect("session")
}
