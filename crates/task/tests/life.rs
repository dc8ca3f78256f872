//! The proof that the seam is real: one body of tests, run through our shim and through `containerd-shim-runc-v2`.
//!
//! Needs root and, in the environment: `STASIS_ENGINES` (a prefix with `bin/{runc,busybox}`), `STASIS_PEERS` (a prefix
//! with `bin/containerd-shim-runc-v2`), `STASIS_SHIM` (our shim's program).

// A test's panic is its message.
#![allow(clippy::unwrap_used)]

mod pod;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use pod::{Pod, Shim, has_mount_below, until};
use stasis_task::{Error, ExecSpec, Fifos, PlatformRuntime as _, Process, Status, Streams, Task};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

/// For events that come at once, on a machine under load.
const SOON: Duration = Duration::from_secs(60);

const KILL: u32 = 9;

/// Runs each test once with each shim.
macro_rules! with_each_shim {
    ($($name:ident),* $(,)?) => {
        mod ours {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(super::Shim::Ours).await;
            })*
        }
        mod runc_v2 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(super::Shim::RuncV2).await;
            })*
        }
    };
}

with_each_shim!(
    a_container_lives_and_dies,
    an_exit_of_its_own_has_its_code_and_its_log,
    output_and_input_of_a_further_process,
    a_paused_container_stands_still,
    a_daemon_that_comes_back_finds_its_tasks,
    a_dead_shim_is_told_and_cleaned_up_after,
    a_failed_create_leaves_nothing,
    a_task_that_never_ran_can_be_deleted,
    many_requests_at_once_are_all_answered,
);

async fn wait_soon(task: &Arc<dyn Task>) -> stasis_task::Exit {
    timeout(SOON, task.wait()).await.expect("it ends soon").unwrap()
}

async fn a_container_lives_and_dies(shim: Shim) {
    let pod = Pod::start(shim).await;
    let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    let state = task.state().await.unwrap();
    assert_eq!((state.status, state.exit), (Status::Created, None));
    assert!(matches!(pod.create("c1", &["/bin/true"]).await, Err(Error::AlreadyExists(_))));

    let pid = task.start().await.unwrap();
    assert_eq!((task.pid(), task.state().await.unwrap().status), (pid, Status::Running));
    let arguments = || fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    until("sleep runs", || arguments() == b"/bin/sleep\x001000\x00").await;
    assert_eq!(task.pids().await.unwrap(), [pid]);
    assert!(has_mount_below(task.bundle()));
    assert!(matches!(task.delete().await, Err(Error::FailedPrecondition(_))), "not while it runs");

    let (first, second) = (Arc::clone(&task), Arc::clone(&task));
    let waits = tokio::spawn(async move { tokio::join!(first.wait(), second.wait()) });
    task.kill(KILL, false).await.unwrap();
    let (first, second) = timeout(SOON, waits).await.expect("it ends soon").unwrap();
    let exit = first.unwrap();
    assert_eq!((exit.pid, exit.status), (pid, 128 + KILL));
    assert_eq!(exit, second.unwrap());
    let state = task.state().await.unwrap();
    assert_eq!((state.status, state.exit.map(|exit| exit.status)), (Status::Stopped, Some(128 + KILL)));
    assert!(matches!(task.kill(KILL, false).await, Err(Error::NotFound(_))));

    let (bundle, socket) = (task.bundle().to_owned(), pod.socket("c1"));
    assert_eq!(task.delete().await.unwrap().status, 128 + KILL);
    assert!(!bundle.exists());
    assert_eq!(socket.exists(), shim == Shim::Ours, "a pod's shim stays, a task's own goes");
    assert!(matches!(pod.runtime.get("c1").await, Err(Error::NotFound(_))));
    assert!(matches!(pod.runtime.delete("c1").await, Err(Error::NotFound(_))));
    pod.end().await;
}

async fn many_requests_at_once_are_all_answered(shim: Shim) {
    let pod = Pod::start(shim).await;
    let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    task.start().await.unwrap();
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..2000 {
        let task = Arc::clone(&task);
        asking.spawn(async move { task.state().await });
    }
    while let Some(answer) = timeout(SOON, asking.join_next()).await.expect("they are answered soon") {
        assert_eq!(answer.unwrap().unwrap().status, Status::Running);
    }
    task.kill(KILL, false).await.unwrap();
    wait_soon(&task).await;
    task.delete().await.unwrap();
    pod.end().await;
}

