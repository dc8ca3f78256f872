//! Events, lists as streams, and new limits for what runs.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use stasis_cri_api::runtime::*;
use stasis_e2e::{PATIENCE, Stage, check, counts_beyond, shell};
use tonic::{Code, Streaming};
use xtask::cri::{Container, Pod};
use xtask::node::Setup;

use ContainerEventType::{ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent};

#[test]
fn events_tell_the_life_of_a_pod() {
    check("events", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let mut events = stage.node.cri.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
        let pod = stage.pod("events").await?;
        let created = next(&mut events).await?;
        assert_eq!((created.container_event_type(), &created.container_id), (ContainerCreatedEvent, &pod.id));
        assert_eq!(next(&mut events).await?.container_event_type(), ContainerStartedEvent);

        let container =
            stage.script(&pod, "main", "trap 'exit 3' TERM; echo count 1; while :; do sleep 0.1; done").await?;
        let expect = async |events: &mut Streaming<_>, what, state: ContainerState| {
            let event = next(events).await?;
            assert_eq!((event.container_event_type(), &event.container_id), (what, &container.id), "{event:?}");
            let sandbox = event.pod_sandbox_status.as_ref().context("no status of the pod")?;
            assert_eq!((&sandbox.id, sandbox.state()), (&pod.id, PodSandboxState::SandboxReady));
            assert!(event.created_at > 0);
            match event.containers_statuses.as_slice() {
                [] if what == ContainerDeletedEvent => {}
                [status] => assert_eq!((&status.id, status.state()), (&container.id, state)),
                other => bail!("other statuses: {other:?}"),
            }
            Ok(event)
        };
        expect(&mut events, ContainerCreatedEvent, ContainerState::ContainerCreated).await?;
        expect(&mut events, ContainerStartedEvent, ContainerState::ContainerRunning).await?;
        // A second reader hears what comes from now on.
        let mut late = stage.node.cri.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
        // Only now does the first process of its namespace take the signal.
        counts_beyond(&container, 0).await?;
        stage.node.cri.stop(&container, 30).await?;
        let stopped = expect(&mut events, ContainerStoppedEvent, ContainerState::ContainerExited).await?;
        assert_eq!(stopped.containers_statuses[0].exit_code, 3);
        assert_eq!(next(&mut late).await?, stopped);
        stage.node.cri.remove(&container).await?;
        expect(&mut events, ContainerDeletedEvent, ContainerState::ContainerExited).await?;

        let absent = stage.node.cri.create(&pod, shell("absent", "")).await?;
        assert_eq!(next(&mut events).await?.container_event_type(), ContainerCreatedEvent);
        stage.remove(&pod).await?;
        let mut rest = [next(&mut events).await?, next(&mut events).await?, next(&mut events).await?];
        rest.iter_mut().for_each(|event| event.created_at = 0);
        let told: Vec<_> = rest.iter().map(|event| (event.container_event_type(), &event.container_id)).collect();
        let expected =
            [(ContainerStoppedEvent, &pod.id), (ContainerDeletedEvent, &absent.id), (ContainerDeletedEvent, &pod.id)];
        assert_eq!(told, expected);
        assert_eq!((&rest[2].pod_sandbox_status, rest[2].containers_statuses.len()), (&None, 0));
        Ok(())
    });
}

async fn next(events: &mut Streaming<ContainerEventResponse>) -> Result<ContainerEventResponse> {
    let event = tokio::time::timeout(PATIENCE, events.message()).await.context("no event comes")?;
    event?.context("the events ended")
}

