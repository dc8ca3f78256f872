//! The writable layer, and what else is files: copied in the same freeze as the memory, compressed afterwards.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{Mode, OFlags, open};
use stasis_checkpoint::Member;
use stasis_shim_api::{CheckpointRequest, Reason, ShimError, Tree};

use super::estimate::Space;
use super::exhausted;
use super::job::internal;
use super::stop::Stop;

/// So much of a layer is kept in memory; most are a few files. More goes to an unnamed file beside the archive.
const MEMORY_MAX: usize = 64 << 20;

/// After so many bytes it is looked whether the copy is called off.
const CHECK_BYTES: u64 = 1 << 20;

/// The thread that copies the layer and the other directories.
#[derive(Debug)]
pub(crate) struct Layer {
    thread: io::Result<JoinHandle<io::Result<Copied>>>,
}

/// What was copied.
#[derive(Debug)]
pub(crate) struct Copied {
    /// The writable layer, uncompressed.
    pub(crate) layer: Spool,
    /// The other directories, as tar archives.
    pub(crate) trees: Vec<(Member, Spool)>,
}

/// The directories that a request names, by the members that they become.
pub(crate) fn trees(request: &CheckpointRequest) -> Result<Vec<(Member, Tree)>, ShimError> {
    let member = |tree: &Tree| match Member::parse(&tree.member) {
        Some(member @ (Member::DevShm | Member::Volume(_))) => Ok((member, tree.clone())),
        _ => Err(ShimError {
            reason: Reason::FailedPrecondition,
            message: format!("{:?} is no member of an archive for a directory", tree.member),
        }),
    };
    request.trees.iter().map(member).collect()
}

/// Bytes of all files that will be copied, their holes included: these are copied, too.
pub(crate) fn bytes(request: &CheckpointRequest) -> Result<u64, ShimError> {
    let dirs = request.trees.iter().map(|tree| &tree.dir).chain([&request.upper]);
    let sizes = dirs.map(|dir| stasis_snapshot::apparent_bytes(dir).map_err(internal));
    sizes.sum::<Result<u64, ShimError>>()
}

impl Layer {
    /// Starts to cut the layer whose upper directory is `upper`, and to copy `trees`.
    pub(crate) fn start(upper: &Path, trees: Vec<(Member, Tree)>, space: Space, stop: Arc<Stop>) -> Self {
        let upper = upper.to_owned();
        let copy = move || {
            let spool = |dir: &Path| {
                let mut spool = Spool::new(&space, &stop);
                let stats = stasis_snapshot::write_diff(dir, &mut spool).map_err(io::Error::other)?;
                Ok::<_, io::Error>((spool, stats.entries))
            };
            let mut copied = Copied { layer: spool(&upper)?.0, trees: Vec::new() };
            for (member, tree) in trees {
                let (spool, entries) = spool(&tree.dir)?;
                // An empty /dev/shm is that of every pod.
                if entries > 0 || member != Member::DevShm {
                    copied.trees.push((member, spool));
                }
            }
            Ok(copied)
        };
        Self { thread: thread::Builder::new().name("layer".to_owned()).spawn(copy) }
    }

    /// Waits until all is copied.
    pub(crate) fn finish(self) -> Result<Copied, ShimError> {
        let copied = self
            .thread
            .and_then(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked"))));
        copied.map_err(|error| copy_error(error, "copy the container's files"))
    }
}

/// Why a copy ended: called off, no space, or something else.
pub(crate) fn copy_error(error: io::Error, what: &str) -> ShimError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
    while let Some(inner) = cause {
        if let Some(known) = inner.downcast_ref::<ShimError>() {
            return known.clone();
        }
        if let Some(inner) = inner.downcast_ref::<io::Error>()
            && is_full(inner)
        {
            return exhausted(format!("cannot {what}: {error}"));
        }
        cause = inner.source();
    }
    if is_full(&error) {
        return exhausted(format!("cannot {what}: {error}"));
    }
    internal(format!("cannot {what}: {error}"))
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// Bytes whose number is not known beforehand: in memory, and from a size on in a file without a name.
#[derive(Debug)]
pub(crate) struct Spool {
    space: Space,
    stop: Arc<Stop>,
    memory: Vec<u8>,
    file: Option<File>,
    length: u64,
}

impl Spool {
    fn new(space: &Space, stop: &Arc<Stop>) -> Self {
        Self { space: space.clone(), stop: Arc::clone(stop), memory: Vec::new(), file: None, length: 0 }
    }

    /// Number of bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// All bytes from the first on.
    pub(crate) fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        match &mut self.file {
            Some(file) => {
                file.seek(SeekFrom::Start(0))?;
                Ok(Box::new(file))
            }
            None => Ok(Box::new(&self.memory[..])),
        }
    }

    /// The same bytes, compressed fast.
    pub(crate) fn gzip(mut self) -> io::Result<Spool> {
        let compressed = Spool::new(&self.space, &self.stop);
        let mut encoder = GzEncoder::new(compressed, Compression::fast());
        io::copy(&mut self.reader()?, &mut encoder)?;
        encoder.finish()
    }

    /// Looks now and then whether the copy is called off, and whether there is space.
    fn check(&self, length: usize) -> Result<(), ShimError> {
        let end = self.length + length as u64;
        if end / CHECK_BYTES > self.length / CHECK_BYTES {
            self.stop.check()?;
        }
        match self.file {
            Some(_) => self.space.check_step(self.length, length as u64),
            None => Ok(()),
        }
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check(bytes.len()).map_err(io::Error::other)?;
        if self.file.is_none() && self.memory.len() + bytes.len() > MEMORY_MAX {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let mut file = File::from(open(self.space.dir(), flags, Mode::RUSR | Mode::WUSR)?);
            file.write_all(&self.memory)?;
            self.memory = Vec::new();
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => file.write_all(bytes)?,
            None => self.memory.extend_from_slice(bytes),
        }
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_copy_that_is_called_off_ends() {
        let dir = tempfile::tempdir().unwrap();
        let space = Space::beside(&dir.path().join("a.tar"), 0);
        let mut spool = Spool::new(&space, &Arc::new(Stop::new(Instant::now(), 0).unwrap()));
        spool.write_all(b"not yet looked at").unwrap();
        let error = spool.write_all(&vec![0; CHECK_BYTES as usize]).unwrap_err();
        assert_eq!(copy_error(error, "copy").reason, Reason::DeadlineExceeded);
    }

    fn check(bytes: &[u8]) {
        let dir = tempfile::tempdir().unwrap();
        let space = Space::beside(&dir.path().join("a.tar"), 0);
        let stop = Arc::new(Stop::new(Instant::now(), 600_000).unwrap());
        let mut spool = Spool::new(&space, &stop);
        bytes.chunks(10_000_000).for_each(|chunk| spool.write_all(chunk).unwrap());
        assert_eq!(spool.length(), bytes.len() as u64);
        let mut read = Vec::new();
        spool.reader().unwrap().read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        let mut compressed = spool.gzip().unwrap();
        let mut read = Vec::new();
        flate2::read::GzDecoder::new(compressed.reader().unwrap()).read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_spool_gives_back_what_it_got() {
        check(b"");
        check(b"hello");
        check(&vec![7; MEMORY_MAX + 12345]);
    }
}
