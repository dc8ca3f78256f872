//! What a node may leave: mounts, processes, cgroups, interfaces, ground. Found by the node's own names, and
//! removed by force where a run before was cut short.

use std::collections::BTreeSet;
use std::fs;
use std::io;
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

/// What the programs are called that a node runs, apart from the containers' own.
const PROGRAMS: [&str; 5] = ["stasisd", "containerd", "runc", "criu", "docker-registry"];

/// A process as `/proc` shows it.
#[derive(Debug)]
pub(super) struct Process {
    /// File name of the program that it was started as.
    pub(super) program: String,
    /// Its command line, separated by blanks.
    pub(super) arguments: String,
    /// Its cgroups, as in `/proc/PID/cgroup`.
    pub(super) cgroups: String,
}

/// Names of the network interfaces of this network namespace.
pub(super) fn interfaces() -> Result<Vec<String>> {
    let entries = fs::read_dir("/sys/class/net").context("list /sys/class/net")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
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
        Ok(Process { program, arguments, cgroups: fs::read_to_string(format!("/proc/{pid}/cgroup"))? })
    };
    Ok(pids.filter(|pid| read(*pid).is_ok_and(|process| chosen(&process))).collect())
}

/// What is left of a node that has ended, in words; waits a little for what goes away by itself.
pub(super) fn find(ground: &Ground, interfaces_before: &[String]) -> Result<Vec<String>> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let mut left = Vec::new();
        left.extend(mounts(ground)?.iter().map(|mount| format!("mount {}", mount.display())));
        left.extend(processes_of(ground)?.iter().map(|pid| format!("process {pid}")));
        // Empty parents go with the node; a cgroup below that is a container's.
        let depth = |path: &Path| path.components().count();
        let inner = cgroups(&ground.cgroup_parent)
            .into_iter()
            .filter(|path| depth(path) > pod_depth(path, &ground.cgroup_parent));
        left.extend(inner.map(|path| format!("cgroup {}", path.display())));
        let new = interfaces()?.into_iter().filter(|name| !interfaces_before.contains(name));
        left.extend(new.map(|name| format!("interface {name}")));
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Ends and removes everything that is the node's.
pub(super) fn sweep(ground: &Ground) -> Result<()> {
    kill_all(ground)?;
    unmount_below(&ground.run)?;
    unmount_below(&ground.disk)?;
    remove_interface(&ground.busybox, &ground.bridge())?;
    for cgroup in cgroups(&ground.cgroup_parent) {
        fs::remove_dir(&cgroup).with_context(|| format!("remove the cgroup {}", cgroup.display()))?;
    }
    remove_tree(&ground.run)?;
    remove_tree(&ground.disk)?;
    for shared in SHARED {
        // Others may have things in it, which then keep it from going.
        let _ = fs::remove_dir(shared);
    }
    Ok(())
}

/// Removes an interface if it exists.
pub(super) fn remove_interface(busybox: &Path, name: &str) -> Result<()> {
    if interfaces()?.iter().any(|interface| interface == name) {
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
        ours && named || process.cgroups.contains(&cgroup)
    })
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
