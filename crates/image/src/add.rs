//! Makes an image out of layer files on this node, such as the members of a checkpoint.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use stasis_registry::{Document, OCI_CONFIG, OCI_MANIFEST, Reference, sha256};
use stasis_snapshot::decompress;

use crate::assemble::{Names, Parts, Source};
use crate::error::{Error, Result, content_error, io_error};
use crate::image::{BASE_LAYERS, Blob, Image, digest};
use crate::lease::Lease;
use crate::progress::{Progress, Report};
use crate::unpack::{Compression, compression_of, hex};
use crate::{Images, Inner, blocking};

/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

/// A layer to make an image of.
#[derive(Debug, Clone)]
pub struct NewLayer {
    /// A tar, plain or compressed. It is copied, but for a file at [`Images::new_layer_path`], which is moved.
    pub file: PathBuf,
    /// Its media type.
    pub media_type: String,
    /// What is known of the file. A durable one at [`Images::new_layer_path`] is not read again.
    pub known: Option<KnownLayer>,
}

/// What whoever wrote a layer found out on the way.
#[derive(Debug, Clone)]
pub struct KnownLayer {
    /// `sha256:…` of the file.
    pub digest: String,
    /// The same of its content uncompressed.
    pub diff_id: String,
    /// Its size in bytes.
    pub size: u64,
}

/// Refuses a reference that a new image cannot have.
pub fn check_new_reference(reference: &str) -> Result<()> {
    parse_new(reference).map(drop)
}

fn parse_new(reference: &str) -> Result<Reference> {
    let reference: Reference = reference.parse()?;
    if reference.tag().is_none() {
        return Err(Error::Invalid {
            reason: format!("{reference}: a new image needs a tag, its digest comes by itself"),
        });
    }
    Ok(reference)
}

impl Images {
    /// Where a layer may be written that is then given to [`Images::add`] with its digests.
    pub fn new_layer_path(&self) -> PathBuf {
        self.inner.content.unfinished_path()
    }

    /// Makes an image of layer files, lowest first, and names it. With `base`, they stand on the layers of that image, and the
    /// manifest's annotation says on how many. The layers' diff IDs are put into `config_json`; everything else of it is kept.
    /// `annotations` are those of the manifest.
    pub async fn add(
        &self,
        reference: &str,
        config_json: Vec<u8>,
        base: Option<Arc<Image>>,
        layers: Vec<NewLayer>,
        mut annotations: BTreeMap<String, String>,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Arc<Image>> {
        let reference = parse_new(reference)?;
        let report = Report::new(progress);
        let lease = Lease::new(&self.inner, true).await;
        if let Some(base) = &base {
            annotations.insert(BASE_LAYERS.to_owned(), base.chain_ids.len().to_string());
            let layers = base.record.layers.iter();
            lease.protect(layers.flat_map(|layer| [layer.blob.digest.clone(), layer.chain_id.clone()])).await;
        }
        let document = NewDocument { config_json, annotations };
        let added = self.inner.add(&reference, document, base.as_deref(), layers, &lease, &report).await;
        self.inner.finish(lease, added).await
    }
}

impl Inner {
    async fn add(
        self: &Arc<Self>,
        reference: &Reference,
        document: NewDocument,
        base: Option<&Image>,
        layers: Vec<NewLayer>,
        lease: &Lease,
        report: &Report,
    ) -> Result<Arc<Image>> {
        let mut blobs = Vec::new();
        let mut diff_ids: Vec<String> = Vec::new();
        if let Some(base) = base {
            // A self-contained checkpoint image may itself be the base: what counts are the layers below the checkpoint.
            let count = base.chain_ids.len();
            blobs.extend(base.record.layers.iter().take(count).map(|layer| layer.blob.clone()));
            diff_ids.extend(base.config.rootfs().diff_ids().iter().take(count).cloned());
        }
        for layer in layers {
            let (inner, report, lease) = (self.clone(), report.clone(), lease.clone());
            let (blob, diff_id) = blocking(move || {
                let _lease = lease;
                inner.ingest_layer(&layer, &report)
            })
            .await?;
            blobs.push(blob);
            diff_ids.push(diff_id);
        }
        let config_json = with_diff_ids(&document.config_json, &diff_ids)?;
        let target = make_manifest(&config_json, &blobs, document.annotations)?;
        let names = Names { references: vec![reference.to_string()], ..Names::default() };
        let parts = Parts { target, manifest: None, config_json };
        self.assemble(parts, names, lease, report, &Source::Store).await
    }

