//! From documents to an image: gets the layers, unpacks them as they come, and records the image. Pull, import and add all
//! end here; they differ in where a layer's blob comes from.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::stream::{StreamExt as _, TryStreamExt as _};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use stasis_registry::{DOCKER_CONFIG, Document, OCI_CONFIG, Parsed, Session};
use tokio::sync::oneshot;

use crate::error::{Error, Result, content_error};
use crate::image::{Blob, Image, LAYERS_MAX, Layer, Record, chain_ids, digest, parse_config};
use crate::lease::Lease;
use crate::progress::Report;
use crate::unpack::{self, Task};
use crate::{Inner, blocking};

/// Media types of layers that we can unpack, without their compression, which shows by itself.
const LAYER_TYPES: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];
/// What may follow them.
const COMPRESSIONS: [&str; 5] = ["", "+gzip", "+zstd", ".gzip", ".zstd"];

/// An image whose documents are known and verified.
#[derive(Debug)]
pub(crate) struct Parts {
    /// What the reference names.
    pub(crate) target: Document,
    /// The manifest of our platform, if the target is an index.
    pub(crate) manifest: Option<Document>,
    /// The configuration, verified against the manifest.
    pub(crate) config_json: Vec<u8>,
}

impl Parts {
    fn manifest_document(&self) -> &Document {
        self.manifest.as_ref().unwrap_or(&self.target)
    }

    /// The manifest of our platform.
    pub(crate) fn manifest(&self) -> Result<&ImageManifest> {
        manifest_of(self.manifest_document())
    }
}

/// A document that must be a manifest.
pub(crate) fn manifest_of(document: &Document) -> Result<&ImageManifest> {
    match &document.parsed {
        Parsed::Manifest(manifest) => Ok(manifest),
        Parsed::Index(_) => Err(Error::Unusable {
            name: document.digest.clone(),
            reason: "it is an index where an image manifest is expected".to_owned(),
        }),
    }
}

/// The configuration's descriptor, if the manifest is that of a container image and not of another artifact.
pub(crate) fn config_descriptor<'a>(manifest: &'a ImageManifest, name: &str) -> Result<&'a Descriptor> {
    let media_type = manifest.config().media_type().as_ref();
    if [OCI_CONFIG, DOCKER_CONFIG].contains(&media_type) {
        return Ok(manifest.config());
    }
    let reason = format!("it is an artifact of type {media_type}, not a container image");
    Err(Error::Unusable { name: name.to_owned(), reason })
}

/// Where the blobs of an image's layers are.
#[derive(Debug)]
pub(crate) enum Source {
    /// In a registry.
    Registry(Session),
    /// In the store already.
    Store,
}

/// References and repository digests that an image gets.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(crate) references: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
}

impl Inner {
    /// Makes the image of `parts` whole and records it. `source` says where the blobs of its layers are.
    pub(crate) async fn assemble(
        self: &Arc<Self>,
        parts: Parts,
        names: Names,
        lease: &Lease,
        report: &Report,
        source: &Source,
    ) -> Result<Arc<Image>> {
        let (mut record, diff_ids) = plan(&parts)?;
        record.references = names.references;
        record.repo_digests = names.repo_digests;
        let needed = record.blobs().map(|blob| blob.digest.clone());
        lease.protect(needed.chain(record.layers.iter().map(|layer| layer.chain_id.clone()))).await;

        let (inner, config_json) = (self.clone(), parts.config_json.clone());
        let config_digest = record.config.digest.clone();
        blocking(move || {
            for document in [Some(&parts.target), parts.manifest.as_ref()].into_iter().flatten() {
                inner.write_document(&document.digest, &document.bytes)?;
            }
            inner.write_document(&config_digest, &parts.config_json)
        })
        .await?;
        self.layers(&mut record, diff_ids, lease, report, source).await?;
        let before = self.store.list().iter().find(|image| image.id == record.config.digest).cloned();
        let image = self.store.put(record, config_json).await?;
        // The same image by another manifest: the old one is left to collect.
        if before.is_none_or(|before| before.record.target == image.record.target) {
            lease.succeeded();
        }
        Ok(image)
    }

    /// Fetches the layers, several at once, and unpacks each as soon as it and all below it are there.
    async fn layers(
        self: &Arc<Self>,
        record: &mut Record,
        diff_ids: Vec<String>,
        lease: &Lease,
        report: &Report,
        source: &Source,
    ) -> Result<()> {
        let blobs: Vec<Blob> = record.layers.iter().map(|layer| layer.blob.clone()).collect();
        let (arrivals, arrived): (Vec<_>, Vec<_>) = blobs.iter().map(|_| oneshot::channel::<()>()).unzip();
        let fetches: Vec<_> = blobs
            .iter()
            .zip(arrivals)
            .map(|(blob, arrival)| self.fetch(source, blob, arrival, lease, report))
            .collect();
        let fetching =
            futures_util::stream::iter(fetches).buffer_unordered(self.max_concurrent_downloads).try_collect::<()>();

        let cancelled = CancelOnDrop(Arc::new(AtomicBool::new(false)));
        let unpacking = async {
            let mut parents = Vec::new();
            for ((layer, arrival), diff_id) in record.layers.iter_mut().zip(arrived).zip(diff_ids) {
                if arrival.await.is_err() {
                    // The fetch failed and its error is on the way.
                    std::future::pending::<()>().await;
                }
                let task = Task {
                    blob: layer.blob.clone(),
                    diff_id,
                    chain_id: layer.chain_id.clone(),
                    parents: parents.clone(),
                };
                self.unpack(task, layer, lease, report, &cancelled.0).await?;
                parents.push(layer.chain_id.clone());
            }
            Ok(())
        };
        futures_util::future::try_join(fetching, unpacking).await?;
        Ok(())
    }

