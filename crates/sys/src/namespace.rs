//! Linux namespaces: made and pinned by bind mounts, entered for one call, compared.
//!
//! A namespace lives as long as something refers to it. A bind mount of `/proc/<pid>/ns/<kind>` on a file does, so a
//! pod's namespaces need no process. Only a PID namespace does: it dies with its first process, see [`pod_init`].
//!
//! All work happens in forked children, never in the caller, because entering a namespace is a matter of a thread and a
//! way back may fail. A child makes only direct system calls on what was prepared before the fork.

use std::ffi::CString;
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
pub use rustix::net::AddressFamily;
use rustix::net::{SocketFlags, SocketType};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::UnshareFlags;

use crate::mount;

/// Kind of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Network devices, addresses, sockets.
    Net,
    /// System V objects and POSIX message queues.
    Ipc,
    /// Host name and domain name.
    Uts,
    /// Process IDs.
    Pid,
}

impl Kind {
    /// Its name below `/proc/<pid>/ns`, and the name under which it is pinned.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Net => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::Pid => "pid",
        }
    }

    fn flag(self) -> UnshareFlags {
        match self {
            Kind::Net => UnshareFlags::NEWNET,
            Kind::Ipc => UnshareFlags::NEWIPC,
            Kind::Uts => UnshareFlags::NEWUTS,
            Kind::Pid => UnshareFlags::NEWPID,
        }
    }
}

/// Namespaces to make, and what is set inside them.
#[derive(Debug, Default)]
pub struct NewNamespaces<'a> {
    /// Which; of [`Kind::Net`] the loopback device is brought up. [`Kind::Pid`] is not made here but by [`pod_init`].
    pub kinds: &'a [Kind],
    /// Host name of the new UTS namespace.
    pub hostname: Option<&'a str>,
    /// Names and values of sysctls, written after all namespaces have been made. The names are separated by dots; a
    /// slash stands for a dot inside a component. That each belongs to one of the new namespaces is the caller's care.
    pub sysctls: &'a [(&'a str, &'a str)],
}

/// Makes namespaces and pins each on the file `<dir>/<kind>`, which it creates. On an error nothing stays.
pub fn pin_new(dir: &Path, new: &NewNamespaces<'_>) -> io::Result<()> {
    let steps = Steps::prepare(new)?;
    let mut child = Child::fork(|report| steps.run(report))?;
    let pinned =
        child.wait_ready(|step, error| steps.describe(step, error)).and_then(|()| pin_all(child.pid, new.kinds, dir));
    child.kill();
    pinned
}

/// Starts the first process of a new PID namespace and pins it on `<dir>/pid`. The process is a fork of this one that
/// has let go of everything: no open file, not dumpable, in `/`; all it does is to reap, and it ends by `SIGKILL` alone.
/// Returns its ID; the caller is its parent.
pub fn pod_init(dir: &Path) -> io::Result<i32> {
    let mut child = Child::clone_into(Kind::Pid.flag(), become_init)?;
    let pinned = child
        .wait_ready(|step, error| describe(["leaving the session", "leaving the directory", "hiding"][step], &error))
        .and_then(|()| pin(child.pid, Kind::Pid, dir));
    match pinned {
        Ok(()) => Ok(child.leave_running()),
        Err(error) => {
            child.kill();
            Err(error)
        }
    }
}

/// Takes the bind mount off a pinned namespace and removes the file. That there is none is no error.
pub fn unpin(path: &Path) -> io::Result<()> {
    mount::unmount(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(describe(format!("removing {}", path.display()), &error))
        }
        _ => Ok(()),
    }
}

/// Sets the host name of a UTS namespace that is pinned at `path`.
pub fn set_hostname(path: &Path, hostname: &str) -> io::Result<()> {
    let namespace = File::open(path).map_err(|error| describe(path.display(), &error))?;
    let mut child = Child::fork(|report| {
        report.check(0, rustix::thread::move_into_link_name_space(namespace.as_fd(), None))?;
        report.check(1, set_own_hostname(hostname.as_bytes()))
    })?;
    let set = child
        .wait_ready(|_, error| describe(format!("setting the host name {hostname} in {}", path.display()), &error));
    child.kill();
    set
}

/// A TCP socket, non-blocking and not connected, that lives in the network namespace pinned at `path`. It is made by a
/// thread of its own that enters the namespace and ends: a socket stays where it was made.
pub fn tcp_socket_in(path: &Path, family: AddressFamily) -> io::Result<OwnedFd> {
    let namespace = File::open(path).map_err(|error| describe(path.display(), &error))?;
    let make = move || -> io::Result<OwnedFd> {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), None)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
    };
    let thread = std::thread::Builder::new().name("netns-socket".to_owned()).spawn(make)?;
    let made = thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes the socket panicked")));
    made.map_err(|error| describe(format!("making a socket in {}", path.display()), &error))
}

