//! What a node may leave: mounts, processes, cgroups, interfaces, ground. Found by the node's own names, and
//! removed by force where a run before was cut short.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::{Ground, remove_tree};
use crate::process::{SHORT, run};

/// The kernel takes interfaces and cgroups away a little after the processes in them: this long at most.
const SETTLE: Duration = Duration::from_secs(5);

const CGROUPS: &str = "/sys/fs/cgroup";

/// Directories that containerd and the CNI library make whatever their configuration says, the inner ones first.
const SHARED: [&str; 6] = [
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd",
    "/var/lib/cni/results",
    "/var/lib/cni/networks",
    "/var/lib/cni",
];

/// The one of containerd's namespaces that pods are in, below our state.
const RUNC_NAMESPACE: &str = "runc/k8s.io";

/// What the programs are called that a node runs, apart from the containers' own.
const PROGRAMS: [&str; 5] = ["stasisd", "containerd", "runc", "criu", "docker-registry"];

/// A process as `/proc` shows it.
#[derive(Debug)]
pub(super) struct Process {
    /// File name of the program that it was started as.
    pub(super) program: String,
    /// Its command line, separated by blanks.
    pub(super) arguments: String,
    /// Where it is, which is all that names the node on our shims.
    pub(super) directory: PathBuf,
    /// Its cgroups, as in `/proc/PID/cgroup`.
    pub(super) cgroups: String,
}

/// Names in a directory; none where it is not there.
fn names(dir: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// What is in directories that hold something for each pod or container alone, and addresses that are not given back.
fn files(ground: &Ground) -> Vec<PathBuf> {
    let (root, state) = (ground.root(), ground.state());
    let mut found = Vec::new();
    let dirs = [state.join("pods"), state.join("runc"), root.join("snapshots/active"), root.join("restore")];
    for dir in dirs {
        found.extend(names(&dir).map(|name| dir.join(name)));
    }
    // Shims have a directory for each of containerd's namespaces there; beside containers, CRIU's cache is in it.
    let namespace = state.join(RUNC_NAMESPACE);
    found.retain(|path| *path != namespace);
    found.extend(names(&namespace).map(|name| namespace.join(name)).filter(|path| path.is_dir()));
    for network in names(&ground.addresses()).map(|network| ground.addresses().join(network)) {
        let addresses = names(&network).filter(|name| name.parse::<IpAddr>().is_ok());
        found.extend(addresses.map(|name| network.join(name)));
    }
    found
}

/// Process IDs of those that `chosen` accepts.
pub(super) fn processes(chosen: impl Fn(&Process) -> bool) -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("list /proc")?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    // A process that ends meanwhile has no files to read.
    let read = |pid: u32| -> io::Result<Process> {
        let arguments = fs::read(format!("/proc/{pid}/cmdline"))?;
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        let program = arguments.split(' ').next().unwrap_or("").rsplit('/').next().unwrap_or("").to_owned();
        let directory = fs::read_link(format!("/proc/{pid}/cwd"))?;
        Ok(Process { program, arguments, directory, cgroups: fs::read_to_string(format!("/proc/{pid}/cgroup"))? })
    };
    Ok(pids.filter(|pid| read(*pid).is_ok_and(|process| chosen(&process))).collect())
}

/// What is left of a node that has ended, in words; waits a little for what goes away by itself.
pub(super) fn find(ground: &Ground) -> Result<Vec<String>> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let mut left = Vec::new();
        left.extend(mounts(ground)?.iter().map(|mount| format!("mount {}", mount.display())));
        left.extend(processes_of(ground)?.into_iter().map(described));
        // Empty parents go with the node; a cgroup below that is a container's.
        let depth = |path: &Path| path.components().count();
        let inner = cgroups(&ground.cgroup_parent)
            .into_iter()
            .filter(|path| depth(path) > pod_depth(path, &ground.cgroup_parent));
        left.extend(inner.map(|path| format!("cgroup {}", path.display())));
        // The bridge itself is made by the plugin at the first pod, and no plugin removes it.
        let ports = Path::new("/sys/class/net").join(ground.bridge()).join("brif");
        left.extend(names(&ports).map(|name| format!("interface {name}")));
        left.extend(files(ground).iter().map(|path| format!("file {}", path.display())));
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Ends and removes everything that is the node's.
pub(super) fn sweep(ground: &Ground) -> Result<()> {
    reboot(ground)?;
    remove_tree(&ground.disk)?;
    for shared in SHARED {
        // Others may have things in it, which then keep it from going.
        let _ = fs::remove_dir(shared);
    }
    Ok(())
}

