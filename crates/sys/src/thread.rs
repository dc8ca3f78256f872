//! What a thread does to itself: leaves for other namespaces, and turns signals into a descriptor.
//!
//! A process that does these before it starts a second thread does them for all of itself and its children. For what a
//! child does between fork and exec, see [`crate::process`].

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;

/// Moves the calling thread into a mount namespace of its own. Mounts it makes from now on are seen nowhere else and end
/// with the last process in it; unmounts elsewhere still reach it, so that it holds nothing busy.
pub fn private_mounts() -> io::Result<()> {
    // SAFETY: NEWNS unshares root and working directory of this thread too, which no memory depends on; the descriptor
    // table stays shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    Ok(mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// Moves the calling thread into a namespace, an open `/proc/<pid>/ns/<kind>` or a bind mount of one.
pub fn enter(namespace: impl AsFd) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), None)?)
}

/// Blocks `signals` for the calling thread, and for threads it starts later, and gives a descriptor that becomes
/// readable when one of them is pending. Programs started by [`std::process::Command`] begin with nothing blocked.
pub fn signal_descriptor(signals: &[Signal]) -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data, for which zero bytes are valid; sigemptyset then makes it the empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives through the call.
    unsafe { libc::sigemptyset(&mut set) };
    for signal in signals {
        // SAFETY: as above; the number is that of an existing signal.
        unsafe { libc::sigaddset(&mut set, signal.as_raw()) };
    }
    // SAFETY: the set is initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
        0 => {}
        error => return Err(io::Error::from_raw_os_error(error)),
    }
    // SAFETY: -1 asks for a new descriptor; the set is initialised.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::thread;

    #[test]
    fn mounts_of_a_private_thread_stay_its_own() {
        let dir = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                private_mounts().expect("a mount namespace needs root");
                crate::mount::tmpfs(dir.path(), 1 << 20, 0o700, &[]).unwrap();
                fs::write(dir.path().join("file"), "x").unwrap();
            });
            inside.join().unwrap();
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_blocked_signal_is_read_from_the_descriptor() {
        // On a thread of its own, so that the mask and the signal concern it alone.
        let caught = thread::spawn(|| {
            let fd = signal_descriptor(&[Signal::USR2]).unwrap();
            let mut buffer = [0u8; 256];
            assert_eq!(rustix::io::read(&fd, &mut buffer), Err(rustix::io::Errno::AGAIN));
            // SAFETY: both are numbers; the signal is blocked in the thread that it is sent to.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
            rustix::io::read(&fd, &mut buffer).unwrap();
            u32::from_ne_bytes(buffer[..4].try_into().unwrap())
        });
        assert_eq!(caught.join().unwrap(), libc::SIGUSR2 as u32);
    }
}
