//! The life of containers in a pod, through the shim's own socket.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::*;

#[tokio::test]
async fn a_container_lives_and_its_exit_status_is_kept() {
    let pod = Pod::start().await;
    let created = pod.create("c1", &Plan::script("echo out; echo err >&2; exit 7")).await.unwrap();
    assert!(created.pid > 0);
    assert_eq!(pod.state("c1").await.unwrap().status.unwrap(), Status::CREATED);
    assert_eq!(pod.start_task("c1").await.unwrap(), created.pid);
    assert_eq!(pod.wait("c1", "").await, 7);
    assert_eq!(pod.wait("c1", "").await, 7, "any number may ask");

    let state = pod.state("c1").await.unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 7));
    assert!(state.exited_at.seconds > 0);
    let log = fs::read_to_string(pod.log_path("c1")).unwrap();
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F err\n"), "{log}");

    assert_eq!(code(&pod.kill("c1", 9).await.unwrap_err()), Code::NOT_FOUND);
    let deleted = pod.delete("c1", "").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (created.pid, 7));
    assert_eq!(code(&pod.state("c1").await.unwrap_err()), Code::NOT_FOUND);
    assert!(stasis_sys::mount::mounts_below(&pod.dir).unwrap().is_empty());
    assert!(!pod.cgroup("c1").exists());
}

#[tokio::test]
async fn a_shim_that_nobody_used_ends_with_its_directory() {
    let pod = Pod::start().await;
    let process = stasis_sys::process::Pidfd::open(pod.shim_pid()).unwrap();
    fs::remove_dir_all(&pod.dir).unwrap();
    // A signal can be sent only to a process that is there. One that has ended is reaped by whoever adopted it.
    eventually("the end of the shim", || process.signal(rustix::process::Signal::CONT).is_err()).await;
}

#[tokio::test]
async fn misuse_is_refused_with_the_right_code() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("sleep 1000")).await;
    let check = |error: ttrpc::Error, expected: Code| assert_eq!(code(&error), expected, "{error}");
    check(pod.create("c1", &Plan::script("true")).await.unwrap_err(), Code::ALREADY_EXISTS);
    check(pod.create("../c2", &Plan::script("true")).await.unwrap_err(), Code::INVALID_ARGUMENT);
    check(pod.start_task("c1").await.unwrap_err(), Code::FAILED_PRECONDITION);
    check(pod.delete("c1", "").await.unwrap_err(), Code::FAILED_PRECONDITION);
    check(pod.start_process("c1", "nobody").await.unwrap_err(), Code::NOT_FOUND);
    check(pod.start_task("c2").await.unwrap_err(), Code::NOT_FOUND);

    let missing = Plan { stdout: Some("cri:///no/such/dir/0.log".to_owned()), ..Plan::script("true") };
    let error = pod.create("c3", &missing).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/dir/0.log"), "{error}");
    check(pod.state("c3").await.unwrap_err(), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing_and_says_why() {
    let pod = Pod::start().await;
    let plan = Plan { namespaces: [("network", Some("/no/such/netns".into()))].into(), ..Plan::script("true") };
    let error = pod.create("c1", &plan).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/netns"), "{error}");
    assert!(stasis_sys::mount::mounts_below(&pod.dir).unwrap().is_empty());
    assert!(!pod.cgroup("c1").exists());
    pod.run("c1", &Plan::script("exit 3")).await;
    assert_eq!(pod.wait("c1", "").await, 3);
}

#[tokio::test]
async fn signals_end_containers_and_execs() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("trap 'echo got it; exit 5' TERM; echo ready; while true; do sleep 0.05; done")).await;
    pod.log_says("c1", "ready").await;
    pod.kill("c1", 15).await.unwrap();
    assert_eq!(pod.wait("c1", "").await, 5);
    pod.log_says("c1", "got it").await;

    pod.run("c2", &Plan::script("sleep 1000")).await;
    pod.add_exec("c2", "e", "sleep 1000", ("", "", "")).await.unwrap();
    pod.start_process("c2", "e").await.unwrap();
    let kill = KillRequest { id: "c2".into(), exec_id: "e".into(), signal: 9, ..Default::default() };
    pod.task.kill(context(), &kill).await.unwrap();
    assert_eq!(pod.wait("c2", "e").await, 137);
    assert_eq!(pod.state("c2").await.unwrap().status.unwrap(), Status::RUNNING);
    let all = KillRequest { id: "c2".into(), signal: 9, all: true, ..Default::default() };
    pod.task.kill(context(), &all).await.unwrap();
    assert_eq!(pod.wait("c2", "").await, 137);
}