async fn an_exit_of_its_own_has_its_code_and_its_log(shim: Shim) {
    let pod = Pod::start(shim).await;
    let script = "echo to the log; echo of errors >&2; exit 7";
    let task = pod.create("c1", &["/bin/sh", "-c", script]).await.unwrap();
    let waiting = Arc::clone(&task);
    let early = tokio::spawn(async move { waiting.wait().await });
    task.start().await.unwrap();
    assert_eq!(timeout(SOON, early).await.expect("it ends soon").unwrap().unwrap().status, 7);
    assert_eq!(wait_soon(&task).await.status, 7, "asked again after the end");
    assert_eq!(task.delete().await.unwrap().status, 7);
    let log = || fs::read_to_string(pod.log("c1")).unwrap_or_default();
    until("the log is complete", || log().lines().count() == 2).await;
    for line in log().lines() {
        let wanted = match (line.contains("errors"), shim) {
            (false, Shim::Ours) => " stdout F to the log",
            (true, Shim::Ours) => " stderr F of errors",
            (false, Shim::RuncV2) => "to the log",
            (true, Shim::RuncV2) => "of errors",
        };
        assert!(line.ends_with(wanted), "{line:?}");
    }
    pod.end().await;
}

async fn exec(pod: &Pod, task: &Arc<dyn Task>, id: &str, args: &[&str]) -> (Arc<dyn Process>, Fifos) {
    let dir = pod.dir.path().join(format!("fifos-{id}"));
    let streams = Streams { stdin: true, stdout: true, stderr: true, terminal: false };
    let mut fifos = Fifos::create(&dir, streams).await.unwrap();
    let process = pod::process(args).to_string().into_bytes();
    let process = task.exec(id, ExecSpec { process, io: fifos.io() }).await.unwrap();
    let started = process.start().await;
    fifos.connected();
    assert_eq!(started.unwrap(), process.pid());
    (process, fifos)
}

async fn output_and_input_of_a_further_process(shim: Shim) {
    let pod = Pod::start(shim).await;
    let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    task.start().await.unwrap();

    let (process, mut fifos) = exec(&pod, &task, "e1", &["/bin/sh", "-c", "cat; echo wrong >&2; exit 3"]).await;
    let big = "0123456789abcdef".repeat(20_000);
    let mut stdin = fifos.take_stdin().unwrap();
    let feeding = async {
        stdin.write_all(big.as_bytes()).await.unwrap();
        drop(stdin);
        process.close_stdin().await.unwrap();
    };
    let (mut out, mut err) = (String::new(), String::new());
    let (mut stdout, mut stderr) = (fifos.take_stdout().unwrap(), fifos.take_stderr().unwrap());
    let reading = async {
        let (out, err) = tokio::join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err));
        (out.unwrap(), err.unwrap())
    };
    timeout(SOON, async { tokio::join!(feeding, reading) }).await.expect("the streams end");
    assert_eq!((out == big, err.as_str()), (true, "wrong\n"));
    let exit = timeout(SOON, process.wait()).await.expect("it ends soon").unwrap();
    assert_eq!((exit.pid, exit.status), (process.pid(), 3));
    assert_eq!(process.delete().await.unwrap().status, 3);

    let (process, _fifos) = exec(&pod, &task, "e2", &["/bin/sleep", "1000"]).await;
    process.kill(KILL).await.unwrap();
    assert_eq!(timeout(SOON, process.wait()).await.expect("it ends soon").unwrap().status, 128 + KILL);
    process.delete().await.unwrap();

    task.kill(KILL, true).await.unwrap();
    wait_soon(&task).await;
    task.delete().await.unwrap();
    pod.end().await;
}

