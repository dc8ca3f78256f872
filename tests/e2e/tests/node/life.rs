//! The life of a pod and its containers through CRI: once through our shim, once through containerd's, one body.

use std::fs;

use anyhow::{Result, ensure};
use stasis_cri_api::runtime::*;
use stasis_e2e::{BUSYBOX, Stage, check, eventually, shell};
use tonic::Code;
use xtask::cri::{Pod, container_config, refusal};
use xtask::node::Setup;
use xtask::places::Places;

/// Most that a shim may have resident, in KiB.
const SHIM_RESIDENT_MAX: u64 = 5_000_000 / 1024;

#[test]
fn a_pod_lives_through_our_shim() {
    check("life", Setup::default(), async |stage| {
        life(stage, "").await?;
        log_is_in_the_format_of_cri(stage).await?;
        names_are_taken_once(stage).await?;
        lists_are_filtered(stage).await?;
        pods_with_ends_are_idempotent(stage).await
    });
}

#[test]
fn a_pod_lives_through_the_shim_of_containerd() {
    let peers = Places::of_tests().unwrap().peers();
    let shim = peers.join("bin/containerd-shim-runc-v2").display().to_string();
    let setup = Setup { more: format!("[runtimes.peer]\ntype = {shim:?}\n"), ..Setup::default() };
    check("peer", setup, async |stage| life(stage, "peer").await);
}

/// What holds whatever shim runs the containers.
async fn life(stage: &mut Stage, handler: &str) -> Result<()> {
    stage.import(&["busybox"])?;
    let pod = stage.node.cri.run_pod_with(stage.node.pod_config("life"), handler).await?;
    let status = stage.node.cri.pod_status(&pod.id).await?;
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    let ip = status.network.unwrap().ip;
    assert!(ip.starts_with("10.88."), "{ip}");

    let script = "trap 'exit 42' TERM; echo begun; while :; do sleep 0.1; done";
    let mut config = shell("main", script);
    config.labels.insert("app".into(), "test".into());
    config.envs.push(KeyValue { key: "GREETING".into(), value: "hello".into() });
    config.working_dir = "/tmp".into();
    let main = stage.node.cri.create(&pod, config.clone()).await?;
    let status = stage.node.cri.status(&main).await?;
    assert_eq!((status.state(), status.started_at, status.finished_at), (ContainerState::ContainerCreated, 0, 0));
    let (code, _) = refusal(stage.node.cri.exec(&main, &["true"]).await)?;
    assert_eq!(code, Code::FailedPrecondition);

    stage.node.cri.start(&main).await?;
    let status = stage.node.cri.status(&main).await?;
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    assert!(status.created_at <= status.started_at && status.finished_at == 0, "{status:?}");
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.image.unwrap().image, BUSYBOX);
    assert!(status.image_ref.contains("sha256:"), "{}", status.image_ref);
    assert_eq!(status.log_path, main.log.display().to_string());
    let (code, message) = refusal(stage.node.cri.start(&main).await)?;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(message.contains("it is running"), "{message}");
    let begun = async || Ok(fs::read_to_string(&main.log)?.contains("begun").then_some(()));
    eventually("the container's first line", begun).await?;

    let request = ExecSyncRequest {
        container_id: main.id.clone(),
        cmd: ["sh", "-c", "echo $GREETING; pwd; echo err >&2; exit 7"].map(Into::into).into(),
        timeout: 30,
    };
    let answer = stage.node.cri.runtime.exec_sync(request).await?.into_inner();
    assert_eq!(
        (answer.stdout.as_slice(), answer.stderr.as_slice()),
        (b"hello\n/tmp\n".as_slice(), b"err\n".as_slice())
    );
    assert_eq!(answer.exit_code, 7);

    stage.node.cri.stop(&main, 30).await?;
    let status = stage.node.cri.status(&main).await?;
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 42));
    assert_eq!(status.reason, "Error");
    assert!(status.started_at <= status.finished_at, "{status:?}");
    stage.node.cri.stop(&main, 30).await?;

    ends_are_told_apart(stage, &pod).await?;

    stage.node.cri.remove(&main).await?;
    stage.node.cri.remove(&main).await?;
    let (code, message) = refusal(stage.node.cri.status(&main).await)?;
    assert_eq!(code, Code::NotFound);
    assert!(message.contains(&main.id), "{message}");
    stage.remove(&pod).await
}

/// Success, failure, and an end by force.
async fn ends_are_told_apart(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let done = stage.script(pod, "done", "exit 0").await?;
    let failed = stage.script(pod, "failed", "exit 3").await?;
    let stubborn = stage.script(pod, "stubborn", "trap '' TERM; echo deaf; while :; do sleep 0.1; done").await?;
    let deaf = async || Ok(fs::read_to_string(&stubborn.log)?.contains("deaf").then_some(()));
    eventually("the trap", deaf).await?;
    stage.node.cri.stop(&stubborn, 1).await?;
    for (container, code, reason) in [(&done, 0, "Completed"), (&failed, 3, "Error"), (&stubborn, 137, "Error")] {
        let status = stage.exited(container).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason));
    }
    let absent = stage.node.cri.create(pod, container_config("absent", BUSYBOX, &["/no/such/program"])).await?;
    let error = stage.node.cri.start(&absent).await.unwrap_err();
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    let status = stage.node.cri.status(&absent).await?;
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 128));
    assert_eq!(status.reason, "StartError");
    Ok(())
}