    /// Brings a layer's blob into the store and tells the unpacker.
    async fn fetch(
        self: &Arc<Self>,
        source: &Source,
        blob: &Blob,
        arrival: oneshot::Sender<()>,
        lease: &Lease,
        report: &Report,
    ) -> Result<()> {
        if let Source::Registry(session) = source {
            self.download(session, blob, lease, report).await?;
        }
        // A blob that was there already, or came in an archive, was never compared with this manifest.
        let doing = || format!("look at layer {}", blob.digest);
        let size = self.content.size(&digest(&blob.digest)?).map_err(content_error(doing()))?;
        if size != blob.size {
            return Err(Error::Unusable {
                name: blob.digest.clone(),
                reason: format!("the manifest says {} bytes of this layer, which has {size}", blob.size),
            });
        }
        // The unpacker may have failed; then its error counts.
        let _ = arrival.send(());
        Ok(())
    }

    /// Unpacks a layer unless it is there already.
    async fn unpack(
        self: &Arc<Self>,
        task: Task,
        layer: &mut Layer,
        lease: &Lease,
        report: &Report,
        cancelled: &Arc<AtomicBool>,
    ) -> Result<()> {
        let turn = self.locks.lock(&task.chain_id).await;
        let (inner, report, cancelled, lease) = (self.clone(), report.clone(), cancelled.clone(), lease.clone());
        let stats = blocking(move || {
            // Both stay until the thread is done, also if nobody waits for it any more.
            let (_turn, _lease) = (turn, lease);
            unpack::unpack(&inner, &task, &report, &cancelled)
        })
        .await?;
        (layer.bytes, layer.inodes) = (stats.bytes, stats.inodes);
        Ok(())
    }
}

/// Tells a blocking thread that nobody waits for it any more.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The record of an image to be, and its layers' diff IDs. Everything that can be refused before a layer is had is refused
/// here.
fn plan(parts: &Parts) -> Result<(Record, Vec<String>)> {
    let document = parts.manifest_document();
    let name = &document.digest;
    let unusable = |reason: String| Error::Unusable { name: name.clone(), reason };
    let manifest = parts.manifest()?;
    let config = blob_of(config_descriptor(manifest, name)?);
    if config.size != parts.config_json.len() as u64 {
        let (stated, real) = (config.size, parts.config_json.len());
        return Err(unusable(format!("its manifest says {stated} bytes of its configuration, which has {real}")));
    }
    if manifest.layers().len() > LAYERS_MAX {
        return Err(unusable(format!(
            "it has {} layers, more than the {LAYERS_MAX} that overlayfs takes",
            manifest.layers().len()
        )));
    }
    for layer in manifest.layers() {
        let media_type = layer.media_type().as_ref();
        let known =
            LAYER_TYPES.iter().any(|t| media_type.strip_prefix(t).is_some_and(|rest| COMPRESSIONS.contains(&rest)));
        if !known {
            return Err(unusable(format!(
                "its layer {} is of type {media_type}, which cannot be unpacked",
                layer.digest()
            )));
        }
    }
    let diff_ids = parse_config(&parts.config_json, &config.digest)?.rootfs().diff_ids().clone();
    if diff_ids.len() != manifest.layers().len() {
        let (layers, ids) = (manifest.layers().len(), diff_ids.len());
        return Err(unusable(format!("its manifest has {layers} layers, its configuration {ids}")));
    }
    if let Some(bad) = diff_ids.iter().find(|id| !stasis_registry::is_sha256(id)) {
        return Err(unusable(format!("its configuration names a layer {bad:?}, which is no sha256 digest")));
    }
    let layers = manifest.layers().iter().zip(chain_ids(&diff_ids));
    let layers = layers.map(|(layer, chain_id)| Layer { blob: blob_of(layer), chain_id, bytes: 0, inodes: 0 });
    let record = Record {
        references: Vec::new(),
        repo_digests: Vec::new(),
        target: blob_of_document(&parts.target),
        manifest: blob_of_document(document),
        config,
        layers: layers.collect(),
        annotations: annotations(parts)?,
    };
    Ok((record, diff_ids))
}

fn annotations(parts: &Parts) -> Result<BTreeMap<String, String>> {
    let mut merged = BTreeMap::new();
    if let Parsed::Index(index) = &parts.target.parsed {
        let index: &ImageIndex = index;
        merged.extend(index.annotations().clone().unwrap_or_default());
    }
    merged.extend(parts.manifest()?.annotations().clone().unwrap_or_default());
    Ok(merged)
}

fn blob_of(descriptor: &Descriptor) -> Blob {
    Blob {
        digest: descriptor.digest().to_string(),
        size: descriptor.size(),
        media_type: descriptor.media_type().to_string(),
    }
}

fn blob_of_document(document: &Document) -> Blob {
    Blob { digest: document.digest.clone(), size: document.bytes.len() as u64, media_type: document.media_type.clone() }
}
