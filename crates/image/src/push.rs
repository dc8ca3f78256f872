//! Pushes an image: blobs that the registry lacks, then the manifest, then the index if all of its images are here.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _};
use stasis_content::Digest;
use stasis_registry::{Access, Auth, Document, MANIFEST_BYTES_MAX, Parsed, Reference, Session};

use crate::error::{Error, Result, content_error};
use crate::image::{Blob, Image, digest};
use crate::lease::Lease;
use crate::progress::{Progress, Report};
use crate::{Images, Inner, blocking};

impl Images {
    /// Pushes a local image to `target`, or to its own first reference, and returns the digest under which it is there.
    ///
    /// Of an index only this platform's image is usually on the node; then that image's manifest is pushed alone and the digest
    /// is the manifest's.
    pub async fn push(
        &self,
        name: &str,
        target: Option<&str>,
        auth: Option<Auth>,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Digest> {
        let image = self.resolve(name).ok_or_else(|| Error::NotFound { name: name.to_owned() })?;
        let target: Reference = match target.or(image.references.first().map(String::as_str)) {
            Some(target) => target.parse()?,
            None => {
                return Err(Error::Invalid { reason: format!("image {name} has no reference: say where to push it") });
            }
        };
        let report = Report::new(progress);
        let lease = Lease::new(&self.inner, false).await;
        lease.protect(image.record.blobs().map(|blob| blob.digest.clone())).await;
        let pushed = self.inner.push(&image, &target, auth.as_ref(), &report).await?;
        lease.succeeded();
        self.inner.store.add_repo_digest(&image.id, target.at_digest(&pushed).to_string()).await?;
        digest(&pushed)
    }
}

impl Inner {
    async fn push(
        self: &Arc<Self>,
        image: &Image,
        target: &Reference,
        auth: Option<&Auth>,
        report: &Report,
    ) -> Result<String> {
        report.whole("resolving");
        let session = self.registry.session(target, auth, Access::Push)?;
        let record = &image.record;
        let blobs = record.layers.iter().map(|layer| &layer.blob).chain([&record.config]);
        let uploads: Vec<_> = blobs.map(|blob| self.push_blob(&session, blob, report)).collect();
        futures_util::stream::iter(uploads).buffer_unordered(self.max_concurrent_downloads).try_collect::<()>().await?;
        let documents = self.documents_to_push(image).await?;
        let mut last = String::new();
        let top = documents.len() - 1;
        for (i, document) in documents.into_iter().enumerate() {
            let selector = match target.tag() {
                Some(tag) if i == top => tag.to_owned(),
                _ => document.digest.clone(),
            };
            last = document.digest.clone();
            session.push_manifest(&selector, &document.media_type, document.bytes).await?;
        }
        if let Some(wanted) = target.digest()
            && wanted != last
        {
            let reason = format!("{target} cannot be pushed: the image here has digest {last}; push it by a tag");
            return Err(Error::Invalid { reason });
        }
        Ok(last)
    }

    /// The manifest, and the index above it if nothing that it names is missing here.
    pub(crate) async fn documents_to_push(self: &Arc<Self>, image: &Image) -> Result<Vec<Document>> {
        let (inner, record) = (self.clone(), image.record.clone());
        blocking(move || {
            let read = |blob: &Blob| -> Result<Document> {
                let bytes = inner.read_document(&blob.digest, MANIFEST_BYTES_MAX)?;
                Ok(Document::parse(bytes, Some(&blob.media_type))?)
            };
            let mut documents = vec![read(&record.manifest)?];
            if record.target.digest != record.manifest.digest {
                let target = read(&record.target)?;
                let Parsed::Index(index) = &target.parsed else { return Ok(documents) };
                if index.manifests().iter().all(|entry| entry.digest().to_string() == record.manifest.digest) {
                    documents.push(target);
                }
            }
            Ok(documents)
        })
        .await
    }

    async fn push_blob(self: &Arc<Self>, session: &Session, blob: &Blob, report: &Report) -> Result<()> {
        if session.has_blob(&blob.digest).await? {
            report.blob(&blob.digest, "exists", blob.size, blob.size);
            return Ok(());
        }
        let name = blob.digest.clone();
        let (inner, parsed) = (self.clone(), digest(&name)?);
        let file =
            blocking(move || inner.content.open_blob(&parsed).map_err(content_error(format!("open blob {parsed}"))));
        let (report, size) = (report.clone(), blob.size);
        report.blob(&name, "uploading", 0, size);
        let progress = move |done| report.blob(&name, "uploading", done, size);
        session.push_blob(&blob.digest, blob.size, Arc::new(file.await?), progress).await?;
        Ok(())
    }
}
