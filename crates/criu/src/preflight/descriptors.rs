//! What a process has open.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open, statfs};
use rustix::io::ioctl_fionread;

use super::process::{Process, is_gpu};
use super::sockets::Sockets;
use super::{Allowed, Finding, Problem};

/// Type of the file system of POSIX message queues (linux/magic.h).
const MQUEUE_MAGIC: u64 = 0x1980_0202;
/// Major numbers of devices that CRIU knows: memory (null, zero, random, …) and terminals.
const KNOWN_DEVICES: [u32; 7] = [1, 2, 3, 4, 5, 136, 137];
/// Kernel objects without a name that CRIU knows. Those with brackets are newer than those without.
const KNOWN_OBJECTS: [&str; 9] =
    ["[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]", "bpf-map", "[pidfd]"];

const IO_URING: Problem = Problem::blocks(
    "io-uring",
    "CRIU cannot dump io_uring",
    "Switch it off in the workload (Node: UV_USE_IO_URING=0), or by seccomp, so that it falls back to epoll.",
);
const USERFAULTFD: Problem = Problem::blocks(
    "userfaultfd",
    "somebody serves the page faults of this memory, and CRIU cannot tell what would come",
    "Wait until a lazy restore or migration has ended, or switch the feature off (JVM, QEMU).",
);
const BPF: Problem =
    Problem::blocks("bpf", "CRIU cannot dump loaded BPF programs", "Unload them, or checkpoint before.");
const PERF: Problem = Problem::blocks("perf", "CRIU cannot dump performance counters", "End the profiler.");
const OBJECT: Problem = Problem::blocks(
    "kernel-object",
    "CRIU does not know this kind of kernel object",
    "Have the workload close it, or checkpoint before it is opened.",
);
const GPU: Problem = Problem::blocks(
    "gpu",
    "a GPU is open, whose state only its driver could save",
    "Checkpoint it before it opens the device.",
);
const DEVICE: Problem = Problem::blocks(
    "device",
    "a device is open that CRIU does not know",
    "Have the workload close it before the checkpoint.",
);
const MQUEUE: Problem = Problem::blocks(
    "mqueue",
    "CRIU cannot dump POSIX message queues",
    "Use a pipe or a unix socket, or close the queue before the checkpoint.",
);
const GHOST: Problem = Problem::blocks(
    "ghost-file",
    "the file is deleted but open, and larger than what is kept of such files",
    "Raise ghost-limit above its size.",
);
const LINK: Problem = Problem::blocks(
    "link-remap",
    "the file is deleted but open, and has another name that CRIU does not look for",
    "Checkpoint with link-remap=true.",
);
const TCP: Problem = Problem::blocks(
    "tcp-established",
    "a TCP connection is open",
    "Checkpoint with tcp-established=true to keep it, or tcp-close=true to close it in the checkpoint.",
);
const IN_FLIGHT: Problem = Problem::note(
    "tcp-in-flight",
    "connections wait to be accepted",
    "They pass by themselves; skip-in-flight=true leaves them out.",
);
const UNREAD_STDIN: Problem = Problem::note(
    "unread-stdin",
    "what was written to its standard input and not read yet is not in the checkpoint",
    "Checkpoint once it has been read.",
);
const WATCH: Problem = Problem::blocks(
    "fsnotify-unreachable",
    "a file is watched on a file system that the container does not see any more",
    "Have the workload drop the watch.",
);

/// Looks through the descriptors of `process`.
pub(super) fn examine(process: &Process, allowed: &Allowed, sockets: &Sockets, out: &mut Vec<Finding>) {
    let pid = process.pid;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let link = link.to_string_lossy().into_owned();
        let mut found = |problem: Problem, what: String| out.push(problem.of(process, Some(number), what));
        if let Some(object) = link.strip_prefix("anon_inode:") {
            match object {
                "[io_uring]" => found(IO_URING, link),
                "[userfaultfd]" => found(USERFAULTFD, link),
                "bpf-prog" | "bpf_link" | "bpf-link" => found(BPF, link),
                "[perf_event]" => found(PERF, link),
                "inotify" | "[fanotify]" if watches_unreachable(pid, number) => found(WATCH, link),
                known if KNOWN_OBJECTS.contains(&known) => {}
                _ => found(OBJECT, link),
            }
        } else if let Some(inode) =
            link.strip_prefix("socket:[").and_then(|rest| rest.trim_end_matches(']').parse().ok())
        {
            let Some(tcp) = sockets.tcp(inode) else { continue };
            if tcp.is_connected() && !allowed.tcp {
                found(TCP, format!("TCP {} to {}", tcp.local, tcp.remote));
            }
            if tcp.in_flight() > 0 {
                found(IN_FLIGHT, format!("{} at {}", tcp.in_flight(), tcp.local));
            }
        } else if link.starts_with("pipe:[") {
            let unread = if number == 0 { unread(&entry.path()) } else { 0 };
            if unread > 0 {
                found(UNREAD_STDIN, format!("{unread} bytes in {link}"));
            }
        } else if let Some(problem) = file(&entry.path(), &link, allowed) {
            found(problem, link);
        }
    }
}

/// What is wrong with a file that is open.
fn file(path: &Path, link: &str, allowed: &Allowed) -> Option<Problem> {
    if is_gpu(link) {
        return Some(GPU);
    }
    let facts = fs::metadata(path).ok()?;
    let kind = facts.st_mode() & 0o170_000;
    if kind == 0o020_000 || kind == 0o060_000 {
        let major = rustix::fs::major(facts.st_rdev());
        return (!KNOWN_DEVICES.contains(&major)).then_some(DEVICE);
    }
    if statfs(path).is_ok_and(|facts| facts.f_type as u64 == MQUEUE_MAGIC) {
        return Some(MQUEUE);
    }
    // A memfd is memory, and is dumped as such.
    if kind != 0o100_000 || !link.ends_with(" (deleted)") || link.starts_with("/memfd:") {
        return None;
    }
    if facts.st_nlink() > 0 {
        return (!allowed.link_remap).then_some(LINK);
    }
    // What counts is what is on the disk: holes are kept as holes.
    (facts.st_blocks() * 512 > allowed.ghost_limit).then_some(GHOST)
}

/// Bytes that wait in the pipe.
fn unread(path: &Path) -> u64 {
    let pipe = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
    pipe.ok().and_then(|pipe| ioctl_fionread(&pipe).ok()).unwrap_or(0)
}

/// Whether something is watched on a file system that is not among the mounts of the process.
fn watches_unreachable(pid: u32, descriptor: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).unwrap_or_default();
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let devices: Vec<u64> = mounts.lines().filter_map(|line| device(line.split_whitespace().nth(2)?)).collect();
    let watched = info.lines().filter_map(|line| line.split_whitespace().find_map(|word| word.strip_prefix("sdev:")));
    watched.filter_map(|device| u64::from_str_radix(device, 16).ok()).any(|device| !devices.contains(&device))
}

/// `major:minor` as the kernel numbers devices inside (major times 2^20, and minor), which is how `sdev` is written.
fn device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(major.parse::<u64>().ok()? << 20 | minor.parse::<u64>().ok()?)
}