#[tokio::test]
async fn two_containers_share_the_pods_namespaces() {
    let spec = SandboxSpec { sysctls: [("net.ipv4.ip_forward".into(), "1".into())].into(), ..plain_sandbox() };
    let pod = Pod::with_sandbox(&spec).await;
    let plan = |script: &str| Plan { namespaces: pod.pinned(), ..Plan::script(script) };
    pod.run("c1", &plan("hostname; readlink /proc/self/ns/net; cat /proc/sys/net/ipv4/ip_forward; sleep 1000")).await;
    pod.run("c2", &plan("hostname; readlink /proc/self/ns/net; echo $$; sleep 1000")).await;
    pod.log_says("c1", "\n1\n").await;
    pod.log_says("c2", "\n1\n").await;
    let head = |id: &str| pod.log(id).lines().take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(head("c1"), head("c2"));
    assert_eq!(head("c1")[0], "pod-host");
    assert_ne!(head("c1")[1], fs::read_link("/proc/self/ns/net").unwrap().to_string_lossy());

    let status = pod.sandbox.sandbox_status(context(), &SandboxStatusRequest::new()).await.unwrap();
    assert_eq!(status.state, "SANDBOX_READY");
    let shm = stasis_sys::mount::mounts_below(&pod.dir.join("shm")).unwrap();
    assert_eq!(shm.len(), 1);

    pod.sandbox.stop_sandbox(context(), &StopSandboxRequest::new()).await.unwrap();
    assert_eq!(pod.wait("c1", "").await, 137);
    pod.sandbox.wait_sandbox(context(), &WaitSandboxRequest::new()).await.unwrap();
    pod.sandbox.stop_sandbox(context(), &StopSandboxRequest::new()).await.unwrap();
    assert!(stasis_sys::mount::mounts_below(&pod.dir.join("ns")).unwrap().is_empty());
    pod.delete("c1", "").await.unwrap();

    // The rest goes with the shim.
    pod.sandbox.shutdown_sandbox(context(), &ShutdownSandboxRequest::new()).await.unwrap();
    eventually("the end of the shim", || !pod.dir.join("shim.sock").exists()).await;
    assert!(stasis_sys::mount::mounts_below(&pod.dir).unwrap().is_empty());
}

#[tokio::test]
async fn a_shared_pid_namespace_ends_with_its_container_not_with_its_pod() {
    let pod = Pod::with_sandbox(&SandboxSpec { pid: NamespaceSource::New, ..plain_sandbox() }).await;
    let shared = || {
        let mut namespaces = pod.pinned();
        namespaces.insert("pid", Some(pod.dir.join("ns/pid")));
        namespaces
    };
    let plan = |script: &str| Plan { namespaces: shared(), ..Plan::script(script) };
    // The second process outlives the first, which is not the first of its namespace.
    pod.run("c1", &plan("sleep 1000 & echo $!; exit 4")).await;
    assert_eq!(pod.wait("c1", "").await, 4);
    assert!(pod.cgroup("c1").procs().unwrap().is_empty());

    pod.run("c2", &plan("ps; sleep 1000")).await;
    pod.log_says("c2", "ps").await;
    let log = pod.log("c2");
    assert!(log.lines().any(|line| line.trim_start().starts_with("1 ")), "{log}");
    pod.sandbox.stop_sandbox(context(), &StopSandboxRequest::new()).await.unwrap();
    assert_eq!(pod.wait("c2", "").await, 137);
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_made_is_refused() {
    let pod = Pod::start().await;
    let host = SandboxSpec {
        network: NamespaceSource::Host,
        sysctls: [("net.ipv4.ip_forward".into(), "1".into())].into(),
        ..plain_sandbox()
    };
    let error = pod.create_sandbox(&host).await.unwrap_err();
    assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{error}");
    let unknown = SandboxSpec { sysctls: [("net.no.such".into(), "1".into())].into(), ..plain_sandbox() };
    pod.create_sandbox(&unknown).await.unwrap();
    let error = pod.sandbox.start_sandbox(context(), &StartSandboxRequest::new()).await.unwrap_err();
    assert!(error.to_string().contains("net/no/such"), "{error}");
    assert!(stasis_sys::mount::mounts_below(&pod.dir).unwrap().is_empty());
}

#[tokio::test]
async fn the_shim_is_private_found_again_and_ends_when_idle() {
    let pod = Pod::start().await;
    let mode = |name: &str| fs::metadata(pod.dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("shim.sock"), mode("shim.pid"), mode("shim.log")), (0o600, 0o600, 0o600));
    let shim = pod.shim_pid();
    assert_eq!(start_shim(&pod.dir, &pod.id), pod.address);
    assert_eq!(pod.shim_pid(), shim, "no second one was started");

    pod.run("c1", &Plan::script("sleep 1000")).await;
    stasis_sys::process::signal(shim, 15).unwrap();
    pod.task.shutdown(context(), &ShutdownRequest::new()).await.unwrap();
    assert_eq!(pod.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);
    pod.kill("c1", 9).await.unwrap();
    pod.wait("c1", "").await;
    pod.delete("c1", "").await.unwrap();
    pod.task.shutdown(context(), &ShutdownRequest::new()).await.unwrap();
    eventually("the end of the shim", || !pod.dir.join("shim.sock").exists()).await;
}

