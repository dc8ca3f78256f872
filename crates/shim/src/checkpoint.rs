//! Checkpoints: plain CRIU images as containerd asks for them, and our archives, which a worker process writes.
//!
//! The worker (see [`crate::dump`]) freezes, dumps and copies; here it is watched. A frozen container always runs again:
//! on the worker's word, its failure, its death and when its time is up, the shim itself thaws, by its own clock. A
//! marker on disk says so to whoever comes after us if the shim dies too.

use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::shim::oci;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use stasis_cgroup::{Cgroup, Cgroups, Mode};
use stasis_criu::OperationConfig;
use stasis_oci_runtime::{CgroupMode, CheckpointOptions};
use stasis_shim_api::{CheckpointProgress, CheckpointReport, CheckpointRequest, layout};
use stasis_sys::file::write_atomic;
use stasis_sys::path::read_limited;
use stasis_sys::process::{self, prepare};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::bundle::write_criu_config;
use crate::careful;
use crate::container::Container;
use crate::dump::{Event, Job};
use crate::error::Error;
use crate::journal;
use crate::process::State;
use crate::reaper::Ended;
use crate::restore::{explain, surroundings};
use crate::server::Shim;

/// First argument of the shim's program that makes it the worker.
pub(crate) const WORKER_COMMAND: &str = "dump";

/// How long `runc checkpoint` may take for plain images: memory goes out at about 2 GB/s here, to a slow disk at a tenth.
const IMAGES_LIMIT: Duration = Duration::from_secs(600);

/// How long the worker, and CRIU below it, have to end by themselves once their time is up. A CRIU that is killed while
/// it holds TCP connections breaks them, so it is left to finish as long as that is bearable.
const WORKER_GRACE: Duration = Duration::from_secs(10);

/// How long CRIU may outlive a worker that died under it. Without connections to break it is killed then: its processes
/// run on, and nobody reads the pages that it waits to write.
const ORPHAN_GRACE: Duration = Duration::from_millis(200);

/// How long a thaw may be repeated until the kernel says that it worked; it takes microseconds.
const THAW_LIMIT: Duration = Duration::from_secs(10);

/// The pause between two looks at something that takes a moment.
const PAUSE: Duration = Duration::from_millis(5);

/// More than this a worker never has to say.
const EVENTS_MAX: u64 = 1 << 20;

/// Largest marker that is read.
const MARKER_MAX: u64 = 64 * 1024;

/// What is left behind for whoever finds a container frozen and nobody at work.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    /// Path of the container's cgroup below the root of every hierarchy.
    cgroup: String,
}

/// Writes the archive that `request` asks for.
pub(crate) async fn checkpoint(shim: &Arc<Shim>, request: CheckpointRequest) -> Result<CheckpointReport, Error> {
    let deadline = Instant::now() + Duration::from_millis(request.timeout_ms);
    let container = shim.container(&request.id)?;
    let _operation = container.begin("a checkpoint")?;
    check_running(&container)?;
    let cgroup = container.existing_cgroup()?;
    let marker = write_marker(&shim.dir, &request, cgroup)?;
    let work_dir = shim.dir.join(format!("dump-{}", request.id));

    let outcome = match make_private_dir(&work_dir) {
        Ok(()) => watch_worker(shim, &container, cgroup, &request, &work_dir, deadline).await,
        Err(error) => Err(error),
    };
    let thawed = thaw(cgroup).await;
    if outcome.is_err() {
        remove_partial(&request.archive);
    }
    if let Err(error) = fs::remove_dir_all(&work_dir) {
        journal::line(format_args!("removing {}: {error}", work_dir.display()));
    }
    // A marker stays as long as its container may be frozen.
    thawed?;
    fs::remove_file(&marker).map_err(Error::io(format!("removing {}", marker.display())))?;
    let report = outcome?;
    if !request.leave_running {
        container.kill_cgroup().await?;
    }
    Ok(report)
}

/// Writes CRIU's images into the directory `path`, as containerd's Task API has it.
pub(crate) async fn write_images(
    shim: &Arc<Shim>,
    container: &Arc<Container>,
    path: &Path,
    options: &oci::CheckpointOptions,
) -> Result<(), Error> {
    let _operation = container.begin("a checkpoint")?;
    check_running(container)?;
    let cgroup = container.existing_cgroup()?;
    let work = match options.work_path.as_str() {
        "" => container.bundle.dir.join("checkpoint"),
        work => PathBuf::from(work),
    };
    make_private_dir(&work)?;
    make_private_dir(path)?;
    write_criu_config(&container.bundle.dir, &OperationConfig::default())?;
    let mut call = container.runc.checkpoint(
        &container.id,
        &CheckpointOptions {
            image_path: path,
            work_path: &work,
            leave_running: !options.exit,
            tcp_established: options.open_tcp,
            external_unix_sockets: options.external_unix_sockets,
            file_locks: options.file_locks,
            cgroup_mode: Some(match shim.cgroups.mode() {
                Mode::V1 => CgroupMode::Ignore,
                Mode::V2 => CgroupMode::Soft,
            }),
        },
    );
    prepare(call.command(), surroundings(&container.bundle)?);
    let done = shim.reaper.run_captured(call, IMAGES_LIMIT).await;
    // CRIU freezes, and thaws if it lives that long.
    thaw(cgroup).await?;
    match done {
        Err(Error::Runtime(error)) => Err(explain(error, &work.join("dump.log"))),
        done => done.map(drop),
    }
}

