//! Whether processes can be dumped, told before anything is frozen: what CRIU would refuse, by process and descriptor, with
//! the remedy.
//!
//! Everything is read from `/proc`. Only what CRIU refuses for certain blocks; what it may refuse, or what a checkpoint
//! loses, is a note. A process that ends meanwhile is passed over. Whose processes they are is not known here.

mod descriptors;
mod process;
mod sockets;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::Serialize;

/// What the checkpoint was asked to put up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Established TCP connections: they are kept, or closed.
    pub tcp: bool,
    /// File locks.
    pub file_locks: bool,
    /// Deleted files that have other names.
    pub link_remap: bool,
    /// Largest deleted file whose content is kept, in bytes.
    pub ghost_limit: u64,
}

/// CRIU's own limit of deleted files.
pub const GHOST_LIMIT: u64 = 1 << 20;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The dump would fail.
    Blocks,
    /// The dump may fail, or the checkpoint lacks something.
    Note,
}

/// One thing that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// A word for programs.
    pub code: &'static str,
    /// The process, as the host numbers it; none if it is the node.
    pub pid: Option<u32>,
    /// Name of the process.
    pub command: String,
    /// The descriptor.
    pub descriptor: Option<u32>,
    /// What was found: a path, an address, a kind.
    pub found: String,
    /// What it means.
    pub meaning: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

impl Finding {
    /// Something about the node, which blocks.
    pub fn of_node(code: &'static str, found: String, meaning: &'static str, remedy: &'static str) -> Self {
        let (severity, command) = (Severity::Blocks, String::new());
        Self { severity, code, pid: None, command, descriptor: None, found, meaning, remedy }
    }
}

/// Anonymous, shared and swapped memory of processes in bytes, which is what a dump copies; none of one that has ended.
/// Pages of files are in the files, and changed private ones count as anonymous. What is shared among the processes is
/// dumped once, but the kernel counts it in each: it is taken for no more than `charged`, what their control group has.
pub fn memory_bytes(pids: &[u32], charged: Option<u64>) -> u64 {
    let status = |pid| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    dumped_bytes(pids.iter().map(status), charged)
}

/// As [`memory_bytes`], of the texts of `/proc/<pid>/status`.
fn dumped_bytes(statuses: impl IntoIterator<Item = String>, charged: Option<u64>) -> u64 {
    let (mut own, mut shared) = (0u64, 0u64);
    for status in statuses {
        let kilobytes = |key: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        own += (kilobytes("RssAnon:") + kilobytes("VmSwap:")) * 1024;
        shared += kilobytes("RssShmem:") * 1024;
    }
    own + shared.min(charged.unwrap_or(u64::MAX))
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(pid) = self.pid {
            write!(f, "process {pid} ({})", self.command)?;
            if let Some(descriptor) = self.descriptor {
                write!(f, ", descriptor {descriptor}")?;
            }
            write!(f, ": ")?;
        }
        write!(f, "{}: {} ({}). {}", self.found, self.meaning, self.code, self.remedy)
    }
}

/// What a kind of finding has in common.
#[derive(Clone, Copy, Debug)]
struct Problem {
    severity: Severity,
    code: &'static str,
    meaning: &'static str,
    remedy: &'static str,
}

impl Problem {
    const fn blocks(code: &'static str, meaning: &'static str, remedy: &'static str) -> Self {
        Self { severity: Severity::Blocks, code, meaning, remedy }
    }

    const fn note(code: &'static str, meaning: &'static str, remedy: &'static str) -> Self {
        Self { severity: Severity::Note, code, meaning, remedy }
    }

    fn of(&self, process: &process::Process, descriptor: Option<u32>, found: impl Into<String>) -> Finding {
        Finding {
            severity: self.severity,
            code: self.code,
            pid: Some(process.pid),
            command: process.name.clone(),
            descriptor,
            found: found.into(),
            meaning: self.meaning,
            remedy: self.remedy,
        }
    }
}

/// Looks at `pids`, all of one container. The worst findings come first.
pub fn examine(pids: &[u32], allowed: &Allowed) -> Vec<Finding> {
    let processes: Vec<_> = pids.iter().filter_map(|pid| process::Process::read(*pid)).collect();
    let mut findings = Vec::new();
    let sockets = sockets::Sockets::read(&processes);
    let locks = process::locks();
    for process in &processes {
        process.examine(&processes[0], allowed, &locks, &mut findings);
        descriptors::examine(process, allowed, &sockets, &mut findings);
    }
    findings.sort_by_key(|finding| finding.severity);
    findings
}
