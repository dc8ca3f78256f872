//! Import: one pass over the archive stores its blobs, then its documents say which images they make.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageIndex};
use serde::Deserialize;
use stasis_registry::{
    Document, MANIFEST_BYTES_MAX, OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, Parsed, Platform, Reference, is_sha256,
    select_platform, sha256,
};

use super::members::{self, Member};
use crate::add::make_manifest;
use crate::assemble::{Names, Parts, Source, config_descriptor, manifest_of};
use crate::error::{Error, Kind, Result, is_full};
use crate::image::{Blob, CONFIG_BYTES_MAX, Image, digest};
use crate::lease::Lease;
use crate::progress::{Progress, Report};
use crate::unpack::{Compression, compression_of};
use crate::{Images, Inner, blocking};

/// Most documents (files that are no blobs and no layers) that are held in memory.
const DOCUMENTS_MAX: usize = 1_000;
/// Most bytes of all of them.
const DOCUMENT_BYTES_MAX: u64 = 64 << 20;
/// Most images of one archive.
const IMAGES_MAX: usize = 100;
/// Annotations that name an image in a layout: containerd's and Docker's holds a whole reference, OCI's often just a tag.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

impl Images {
    /// Imports the images of an archive: an OCI layout (a directory, or a tar of one) or a `docker save` file, old or new, plain
    /// or compressed. `reference` names the image if the archive holds just one; without it the archive's own names count,
    /// and an image without a name is refused.
    pub async fn import(
        &self,
        path: &Path,
        reference: Option<&str>,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Vec<Arc<Image>>> {
        let reference = reference.map(str::parse::<Reference>).transpose()?;
        if reference.as_ref().is_some_and(|reference| reference.tag().is_none()) {
            return Err(Error::Invalid {
                reason: "name an imported image by a tag; its digest comes by itself".to_owned(),
            });
        }
        let report = Report::new(progress);
        let lease = Lease::new(&self.inner, true).await;
        let imported = self.inner.import(path, reference, &lease, &report).await;
        self.inner.finish(lease, imported).await
    }
}

impl Inner {
    async fn import(
        self: &Arc<Self>,
        path: &Path,
        reference: Option<Reference>,
        lease: &Lease,
        report: &Report,
    ) -> Result<Vec<Arc<Image>>> {
        let (inner, path, reading, held) = (self.clone(), path.to_owned(), report.clone(), lease.clone());
        let found = blocking(move || {
            let _lease = held;
            let archive = Archive::read(inner, &path, &reading)?;
            let images = archive.images()?;
            name(&archive, images, reference)
        })
        .await?;
        let mut images = Vec::new();
        for (parts, references) in found {
            let names = Names { references, ..Names::default() };
            images.push(self.assemble(parts, names, lease, report, &Source::Store).await?);
        }
        Ok(images)
    }
}

/// An image of an archive, and the names that the archive has for it.
struct Found {
    parts: Parts,
    names: Vec<String>,
}

/// Decides the references of the images.
fn name(archive: &Archive, images: Vec<Found>, given: Option<Reference>) -> Result<Vec<(Parts, Vec<String>)>> {
    if given.is_some() && images.len() != 1 {
        return Err(archive.refuse(format!("it holds {} images, so they cannot all have the given name", images.len())));
    }
    let mut named = Vec::new();
    for image in images {
        let mut references: Vec<String> = match &given {
            Some(reference) => vec![reference.to_string()],
            None => image.names.iter().filter_map(|name| full_reference(name)).collect(),
        };
        // An archive that is both an OCI layout and Docker's names each image twice.
        references.sort();
        references.dedup();
        if references.is_empty() {
            let digest = &image.parts.target.digest;
            return Err(archive.refuse(format!("it has no name for its image {digest}: give a reference")));
        }
        named.push((image.parts, references));
    }
    Ok(named)
}

/// A name that says more than a tag. `latest` alone would become `docker.io/library/latest`.
fn full_reference(name: &str) -> Option<String> {
    let reference: Reference = name.parse().ok()?;
    (name.contains([':', '/']) && reference.tag().is_some()).then(|| reference.to_string())
}

/// What one pass over an archive found. Blobs are in the store.
struct Archive {
    inner: Arc<Inner>,
    path: PathBuf,
    documents: HashMap<String, Vec<u8>>,
    /// Layers of `docker save`, by member name.
    layers: HashMap<String, Blob>,
    links: HashMap<String, String>,
}

/// A member's fate.
enum Part {
    Blob(String),
    Layer,
    Document,
    Ignored,
}

fn part(name: &str) -> Part {
    if let Some(hex) = name.strip_prefix("blobs/sha256/") {
        let digest = format!("sha256:{hex}");
        return if is_sha256(&digest) { Part::Blob(digest) } else { Part::Ignored };
    }
    match name.rsplit_once('/') {
        Some((_, "layer.tar")) => Part::Layer,
        Some(_) => Part::Ignored,
        None if name.ends_with(".tar") || name.ends_with(".tar.gz") => Part::Layer,
        None if name.ends_with(".json") || name == "oci-layout" || is_sha256(name) => Part::Document,
        None => Part::Ignored,
    }
}

impl Archive {
    fn read(inner: Arc<Inner>, path: &Path, report: &Report) -> Result<Archive> {
        let mut archive = Archive {
            inner,
            path: path.to_owned(),
            documents: HashMap::new(),
            layers: HashMap::new(),
            links: HashMap::new(),
        };
        report.whole("reading");
        let result = members::each(path, |name, member| archive.take(name, member, report));
        result.map_err(|failed| match failed {
            Failed::Ours(error) => error,
            Failed::Reading(error) => Error::Archive {
                path: path.to_owned(),
                kind: if is_full(&error) { Kind::ResourceExhausted } else { Kind::InvalidArgument },
                reason: error.to_string(),
            },
        })?;
        Ok(archive)
    }

