//! Tests of [`super`]; they need root.

use super::*;
use crate::process::{self, Setup};
use std::process::Command;

/// A directory whose pins are taken off again.
struct Pins(tempfile::TempDir);

impl Pins {
    fn new() -> Pins {
        Pins(tempfile::tempdir().unwrap())
    }

    fn path(&self, kind: Kind) -> PathBuf {
        self.0.path().join(kind.name())
    }

    /// What a shell prints inside the pinned namespaces.
    fn shell(&self, kinds: &[Kind], script: &str) -> String {
        let namespaces = kinds.iter().map(|kind| File::open(self.path(*kind)).unwrap().into()).collect();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        process::prepare(&mut command, Setup { namespaces, ..Setup::default() });
        let output = command.output().expect("entering a namespace needs root");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for kind in [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Pid] {
            let _ = unpin(&self.path(kind));
        }
    }
}

#[test]
fn pinned_namespaces_are_new_and_set_up() {
    let pins = Pins::new();
    let kinds = [Kind::Net, Kind::Ipc, Kind::Uts];
    let sysctls = [("net.ipv4.ip_forward", "1"), ("kernel.shmmni", "1234")];
    pin_new(pins.0.path(), &NewNamespaces { kinds: &kinds, hostname: Some("pinned"), sysctls: &sysctls })
        .expect("making namespaces needs root");

    for kind in kinds {
        let own = PathBuf::from(format!("/proc/self/ns/{}", kind.name()));
        assert!(!is_same(&pins.path(kind), &own).unwrap(), "{kind:?}");
    }
    let script = "uname -n; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni /sys/class/net/lo/flags";
    let text = pins.shell(&kinds, script);
    assert!(text.starts_with("pinned\n1\n1234"), "{text}");
    // UP and RUNNING shows by whether the address answers at all.
    assert!(pins.shell(&kinds, "cat /proc/net/fib_trie").contains("127.0.0.1"));

    set_hostname(&pins.path(Kind::Uts), "renamed").unwrap();
    assert_eq!(pins.shell(&kinds, "uname -n"), "renamed");
}

#[test]
fn a_failed_step_is_named_and_leaves_nothing() {
    let pins = Pins::new();
    let new = NewNamespaces { kinds: &[Kind::Net], hostname: None, sysctls: &[("net.no.such", "1")] };
    let error = pin_new(pins.0.path(), &new).unwrap_err().to_string();
    assert!(error.contains("/proc/sys/net/no/such"), "{error}");
    assert!(mount::mounts_below(pins.0.path()).unwrap().is_empty());
    assert_eq!(fs::read_dir(pins.0.path()).unwrap().count(), 0);
}

#[test]
fn a_pin_is_never_put_over_another() {
    let pins = Pins::new();
    let new = NewNamespaces { kinds: &[Kind::Uts], hostname: Some("first"), sysctls: &[] };
    pin_new(pins.0.path(), &new).unwrap();
    let first = fs::metadata(pins.path(Kind::Uts)).unwrap().ino();
    fs::write(pins.0.path().join("net"), "").unwrap();
    let new = NewNamespaces { kinds: &[Kind::Net], ..NewNamespaces::default() };
    assert_eq!(pin_new(pins.0.path(), &new).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::metadata(pins.path(Kind::Uts)).unwrap().ino(), first);
}

#[test]
fn the_init_reaps_survives_signals_from_inside_and_ends_by_kill() {
    let pins = Pins::new();
    let init = pod_init(pins.0.path()).expect("making a PID namespace needs root");
    let pid = Pid::from_raw(init).unwrap();

    // In a forked shell, because only children enter a PID namespace that one joins.
    let inside = pins.shell(&[Kind::Pid], "sh -c 'kill -TERM 1; kill -KILL 1; sh -c \"sleep 0.01 & echo \\$!\"'");
    assert!(inside.parse::<i32>().unwrap() < 50, "{inside}");
    assert_eq!(fs::read_dir(format!("/proc/{init}/fd")).unwrap().count(), 0);
    assert_eq!(fs::read_to_string(format!("/proc/{init}/comm")).unwrap().trim(), "pod-init");
    assert!(rustix::process::waitpid(Some(pid), WaitOptions::NOHANG).unwrap().is_none(), "it is alive");

    process::signal(init, 9).unwrap();
    let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.terminating_signal(), Some(9));
}

#[test]
fn names_of_sysctls() {
    let check = |name: &str, path: Option<&str>| assert_eq!(sysctl_path(name).ok(), path.map(PathBuf::from), "{name}");
    check("net.ipv4.ip_forward", Some("/proc/sys/net/ipv4/ip_forward"));
    check("net/ipv4/conf/eth0.1/forwarding", Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"));
    check("net.ipv4.conf.eth0/1.forwarding", Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"));
    check("net..x", None);
    check("net/../../etc/passwd", None);
    check("kernel", None);
    check("", None);
}
