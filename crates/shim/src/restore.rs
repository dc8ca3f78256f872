//! The start of a container out of CRIU's images.
//!
//! runc and CRIU run in a private mount namespace, so that nothing they mount outlives them (a bind mount of the root
//! file system would be emptied by the next `runc delete`), and in the pod's network namespace, where CRIU expects to
//! find what it dumped there. Nothing about namespaces is taken on trust: the images decide where the processes come up,
//! so afterwards they are compared with the container's configuration, and a difference is the container's end.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use stasis_cgroup::Mode;
use stasis_criu::{OperationConfig, diagnose};
use stasis_oci_runtime::{CgroupMode, Launch, RestoreOptions};
use stasis_sys::namespace::{self, Kind};
use stasis_sys::process::{Setup, prepare};

use crate::bundle::{Bundle, write_criu_config};
use crate::container::{Container, read_pid};
use crate::error::Error;
use crate::journal;
use crate::process::Event;
use crate::server::Shim;

/// How long a restore may take: memory comes in at about 2 GB/s here, from a cold disk at a tenth of that.
const RESTORE_LIMIT: Duration = Duration::from_secs(600);

/// How much of the end of CRIU's log is read for the diagnosis; its errors are there.
const LOG_TAIL: u64 = 4 << 20;

/// A restore whose log grows beyond this is killed: a good one logs less than a megabyte, but images whose pages are cut
/// short make CRIU try, and log, for ever.
const LOG_MAX: u64 = 64 << 20;

/// How often the log is looked at.
const LOG_PAUSE: Duration = Duration::from_millis(200);

/// Name of the work directory in the bundle; CRIU's `restore.log` stays there.
const WORK_DIR: &str = "restore";

/// Restores the container and returns the process ID of its first process, which runs.
pub(crate) async fn restore(shim: &Arc<Shim>, container: &Arc<Container>) -> Result<i32, Error> {
    let images = container.images.as_deref();
    let images = images.ok_or_else(|| Error::Precondition(format!("container {} was never created", container.id)))?;
    let work = container.bundle.dir.join(WORK_DIR);
    let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(&work);
    made.map_err(Error::io(format!("creating {}", work.display())))?;
    let config = OperationConfig {
        file_locks: true,
        // Their other ends are elsewhere: connections that were kept for the container that ran on come back closed.
        tcp_close: true,
        // The images have a profile of their own, which may not be the container's.
        lsm_profile: container.bundle.apparmor().map(|profile| format!("apparmor:{profile}")),
        ..OperationConfig::default()
    };
    write_criu_config(&container.bundle.dir, &config)?;

    let restored = run(shim, container, images, &work).await;
    if restored.is_err() {
        let undone = async {
            container.kill_cgroup().await?;
            container.delete_in_runtime(shim, true).await
        };
        if let Err(error) = undone.await {
            journal::line(format_args!("taking back the restore of container {}: {error}", container.id));
        }
    }
    restored
}

async fn run(shim: &Arc<Shim>, container: &Arc<Container>, images: &Path, work: &Path) -> Result<i32, Error> {
    let _expecting = shim.reaper.expect();
    let bundle = &container.bundle;
    let mut prepared = container.take_prepared()?;
    let pid_file = bundle.dir.join("init.pid");
    let mut call = container.runc.restore(
        &container.id,
        &RestoreOptions {
            bundle: &bundle.dir,
            image_path: images,
            work_path: work,
            launch: Launch { pid_file: &pid_file, console_socket: prepared.console_socket() },
            tcp_established: false,
            file_locks: true,
            cgroup_mode: match shim.cgroups.mode() {
                Mode::V1 => CgroupMode::Ignore,
                Mode::V2 => CgroupMode::Soft,
            },
            no_pivot: container.options.no_pivot,
        },
    );
    prepare(call.command(), surroundings(bundle)?);
    prepared.give(call.command());
    container.expect_cgroup(shim);
    let log = work.join("restore.log");
    match shim.reaper.run_unless(call, RESTORE_LIMIT, endless_log(&log)).await {
        Err(Error::Runtime(runtime)) => return Err(explain(runtime, &log)),
        done => done.map(drop)?,
    }
    let pid = read_pid(&pid_file)?;
    container.adopt_init(shim, pid, Event::Started(pid))?;
    let compared = compare_namespaces(bundle, pid)
        .and_then(|()| compare_root(bundle, pid))
        .and_then(|()| compare_profiles(container));
    if let Err(error) = compared {
        // A process that has ended by now cannot be compared, and need not be: unless there are others, nothing runs.
        if !container.existing_cgroup()?.procs()?.is_empty() {
            return Err(error);
        }
    }
    if let Some(uts) = bundle.joined(Kind::Uts) {
        shim.sandbox.restore_hostname(uts)?;
    }
    container.init.connect(prepared.run().await?);
    Ok(pid)
}

