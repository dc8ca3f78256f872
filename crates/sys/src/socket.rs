//! Sockets of other processes: TCP's repair mode is taken off.
//!
//! A program that dumps a process puts its TCP sockets into repair mode (`TCP_REPAIR`, CAP_NET_ADMIN). If it is killed
//! before it has put them back, every read and write of the process fails with EPERM.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// `TCP_REPAIR_OFF_NO_WP` (linux/tcp.h): off, without a probe that would tell the other side.
const REPAIR_OFF: libc::c_int = -1;

/// Takes the descriptors `numbers` of process `pid` out of repair mode; those that are no TCP sockets, or are not in it, stay
/// as they are. Returns how many were in it.
///
/// # Errors
/// If the process is gone, or its descriptors are refused (ptrace(2), access mode PTRACE_MODE_ATTACH_REALCREDS).
pub fn end_repair(pid: i32, numbers: impl IntoIterator<Item = i32>) -> io::Result<usize> {
    let process = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut ended = 0;
    for number in numbers {
        let number: ForeignRawFd = number;
        // Closed meanwhile is as good.
        let Ok(socket) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else { continue };
        if repair(&socket) == Some(true) && set_repair(&socket, REPAIR_OFF).is_ok() {
            ended += 1;
        }
    }
    Ok(ended)
}

/// Whether a TCP socket is in repair mode; none for what is no TCP socket.
fn repair(socket: &OwnedFd) -> Option<bool> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let at = (&raw mut value).cast::<libc::c_void>();
    // SAFETY: the descriptor is open for the call, and the kernel writes at most `length` bytes, the size of `value`, which
    // lives on this stack.
    let done = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, at, &raw mut length)
    };
    (done == 0).then_some(value != 0)
}

fn set_repair(socket: &OwnedFd, value: libc::c_int) -> io::Result<()> {
    let at = (&raw const value).cast::<libc::c_void>();
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the call, and the kernel reads `length` bytes, the size of `value`, which lives on
    // this stack.
    let done = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, at, length) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_in_repair_mode_works_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let socket = OwnedFd::from(client.try_clone().unwrap());
        set_repair(&socket, 1).expect("repair mode needs CAP_NET_ADMIN: run the tests as root");
        assert!((&client).write_all(b"x").is_err());
        let own = std::process::id().cast_signed();
        let stdin = 0;
        assert_eq!(end_repair(own, [stdin, i32::MAX, client.as_raw_fd()]).unwrap(), 1);
        (&client).write_all(b"y").unwrap();
        let mut read = [0];
        server.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"y");
        assert_eq!(end_repair(own, [client.as_raw_fd()]).unwrap(), 0, "none is in repair mode any more");
    }
}
