//! Gives up everything but reading, writing and memory: for a process that parses what a hostile party sent.
//!
//! What is open stays open; nothing can be opened, made, signalled or connected any more. A system call that is not
//! needed for that ends the process.

use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};

/// How a process is confined.
#[derive(Clone, Copy, Debug)]
pub struct Confinement {
    /// User and group to become; only root can.
    pub user: Option<u32>,
    /// Most memory that may be written to, in bytes.
    pub memory: u64,
    /// Most time on a processor, in seconds.
    pub cpu_seconds: u64,
}

/// System calls that are left: on what is open, on memory, to end.
const CALLS: [libc::c_long; 27] = [
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fcntl,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls whose third argument is the protection of memory, which may not be executable.
const PROTECTING_CALLS: [libc::c_long; 2] = [libc::SYS_mmap, libc::SYS_mprotect];

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Confines this process, which has one thread, for good.
///
/// # Errors
/// Of the step that failed. Those before it stay.
pub fn confine(confinement: &Confinement) -> io::Result<()> {
    let limit = |resource, value| {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(io::Error::from)
    };
    limit(Resource::Core, 0)?;
    limit(Resource::Fsize, 0)?;
    limit(Resource::Nproc, 0)?;
    limit(Resource::Data, confinement.memory)?;
    limit(Resource::Cpu, confinement.cpu_seconds)?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    if let Some(user) = confinement.user {
        become_user(user)?;
    }
    filter_calls()
}

fn become_user(user: u32) -> io::Result<()> {
    // SAFETY: the three calls take integers and a null pointer with a length of 0. They act on this thread, which is the
    // process's only one.
    let done = unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, user, user, user) == 0
            && libc::syscall(libc::SYS_setresuid, user, user, user) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn filter_calls() -> io::Result<()> {
    let program = program();
    let length = libc::c_ushort::try_from(program.len()).map_err(io::Error::other)?;
    let handle = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program and the handle to it live until the call returns, and the kernel copies and does not change
    // them.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const handle) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends the process unless the call is one that is left.
fn program() -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let branch = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let number = |call: libc::c_long| u32::try_from(call).unwrap_or(u32::MAX);
    let (kill, allow) = (step(RETURN, libc::SECCOMP_RET_KILL_PROCESS), step(RETURN, libc::SECCOMP_RET_ALLOW));
    // Offsets in the kernel's seccomp_data: call 0, architecture 4, third argument 32.
    let mut program = vec![step(LOAD, 4), branch(EQUAL, ARCHITECTURE, 1, 0), kill, step(LOAD, 0)];
    for call in CALLS {
        program.extend([branch(EQUAL, number(call), 0, 1), allow]);
    }
    for call in PROTECTING_CALLS {
        let executable = u32::try_from(libc::PROT_EXEC).unwrap_or(u32::MAX);
        program.extend([
            branch(EQUAL, number(call), 0, 4),
            step(LOAD, 32),
            branch(ANY_BIT, executable, 0, 1),
            kill,
            allow,
        ]);
    }
    program.push(kill);
    program
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    /// What a test program of this very binary does once it is confined; it is run by the test below.
    #[test]
    #[ignore = "a part of a_confined_process_can_only_read_and_write, in a process of its own"]
    fn confined_part() {
        let act = std::env::var("STASIS_TEST_ACT").expect("this is run by another test");
        // A thread of the test harness: the filter is of this thread, as is the user.
        confine(&Confinement { user: Some(2_147_450_881), memory: 512 << 20, cpu_seconds: 10 }).unwrap();
        match act.as_str() {
            "echo" => {
                let mut text = [0; 5];
                std::io::stdin().read_exact(&mut text).unwrap();
                std::io::stderr().write_all(&text).unwrap();
                assert_eq!(rustix::fs::fstat(std::io::stdin()).map(|_| ()), Ok(()));
            }
            "open" => drop(std::fs::File::open("/etc/passwd")),
            "connect" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "fork" => drop(Command::new("/bin/true").spawn()),
            "execute" => drop(rustix_map()),
            other => panic!("{other}"),
        }
        // Not by the harness, which would need more than is left.
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) }
    }

    /// Memory that can be executed.
    fn rustix_map() -> std::io::Result<()> {
        // SAFETY: a new mapping that nothing refers to.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }

    #[test]
    fn a_confined_process_can_only_read_and_write() {
        let run = |act: &str| {
            let mut child = Command::new("/proc/self/exe")
                .args(["--exact", "confine::tests::confined_part", "--ignored", "--test-threads=1", "--nocapture"])
                .env("STASIS_TEST_ACT", act)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(b"hello").unwrap();
            child.wait_with_output().unwrap()
        };
        let echo = run("echo");
        assert!(echo.status.success(), "{echo:?}; becoming another user needs root");
        assert!(echo.stderr.ends_with(b"hello"));
        for act in ["open", "connect", "fork", "execute"] {
            assert_eq!(run(act).status.signal(), Some(libc::SIGSYS), "{act}");
        }
    }
}
