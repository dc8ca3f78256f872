//! What the daemon says that containers and pods use, against what they really did.

use std::collections::HashMap;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stasis_cri_api::runtime::*;
use stasis_e2e::{BUSYBOX, Stage, check, eventually, shell};
use tonic::Code;
use xtask::cri::{Container, Pod, container_config};
use xtask::node::Setup;

const MIB: u64 = 1 << 20;

#[test]
fn statistics_show_what_the_workload_did() {
    check("usage", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("usage").await?;
        let busy = stage.script(&pod, "busy", "while :; do :; done").await?;
        let quiet = stage.script(&pod, "quiet", "sleep 100000").await?;
        processor_time_is_told(stage, &busy, &quiet).await?;
        memory_is_told(stage, &pod).await?;
        the_writable_layer_is_told(stage, &quiet).await?;
        traffic_is_told(stage, &pod, &quiet).await?;
        metrics_are_those_that_are_described(stage, &pod, &busy).await?;
        lists_hold_what_runs(stage, &pod, &busy, &quiet).await?;
        ends_are_told(stage, &pod, &busy).await?;
        stage.remove(&pod).await
    });
}

async fn stats(stage: &mut Stage, container: &Container) -> Result<ContainerStats> {
    let request = ContainerStatsRequest { container_id: container.id.clone() };
    stage.node.cri.runtime.container_stats(request).await?.into_inner().stats.context("no stats")
}

async fn pod_stats(stage: &mut Stage, pod: &Pod) -> Result<LinuxPodSandboxStats> {
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let answer = stage.node.cri.runtime.pod_sandbox_stats(request).await?.into_inner();
    answer.stats.and_then(|stats| stats.linux).context("no stats")
}

fn number(value: Option<UInt64Value>) -> u64 {
    value.map(|value| value.value).unwrap_or_default()
}

async fn processor_time_is_told(stage: &mut Stage, busy: &Container, quiet: &Container) -> Result<()> {
    let first = stats(stage, busy).await?.cpu.context("no processor time")?;
    assert!(first.timestamp > 0);
    let later = eventually("a rate of the busy container", async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(stats(stage, busy).await?.cpu.filter(|cpu| cpu.usage_nano_cores.is_some()))
    })
    .await?;
    let (used, before) = (number(later.usage_core_nano_seconds), number(first.usage_core_nano_seconds));
    assert!(used > before + 10_000_000, "a busy loop used {before}, then {used} ns");
    let rate = number(later.usage_nano_cores);
    assert!((10_000_000..=1_500_000_000).contains(&rate), "one loop uses at most one processor: {rate}");
    let idle = number(stats(stage, quiet).await?.cpu.context("no processor time")?.usage_core_nano_seconds);
    assert!(idle < used, "a sleeping container used {idle} ns, the busy one {used}");
    Ok(())
}