/// Ends and removes what does not outlive the machine's run, and leaves what is on disk.
pub(super) fn reboot(ground: &Ground) -> Result<()> {
    kill_all(ground)?;
    unmount_below(&ground.run)?;
    unmount_below(&ground.disk)?;
    remove_interface(&ground.busybox, &ground.bridge())?;
    for cgroup in cgroups(&ground.cgroup_parent) {
        fs::remove_dir(&cgroup).with_context(|| format!("remove the cgroup {}", cgroup.display()))?;
    }
    remove_tree(&ground.run)
}

/// Removes an interface if it exists.
fn remove_interface(busybox: &Path, name: &str) -> Result<()> {
    if Path::new("/sys/class/net").join(name).exists() {
        run(Command::new(busybox).args(["ip", "link", "delete", name]), SHORT)?;
    }
    Ok(())
}

/// Takes away every mount at or below `dir`, the last mounted first.
fn unmount_below(dir: &Path) -> Result<()> {
    for mount in mounts_below(dir)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("unmount {}", mount.display()))?;
    }
    Ok(())
}

fn kill_all(ground: &Ground) -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    loop {
        thaw(ground);
        let pids = processes_of(ground)?;
        if pids.is_empty() || Instant::now() > deadline {
            return Ok(());
        }
        for pid in pids {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // It may have ended since it was seen.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A frozen process is killed only when it is thawed.
fn thaw(ground: &Ground) {
    for cgroup in cgroups(&ground.cgroup_parent) {
        // Each hierarchy has one of the two files, or none.
        let _ = fs::write(cgroup.join("freezer.state"), "THAWED").or_else(|_| {
            if cgroup.join("cgroup.freeze").exists() { fs::write(cgroup.join("cgroup.freeze"), "0") } else { Ok(()) }
        });
    }
}

/// Daemon, shims and engines by their names and the paths on their command lines, containers by their cgroup.
fn processes_of(ground: &Ground) -> Result<Vec<u32>> {
    let (run, disk) = (format!("{}/", ground.run.display()), format!("{}/", ground.disk.display()));
    let cgroup = format!(":{}/", ground.cgroup_parent);
    processes(|process| {
        // A person's pager on one of the node's logs is none of them.
        let ours = PROGRAMS.iter().any(|program| process.program.starts_with(program));
        let named = process.arguments.contains(&run) || process.arguments.contains(&disk);
        let named = named || process.directory.starts_with(&ground.run);
        ours && named || process.cgroups.contains(&cgroup)
    })
}

fn described(pid: u32) -> String {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!("process {pid} ({})", String::from_utf8_lossy(&arguments).replace('\0', " ").trim_end())
}

fn mounts(ground: &Ground) -> Result<Vec<PathBuf>> {
    let mut mounts = mounts_below(&ground.run)?;
    mounts.extend(mounts_below(&ground.disk)?);
    Ok(mounts)
}

fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.map(|point| PathBuf::from(unescaped(point))).filter(|point| point.starts_with(dir)).collect())
}

/// mountinfo writes blanks and the like as octal numbers.
fn unescaped(point: &str) -> String {
    point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// The node's cgroups in every hierarchy, the innermost first.
fn cgroups(parent: &str) -> Vec<PathBuf> {
    let relative = parent.trim_start_matches('/');
    let hierarchies = fs::read_dir(CGROUPS).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut found = BTreeSet::new();
    // On a unified hierarchy the root itself is the hierarchy.
    for hierarchy in hierarchies.chain([PathBuf::from(CGROUPS)]) {
        walk(&hierarchy.join(relative), &mut found);
    }
    found.into_iter().rev().collect()
}

fn walk(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    found.insert(dir.to_path_buf());
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found);
        }
    }
}

/// Depth of a pod's own cgroup, which its maker (here as in the kubelet) removes: below it are the runtime's.
fn pod_depth(path: &Path, parent: &str) -> usize {
    let name = parent.trim_start_matches('/');
    let above = path.components().take_while(|component| component.as_os_str() != name).count();
    above + 2
}
