//! Tests on this machine's real hierarchies. They need root.

use super::*;
use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A cgroup of the test's own and a process in it; both go away with it.
pub(crate) struct Scratch {
    pub(crate) cgroup: Cgroup,
    child: Option<Child>,
}

impl Scratch {
    pub(crate) fn new(cgroups: &Cgroups) -> Scratch {
        let path = format!("/stasis-test-{}/inner", &stasis_sys::file::random_id()[..16]);
        let cgroup = cgroups.at(&path);
        cgroup.create().unwrap();
        Scratch { cgroup, child: None }
    }

    /// Starts a shell, and lets it run `script` once it is in the cgroup, so that none of its children is outside.
    pub(crate) fn run(&mut self, script: &str) -> u32 {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("read go; {script}")]).stdin(Stdio::piped()).stdout(Stdio::null());
        let child = self.child.insert(command.stderr(Stdio::null()).spawn().unwrap());
        let pid = child.id();
        self.cgroup.attach(pid).unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        pid
    }

    fn reap(&mut self) -> std::process::ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.cgroup.thaw();
        let _ = self.cgroup.kill_all();
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        let outer = self.cgroup.path().trim_end_matches("/inner").to_owned();
        let removed = probe().at(&outer).remove();
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

pub(crate) fn probe() -> Cgroups {
    Cgroups::probe().expect("this test needs cgroups mounted under /sys/fs/cgroup, and root")
}

/// On a hybrid host both versions can be tested.
fn unified_only() -> Cgroups {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lines: Vec<&str> = mountinfo.lines().filter(|line| line.contains(" - cgroup2 ")).collect();
    Cgroups::from_mountinfo(lines.join("\n").as_bytes()).expect("this test needs a mounted cgroup2 hierarchy")
}

/// The processor time that a process has used, in ticks: a frozen one uses none.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().split_whitespace().nth(11).unwrap().parse().unwrap()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn check_life(cgroups: &Cgroups) {
    let mut scratch = Scratch::new(cgroups);
    let cgroup = scratch.cgroup.clone();
    assert!(cgroup.exists());
    cgroup.create().unwrap();
    let pid = scratch.run("while :; do :; done");
    assert_eq!(cgroup.procs().unwrap(), [pid]);
    assert_eq!(cgroups.of_pid(pid).unwrap().path(), cgroup.path());
    let outer = cgroups.at(cgroup.path().trim_end_matches("/inner"));
    assert_eq!(outer.procs().unwrap(), [pid], "processes below count too");

    assert!(!cgroup.is_frozen().unwrap());
    cgroup.freeze().unwrap();
    cgroup.freeze().unwrap();
    assert!(cgroup.is_frozen().unwrap());
    let before = ticks(pid);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(ticks(pid), before, "a frozen process ran");
    cgroup.thaw().unwrap();
    cgroup.thaw().unwrap();
    assert!(!cgroup.is_frozen().unwrap());
    wait_until("the thawed process runs", || ticks(pid) > before);

    assert!(outer.remove().is_err(), "a cgroup with processes cannot be removed");
    cgroup.freeze().unwrap();
    // `wait` in another thread, as a zombie counts until it is reaped.
    let mut child = scratch.child.take().unwrap();
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    outer.kill_all().unwrap();
    assert!(!reaper.join().unwrap().success());
    assert!(cgroup.procs().unwrap().is_empty());
    cgroup.kill_all().unwrap();

    outer.remove().unwrap();
    assert!(!cgroup.exists() && !outer.exists());
    outer.remove().unwrap();
    assert!(cgroup.procs().unwrap().is_empty() && !cgroup.is_frozen().unwrap());
}

#[test]
fn a_cgroup_lives_and_dies_in_this_hosts_mode() {
    check_life(&probe());
}

#[test]
fn a_cgroup_lives_and_dies_in_the_unified_hierarchy() {
    let cgroups = unified_only();
    assert_eq!(cgroups.mode(), Mode::V2);
    check_life(&cgroups);
}

#[test]
fn kill_all_ends_a_family_that_keeps_forking() {
    for cgroups in [probe(), unified_only()] {
        let mut scratch = Scratch::new(&cgroups);
        scratch.run("while :; do sleep 1000 & sleep 0.01; done");
        wait_until("it has forked", || scratch.cgroup.procs().unwrap().len() > 5);
        let mut child = scratch.child.take().unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        scratch.cgroup.kill_all().unwrap();
        reaper.join().unwrap();
        assert!(scratch.cgroup.procs().unwrap().is_empty());
    }
}

#[test]
fn an_oom_kill_is_counted() {
    let cgroups = probe();
    let mut scratch = Scratch::new(&cgroups);
    assert_eq!(scratch.cgroup.oom_kill_count().unwrap(), 0);
    let dir = scratch.cgroup.dir("memory").unwrap();
    let limit = dir.join(if cgroups.mode() == Mode::V2 { "memory.max" } else { "memory.limit_in_bytes" });
    fs::write(limit, "8388608").unwrap();
    scratch.run("exec tail /dev/zero");
    assert!(!scratch.reap().success());
    assert_eq!(scratch.cgroup.oom_kill_count().unwrap(), 1);
    assert!(scratch.cgroup.memory_bytes().unwrap() <= 8_388_608);
}

#[test]
fn the_number_of_processes_can_be_limited() {
    let cgroups = probe();
    let scratch = Scratch::new(&cgroups);
    let file = scratch.cgroup.dir("pids").unwrap().join("pids.max");
    scratch.cgroup.set_pids_max(Some(7)).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "7\n");
    scratch.cgroup.set_pids_max(None).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "max\n");
}

#[test]
fn the_root_and_paths_outside_are_refused() {
    for cgroups in [probe(), unified_only()] {
        for path in ["/", "//"] {
            let root = cgroups.at(path);
            assert!(matches!(root.freeze(), Err(Error::Root { .. })));
            assert!(matches!(root.thaw(), Err(Error::Root { .. })));
            assert!(matches!(root.kill_all(), Err(Error::Root { .. })));
            assert!(matches!(root.remove(), Err(Error::Root { .. })));
            assert!(matches!(root.set_pids_max(None), Err(Error::Root { .. })));
        }
        for path in ["../x", "/a/../../x", "a"] {
            let outside = cgroups.at(path);
            assert!(!outside.exists());
            let results = [outside.create(), outside.freeze(), outside.kill_all(), outside.remove(), outside.attach(1)];
            assert!(results.iter().all(|result| matches!(result, Err(Error::InvalidPath { .. }))), "{path}");
        }
    }
}

#[test]
fn controllers_are_listed() {
    let controllers = probe().controllers();
    for needed in ["memory", "pids", "cpu"] {
        assert!(controllers.iter().any(|have| have == needed), "{needed} is missing from {controllers:?}");
    }
}