#[test]
fn lists_stream_one_item_a_message_and_hold_the_same() {
    check("lists", Setup::default(), async |stage| {
        stage.import(&["busybox", "counter"])?;
        let pods = [stage.pod("a").await?, stage.pod("b").await?];
        for pod in &pods {
            stage.script(pod, "one", "sleep 100000").await?;
            stage.script(pod, "two", "sleep 100000").await?;
        }
        let cri = &mut stage.node.cri;
        let mut unary = cri.runtime.list_containers(ListContainersRequest { filter: None }).await?.into_inner();
        let mut streamed = Vec::new();
        let mut stream = cri.runtime.stream_containers(StreamContainersRequest { filter: None }).await?.into_inner();
        while let Some(message) = stream.message().await? {
            assert_eq!(message.containers.len(), 1);
            streamed.extend(message.containers);
        }
        assert_eq!(streamed, unary.containers);
        unary.containers.truncate(1);
        let filter = ContainerFilter { id: unary.containers[0].id.clone(), ..Default::default() };
        let request = StreamContainersRequest { filter: Some(filter) };
        let mut stream = cri.runtime.stream_containers(request).await?.into_inner();
        assert_eq!(stream.message().await?.map(|message| message.containers), Some(unary.containers));
        assert_eq!(stream.message().await?, None);

        // How many messages, each with one item.
        macro_rules! count {
            ($client:expr, $method:ident, $request:expr, $field:ident) => {{
                let mut stream = $client.$method($request).await?.into_inner();
                let mut messages = 0;
                while let Some(message) = stream.message().await? {
                    assert_eq!(message.$field.len(), 1, stringify!($method));
                    messages += 1;
                }
                messages
            }};
        }
        let runtime = &mut cri.runtime;
        let request = StreamPodSandboxesRequest { filter: None };
        assert_eq!(count!(runtime, stream_pod_sandboxes, request, pod_sandboxes), 2);
        let request = StreamContainerStatsRequest { filter: None };
        assert_eq!(count!(runtime, stream_container_stats, request, container_stats), 4);
        let request = StreamPodSandboxStatsRequest { filter: None };
        assert_eq!(count!(runtime, stream_pod_sandbox_stats, request, pod_sandbox_stats), 2);
        let request = StreamPodSandboxMetricsRequest {};
        assert_eq!(count!(runtime, stream_pod_sandbox_metrics, request, pod_sandbox_metrics), 2);
        assert_eq!(count!(cri.images, stream_images, StreamImagesRequest { filter: None }, images), 2);
        Ok(())
    });
}

#[test]
fn new_limits_reach_the_control_group_and_the_status() {
    check("resize", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("resize").await?;
        let mut config = shell("main", "sleep 100000");
        let limits = LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        config.linux.get_or_insert_default().resources = Some(limits.clone());
        let waiting = stage.node.cri.create(&pod, config.clone()).await?;
        update(stage, &waiting, LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() })
            .await?;
        stage.node.cri.start(&waiting).await?;
        assert_eq!(limit(stage, &waiting, Limit::Memory).await?, (96 << 20).to_string(), "changed before its start");

        config.metadata.as_mut().context("metadata")?.name = "other".into();
        let running = stage.container(&pod, config).await?;
        assert_eq!(limit(stage, &running, Limit::Memory).await?, (64 << 20).to_string());
        let wanted =
            LinuxContainerResources { memory_limit_in_bytes: 128 << 20, cpu_quota: 80_000, ..Default::default() };
        update(stage, &running, wanted).await?;
        assert_eq!(limit(stage, &running, Limit::Memory).await?, (128 << 20).to_string());
        assert_eq!(limit(stage, &running, Limit::Quota).await?, "80000");
        let after = LinuxContainerResources { memory_limit_in_bytes: 128 << 20, cpu_quota: 80_000, ..limits };
        assert_eq!(resources(stage, &running).await?, after, "what was not named stays");

        stage.node.kill_daemon()?;
        stage.node.restart_daemon().await?;
        assert_eq!(resources(stage, &running).await?, after, "after a restart of the daemon");
        refusals(stage, &pod, &running).await?;
        stage.remove(&pod).await
    });
}