/// Whether two files, such as `/proc/<pid>/ns/net` and a pin, are the same namespace.
pub fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let identity = |path: &Path| {
        fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).map_err(|error| describe(path.display(), &error))
    };
    Ok(identity(one)? == identity(other)?)
}

fn pin_all(pid: i32, kinds: &[Kind], dir: &Path) -> io::Result<()> {
    for (done, kind) in kinds.iter().enumerate() {
        pin(pid, *kind, dir).inspect_err(|_| {
            for kind in &kinds[..done] {
                // What failed is reported; this only takes back what went well before.
                let _ = unpin(&dir.join(kind.name()));
            }
        })?;
    }
    Ok(())
}

/// Pins a namespace of the process `pid` on the file `<dir>/<kind>`, which it creates. On an error nothing stays.
pub fn pin(pid: i32, kind: Kind, dir: &Path) -> io::Result<()> {
    let target = dir.join(kind.name());
    // Never over an existing file: it could be the pin of a namespace in use.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&target)
        .map_err(|error| describe(format!("creating {}", target.display()), &error))?;
    mount::bind(Path::new(&format!("/proc/{pid}/ns/{}", kind.name())), &target).inspect_err(|_| {
        // The error that matters is the one of the mount.
        let _ = fs::remove_file(&target);
    })
}

/// What the child does, all memory for it allocated before the fork.
struct Steps {
    flags: UnshareFlags,
    loopback: bool,
    hostname: Option<Vec<u8>>,
    sysctls: Vec<(CString, Vec<u8>)>,
}

/// Steps of [`Steps::run`]; sysctl number `n` is step `SYSCTL + n`.
const UNSHARE: usize = 0;
const LOOPBACK: usize = 1;
const HOSTNAME: usize = 2;
const SYSCTL: usize = 3;

impl Steps {
    fn prepare(new: &NewNamespaces<'_>) -> io::Result<Steps> {
        let sysctl = |(name, value): &(&str, &str)| {
            let path = sysctl_path(name)?;
            Ok((CString::new(path.as_os_str().as_bytes())?, value.as_bytes().to_vec()))
        };
        Ok(Steps {
            flags: new
                .kinds
                .iter()
                .filter(|kind| **kind != Kind::Pid)
                .fold(UnshareFlags::empty(), |all, k| all | k.flag()),
            loopback: new.kinds.contains(&Kind::Net),
            hostname: new.hostname.map(|name| name.as_bytes().to_vec()),
            sysctls: new.sysctls.iter().map(sysctl).collect::<io::Result<_>>()?,
        })
    }

    fn run(&self, report: &Report<'_>) -> Result<(), ()> {
        // SAFETY: the forked child has one thread, and no flag here touches the descriptor table.
        report.check(UNSHARE, unsafe { rustix::thread::unshare_unsafe(self.flags) })?;
        if self.loopback {
            report.check(LOOPBACK, loopback_up())?;
        }
        if let Some(hostname) = &self.hostname {
            report.check(HOSTNAME, set_own_hostname(hostname))?;
        }
        for (index, (path, value)) in self.sysctls.iter().enumerate() {
            let written = rustix::fs::open(path.as_c_str(), OFlags::WRONLY | OFlags::NOFOLLOW, Mode::empty())
                .and_then(|file| rustix::io::write(&file, value));
            report.check(SYSCTL + index, written.map(drop))?;
        }
        Ok(())
    }

    fn describe(&self, step: usize, error: io::Error) -> io::Error {
        match step {
            UNSHARE => describe("making the pod's namespaces", &error),
            LOOPBACK => describe("bringing the loopback device up", &error),
            HOSTNAME => describe("setting the host name", &error),
            _ => match self.sysctls.get(step - SYSCTL) {
                Some((path, value)) => {
                    let (path, value) = (path.to_string_lossy(), String::from_utf8_lossy(value));
                    describe(format!("writing {value} to the sysctl {path}"), &error)
                }
                None => error,
            },
        }
    }
}

fn sysctl_path(name: &str) -> io::Result<PathBuf> {
    // A dot separates and a slash stands for a dot, or the other way round (sysctl(8)): the first one met decides.
    let slashes_separate = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/');
    let components: Vec<String> = match slashes_separate {
        true => name.split('/').map(str::to_owned).collect(),
        false => name.split('.').map(|component| component.replace('/', ".")).collect(),
    };
    let plain = |component: &String| !matches!(component.as_str(), "" | "." | "..") && !component.contains('\0');
    if components.len() < 2 || !components.iter().all(plain) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no name of a sysctl")));
    }
    Ok(Path::new("/proc/sys").join(components.join("/")))
}

