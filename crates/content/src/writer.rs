//! A blob while it is written.

use crate::digest::Digest;
use crate::error::{Error, Result};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A blob that has no name yet. Bytes written to it are hashed on their way. Dropped without [`Writer::commit`], it is gone.
#[derive(Debug)]
pub struct Writer {
    file: File,
    hash: Sha256,
    size: u64,
    unfinished: Unfinished,
    blobs: PathBuf,
}

/// The name in `ingest/`, which goes away with this.
#[derive(Debug)]
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a commit the name has moved on. A failure leaves a file that the next opening of the store removes.
        let _ = fs::remove_file(&self.0);
    }
}

impl Writer {
    pub(crate) fn create(path: PathBuf, blobs: PathBuf) -> Result<Writer> {
        let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = created.map_err(Error::io("creating the blob", &path))?;
        Ok(Writer { file, hash: Sha256::new(), size: 0, unfinished: Unfinished(path), blobs })
    }

    /// How many bytes were written so far.
    pub fn written(&self) -> u64 {
        self.size
    }

    /// Makes the blob durable under its digest, if that and the size are the expected ones; else it is gone. That the
    /// blob was there already is fine. Gives its digest and size.
    pub fn commit(self, expected: Option<&Digest>, size: Option<u64>) -> Result<(Digest, u64)> {
        let Writer { file, hash, size: actual_size, unfinished, blobs } = self;
        if let Some(expected) = size.filter(|size| *size != actual_size) {
            return Err(Error::Size { expected, actual: actual_size });
        }
        let actual = Digest::finish(hash);
        if let Some(expected) = expected.filter(|digest| **digest != actual) {
            return Err(Error::Digest { expected: expected.clone(), actual });
        }
        publish(&file, &unfinished.0, &blobs, &actual)?;
        Ok((actual, actual_size))
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.file.write(bytes)?;
        self.hash.update(&bytes[..length]);
        self.size += length as u64;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn publish(file: &File, unfinished: &Path, blobs: &Path, digest: &Digest) -> Result<()> {
    let path = blobs.join(digest.hex());
    file.sync_all().map_err(Error::io("flushing", unfinished))?;
    // Over a blob that is there already: both have the same bytes, and who reads the old one reads on.
    fs::rename(unfinished, &path).map_err(Error::io("naming the blob", &path))?;
    stasis_sys::file::sync_dir(blobs).map_err(Error::io("flushing", blobs))
}
