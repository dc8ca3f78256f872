//! Export: a tar that is an OCI layout and a `docker save` file at once. The blobs go in as they are stored.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use stasis_registry::Reference;

use crate::error::{Error, Kind, Result, content_error, is_full};
use crate::image::{Blob, Image, digest};
use crate::lease::Lease;
use crate::progress::{Progress, Report};
use crate::{Images, Inner, blocking};

/// Bytes written at once.
const BUFFER_BYTES: usize = 256 << 10;
/// Permissions of the archive: images may hold secrets.
const MODE: u32 = 0o600;

impl Images {
    /// Writes an image to a tar archive. The file appears under its name when it is complete and durable; an existing file is
    /// replaced.
    pub async fn export(
        &self,
        name: &str,
        path: &Path,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<()> {
        let image = self.resolve(name).ok_or_else(|| Error::NotFound { name: name.to_owned() })?;
        let report = Report::new(progress);
        let lease = Lease::new(&self.inner, false).await;
        lease.protect(image.record.blobs().map(|blob| blob.digest.clone())).await;
        let mut documents = self.inner.documents_to_push(&image).await?;
        let top = documents.pop().expect("there is a manifest at least");
        let top = Blob { size: top.bytes.len() as u64, digest: top.digest, media_type: top.media_type };
        let (inner, path, held) = (self.inner.clone(), path.to_owned(), lease.clone());
        let exported = blocking(move || {
            let _lease = held;
            inner.export(&image, &top, &path, &report)
        })
        .await;
        lease.succeeded();
        exported
    }
}

impl Inner {
    fn export(&self, image: &Image, top: &Blob, path: &Path, report: &Report) -> Result<()> {
        let fail = |error: &io::Error| Error::Archive {
            path: path.to_owned(),
            reason: format!("cannot write it: {error}"),
            kind: match error.kind() {
                _ if is_full(error) => Kind::ResourceExhausted,
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Kind::InvalidArgument,
                _ => Kind::Internal,
            },
        };
        let temporary = Temporary::create(path).map_err(|e| fail(&e))?;
        let mut tar = tar::Builder::new(BufWriter::with_capacity(BUFFER_BYTES, &temporary.file));
        append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(|e| fail(&e))?;
        append(&mut tar, "index.json", &index_json(image, top)).map_err(|e| fail(&e))?;
        append(&mut tar, "manifest.json", &docker_json(image)).map_err(|e| fail(&e))?;
        let mut written = HashSet::new();
        for blob in image.record.blobs().filter(|blob| blob.digest != image.record.target.digest).chain([top]) {
            if !written.insert(blob.digest.clone()) {
                continue;
            }
            let doing = content_error(format!("open blob {}", blob.digest));
            let file = self.content.open_blob(&digest(&blob.digest)?).map_err(doing)?;
            let counted = Counted { inner: file, done: 0, blob, report };
            append_from(&mut tar, &blob_path(&blob.digest), blob.size, counted).map_err(|e| fail(&e))?;
        }
        let finish = || -> io::Result<()> { tar.into_inner()?.flush() };
        finish().map_err(|e| fail(&e))?;
        temporary.keep(path).map_err(|e| fail(&e))
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn index_json(image: &Image, top: &Blob) -> Vec<u8> {
    let entry = |annotations: Option<serde_json::Value>| {
        let mut entry = serde_json::json!({ "mediaType": top.media_type, "digest": top.digest, "size": top.size });
        if let Some(annotations) = annotations {
            entry["annotations"] = annotations;
        }
        entry
    };
    // One entry a name, as containerd and Docker write it.
    let mut entries: Vec<serde_json::Value> = Vec::new();
    for name in &image.references {
        let tag = name.parse::<Reference>().ok().and_then(|reference| reference.tag().map(str::to_owned));
        entries.push(entry(Some(serde_json::json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": tag.unwrap_or_default(),
        }))));
    }
    if entries.is_empty() {
        entries.push(entry(None));
    }
    let media_type = stasis_registry::OCI_INDEX;
    let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": entries });
    index.to_string().into_bytes()
}

fn docker_json(image: &Image) -> Vec<u8> {
    let layers: Vec<String> = image.record.layers.iter().map(|layer| blob_path(&layer.blob.digest)).collect();
    let entry = serde_json::json!({
        "Config": blob_path(&image.id),
        "RepoTags": image.references,
        "Layers": layers,
    });
    serde_json::json!([entry]).to_string().into_bytes()
}

fn append(tar: &mut tar::Builder<impl io::Write>, name: &str, bytes: &[u8]) -> io::Result<()> {
    append_from(tar, name, bytes.len() as u64, bytes)
}

fn append_from(tar: &mut tar::Builder<impl io::Write>, name: &str, size: u64, from: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    // No times and owners: the same image makes the same archive.
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    tar.append_data(&mut header, name, from.take(size))
}

struct Counted<'a> {
    inner: File,
    done: u64,
    blob: &'a Blob,
    report: &'a Report,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.done += count as u64;
        if count > 0 {
            self.report.blob(&self.blob.digest, "writing", self.done, self.blob.size);
        }
        Ok(count)
    }
}

/// A file beside its final place, gone unless it is kept.
struct Temporary {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Temporary {
    fn create(target: &Path) -> io::Result<Temporary> {
        let name =
            target.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the path names no file"))?;
        if target.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "the path is a directory; name a file in it"));
        }
        let random = &stasis_sys::file::random_id()[..16];
        let path = target.with_file_name(format!(".{}.{random}.tmp", name.to_string_lossy()));
        let file = File::options().write(true).create_new(true).mode(MODE).open(&path)?;
        Ok(Temporary { path, file, kept: false })
    }

    fn keep(mut self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, target)?;
        self.kept = true;
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
        stasis_sys::file::sync_dir(parent.unwrap_or(Path::new(".")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            // The error that brought us here is the one that is told.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
