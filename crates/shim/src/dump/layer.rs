//! The writable layer, and what else is files: copied in the same freeze as the memory, compressed afterwards.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{Mode, OFlags, open};
use stasis_checkpoint::Member;
use stasis_shim_api::{CheckpointRequest, Reason, ShimError, Tree};

use super::exhausted;
use super::job::internal;

/// So much of a layer is kept in memory; most are a few files. More goes to an unnamed file beside the archive.
const MEMORY_MAX: usize = 64 << 20;

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

impl Layer {
    /// Starts to cut the layer whose upper directory is `upper`, and to copy `trees`.
    pub(crate) fn start(upper: &Path, trees: Vec<(Member, Tree)>, archive: &Path) -> Self {
        let (upper, archive) = (upper.to_owned(), archive.to_owned());
        let copy = move || {
            let spool = |dir: &Path| {
                let mut spool = Spool::beside(&archive);
                let stats = stasis_snapshot::write_diff(dir, &mut spool).map_err(io::Error::other)?;
                Ok::<_, io::Error>((spool, stats.entries))
            };
            let mut copied = Copied { layer: spool(&upper)?.0, trees: Vec::new() };
            for (member, tree) in trees {
                let (spool, entries) = spool(&tree.dir)?;
                if entries > 0 || !tree.skip_empty {
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
        copied.map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                exhausted(format!("no space for the container's files: {error}"))
            }
            _ => internal(format!("cannot copy the container's files: {error}")),
        })
    }
}

/// Bytes whose number is not known beforehand: in memory, and from a size on in a file without a name.
#[derive(Debug)]
pub(crate) struct Spool {
    dir: PathBuf,
    memory: Vec<u8>,
    file: Option<File>,
    length: u64,
}

impl Spool {
    fn beside(archive: &Path) -> Self {
        let dir = archive.parent().unwrap_or(Path::new("/")).to_owned();
        Self { dir, memory: Vec::new(), file: None, length: 0 }
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

    /// The same bytes, compressed fast; `between` is called now and then.
    pub(crate) fn gzip(mut self, between: impl FnMut() -> io::Result<()>) -> io::Result<Spool> {
        let compressed = Spool { dir: self.dir.clone(), memory: Vec::new(), file: None, length: 0 };
        let mut encoder = GzEncoder::new(compressed, Compression::fast());
        copy(&mut self.reader()?, &mut encoder, between)?;
        encoder.finish()
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.is_none() && self.memory.len() + bytes.len() > MEMORY_MAX {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let mut file = File::from(open(&self.dir, flags, Mode::RUSR | Mode::WUSR)?);
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

/// Size of the pieces that are copied at once.
const PIECE: usize = 1 << 20;

/// Copies all of `from`; `between` is called between its pieces and ends the copy by an error.
pub(crate) fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    mut between: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        between()?;
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8]) {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::beside(&dir.path().join("a.tar"));
        bytes.chunks(10_000_000).for_each(|chunk| spool.write_all(chunk).unwrap());
        assert_eq!(spool.length(), bytes.len() as u64);
        let mut read = Vec::new();
        spool.reader().unwrap().read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        let mut compressed = spool.gzip(|| Ok(())).unwrap();
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
