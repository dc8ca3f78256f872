//! Memory pages on their way from CRIU into memory of ours.
//!
//! Each `pages-N.img` is a FIFO in the image directory, opened here before CRIU opens it. CRIU splices the pages of the
//! container into it without copying them, so until they are read here they are the container's own pages: the container
//! must not run before the drain is finished. One thread drains all: CRIU dumps one process after the other.
//!
//! The buffer is reserved and touched before the freeze. What is beyond it goes to an unnamed file beside the archive.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::io::{Errno, read};
use rustix::pipe::fcntl_setpipe_size;
use stasis_shim_api::ShimError;
use stasis_sys::memory::Populated;

use super::estimate::{Estimate, Space};
use super::exhausted;
use super::job::internal;
use super::layer::copy_error;

/// Size of a FIFO's buffer: the most that is allowed without CAP_SYS_RESOURCE (`fs.pipe-max-size`). A smaller one only
/// means more system calls.
const PIPE_BYTES: usize = 1 << 20;

/// The thread that drains, and how it is told that CRIU is done.
#[derive(Debug)]
pub(crate) struct Drain {
    thread: JoinHandle<io::Result<Drained>>,
    done: OwnedFd,
}

/// All pages, and where they are.
#[derive(Debug)]
pub(crate) struct Drained {
    /// The page images that CRIU wrote, by number.
    pub(crate) images: Vec<PageImage>,
    store: Store,
}

/// One `pages-N.img`.
#[derive(Debug)]
pub(crate) struct PageImage {
    /// Name of the file.
    pub(crate) name: String,
    /// Its size.
    pub(crate) bytes: u64,
    extents: Vec<Extent>,
}

/// A piece of a page image.
#[derive(Clone, Copy, Debug)]
struct Extent {
    in_memory: bool,
    start: u64,
    length: u64,
}

/// Where pages are put: memory first, then the file.
#[derive(Debug)]
struct Store {
    memory: Populated,
    used: usize,
    spill: Spill,
    /// Why pages are lost. What comes is still read: CRIU must not find a FIFO closed, and fail for a reason of its own.
    failed: Option<io::Error>,
}

#[derive(Debug)]
struct Spill {
    file: Option<File>,
    dir: OwnedFd,
    length: u64,
    bounce: Vec<u8>,
    space: Space,
}

struct Source {
    fifo: OwnedFd,
    image: PageImage,
    /// CRIU has opened it.
    opened: bool,
    ended: bool,
}

impl Drain {
    /// Makes the FIFOs in `images`, reserves memory and starts the thread.
    pub(crate) fn start(images: &Path, estimate: &Estimate, archive: &Path, space: Space) -> Result<Self, ShimError> {
        let failed = |error: io::Error| internal(format!("cannot prepare for the memory of the container: {error}"));
        let sources = (1..=estimate.images).map(|number| Source::new(images, number)).collect::<io::Result<Vec<_>>>();
        let sources = sources.map_err(failed)?;
        let bytes = usize::try_from(estimate.bytes.min(estimate.budget)).unwrap_or(usize::MAX);
        let memory = Populated::new(bytes).map_err(|error| {
            exhausted(format!("cannot reserve {bytes} bytes of memory for the checkpoint: {error}"))
        })?;
        let dir = archive.parent().unwrap_or(Path::new("/"));
        let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let dir = dir.map_err(|error| failed(error.into()))?;
        let spill = Spill { file: None, dir, length: 0, bounce: Vec::new(), space };
        let store = Store { memory, used: 0, spill, failed: None };
        let done = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let told = done.try_clone().map_err(failed)?;
        let work = move || drain(sources, store, &told);
        let thread = thread::Builder::new().name("drain".to_owned()).spawn(work).map_err(failed)?;
        Ok(Self { thread, done })
    }

    /// Takes what is left in the FIFOs. CRIU has ended.
    pub(crate) fn finish(self) -> Result<Drained, ShimError> {
        rustix::io::write(&self.done, &1u64.to_ne_bytes()).map_err(internal)?;
        let drained = self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
        drained.map_err(|error| copy_error(error, "keep the memory of the container"))
    }
}

