//! Counters of the interfaces in a pod's network namespace.
//!
//! A process of the pod shows them in `/proc/PID/net/dev`, so the namespace is entered only where none runs: by a thread
//! that ends thereafter.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fd::AsFd as _;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, statat};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Most that is read of the counters: a line of 130 bytes for each of thousands of interfaces.
const FILE_MAX: u64 = 1 << 20;

/// The interface that every namespace has, whose traffic never leaves the pod.
const LOOPBACK: &str = "lo";

/// One interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) received: Traffic,
    pub(crate) sent: Traffic,
}

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) errors: u64,
    pub(crate) dropped: u64,
}

/// The interfaces, but for the loopback, of the namespace pinned at `netns`. `members` are processes that may be in it.
pub(crate) fn interfaces(netns: &Path, members: &[u32]) -> io::Result<Vec<Interface>> {
    let namespace = File::open(netns)?;
    let facts = namespace.metadata()?;
    let seen = members.iter().find_map(|pid| through_member(*pid, (facts.dev(), facts.ino())).ok().flatten());
    let text = match seen {
        Some(text) => text,
        None => inside(namespace)?,
    };
    Ok(parse(&text))
}

/// The counters as the process `pid` sees them; none unless it is in that namespace. A process that ends meanwhile, and
/// another that gets its number, are told apart by the descriptor of its directory.
fn through_member(pid: u32, namespace: (u64, u64)) -> io::Result<Option<String>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let process = openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())?;
    let own = statat(&process, "ns/net", AtFlags::empty())?;
    if (own.st_dev, own.st_ino) != namespace {
        return Ok(None);
    }
    let file = openat(&process, "net/dev", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    text(file.into()).map(Some)
}

/// The counters as a thread sees them that enters the namespace.
fn inside(namespace: File) -> io::Result<String> {
    let look = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        text(File::open("/proc/thread-self/net/dev")?)
    };
    // The thread ends with its namespace: none of the runtime's may stay there.
    let looked = std::thread::Builder::new().name("netns".into()).spawn(look)?.join();
    looked.unwrap_or_else(|_| Err(io::Error::other("the thread that looked into the network namespace failed")))
}

fn text(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// `/proc/net/dev`: two lines of headings, then `name: ` and eight counters for each direction (proc_net(5)).
fn parse(text: &str) -> Vec<Interface> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let direction = |first: usize| {
            let at = |place: usize| counters.get(first + place).copied();
            Some(Traffic { bytes: at(0)?, packets: at(1)?, errors: at(2)?, dropped: at(3)? })
        };
        Some(Interface { name: name.trim().to_owned(), received: direction(0)?, sent: direction(8)? })
    };
    text.lines().skip(2).filter_map(interface).filter(|interface| interface.name != LOOPBACK).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1234 12 0 0 0 0 0 0 1234 12 0 0 0 0 0 0
  eth0: 104857600   72631    1    2    0     0          0         0  1048576   15231    3    4    0     0       0          0
eth0.1:0 0 0 0 0 0 0 0 7 1 0 0 0 0 0 0
";

    #[test]
    fn counters_of_both_directions_are_read() {
        let found = parse(RECORDED);
        assert_eq!(found.len(), 2, "the loopback is left out: {found:?}");
        let eth0 = Interface {
            name: "eth0".into(),
            received: Traffic { bytes: 104_857_600, packets: 72_631, errors: 1, dropped: 2 },
            sent: Traffic { bytes: 1_048_576, packets: 15_231, errors: 3, dropped: 4 },
        };
        assert_eq!(found[0], eth0);
        assert_eq!((found[1].name.as_str(), found[1].sent.bytes), ("eth0.1", 7), "no space behind the colon");
        assert_eq!(parse(""), []);
        assert_eq!(parse("a\nb\neth0: 1 2 3\n"), [], "a line cut short is none");
    }

    #[test]
    fn a_namespace_is_seen_alike_through_a_process_and_from_inside() {
        let own = Path::new("/proc/self/ns/net");
        let names = |found: Vec<Interface>| found.into_iter().map(|interface| interface.name).collect::<Vec<_>>();
        let through = interfaces(own, &[std::process::id()]).unwrap();
        let inside = interfaces(own, &[]).unwrap();
        assert_eq!(names(through), names(inside));
        let strangers = (0, 0);
        assert!(through_member(std::process::id(), strangers).unwrap().is_none(), "it is in another namespace");
    }
}
