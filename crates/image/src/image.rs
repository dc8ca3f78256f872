//! An image as the rest of the program sees it, and what is kept of it on disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use stasis_content::Digest;

use crate::error::{Error, Result};

/// Most bytes of an image configuration. Real ones have a few KiB; the kubelet holds them in memory several times.
pub(crate) const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Most layers of an image: overlayfs takes 500 lower directories.
pub(crate) const LAYERS_MAX: usize = 500;
/// Labels of an image that would be taken for our own, or the peers', control input (CVE-2026-53488): dropped.
const RESERVED_LABEL_PREFIXES: [&str; 3] = ["io.stasis.", "io.cri-containerd.", "containerd.io/"];
/// Manifest annotations of which each alone marks a checkpoint image: containerd's and checkpointctl's, CRI-O's, Podman's.
pub const CHECKPOINT_ANNOTATIONS: [&str; 3] = [
    "org.criu.checkpoint.container.name",
    "io.kubernetes.cri-o.annotations.checkpoint.name",
    "io.podman.annotations.checkpoint.runtime.name",
];

/// Annotation of a checkpoint image that stands on its base image's layers: how many these are.
pub(crate) const BASE_LAYERS: &str = "stasis.checkpoint.base-layers";

/// An image on this node, whole: all blobs are there and all layers are unpacked.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:…` of the configuration: the image ID of CRI.
    pub id: String,
    /// `registry/repository:tag`, normalised.
    pub references: Vec<String>,
    /// `registry/repository@sha256:…`: where it was pulled from or pushed to.
    pub repo_digests: Vec<String>,
    /// Manifest or index that the references name.
    pub target: Digest,
    /// Manifest of this platform's image; the target itself if that is no index.
    pub manifest: Digest,
    /// Bytes of all its blobs, as CRI reports them.
    pub size: u64,
    /// The configuration, without labels under reserved prefixes. [`crate::Images::config_json`] has it as it came.
    pub config: ImageConfiguration,
    /// Chain IDs of its layers, lowest first.
    pub chain_ids: Vec<String>,
    /// Annotations of the index and the manifest; the manifest's win.
    pub annotations: BTreeMap<String, String>,
    /// Whether the kubelet's garbage collection must leave it alone.
    pub pinned: bool,
    pub(crate) record: Arc<Record>,
}

impl Image {
    /// Whether the image's manifest says that it is a checkpoint.
    pub fn is_checkpoint(&self) -> bool {
        CHECKPOINT_ANNOTATIONS.iter().any(|key| self.annotations.contains_key(*key))
    }

    /// The layer of a checkpoint, by its place: the only one, or the one on the base image's layers.
    pub(crate) fn checkpoint_layer(&self) -> Option<usize> {
        let last = self.chain_ids.len().checked_sub(1)?;
        let below = self.annotations.get(BASE_LAYERS).map_or(Some(0), |count| count.parse().ok());
        (self.is_checkpoint() && below == Some(last)).then_some(last)
    }
}

/// What is stored of an image, as JSON behind a version byte. The key is its ID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) references: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
    pub(crate) target: Blob,
    pub(crate) manifest: Blob,
    pub(crate) config: Blob,
    pub(crate) layers: Vec<Layer>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// A blob by its descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Blob {
    pub(crate) digest: String,
    pub(crate) size: u64,
    pub(crate) media_type: String,
}

/// A layer, as a blob and unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    pub(crate) blob: Blob,
    pub(crate) chain_id: String,
    /// What the unpacked layer takes on disk.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl Record {
    /// Digests of all blobs, some more than once.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Blob> {
        [&self.target, &self.manifest, &self.config].into_iter().chain(self.layers.iter().map(|layer| &layer.blob))
    }

    /// The image of a record and its stored configuration.
    pub(crate) fn image(self, config_json: &[u8], pinned: &[String]) -> Result<Image> {
        let config = parse_config(config_json, &self.config.digest)?;
        let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
        sizes.extend(self.blobs().map(|blob| (blob.digest.as_str(), blob.size)));
        let size = sizes.values().fold(0, |sum: u64, size| sum.saturating_add(*size));
        Ok(Image {
            id: self.config.digest.clone(),
            references: self.references.clone(),
            repo_digests: self.repo_digests.clone(),
            target: digest(&self.target.digest)?,
            manifest: digest(&self.manifest.digest)?,
            size,
            config,
            chain_ids: self.layers.iter().map(|layer| layer.chain_id.clone()).collect(),
            annotations: self.annotations.clone(),
            pinned: self.references.iter().any(|reference| pinned.contains(reference)),
            record: Arc::new(self),
        })
    }
}

/// Reads a configuration and drops reserved labels.
pub(crate) fn parse_config(json: &[u8], id: &str) -> Result<ImageConfiguration> {
    let unusable = |reason: String| Error::Unusable { name: id.to_owned(), reason };
    let mut image: ImageConfiguration =
        serde_json::from_slice(json).map_err(|e| unusable(format!("its configuration cannot be read: {e}")))?;
    let os = image.os().to_string();
    if !os.is_empty() && os != "linux" {
        return Err(unusable(format!("it is made for {os}, not for Linux")));
    }
    if let Some(mut config) = image.config().clone()
        && let Some(labels) = config.labels_mut()
    {
        labels.retain(|key, _| !RESERVED_LABEL_PREFIXES.iter().any(|prefix| key.starts_with(prefix)));
        image.set_config(Some(config));
    }
    Ok(image)
}

/// A digest that was checked to be one.
pub(crate) fn digest(text: &str) -> Result<Digest> {
    text.parse().map_err(crate::error::content_error(format!("use {text} as a digest")))
}

/// Chain IDs of layers with these diff IDs, lowest first (OCI image specification, "Layer ChainID").
pub(crate) fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => diff_id.clone(),
            Some(parent) => stasis_registry::sha256(format!("{parent} {diff_id}").as_bytes()),
        });
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let a = stasis_registry::sha256(b"a");
        let b = stasis_registry::sha256(b"b");
        let chain = chain_ids(&[a.clone(), b.clone()]);
        assert_eq!(chain, [a.clone(), stasis_registry::sha256(format!("{a} {b}").as_bytes())]);
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn labels_that_could_steer_us_are_dropped() {
        let json = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
            "config":{"Labels":{"io.stasis.log":"binary:///bin/sh","io.cri-containerd.x":"1","containerd.io/y":"2","io.stasis":"kept","maintainer":"me"}}}"#;
        let config = parse_config(json, "sha256:x").expect("configuration");
        let labels = config.config().as_ref().and_then(|c| c.labels().as_ref()).expect("labels");
        let mut keys: Vec<&str> = labels.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["io.stasis", "maintainer"]);
    }

    #[test]
    fn images_of_other_systems_are_refused() {
        let json = br#"{"architecture":"amd64","os":"windows","rootfs":{"type":"layers","diff_ids":[]}}"#;
        assert!(parse_config(json, "sha256:x").expect_err("windows").to_string().contains("windows"));
        assert!(parse_config(b"{}", "sha256:x").is_err());
    }
}