/// What cannot be changed is refused and leaves all as it was.
async fn refusals(stage: &mut Stage, pod: &Pod, running: &Container) -> Result<()> {
    let before = resources(stage, running).await?;
    let mut request = UpdateContainerResourcesRequest { container_id: running.id.clone(), ..Default::default() };
    let negative = LinuxContainerResources { cpu_shares: -5, ..Default::default() };
    // More processors than any machine has.
    let absent = LinuxContainerResources { cpuset_cpus: "9000-9999".into(), ..Default::default() };
    for (wrong, code) in [(negative, Code::InvalidArgument), (absent, Code::Internal)] {
        request.linux = Some(wrong);
        let refused = stage.node.cri.runtime.update_container_resources(request.clone()).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(&running.id), "{refused}");
        assert_eq!(resources(stage, running).await?, before);
    }
    stage.node.cri.stop(running, 0).await?;
    let refused = stage.node.cri.runtime.update_container_resources(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    let resources = LinuxContainerResources { memory_limit_in_bytes: 1 << 30, ..Default::default() };
    let request =
        UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.id.clone(), overhead: None, resources: Some(resources) };
    stage.node.cri.runtime.update_pod_sandbox_resources(request).await?;
    let network = NetworkConfig { pod_cidr: "10.1.0.0/24".into() };
    let request = UpdateRuntimeConfigRequest { runtime_config: Some(RuntimeConfig { network_config: Some(network) }) };
    stage.node.cri.runtime.update_runtime_config(request).await?;
    Ok(())
}

async fn update(stage: &mut Stage, container: &Container, linux: LinuxContainerResources) -> Result<()> {
    let container_id = container.id.clone();
    let request = UpdateContainerResourcesRequest { container_id, linux: Some(linux), ..Default::default() };
    stage.node.cri.runtime.update_container_resources(request).await?;
    Ok(())
}

async fn resources(stage: &mut Stage, container: &Container) -> Result<LinuxContainerResources> {
    let status = stage.node.cri.status(container).await?;
    assert!(status.user.and_then(|user| user.linux).is_some_and(|user| user.uid == 0 && user.gid == 0));
    status.resources.and_then(|resources| resources.linux).context("the status has no limits")
}

#[derive(Clone, Copy, Debug)]
enum Limit {
    Memory,
    Quota,
}

/// A limit as the control group of the container's first process has it.
async fn limit(stage: &mut Stage, container: &Container, limit: Limit) -> Result<String> {
    let process = stage.process(container).await?;
    let groups = fs::read_to_string(process.join("cgroup"))?;
    let (controller, file, unified) = match limit {
        Limit::Memory => ("memory", "memory.limit_in_bytes", "memory.max"),
        Limit::Quota => ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    };
    let path = |line: &str| PathBuf::from(line.splitn(3, ':').nth(2).unwrap_or_default().trim_start_matches('/'));
    let of_v1 = groups
        .lines()
        .find(|line| line.split(':').nth(1).is_some_and(|list| list.split(',').any(|name| name == controller)));
    let text = match of_v1 {
        Some(line) => fs::read_to_string(PathBuf::from("/sys/fs/cgroup").join(controller).join(path(line)).join(file))?,
        None => {
            let line = groups.lines().find(|line| line.starts_with("0::")).context("no control group")?;
            fs::read_to_string(PathBuf::from("/sys/fs/cgroup").join(path(line)).join(unified))?
        }
    };
    // `cpu.max` of version 2 has the quota before the period.
    text.split_whitespace().next().map(str::to_owned).context("an empty file")
}

#[test]
fn a_reader_that_is_too_slow_is_cut_off_and_holds_up_nobody() {
    check("slow", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let mut slow = stage.node.cri.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
        let pod = stage.pod("slow").await?;
        // Annotations make each event 20 KB, so that the connection's window is full soon; then the ring.
        let mut config = shell("main", "exit 0");
        config.annotations.insert("ballast".into(), "x".repeat(20_000));
        let mut made = 0;
        while made < 650 {
            let container = stage.node.cri.create(&pod, config.clone()).await?;
            stage.node.cri.remove(&container).await?;
            made += 1;
        }
        let mut heard = 0;
        let end = loop {
            match tokio::time::timeout(Duration::from_secs(30), slow.message()).await.context("the stream hangs")? {
                Ok(Some(_)) => heard += 1,
                Ok(None) => bail!("the stream ended without a word after {heard} events"),
                Err(status) => break status,
            }
        };
        assert_eq!(end.code(), Code::ResourceExhausted, "{end}");
        assert!(end.message().contains("list, and read anew"), "{end}");
        stage.remove(&pod).await
    });
}
