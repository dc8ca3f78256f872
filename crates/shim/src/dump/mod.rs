//! The checkpoint worker: a process of its own that freezes a container, copies it, lets it go, and writes the archive.
//!
//! ```text
//! before    tmpfs of its own · memory reserved and touched · FIFOs for the pages · runc and CRIU started, held at a gate
//! frozen    freezer · gate opened · CRIU dumps into the FIFOs, they are drained into memory · writable layer copied
//! after     thaw · compress, write past the page cache, fsync, rename
//! ```
//!
//! What can be done before or after the freeze is not done inside it. CRIU streams its pages with nothing changed in it: it
//! opens `pages-N.img` for writing, and what lies there is a FIFO.
//!
//! The worker is told what to do by one JSON document on its standard input and says how it goes by JSON lines on its
//! standard output. It runs in a mount namespace of its own, so everything it mounts ends with it. However it ends, it
//! thaws first; if it is killed, the shim thaws.

mod archive;
mod drain;
mod engine;
mod estimate;
mod frozen;
mod gate;
mod job;
mod layer;
mod stop;

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::{Signal, setpriority_process};
use stasis_cgroup::{Cgroup, Cgroups, Mode};
use stasis_checkpoint::Written;
use stasis_criu::preflight::{Allowed, GHOST_LIMIT, Severity, examine};
use stasis_criu::{NetworkLock, OperationConfig, kdat};
use stasis_shim_api::{CheckpointReport, Reason, ShimError};
use stasis_sys::{mount, process, thread};

use archive::Parts;
use drain::Drain;
use engine::Engine;
use estimate::{Estimate, Space};
use frozen::Frozen;
use gate::Gate;
use job::internal;
pub(crate) use job::{Event, Job};
use layer::Layer;
use stop::Stop;

/// Entry of the worker process.
pub(crate) fn main() -> ExitCode {
    let started = Instant::now();
    let outcome = Job::read().and_then(|job| run(&job, started));
    match outcome {
        Ok(report) => {
            job::emit(&Event::Done { report });
            ExitCode::SUCCESS
        }
        Err(error) => {
            job::emit(&Event::Error { error });
            ExitCode::FAILURE
        }
    }
}

/// How often a dump is tried that fails for a moment's reason: a process slips between vfork and exec, a connection is not
/// accepted yet.
const ATTEMPTS: u32 = 3;
/// How long CRIU may take to stop all processes; the container stands still meanwhile. They are frozen already, and 300
/// take a tenth of a second.
const STOP_SECONDS: u32 = 3;

/// So many findings fit an error message that is still read; `stasis checkpoint preflight` shows all.
const FINDINGS_MAX: usize = 5;

fn run(job: &Job, started: Instant) -> Result<CheckpointReport, ShimError> {
    let stop = Arc::new(Stop::new(started, job.request.timeout_ms)?);
    let cgroups = Cgroups::probe().map_err(internal)?;
    let cgroup = cgroups.at(&job.cgroup);
    prepare(job)?;
    let estimate = Estimate::of(&cgroup, job.request.buffer_max)?;
    let space = Space::beside(&job.request.archive, job.request.space_reserve);
    let files = layer::bytes(&job.request)?;
    space.check(estimate.bytes.saturating_add(files))?;
    check_possible(job, &cgroup)?;
    let mode = cgroup_mode(job, cgroups.mode());
    let mut attempt = 1;
    let (work, parts, frozen) = loop {
        let work = Work::create(&job.work_dir.join(attempt.to_string()))?;
        match dump(job, &work, &cgroup, mode, &Room { estimate, space: &space }, &stop) {
            Ok((parts, frozen)) => break (work, parts, frozen),
            Err(failed) if failed.passing && attempt < ATTEMPTS => attempt += 1,
            Err(failed) => return Err(keep_log(job, &work, failed.error)),
        }
    };
    let (written, frozen_us) = if job.request.leave_running {
        let frozen_us = frozen.thaw()?;
        (finish(job, &work, parts, &space, &stop)?, frozen_us)
    } else {
        let written = finish(job, &work, parts, &space, &stop)?;
        // Not one instruction runs after the checkpoint.
        cgroup.kill_all().map_err(internal)?;
        (written, frozen.thaw()?)
    };
    Ok(report(&work, written, frozen_us, started))
}