async fn log_is_in_the_format_of_cri(stage: &mut Stage) -> Result<()> {
    let pod = stage.pod("log").await?;
    let container = stage.script(&pod, "main", "echo out; echo err >&2; printf unfinished; sleep 1000").await?;
    let lines = async || Ok(Some(fs::read_to_string(&container.log)?).filter(|text| text.lines().count() == 2));
    let text = eventually("two lines", lines).await?;
    let mut tags = Vec::new();
    for line in text.lines() {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.len() >= 30 && time.as_bytes()[10] == b'T', "no RFC 3339 time with nanoseconds: {line}");
        tags.push(rest);
    }
    tags.sort_unstable();
    assert_eq!(tags, ["stderr F err", "stdout F out"]);

    let shims = stage.node.shims()?;
    assert_eq!(shims.len(), 1);
    let resident = resident(shims[0])?;
    assert!(resident <= SHIM_RESIDENT_MAX, "the shim of a pod with a container has {resident} KiB resident");

    let rotated = container.log.with_extension("old");
    fs::rename(&container.log, &rotated)?;
    let request = ReopenContainerLogRequest { container_id: container.id.clone() };
    stage.node.cri.runtime.reopen_container_log(request).await?;
    assert!(container.log.exists());
    // What was written without a newline is logged at the end, in the new file.
    stage.node.cri.stop(&container, 0).await?;
    let last = async || Ok(fs::read_to_string(&container.log)?.contains("unfinished").then_some(()));
    eventually("the line without end", last).await?;
    stage.remove(&pod).await
}

fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

async fn names_are_taken_once(stage: &mut Stage) -> Result<()> {
    let pod = stage.pod("name").await?;
    let (code, message) = refusal(stage.pod("name").await)?;
    assert_eq!(code, Code::AlreadyExists);
    assert!(message.contains(&pod.id), "names its holder: {message}");
    let container = stage.script(&pod, "main", "sleep 1000").await?;
    let (code, message) = refusal(stage.script(&pod, "main", "sleep 1000").await)?;
    assert_eq!(code, Code::AlreadyExists);
    assert!(message.contains(&container.id), "names its holder: {message}");
    let mut again = shell("main", "sleep 1000");
    again.metadata.as_mut().unwrap().attempt = 1;
    stage.node.cri.create(&pod, again).await?;
    stage.node.cri.remove(&container).await?;
    stage.script(&pod, "main", "sleep 1000").await?;
    stage.remove(&pod).await
}

async fn lists_are_filtered(stage: &mut Stage) -> Result<()> {
    let (first, second) = (stage.pod("first").await?, stage.pod("second").await?);
    let mut config = shell("red", "sleep 1000");
    config.labels.insert("colour".into(), "red".into());
    let red = stage.container(&first, config).await?;
    let made = stage.node.cri.create(&first, shell("made", "true")).await?;
    let other = stage.script(&second, "other", "sleep 1000").await?;
    let running = ContainerStateValue { state: ContainerState::ContainerRunning.into() };
    let colour = [("colour".to_owned(), "red".to_owned())].into();
    let cases = [
        (ContainerFilter::default(), vec![&red, &made, &other]),
        (ContainerFilter { id: red.id.clone(), ..Default::default() }, vec![&red]),
        (ContainerFilter { pod_sandbox_id: first.id.clone(), ..Default::default() }, vec![&red, &made]),
        (ContainerFilter { state: Some(running), ..Default::default() }, vec![&red, &other]),
        (ContainerFilter { label_selector: colour, ..Default::default() }, vec![&red]),
    ];
    for (filter, expected) in cases {
        let listed = stage.node.cri.list(filter.clone()).await?;
        let mut listed: Vec<_> = listed.into_iter().map(|container| container.id).collect();
        let mut expected: Vec<_> = expected.into_iter().map(|container| container.id.clone()).collect();
        listed.sort_unstable();
        expected.sort_unstable();
        assert_eq!(listed, expected, "{filter:?}");
    }
    stage.node.cri.stop_pod(&second.id).await?;
    let ready = PodSandboxStateValue { state: PodSandboxState::SandboxReady.into() };
    let filter = PodSandboxFilter { state: Some(ready), ..Default::default() };
    let request = ListPodSandboxRequest { filter: Some(filter) };
    let listed = stage.node.cri.runtime.list_pod_sandbox(request).await?.into_inner().items;
    assert_eq!(listed.iter().map(|pod| &pod.id).collect::<Vec<_>>(), [&first.id]);
    stage.remove(&first).await?;
    stage.remove(&second).await
}

async fn pods_with_ends_are_idempotent(stage: &mut Stage) -> Result<()> {
    let pod = stage.pod("end").await?;
    let container = stage.script(&pod, "main", "sleep 1000").await?;
    stage.node.cri.stop_pod(&pod.id).await?;
    stage.node.cri.stop_pod(&pod.id).await?;
    assert_eq!(stage.node.cri.pod_status(&pod.id).await?.state(), PodSandboxState::SandboxNotready);
    assert_eq!(stage.node.cri.status(&container).await?.exit_code, 137);
    let (code, message) = refusal(stage.node.cri.create(&pod, shell("late", "true")).await)?;
    assert_eq!(code, Code::FailedPrecondition, "{message}");
    stage.node.cri.remove_pod(&pod.id).await?;
    stage.node.cri.remove_pod(&pod.id).await?;
    let (code, _) = refusal(stage.node.cri.pod_status(&pod.id).await)?;
    assert_eq!(code, Code::NotFound);
    let (code, _) = refusal(stage.node.cri.status(&container).await)?;
    assert_eq!(code, Code::NotFound, "containers go with their pod");
    // Its name is free again.
    let again = stage.pod("end").await?;
    stage.remove(&again).await
}
