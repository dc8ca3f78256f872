//! The archive out of its parts, after the thaw.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use stasis_checkpoint::{ArchiveWriter, Codec, Dialect, Error, Form, Member, Written, limits};
use stasis_criu::{DumpStats, Stats};
use stasis_shim_api::{Compression, ShimError};

use super::Work;
use super::drain::Drained;
use super::estimate::Space;
use super::exhausted;
use super::job::{Event, Job, emit, internal};
use super::layer::{Copied, Spool, copy_error, is_full};
use super::stop::Stop;

/// A statistics file has less than 1 KiB.
const STATS_MAX: u64 = 64 * 1024;

/// What was taken in the freeze beside CRIU's small images, which are files.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The writable layer and other directories, uncompressed.
    pub(crate) copied: Copied,
    /// Memory.
    pub(crate) drained: Drained,
    /// The container's log, and how long it was.
    pub(crate) log: Option<(File, u64)>,
}

/// Opens the container's log, before the freeze: it may be rotated at any time.
pub(crate) fn open_log(job: &Job) -> Result<Option<File>, ShimError> {
    let Some(path) = &job.request.log else { return Ok(None) };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match open(path, flags, Mode::empty()) {
        Ok(file) => Ok(Some(File::from(file))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(internal(format!("cannot open the log {}: {error}", path.display()))),
    }
}

/// The log with its length now; what comes later is not the checkpoint's.
pub(crate) fn measured(log: File) -> Result<(File, u64), ShimError> {
    let length =
        log.metadata().map_err(|error| internal(format!("cannot look at the container's log: {error}")))?.len();
    Ok((log, length))
}

/// What is archived of a log: of a very long one as much of its end as a restore carries over.
fn last_lines((mut file, length): (File, u64)) -> Result<(File, u64), ShimError> {
    let left = stasis_sys::file::seek_to_last_lines(&mut file, length, limits::LOG_CARRIED_MAX);
    let left = left.map_err(|error| internal(format!("cannot read the container's log: {error}")))?;
    Ok((file, left))
}

/// Writes the archive under a temporary name, makes it durable and names it.
pub(crate) fn write(job: &Job, work: &Work, parts: Parts, space: &Space, stop: &Stop) -> Result<Written, ShimError> {
    let mut spools = parts.copied.trees;
    let layer = parts.copied.layer.gzip().map_err(|error| copy_error(error, "compress the layer"))?;
    spools.push((Member::RootfsDiff, layer));
    let log = parts.log.filter(|(_, length)| *length > 0).map(last_lines).transpose()?;
    let files = files(job, work)?;
    let pages: u64 = parts.drained.images.iter().map(|image| image.bytes).sum();
    let small: u64 = files.iter().map(|(_, path)| fs::metadata(path).map_or(0, |facts| facts.len()) + 1024).sum();
    let copied: u64 = spools.iter().map(|(_, spool)| spool.length()).sum();
    let log_bytes = log.as_ref().map_or(0, |(_, length)| *length);
    let expected = small + copied + log_bytes + pages + 512 * 1024;
    let form = form(job);
    // What is compressed takes its space as it comes.
    space.check(if form.codec.is_some() { 0 } else { expected })?;
    let mut writer = ArchiveWriter::create_as(&job.request.archive, expected, form).map_err(archive_error)?;
    let mut pace = Pace { stop, space, done: 0, expected };
    pace.tell();
    let mut contents = Contents { files, spools, log, drained: &parts.drained };
    for member in contents.members() {
        pace.step(0)?;
        contents.write(&member, &mut writer, &mut pace)?;
    }
    pace.step(0)?;
    let sealed = writer.seal().map_err(archive_error)?;
    // The caller may have been told meanwhile that the time is over: then there is no archive.
    stop.check()?;
    sealed.publish().map_err(archive_error)
}

fn form(job: &Job) -> Form {
    let codec = match job.request.compression {
        Compression::None => None,
        Compression::Zstd { level, threads } => Some(Codec::Zstd { level, threads }),
        Compression::Lz4 => Some(Codec::Lz4),
    };
    Form { codec, digest: job.request.digest }
}

/// Looks now and then whether to go on, and says how far it is.
struct Pace<'a> {
    stop: &'a Stop,
    space: &'a Space,
    done: u64,
    expected: u64,
}

