//! A process itself: who traces it, which namespaces it is in, what it has mapped, which locks it holds.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use super::{Allowed, Finding, Problem};

/// Bit of CAP_SYS_RESOURCE in a capability set (capabilities(7)).
const CAP_SYS_RESOURCE: u32 = 24;

const TRACED: Problem = Problem::blocks(
    "traced",
    "a debugger is attached, and a process has one tracer only",
    "End the debugger or strace.",
);
const NESTED_NAMESPACE: Problem = Problem::blocks(
    "nested-namespace",
    "it made a PID or user namespace of its own, as sandboxes of browsers and build tools do",
    "Switch the sandbox off for this workload.",
);
const SYSV_SHM: Problem = Problem::blocks(
    "sysv-shm",
    "attached System V memory belongs to the pod's IPC namespace, which is not in the checkpoint",
    "Have it use POSIX or anonymous shared memory (for PostgreSQL: shared_memory_type = mmap).",
);
const IO_URING: Problem = Problem::blocks(
    "io-uring",
    "CRIU cannot dump io_uring",
    "Switch it off in the workload (Node: UV_USE_IO_URING=0), or by seccomp, so that it falls back to epoll.",
);
const GPU: Problem = Problem::blocks(
    "gpu",
    "memory of a device is mapped, which only the device's driver could save",
    "Checkpoint it before it opens the device.",
);
const PARASITE: Problem = Problem::blocks(
    "leftover",
    "a CRIU that was killed has left its code there, before the program's own, and the next one cannot get in",
    "Start the container anew.",
);
const LOCKS: Problem = Problem::blocks("file-locks", "it holds file locks", "Checkpoint with file-locks=true.");
const RLIMITS: Problem = Problem::blocks(
    "cap-sys-resource",
    "it runs as another user than root, and CRIU may not read its limits: this node lacks CAP_SYS_RESOURCE",
    "Run the daemon with CAP_SYS_RESOURCE, or the workload as root.",
);

/// What was read of a process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) name: String,
    tracer: u32,
    user: u32,
    namespaces: [PathBuf; 2],
}

impl Process {
    /// None if it has ended.
    pub(super) fn read(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        let number = |key: &str| field(key)?.split_whitespace().next()?.parse().ok();
        // A zombie has nothing that could be in the way.
        if field("State:").is_some_and(|state| state.starts_with('Z')) {
            return None;
        }
        let namespace = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        Some(Self {
            pid,
            name: field("Name:").unwrap_or_default().to_owned(),
            tracer: number("TracerPid:").unwrap_or(0),
            user: number("Uid:").unwrap_or(0),
            namespaces: [namespace("pid")?, namespace("user")?],
        })
    }

    /// `first` is the container's first process, in whose namespaces all should be.
    pub(super) fn examine(
        &self,
        first: &Self,
        allowed: &Allowed,
        locks: &HashMap<u32, String>,
        out: &mut Vec<Finding>,
    ) {
        if self.tracer != 0 {
            out.push(TRACED.of(self, None, format!("traced by process {}", self.tracer)));
        }
        if self.namespaces != first.namespaces {
            out.push(NESTED_NAMESPACE.of(self, None, "another namespace than the container's"));
        }
        if self.user != 0 && !may_read_limits() {
            out.push(RLIMITS.of(self, None, format!("user {}", self.user)));
        }
        if let Some(lock) = locks.get(&self.pid).filter(|_| !allowed.file_locks) {
            out.push(LOCKS.of(self, None, lock.clone()));
        }
        if let Some(line) = leftover(self.pid) {
            out.push(PARASITE.of(self, None, line));
        }
        let mut seen: Vec<&str> = Vec::new();
        for name in mapped(self.pid) {
            let problem = match name.as_str() {
                name if name.starts_with("/SYSV") => SYSV_SHM,
                name if name.starts_with("anon_inode:[io_uring]") => IO_URING,
                name if is_gpu(name) || name.starts_with("anon_inode:i915") => GPU,
                _ => continue,
            };
            if !seen.contains(&problem.code) {
                seen.push(problem.code);
                out.push(problem.of(self, None, name));
            }
        }
    }
}

/// The first executable mapping, if it is shared: CRIU begins by writing a few bytes there, which works in private ones
/// only. Programs have none; the code of a CRIU that was killed is one.
fn leftover(pid: u32) -> Option<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let is_executable = |line: &&str| line.split(' ').nth(1).is_some_and(|rights| rights.get(2..3) == Some("x"));
    let first = maps.lines().find(is_executable)?;
    first.split(' ').nth(1)?.ends_with('s').then(|| first.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Devices of GPUs, whose memory is not the process's.
pub(super) fn is_gpu(path: &str) -> bool {
    ["/dev/nvidia", "/dev/dri/", "/dev/kfd"].iter().any(|start| path.starts_with(start))
}

/// Names in `/proc/<pid>/maps` that are no plain files.
fn mapped(pid: u32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let names = maps.lines().filter_map(|line| line.splitn(6, char::is_whitespace).nth(5)).map(str::trim);
    let special = |name: &&str| ["/SYSV", "anon_inode:", "/dev/"].iter().any(|start| name.starts_with(start));
    names.filter(special).map(str::to_owned).collect()
}

/// Whether CRIU, which has our capabilities, may ask for the limits of other users' processes.
fn may_read_limits() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    let set = set.and_then(|set| u64::from_str_radix(set, 16).ok());
    set.is_none_or(|set| set & (1 << CAP_SYS_RESOURCE) != 0)
}

/// A lock of each process that holds one; leases are none.
pub(super) fn locks() -> HashMap<u32, String> {
    let text = fs::read_to_string("/proc/locks").unwrap_or_default();
    let lock = |line: &str| -> Option<(u32, String)> {
        // "1: POSIX  ADVISORY  WRITE 1234 08:02:131 0 EOF"; one that waits has "->" before its kind.
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| matches!(*word, "POSIX" | "FLOCK" | "OFDLCK"))?;
        Some((words.get(at + 3)?.parse().ok()?, format!("{} lock", words[at])))
    };
    text.lines().filter_map(lock).collect()
}
