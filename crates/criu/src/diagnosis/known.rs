//! The failures of CRIU that are known: one row each. The texts are CRIU 4.2's.

/// A known failure.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// All of these occur in the line, in this order.
    pub pattern: &'static [&'static str],
    /// A stable name for programs.
    pub code: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What can be done.
    pub hint: &'static str,
}

impl Known {
    /// Whether this row is about `line`.
    pub fn matches(&self, line: &str) -> bool {
        let mut rest = line;
        self.pattern.iter().all(|part| match rest.find(part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    }
}

/// The table; the first matching row wins, so special rows come before general ones.
pub fn known_failures() -> &'static [Known] {
    &KNOWN
}

const fn row(pattern: &'static [&'static str], code: &'static str, meaning: &'static str, hint: &'static str) -> Known {
    Known { pattern, code, meaning, hint }
}

#[rustfmt::skip]
static KNOWN: [Known; 51] = [
    row(&["Can't open file", "on restore: No such file"], "file-gone",
        "a process had a file open at its checkpoint that is not there now, in the root file system or in a mount of the request",
        "mount a directory that holds the file, or checkpoint when the file is closed"),
    row(&["Can't get rlimit", "Operation not permitted"], "rlimit",
        "a process runs as another user than root, and CRIU may not read its limits without CAP_SYS_RESOURCE, which this host withholds",
        "give stasisd CAP_SYS_RESOURCE, or run the container's processes as root"),
    // Files that cannot be dumped.
    row(&["[io_uring]"], "io-uring",
        "a process uses io_uring, which CRIU cannot dump",
        "switch io_uring off in the workload (Redis: `io-threads-do-reads no` or an image without liburing; Node: UV_USE_IO_URING=0) or deny io_uring_setup in its seccomp profile"),
    row(&["[userfaultfd]"], "userfaultfd",
        "a process holds a userfaultfd, which CRIU cannot dump",
        "a memory tracker or a lazy restore is still active: wait until it has ended"),
    row(&["anon_inode:[perf_event]"], "perf-event",
        "a process holds a perf event, which CRIU cannot dump",
        "stop the profiler in the container"),
    row(&["anon_inode:"], "anon-inode",
        "a process holds a kernel object of a kind that CRIU cannot dump",
        "the line names it; close it in the workload before the checkpoint"),
    row(&["Can't dump file", "mqueue"], "posix-mqueue",
        "a process has a POSIX message queue open, which CRIU cannot dump",
        "close the queue before the checkpoint"),
    row(&["mqueue"], "posix-mqueue",
        "a POSIX message queue is in use, which CRIU cannot dump",
        "close the queue before the checkpoint"),
    row(&["Can't dump file", "of that type [2", "chr "], "char-device",
        "a process has a device open that CRIU cannot dump (a GPU, for example)",
        "close the device before the checkpoint, or use a CRIU plugin for it"),
    row(&["Can't dump file", "of that type"], "file-type",
        "a process has a file open of a kind that CRIU cannot dump",
        "the line names it; close it in the workload before the checkpoint"),
    row(&["Can't lookup mount=", "for fd="], "mount-lookup",
        "a process has a file open that belongs to no mount of the container, such as standard input or output that is a named pipe or a file of the host",
        "give the container pipes or /dev/null as standard streams, and do not pass host files into it by descriptor"),
    row(&["Open files on overmounted mounts"], "overmounted",
        "a process has a file open below a path over which something was mounted later",
        "close the file, or mount before the process starts"),
    row(&["Can't dump ghost file", "increase limit"], "ghost-limit",
        "a process has a deleted file open that is larger than the limit for such files",
        "raise `ghost-limit` for this runtime handler, or close the file"),
    row(&["Can't create link remap"], "link-remap",
        "a process has a deleted file open of which another name exists",
        "the file cannot be kept without `link-remap`, an option of the runtime handler; close the file otherwise"),
    row(&["Some file locks are hold"], "file-locks",
        "a process holds a file lock and the option `file-locks` is off",
        "leave `file-locks` on, which is the default"),
    row(&["Can't find suitable path for handle"], "inotify",
        "an inotify or fanotify watch is on a file that no longer has a path",
        "watch directories that exist in an image layer or volume, or stop the watcher (tail -F, config reloaders) before the checkpoint"),
    row(&["Can't dump that handle"], "inotify",
        "an inotify or fanotify watch cannot be traced to a path",
        "stop the watcher (tail -F, config reloaders) before the checkpoint"),
    row(&["BPF map type"], "bpf-map",
        "a process holds a BPF map of a kind that CRIU cannot dump",
        "close the map before the checkpoint"),
    row(&["packetized mode for pipes"], "pipe-packets",
        "a process has a pipe in packet mode (O_DIRECT), which CRIU cannot dump",
        "close the pipe before the checkpoint"),
    row(&["PIDFD_THREAD"], "pidfd-thread",
        "a process holds a pidfd of a thread, which CRIU cannot dump",
        "close it before the checkpoint"),

    // Sockets and terminals.
    row(&["Connected TCP socket"], "tcp-established",
        "a process has an established TCP connection",
        "allow `tcp-established` for the runtime handler and ask for it, or close the connections (drain, readiness off) before the checkpoint"),
    row(&["ext-unix-sk"], "external-unix-socket",
        "a process is connected to a unix socket outside the container (syslog, D-Bus, a CSI or device socket)",
        "close that connection before the checkpoint; external sockets are refused on purpose"),
    row(&["half of stream unix connection"], "external-unix-socket",
        "a process is connected to a unix socket whose other end is outside the container",
        "close that connection before the checkpoint; external sockets are refused on purpose"),
    row(&["Unix socket", "without peer"], "unix-peer",
        "a unix socket is connected to one outside the container",
        "close that connection before the checkpoint"),
    row(&["in-flight"], "in-flight",
        "a listening socket has connections that nobody has accepted yet",
        "checkpoint again, or allow `skip-in-flight` for the runtime handler"),
    row(&["dangling tty"], "terminal",
        "a process uses a terminal whose other end is outside the container",
        "end `exec` and `attach` sessions first; a terminal made by the runtime is no obstacle"),
    row(&["socket from an external network namespace"], "foreign-netns",
        "a process holds a socket of another network namespace",
        "close it before the checkpoint"),

    // Namespaces, mounts, control groups.
    row(&["Can't dump nested"], "nested-namespace",
        "a process inside the container made a namespace of its own, which CRIU cannot dump (sandboxes of browsers, nested containers)",
        "run the workload without its own sandbox"),
    row(&["Nested mount namespaces"], "nested-namespace",
        "a process inside the container made a mount namespace in a user namespace of its own, which CRIU cannot dump",
        "run the workload without its own sandbox"),
    row(&["pid namespace without the process init"], "pid-namespace",
        "the first process of the PID namespace is not part of the container",
        "checkpoint a container with a PID namespace of its own or of its pod"),
    row(&["session leader", "is outside of its pid namespace"], "session-leader",
        "a process belongs to a session whose leader is outside the container",
        "end `exec` sessions in the container first"),
    row(&["FS mnt", "unsupported"], "file-system",
        "a file system is mounted in the container of a type that CRIU cannot dump",
        "mount it as a volume of the pod instead of inside the container"),
    row(&["No mapping for", "mountpoint"], "external-mount",
        "the checkpoint has a mount that the new container lacks",
        "give the container every mount of the checkpointed one; the line names it"),
    row(&["Unable to dump a file system"], "file-system",
        "the content of a file system mounted in the container could not be dumped",
        "mount it as a volume of the pod instead of inside the container"),
    row(&["Can't dump tmpfs content"], "tmpfs-content",
        "`tar` could not archive a tmpfs of the container",
        "check that tar is installed on the host and that the tmpfs is not full"),
    row(&["failed preparing cgns"], "cgroup-namespace",
        "the checkpoint was made with a private cgroup namespace but without its control groups, so it restores only under the same cgroup path",
        "make the checkpoint again with Stasis, or restore with the runtime that made it, in the same place"),
    row(&["doesn't live in IPC ns"], "sysv-shm",
        "a process has System V shared memory attached that belongs to the pod's IPC namespace, not to the container's",
        "detach it before the checkpoint"),
    row(&["IPC", "File exists"], "sysv-exists",
        "a System V object of the checkpoint exists already in the pod's IPC namespace",
        "restore into a fresh pod, and only one container that uses System V objects"),
    row(&["Can't set desired IPC"], "sysv-exists",
        "a System V object could not be made again under its ID in the pod's IPC namespace",
        "restore into a fresh pod"),
    row(&["Can't fork for", "File exists"], "pid-taken",
        "a process ID of the checkpoint is taken in the PID namespace of the pod",
        "restore into a pod whose PID namespace has no other processes (not shared, or fresh)"),
    row(&["do not match expected"], "pid-taken",
        "a process could not get its old ID back",
        "restore into a pod whose PID namespace has no other processes (not shared, or fresh)"),

    // The host.
    row(&["Locking network failed: iptables-restore"], "iptables-missing",
        "the network could not be held still because iptables-restore is missing or failed",
        "Stasis asks for nftables or no lock: make sure that the container has the annotation org.criu.config of its own bundle"),
    row(&["failed using nftables"], "nftables",
        "the network could not be held still by nftables",
        "load the kernel module nf_tables"),
    row(&["built without libnftables"], "nftables-missing",
        "this CRIU was built without nftables",
        "install a CRIU that has it; `stasis doctor` shows which one is used"),
    row(&["kerndat", "initializing kerndat"], "kernel-probe",
        "CRIU's probe of the kernel failed, for example because `lo` is down in the network namespace that it runs in",
        "run `criu check` on the host, and bring `lo` up"),
    row(&["Timeout reached"], "criu-timeout",
        "CRIU could not stop the processes in its own time limit",
        "look for processes in uninterruptible sleep (state D): on a network file system, or between vfork and exec"),
    row(&["seccomp"], "seccomp",
        "a seccomp filter of the checkpoint could not be read or put back",
        "run CRIU as root with CAP_SYS_ADMIN, on a kernel with CONFIG_SECCOMP_FILTER"),
    row(&["LSM specified but"], "lsm",
        "the security module that the checkpoint was made under is not active on this host",
        "restore on a host with the same security module (AppArmor, SELinux)"),
    row(&["capabilities do not match run time"], "cpu",
        "this host's CPU lacks features that the checkpointed processes use",
        "restore on a host with the same or a newer CPU model"),
    row(&["required by image"], "cpu",
        "this host's CPU lacks features that the checkpointed processes use",
        "restore on a host with the same or a newer CPU model"),
    row(&["No space left on device"], "no-space",
        "there was no space for the images",
        "free space, or lower the memory that is in use"),
];