/// Refuses what CRIU would refuse, while nothing is frozen yet.
fn check_possible(job: &Job, cgroup: &Cgroup) -> Result<(), ShimError> {
    let criu = &job.request.criu;
    let allowed = Allowed {
        tcp: criu.tcp_established || criu.tcp_close,
        file_locks: criu.file_locks,
        link_remap: criu.link_remap,
        ghost_limit: criu.ghost_limit.unwrap_or(GHOST_LIMIT),
    };
    let findings = examine(&cgroup.procs().map_err(internal)?, &allowed);
    let blocks: Vec<_> = findings.iter().filter(|finding| finding.severity == Severity::Blocks).collect();
    if blocks.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<String> = blocks.iter().take(FINDINGS_MAX).map(ToString::to_string).collect();
    if blocks.len() > FINDINGS_MAX {
        lines.push(format!("and {} more", blocks.len() - FINDINGS_MAX));
    }
    let message = format!("the container cannot be checkpointed now, and was not frozen: {}", lines.join("; "));
    Err(ShimError { reason: Reason::FailedPrecondition, message })
}

/// What there is for the memory of the container.
struct Room<'a> {
    estimate: Estimate,
    space: &'a Space,
}

/// Why one attempt failed; the container runs again.
struct Failed {
    error: ShimError,
    /// Whether another attempt may succeed.
    passing: bool,
}

impl From<ShimError> for Failed {
    fn from(error: ShimError) -> Self {
        Self { error, passing: false }
    }
}

/// Freezes the container and copies it. It is still frozen when this returns.
fn dump(
    job: &Job,
    work: &Work,
    cgroup: &Cgroup,
    mode: stasis_oci_runtime::CgroupMode,
    room: &Room<'_>,
    stop: &Arc<Stop>,
) -> Result<(Parts, Frozen), Failed> {
    let trees = layer::trees(&job.request)?;
    let text = config(job).text().map_err(internal)?;
    let log = archive::open_log(job)?;
    let gate = Gate::close(&job.bundle, &work.gate)?;
    let mut engine = Engine::start(job, work, cgroup, mode)?;
    let drain = Drain::start(&work.images, &room.estimate, &job.request.archive, room.space.clone())?;
    // CRIU has started meanwhile and waits for its configuration.
    let open = match gate.wait(&mut engine, stop)? {
        Some(open) => open,
        None => return Err(engine.failure(&work.logs)),
    };
    let frozen = Frozen::freeze(cgroup, stop)?;
    let layer = Layer::start(&job.request.upper, trees, room.space.clone(), Arc::clone(stop));
    open.let_through(&text)?;
    let ended = engine.finish(stop);
    if !matches!(ended, Ok(true)) {
        drop(frozen);
        // Their memory is free before another attempt takes as much.
        let _ = layer.finish();
        return Err(match (ended, drain.finish()) {
            (Err(stopped), _) => stopped.into(),
            (_, Err(full)) => full.into(),
            _ => engine.failure(&work.logs),
        });
    }
    let copied = layer.finish();
    let log = log.map(archive::measured).transpose()?;
    let drained = drain.finish()?;
    frozen.check()?;
    Ok((Parts { copied: copied?, drained, log }, frozen))
}

/// Writes the archive while the container runs again, or before it is ended.
fn finish(job: &Job, work: &Work, parts: Parts, space: &Space, stop: &Stop) -> Result<Written, ShimError> {
    let _ = setpriority_process(None, 0);
    archive::write(job, work, parts, space, stop)
}

fn report(work: &Work, written: Written, frozen_us: u64, started: Instant) -> CheckpointReport {
    let stats = archive::stats(work);
    CheckpointReport {
        frozen_us,
        total_us: job::micros(started.elapsed()),
        archive_bytes: written.bytes,
        pages_written: stats.pages_written + stats.shpages_written,
        freezing_us: stats.freezing_time,
        criu_frozen_us: stats.frozen_time,
        memory_dump_us: stats.memdump_time,
        memory_write_us: stats.memwrite_time,
        digest: written.digest,
        diff_id: written.diff_id,
    }
}

/// Keeps CRIU's log where the caller wants it, and says so in the error.
fn keep_log(job: &Job, work: &Work, mut error: ShimError) -> ShimError {
    let Some(path) = &job.request.failure_log else { return error };
    let Some(log) = engine::read_tail(&work.logs.join("dump.log")) else { return error };
    let kept = stasis_sys::file::write_atomic(path, log.as_bytes(), 0o600);
    match kept {
        Ok(()) => error.message.push_str(&format!("; the log of CRIU is {}", path.display())),
        Err(failed) => error.message.push_str(&format!("; the log of CRIU could not be kept: {failed}")),
    }
    error
}

/// Where the worker keeps things, all below one tmpfs.
struct Work {
    images: PathBuf,
    logs: PathBuf,
    gate: PathBuf,
    runtime_logs: PathBuf,
    /// Programs that CRIU finds before the node's own.
    programs: PathBuf,
}

