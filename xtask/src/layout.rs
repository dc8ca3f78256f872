//! OCI images made from scratch: a tree becomes a layer, layers an image, an image an OCI layout in a tar.
//!
//! The same input gives the same bytes: entries are sorted, times are zero. Knows nothing of what is in an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A blob and where its bytes are.
#[derive(Clone, Debug)]
pub struct Blob {
    /// `sha256:…`
    pub digest: String,
    /// In bytes.
    pub size: u64,
    /// What the bytes are.
    pub media_type: &'static str,
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl Blob {
    fn of_bytes(media_type: &'static str, bytes: Vec<u8>) -> Self {
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        Self { digest, size: bytes.len() as u64, media_type, source: Source::Bytes(bytes) }
    }

    fn of_file(media_type: &'static str, path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut hasher = Hasher(Sha256::new());
        let size = io::copy(&mut file, &mut hasher).with_context(|| format!("read {}", path.display()))?;
        let digest = format!("sha256:{}", hex(&hasher.0.finalize()));
        Ok(Self { digest, size, media_type, source: Source::File(path.to_path_buf()) })
    }

    /// The blob's bytes from the beginning.
    pub fn reader(&self) -> Result<Box<dyn Read + '_>> {
        Ok(match &self.source {
            Source::Bytes(bytes) => Box::new(bytes.as_slice()),
            Source::File(path) => Box::new(File::open(path).with_context(|| format!("open {}", path.display()))?),
        })
    }

    fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size })
    }
}

/// A layer: its blob and the digest of its uncompressed bytes.
#[derive(Clone, Debug)]
pub struct Layer {
    blob: Blob,
    diff_id: String,
}

impl Layer {
    /// A tar file as it is, uncompressed.
    pub fn of_tar(path: &Path) -> Result<Self> {
        let blob = Blob::of_file(LAYER, path)?;
        Ok(Self { diff_id: blob.digest.clone(), blob })
    }
}

/// A complete image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Layers and configuration.
    pub blobs: Vec<Blob>,
    /// What names all of them.
    pub manifest: Blob,
}

impl Image {
    /// An image of these layers; `run` is the `config` object of the image configuration (User, Env, Cmd, …).
    pub fn new(layers: Vec<Layer>, run: &Value, annotations: &BTreeMap<&str, String>) -> Result<Self> {
        let config = json!({
            "architecture": architecture()?,
            "os": "linux",
            "config": run,
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>() },
        });
        let config = Blob::of_bytes(CONFIG, serde_json::to_vec(&config)?);
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(),
            "layers": layers.iter().map(|layer| layer.blob.descriptor()).collect::<Vec<_>>(),
        });
        if !annotations.is_empty() {
            manifest["annotations"] = json!(annotations);
        }
        let manifest = Blob::of_bytes(MANIFEST, serde_json::to_vec(&manifest)?);
        let blobs = layers.into_iter().map(|layer| layer.blob).chain([config]).collect();
        Ok(Self { blobs, manifest })
    }

    /// Writes the image as an OCI layout in a tar; `reference` is the name that the layout's index gives it.
    pub fn write(&self, path: &Path, reference: &str) -> Result<()> {
        let mut descriptor = self.manifest.descriptor();
        descriptor["annotations"] =
            json!({ "org.opencontainers.image.ref.name": reference, "io.containerd.image.name": reference });
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut tar = tar::Builder::new(io::BufWriter::new(file));
        let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
        append(&mut tar, "oci-layout", layout.len() as u64, layout.as_slice())?;
        let index = serde_json::to_vec(&index)?;
        append(&mut tar, "index.json", index.len() as u64, index.as_slice())?;
        for blob in self.blobs.iter().chain([&self.manifest]) {
            let name = format!("blobs/{}", blob.digest.replace(':', "/"));
            append(&mut tar, &name, blob.size, blob.reader()?)?;
        }
        tar.into_inner()?.into_inner().context("write the image")?.sync_all()?;
        Ok(())
    }

    /// Reads what [`Image::write`] wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(file).entries()? {
            let mut entry = entry?;
            let name = entry.path()?.to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            files.insert(name, bytes);
        }
        let file = |name: &str| files.get(name).with_context(|| format!("{} holds no {name}", path.display()));
        let blob = |media_type: &'static str, descriptor: &Value| -> Result<Blob> {
            let digest = descriptor["digest"].as_str().context("a descriptor without digest")?;
            Ok(Blob::of_bytes(media_type, file(&format!("blobs/{}", digest.replace(':', "/")))?.clone()))
        };
        let index: Value = serde_json::from_slice(file("index.json")?)?;
        let manifest = blob(MANIFEST, &index["manifests"][0])?;
        let parsed: Value = serde_json::from_reader(manifest.reader()?)?;
        let mut blobs = Vec::new();
        for layer in parsed["layers"].as_array().into_iter().flatten() {
            blobs.push(blob(if layer["mediaType"] == LAYER { LAYER } else { LAYER_GZIP }, layer)?);
        }
        blobs.push(blob(CONFIG, &parsed["config"])?);
        Ok(Self { blobs, manifest })
    }
}