impl Drained {
    /// Writes the content of `image` to `out`; `between` is called before each of its pieces, with the piece's size.
    pub(crate) fn copy<E: From<io::Error>>(
        &self,
        image: &PageImage,
        out: &mut impl Write,
        mut between: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = Vec::new();
        for extent in &image.extents {
            let (mut at, end) = (extent.start, extent.start + extent.length);
            while at < end {
                let length = (end - at).min(PIECE) as usize;
                between(length as u64)?;
                out.write_all(self.store.piece(extent.in_memory, at, length, &mut buffer)?)?;
                at += length as u64;
            }
        }
        Ok(())
    }
}

/// Size of the pieces that are written at once: large enough for several writes on their way at a time, small enough to
/// hear soon that the checkpoint is called off.
const PIECE: u64 = 64 << 20;

impl Source {
    fn new(images: &Path, number: usize) -> io::Result<Self> {
        let name = format!("pages-{number}.img");
        let path = images.join(&name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let fifo = open(&path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        // As large as the system allows; what it is by default works too.
        let _ = fcntl_setpipe_size(&fifo, PIPE_BYTES);
        let image = PageImage { name, bytes: 0, extents: Vec::new() };
        Ok(Self { fifo, image, opened: false, ended: false })
    }

    /// Reads what is there now.
    fn drain(&mut self, store: &mut Store) -> io::Result<()> {
        loop {
            match store.take(&self.fifo)? {
                Taken::Nothing => return Ok(()),
                Taken::End => {
                    self.ended = true;
                    return Ok(());
                }
                Taken::Extent(extent) => self.image.add(extent),
            }
        }
    }
}

impl PageImage {
    fn add(&mut self, extent: Extent) {
        self.bytes += extent.length;
        match self.extents.last_mut() {
            Some(last) if last.in_memory == extent.in_memory && last.start + last.length == extent.start => {
                last.length += extent.length;
            }
            _ => self.extents.push(extent),
        }
    }
}

enum Taken {
    Nothing,
    End,
    Extent(Extent),
}

impl Store {
    /// Reads once from `fifo`.
    fn take(&mut self, fifo: &OwnedFd) -> io::Result<Taken> {
        let in_memory = self.used < self.memory.len();
        let result = match in_memory {
            true => read(fifo, &mut self.memory[self.used..]),
            false => {
                self.spill.bounce.resize(PIPE_BYTES, 0);
                read(fifo, &mut self.spill.bounce)
            }
        };
        let length = match result {
            Ok(0) => return Ok(Taken::End),
            Ok(length) => length,
            Err(Errno::AGAIN) => return Ok(Taken::Nothing),
            Err(Errno::INTR) => return self.take(fifo),
            Err(error) => return Err(error.into()),
        };
        let start = match in_memory {
            true => self.used as u64,
            false if self.failed.is_some() => 0,
            false => self.spill.append(length).unwrap_or_else(|error| {
                self.failed = Some(error);
                0
            }),
        };
        if in_memory {
            self.used += length;
        }
        Ok(Taken::Extent(Extent { in_memory, start, length: length as u64 }))
    }

    fn piece<'a>(&'a self, in_memory: bool, at: u64, length: usize, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        if in_memory {
            let at = at as usize;
            return Ok(&self.memory[at..at + length]);
        }
        let file = self.spill.file.as_ref().ok_or_else(|| io::Error::other("there is no spill file"))?;
        buffer.resize(length, 0);
        file.read_exact_at(buffer, at)?;
        Ok(buffer)
    }
}

impl Spill {
    /// Appends the first `length` bytes of the bounce buffer and gives the offset at which they are.
    fn append(&mut self, length: usize) -> io::Result<u64> {
        let file = match &self.file {
            Some(file) => file,
            None => {
                let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&self.dir, ".", flags, Mode::RUSR | Mode::WUSR)?;
                self.file.insert(file.into())
            }
        };
        let at = self.length;
        self.space.check_step(at, length as u64).map_err(io::Error::other)?;
        file.write_all_at(&self.bounce[..length], at)?;
        self.length += length as u64;
        Ok(at)
    }
}

