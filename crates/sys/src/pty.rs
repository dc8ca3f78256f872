//! Pseudo-terminals: the socket on which an OCI runtime hands over a terminal's master end, and its window size.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};

/// The runtime sends the terminal's name along with the descriptor; more than a path is nothing that we asked for.
const NAME_MAX: usize = 4096;

/// Takes the one descriptor that the peer of a connected socket sends (`SCM_RIGHTS`; runc's `--console-socket`), with
/// close-on-exec set. An end of the stream without a descriptor, and more than one, are errors; `WouldBlock` on a
/// non-blocking socket means that it has not come yet.
pub fn receive_descriptor(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut name = [0u8; NAME_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => continue,
            other => break other?,
        }
    };
    let mut descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let mut descriptors: Vec<OwnedFd> = descriptors.by_ref().flatten().collect();
    match (descriptors.pop(), descriptors.is_empty()) {
        (Some(descriptor), true) => Ok(descriptor),
        (None, _) if received.bytes == 0 => Err(invalid("the console socket was closed before a terminal came")),
        (None, _) => Err(invalid("the console socket brought no terminal")),
        (Some(_), false) => Err(invalid("the console socket brought more than one descriptor")),
    }
}

/// Sets the size of a terminal in characters; its foreground process gets `SIGWINCH`.
pub fn set_window_size(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    Ok(tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use rustix::pty::{OpenptFlags, openpt};
    use rustix::termios::tcgetwinsize;
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    fn send(socket: &UnixStream, descriptors: &[&OwnedFd]) {
        let borrowed: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(borrowed.is_empty() || control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        sendmsg(socket, &[IoSlice::new(b"/dev/pts/0")], &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn a_terminal_comes_over_and_takes_a_size() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, &[&openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap()]);
        let terminal = receive_descriptor(&ours).unwrap();
        set_window_size(&terminal, 40, 132).unwrap();
        let size = tcgetwinsize(&terminal).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (40, 132));
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        send(&theirs, &[&terminal, &terminal]);
        assert!(receive_descriptor(&ours).unwrap_err().to_string().contains("more than one"));
        send(&theirs, &[]);
        assert!(receive_descriptor(&ours).unwrap_err().to_string().contains("no terminal"));
        drop(theirs);
        assert!(receive_descriptor(&ours).unwrap_err().to_string().contains("closed"));
    }
}