    fn take(&mut self, name: &str, member: Member<'_>, report: &Report) -> std::result::Result<(), Failed> {
        match (part(name), member) {
            (Part::Blob(digest), Member::File(from, size)) => {
                let progress = |done| report.blob(&digest, "reading", done, size);
                self.inner.ingest(from, Some(&digest), &format!("blob {digest}"), progress)?;
            }
            (Part::Layer, Member::File(from, size)) => {
                let progress = |done| report.blob(name, "reading", done, size);
                let (digest, _) = self.inner.ingest(from, None, &format!("layer {name}"), progress)?;
                self.layers.insert(name.to_owned(), self.stored_layer(&digest)?);
            }
            (Part::Layer, Member::Link(target)) => {
                if self.links.len() >= DOCUMENTS_MAX {
                    return Err(self.refuse("it has too many links".to_owned()).into());
                }
                self.links.insert(name.to_owned(), target);
            }
            (Part::Document, Member::File(from, _)) => self.take_document(name, from)?,
            (Part::Blob(_) | Part::Document, Member::Link(_)) => {
                return Err(self.refuse(format!("its member {name} is a link")).into());
            }
            (Part::Ignored, _) => {}
        }
        Ok(())
    }

    fn take_document(&mut self, name: &str, from: &mut dyn Read) -> std::result::Result<(), Failed> {
        let mut bytes = Vec::new();
        from.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        let held: usize = self.documents.values().map(Vec::len).sum();
        let full = self.documents.len() >= DOCUMENTS_MAX || (held + bytes.len()) as u64 > DOCUMENT_BYTES_MAX;
        if full || bytes.len() as u64 > CONFIG_BYTES_MAX {
            return Err(self.refuse(format!("its documents are too many or too large (at {name})")).into());
        }
        self.documents.insert(name.to_owned(), bytes);
        Ok(())
    }

    fn refuse(&self, reason: String) -> Error {
        Error::Archive { path: self.path.clone(), reason, kind: Kind::InvalidArgument }
    }

    /// The images, by the OCI index if there is one, else by Docker's manifest.
    fn images(&self) -> Result<Vec<Found>> {
        let images = match (self.documents.get("index.json"), self.documents.get("manifest.json")) {
            (Some(index), docker) => self.oci_images(index, docker)?,
            (None, Some(docker)) => self.docker_images(docker)?,
            (None, None) => {
                return Err(self.refuse(
                    "it is no image: neither index.json (OCI layout) nor manifest.json (docker save) is in it"
                        .to_owned(),
                ));
            }
        };
        if images.is_empty() {
            return Err(self.refuse("it holds no images".to_owned()));
        }
        Ok(images)
    }

    fn check_count(&self, images: usize) -> Result<()> {
        match images {
            ..=IMAGES_MAX => Ok(()),
            _ => Err(self.refuse(format!("it holds {images} images, more than {IMAGES_MAX}"))),
        }
    }

    fn oci_images(&self, index: &[u8], docker: Option<&Vec<u8>>) -> Result<Vec<Found>> {
        let index: ImageIndex =
            serde_json::from_slice(index).map_err(|e| self.refuse(format!("its index.json cannot be read: {e}")))?;
        let docker = docker.map(|docker| self.docker_entries(docker)).transpose()?.unwrap_or_default();
        let mut images: Vec<Found> = Vec::new();
        self.check_count(index.manifests().len())?;
        for descriptor in index.manifests() {
            let parts = self.oci_image(descriptor)?;
            let mut names = Vec::new();
            for key in NAME_ANNOTATIONS {
                names.extend(
                    descriptor.annotations().iter().flatten().filter(|(k, _)| *k == key).map(|(_, v)| v.clone()),
                );
            }
            if !names.iter().any(|name| full_reference(name).is_some()) {
                let config = sha256(&parts.config_json);
                let same = docker.iter().filter(|entry| config.ends_with(entry.config_hex()));
                names.extend(same.flat_map(|entry| entry.repo_tags.clone().unwrap_or_default()));
            }
            // Docker lists an image once for each of its tags.
            match images.iter_mut().find(|image| image.parts.target.digest == parts.target.digest) {
                Some(same) => same.names.extend(names),
                None => images.push(Found { parts, names }),
            }
        }
        Ok(images)
    }

