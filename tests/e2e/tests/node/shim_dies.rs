//! The shim of a pod is killed: what ran in it is ended, and said so.

use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use stasis_cri_api::runtime::PodSandboxState;
use stasis_e2e::{Stage, check, eventually};
use xtask::cri::{Container, Pod};
use xtask::node::Setup;

#[test]
fn a_lost_shim_ends_its_containers_and_its_pod() {
    check("shim", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let (pod, container, process) = running(stage, "seen").await?;
        kill(&stage.node.shims()?)?;
        is_lost(stage, &pod, &container, process).await?;

        let (pod, container, process) = running(stage, "unseen").await?;
        stage.node.kill_daemon()?;
        kill(&stage.node.shims()?)?;
        stage.node.restart_daemon().await?;
        is_lost(stage, &pod, &container, process).await?;

        // The node is as good as before.
        let (pod, container, _) = running(stage, "next").await?;
        assert_eq!(stage.sh(&container, "echo well").await?, "well");
        stage.remove(&pod).await
    });
}

async fn running(stage: &mut Stage, name: &str) -> Result<(Pod, Container, PathBuf)> {
    let pod = stage.pod(name).await?;
    let container = stage.script(&pod, "main", "sleep 1000 & sleep 1000; true").await?;
    let process = stage.process(&container).await?;
    Ok((pod, container, process))
}

fn kill(pids: &[u32]) -> Result<()> {
    assert_eq!(pids.len(), 1, "one pod has one shim");
    let pid = Pid::from_raw(pids[0].try_into()?).context("a process ID that is none")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

async fn is_lost(stage: &mut Stage, pod: &Pod, container: &Container, process: PathBuf) -> Result<()> {
    let status = stage.exited(container).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    assert!(status.message.contains("shim"), "{}", status.message);
    eventually("the end of its process", async || Ok((!process.exists()).then_some(()))).await?;
    eventually("a pod that is not ready", async || {
        let status = stage.node.cri.pod_status(&pod.id).await?;
        Ok((status.state() == PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    stage.remove(pod).await
}