async fn a_paused_container_stands_still(shim: Shim) {
    let pod = Pod::start(shim).await;
    let count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";
    let task = pod.create("c1", &["/bin/sh", "-c", count]).await.unwrap();
    task.start().await.unwrap();
    let lines = || fs::read_to_string(pod.log("c1")).unwrap_or_default().lines().count();
    until("it counts", || lines() > 2).await;
    task.pause().await.unwrap();
    assert_eq!(task.state().await.unwrap().status, Status::Paused);
    let stopped = |pid: u32| fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    // In the freezer, or waiting for the child of a vfork that is in it.
    let places = ["refrigerator", "get_signal", "kernel_clone"];
    until("it is in the freezer", || places.iter().any(|at| stopped(task.pid()).contains(at))).await;
    let frozen_at = lines();
    assert_eq!(lines(), frozen_at);
    task.resume().await.unwrap();
    assert_eq!(task.state().await.unwrap().status, Status::Running);
    until("it counts on", || lines() > frozen_at + 2).await;
    task.kill(KILL, true).await.unwrap();
    wait_soon(&task).await;
    task.delete().await.unwrap();
    pod.end().await;
}

async fn a_daemon_that_comes_back_finds_its_tasks(shim: Shim) {
    let pod = Pod::start(shim).await;
    let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    let pid = task.start().await.unwrap();
    let later = pod.second_runtime();
    assert!(later.tasks(false).await.unwrap().is_empty());
    let found = later.tasks(true).await.unwrap();
    assert_eq!(found.iter().map(|task| (task.id(), task.pid())).collect::<Vec<_>>(), [("c1", pid)]);
    let again = later.get("c1").await.unwrap();
    if shim == Shim::Ours {
        let sandbox = later.connect_sandbox(&pod.id, &pod.pod_dir).await.unwrap();
        assert_eq!(sandbox.tasks().len(), 1);
    }
    task.kill(KILL, false).await.unwrap();
    assert_eq!(wait_soon(&again).await.status, 128 + KILL);
    again.delete().await.unwrap();
    pod.end().await;
}

async fn a_dead_shim_is_told_and_cleaned_up_after(shim: Shim) {
    let pod = Pod::start(shim).await;
    let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    let pid = task.start().await.unwrap();
    let waiting = Arc::clone(&task);
    let wait = tokio::spawn(async move { waiting.wait().await });
    pod.kill_shim("c1").await;
    let lost = timeout(SOON, wait).await.expect("the wait ends with its shim").unwrap();
    assert!(matches!(lost, Err(Error::ShimLost(_))), "{lost:?}");
    assert!(matches!(task.state().await, Err(Error::ShimLost(_))));
    let (bundle, socket) = (task.bundle().to_owned(), pod.socket("c1"));
    pod.second_runtime().delete("c1").await.unwrap();
    assert!(shim == Shim::Ours || !socket.exists());
    until("the container is gone", || !fs::exists(format!("/proc/{pid}/root")).unwrap_or(false)).await;
    assert!(!bundle.exists() && !has_mount_below(&bundle));
    pod.end().await;
}

async fn a_failed_create_leaves_nothing(shim: Shim) {
    let pod = Pod::start(shim).await;
    let mut opts = pod.opts("c1", &["/bin/true"]);
    opts.rootfs[0].fs_type = "nonsense".into();
    let error = pod.runtime.create("c1", opts).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("c1"), "{error}");
    let mut opts = pod.opts("c1", &["/bin/true"]);
    opts.spec = b"{}".to_vec();
    assert!(pod.runtime.create("c1", opts).await.is_err());
    assert!(pod.runtime.tasks(true).await.unwrap().is_empty());
    assert!(!has_mount_below(pod.dir.path().join("state").as_path()) || shim == Shim::Ours);
    let task = pod.create("c1", &["/bin/true"]).await.expect("the ID is free again");
    task.start().await.unwrap();
    wait_soon(&task).await;
    task.delete().await.unwrap();
    pod.end().await;
}

async fn a_task_that_never_ran_can_be_deleted(shim: Shim) {
    let pod = Pod::start(shim).await;
    let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    let exit = task.delete().await.unwrap();
    assert_eq!(exit.status, 128 + KILL);
    pod.end().await;
}

/// A shim that finds nobody to tell its events to holds up its own work.
#[tokio::test]
async fn shims_tell_when_memory_runs_out() {
    let pod = Pod::start(Shim::RuncV2).await;
    let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let events = pod.runtime.serve_events(move |task_id| drop(told.send(task_id.to_owned()))).await.unwrap();
    let eat = "x=0123456789abcdef; while :; do x=$x$x; done";
    let mut opts = pod.opts("c1", &["/bin/sh", "-c", eat]);
    let mut spec: serde_json::Value = serde_json::from_slice(&opts.spec).unwrap();
    spec["linux"]["resources"] = serde_json::json!({"memory": {"limit": 16 << 20}});
    opts.spec = spec.to_string().into_bytes();
    let task = pod.runtime.create("c1", opts).await.unwrap();
    task.start().await.unwrap();
    assert_eq!(wait_soon(&task).await.status, 128 + KILL);
    assert_eq!(timeout(SOON, hear.recv()).await.expect("the shim tells soon").as_deref(), Some("c1"));
    task.delete().await.unwrap();
    drop(events);
    assert!(!pod.dir.path().join("stasis.sock.ttrpc").exists());
    pod.end().await;
}