    /// Takes a layer file into the store, and finds its diff ID unless that is known. Blocks.
    fn ingest_layer(&self, layer: &NewLayer, report: &Report) -> Result<(Blob, String)> {
        let path = layer.file.display();
        if let Some(known) = &layer.known {
            let digest = digest(&known.digest)?;
            let stored = match self.content.is_unfinished(&layer.file) {
                true => self.content.place(&layer.file, &digest),
                false => self.content.add_file(&layer.file, Some(&digest)).map(drop),
            };
            stored.map_err(content_error(format!("store layer {path}")))?;
            let media_type = layer.media_type.clone();
            return Ok((Blob { digest: known.digest.clone(), size: known.size, media_type }, known.diff_id.clone()));
        }
        let look = || File::open(&layer.file).and_then(|file| compression_of(&file));
        let compression = look().map_err(io_error(format!("read layer {path}")))?;
        report.whole("reading");
        let added = self.content.add_file(&layer.file, None).map_err(content_error(format!("store layer {path}")))?;
        let (digest, size) = (added.0.to_string(), added.1);
        let diff_id = match compression {
            Compression::None => digest.clone(),
            _ => self.diff_id(&digest)?,
        };
        Ok((Blob { digest, size, media_type: layer.media_type.clone() }, diff_id))
    }

    /// Copies a stream into the store. With `expected`, the digest is compared. Blocks.
    pub(crate) fn ingest(
        &self,
        from: &mut dyn Read,
        expected: Option<&str>,
        what: &str,
        progress: impl Fn(u64),
    ) -> Result<(String, u64)> {
        let doing = || format!("store {what}");
        let expected = expected.map(digest).transpose()?;
        let mut writer = self.content.writer().map_err(content_error(doing()))?;
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            let count = match from.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                count => count.map_err(io_error(format!("read {what}")))?,
            };
            writer.write_all(&buffer[..count]).map_err(io_error(doing()))?;
            progress(writer.written());
        }
        let (digest, size) = writer.commit(expected.as_ref(), None).map_err(content_error(doing()))?;
        Ok((digest.to_string(), size))
    }

    /// The digest of a compressed blob's content. Blocks.
    pub(crate) fn diff_id(&self, name: &str) -> Result<String> {
        let file = self.content.open_blob(&digest(name)?).map_err(content_error(format!("open layer {name}")))?;
        let failed = |reason: String| Error::Layer { digest: name.to_owned(), reason, full: false };
        let mut plain = decompress(file).map_err(|e| failed(e.to_string()))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            match plain.read(&mut buffer).map_err(|e| failed(e.to_string()))? {
                0 => return Ok(hex(hash)),
                count => hash.update(&buffer[..count]),
            }
        }
    }
}

/// What an image says of itself, before its layers are known.
struct NewDocument {
    config_json: Vec<u8>,
    annotations: BTreeMap<String, String>,
}

/// A configuration with these diff IDs.
fn with_diff_ids(config_json: &[u8], diff_ids: &[String]) -> Result<Vec<u8>> {
    let invalid = |reason: String| Error::Invalid { reason: format!("the image configuration {reason}") };
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(config_json).map_err(|e| invalid(format!("is not a JSON object: {e}")))?;
    config.insert("rootfs".to_owned(), serde_json::json!({ "type": "layers", "diff_ids": diff_ids }));
    serde_json::to_vec(&config).map_err(|e| invalid(format!("cannot be written: {e}")))
}

/// An OCI manifest for a configuration and layers.
pub(crate) fn make_manifest(
    config_json: &[u8],
    layers: &[Blob],
    annotations: BTreeMap<String, String>,
) -> Result<Document> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| serde_json::json!({ "mediaType": layer.media_type, "digest": layer.digest, "size": layer.size }))
        .collect();
    let mut manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": { "mediaType": OCI_CONFIG, "digest": sha256(config_json), "size": config_json.len() },
        "layers": layers,
    });
    if !annotations.is_empty() {
        manifest["annotations"] = serde_json::json!(annotations);
    }
    // serde_json sorts keys: the same content has the same digest.
    Ok(Document::parse(manifest.to_string().into_bytes(), Some(OCI_MANIFEST))?)
}