#[tokio::test]
async fn a_client_that_dies_changes_nothing() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("i=0; while true; do i=$((i+1)); echo $i; sleep 0.01; done")).await;
    // Another client, which waits and then is gone without a word.
    let other = containerd_shim_protos::shim_async::Client::connect(&pod.address).await.unwrap();
    let task = containerd_shim_protos::shim_async::TaskClient::new(other);
    let wait = tokio::spawn(async move {
        let request = WaitRequest { id: "c1".into(), ..Default::default() };
        let _ = task.wait(context(), &request).await;
    });
    pod.log_says("c1", "3\n").await;
    wait.abort();
    let before = pod.log("c1").lines().count();
    eventually("more output", || pod.log("c1").lines().count() > before + 10).await;
    assert_eq!(pod.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);
}

#[tokio::test]
async fn after_the_death_of_the_shim_delete_cleans_up() {
    let pod = Pod::with_sandbox(&SandboxSpec { pid: NamespaceSource::New, ..plain_sandbox() }).await;
    pod.run("c1", &Plan { namespaces: pod.pinned(), ..Plan::script("sleep 1000") }).await;
    stasis_sys::process::signal(pod.shim_pid(), 9).unwrap();
    let output = shim_command(&pod.dir, &pod.id).arg("delete").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    use protobuf::Message as _;
    assert_eq!(DeleteResponse::parse_from_bytes(&output.stdout).unwrap().exit_status, 137);
    assert!(stasis_sys::mount::mounts_below(&pod.dir).unwrap().is_empty());
    assert!(!pod.cgroup("c1").exists());
}

#[tokio::test]
async fn pause_update_and_pids() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("i=0; while true; do i=$((i+1)); echo $i; sleep 0.01; done")).await;
    pod.log_says("c1", "1\n").await;
    let pids = pod.task.pids(context(), &PidsRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert!(pids.processes.iter().any(|process| process.pid == pids.processes[0].pid));
    pod.task.pause(context(), &PauseRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert_eq!(pod.state("c1").await.unwrap().status.unwrap(), Status::PAUSED);
    assert!(pod.cgroup("c1").is_frozen().unwrap());
    pod.task.resume(context(), &ResumeRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert!(!pod.cgroup("c1").is_frozen().unwrap());

    let resources = Any { value: br#"{"pids":{"limit":77}}"#.to_vec(), ..Default::default() };
    let update = UpdateTaskRequest { id: "c1".into(), resources: Some(resources).into(), ..Default::default() };
    pod.task.update(context(), &update).await.unwrap();
    let cgroup = pod.cgroup("c1");
    let limit = fs::read_to_string(cgroup.dir("pids").unwrap().join("pids.max")).unwrap();
    assert_eq!(limit.trim(), "77");

    pod.task.pause(context(), &PauseRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    pod.kill("c1", 9).await.unwrap();
    assert_eq!(pod.wait("c1", "").await, 137, "a frozen container can be killed");
}
