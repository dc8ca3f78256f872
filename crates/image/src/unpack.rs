//! Unpacks a layer: blob → decompression → diff ID → applier.
//!
//! The diff ID is compared at the end of the stream, inside the reader that the applier reads to its end before it commits:
//! a layer is never to be seen under a chain ID that its content does not have.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};
use stasis_snapshot::{LayerStats, decompress};

use crate::Inner;
use crate::error::{Error, Result, content_error, is_full};
use crate::image::{Blob, digest};
use crate::progress::Report;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// A layer to unpack.
pub(crate) struct Task {
    pub(crate) blob: Blob,
    pub(crate) diff_id: String,
    pub(crate) chain_id: String,
    /// Chain IDs below, lowest first.
    pub(crate) parents: Vec<String>,
}

/// Unpacks a layer whose blob is in the store. Blocks. Ends soon after `cancelled` is set, and then leaves nothing.
pub(crate) fn unpack(inner: &Inner, task: &Task, report: &Report, cancelled: &AtomicBool) -> Result<LayerStats> {
    let name = &task.blob.digest;
    let failed = |error: &(dyn std::error::Error + 'static)| Error::Layer {
        digest: name.clone(),
        reason: error.to_string(),
        full: is_full(error),
    };
    let apply = |layer: &mut dyn Read| {
        inner.snapshots.apply_layer(&task.chain_id, layer, &task.parents).map_err(|e| failed(&e))
    };
    if inner.snapshots.has_layer(&task.chain_id) {
        // One that is there is not read again.
        return apply(&mut io::empty());
    }
    let file = inner.content.open_blob(&digest(name)?).map_err(content_error(format!("open layer {name}")))?;
    let compression = compression_of(&file).map_err(|e| failed(&e))?;
    let counted = Counted { inner: file, done: 0, task, report, cancelled };
    let plain = decompress(counted).map_err(|e| failed(&e))?;
    // A blob that is not compressed is its own content, and was hashed when it was stored.
    let known = compression == Compression::None && task.diff_id == *name;
    let hash = (!known).then(Sha256::new);
    apply(&mut Verified { inner: plain, expected: task.diff_id.clone(), hash, finished: false })
}

/// How a stream was compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The compression of a file, by how it begins. Media types are no help: Docker's archives call everything a tar.
pub(crate) fn compression_of(file: &File) -> io::Result<Compression> {
    let mut beginning = [0; 4];
    let count = file.read_at(&mut beginning, 0)?;
    let beginning = &beginning[..count];
    Ok(if beginning.starts_with(GZIP_MAGIC) {
        Compression::Gzip
    } else if beginning.starts_with(ZSTD_MAGIC) {
        Compression::Zstd
    } else {
        Compression::None
    })
}

/// Reports how much of a blob was read, and stops when the operation was given up.
struct Counted<'a, R> {
    inner: R,
    done: u64,
    task: &'a Task,
    report: &'a Report,
    cancelled: &'a AtomicBool,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other("the operation was given up"));
        }
        let count = self.inner.read(buffer)?;
        self.done += count as u64;
        self.report.blob(&self.task.blob.digest, "unpacking", self.done, self.task.blob.size);
        Ok(count)
    }
}

/// Compares the digest of a stream at its end. The end is an error if it differs.
struct Verified<R> {
    inner: R,
    expected: String,
    hash: Option<Sha256>,
    finished: bool,
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let Some(hash) = &mut self.hash else { return Ok(count) };
        hash.update(&buffer[..count]);
        if count == 0 && !buffer.is_empty() && !self.finished {
            self.finished = true;
            let actual = hex(hash.clone());
            if actual != self.expected {
                let reason = format!("its content has diff ID {actual} where the configuration says {}", self.expected);
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
        }
        Ok(count)
    }
}

/// `sha256:…` of what was hashed.
pub(crate) fn hex(hash: Sha256) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("sha256:");
    for byte in hash.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_with_another_digest_does_not_end_well() {
        let read = |expected: String| {
            let mut verified =
                Verified { inner: &b"content"[..], expected, hash: Some(Sha256::new()), finished: false };
            verified.read_to_end(&mut Vec::new())
        };
        assert_eq!(read(stasis_registry::sha256(b"content")).expect("the right digest"), 7);
        let error = read(stasis_registry::sha256(b"other")).expect_err("the wrong digest");
        assert!(error.to_string().contains("diff ID"), "{error}");
    }
}
