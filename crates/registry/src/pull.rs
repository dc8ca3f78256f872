//! Reading: manifests whole and verified, small blobs whole and verified, large blobs as a stream that is resumed.

use reqwest::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use reqwest::{Response, StatusCode};
use tokio::sync::mpsc;

use crate::Session;
use crate::error::{Error, Result};
use crate::http::{BodyError, Connection, Resend, body_limited, describe};
use crate::manifest::{ACCEPT as MANIFEST_TYPES, Document, MANIFEST_BYTES_MAX, sha256};

/// Breaks in a row, without progress in between, after which a download is given up.
const BREAKS_MAX: u32 = 5;
/// Bytes that count as progress; fewer, and a server could keep us busy forever.
const PROGRESS_BYTES_MIN: u64 = 1 << 20;
/// Pause after the first break, doubled each time: a registry that is being restarted is back after seconds.
const BREAK_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);
/// Bytes that are handed over at once: large enough that hashing and writing, on another thread, wakes up rarely.
const CHUNK_BYTES: usize = 256 << 10;

impl Session {
    /// The manifest or index that the session's reference names. If it names a digest, the document has that digest.
    pub async fn manifest(&self) -> Result<Document> {
        self.fetch_manifest(self.reference().selector(), self.reference().digest(), None).await
    }

    /// The manifest of a digest, such as one out of an index. `media_type` is the one that the index gives.
    pub async fn manifest_by_digest(&self, digest: &str, media_type: &str) -> Result<Document> {
        self.fetch_manifest(digest, Some(digest), Some(media_type)).await
    }

    async fn fetch_manifest(&self, selector: &str, expected: Option<&str>, declared: Option<&str>) -> Result<Document> {
        let mut host = 0;
        loop {
            match self.manifest_from(&self.connections[host], selector, expected, declared).await {
                Err(error) if self.goes_on(host, &error) => host += 1,
                result => return result,
            }
        }
    }

    async fn manifest_from(
        &self,
        connection: &Connection,
        selector: &str,
        expected: Option<&str>,
        declared: Option<&str>,
    ) -> Result<Document> {
        let what = self.what(selector);
        let url = connection.url(&format!("manifests/{selector}"));
        let request = || connection.client.following.get(&url).header(ACCEPT, MANIFEST_TYPES);
        let response = connection.send(Resend::Allowed, request).await?;
        if response.status() != StatusCode::OK {
            return Err(connection.refuse(response, &what, "the request for a manifest").await);
        }
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.map(|text| text.split(';').next().unwrap_or(text).trim().to_owned());
        let bytes = whole(connection, response, &what, MANIFEST_BYTES_MAX).await?;
        verify(connection, &what, &bytes, expected)?;
        Document::parse(bytes, declared.or(content_type.as_deref()))
    }

    /// A blob of at most `limit` bytes, verified: an image configuration.
    pub async fn small_blob(&self, digest: &str, limit: u64) -> Result<Vec<u8>> {
        let mut host = 0;
        loop {
            match small_blob_from(&self.connections[host], digest, limit).await {
                Err(error) if self.goes_on(host, &error) => host += 1,
                result => return result,
            }
        }
    }

    /// Streams a blob of `size` bytes to `out` in order, and goes on where it stopped when the connection breaks. Exactly
    /// `size` bytes have been sent when it succeeds. **The digest is not checked here**: the receiver hashes and compares.
    /// `progress` hears how many bytes have come so far.
    pub async fn blob(
        &self,
        digest: &str,
        size: u64,
        out: &mpsc::Sender<Vec<u8>>,
        progress: impl Fn(u64) + Sync,
    ) -> Result<()> {
        let mut at = 0;
        let mut breaks = 0;
        loop {
            let before = at;
            let Err(error) = self.blob_once(digest, size, out, &progress, &mut at).await else { return Ok(()) };
            let (Error::Interrupted { .. } | Error::Unreachable { .. }) = error else { return Err(error) };
            breaks = if at - before >= PROGRESS_BYTES_MIN { 1 } else { breaks + 1 };
            // A registry that was never reached is down; one that was reached may be restarting.
            if breaks >= BREAKS_MAX || (at == 0 && matches!(error, Error::Unreachable { .. })) {
                return Err(interrupted(error, digest, at, size));
            }
            tracing::debug!(digest, at, size, %error, "download interrupted, going on");
            tokio::time::sleep(BREAK_PAUSE * (1 << breaks)).await;
        }
    }

    /// One attempt at the rest of a blob, from one server after the other.
    async fn blob_once(
        &self,
        digest: &str,
        size: u64,
        out: &mpsc::Sender<Vec<u8>>,
        progress: &(impl Fn(u64) + Sync),
        at: &mut u64,
    ) -> Result<()> {
        let mut host = 0;
        loop {
            let transfer = Transfer { connection: &self.connections[host], digest, size, out, progress };
            match transfer.run(at).await {
                Err(error) if self.goes_on(host, &error) => host += 1,
                result => return result,
            }
        }
    }

    /// Whether there is another server to ask after this error of the `host`th. The last one, the registry itself, has the last
    /// word on what is wrong.
    fn goes_on(&self, host: usize, error: &Error) -> bool {
        let goes_on = host + 1 < self.connections.len() && error.is_hosts_fault();
        if goes_on {
            tracing::warn!(mirror = self.connections[host].endpoint.host, %error, "mirror failed, trying the next host");
        }
        goes_on
    }

