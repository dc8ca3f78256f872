//! The sockets of a network namespace, by inode.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::process::Process;

/// TCP's states as `/proc/net/tcp` writes them (net/tcp_states.h).
const CLOSED: u8 = 7;
const LISTEN: u8 = 10;

/// A TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tcp {
    state: u8,
    /// Bytes received; of a listening one, connections that nobody has accepted.
    waiting: u64,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
}

impl Tcp {
    /// Whether it has a peer, in whatever state the connection is.
    pub(super) fn is_connected(&self) -> bool {
        self.state != LISTEN && self.state != CLOSED
    }

    /// Connections that nobody has accepted yet.
    pub(super) fn in_flight(&self) -> u64 {
        if self.state == LISTEN { self.waiting } else { 0 }
    }
}

/// TCP sockets of a network namespace.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    tcp: HashMap<u64, Tcp>,
}

impl Sockets {
    /// Those that the first living process sees: a pod has one network.
    pub(super) fn read(processes: &[Process]) -> Self {
        let Some(pid) = processes.first().map(|process| process.pid) else { return Self::default() };
        let text = |name: &str| fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
        let mut tcp = HashMap::new();
        for table in [text("tcp"), text("tcp6")] {
            tcp.extend(table.lines().skip(1).filter_map(entry));
        }
        Self { tcp }
    }

    pub(super) fn tcp(&self, inode: u64) -> Option<&Tcp> {
        self.tcp.get(&inode)
    }
}

/// A line: number, local, remote, state, queues, …, inode.
pub(super) fn entry(line: &str) -> Option<(u64, Tcp)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (_, received) = words.get(4)?.split_once(':')?;
    let socket = Tcp {
        state: u8::from_str_radix(words.get(3)?, 16).ok()?,
        waiting: u64::from_str_radix(received, 16).ok()?,
        local: address(words.get(1)?)?,
        remote: address(words.get(2)?)?,
    };
    Some((words.get(9)?.parse().ok()?, socket))
}

/// `0100007F:0050`: 32-bit words in the machine's order, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at * 8)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}
