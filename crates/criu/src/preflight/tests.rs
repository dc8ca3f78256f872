//! The check on this very process, which opens what CRIU cannot dump.

use std::fs::File;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};

use super::*;

const STRICT: Allowed = Allowed { tcp: false, file_locks: false, link_remap: false, ghost_limit: GHOST_LIMIT };

/// The findings of this process with `code`, by descriptor.
fn found(code: &str, allowed: &Allowed) -> Vec<Finding> {
    let findings = examine(&[std::process::id()], allowed);
    findings.into_iter().filter(|finding| finding.code == code).collect()
}

#[track_caller]
fn check(code: &str, descriptor: u32, words: &str) {
    let findings = found(code, &STRICT);
    let finding = findings.iter().find(|finding| finding.descriptor == Some(descriptor));
    let text = finding.unwrap_or_else(|| panic!("{code} at {descriptor}: {findings:?}")).to_string();
    assert!(text.contains(words) && text.contains(&format!("({code})")), "{text}");
    assert!(text.contains(&format!("process {} (", std::process::id())), "{text}");
}

fn number(file: &impl std::os::fd::AsRawFd) -> u32 {
    file.as_raw_fd().unsigned_abs()
}

#[test]
fn connections_are_named_by_their_ends_unless_they_are_allowed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).unwrap();
    check("tcp-established", number(&client), &format!("to {address}"));
    check("tcp-in-flight", number(&listener), &format!("1 at {address}"));
    assert!(found("tcp-established", &Allowed { tcp: true, ..STRICT }).is_empty());
}

#[test]
fn deleted_files_are_measured_against_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    let mut large = File::create(&path).unwrap();
    large.write_all(&vec![1; 3 << 20]).unwrap();
    large.sync_all().unwrap();
    std::fs::hard_link(&path, dir.path().join("other")).unwrap();
    std::fs::remove_file(&path).unwrap();
    check("link-remap", number(&large), "large");
    std::fs::remove_file(dir.path().join("other")).unwrap();
    check("ghost-file", number(&large), "ghost-limit");
    let generous = Allowed { ghost_limit: 4 << 20, ..STRICT };
    assert!(!found("ghost-file", &generous).iter().any(|finding| finding.descriptor == Some(number(&large))));
}

#[test]
fn a_lock_is_seen_unless_locks_are_kept() {
    let file = tempfile::tempfile().unwrap();
    file.lock().unwrap();
    assert!(!found("file-locks", &STRICT).is_empty());
    assert!(found("file-locks", &Allowed { file_locks: true, ..STRICT }).is_empty());
}

#[test]
fn devices_that_criu_does_not_know_are_named() {
    let null = File::open("/dev/null").unwrap();
    assert!(!found("device", &STRICT).iter().any(|finding| finding.descriptor == Some(number(&null))));
    // Present on every kernel: character device 10:*.
    let Some(misc) = ["/dev/fuse", "/dev/net/tun", "/dev/loop-control"].iter().find_map(|path| File::open(path).ok())
    else {
        panic!("no misc device can be opened: this test needs root");
    };
    check("device", number(&misc), "/dev/");
}

#[test]
fn own_memory_is_seen() {
    let grown = vec![1u8; 32 << 20];
    let own = std::process::id();
    let seen = memory_bytes(&[own], None);
    assert!(seen >= grown.len() as u64, "{seen}");
    assert_eq!(memory_bytes(&[u32::MAX], None), 0);
}

#[test]
fn shared_memory_counts_once() {
    let status = "Name:\tpostgres\nVmRSS:\t  5000 kB\nRssAnon:\t  1000 kB\nRssFile:\t  3000 kB\nRssShmem:\t  1000 kB\nVmSwap:\t  500 kB\n";
    let of = |charged| dumped_bytes([status, status].map(str::to_owned), charged) / 1024;
    assert_eq!(of(None), 2 * 1500 + 2 * 1000);
    assert_eq!(of(Some(1200 * 1024)), 2 * 1500 + 1200);
}

#[test]
fn what_ends_meanwhile_is_passed_over() {
    assert!(examine(&[u32::MAX - 1], &STRICT).is_empty());
}

#[test]
fn a_line_of_the_kernels_table_is_read() {
    let line = "   0: 0100007F:0050 0200000A:1F90 01 00000000:00000003 00:00000000 00000000     0        0 4711 1";
    let (inode, tcp) = super::sockets::entry(line).unwrap();
    assert_eq!(
        (inode, tcp.local.to_string(), tcp.remote.to_string()),
        (4711, "127.0.0.1:80".into(), "10.0.0.2:8080".into())
    );
    assert!(tcp.is_connected() && tcp.in_flight() == 0);
    assert!(super::sockets::entry("  sl  local_address rem_address   st").is_none());
}
