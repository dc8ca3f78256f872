//! Writing: blobs from files in constant memory, then manifests.
//!
//! A blob goes up in one PUT. Chunked uploads would be no lighter (the body is a stream either way), and not every registry
//! keeps to the specification there.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Response, StatusCode, Url};
use tokio::sync::mpsc;

use crate::Session;
use crate::error::{Error, Result};
use crate::http::{Connection, Resend};

/// Bytes of the file that are read at once.
const READ_BYTES: usize = 1 << 20;
/// Reads ahead of the network.
const READS_AHEAD: usize = 2;
/// Times that the upload of a blob is begun.
const UPLOADS_MAX: u32 = 3;
/// Pause before an upload is begun again, doubled each time.
const UPLOAD_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

impl Session {
    /// Whether the registry has a blob in this repository already.
    pub async fn has_blob(&self, digest: &str) -> Result<bool> {
        let connection = self.registry_itself();
        let url = connection.url(&format!("blobs/{digest}"));
        let response = connection.send(Resend::Allowed, || connection.client.following.head(&url)).await?;
        match response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(connection.refuse(response, digest, "the question for a blob").await),
        }
    }

    /// Uploads the first `size` bytes of a file as the blob `digest`; the registry verifies it. `progress` hears how many bytes
    /// have been handed to the network so far.
    pub async fn push_blob(
        &self,
        digest: &str,
        size: u64,
        file: Arc<File>,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<()> {
        let connection = self.registry_itself();
        let progress = Arc::new(progress);
        let mut attempt = 1;
        loop {
            let sent = Arc::new(AtomicU64::new(0));
            let error = match upload(connection, digest, size, &file, &sent, &progress).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let transient = match &error {
                Error::Unreachable { .. } => true,
                Error::Refused { status, .. } => *status >= 500,
                _ => false,
            };
            let at = sent.load(Ordering::Relaxed);
            if !transient || attempt >= UPLOADS_MAX || (at == 0 && attempt == 1) {
                return Err(match error {
                    Error::Unreachable { host, reason, .. } if at > 0 => {
                        Error::Interrupted { digest: digest.to_owned(), host, at, total: size, reason }
                    }
                    other => other,
                });
            }
            tracing::debug!(digest, attempt, %error, "upload interrupted, beginning again");
            tokio::time::sleep(UPLOAD_PAUSE * (1 << attempt)).await;
            attempt += 1;
        }
    }

    /// Uploads a manifest or index under `selector`, a tag or the document's digest.
    pub async fn push_manifest(&self, selector: &str, media_type: &str, bytes: Vec<u8>) -> Result<()> {
        let connection = self.registry_itself();
        let url = connection.url(&format!("manifests/{selector}"));
        let request = || connection.client.direct.put(&url).header(CONTENT_TYPE, media_type).body(bytes.clone());
        let response = connection.send(Resend::Allowed, request).await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(connection.refuse(response, selector, "the upload of a manifest").await)
    }

    fn registry_itself(&self) -> &Connection {
        self.connections.last().expect("a session has the registry itself at least")
    }
}

async fn upload(
    connection: &Connection,
    digest: &str,
    size: u64,
    file: &Arc<File>,
    sent: &Arc<AtomicU64>,
    progress: &Arc<impl Fn(u64) + Send + Sync + 'static>,
) -> Result<()> {
    let url = connection.url("blobs/uploads/");
    let begin = || connection.client.direct.post(&url).header(CONTENT_LENGTH, 0);
    let response = connection.send(Resend::Allowed, begin).await?;
    if response.status() != StatusCode::ACCEPTED {
        return Err(connection.refuse(response, &connection.repository, "the begin of an upload").await);
    }
    let mut target = location(connection, &response, &url)?;
    target.query_pairs_mut().append_pair("digest", digest);

    let failure = Arc::new(std::sync::Mutex::new(None));
    let body = std::sync::Mutex::new(Some(body(file.clone(), size, sent.clone(), progress.clone(), failure.clone())));
    let put = || {
        let body = body.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take().unwrap_or_default();
        let request = connection.client.direct.put(target.clone());
        request.header(CONTENT_TYPE, "application/octet-stream").header(CONTENT_LENGTH, size).body(body)
    };
    let result = connection.send(Resend::Never, put).await;
    if let Some(source) = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        return Err(Error::Local { digest: digest.to_owned(), source });
    }
    let response = result?;
    if response.status().is_success() {
        return Ok(());
    }
    Err(connection.refuse(response, digest, "the upload of a blob").await)
}

/// Where the upload goes. It may be another host, a storage service; credentials are then not sent along.
fn location(connection: &Connection, response: &Response, base: &str) -> Result<Url> {
    let refuse = |reason: &str| Error::Refused {
        host: connection.endpoint.host.clone(),
        status: response.status().as_u16(),
        request: "the begin of an upload".to_owned(),
        reason: reason.to_owned(),
    };
    let text = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let text = text.ok_or_else(|| refuse("it names no Location for the upload"))?;
    let url = Url::parse(base).and_then(|base| base.join(text)).map_err(|_| refuse("its Location is not a URL"))?;
    if base.starts_with("https:") && url.scheme() != "https" {
        return Err(refuse("its Location is not https"));
    }
    Ok(url)
}

/// The file as a request body: a blocking thread reads ahead, and stops when the request goes away.
fn body(
    file: Arc<File>,
    size: u64,
    sent: Arc<AtomicU64>,
    progress: Arc<impl Fn(u64) + Send + Sync + 'static>,
    failure: Arc<std::sync::Mutex<Option<std::io::Error>>>,
) -> Body {
    let (sender, mut receiver) = mpsc::channel::<std::io::Result<Vec<u8>>>(READS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut at = 0;
        while at < size {
            let mut chunk = vec![0; READ_BYTES.min(usize::try_from(size - at).unwrap_or(READ_BYTES))];
            if let Err(error) = file.read_exact_at(&mut chunk, at) {
                let copy = std::io::Error::new(error.kind(), error.to_string());
                *failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                let _ = sender.blocking_send(Err(copy));
                return;
            }
            at += chunk.len() as u64;
            if sender.blocking_send(Ok(chunk)).is_err() {
                return;
            }
            sent.store(at, Ordering::Relaxed);
            progress(at);
        }
    });
    Body::wrap_stream(futures_util::stream::poll_fn(move |context| receiver.poll_recv(context)))
}