async fn memory_is_told(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let mut config = shell("memory", "text=$(head -c 25165824 /dev/zero | tr '\\0' x); echo full; sleep 100000");
    let resources = LinuxContainerResources { memory_limit_in_bytes: 200 << 20, ..Default::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    let container = stage.container(pod, config).await?;
    let memory = eventually("20 MiB in use", async || {
        let memory = stats(stage, &container).await?.memory.context("no memory")?;
        Ok((number(memory.rss_bytes) > 20 * MIB).then_some(memory))
    })
    .await?;
    let (usage, working) = (number(memory.usage_bytes), number(memory.working_set_bytes));
    assert!(working > 20 * MIB && usage >= working, "{memory:?}");
    assert_eq!(number(memory.available_bytes), (200 * MIB).saturating_sub(working), "{memory:?}");
    assert!(number(memory.page_faults) > 0);
    let unlimited = stats(stage, &stage.node.cri.clone().create(pod, shell("idle", "sleep 1")).await?).await?;
    assert_eq!((unlimited.cpu, unlimited.memory), (None, None), "a container that does not run uses nothing");
    // The two were read at different moments, and the container's memory may have shrunk in between.
    let whole = eventually("the container's memory in the pod's", async || {
        let whole = pod_stats(stage, pod).await?;
        let memory = whole.memory.as_ref().context("no memory of the pod")?;
        Ok((number(memory.usage_bytes) > 20 * MIB).then_some(whole))
    })
    .await?;
    assert!(number(whole.process.context("no processes of the pod")?.process_count) >= 3);
    stage.node.cri.remove(&container).await
}

async fn the_writable_layer_is_told(stage: &mut Stage, container: &Container) -> Result<()> {
    let layer = async |stage: &mut Stage| Ok::<_, anyhow::Error>(stats(stage, container).await?.writable_layer);
    let empty = eventually("the size of the empty layer", async || layer(stage).await).await?;
    stage.sh(container, "head -c 5242880 /dev/urandom > /file && mkdir /a && touch /a/b").await?;
    let full = eventually("a layer of 5 MiB", async || {
        Ok(layer(stage).await?.filter(|layer| number(layer.used_bytes) >= 5 * MIB))
    })
    .await?;
    assert!(full.timestamp > empty.timestamp && number(full.used_bytes) < 6 * MIB, "{full:?}");
    // The OCI runtime makes mount points there, too: /proc, /dev, /sys and files in /etc.
    let made = number(full.inodes_used) - number(empty.inodes_used);
    assert!((3..20).contains(&made), "{empty:?} {full:?}");
    let answer = stage.node.cri.images.image_fs_info(ImageFsInfoRequest {}).await?.into_inner();
    let images = &answer.container_filesystems[0];
    assert_eq!(full.fs_id, images.fs_id, "the file system is the one that ImageFsInfo tells");
    Ok(())
}

/// Sends 3 MiB from the pod to the host, through the pod's own interface.
async fn traffic_is_told(stage: &mut Stage, pod: &Pod, container: &Container) -> Result<()> {
    let network = |stats: LinuxPodSandboxStats| stats.network.and_then(|network| network.default_interface);
    let before = network(pod_stats(stage, pod).await?).context("no default interface")?;
    assert_eq!(before.name, "eth0");
    let gateway = stage.sh(container, "ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p'").await?;
    let listener = TcpListener::bind((gateway.as_str(), 0)).context("listen on the bridge")?;
    let port = listener.local_addr()?.port();
    let reader = std::thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        std::io::copy(&mut stream, &mut std::io::sink())
    });
    stage.sh(container, &format!("head -c 3145728 /dev/zero | nc {gateway} {port}")).await?;
    let received = reader.join().expect("the reader")?;
    assert_eq!(received, 3 * MIB);
    let after = network(pod_stats(stage, pod).await?).context("no default interface")?;
    let sent = number(after.tx_bytes) - number(before.tx_bytes);
    assert!((3 * MIB..4 * MIB).contains(&sent), "sent {sent} bytes");
    assert!(number(after.rx_bytes) > number(before.rx_bytes), "acknowledgements come back");
    Ok(())
}

async fn metrics_are_those_that_are_described(stage: &mut Stage, pod: &Pod, busy: &Container) -> Result<()> {
    let runtime = &mut stage.node.cri.runtime;
    let described = runtime.list_metric_descriptors(ListMetricDescriptorsRequest {}).await?.into_inner().descriptors;
    let keys: HashMap<_, _> = described.into_iter().map(|family| (family.name, family.label_keys)).collect();
    let answer = runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {}).await?.into_inner();
    let of_pod = answer.pod_metrics.into_iter().find(|metrics| metrics.pod_sandbox_id == pod.id);
    let of_pod = of_pod.context("no metrics of the pod")?;
    let of_busy = of_pod.container_metrics.iter().find(|metrics| metrics.container_id == busy.id);
    let of_busy = &of_busy.context("no metrics of the container")?.metrics;
    for metric in of_pod.metrics.iter().chain(of_busy) {
        let keys = keys.get(&metric.name).with_context(|| format!("{} is not described", metric.name))?;
        assert_eq!(keys.len(), metric.label_values.len(), "{metric:?}");
    }
    let value = |metrics: &[Metric], name: &str| {
        let metric = metrics.iter().find(|metric| metric.name == name).with_context(|| format!("no {name}"))?;
        Ok::<_, anyhow::Error>(number(metric.value))
    };
    for name in ["container_start_time_seconds", "container_memory_working_set_bytes", "container_fs_limit_bytes"] {
        assert!(value(of_busy, name)? > 0, "{name}");
    }
    assert!(value(of_busy, "container_cpu_usage_seconds_total")? < 1000);
    assert_eq!((value(of_busy, "container_processes")?, value(of_busy, "container_threads")?), (1, 1));
    assert!((1..20).contains(&value(of_busy, "container_file_descriptors")?));
    assert!(value(&of_pod.metrics, "container_network_transmit_bytes_total")? > 3 * MIB);
    let labels = &of_busy[0].label_values;
    let label = |key: &str| keys[&of_busy[0].name].iter().position(|name| name == key).map(|place| &labels[place]);
    assert_eq!(label("container").map(String::as_str), Some("busy"));
    assert_eq!(label("pod").map(String::as_str), Some("usage"));
    assert_eq!(label("namespace").map(String::as_str), Some("default"));
    assert_eq!(label("image").map(String::as_str), Some(BUSYBOX));
    assert_eq!(label("name"), Some(&busy.id));
    Ok(())
}