impl Work {
    /// Makes the directories of one attempt.
    fn create(dir: &Path) -> Result<Self, ShimError> {
        let sub = |name: &str| -> Result<PathBuf, ShimError> {
            let path = dir.join(name);
            fs::create_dir_all(&path)
                .map_err(|error| internal(format!("cannot create {} for the checkpoint: {error}", path.display())))?;
            Ok(path)
        };
        let (images, logs, runtime_logs, programs) = (sub("images")?, sub("logs")?, sub("runtime")?, sub("programs")?);
        // Without it the node's own is found.
        if let Ok(shim) = std::env::current_exe() {
            let _ = std::os::unix::fs::symlink(shim, programs.join(crate::tar::NAME));
        }
        Ok(Self { images, logs, gate: dir.join("criu.conf"), runtime_logs, programs })
    }

    /// `PATH` for CRIU.
    fn path(&self) -> Result<OsString, ShimError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let programs = std::iter::once(self.programs.clone()).chain(std::env::split_paths(&path));
        std::env::join_paths(programs).map_err(|error| internal(format!("cannot put PATH together: {error}")))
    }
}

/// Small images and logs: 7 files of 10 KiB a process and 1 MiB of log a GiB; also pages beyond the FIFOs.
const WORK_BYTES: u64 = 4 << 30;

/// Priority of the worker and of CRIU until the thaw: nobody waits longer than a frozen container.
const PRIORITY: i32 = -10;

/// OOM score adjustment of the worker and of CRIU: a checkpoint that is given up costs less than a pod.
const OOM_SCORE_ADJ: &str = "500";

/// Moves the process to where the dump is taken, while it has one thread, and mounts its tmpfs.
fn prepare(job: &Job) -> Result<(), ShimError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| internal(format!("cannot {what} for the checkpoint: {error}"))
    };
    // The shim's own would spare this process and its gigabytes before every pod of the node. Raising it is always allowed.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
    // Where this is not allowed the freeze is longer, and nothing worse.
    let _ = setpriority_process(None, PRIORITY);
    process::become_subreaper().map_err(failed("become the parent of CRIU"))?;
    // The shim is gone: nobody waits for an archive, and the container must not stay frozen.
    let died = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    died.map_err(|error| failed("ask for the shim's death signal")(error.into()))?;
    if let Some(netns) = &job.netns {
        let entered = File::open(netns).and_then(thread::enter);
        entered.map_err(failed(&format!("enter the network namespace {}", netns.display())))?;
    }
    thread::private_mounts().map_err(failed("make a mount namespace"))?;
    let dir = &job.work_dir;
    mount::tmpfs(dir, WORK_BYTES, 0o700, &[]).map_err(failed("mount a tmpfs"))?;
    use_probe_cache(&job.runc_root);
    Ok(())
}

/// Without the cache CRIU probes the kernel for 30 ms, which is slower and nothing worse.
fn use_probe_cache(dir: &Path) {
    if let Ok(Some(cache)) = kdat::ensure(Path::new("criu"), dir) {
        let _ = kdat::bind(&cache);
    }
}

fn config(job: &Job) -> OperationConfig {
    let options = &job.request.criu;
    let outside = job.netns.is_none();
    OperationConfig {
        // Inside the pod's network namespace CRIU locks nothing; on the host's network the peers must be kept out.
        network_lock: if outside && options.tcp_established { NetworkLock::Nftables } else { NetworkLock::Skip },
        file_locks: options.file_locks,
        tcp_established: options.tcp_established,
        tcp_close: options.tcp_close,
        skip_in_flight: options.skip_in_flight,
        link_remap: options.link_remap,
        shell_job: options.shell_job,
        external_unix_sockets: options.external_unix_sockets,
        skip_mounts: options.skip_mounts.clone(),
        ghost_limit: options.ghost_limit,
        stop_seconds: Some(STOP_SECONDS),
        ..OperationConfig::default()
    }
}

/// A private cgroup namespace is lost unless its cgroups are recorded (`soft`); without one, recording them costs 7 ms
/// of freeze on version 1. Other runtimes restore with `soft` and fail without the record.
fn cgroup_mode(job: &Job, mode: Mode) -> stasis_oci_runtime::CgroupMode {
    match mode {
        Mode::V1 if !job.request.criu.record_cgroups && !job.has_cgroup_namespace() => {
            stasis_oci_runtime::CgroupMode::Ignore
        }
        _ => stasis_oci_runtime::CgroupMode::Soft,
    }
}

/// An error of kind [`Reason::ResourceExhausted`].
fn exhausted(message: impl std::fmt::Display) -> ShimError {
    ShimError { reason: Reason::ResourceExhausted, message: message.to_string() }
}
