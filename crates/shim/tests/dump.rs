//! The checkpoint worker on real containers, without a shim above it: the subcommand `dump` of the shim's program.
//!
//! Needs root, and `STASIS_ENGINES` for runc, CRIU and busybox.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stasis_cgroup::{Cgroup, Cgroups};
use stasis_sys::namespace::{Kind, NewNamespaces, pin_new, unpin};
use stasis_sys::{mount, process};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts as fast as it can be seen, in memory, in a file of the writable layer and on its output.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; echo $i >> /count; usleep 2000; done";

fn engine(name: &str) -> PathBuf {
    let engines = std::env::var_os("STASIS_ENGINES")
        .expect("STASIS_ENGINES must name the directory whose bin/ has runc, criu and busybox; see `cargo xtask test`");
    PathBuf::from(engines).join("bin").join(name)
}

/// A container of runc, and everything a job names.
struct Container {
    dir: tempfile::TempDir,
    id: String,
    cgroup: Cgroup,
    /// Copies the output into the log, as the shim does.
    log: Option<Child>,
}

impl Container {
    fn new(script: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("dump").tempdir_in("/tmp").unwrap();
        let id = stasis_sys::file::random_id()[..16].to_owned();
        let cgroup = Cgroups::probe().unwrap().at(&format!("/stasis-dump-{id}"));
        let container = Self { dir, id, cgroup, log: None };
        for name in
            ["lower/bin", "lower/proc", "lower/dev", "upper", "overlay", "rootfs", "members", "work", "out", "ns"]
        {
            fs::create_dir_all(container.path(name)).unwrap();
        }
        fs::copy(engine("busybox"), container.path("lower/bin/busybox")).unwrap();
        for applet in ["sh", "usleep", "sleep"] {
            std::os::unix::fs::symlink("busybox", container.path("lower/bin").join(applet)).unwrap();
        }
        let layers = mount::Mount {
            fs_type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: ["lowerdir=lower", "upperdir=upper", "workdir=overlay"]
                .map(|option| option.replace('=', &format!("={}/", container.dir.path().display())))
                .to_vec(),
        };
        mount::mount(&layers, &container.path("rootfs")).unwrap();
        pin_new(&container.path("ns"), &NewNamespaces { kinds: &[Kind::Net], ..NewNamespaces::default() }).unwrap();
        fs::write(container.path("config.json"), container.config(script).to_string()).unwrap();
        fs::write(container.path("criu.conf"), "").unwrap();
        fs::write(container.path("members/config.dump"), json!({"id": container.id, "name": "counter"}).to_string())
            .unwrap();
        fs::copy(container.path("config.json"), container.path("members/spec.dump")).unwrap();
        container
    }

    fn running(script: &str) -> Self {
        let mut container = Self::new(script);
        container.start_log(&["run"], &[]);
        container.wait_for_output(2);
        container
    }

    /// `runc <verb> -d` with the output on a pipe that is copied to the log.
    fn start_log(&mut self, verb: &[&str], options: &[&str]) {
        let log = File::options().append(true).create(true).open(self.path("log")).unwrap();
        let mut cat = Command::new("/bin/cat").stdin(Stdio::piped()).stdout(log).spawn().unwrap();
        let out = std::os::fd::OwnedFd::from(cat.stdin.take().unwrap());
        self.log = Some(cat);
        let mut runc = self.runc();
        runc.args(verb).arg("-d").arg("-b").arg(self.dir.path()).args(options).arg(&self.id);
        let error = out.try_clone().unwrap();
        let status = runc.stdin(Stdio::null()).stderr(error).stdout(out).status().unwrap();
        assert!(status.success(), "runc {verb:?}: {status}: {}", fs::read_to_string(self.path("log")).unwrap());
    }