fn set_own_hostname(hostname: &[u8]) -> Result<(), Errno> {
    // SAFETY: sethostname reads `len` bytes at `name`, which is what the slice has.
    match unsafe { libc::sethostname(hostname.as_ptr().cast(), hostname.len()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

fn loopback_up() -> Result<(), Errno> {
    // SAFETY: an ifreq of zero bytes is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, and `request` is one that lives through the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// The life of a pod's init after the fork.
fn become_init(report: &Report<'_>) -> Result<(), ()> {
    report.check(0, rustix::process::setsid().map(drop))?;
    report.check(1, rustix::process::chdir(c"/"))?;
    let hidden = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    report.check(2, hidden)?;
    // The name is for people who read ps; whether it can be set matters to nobody.
    let _ = rustix::thread::set_name(c"pod-init");
    // The caller's handlers must not run here; and the first process of a namespace gets those signals of its own children
    // only that it has a handler for.
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no code. KILL, STOP and the two signals of the C library refuse, which is as well.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: with SIG_IGN no handler runs. The kernel then reaps children of this process by itself, those included
    // that it inherits as the first process of its namespace.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    report.ready();
    // SAFETY: this forked process returns to nobody that could use a descriptor; it owns none it needs.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    loop {
        // SAFETY: pause has no arguments. Signals from inside the namespace are ignored for its first process as long as
        // no handler is installed, so nothing but SIGKILL from outside ends this.
        unsafe { libc::pause() };
    }
}

/// The child's way to say how far it came: nothing on success but one byte, the step and the error number on failure.
struct Report<'a>(BorrowedFd<'a>);

impl Report<'_> {
    fn check(&self, step: usize, result: Result<(), Errno>) -> Result<(), ()> {
        result.map_err(|error| {
            let mut message = [0u8; 8];
            message[..4].copy_from_slice(&(step as u32).to_ne_bytes());
            message[4..].copy_from_slice(&error.raw_os_error().to_ne_bytes());
            // Less than PIPE_BUF, so written in one piece. The parent holds the other end.
            let _ = rustix::io::write(self.0, &message);
        })
    }

    fn ready(&self) {
        // As above.
        let _ = rustix::io::write(self.0, &[1]);
    }
}

/// A forked child that either stays as a process to pin namespaces from, or lives on.
struct Child {
    pid: i32,
    report: File,
}

impl Child {
    /// Forks; the child runs `work`, says that it is ready, and waits to be killed. It ends with the calling thread: it
    /// has copies of all descriptors, and what is locked through them would stay locked after a sudden end of its parent.
    fn fork(work: impl FnOnce(&Report<'_>) -> Result<(), ()>) -> io::Result<Child> {
        let parent = rustix::process::getpid();
        Self::clone_into(UnshareFlags::empty(), |report| {
            report.check(0, rustix::process::set_parent_process_death_signal(Some(Signal::KILL)))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(());
            }
            work(report)
        })
    }

    fn clone_into(namespaces: UnshareFlags, work: impl FnOnce(&Report<'_>) -> Result<(), ()>) -> io::Result<Child> {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // SAFETY: a clone_args of zero bytes is valid.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.flags = u64::from(namespaces.bits());
        arguments.exit_signal = libc::SIGCHLD as u64;
        // SAFETY: without CLONE_VM and with no stack of its own the child is a copy of this process with one thread, as
        // after fork. It makes direct system calls on memory prepared beforehand, and ends by _exit or a signal, so that
        // neither locks of other threads nor destructors of the parent matter to it.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<libc::clone_args>()) };
        match pid {
            0 => {
                let report = Report(theirs.as_fd());
                if work(&report).is_ok() {
                    report.ready();
                    loop {
                        // SAFETY: pause has no arguments; the parent kills this process.
                        unsafe { libc::pause() };
                    }
                }
                // SAFETY: ends this process at once, without running anything of the parent's.
                unsafe { libc::_exit(1) }
            }
            1.. => Ok(Child { pid: pid as i32, report: ours.into() }),
            _ => Err(io::Error::from(last_errno())),
        }
    }

    /// Waits until the child is ready; `explain` turns step and error into words.
    fn wait_ready(&mut self, explain: impl FnOnce(usize, io::Error) -> io::Error) -> io::Result<()> {
        let mut message = [0u8; 8];
        match self.report.read(&mut message)? {
            1 => Ok(()),
            8 => {
                let (step, error) = message.split_at(4);
                let step = u32::from_ne_bytes(step.try_into().expect("four of eight bytes"));
                let error = i32::from_ne_bytes(error.try_into().expect("four of eight bytes"));
                Err(explain(step as usize, io::Error::from_raw_os_error(error)))
            }
            _ => Err(io::Error::other("a helper process died before it was ready")),
        }
    }

    fn leave_running(self) -> i32 {
        self.pid
    }

    fn kill(self) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // Our own child, not reaped yet: the number cannot mean anybody else.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        while matches!(rustix::process::waitpid(Some(pid), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn describe(what: impl Display, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
#[path = "namespace_tests.rs"]
mod tests;
