//! Checkpoints and restores with the real CRIU, and the watch over the checkpoint worker.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::*;
use stasis_shim_api::{
    CheckpointReport, CheckpointRequest, Compression, CriuOptions, METHOD_CHECKPOINT, Reason, ShimError,
};

/// Counts, in the log. It waits by reading a FIFO that nobody writes to and starts no process: busybox's shell does that by
/// vfork, and CRIU cannot stop a process that waits for the child of a vfork which it has stopped already.
const COUNTER: &str = "exec 3<>/tmp/tick; i=0; while true; do i=$((i+1)); echo $i; read -t 0.02 -u 3 x; done";

async fn write_images(pod: &Pod, id: &str, images: &Path) -> ttrpc::Result<Empty> {
    let path = images.to_string_lossy().into_owned();
    pod.task.checkpoint(context(), &CheckpointTaskRequest { id: id.into(), path, ..Default::default() }).await
}

fn last_number(pod: &Pod, id: &str) -> u64 {
    pod.log(id).lines().last().map_or(0, |line| line.parse().unwrap_or(0))
}

fn first_number(pod: &Pod, id: &str) -> u64 {
    pod.log(id).lines().next().unwrap().parse().unwrap()
}

async fn counts(pod: &Pod, id: &str) {
    let before = last_number(pod, id);
    eventually("the counter to go on", || last_number(pod, id) > before + 3).await;
}

#[tokio::test]
async fn a_restored_container_goes_on_where_it_was_and_is_like_any_other() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    let plan = Plan { namespaces: pod.pinned(), ..Plan::script(COUNTER) };
    pod.run("c1", &plan).await;
    counts(&pod, "c1").await;
    let images = pod.scratch().join("images");
    write_images(&pod, "c1", &images).await.unwrap();
    counts(&pod, "c1").await;
    let at_least = fs::read_to_string(pod.log_path("c1")).unwrap().lines().count() as u64;
    pod.kill("c1", 9).await.unwrap();
    pod.wait("c1", "").await;
    pod.delete("c1", "").await.unwrap();

    let restored = Plan { checkpoint: images.to_string_lossy().into_owned(), ..plan.clone() };
    let created = pod.create("c2", &restored).await.unwrap();
    assert_eq!(created.pid, 0);
    assert_eq!(pod.state("c2").await.unwrap().status.unwrap(), Status::CREATED);
    let pid = pod.start_task("c2").await.unwrap();
    assert!(pid > 0);
    counts(&pod, "c2").await;
    let first = first_number(&pod, "c2");
    assert!(first > 3 && first < at_least, "{first}");

    // Like any other: exec, host name, another checkpoint, signals, exit status.
    assert_eq!(pod.exec("c2", "hostname; exit 4").await, ("pod-host\n".to_owned(), 4));
    let again = pod.scratch().join("again");
    write_images(&pod, "c2", &again).await.unwrap();
    counts(&pod, "c2").await;
    pod.kill("c2", 9).await.unwrap();
    assert_eq!(pod.wait("c2", "").await, 137);
    pod.delete("c2", "").await.unwrap();

    let restored = Plan { checkpoint: again.to_string_lossy().into_owned(), ..plan };
    pod.create("c3", &restored).await.unwrap();
    pod.start_task("c3").await.unwrap();
    counts(&pod, "c3").await;
    assert!(first_number(&pod, "c3") > first);
}

#[tokio::test]
async fn a_restore_into_another_pod_has_that_pods_network_and_name() {
    let (one, other) = (Pod::with_sandbox(&plain_sandbox()).await, {
        Pod::with_sandbox(&SandboxSpec { hostname: Some("other-host".into()), ..plain_sandbox() }).await
    });
    one.run("c1", &Plan { namespaces: one.pinned(), ..Plan::script(COUNTER) }).await;
    counts(&one, "c1").await;
    let images = one.scratch().join("images");
    write_images(&one, "c1", &images).await.unwrap();
    let checkpoint = images.to_string_lossy().into_owned();
    other.create("c1", &Plan { namespaces: other.pinned(), checkpoint, ..Plan::script(COUNTER) }).await.unwrap();
    let pid = other.start_task("c1").await.unwrap();
    counts(&other, "c1").await;
    let net = PathBuf::from(format!("/proc/{pid}/ns/net"));
    assert!(stasis_sys::namespace::is_same(&net, &other.dir.join("ns/net")).unwrap());
    assert_eq!(other.exec("c1", "hostname").await.0, "other-host\n");
}

