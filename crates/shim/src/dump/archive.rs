//! The archive out of its parts, after the thaw.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use stasis_checkpoint::{ArchiveWriter, Dialect, Error, Member};
use stasis_criu::Stats;
use stasis_shim_api::{Reason, ShimError};

use super::Work;
use super::drain::Drained;
use super::exhausted;
use super::job::{Job, internal};
use super::layer::Spool;
use super::stop::Stop;

/// A statistics file has less than 1 KiB.
const STATS_MAX: u64 = 64 * 1024;

/// What was taken in the freeze beside CRIU's small images, which are files.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The writable layer, uncompressed.
    pub(crate) layer: Spool,
    /// Memory.
    pub(crate) drained: Drained,
    /// How long the container's log was.
    pub(crate) log_bytes: u64,
}

/// What was written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    /// Size of the archive.
    pub(crate) bytes: u64,
    /// Pages of memory, as CRIU counts.
    pub(crate) pages: u64,
}

/// Length of the container's log now; what comes later is not the checkpoint's. 0 if there is none.
pub(crate) fn log_size(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |facts| if facts.is_file() { facts.len() } else { 0 })
}

/// Writes the archive under a temporary name, makes it durable and names it.
pub(crate) fn write(job: &Job, work: &Work, parts: Parts, stop: &Stop) -> Result<Written, ShimError> {
    let stopped = || stop.check().map_err(io::Error::other);
    let layer = parts.layer.gzip(stopped).map_err(|error| write_error(error, "compress the layer"))?;
    let files = files(job, work)?;
    let pages: u64 = parts.drained.images.iter().map(|image| image.bytes).sum();
    let small: u64 = files.iter().map(|(_, path)| log_size(path) + 1024).sum();
    let expected = small + layer.length() + parts.log_bytes + pages + 512 * 1024;
    let mut writer = ArchiveWriter::create(&job.request.archive, expected).map_err(archive_error)?;
    let mut contents = Contents { files, layer: Some(layer), log: log(job, parts.log_bytes)?, drained: &parts.drained };
    for member in contents.members() {
        stop.check()?;
        contents.write(&member, &mut writer, stop)?;
    }
    let bytes = writer.finish().map_err(archive_error)?;
    Ok(Written { bytes, pages: pages_written(work) })
}

/// What each member is made of.
struct Contents<'a> {
    files: Vec<(Member, PathBuf)>,
    layer: Option<Spool>,
    log: Option<(File, u64)>,
    drained: &'a Drained,
}

impl Contents<'_> {
    /// All members in the order of the format.
    fn members(&self) -> Vec<Member> {
        let mut members: Vec<Member> = self.files.iter().map(|(member, _)| member.clone()).collect();
        members.push(Member::RootfsDiff);
        members.extend(self.log.as_ref().map(|_| Member::Log(Dialect::Containerd)));
        members.extend(self.drained.images.iter().map(|image| Member::Image(image.name.clone())));
        members.sort_by_key(Member::order);
        members
    }

    fn write(&mut self, member: &Member, writer: &mut ArchiveWriter, stop: &Stop) -> Result<(), ShimError> {
        if let Some(image) = self.drained.images.iter().find(|image| member == &Member::Image(image.name.clone())) {
            writer.begin(member, image.bytes).map_err(archive_error)?;
            return self
                .drained
                .copy(image, writer, || stop.check().map_err(Failure::Stopped))
                .map_err(ShimError::from);
        }
        if member == &Member::RootfsDiff {
            let Some(mut layer) = self.layer.take() else { return Ok(()) };
            let length = layer.length();
            let reader = layer.reader().map_err(|error| write_error(error, "read the layer"))?;
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

fn pages_written(work: &Work) -> u64 {
    let file = stasis_sys::path::read_limited(&work.logs.join("stats-dump"), STATS_MAX).unwrap_or_default();
    let stats = Stats::decode(&file).ok().and_then(|stats| stats.dump);
    stats.map_or(0, |dump| dump.pages_written + dump.shpages_written)
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