async fn lists_hold_what_runs(stage: &mut Stage, pod: &Pod, busy: &Container, quiet: &Container) -> Result<()> {
    let list = async |stage: &mut Stage, filter: Option<ContainerStatsFilter>| {
        let answer = stage.node.cri.runtime.list_container_stats(ListContainerStatsRequest { filter }).await?;
        let stats = answer.into_inner().stats;
        ensure!(stats.iter().all(|stats| stats.cpu.is_some() && stats.memory.is_some()), "{stats:?}");
        let mut ids: Vec<_> = stats.into_iter().filter_map(|stats| stats.attributes).map(|named| named.id).collect();
        ids.sort();
        Ok(ids)
    };
    let mut running = vec![busy.id.clone(), quiet.id.clone()];
    running.sort();
    assert_eq!(list(stage, None).await?, running);
    let one = ContainerStatsFilter { id: busy.id[..20].into(), ..Default::default() };
    assert_eq!(list(stage, Some(one)).await?, std::slice::from_ref(&busy.id));
    let other = ContainerStatsFilter { pod_sandbox_id: "0".repeat(64), ..Default::default() };
    assert!(list(stage, Some(other)).await?.is_empty());

    // A pod without containers has its network counted, too: nobody in it shows it.
    let empty = stage.pod("empty").await?;
    let answer = stage.node.cri.runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest { filter: None }).await?;
    let pods = answer.into_inner().stats;
    assert_eq!(pods.len(), 2);
    for stats in pods {
        let linux = stats.linux.context("no stats")?;
        let of_empty = stats.attributes.context("no attributes")?.id == empty.id;
        assert_eq!(linux.containers.len(), if of_empty { 0 } else { 2 });
        let interface = linux.network.and_then(|network| network.default_interface).context("no interface")?;
        assert_eq!(interface.name, "eth0");
    }
    stage.node.cri.stop_pod(&empty.id).await?;
    let request = PodSandboxStatsRequest { pod_sandbox_id: empty.id.clone() };
    let refused = stage.node.cri.runtime.pod_sandbox_stats(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    stage.node.cri.remove_pod(&empty.id).await?;
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id[..20].into() };
    stage.node.cri.runtime.pod_sandbox_stats(request).await.context("by the beginning of its ID")?;
    Ok(())
}

async fn ends_are_told(stage: &mut Stage, pod: &Pod, busy: &Container) -> Result<()> {
    stage.node.cri.stop(busy, 0).await?;
    let ended = stats(stage, busy).await?;
    assert_eq!((ended.cpu, ended.memory), (None, None));
    assert!(ended.writable_layer.is_some() && ended.attributes.is_some());
    let request = ContainerStatsRequest { container_id: "f".repeat(64) };
    let refused = stage.node.cri.runtime.container_stats(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");

    let limit = LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() };
    let mut config = container_config("greedy", BUSYBOX, &["sh", "-c", "tail /dev/zero"]);
    config.linux.get_or_insert_default().resources = Some(limit);
    let greedy = stage.container(pod, config).await?;
    let status = stage.exited(&greedy).await?;
    assert_eq!((status.reason.as_str(), status.exit_code), ("OOMKilled", 137), "{status:?}");
    Ok(())
}