#[tokio::test]
async fn a_checkpoint_with_a_terminal_comes_back_with_one() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    let plan = Plan { namespaces: pod.pinned(), terminal: true, ..Plan::script(COUNTER) };
    pod.run("c1", &plan).await;
    pod.log_says("c1", "3\n").await;
    let images = pod.scratch().join("images");
    write_images(&pod, "c1", &images).await.unwrap();
    pod.kill("c1", 9).await.unwrap();
    pod.wait("c1", "").await;
    pod.create("c2", &Plan { checkpoint: images.to_string_lossy().into_owned(), ..plan }).await.unwrap();
    pod.start_task("c2").await.unwrap();
    eventually("output", || pod.log("c2").lines().count() > 3).await;
    let resize = ResizePtyRequest { id: "c2".into(), width: 80, height: 25, ..Default::default() };
    pod.task.resize_pty(context(), &resize).await.unwrap();
}

/// Restores images that `spoil` has been at, and returns the error.
async fn restore_spoiled(spoil: impl FnOnce(&Path)) -> String {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    let plan = Plan { namespaces: pod.pinned(), ..Plan::script(COUNTER) };
    pod.run("c1", &plan).await;
    counts(&pod, "c1").await;
    let images = pod.scratch().join("images");
    write_images(&pod, "c1", &images).await.unwrap();
    spoil(&images);
    let checkpoint = images.to_string_lossy().into_owned();
    pod.create("c2", &Plan { checkpoint, ..plan }).await.unwrap();
    let error = pod.start_task("c2").await.unwrap_err().to_string();
    assert!(pod.bundle("c2").join("restore/restore.log").exists());
    assert!(pod.bundle("c2").join("rootfs/bin/busybox").exists(), "the root file system was emptied");
    assert!(pod.cgroup("c2").procs().unwrap().is_empty());
    pod.delete("c2", "").await.unwrap();
    assert!(pod.scratch().join("lower/bin/busybox").exists());
    assert!(stasis_sys::mount::mounts_below(&pod.bundle("c2")).unwrap().is_empty());
    error
}

#[tokio::test]
async fn a_restore_that_fails_says_why_and_keeps_the_root_file_system() {
    let error = restore_spoiled(|images| fs::remove_file(images.join("mm-1.img")).unwrap()).await;
    assert!(error.contains("CRIU") && error.contains("restore.log"), "{error}");
}

#[tokio::test]
async fn a_restore_without_end_is_ended() {
    let cut_short = |images: &Path| {
        let pages = fs::OpenOptions::new().write(true).open(images.join("pages-1.img")).unwrap();
        pages.set_len(4096).unwrap();
    };
    let error = restore_spoiled(cut_short).await;
    assert!(error.contains("cut short") && error.contains("restore.log"), "{error}");
}

#[tokio::test]
async fn a_checkpoint_out_of_other_surroundings_is_killed() {
    // Dumped in the host's PID namespace, so that the images name none; restored where an own one is asked for.
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    let mut host = pod.pinned();
    host.remove("pid");
    pod.run("c1", &Plan { namespaces: host, ..Plan::script(COUNTER) }).await;
    counts(&pod, "c1").await;
    let images = pod.scratch().join("images");
    write_images(&pod, "c1", &images).await.unwrap();
    // Their process IDs must be free.
    pod.kill("c1", 9).await.unwrap();
    pod.wait("c1", "").await;
    let checkpoint = images.to_string_lossy().into_owned();
    pod.create("c2", &Plan { namespaces: pod.pinned(), checkpoint, ..Plan::script(COUNTER) }).await.unwrap();
    let error = pod.start_task("c2").await.unwrap_err().to_string();
    assert!(error.contains("another pid namespace"), "{error}");
    assert!(pod.cgroup("c2").procs().unwrap().is_empty());
}

fn archive_request(pod: &Pod, id: &str) -> CheckpointRequest {
    let members = pod.scratch().join("members");
    fs::create_dir_all(&members).unwrap();
    for name in ["config.dump", "spec.dump"] {
        fs::write(members.join(name), "{}").unwrap();
    }
    CheckpointRequest {
        id: id.to_owned(),
        archive: pod.scratch().join("archive.tar"),
        members,
        upper: pod.scratch().join("layers").join(id).join("upper"),
        log: Some(pod.log_path(id)),
        timeout_ms: 60_000,
        leave_running: true,
        criu: CriuOptions::default(),
        compression: Compression::default(),
        trees: Vec::new(),
        buffer_max: None,
        space_reserve: 0,
        digest: false,
        failure_log: None,
    }
}

async fn checkpoint(pod: &Pod, request: &CheckpointRequest) -> Result<CheckpointReport, ShimError> {
    match call(pod, METHOD_CHECKPOINT, serde_json::to_vec(request).unwrap()).await {
        Ok(payload) => Ok(serde_json::from_slice(&payload).unwrap()),
        Err(ttrpc::Error::RpcStatus(status)) => Err(serde_json::from_str(&status.message).unwrap()),
        Err(other) => panic!("{other}"),
    }
}

fn workers_of(shim: i32) -> Vec<i32> {
    let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
    let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
    pids.filter(|pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"dump")
    })
    .collect()
}