    fn what(&self, selector: &str) -> String {
        let separator = if selector.contains(':') { "@" } else { ":" };
        format!("{}{separator}{selector}", self.reference().name())
    }
}

/// However a download ends in the middle, the reader wants to know where.
fn interrupted(error: Error, digest: &str, at: u64, total: u64) -> Error {
    match error {
        Error::Unreachable { host, reason, .. } if at > 0 => {
            Error::Interrupted { digest: digest.to_owned(), host, at, total, reason }
        }
        other => other,
    }
}

async fn small_blob_from(connection: &Connection, digest: &str, limit: u64) -> Result<Vec<u8>> {
    let response = open_blob(connection, digest, 0).await?;
    let bytes = whole(connection, response, digest, limit).await?;
    verify(connection, digest, &bytes, Some(digest))?;
    Ok(bytes)
}

async fn open_blob(connection: &Connection, digest: &str, at: u64) -> Result<Response> {
    let url = connection.url(&format!("blobs/{digest}"));
    let request = || {
        let request = connection.client.following.get(&url);
        if at > 0 { request.header(RANGE, format!("bytes={at}-")) } else { request }
    };
    let response = connection.send(Resend::Allowed, request).await?;
    match response.status() {
        StatusCode::OK => Ok(response),
        StatusCode::PARTIAL_CONTENT if at > 0 => Ok(response),
        _ => Err(connection.refuse(response, &format!("blob {digest}"), "the request for a blob").await),
    }
}

/// One attempt at a blob.
struct Transfer<'a, P> {
    connection: &'a Connection,
    digest: &'a str,
    size: u64,
    out: &'a mpsc::Sender<Vec<u8>>,
    progress: &'a P,
}

impl<P: Fn(u64) + Sync> Transfer<'_, P> {
    /// Passes the body on from byte `at`, which moves along with what has been handed over.
    async fn run(&self, at: &mut u64) -> Result<()> {
        let mut response = open_blob(self.connection, self.digest, *at).await?;
        let mut skip = self.check_start(&response, *at)?;
        let mut pending = Vec::new();
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    self.hand_over(pending, at).await?;
                    return Err(self.interrupted(*at, describe(&error)));
                }
            };
            let dropped = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
            skip -= dropped as u64;
            pending.extend_from_slice(&chunk[dropped..]);
            if *at + pending.len() as u64 > self.size {
                return Err(self.size_error(*at + pending.len() as u64));
            }
            if pending.len() >= CHUNK_BYTES {
                self.hand_over(std::mem::take(&mut pending), at).await?;
            }
        }
        self.hand_over(pending, at).await?;
        if *at < self.size {
            return Err(self.interrupted(*at, "the server closed the connection".to_owned()));
        }
        Ok(())
    }

    /// Where the body begins relative to what we have: the number of bytes to skip.
    fn check_start(&self, response: &Response, at: u64) -> Result<u64> {
        if response.status() == StatusCode::OK {
            // No ranges here: the body begins at the beginning again, and its length is the blob's.
            return match response.content_length() {
                Some(length) if length != self.size => Err(self.size_error(length)),
                _ => Ok(at),
            };
        }
        let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let begins_here = range.strip_prefix("bytes ").is_some_and(|range| range.starts_with(&format!("{at}-")));
        match begins_here {
            true => Ok(0),
            false => Err(Error::Refused {
                host: self.connection.endpoint.host.clone(),
                status: response.status().as_u16(),
                request: format!("the request for {} from byte {at}", self.digest),
                reason: format!("it sent the range {range:?} instead"),
            }),
        }
    }

    async fn hand_over(&self, bytes: Vec<u8>, at: &mut u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let count = bytes.len() as u64;
        self.out.send(bytes).await.map_err(|_| Error::Abandoned { digest: self.digest.to_owned() })?;
        *at += count;
        (self.progress)(*at);
        Ok(())
    }

    fn interrupted(&self, at: u64, reason: String) -> Error {
        let host = self.connection.endpoint.host.clone();
        Error::Interrupted { digest: self.digest.to_owned(), host, at, total: self.size, reason }
    }

    fn size_error(&self, actual: u64) -> Error {
        let host = self.connection.endpoint.host.clone();
        Error::Size { digest: self.digest.to_owned(), host, expected: self.size, actual }
    }
}

async fn whole(connection: &Connection, response: Response, what: &str, limit: u64) -> Result<Vec<u8>> {
    let host = connection.endpoint.host.clone();
    body_limited(response, limit).await.map_err(|error| match error {
        BodyError::TooLarge(limit) => Error::TooLarge { what: what.to_owned(), host, limit },
        BodyError::Broken(reason) => Error::Unreachable { host, reason, hint: "" },
    })
}

fn verify(connection: &Connection, what: &str, bytes: &[u8], expected: Option<&str>) -> Result<()> {
    let Some(expected) = expected else { return Ok(()) };
    let actual = sha256(bytes);
    if actual == expected {
        return Ok(());
    }
    let host = connection.endpoint.host.clone();
    Err(Error::Digest { what: what.to_owned(), host, expected: expected.to_owned(), actual })
}
