//! Content-addressed blobs on disk: ingest, verify, commit, read, delete.
//!
//! ```text
//! <root>/content/            0700
//!   blobs/sha256/<64 hex>    a blob: its name is the SHA-256 of its bytes; written once, never changed
//!   ingest/<random>          a blob being written; what a crash leaves here is removed when the store is opened
//! ```
//!
//! A blob appears under its name only after its bytes were hashed, compared and flushed, by one rename; so after a crash
//! at any moment a name holds the right bytes or is absent. It knows nothing of images, nor of who needs which blob: that
//! is decided by who calls [`Content::delete`].

mod digest;
mod error;
mod writer;

pub use digest::Digest;
pub use error::{Error, Result};
pub use writer::Writer;

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes hashed or copied at once: large enough that system calls do not count, small enough for the second-level cache.
const BUFFER_BYTES: usize = 256 << 10;

/// The store below one root directory. Cloning is cheap and gives the same store.
#[derive(Debug, Clone)]
pub struct Content {
    blobs: PathBuf,
    ingest: PathBuf,
}

impl Content {
    /// Opens the store in `<root>/content`, making its directories (0700) if needed, and removes what an earlier process
    /// left half written. Only one process may have a store open; the daemon's lock on its root sees to that.
    pub fn open(root: &Path) -> Result<Content> {
        let content = Content { blobs: root.join("content/blobs/sha256"), ingest: root.join("content/ingest") };
        for dir in [&content.blobs, &content.ingest] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(Error::io("creating", dir))?;
        }
        content.clean_ingest()?;
        Ok(content)
    }

    /// Begins a blob.
    pub fn writer(&self) -> Result<Writer> {
        Writer::create(self.ingest.join(stasis_sys::file::random_id()), self.blobs.clone())
    }

    /// A path on the store's file system where a blob may be written by somebody else, for [`Content::place`]. What is there
    /// when the store is opened is removed.
    pub fn unfinished_path(&self) -> PathBuf {
        self.ingest.join(stasis_sys::file::random_id())
    }

    /// Whether `path` is one of [`Content::unfinished_path`].
    pub fn is_unfinished(&self, path: &Path) -> bool {
        path.parent() == Some(&self.ingest)
    }

    /// Makes the durable file at a path of [`Content::unfinished_path`] the blob `digest`. It is not read: whoever wrote it
    /// has hashed it.
    pub fn place(&self, path: &Path, digest: &Digest) -> Result<()> {
        if !self.is_unfinished(path) {
            return Err(Error::io("taking over", path)(io::ErrorKind::InvalidInput.into()));
        }
        fs::rename(path, self.path(digest)).map_err(Error::io("naming the blob", path))?;
        stasis_sys::file::sync_dir(&self.blobs).map_err(Error::io("flushing", &self.blobs))
    }

    /// Copies the file `path` into a blob; a link is not followed. `expected` is compared as in [`Writer::commit`].
    ///
    /// A hard link would be cheaper, and wrong: whoever may write the file could change the blob under its digest.
    pub fn add_file(&self, path: &Path, expected: Option<&Digest>) -> Result<(Digest, u64)> {
        let mut options = fs::OpenOptions::new();
        options.read(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
        let mut source = options.open(path).map_err(Error::io("opening", path))?;
        if !source.metadata().map_err(Error::io("examining", path))?.is_file() {
            return Err(Error::io("opening", path)(io::Error::other("it is no regular file")));
        }
        let mut writer = self.writer()?;
        io::copy(&mut source, &mut writer).map_err(Error::io("copying", path))?;
        writer.commit(expected, None)
    }

    /// Opens a blob for reading. Its bytes were verified when it was stored, not now.
    pub fn open_blob(&self, digest: &Digest) -> Result<File> {
        let path = self.path(digest);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound { digest: digest.clone() },
            _ => Error::io("opening", &path)(error),
        })
    }

    /// Reads a blob of at most `limit` bytes, and compares its bytes with its name once more.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let file = self.open_blob(digest)?;
        let path = self.path(digest);
        let size = file.metadata().map_err(Error::io("examining", &path))?.len();
        if size > limit {
            return Err(Error::TooLarge { digest: digest.clone(), size, limit });
        }
        let mut bytes = Vec::with_capacity(size.try_into().unwrap_or(0));
        file.take(limit).read_to_end(&mut bytes).map_err(Error::io("reading", &path))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::Corrupt { digest: digest.clone(), actual, path });
        }
        Ok(bytes)
    }

    /// The size of a blob in bytes.
    pub fn size(&self, digest: &Digest) -> Result<u64> {
        let file = self.open_blob(digest)?;
        Ok(file.metadata().map_err(Error::io("examining", &self.path(digest)))?.len())
    }

    /// Whether the blob is there.
    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Where the blob is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// Removes a blob. Who has it open reads on; that it is absent is no error.
    pub fn delete(&self, digest: &Digest) -> Result<()> {
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", &path)(error)),
            _ => Ok(()),
        }
    }

    /// The digests of all blobs, sorted. Files with other names, which are not ours, are left out.
    pub fn list(&self) -> Result<Vec<Digest>> {
        let mut digests = Vec::new();
        for entry in fs::read_dir(&self.blobs).map_err(Error::io("listing", &self.blobs))? {
            let entry = entry.map_err(Error::io("listing", &self.blobs))?;
            digests.extend(entry.file_name().to_str().and_then(|name| format!("sha256:{name}").parse().ok()));
        }
        digests.sort();
        Ok(digests)
    }

    /// Reads a blob through and compares its bytes with its name, for a check of the whole store.
    pub fn verify(&self, digest: &Digest) -> Result<()> {
        let (path, mut file) = (self.path(digest), self.open_blob(digest)?);
        let mut hash = Sha256::new();
        read_through(&mut file, |bytes| hash.update(bytes)).map_err(Error::io("reading", &path))?;
        let actual = Digest::finish(hash);
        if actual == *digest { Ok(()) } else { Err(Error::Corrupt { digest: digest.clone(), actual, path }) }
    }

    fn clean_ingest(&self) -> Result<()> {
        for entry in fs::read_dir(&self.ingest).map_err(Error::io("listing", &self.ingest))? {
            let path = entry.map_err(Error::io("listing", &self.ingest))?.path();
            fs::remove_file(&path).map_err(Error::io("removing the unfinished blob", &path))?;
        }
        Ok(())
    }
}

/// Gives a file's bytes to `sink`, piece by piece.
fn read_through(file: &mut File, mut sink: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => sink(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