fn leftovers(pod: &Pod) -> Vec<String> {
    let names = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
    let all = names(pod.dir.clone()).chain(names(pod.dir.join("frozen"))).chain(names(pod.scratch().to_path_buf()));
    all.map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name.contains("partial") || name.starts_with("dump-") || name == "c1" || name == "archive.tar")
        .collect()
}

#[tokio::test]
async fn an_archive_is_written_and_the_container_goes_on() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    pod.run("c1", &Plan { namespaces: pod.pinned(), ..Plan::script(COUNTER) }).await;
    counts(&pod, "c1").await;
    let report = checkpoint(&pod, &archive_request(&pod, "c1")).await.unwrap();
    assert!(report.frozen_us > 0 && report.archive_bytes > 0);
    assert_eq!(leftovers(&pod), ["archive.tar"]);
    counts(&pod, "c1").await;

    let request = CheckpointRequest { leave_running: false, ..archive_request(&pod, "c1") };
    fs::remove_file(&request.archive).unwrap();
    checkpoint(&pod, &request).await.unwrap();
    assert_eq!(pod.wait("c1", "").await, 137);
    let error = checkpoint(&pod, &request).await.unwrap_err();
    assert_eq!(error.reason, Reason::FailedPrecondition, "{error}");
}

#[tokio::test]
async fn a_worker_that_is_killed_leaves_the_container_running_and_nothing_else() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    pod.run("c1", &Plan { namespaces: pod.pinned(), ..Plan::script(COUNTER) }).await;
    counts(&pod, "c1").await;
    for wait_ms in [0, 5, 10, 20, 30] {
        let request = archive_request(&pod, "c1");
        let killer = async {
            let shim = pod.shim_pid();
            eventually("a worker", || !workers_of(shim).is_empty()).await;
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            for pid in workers_of(shim) {
                let _ = stasis_sys::process::signal(pid, 9);
            }
        };
        let (done, ()) = tokio::join!(checkpoint(&pod, &request), killer);
        if done.is_ok() {
            // It was faster than the killer.
            fs::remove_file(&request.archive).unwrap();
        }
        assert!(leftovers(&pod).is_empty(), "{:?}", leftovers(&pod));
        assert!(!pod.cgroup("c1").is_frozen().unwrap());
        counts(&pod, "c1").await;
    }
    checkpoint(&pod, &archive_request(&pod, "c1")).await.unwrap();
}

#[tokio::test]
async fn when_the_time_is_up_the_container_runs() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    pod.run("c1", &Plan { namespaces: pod.pinned(), ..Plan::script(COUNTER) }).await;
    counts(&pod, "c1").await;
    let request = CheckpointRequest { timeout_ms: 1, ..archive_request(&pod, "c1") };
    let error = checkpoint(&pod, &request).await.unwrap_err();
    assert_eq!(error.reason, Reason::DeadlineExceeded, "{error}");
    assert!(leftovers(&pod).is_empty(), "{:?}", leftovers(&pod));
    counts(&pod, "c1").await;
}

#[tokio::test]
async fn a_container_has_one_operation_at_a_time() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    pod.run("c1", &Plan { namespaces: pod.pinned(), ..Plan::script(COUNTER) }).await;
    counts(&pod, "c1").await;
    pod.add_exec("c1", "e", "true", ("", "", "")).await.unwrap();
    let request = archive_request(&pod, "c1");
    let others = async {
        let shim = pod.shim_pid();
        eventually("a worker", || !workers_of(shim).is_empty()).await;
        (checkpoint(&pod, &request).await, pod.start_process("c1", "e").await)
    };
    let (first, (second, exec)) = tokio::join!(checkpoint(&pod, &request), others);
    first.unwrap();
    assert_eq!(second.unwrap_err().reason, Reason::Busy);
    assert_eq!(code(&exec.unwrap_err()), Code::FAILED_PRECONDITION);
    pod.start_process("c1", "e").await.unwrap();
    assert_eq!(pod.wait("c1", "e").await, 0);
}

#[tokio::test]
async fn a_marker_of_a_dead_shim_is_acted_on() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script(COUNTER)).await;
    counts(&pod, "c1").await;
    let cgroup = pod.cgroup("c1");
    fs::create_dir(pod.dir.join("frozen")).unwrap();
    let marker = serde_json::json!({"cgroup": cgroup.path()});
    fs::write(pod.dir.join("frozen/c1"), marker.to_string()).unwrap();
    cgroup.freeze().unwrap();
    stasis_sys::process::signal(pod.shim_pid(), 9).unwrap();
    eventually("the death of the shim", || std::os::unix::net::UnixStream::connect(pod.dir.join("shim.sock")).is_err())
        .await;
    start_shim(&pod.dir, &pod.id);
    eventually("the thaw", || !cgroup.is_frozen().unwrap()).await;
    eventually("the marker's end", || !pod.dir.join("frozen/c1").exists()).await;
}
