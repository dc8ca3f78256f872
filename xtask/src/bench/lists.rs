//! What the kubelet asks for all the time, on a node with many containers: lists and statuses, also while checkpoints run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stasis_cri_api::runtime::{ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest};

use super::measure::{Bench, Series, milliseconds, remove};
use crate::cri::{Container, Cri, Pod, container_config};
use crate::node::Node;

/// Pods, and containers in each.
const PODS: usize = 25;
const CONTAINERS_A_POD: usize = 20;

/// Calls of each kind that are measured.
const CALLS: usize = 100;

/// Checkpoints at once while the lists are asked for.
const CHECKPOINTS: usize = 10;

/// The pause between two calls beside the checkpoints: about as often as a kubelet and its probes ask.
const PAUSE: Duration = Duration::from_millis(5);

/// Milliseconds a call.
#[derive(Debug)]
pub(super) struct Lists {
    /// ListContainers.
    pub(super) containers: Series,
    /// ListPodSandbox.
    pub(super) pods: Series,
    /// ContainerStatus of one.
    pub(super) status: Series,
    /// ListContainers while checkpoints run.
    pub(super) beside_checkpoints: Series,
}

impl Lists {
    /// How many containers there are.
    pub(super) const CONTAINERS: usize = PODS * CONTAINERS_A_POD;
}

impl Bench<'_> {
    /// Runs the containers on each node in turn, asks, and removes them.
    pub(super) async fn lists(&mut self, image: &str) -> Result<Lists> {
        let [containers, pods, status, beside_checkpoints] = [(); 4].map(|()| self.series());
        let mut lists = Lists { containers, pods, status, beside_checkpoints };
        for (number, node) in self.nodes.iter_mut().enumerate() {
            let (pods, containers) = run(node, image).await?;
            for _ in 0..CALLS {
                lists.containers[number].push(list_containers(&mut node.cri).await?);
                lists.pods[number].push(list_pods(&mut node.cri).await?);
                lists.status[number].push(status_of(&mut node.cri, &containers[0]).await?);
            }
            lists.beside_checkpoints[number] = list_beside_checkpoints(node, &containers).await?;
            for pod in &pods {
                remove(node, pod).await?;
            }
        }
        Ok(lists)
    }
}

async fn run(node: &mut Node, image: &str) -> Result<(Vec<Pod>, Vec<Container>)> {
    let (mut pods, mut containers) = (Vec::new(), Vec::new());
    for number in 0..PODS {
        let pod = node.cri.run_pod(node.pod_config(&format!("list-{number}"))).await?;
        for number in 0..CONTAINERS_A_POD {
            let config = container_config(&format!("main-{number}"), image, &["sleep", "100000"]);
            let container = node.cri.create(&pod, config).await?;
            node.cri.start(&container).await?;
            containers.push(container);
        }
        pods.push(pod);
    }
    Ok((pods, containers))
}

async fn list_beside_checkpoints(node: &Node, containers: &[Container]) -> Result<Vec<f64>> {
    let mut checkpoints = tokio::task::JoinSet::new();
    for (number, container) in containers.iter().take(CHECKPOINTS).enumerate() {
        let (mut cri, container) = (node.cri.clone(), container.clone());
        let archive = node.ground.archives().join(format!("list-{number}.tar"));
        checkpoints.spawn(async move {
            cri.checkpoint(&container, &archive).await?;
            Ok::<_, anyhow::Error>(std::fs::remove_file(&archive)?)
        });
    }
    let (mut cri, mut times) = (node.cri.clone(), Vec::new());
    while !checkpoints.is_empty() {
        times.push(list_containers(&mut cri).await?);
        tokio::time::sleep(PAUSE).await;
        while let Some(ended) = checkpoints.try_join_next() {
            ended.context("a checkpoint")??;
        }
    }
    Ok(times)
}

async fn list_containers(cri: &mut Cri) -> Result<f64> {
    let begin = Instant::now();
    let answer = cri.runtime.list_containers(ListContainersRequest { filter: None }).await?;
    let time = milliseconds(begin);
    ensure!(answer.into_inner().containers.len() == Lists::CONTAINERS, "not all containers are listed");
    Ok(time)
}

async fn list_pods(cri: &mut Cri) -> Result<f64> {
    let begin = Instant::now();
    let answer = cri.runtime.list_pod_sandbox(ListPodSandboxRequest { filter: None }).await?;
    let time = milliseconds(begin);
    ensure!(answer.into_inner().items.len() == PODS, "not all pods are listed");
    Ok(time)
}

async fn status_of(cri: &mut Cri, container: &Container) -> Result<f64> {
    let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    let begin = Instant::now();
    let answer = cri.runtime.container_status(request).await?;
    let time = milliseconds(begin);
    ensure!(answer.into_inner().status.is_some(), "a container without a status");
    Ok(time)
}