/// Where runc runs when it calls CRIU: in mounts of its own and in the container's network.
pub(crate) fn surroundings(bundle: &Bundle) -> Result<Setup, Error> {
    let mut setup = Setup { private_mounts: true, ..Setup::default() };
    if let Some(network) = bundle.joined(Kind::Net) {
        let open = fs::File::open(network).map_err(Error::io(format!("opening {}", network.display())))?;
        setup.namespaces.push(open.into());
    }
    Ok(setup)
}

/// Adds to the OCI runtime's words what CRIU's log says.
pub(crate) fn explain(runtime: stasis_oci_runtime::Error, log: &Path) -> Error {
    // Without a log CRIU never ran.
    let Ok(text) = stasis_sys::path::read_tail(log, LOG_TAIL) else { return runtime.into() };
    let diagnosis = diagnose(&String::from_utf8_lossy(&text));
    Error::Criu { runtime, diagnosis: format!("{diagnosis}; the log of CRIU is {}", log.display()) }
}

/// Comes to an end when CRIU does not.
async fn endless_log(log: &Path) -> Error {
    loop {
        tokio::time::sleep(LOG_PAUSE).await;
        if fs::metadata(log).is_ok_and(|meta| meta.len() > LOG_MAX) {
            // It tells the same again and again, and it lies in memory.
            let cut = fs::OpenOptions::new().write(true).open(log).and_then(|file| file.set_len(LOG_TAIL));
            return Error::Invalid(format!(
                "CRIU did not come to an end and was killed: the images are broken, probably their pages cut short; the \
                 beginning of its log is {}{}",
                log.display(),
                cut.map_or_else(|error| format!(" ({error})"), |()| String::new())
            ));
        }
    }
}

/// CRIU gives a profile only to processes that had one when they were dumped.
fn compare_profiles(container: &Container) -> Result<(), Error> {
    let Some(wanted) = container.bundle.apparmor() else { return Ok(()) };
    for pid in container.existing_cgroup()?.procs()? {
        let file = format!("/proc/{pid}/attr/current");
        let label = match fs::read_to_string(&file) {
            Ok(label) => label,
            // It has ended meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => continue,
            Err(error) => return Err(Error::io(format!("reading {file}"))(error)),
        };
        if !confined_by(&label, wanted) {
            return Err(Error::Precondition(format!(
                "a process of the checkpoint came up under the AppArmor profile {:?} instead of the container's {wanted:?} \
                 and was killed: the checkpoint was made of a container without a profile, or tampered with",
                label.trim_end()
            )));
        }
    }
    Ok(())
}

/// The kernel shows `NAME (MODE)`, or `unconfined`.
fn confined_by(label: &str, profile: &str) -> bool {
    label.trim_end().strip_prefix(profile).is_some_and(|rest| rest == " (enforce)" || rest == " (complain)")
}

/// Images that name CRIU's own mount namespace as the process's would leave it among the mounts of the host.
fn compare_root(bundle: &Bundle, pid: i32) -> Result<(), Error> {
    let rootfs = bundle.dir.join("rootfs");
    // A file is the same by device and number, as a namespace is.
    let same = namespace::is_same(Path::new(&format!("/proc/{pid}/root")), &rootfs);
    match same.map_err(Error::io("comparing root directories after the restore"))? {
        true => Ok(()),
        false => Err(Error::Precondition(
            "the checkpoint came up with another root directory than the container's and was killed: its images were \
             tampered with"
                .to_owned(),
        )),
    }
}

fn compare_namespaces(bundle: &Bundle, pid: i32) -> Result<(), Error> {
    for kind in [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Pid] {
        let restored = format!("/proc/{pid}/ns/{}", kind.name());
        let host = format!("/proc/self/ns/{}", kind.name());
        let same = |as_what: &Path| {
            namespace::is_same(Path::new(&restored), as_what)
                .map_err(Error::io("comparing namespaces after the restore"))
        };
        let right = match bundle.joined(kind) {
            Some(path) => same(path)?,
            None => same(Path::new(&host))? != bundle.has_own(kind),
        };
        if !right {
            return Err(Error::Precondition(format!(
                "the checkpoint came up in another {} namespace than the container's and was killed: it was made in, or \
                 tampered to ask for, different surroundings",
                kind.name()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_the_profile_and_its_mode() {
        assert!(confined_by("stasis-default (enforce)\n", "stasis-default"));
        assert!(confined_by("a b (complain)", "a b"));
        for label in ["unconfined", "stasis-default-2 (enforce)", "stasis-default", "stasis-default (kill)", ""] {
            assert!(!confined_by(label, "stasis-default"), "{label}");
        }
    }
}
