//! `delete`: takes away what a dead shim left, without a server. What is gone already is no error.
//!
//! The directory is a container's bundle, as containerd has it, or a whole pod's, with its containers in it.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message as _;
use stasis_cgroup::Cgroups;
use stasis_shim_api::layout;
use stasis_sys::{mount, namespace, process};

use crate::args::Args;
use crate::bundle::{Bundle, RuntimeOptions};
use crate::container::{CALL_LIMIT, KILL};
use crate::error::Error;
use crate::{checkpoint, journal, sandbox};

/// containerd's exit status for a container whose own is lost.
const LOST_STATUS: u32 = 128 + KILL;

/// How long a pod's init is given to end before its namespace is let go.
const INIT_LIMIT: Duration = Duration::from_secs(10);

/// Cleans up the directory and prints how the container counts as ended.
pub(crate) fn delete(args: &Args) -> Result<(), Error> {
    let dir = match &args.bundle {
        Some(dir) => dir.clone(),
        None => std::env::current_dir().map_err(Error::io("finding the working directory"))?,
    };
    if dir.join("config.json").exists() {
        delete_container(&args.id, &dir)?;
    } else {
        delete_pod(&dir)?;
    }
    let exited_at = Some(SystemTime::now().into()).into();
    let response = DeleteResponse { exit_status: LOST_STATUS, exited_at, ..Default::default() };
    let bytes = response.write_to_bytes().map_err(|error| Error::Internal(error.to_string()))?;
    std::io::stdout().write_all(&bytes).map_err(Error::io("printing"))
}

fn delete_container(id: &str, bundle: &Path) -> Result<(), Error> {
    if let Some(options) = RuntimeOptions::load(bundle) {
        let runc = options.runc(bundle);
        mount::unmount_all_below(&runc.root.join(id)).map_err(Error::io("the OCI runtime's state directory"))?;
        match runc.delete(id, true).run(CALL_LIMIT) {
            Err(error) if !error.is_not_found() => return Err(error.into()),
            _ => {}
        }
    }
    end_cgroup(bundle)?;
    mount::unmount_all_below(&bundle.join("rootfs")).map_err(Error::io("the root file system"))
}

/// Ends what the OCI runtime knows nothing of: a create or restore that had not come to an end.
fn end_cgroup(bundle: &Path) -> Result<(), Error> {
    let (Some(options), Ok(described)) = (RuntimeOptions::load(bundle), Bundle::look_at(bundle)) else { return Ok(()) };
    if let Some(cgroup) = described.cgroup(&Cgroups::probe()?, options.systemd_cgroup)
        && cgroup.exists()
    {
        cgroup.kill_all()?;
        cgroup.remove()?;
    }
    Ok(())
}

fn delete_pod(dir: &Path) -> Result<(), Error> {
    // A frozen process could not be ended.
    checkpoint::thaw_marked_now(dir, &Cgroups::probe()?);
    let bundles = match fs::read_dir(dir.join(layout::BUNDLES)) {
        Ok(bundles) => bundles.flatten().collect(),
        Err(_) => Vec::new(),
    };
    let mut first_error = None;
    for bundle in bundles {
        let id = bundle.file_name().to_string_lossy().into_owned();
        if let Err(error) = delete_container(&id, &bundle.path()) {
            journal::line(format_args!("container {id}: {error}"));
            first_error.get_or_insert(error);
        }
    }
    end_init(dir)?;
    // The network's too, whoever pinned it: this runs once the pod has given back its address.
    sandbox::take_down(dir, &sandbox::ALL_KINDS)?;
    for name in [layout::SOCKET, layout::PID] {
        // A dead shim's; it may have removed them itself.
        let _ = fs::remove_file(dir.join(name));
    }
    first_error.map_or(Ok(()), Err)
}

/// Ends the first process of the pod's PID namespace, which is found by the namespace, as a process ID could mean anybody
/// by now.
fn end_init(dir: &Path) -> Result<(), Error> {
    let pin = dir.join(layout::NAMESPACES).join("pid");
    if mount::mounts_below(&pin).map_err(Error::io("the pod's namespaces"))?.is_empty() {
        return Ok(());
    }
    let end = std::time::Instant::now() + INIT_LIMIT;
    loop {
        let inside: Vec<i32> = fs::read_dir("/proc")
            .map_err(Error::io("listing processes"))?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| namespace::is_same(Path::new(&format!("/proc/{pid}/ns/pid")), &pin).unwrap_or(false))
            .collect();
        if inside.is_empty() {
            return Ok(());
        }
        if std::time::Instant::now() >= end {
            return Err(Error::Deadline(format!("{} processes of the pod outlive SIGKILL", inside.len())));
        }
        for pid in inside {
            // Ended meanwhile, which is as good.
            let _ = process::signal(pid, KILL.cast_signed());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