/// Thaws what markers of a shim that is gone say may be frozen, and removes them.
pub(crate) async fn thaw_marked(pod_dir: &Path, cgroups: &Cgroups) {
    for (path, cgroup) in marked(pod_dir, cgroups) {
        match thaw(&cgroup).await {
            Ok(()) => drop(fs::remove_file(&path)),
            Err(error) => journal::line(format_args!("thawing {}: {error}", cgroup.path())),
        }
    }
}

/// As [`thaw_marked`], once and without waiting.
pub(crate) fn thaw_marked_now(pod_dir: &Path, cgroups: &Cgroups) {
    for (path, cgroup) in marked(pod_dir, cgroups) {
        match cgroup.thaw() {
            Err(error) if !error.is_not_found() => journal::line(format_args!("thawing {}: {error}", cgroup.path())),
            _ => drop(fs::remove_file(&path)),
        }
    }
}

fn marked(pod_dir: &Path, cgroups: &Cgroups) -> Vec<(PathBuf, Cgroup)> {
    let Ok(entries) = fs::read_dir(pod_dir.join(layout::MARKERS)) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .filter_map(|path| {
            let marker: Option<Marker> = serde_json::from_slice(&read_limited(&path, MARKER_MAX).ok()?).ok();
            if marker.is_none() {
                journal::line(format_args!("{} is no marker", path.display()));
            }
            let cgroup = cgroups.at(&marker?.cgroup);
            Some((path, cgroup))
        })
        .collect()
}

fn check_running(container: &Container) -> Result<(), Error> {
    let id = &container.id;
    match container.init.state() {
        State::Running { .. } if container.is_paused() => {
            Err(Error::Precondition(format!("container {id} is paused: resume it before the checkpoint")))
        }
        State::Running { .. } => Ok(()),
        _ => Err(Error::Precondition(format!("container {id} is not running: there is nothing to checkpoint"))),
    }
}

fn write_marker(pod_dir: &Path, request: &CheckpointRequest, cgroup: &Cgroup) -> Result<PathBuf, Error> {
    let marker = Marker { cgroup: cgroup.path().to_owned() };
    let text = serde_json::to_vec(&marker).map_err(|error| Error::Internal(error.to_string()))?;
    let dir = pod_dir.join(layout::MARKERS);
    make_private_dir(&dir)?;
    let path = dir.join(&request.id);
    write_atomic(&path, &text, 0o600).map_err(Error::io(format!("writing {}", path.display())))?;
    Ok(path)
}

/// Runs the worker until it has said how it went, its time is up, or it is gone. No process of it is left afterwards.
async fn watch_worker(
    shim: &Shim,
    container: &Container,
    cgroup: &Cgroup,
    request: &CheckpointRequest,
    work_dir: &Path,
    deadline: Instant,
) -> Result<CheckpointReport, Error> {
    let job = Job {
        request: request.clone(),
        runc: container.runc.binary.clone(),
        runc_root: container.runc.root.clone(),
        cgroup: cgroup.path().to_owned(),
        netns: container.bundle.joined(stasis_sys::namespace::Kind::Net).map(Path::to_owned),
        bundle: container.bundle.dir.clone(),
        work_dir: work_dir.to_owned(),
    };
    let job = serde_json::to_vec(&job).map_err(|error| Error::Internal(error.to_string()))?;
    let (pid, events) = spawn_worker(&job)?;
    let mut ended = shim.reaper.watch(pid);
    let outcome = match tokio::time::timeout_at(deadline, follow(shim, &request.id, events)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::Deadline(format!(
            "the checkpoint of container {} took longer than {} ms and was given up; the container runs",
            request.id, request.timeout_ms
        ))),
    };
    shim.set_progress(&request.id, None);
    let polite = outcome.as_ref().is_err_and(|error| !matches!(error, Error::Worker(_)));
    end_worker(pid, &mut ended, polite, request.criu.tcp_established.then_some(cgroup)).await;
    outcome
}