/// Body of the thread.
fn drain(mut sources: Vec<Source>, mut store: Store, done: &OwnedFd) -> io::Result<Drained> {
    let mut finishing = false;
    while !finishing {
        finishing = wait(&mut sources, done)?;
        for source in sources.iter_mut().filter(|source| source.opened && !source.ended) {
            source.drain(&mut store)?;
        }
    }
    if let Some(error) = store.failed.take() {
        return Err(error);
    }
    // CRIU has closed what it opened; one that it closed without a byte was opened all the same.
    let images = sources.into_iter().filter(|source| source.opened).map(|source| source.image).collect();
    Ok(Drained { images, store })
}

/// Waits for pages; true when CRIU has ended and there are no more than those that are there now.
fn wait(sources: &mut [Source], done: &OwnedFd) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(done, PollFlags::IN)];
    let waiting: Vec<usize> = (0..sources.len()).filter(|at| !sources[*at].ended).collect();
    fds.extend(waiting.iter().map(|at| PollFd::from_borrowed_fd(sources[*at].fifo.as_fd(), PollFlags::IN)));
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let events: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
    for (at, events) in waiting.iter().zip(&events[1..]) {
        // A FIFO that nobody has opened yet reports nothing, not even that nobody writes.
        sources[*at].opened |= !events.is_empty();
    }
    Ok(!events[0].is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn check(bytes: u64, sizes: &[usize]) {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let estimate = Estimate { bytes, budget: bytes, images: sizes.len() + 2 };
        let archive = dir.path().join("a.tar");
        let drain = Drain::start(&images, &estimate, &archive, Space::beside(&archive, 0)).unwrap();
        let content = |number: usize, size: usize| (0..size).map(|at| (at / 7 + number) as u8).collect::<Vec<u8>>();
        for (index, size) in sizes.iter().enumerate() {
            let path = images.join(format!("pages-{}.img", index + 1));
            OpenOptions::new().write(true).open(path).unwrap().write_all(&content(index, *size)).unwrap();
        }
        let drained = drain.finish().unwrap();
        assert_eq!(drained.images.len(), sizes.len(), "the FIFOs that nobody opened are no images");
        for (index, image) in drained.images.iter().enumerate() {
            let mut out = Vec::new();
            drained.copy(image, &mut out, |_| Ok::<_, io::Error>(())).unwrap();
            assert_eq!((image.bytes as usize, image.name.clone()), (sizes[index], format!("pages-{}.img", index + 1)));
            assert!(out == content(index, sizes[index]));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the spill file has no name");
    }

    #[test]
    fn pages_that_find_no_space_are_read_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let estimate = Estimate { bytes: 1, budget: 1, images: 1 };
        let archive = dir.path().join("a.tar");
        // The reserve is all that there is, so the first look finds too little.
        let drain = Drain::start(dir.path(), &estimate, &archive, Space::beside(&archive, u64::MAX)).unwrap();
        let mut fifo = OpenOptions::new().write(true).open(dir.path().join("pages-1.img")).unwrap();
        // Far more than the FIFO holds: it is read to the end all the same.
        fifo.write_all(&vec![1; 200 << 20]).unwrap();
        drop(fifo);
        let error = drain.finish().unwrap_err();
        assert_eq!(error.reason, stasis_shim_api::Reason::ResourceExhausted, "{error}");
    }

    #[test]
    fn pages_are_kept_in_memory() {
        check(16 << 20, &[5 << 20, 0, 4096, 3 << 20]);
    }

    #[test]
    fn pages_beyond_the_budget_go_to_the_disk() {
        check(1, &[5 << 20, 4096, 3 << 20]);
    }
}