/// What will be a layer: files by path, without a leading slash.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    mode: u32,
    owner: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Link(String),
}

impl Tree {
    /// Adds a directory and those above it.
    pub fn directory(&mut self, path: &str, mode: u32, owner: u64) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Entry { mode, owner, kind: Kind::Directory });
    }

    /// Adds a file of root's.
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Entry { mode, owner: 0, kind: Kind::File(bytes.into()) });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Entry { mode: 0o777, owner: 0, kind: Kind::Link(target.to_owned()) });
    }

    fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            let entry = Entry { mode: 0o755, owner: 0, kind: Kind::Directory };
            self.entries.entry(path[..end].to_owned()).or_insert(entry);
        }
    }

    /// The tree as a gzip layer.
    pub fn layer(&self) -> Result<Layer> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, entry) in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(entry.mode);
            header.set_uid(entry.owner);
            header.set_gid(entry.owner);
            header.set_mtime(0);
            header.set_size(0);
            match &entry.kind {
                Kind::Directory => {
                    header.set_entry_type(tar::EntryType::Directory);
                    tar.append_data(&mut header, format!("{path}/"), io::empty())?;
                }
                Kind::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    tar.append_link(&mut header, path, target)?;
                }
                Kind::File(bytes) => {
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_size(bytes.len() as u64);
                    tar.append_data(&mut header, path, bytes.as_slice())?;
                }
            }
        }
        let plain = tar.into_inner()?;
        let diff_id = format!("sha256:{}", hex(&Sha256::digest(&plain)));
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&plain)?;
        Ok(Layer { blob: Blob::of_bytes(LAYER_GZIP, gzip.finish()?), diff_id })
    }
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Hasher(Sha256);

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, size: u64, bytes: impl Read) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_size(size);
    tar.append_data(&mut header, name, bytes).with_context(|| format!("append {name}"))
}

/// The name that OCI gives this machine's architecture.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no OCI name is known for the architecture {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Image {
        let mut tree = Tree::default();
        tree.file("etc/passwd", 0o644, "root:x:0:0::/:/bin/sh\n");
        tree.link("bin/sh", "busybox");
        tree.directory("tmp", 0o1777, 0);
        Image::new(vec![tree.layer().unwrap()], &json!({ "Cmd": ["sh"] }), &BTreeMap::new()).unwrap()
    }

    #[test]
    fn the_same_tree_gives_the_same_image() {
        assert_eq!(sample().manifest.digest, sample().manifest.digest);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = std::env::temp_dir().join(format!("xtask-layout-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("image.tar");
        sample().write(&path, "localhost/sample:latest").unwrap();
        let read = Image::read(&path);
        std::fs::remove_dir_all(&dir).unwrap();
        let digests = |image: &Image| image.blobs.iter().map(|blob| blob.digest.clone()).collect::<Vec<_>>();
        assert_eq!(digests(&read.unwrap()), digests(&sample()));
    }

    #[test]
    fn directories_come_before_what_they_hold() {
        let mut tree = Tree::default();
        tree.file("a/b/c", 0o644, "");
        assert_eq!(tree.entries.keys().collect::<Vec<_>>(), ["a", "a/b", "a/b/c"]);
    }
}