impl Pace<'_> {
    /// `bytes` more are about to be written.
    fn step(&mut self, bytes: u64) -> Result<(), ShimError> {
        self.stop.check()?;
        // However small the pieces are, the shim is told at most once a step.
        if Space::is_step(self.done, bytes) {
            self.space.check(0)?;
            self.tell();
        }
        self.done += bytes;
        Ok(())
    }

    fn tell(&self) {
        emit(&Event::Writing { bytes_done: self.done, bytes_total: self.expected });
    }
}

/// What each member is made of.
struct Contents<'a> {
    files: Vec<(Member, PathBuf)>,
    spools: Vec<(Member, Spool)>,
    log: Option<(File, u64)>,
    drained: &'a Drained,
}

impl Contents<'_> {
    /// All members in the order of the format.
    fn members(&self) -> Vec<Member> {
        let mut members: Vec<Member> = self.files.iter().map(|(member, _)| member.clone()).collect();
        members.extend(self.spools.iter().map(|(member, _)| member.clone()));
        members.extend(self.log.as_ref().map(|_| Member::Log(Dialect::Containerd)));
        members.extend(self.drained.images.iter().map(|image| Member::Image(image.name.clone())));
        members.sort_by_key(Member::order);
        members
    }

    fn write(&mut self, member: &Member, writer: &mut ArchiveWriter, pace: &mut Pace<'_>) -> Result<(), ShimError> {
        if let Some(image) = self.drained.images.iter().find(|image| member == &Member::Image(image.name.clone())) {
            writer.begin(member, image.bytes).map_err(archive_error)?;
            return self
                .drained
                .copy(image, writer, |bytes| pace.step(bytes).map_err(Failure::Stopped))
                .map_err(ShimError::from);
        }
        if let Some((_, spool)) = self.spools.iter_mut().find(|(known, _)| known == member) {
            let length = spool.length();
            let reader = spool.reader().map_err(|error| copy_error(error, "read the copied files"))?;
            return writer.add_from(member, length, reader).map_err(archive_error);
        }
        if let (Member::Log(_), Some((file, length))) = (member, &self.log) {
            return writer.add_from(member, *length, file).map_err(archive_error);
        }
        let Some((_, path)) = self.files.iter().find(|(known, _)| known == member) else { return Ok(()) };
        let failed = |error| internal(format!("cannot read {}: {error}", path.display()));
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        writer.add_from(member, length, file).map_err(archive_error)
    }
}

/// Why a copy of pages ended.
enum Failure {
    Stopped(ShimError),
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Failure> for ShimError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Stopped(error) => error,
            Failure::Io(error) => copy_error(error, "write the memory of the checkpoint"),
        }
    }
}

/// Members that are files already: those of the caller, CRIU's small images, its statistics and its log.
fn files(job: &Job, work: &Work) -> Result<Vec<(Member, PathBuf)>, ShimError> {
    let mut files = list(&job.request.members, "")?;
    files.extend(list(&work.images, "checkpoint/")?);
    for (name, member) in [("stats-dump", Member::StatsDump), ("dump.log", Member::DumpLog)] {
        let path = work.logs.join(name);
        if path.is_file() {
            files.push((member, path));
        }
    }
    Ok(files)
}

/// The regular files of `dir` as members below `prefix`; FIFOs are page images, which are drained already.
fn list(dir: &Path, prefix: &str) -> Result<Vec<(Member, PathBuf)>, ShimError> {
    let failed = |error| internal(format!("cannot list {}: {error}", dir.display()));
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_type().map_err(failed)?.is_file() {
            continue;
        }
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let member = Member::parse(&name);
        let unknown = || internal(format!("{} has no place in an archive", entry.path().display()));
        files.push((member.ok_or_else(unknown)?, entry.path()));
    }
    Ok(files)
}

/// CRIU's statistics; zeros if there are none.
pub(crate) fn stats(work: &Work) -> DumpStats {
    let file = stasis_sys::path::read_limited(&work.logs.join("stats-dump"), STATS_MAX).unwrap_or_default();
    Stats::decode(&file).ok().and_then(|stats| stats.dump).unwrap_or_default()
}

fn archive_error(error: Error) -> ShimError {
    match &error {
        Error::Io { source, .. } if is_full(source) => exhausted(error),
        Error::NoSpace { .. } => exhausted(error),
        _ => internal(error),
    }
}
