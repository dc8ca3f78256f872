//! What goes away in the middle: the caller of a call, and the machine.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use stasis_cri_api::runtime::{ContainerFilter, ContainerState, ExecSyncRequest, PodSandboxState};
use stasis_e2e::{COUNTER, Stage, check, counts_beyond, eventually, shell};
use xtask::cri::container_config;
use xtask::node::Setup;

/// After so many milliseconds callers give up: at once, amid the start of the shim, amid the network's plugins, late.
const PATIENCE_OF_CALLERS: [u64; 6] = [0, 2, 8, 20, 40, 80];

#[test]
fn a_caller_that_gives_up_leaves_nothing_half_made() {
    check("giveup", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        for patience in PATIENCE_OF_CALLERS {
            let (mut cri, config) = (stage.node.cri.clone(), stage.node.pod_config(&format!("pod-{patience}")));
            let call = tokio::spawn(async move { cri.run_pod(config).await });
            tokio::time::sleep(Duration::from_millis(patience)).await;
            call.abort();
        }
        settled(stage).await?;
        let pod = stage.pod("pod").await?;
        for patience in PATIENCE_OF_CALLERS {
            let (mut cri, pod) = (stage.node.cri.clone(), pod.clone());
            let config = shell(&format!("main-{patience}"), "sleep 1000");
            let call = tokio::spawn(async move {
                let container = cri.create(&pod, config).await?;
                cri.start(&container).await
            });
            tokio::time::sleep(Duration::from_millis(patience)).await;
            call.abort();
        }
        settled(stage).await?;
        stage.remove(&pod).await
    });
}

#[test]
fn a_command_ends_with_its_time_and_with_its_caller() {
    check("leave", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let container = stage.script(&pod, "main", "exec sleep 1000").await?;
        let (mut cri, of_call) = (stage.node.cri.clone(), container.clone());
        let call = tokio::spawn(async move { cri.exec(&of_call, &["sleep", "31337"]).await });
        let runs = "ps -o args | grep -q '^[s]leep 31337' && echo yes || echo no";
        eventually("the command", async || Ok((stage.sh(&container, runs).await? == "yes").then_some(()))).await?;
        call.abort();
        eventually("its end", async || Ok((stage.sh(&container, runs).await? == "no").then_some(()))).await?;

        let cmd = ["sleep", "31337"].map(str::to_owned).to_vec();
        let request = ExecSyncRequest { container_id: container.id.clone(), cmd, timeout: 1 };
        let refused = stage.node.cri.runtime.exec_sync(request).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::DeadlineExceeded, "{refused}");
        // One that cannot be started leaves nothing either.
        assert!(stage.node.cri.exec(&container, &["/no/such/command"]).await.is_err());
        let bundle = stage.node.ground.state().join("pods").join(&pod.id).join("bundles").join(&container.id);
        let left = fs::read_dir(bundle)?.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("exec-"));
        assert_eq!(left.count(), 0, "FIFOs of commands are left");
        assert_eq!(stage.sh(&container, runs).await?, "no");
        stage.remove(&pod).await
    });
}

/// Waits until nothing is under way any more: all that is on disk belongs to a pod or container that is listed, pods are
/// ready with an address, and containers are created or running.
async fn settled(stage: &mut Stage) -> Result<()> {
    let state = stage.node.ground.state();
    let names = |dir: std::path::PathBuf| -> BTreeSet<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    eventually("an end of what was begun", async || {
        let pods: BTreeSet<String> = stage.node.cri.list_pods().await?.into_iter().collect();
        let listed = stage.node.cri.list(ContainerFilter::default()).await?;
        let containers: BTreeSet<String> = listed.into_iter().map(|container| container.id).collect();
        let snapshots = names(stage.node.ground.root().join("snapshots/active"));
        Ok((names(state.join("pods")) == pods && snapshots == containers).then_some(()))
    })
    .await?;
    for pod in stage.node.cri.list_pods().await? {
        let status = stage.node.cri.pod_status(&pod).await?;
        ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
        ensure!(status.network.is_some_and(|network| !network.ip.is_empty()), "pod {pod} has no address");
    }
    for container in stage.node.cri.list(ContainerFilter::default()).await? {
        let whole = [ContainerState::ContainerCreated, ContainerState::ContainerRunning];
        ensure!(whole.contains(&container.state()), "{container:?}");
    }
    Ok(())
}

#[test]
fn after_a_reboot_what_ran_is_told_and_can_be_removed() {
    check("reboot", Setup::default(), async |stage| {
        stage.import(&["busybox", "counter"])?;
        let pod = stage.pod("pod").await?;
        let counter = stage.container(&pod, container_config("counter", COUNTER, &[])).await?;
        counts_beyond(&counter, 3).await?;
        let created = stage.node.cri.create(&pod, shell("created", "sleep 1000")).await?;
        let ended = stage.script(&pod, "ended", "exit 4").await?;
        stage.exited(&ended).await?;
        stage.node.reboot().await?;

        assert_eq!(stage.node.cri.pod_status(&pod.id).await?.state(), PodSandboxState::SandboxNotready);
        let status = stage.node.cri.status(&counter).await?;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_ne!(status.exit_code, 0, "nobody knows how it ended: {status:?}");
        ensure!(!status.reason.is_empty() && status.finished_at > 0, "{status:?}");
        assert_eq!(stage.node.cri.status(&ended).await?.exit_code, 4, "what was known stays known");
        assert_ne!(stage.node.cri.status(&created).await?.state(), ContainerState::ContainerRunning);

        // As the kubelet goes on: the old pod away, a new one of the next attempt.
        stage.remove(&pod).await?;
        let mut config = stage.node.pod_config("pod");
        config.metadata.as_mut().unwrap().attempt = 1;
        let pod = stage.node.cri.run_pod(config).await?;
        let counter = stage.container(&pod, container_config("counter", COUNTER, &[])).await?;
        counts_beyond(&counter, 3).await?;
        stage.remove(&pod).await
    });
}