fn spawn_worker(job: &[u8]) -> Result<(i32, Receiver), Error> {
    let failed = |error| Error::io("starting the checkpoint worker")(error);
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()));
    let (stdin, job_end) = pipe()?;
    let (events, stdout) = pipe()?;
    if job.len() > rustix::pipe::fcntl_getpipe_size(&job_end).map_err(|error| failed(error.into()))? {
        return Err(Error::Invalid("the checkpoint request is too long".to_owned()));
    }
    // It fits the pipe, so this does not wait for the worker.
    fs::File::from(job_end).write_all(job).map_err(failed)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("containerd-shim-stasis-v1").arg(WORKER_COMMAND).process_group(0);
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout));
    let pid = command.spawn().map_err(failed)?.id().cast_signed();
    drop(command);
    Ok((pid, Receiver::from_owned_fd(events).map_err(failed)?))
}

async fn follow(shim: &Shim, id: &str, events: Receiver) -> Result<CheckpointReport, Error> {
    let progress = |phase: &str, bytes_done, bytes_total| {
        shim.set_progress(id, Some(CheckpointProgress { phase: phase.to_owned(), bytes_done, bytes_total }));
    };
    progress("preparing", 0, 0);
    let mut lines = BufReader::new(events.take(EVENTS_MAX)).lines();
    while let Some(line) = lines.next_line().await.map_err(Error::io("reading from the checkpoint worker"))? {
        match serde_json::from_str(&line) {
            Ok(Event::Frozen) => progress("frozen", 0, 0),
            Ok(Event::Thawed { frozen_us }) => {
                journal::debug(format_args!("thawed after {frozen_us} us"));
                progress("writing", 0, 0);
            }
            Ok(Event::Writing { bytes_done, bytes_total }) => progress("writing", bytes_done, bytes_total),
            Ok(Event::Done { report }) => return Ok(report),
            Ok(Event::Error { error }) => return Err(error.into()),
            Err(error) => return Err(Error::Internal(format!("the checkpoint worker said {line:?}: {error}"))),
        }
    }
    Err(Error::Internal("the checkpoint worker died; the container runs, and nothing was written".to_owned()))
}

/// Ends the worker and everything below it. With `ask`, it is asked first. CRIU may hold connections of `connected`.
async fn end_worker(pid: i32, ended: &mut oneshot::Receiver<Ended>, ask: bool, connected: Option<&Cgroup>) {
    let mut end = Instant::now() + WORKER_GRACE;
    let (mut alive, mut asked) = (true, false);
    while Instant::now() < end {
        if alive && ended.try_recv().is_ok() {
            alive = false;
            end = if connected.is_some() { end } else { end.min(Instant::now() + ORPHAN_GRACE) };
        }
        // Not to the group: CRIU would end there and then.
        if ask && alive && !asked {
            let _ = process::signal(pid, Signal::TERM.as_raw());
            asked = true;
        }
        if matches!(process::group_exists(pid), Ok(false)) {
            // One that ended by itself has let all connections go; nobody knows of CRIU below one that was killed.
            if let Some(cgroup) = connected.filter(|_| ask) {
                hold(cgroup).await;
                careful::end_repair(cgroup);
            }
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
    journal::line(format_args!("the checkpoint worker {pid} did not end and is killed"));
    if let Some(cgroup) = connected {
        hold(cgroup).await;
    }
    let _ = process::signal_group(pid, Signal::KILL);
    if let Some(cgroup) = connected {
        let end = Instant::now() + WORKER_GRACE;
        while matches!(process::group_exists(pid), Ok(true)) && Instant::now() < end {
            tokio::time::sleep(PAUSE).await;
        }
        careful::end_repair(cgroup);
    }
}

/// Freezes the container, which thaws again when its checkpoint ends.
async fn hold(cgroup: &Cgroup) {
    let end = Instant::now() + careful::HOLD_LIMIT;
    while !careful::hold(cgroup) && Instant::now() < end {
        tokio::time::sleep(PAUSE).await;
    }
}

/// Thaws until the kernel says that it runs. A cgroup that is gone has nothing to thaw.
async fn thaw(cgroup: &Cgroup) -> Result<(), Error> {
    let end = Instant::now() + THAW_LIMIT;
    loop {
        let thawed = cgroup.thaw().and_then(|()| cgroup.is_frozen());
        match thawed {
            Ok(false) => return Ok(()),
            Err(error) if error.is_not_found() => return Ok(()),
            Ok(true) if Instant::now() >= end => {
                return Err(Error::Deadline(format!("cgroup {} stays frozen; is a parent of it?", cgroup.path())));
            }
            Err(error) if Instant::now() >= end => return Err(error.into()),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}

fn remove_partial(archive: &Path) {
    let (Some(dir), Some(name)) = (archive.parent(), archive.file_name()) else { return };
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if stasis_checkpoint::is_partial(&entry.file_name(), name) {
            // What cannot be removed is at least not taken for an archive.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn make_private_dir(dir: &Path) -> Result<(), Error> {
    let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(dir);
    made.map_err(Error::io(format!("creating {}", dir.display())))
}