    fn runc(&self) -> Command {
        let mut runc = Command::new(engine("runc"));
        runc.env("PATH", search_path()).arg("--root").arg(self.path("runc"));
        runc
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn archive(&self) -> PathBuf {
        self.path("out/checkpoint.tar")
    }

    fn config(&self, script: &str) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", script],
                        "env": ["PATH=/bin"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": {"org.criu.config": self.path("criu.conf")},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                       {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=8m"]}],
            "linux": {"cgroupsPath": self.cgroup.path(),
                      "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                                     {"type": "network", "path": self.path("ns/net")}]},
        })
    }

    fn job(&self) -> Value {
        json!({
            "request": {"id": self.id, "archive": self.archive(), "members": self.path("members"),
                        "upper": self.path("upper"), "log": self.path("log"), "timeout_ms": 60_000,
                        "leave_running": true, "criu": {}},
            "runc": engine("runc"), "runc_root": self.path("runc"), "cgroup": self.cgroup.path(),
            "netns": self.path("ns/net"), "bundle": self.dir.path(), "work_dir": self.path("work"),
        })
    }

    /// The numbers on the output so far.
    fn counts(&self) -> Vec<u64> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Waits until `more` numbers have come.
    fn wait_for_output(&self, more: usize) {
        let (before, started) = (self.counts().len(), Instant::now());
        while self.counts().len() < before + more {
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(started.elapsed() < PATIENCE, "the container does not run: {}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn check_unharmed(&self) {
        assert!(!self.cgroup.is_frozen().unwrap());
        self.wait_for_output(5);
        assert!(mount::mounts_below(&self.path("work")).unwrap().is_empty());
        assert_eq!(fs::read_dir(self.path("work")).unwrap().count(), 0);
        assert_eq!(fs::read(self.path("criu.conf")).unwrap(), b"", "the gate is seen by the worker alone");
    }

    fn check_nothing_written(&self) {
        let written: Vec<_> = fs::read_dir(self.path("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(written.is_empty(), "{written:?}");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Whatever the test did: nothing stays. A failed step must not hide the test's own failure.
        let _ = self.cgroup.thaw();
        let _ = self.cgroup.kill_all();
        let _ = self.runc().args(["delete", "-f", &self.id]).stderr(Stdio::null()).status();
        if let Some(mut log) = self.log.take() {
            let _ = log.kill();
            let _ = log.wait();
        }
        let _ = self.cgroup.remove();
        let _ = mount::unmount_all_below(self.dir.path());
        let _ = unpin(&self.path("ns/net"));
    }
}

fn search_path() -> String {
    format!("{}:{}", engine("").display(), std::env::var("PATH").unwrap_or_default())
}

/// A worker and what it has said so far.
struct Worker {
    child: Child,
    events: BufReader<std::process::ChildStdout>,
}

impl Worker {
    fn start(job: &Value) -> Self {
        Self::start_in(job, &search_path())
    }

    fn start_in(job: &Value, path: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-stasis-v1"));
        command.arg("dump").env("PATH", path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(job.to_string().as_bytes()).unwrap();
        let events = BufReader::new(child.stdout.take().unwrap());
        Self { child, events }
    }

    /// The next event; none at the end.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.events.read_line(&mut line).unwrap();
        if line.is_empty() { None } else { Some(serde_json::from_str(&line).unwrap()) }
    }

    fn terminate(&self) {
        process::signal(self.child.id().cast_signed(), rustix::process::Signal::TERM.as_raw()).unwrap();
    }

    fn run(job: &Value) -> (Vec<String>, Value) {
        Self::start(job).finish()
    }

    /// All that it still says, until it has ended: the names of the events but the last, and the last event.
    fn finish(mut self) -> (Vec<String>, Value) {
        let mut events: Vec<Value> = std::iter::from_fn(|| self.next()).collect();
        let last = events.pop().unwrap_or_default();
        assert_eq!(self.child.wait().unwrap().success(), last["event"] == "done", "{last}");
        (events.iter().map(|event| event["event"].as_str().unwrap().to_owned()).collect(), last)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn members(archive: &Path) -> Vec<String> {
    let output = Command::new("tar").arg("-tf").arg(archive).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn member(archive: &Path, name: &str) -> Vec<u8> {
    Command::new("tar").arg("-xOf").arg(archive).arg(name).output().unwrap().stdout
}

/// The names in the saved tmpfs that holds `name`.
fn saved_tmpfs(archive: &Path, name: &str) -> Vec<String> {
    let list = |image: String| {
        let mut tar = Command::new("tar").arg("-tzf-").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        tar.stdin.take().unwrap().write_all(&member(archive, &image)).unwrap();
        String::from_utf8(tar.wait_with_output().unwrap().stdout).unwrap()
    };
    let images = members(archive).into_iter().filter(|name| name.starts_with("checkpoint/tmpfs-"));
    let names =
        |text: String| -> Vec<String> { text.lines().map(|line| line.trim_start_matches("./").to_owned()).collect() };
    images.map(list).map(names).find(|names| names.iter().any(|known| known == name)).unwrap_or_default()
}

#[test]
fn a_small_tmpfs_is_saved_without_the_nodes_tar_and_a_large_one_by_it() {
    let container = Container::running(COUNTER);
    // The engines alone: neither tar nor gzip is there.
    let engines = engine("").display().to_string();
    let (_, last) = Worker::start_in(&container.job(), &engines).finish();
    assert_eq!(last["event"], "done", "{last}");
    assert!(saved_tmpfs(&container.archive(), "null").contains(&"zero".to_owned()));

    let large = Container::running(&format!("head -c 3000000 /dev/zero >/dev/large; {COUNTER}"));
    let (_, last) = Worker::start_in(&large.job(), &engines).finish();
    assert!(last.to_string().contains("tar"), "{last}");
    large.check_unharmed();
    large.check_nothing_written();
    let (_, last) = Worker::run(&large.job());
    assert_eq!(last["event"], "done", "{last}");
    assert!(saved_tmpfs(&large.archive(), "null").contains(&"large".to_owned()));
}

#[test]
fn a_running_container_becomes_an_archive_and_runs_on() {
    let container = Container::running(COUNTER);
    let (mut events, last) = Worker::run(&container.job());
    // Told anew now and then, on a slow machine.
    events.dedup();
    assert_eq!(
        (events.as_slice(), &last["event"]),
        (&["frozen".to_owned(), "thawed".to_owned(), "writing".to_owned()][..], &json!("done")),
        "{last}"
    );
    container.check_unharmed();

    let archive = container.archive();
    let facts = fs::metadata(&archive).unwrap();
    assert_eq!(facts.permissions().mode() & 0o7777, 0o600);
    assert_eq!(last["report"]["archive_bytes"], facts.len());
    let names = members(&archive);
    let start = ["config.dump", "spec.dump", "rootfs-diff.tar", "container.log", "checkpoint/"];
    assert_eq!(names[..5], start);
    assert!(
        names.contains(&"checkpoint/inventory.img".to_owned()) && names.contains(&"dump.log".to_owned()),
        "{names:?}"
    );
    assert!(names.last().unwrap().starts_with("checkpoint/pages-"), "{names:?}");

    let inspection = stasis_checkpoint::inspect(File::open(&archive).unwrap()).unwrap();
    assert_eq!(inspection.container, "counter");
    assert!(inspection.processes.unwrap() >= 1 && inspection.memory_bytes >= 4096);
    let pages = last["report"]["pages_written"].as_u64().unwrap();
    assert_eq!(inspection.memory_bytes, pages * 4096);
    let log = String::from_utf8(member(&archive, "container.log")).unwrap();
    assert!(fs::read_to_string(container.path("log")).unwrap().starts_with(&log) && !log.is_empty());
}

#[test]
fn a_container_that_starts_processes_all_the_time_is_dumped() {
    // The shell starts them by vfork, and at most times one of these is in the middle of it.
    let busy = "(while :; do /bin/usleep 1; done) &";
    let container = Container::running(&format!("{busy} {busy} {busy} {busy} {busy} {busy} {COUNTER}"));
    for _ in 0..6 {
        let (_, last) = Worker::run(&container.job());
        assert_eq!(last["event"], "done", "{last}");
    }
    container.check_unharmed();
}

#[test]
fn memory_and_writable_layer_come_back_as_of_one_instant() {
    let mut container = Container::running(COUNTER);
    let (_, last) = Worker::run(&container.job());
    assert_eq!(last["event"], "done", "{last}");
    let extracted = container.path("extracted");
    stasis_checkpoint::extract(File::open(container.archive()).unwrap(), &extracted).unwrap();
    let layer =
        Command::new("tar").args(["-xzOf", "rootfs-diff.tar", "count"]).current_dir(&extracted).output().unwrap();
    let lines = String::from_utf8(layer.stdout).unwrap();
    let in_layer: u64 = lines.lines().last().unwrap().parse().unwrap();

    container.cgroup.kill_all().unwrap();
    assert!(container.runc().args(["delete", "-f", &container.id]).status().unwrap().success());
    container.log.take().unwrap().wait().unwrap();
    fs::write(container.path("log"), "").unwrap();
    let images = extracted.join("checkpoint").display().to_string();
    let work = container.path("restore").display().to_string();
    let options = ["--manage-cgroups-mode", "ignore", "--image-path", &images, "--work-path", &work];
    container.start_log(&["restore"], &options);
    container.wait_for_output(5);
    let first = container.counts()[0];
    // It was between two lines of the file, of which the second may have been on the output already.
    assert!((in_layer + 1..=in_layer + 2).contains(&first), "the layer has {in_layer}, memory goes on with {first}");
}

#[test]
fn what_criu_cannot_dump_is_explained_and_the_container_runs_on() {
    let mut container = Container::new("while :; do echo 1 > /count; usleep 2000; done");
    let file = File::create(container.path("host-file")).unwrap();
    let mut runc = container.runc();
    runc.args(["run", "-d", "-b"]).arg(container.dir.path()).arg(&container.id);
    let status = runc.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
    assert!(status.success());
    container.log = None;
    let (events, last) = Worker::run(&container.job());
    assert_eq!((events.as_slice(), &last["event"]), (&["frozen".to_owned(), "thawed".to_owned()][..], &json!("error")));
    assert_eq!(last["error"]["reason"], "engine");
    let message = last["error"]["message"].as_str().unwrap();
    assert!(message.contains("Can't lookup mount=") && message.contains("standard streams"), "{message}");
    assert!(!container.cgroup.is_frozen().unwrap());
    assert!(!container.cgroup.procs().unwrap().is_empty());
    container.check_nothing_written();
}

#[test]
fn a_checkpoint_out_of_time_is_given_up() {
    let container = Container::running(COUNTER);
    let mut job = container.job();
    job["request"]["timeout_ms"] = json!(1);
    let (_, last) = Worker::run(&job);
    assert_eq!(last["error"]["reason"], "deadline_exceeded", "{last}");
    container.check_unharmed();
    container.check_nothing_written();
}

#[test]
fn a_full_disk_is_found_before_the_freeze() {
    let container = Container::running(COUNTER);
    mount::tmpfs(&container.path("out"), 1 << 20, 0o700, &[]).unwrap();
    let (events, last) = Worker::run(&container.job());
    assert_eq!((events.as_slice(), &last["error"]["reason"]), (&[][..], &json!("resource_exhausted")), "{last}");
    container.check_unharmed();
    container.check_nothing_written();
}

/// A runtime that stands in for one that hangs.
fn hanging(container: &Container, script: &str) -> Value {
    let path = container.path("hanging");
    let script = format!("#!/bin/sh\n{script}\n").replace("CONF", &container.path("criu.conf").display().to_string());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let mut job = container.job();
    job["runc"] = json!(path);
    job
}

#[test]
fn a_worker_that_is_called_off_thaws_and_ends_what_it_started() {
    let container = Container::running(COUNTER);
    // As a runtime whose CRIU hangs in the dump; and its CRIU is a child that outlives it.
    let mut worker =
        Worker::start(&hanging(&container, "cat CONF > /dev/null\necho $$\nsleep 1000 &\nexec sleep 1000"));
    assert_eq!(worker.next().unwrap()["event"], "frozen");
    assert!(container.cgroup.is_frozen().unwrap());
    worker.terminate();
    let (events, last) = worker.finish();
    assert_eq!(events, ["thawed"]);
    assert_eq!(last["error"]["reason"], "deadline_exceeded", "{last}");
    container.check_unharmed();
    container.check_nothing_written();
}

#[test]
fn a_worker_that_is_called_off_before_the_freeze_never_freezes() {
    let container = Container::running(COUNTER);
    let worker = Worker::start(&hanging(&container, "touch CONF.started\nexec sleep 1000"));
    let started = Instant::now();
    while !container.path("criu.conf.started").exists() {
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(2));
    }
    worker.terminate();
    let (events, last) = worker.finish();
    assert_eq!((events.len(), &last["event"]), (0, &json!("error")));
    container.check_unharmed();
}

#[test]
fn a_runtime_that_fails_speaks_for_itself() {
    let container = Container::running(COUNTER);
    let (events, last) = Worker::run(&hanging(&container, "echo 'no such container' >&2; exit 1"));
    assert_eq!((events.as_slice(), &last["error"]["reason"]), (&[][..], &json!("engine")));
    assert!(last["error"]["message"].as_str().unwrap().contains("no such container"), "{last}");
    container.check_unharmed();
}

#[test]
fn a_container_that_is_not_left_running_executes_nothing_afterwards() {
    let container = Container::running(COUNTER);
    let mut job = container.job();
    job["request"]["leave_running"] = json!(false);
    let (_, last) = Worker::run(&job);
    assert_eq!(last["event"], "done", "{last}");
    assert!(container.cgroup.procs().unwrap().is_empty());
    let log = String::from_utf8(member(&container.archive(), "container.log")).unwrap();
    assert_eq!(log.lines().last(), fs::read_to_string(container.path("log")).unwrap().lines().last());
}

#[test]
fn a_job_that_is_none_is_an_error_event() {
    for job in [json!({}), json!({"request": 1})] {
        let (events, last) = Worker::run(&job);
        assert_eq!((events.len(), &last["event"]), (0, &json!("error")));
        assert!(last["error"]["message"].as_str().unwrap().contains("the job"), "{last}");
    }
}
