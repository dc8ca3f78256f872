use super::*;

/// One line a row of the table, in its order: what CRIU writes.
const LINES: [(&str, &str); 51] = [
    (
        "file-gone",
        "(00.06) Error (criu/files-reg.c:2353): Can't open file data/n on restore: No such file or directory",
    ),
    ("rlimit", "(00.02) Error (criu/cr-dump.c:389): Can't get rlimit 0: Operation not permitted"),
    (
        "io-uring",
        "(00.02) Error (criu/files-ext.c:98): Can't dump file 6 of that type [600] (unknown anon_inode:[io_uring])",
    ),
    (
        "userfaultfd",
        "(00.02) Error (criu/files-ext.c:98): Can't dump file 3 of that type [600] (unknown anon_inode:[userfaultfd])",
    ),
    (
        "perf-event",
        "(00.02) Error (criu/files-ext.c:98): Can't dump file 3 of that type [600] (unknown anon_inode:[perf_event])",
    ),
    (
        "anon-inode",
        "(00.02) Error (criu/files-ext.c:98): Can't dump file 3 of that type [600] (unknown anon_inode:[kvm-vm])",
    ),
    ("posix-mqueue", "(00.02) Error (criu/files-ext.c:98): Can't dump file 3 of that type [100644] (unknown mqueue)"),
    ("posix-mqueue", "(00.02) Error (criu/files-reg.c:1): unsupported mqueue file"),
    ("char-device", "(00.02) Error (criu/files-ext.c:98): Can't dump file 9 of that type [20666] (chr 195:255)"),
    ("file-type", "(00.02) Error (criu/files-ext.c:98): Can't dump file 9 of that type [60660] (blk 8:0)"),
    ("mount-lookup", "(00.02) Error (criu/files-reg.c:1790): Can't lookup mount=44 for fd=1 path=/tmp/fifo"),
    (
        "overmounted",
        "(00.02) Error (criu/files-reg.c:1796): Open files on overmounted mounts are not supported yet; mount=4 fd=3 path=/x",
    ),
    (
        "ghost-limit",
        "(00.02) Error (criu/files-reg.c:1031): Can't dump ghost file /data/deleted of 2097152 size, increase limit",
    ),
    (
        "link-remap",
        "(00.02) Error (criu/files-reg.c:1122): Can't create link remap for /data/x. Use link-remap option.",
    ),
    (
        "file-locks",
        "(00.02) Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
    ),
    (
        "inotify",
        "(00.02) Error (criu/fsnotify.c:263): fsnotify: Can't find suitable path for handle (dev 0x2a ino 0x1234): 0",
    ),
    ("inotify", "(00.02) Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle"),
    ("bpf-map", "(00.02) Error (criu/bpfmap.c:262): bpfmap: CRIU does not currently support dumping BPF map type 27!"),
    ("pipe-packets", "(00.02) Error (criu/pipes.c:490): The packetized mode for pipes is not supported yet"),
    ("pidfd-thread", "(00.02) Error (criu/pidfd.c:88): pidfd: PIDFD_THREAD flag is currently not supported"),
    (
        "tcp-established",
        "(00.02) Error (criu/sk-inet.c:188): inet: Connected TCP socket, consider using --tcp-established option.",
    ),
    (
        "external-unix-socket",
        "(00.02) Error (criu/sk-unix.c:1): unix: External socket is used. Consider using --ext-unix-sk option.",
    ),
    ("external-unix-socket", "(00.02) Error (criu/sk-unix.c:1): unix: Can't dump half of stream unix connection."),
    ("unix-peer", "(00.02) Error (criu/sk-unix.c:418): unix: Unix socket 4711 without peer 4712"),
    (
        "in-flight",
        "(00.02) Error (criu/sk-inet.c:1): inet: In-flight connection (l) for 12: Non-empty queue on an in-flight socket",
    ),
    ("terminal", "(00.02) Error (criu/tty.c:1912): tty: Found dangling tty with sid 1 pgid 1 (pts) on peer fd 0."),
    (
        "foreign-netns",
        "(00.02) Error (criu/net.c:3718): net: Unable to dump a socket from an external network namespace",
    ),
    ("nested-namespace", "(00.02) Error (criu/namespaces.c:460): Can't dump nested pid namespace for 4711"),
    (
        "nested-namespace",
        "(00.02) Error (criu/mount.c:4048): mnt: Nested mount namespaces are not supported without --mntns-compat-mode",
    ),
    ("pid-namespace", "(00.02) Error (criu/namespaces.c:1117): Can't dump a pid namespace without the process init"),
    (
        "session-leader",
        "(00.02) Error (criu/cr-dump.c:1681): A session leader of 4711(7) is outside of its pid namespace",
    ),
    ("file-system", "(00.02) Error (criu/mount.c:724): mnt: FS mnt ./mnt/x dev 0x2b root / unsupported id 4b"),
    ("external-mount", "(00.02) Error (criu/mount.c:3141): mnt: No mapping for 452:/etc/resolv.conf mountpoint"),
    ("file-system", "(00.02) Error (criu/mount.c:1809): mnt: Unable to dump a file system for 44:./x"),
    ("tmpfs-content", "(00.02) Error (criu/filesystems.c:426): mnt: Can't dump tmpfs content"),
    ("cgroup-namespace", "(00.02) Error (criu/cgroup.c:1287): cg: failed preparing cgns"),
    (
        "sysv-shm",
        "(00.02) Error (criu/cr-dump.c:477): Task 4711 with SysVIPC shmem map @7f0000000000 doesn't live in IPC ns",
    ),
    ("sysv-exists", "(00.02) Error (criu/ipc_ns.c:790): Can't create IPC shared memory: File exists"),
    ("sysv-exists", "(00.02) Error (criu/ipc_ns.c:717): Can't set desired IPC msg ID"),
    ("pid-taken", "(00.02) Error (criu/cr-restore.c:1230): Can't fork for 2: File exists"),
    ("pid-taken", "(00.02) Error (criu/cr-restore.c:1539): Pid 12 do not match expected 2"),
    (
        "iptables-missing",
        "(00.02) Error (criu/net.c:3332): net: Locking network failed: iptables-restore returned -1. This may be connected to disabled CONFIG_NETFILTER_XT_MARK",
    ),
    ("nftables", "(00.02) Error (criu/net.c:3308): net: Locking network failed using nftables"),
    ("nftables-missing", "(00.02) Error (criu/net.c:3311): net: CRIU was built without libnftables support"),
    ("kernel-probe", "(00.02) Error (criu/kerndat.c:1950): kerndat_tcp_repair failed when initializing kerndat."),
    ("criu-timeout", "(00.02) Error (criu/cr-dump.c:1808): Timeout reached. Try to interrupt: 1"),
    (
        "seccomp",
        "(00.02) pie: 7: Error (criu/pie/restorer.c:546): seccomp: SECCOMP_SET_MODE_FILTER returned -22 on tid 7",
    ),
    ("lsm", "(00.02) Error (criu/lsm.c:406): lsm: apparmor LSM specified but apparmor not supported by kernel"),
    ("cpu", "(00.02) Error (criu/arch/x86/cpu.c:297): cpu: CPU capabilities do not match run time"),
    ("cpu", "(00.02) Error (criu/arch/x86/cpu.c:247): cpu: FPU feature required by image is not supported on host"),
    ("no-space", "(00.02) Error (criu/image.c:500): Can't write image: No space left on device"),
];