/// Grouped by a pod's annotation, tasks share a foreign shim too; it ends with the last of them.
#[tokio::test]
async fn tasks_of_a_foreign_shim_share_it() {
    let pod = Pod::start(Shim::RuncV2).await;
    let one = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
    let two = pod.create("c2", &["/bin/sleep", "1000"]).await.unwrap();
    let address = |task: &Arc<dyn Task>| fs::read_to_string(task.bundle().join("bootstrap.json")).unwrap();
    assert_eq!(address(&one), address(&two));
    for task in [&one, &two] {
        task.start().await.unwrap();
        task.kill(KILL, false).await.unwrap();
        wait_soon(task).await;
    }
    one.delete().await.unwrap();
    assert_eq!(two.state().await.unwrap().status, Status::Stopped, "the shim still serves the other");
    two.delete().await.unwrap();
    pod.end().await;
}

/// The daemon may die between the start of a shim and the note of where it listens.
#[tokio::test]
async fn a_creation_that_was_cut_short_is_found_and_removed() {
    for shim in [Shim::RuncV2, Shim::Ours] {
        let pod = Pod::start(shim).await;
        let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
        fs::remove_file(task.bundle().join("bootstrap.json")).unwrap();
        let later = pod.second_runtime();
        assert_eq!(later.tasks(true).await.unwrap().len(), 1);
        later.delete("c1").await.unwrap();
        assert!(!task.bundle().exists());
        pod.end().await;
    }
}

#[tokio::test]
async fn a_sandbox_tells_its_end_from_its_loss() {
    let (stopped, lost) = (Pod::start(Shim::Ours).await, Pod::start(Shim::Ours).await);
    let sandbox = stopped.sandbox().clone();
    let waiting = sandbox.clone();
    let wait = tokio::spawn(async move { waiting.wait().await });
    sandbox.ping().await.unwrap();
    sandbox.stop().await.unwrap();
    timeout(SOON, wait).await.expect("it ends soon").unwrap().expect("an end, not a loss");
    stopped.end().await;

    let waiting = lost.sandbox().clone();
    let wait = tokio::spawn(async move { waiting.wait().await });
    lost.kill_shim("").await;
    let end = timeout(SOON, wait).await.expect("it ends soon").unwrap();
    assert!(matches!(end, Err(Error::ShimLost(_))), "{end:?}");
    let again = lost.second_runtime().connect_sandbox(&lost.id, &lost.pod_dir).await;
    assert!(matches!(again, Err(Error::ShimLost(_))), "{again:?}");
    lost.end().await;
}

#[tokio::test]
async fn a_pods_shim_is_ended_in_whatever_state_it_is() {
    for state in ["serving", "dead", "without a known address"] {
        let pod = Pod::start(Shim::Ours).await;
        let task = pod.create("c1", &["/bin/sleep", "1000"]).await.unwrap();
        let pid = task.start().await.unwrap();
        match state {
            "dead" => pod.kill_shim("c1").await,
            "without a known address" => fs::remove_file(pod.pod_dir.join("bootstrap.json")).unwrap(),
            _ => {}
        }
        let later = pod.second_runtime();
        later.clean_sandbox(&pod.id, &pod.pod_dir).await.unwrap();
        later.clean_sandbox(&pod.id, &pod.pod_dir).await.expect("a second time is no error");
        let connected = later.connect_sandbox(&pod.id, &pod.pod_dir).await;
        assert!(matches!(connected, Err(Error::NotFound(_))), "{state}: {connected:?}");
        until("the container is gone", || !fs::exists(format!("/proc/{pid}/root")).unwrap_or(false)).await;
        // What the daemon knows of the task goes as that of any task whose shim is dead.
        let _ = task.delete().await;
        pod.end().await;
    }
}
