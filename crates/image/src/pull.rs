//! Pulls an image: from the reference to documents, from documents to blobs, while layers are unpacked as they come.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stasis_metrics::{Counter, Histogram, Kind, Text};
use stasis_registry::{Access, Auth, Parsed, Platform, Reference, Session, select_platform};
use tokio::sync::mpsc;

use crate::assemble::{Names, Parts, Source, config_descriptor, manifest_of};
use crate::error::{Error, Result, content_error, io_error};
use crate::image::{Blob, CONFIG_BYTES_MAX, Image, digest};
use crate::lease::Lease;
use crate::progress::{Progress, Report};
use crate::{Images, Inner, blocking};

/// Pieces of a blob between the network and the disk: together with the client's piece size about a megabyte a layer.
const PIECES_AHEAD: usize = 4;

impl Images {
    /// Pulls an image and answers when it is recorded durably. A layer that another pull is just fetching is awaited, not
    /// fetched twice; each caller still proves itself to the registry with its own credentials. A pull that fails, or is
    /// dropped, leaves nothing behind.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Arc<Image>> {
        let reference: Reference = reference.parse()?;
        let report = Report::new(progress);
        let lease = Lease::new(&self.inner, false).await;
        let begin = Instant::now();
        let pulled = self.inner.pull(&reference, auth.as_ref(), &lease, &report).await;
        self.inner.pulls.count(pulled.is_ok(), begin.elapsed());
        self.inner.finish(lease, pulled).await
    }

    /// Writes the metrics of images.
    pub fn write_metrics(&self, text: &mut Text) {
        text.family("stasis_images", Kind::Gauge, "Images on this node.");
        text.sample(&[], self.list().len() as u64);
        let pulls = &self.inner.pulls;
        text.family("stasis_image_pulls", Kind::Counter, "Pulls by result.");
        text.sample(&[("result", "done")], pulls.done.get());
        text.sample(&[("result", "failed")], pulls.failed.get());
        text.family("stasis_image_pull_duration_seconds", Kind::Histogram, "Time of a pull that was done.");
        text.histogram(&[], &pulls.time);
    }
}

/// What is counted of pulls.
#[derive(Debug, Default)]
pub(crate) struct Pulls {
    done: Counter,
    failed: Counter,
    time: Histogram,
}

impl Pulls {
    fn count(&self, done: bool, took: Duration) {
        if done {
            self.done.add_one();
            self.time.observe(took);
        } else {
            self.failed.add_one();
        }
    }
}

impl Inner {
    /// Ends an operation: after a failure nothing of it is left when the caller hears of it.
    pub(crate) async fn finish<T>(self: &Arc<Self>, lease: Lease, result: Result<T>) -> Result<T> {
        let failed = result.is_err();
        drop(lease);
        if failed {
            let inner = self.clone();
            if let Err(error) = blocking(move || crate::gc::collect(&inner)).await {
                tracing::warn!(%error, "cannot clear away what a failed operation left");
            }
        }
        result
    }

    async fn pull(
        self: &Arc<Self>,
        reference: &Reference,
        auth: Option<&Auth>,
        lease: &Lease,
        report: &Report,
    ) -> Result<Arc<Image>> {
        report.whole("resolving");
        let session = self.registry.session(reference, auth, Access::Pull)?;
        let target = session.manifest().await?;
        let manifest = match &target.parsed {
            Parsed::Manifest(_) => None,
            Parsed::Index(index) => {
                let chosen = select_platform(index, &target.digest, &Platform::host())?;
                Some(session.manifest_by_digest(chosen.digest().as_ref(), chosen.media_type().as_ref()).await?)
            }
        };
        let document = manifest.as_ref().unwrap_or(&target);
        let config = config_descriptor(manifest_of(document)?, &reference.to_string())?;
        let config_json = session.small_blob(config.digest().as_ref(), CONFIG_BYTES_MAX).await?;
        let names = Names {
            references: reference.tag().map(|_| reference.to_string()).into_iter().collect(),
            repo_digests: vec![reference.at_digest(&target.digest).to_string()],
        };
        let parts = Parts { target, manifest, config_json };
        self.assemble(parts, names, lease, report, &Source::Registry(session)).await
    }

    /// Brings a layer's blob into the store, unless it is there. The bytes are hashed and written on their way, on a blocking
    /// thread.
    pub(crate) async fn download(
        self: &Arc<Self>,
        session: &Session,
        blob: &Blob,
        lease: &Lease,
        report: &Report,
    ) -> Result<()> {
        let turn = self.locks.lock(&blob.digest).await;
        let expected = digest(&blob.digest)?;
        if self.content.has(&expected) {
            report.blob(&blob.digest, "exists", blob.size, blob.size);
            return Ok(());
        }
        report.blob(&blob.digest, "downloading", 0, blob.size);
        let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(PIECES_AHEAD);
        let (inner, size, lease) = (self.clone(), blob.size, lease.clone());
        let writing = blocking(move || {
            let (_turn, _lease) = (turn, lease);
            let doing = || format!("store layer {expected}");
            let mut writer = inner.content.writer().map_err(content_error(doing()))?;
            let mut written = 0;
            while let Some(piece) = receiver.blocking_recv() {
                writer.write_all(&piece).map_err(io_error(doing()))?;
                written += piece.len() as u64;
            }
            if written < size {
                // The sender gave up; its error is the one that counts. The writer leaves nothing when it is dropped.
                return Ok(());
            }
            writer.commit(Some(&expected), Some(size)).map_err(content_error(doing()))?;
            Ok(())
        });
        let sending = async {
            let progress = |done| report.blob(&blob.digest, "downloading", done, blob.size);
            let sent = session.blob(&blob.digest, blob.size, &sender, progress).await;
            drop(sender);
            sent
        };
        match futures_util::future::join(sending, writing).await {
            (Err(stasis_registry::Error::Abandoned { .. }), Err(error)) => Err(error),
            (sent, written) => {
                sent.map_err(Error::from)?;
                written
            }
        }
    }
}