#[test]
fn every_row_is_found_by_what_criu_writes() {
    for ((code, line), known) in LINES.iter().zip(known_failures()) {
        assert_eq!(*code, known.code, "rows and lines are in the same order: {line}");
        assert!(known.matches(line), "{code}: {line}");
        let diagnosis = diagnose(line);
        assert_eq!(diagnosis.code, *code, "{line}");
        assert!(diagnosis.line.starts_with("Error ("), "{}", diagnosis.line);
    }
}

#[test]
fn the_cause_is_found_among_noise_and_consequences() {
    let log = "\
(00.000010) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.010000) Warn  (criu/x.c:1): Error is not here
(00.020000) Error (criu/sk-inet.c:188): inet: Connected TCP socket, consider using --tcp-established option.
(00.020100) Error (criu/cr-dump.c:1698): Dump files (pid: 4711) failed with -1
(00.020200) Error (criu/cr-dump.c:2128): Dumping FAILED.
";
    let diagnosis = diagnose(log);
    assert_eq!(diagnosis.code, "tcp-established");
    let text = diagnosis.to_string();
    assert!(text.contains("Connected TCP socket") && text.contains("tcp-established"), "{text}");
}

#[test]
fn a_known_cause_wins_over_an_unknown_line_before_it() {
    let log = "(00.1) Error (criu/a.c:1): strange\n(00.2) Error (criu/cgroup.c:1287): cg: failed preparing cgns\n";
    assert_eq!(diagnose(log).code, "cgroup-namespace");
}

#[test]
fn an_unknown_cause_is_shown_as_it_is() {
    let log = "(00.1) Error (criu/a.c:1): strange\n(00.2) Error (criu/cr-dump.c:2128): Dumping FAILED.\n";
    let diagnosis = diagnose(log);
    assert_eq!((diagnosis.code, diagnosis.line.as_str()), ("unknown", "Error (criu/a.c:1): strange"));
}

#[test]
fn only_consequences_still_give_a_line() {
    let diagnosis = diagnose("(00.2) Error (criu/cr-dump.c:2128): Dumping FAILED.\n");
    assert_eq!((diagnosis.code, diagnosis.line.as_str()), ("unknown", "Error (criu/cr-dump.c:2128): Dumping FAILED."));
}

#[test]
fn a_log_without_an_error_says_so() {
    for log in ["", "(00.1) all well\n", "(00.1) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self\n"] {
        assert_eq!(diagnose(log).code, "no-error", "{log}");
    }
}

#[test]
fn every_row_tells_what_to_do() {
    for known in known_failures() {
        assert!(!known.meaning.is_empty() && !known.hint.is_empty() && !known.pattern.is_empty(), "{known:?}");
        assert!(known.code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{}", known.code);
    }
}