    fn oci_image(&self, descriptor: &Descriptor) -> Result<Parts> {
        let target = self.document(descriptor)?;
        let manifest = match &target.parsed {
            Parsed::Manifest(_) => None,
            Parsed::Index(index) => Some(self.document(select_platform(index, &target.digest, &Platform::host())?)?),
        };
        let document = manifest.as_ref().unwrap_or(&target);
        let parsed = manifest_of(document)?;
        let config = config_descriptor(parsed, &document.digest)?.digest().to_string();
        for layer in parsed.layers() {
            self.need(layer.digest().as_ref(), &document.digest)?;
        }
        self.need(&config, &document.digest)?;
        let config_json = self.inner.read_document(&config, CONFIG_BYTES_MAX)?;
        Ok(Parts { target, manifest, config_json })
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Document> {
        let digest = descriptor.digest().to_string();
        if !is_sha256(&digest) {
            return Err(self.refuse(format!("its index names {digest}, which is not a sha256 digest")));
        }
        self.need(&digest, "its index")?;
        let bytes = self.inner.read_document(&digest, MANIFEST_BYTES_MAX)?;
        Ok(Document::parse(bytes, Some(descriptor.media_type().as_ref()))?)
    }

    fn need(&self, name: &str, by: &str) -> Result<()> {
        match self.inner.content.has(&digest(name)?) {
            true => Ok(()),
            false => Err(self.refuse(format!("blob {name}, which {by} names, is not in it"))),
        }
    }

    fn docker_entries(&self, manifest: &[u8]) -> Result<Vec<DockerEntry>> {
        serde_json::from_slice(manifest).map_err(|e| self.refuse(format!("its manifest.json cannot be read: {e}")))
    }

    fn docker_images(&self, manifest: &[u8]) -> Result<Vec<Found>> {
        let mut images = Vec::new();
        let entries = self.docker_entries(manifest)?;
        self.check_count(entries.len())?;
        for entry in entries {
            let config_json = self.docker_config(&entry.config)?;
            let layers = entry.layers.iter().map(|name| self.docker_layer(name)).collect::<Result<Vec<_>>>()?;
            let target = make_manifest(&config_json, &layers, BTreeMap::new())?;
            let parts = Parts { target, manifest: None, config_json };
            images.push(Found { parts, names: entry.repo_tags.unwrap_or_default() });
        }
        Ok(images)
    }

    fn docker_config(&self, name: &str) -> Result<Vec<u8>> {
        if let Part::Blob(digest) = part(name) {
            self.need(&digest, "its manifest.json")?;
            return self.inner.read_document(&digest, CONFIG_BYTES_MAX);
        }
        let config = self.documents.get(name).cloned();
        config.ok_or_else(|| {
            self.refuse(format!("the configuration {name}, which its manifest.json names, is not in it"))
        })
    }

    fn docker_layer(&self, name: &str) -> Result<Blob> {
        let missing = || self.refuse(format!("the layer {name}, which its manifest.json names, is not in it"));
        if let Part::Blob(digest) = part(name) {
            return self.stored_layer(&digest);
        }
        if let Some(blob) = self.layers.get(name) {
            return Ok(blob.clone());
        }
        // "../<id>/layer.tar", one step only: the target is a layer itself.
        let target = self.links.get(name).ok_or_else(missing)?;
        let target = target.strip_prefix("../").unwrap_or(target);
        self.layers.get(target).cloned().ok_or_else(missing)
    }

    /// A layer that lies among the blobs, with its size and kind.
    fn stored_layer(&self, name: &str) -> Result<Blob> {
        self.need(name, "its manifest.json")?;
        let parsed = digest(name)?;
        let open = crate::error::content_error(format!("open layer {name}"));
        let file = self.inner.content.open_blob(&parsed).map_err(open)?;
        let look = || Ok((file.metadata()?.len(), compression_of(&file)?));
        let (size, compression) = look().map_err(crate::error::io_error(format!("read layer {name}")))?;
        Ok(Blob { digest: name.to_owned(), size, media_type: layer_type(compression).to_owned() })
    }
}

fn layer_type(compression: Compression) -> &'static str {
    match compression {
        Compression::None => OCI_LAYER,
        Compression::Gzip => OCI_LAYER_GZIP,
        Compression::Zstd => OCI_LAYER_ZSTD,
    }
}

/// An image in `docker save`'s manifest.json.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

impl DockerEntry {
    fn config_hex(&self) -> &str {
        let name = self.config.rsplit('/').next().unwrap_or(&self.config);
        name.strip_suffix(".json").unwrap_or(name)
    }
}

/// Why the pass over the members ended early: what it read, or what it did with it.
enum Failed {
    Reading(io::Error),
    Ours(Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Reading(error)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::Ours(error)
    }
}
