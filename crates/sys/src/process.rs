//! Processes: what a child does between fork and exec, signals by descriptor, and reaping.
//!
//! It knows nothing of containers; who waits for whom is the caller's business.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use rustix::thread::UnshareFlags;

/// What a child does between fork and exec, in the order of the fields.
#[derive(Debug, Default)]
pub struct Setup {
    /// Namespaces to enter, each an open `/proc/<pid>/ns/<kind>` or a bind mount of one.
    pub namespaces: Vec<OwnedFd>,
    /// A mount namespace of its own: mounts made in it are seen nowhere else, and end with its last process.
    pub private_mounts: bool,
    /// A session of its own, so that no terminal's hang-up reaches it.
    pub new_session: bool,
    /// The signal it gets when the thread that spawned it ends.
    pub parent_death_signal: Option<Signal>,
    /// No descriptor but its stdio, whatever was open here without close-on-exec, by inheritance say.
    pub only_stdio: bool,
}

/// Makes `command` do `setup` before it executes. A failure there is the error of [`Command::spawn`].
pub fn prepare(command: &mut Command, setup: Setup) -> &mut Command {
    let before_exec = move || -> io::Result<()> {
        for namespace in &setup.namespaces {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), None)?;
        }
        if setup.private_mounts {
            // SAFETY: the child has one thread and shares its file-system information with nobody; UnshareFlags::NEWNS
            // does not touch the descriptor table.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
            mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        }
        if setup.new_session {
            rustix::process::setsid()?;
        }
        if let Some(signal) = setup.parent_death_signal {
            rustix::process::set_parent_process_death_signal(Some(signal))?;
        }
        if setup.only_stdio {
            close_others_on_exec()?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child and makes nothing but direct system calls: it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(before_exec) }
}

/// Not at once: the standard library reports a failed exec through a descriptor of its own.
fn close_others_on_exec() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: close_range takes integers, and with CLOSE_RANGE_CLOEXEC closes nothing now.
    match unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes this process the parent of all descendants whose own parent ends (`PR_SET_CHILD_SUBREAPER`).
pub fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Takes over what standard input is, and leaves `/dev/null` in its place.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: dup2 takes two integers. Descriptor 0 is closed by it, which no owned value stands for: the standard
    // library's handle borrows it, and stays valid.
    match unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) } {
        0 => Ok(taken),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a process group has any process, zombies included.
pub fn group_exists(group: i32) -> io::Result<bool> {
    match rustix::process::test_kill_process_group(pid_of(group)?) {
        Ok(()) => Ok(true),
        Err(Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Takes the exit status of one child that has ended, whichever it is; `None` when none has, or there is no child.
/// Nobody else in the process may wait for children of their own then.
pub fn reap_any() -> io::Result<Option<(i32, ExitStatus)>> {
    loop {
        return match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => Ok(Some((pid.as_raw_nonzero().get(), ExitStatus::from_raw(status.as_raw())))),
            Ok(None) | Err(Errno::CHILD) => Ok(None),
            Err(Errno::INTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}

/// Sends a signal to a process by its ID. Sound for a child that is not reaped yet; for anybody else see [`Pidfd`].
/// The signal is a number, so that real-time signals can be sent.
pub fn signal(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        // kill(2) would take these for a process group, or for every process.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is no process ID")));
    }
    // SAFETY: kill takes two integers.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to every process of a process group.
pub fn signal_group(group: i32, signal: Signal) -> io::Result<()> {
    Ok(rustix::process::kill_process_group(pid_of(group)?, signal)?)
}

/// A process that stays the same one, whatever becomes of its number.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens the process that has this ID now.
    pub fn open(pid: i32) -> io::Result<Pidfd> {
        Ok(Pidfd(rustix::process::pidfd_open(pid_of(pid)?, PidfdFlags::empty())?))
    }

    /// Sends a signal; `ESRCH` if the process has been reaped.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.0, signal)?)
    }
}

impl AsFd for Pidfd {
    /// Becomes readable when the process ends.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn pid_of(pid: i32) -> io::Result<Pid> {
    Pid::from_raw(pid)
        .filter(|_| pid > 0)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is no process ID")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn a_prepared_child_has_its_own_mounts_and_session() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "readlink /proc/self/ns/mnt; cut -d' ' -f6 /proc/self/stat; echo $$"]);
        prepare(&mut command, Setup { private_mounts: true, new_session: true, ..Setup::default() });
        let output = command.output().expect("unsharing a mount namespace needs root");
        let text = String::from_utf8(output.stdout).unwrap();
        let [mounts, session, pid] = text.lines().collect::<Vec<_>>()[..] else { panic!("three lines: {text}") };
        assert_ne!(mounts, fs::read_link("/proc/self/ns/mnt").unwrap().to_str().unwrap());
        assert_eq!(session, pid);
    }

    #[test]
    fn a_child_can_be_left_with_its_stdio_alone() {
        // One that would be inherited: without close-on-exec.
        let leaked = rustix::io::dup(File::open("/dev/null").unwrap()).unwrap();
        let inherits = |only_stdio: bool| {
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(format!("test -e /proc/$$/fd/{}", leaked.as_raw_fd()));
            prepare(&mut command, Setup { only_stdio, ..Setup::default() }).status().unwrap().success()
        };
        assert!(inherits(false));
        assert!(!inherits(true));
    }

    #[test]
    fn a_namespace_that_is_none_fails_the_spawn() {
        let mut command = Command::new("/bin/true");
        let setup = Setup { namespaces: vec![File::open("/dev/null").unwrap().into()], ..Setup::default() };
        assert!(prepare(&mut command, setup).spawn().is_err());
    }

    #[test]
    fn signals_reach_one_process_and_never_a_group() {
        let mut child = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(signal(0, 9).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(signal(-pid, 9).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        Pidfd::open(pid).unwrap().signal(Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(15));
    }
}
