//! The archive out of its parts, after the thaw.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use stasis_checkpoint::{ArchiveWriter, Dialect, Error, Form, Member, Written, Zstd};
use stasis_criu::{DumpStats, Stats};
use stasis_shim_api::{Compression, Reason, ShimError};

use super::Work;
use super::drain::Drained;
use super::estimate::Space;
use super::exhausted;
use super::job::{Event, Job, emit, internal};
use super::layer::{Copied, Spool};
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
    /// How long the container's log was.
    pub(crate) log_bytes: u64,
}

/// Length of the container's log now; what comes later is not the checkpoint's. 0 if there is none.
pub(crate) fn log_size(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |facts| if facts.is_file() { facts.len() } else { 0 })
}

/// Writes the archive under a temporary name, makes it durable and names it.
pub(crate) fn write(job: &Job, work: &Work, parts: Parts, space: &Space, stop: &Stop) -> Result<Written, ShimError> {
    let stopped = || stop.check().map_err(io::Error::other);
    let mut spools = parts.copied.trees;
    let layer = parts.copied.layer.gzip(stopped).map_err(|error| write_error(error, "compress the layer"))?;
    spools.push((Member::RootfsDiff, layer));
    let files = files(job, work)?;
    let pages: u64 = parts.drained.images.iter().map(|image| image.bytes).sum();
    let small: u64 = files.iter().map(|(_, path)| log_size(path) + 1024).sum();
    let copied: u64 = spools.iter().map(|(_, spool)| spool.length()).sum();
    let expected = small + copied + parts.log_bytes + pages + 512 * 1024;
    let form = form(job);
    // What is compressed takes its space as it comes.
    space.check(if form.zstd.is_some() { 0 } else { expected })?;
    let mut writer = ArchiveWriter::create_as(&job.request.archive, expected, form).map_err(archive_error)?;
    let mut pace = Pace { stop, space, done: 0, expected };
    let mut contents = Contents { files, spools, log: log(job, parts.log_bytes)?, drained: &parts.drained };
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
    let zstd = match job.request.compression {
        Compression::None => None,
        Compression::Zstd { level, threads } => Some(Zstd { level, threads }),
    };
    Form { zstd, digest: job.request.digest }
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
        if bytes > 0 {
            self.space.check(0)?;
            emit(&Event::Writing { bytes_done: self.done, bytes_total: self.expected });
            self.done += bytes;
        }
        Ok(())
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
            let reader = spool.reader().map_err(|error| write_error(error, "read the copied files"))?;
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
            Failure::Io(error) => write_error(error, "write the memory"),
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

/// The container's log, up to `length`.
fn log(job: &Job, length: u64) -> Result<Option<(File, u64)>, ShimError> {
    let Some(path) = &job.request.log else { return Ok(None) };
    if length == 0 {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map(File::from);
    let file = file.map_err(|error| internal(format!("cannot open the log {}: {error}", path.display())))?;
    // Rotated meanwhile: the rest of it is what there is.
    let length = file.metadata().map_or(0, |facts| facts.len()).min(length);
    Ok(Some((file, length)))
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

fn write_error(error: io::Error, what: &str) -> ShimError {
    if let Some(stopped) = error.get_ref().and_then(|inner| inner.downcast_ref::<ShimError>()) {
        return stopped.clone();
    }
    let reason = if is_full(&error) { Reason::ResourceExhausted } else { Reason::Internal };
    ShimError { reason, message: format!("cannot {what} of the checkpoint: {error}") }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}
