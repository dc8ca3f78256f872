//! The daemon is killed: no log line, no exit code is lost, and what a call left half done is found or cleared away.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stasis_cri_api::runtime::{
    Container as Listed, ContainerFilter, ContainerState, ListPodSandboxRequest, PodSandboxConfig, PodSandboxState,
};
use stasis_e2e::{Stage, check, eventually, shell};
use xtask::cri::{Container, Cri, Pod};
use xtask::node::Setup;

/// How often the daemon is killed while a container writes, and amid calls.
const KILLS: usize = 3;
const ROUNDS: usize = 8;

/// The kills amid calls come at moments of this range: a sequence of calls takes about as long.
const KILL_WITHIN: Duration = Duration::from_millis(600);

/// Where the sequence of random moments begins; a failure names its round.
const SEED: u64 = 0x5eed_0001;

#[test]
fn no_log_line_and_no_exit_code_is_lost_when_the_daemon_is_killed() {
    check("dmlog", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let script = "i=0; while :; do i=$((i + 1)); echo $i; usleep 500; done";
        let counter = stage.script(&pod, "counter", script).await?;
        let ending = stage.script(&pod, "ending", "while [ ! -e /go ]; do sleep 0.05; done; exit 3").await?;
        let process = stage.process(&ending).await?;
        for _ in 0..KILLS {
            let seen = numbers(&counter)?.len();
            eventually("more numbers", async || Ok((numbers(&counter)?.len() > seen + 100).then_some(()))).await?;
            stage.node.kill_daemon()?;
            let seen = numbers(&counter)?.len();
            eventually("numbers without daemon", async || Ok((numbers(&counter)?.len() > seen + 100).then_some(())))
                .await?;
            if process.join("root").exists() {
                fs::write(process.join("root/go"), "")?;
                eventually("an exit without daemon", async || Ok((!process.exists()).then_some(()))).await?;
            }
            stage.node.restart_daemon().await?;
            assert_eq!(stage.node.cri.pod_status(&pod.id).await?.state(), PodSandboxState::SandboxReady);
            assert_eq!(stage.node.cri.status(&counter).await?.state(), ContainerState::ContainerRunning);
            assert_eq!(stage.sh(&counter, "echo well").await?, "well");
            let status = stage.exited(&ending).await?;
            assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        }
        stage.node.cri.stop(&counter, 0).await?;
        let numbers = numbers(&counter)?;
        for (at, number) in numbers.iter().enumerate() {
            assert_eq!(*number, at as u64 + 1, "a line is lost");
        }
        stage.remove(&pod).await
    });
}

fn numbers(container: &Container) -> Result<Vec<u64>> {
    let parse = |message: &String| message.parse().with_context(|| format!("no number: {message}"));
    xtask::cri::messages(&container.log).iter().map(parse).collect()
}

#[test]
fn whatever_is_found_after_a_kill_amid_calls_is_usable() {
    check("dmcalls", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let mut random = Random(SEED);
        for round in 0..ROUNDS {
            let configs = [0, 1].map(|number| stage.node.pod_config(&format!("pod-{round}-{number}")));
            let mut calls = tokio::task::JoinSet::new();
            for config in configs {
                let cri = stage.node.cri.clone();
                calls.spawn(async move { life(cri, config).await });
            }
            let moment = KILL_WITHIN.mul_f64(random.fraction());
            tokio::time::sleep(moment).await;
            stage.node.kill_daemon()?;
            // They fail where the daemon ended before them.
            while calls.join_next().await.is_some() {}
            let failed = || format!("round {round}, killed after {moment:?}");
            stage.node.restart_daemon().await.with_context(failed)?;
            use_and_remove_everything(stage).await.with_context(failed)?;
        }
        Ok(())
    });
}

/// A pod's whole life, over and over until the daemon is gone.
async fn life(mut cri: Cri, mut config: PodSandboxConfig) -> Result<()> {
    loop {
        let pod = cri.run_pod(config.clone()).await?;
        let container = cri.create(&pod, shell("main", "echo begun; sleep 1000")).await?;
        cri.start(&container).await?;
        cri.exec(&container, &["true"]).await?;
        cri.stop(&container, 0).await?;
        cri.remove(&container).await?;
        cri.stop_pod(&pod.id).await?;
        cri.remove_pod(&pod.id).await?;
        config.metadata.as_mut().context("no metadata")?.attempt += 1;
    }
}

async fn use_and_remove_everything(stage: &mut Stage) -> Result<()> {
    let pods = stage.node.cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
    let containers = stage.node.cri.list(ContainerFilter::default()).await?;
    for listed in &containers {
        let pod = pods.iter().find(|pod| pod.id == listed.pod_sandbox_id).context("a container without its pod")?;
        let container = container(listed);
        let ready = pod.state() == PodSandboxState::SandboxReady;
        match listed.state() {
            ContainerState::ContainerCreated if ready => {
                stage.node.cri.start(&container).await?;
                stage.sh(&container, "true").await?;
            }
            ContainerState::ContainerRunning => {
                let ran = stage.sh(&container, "true").await;
                let status = stage.node.cri.status(&container).await?;
                // One that was being stopped may end at this very moment.
                ensure!(ran.is_ok() || status.state() == ContainerState::ContainerExited, "{ran:?} {status:?}");
            }
            ContainerState::ContainerExited => {
                let status = stage.node.cri.status(&container).await?;
                ensure!(status.exit_code == 137, "it was killed, and nothing else: {status:?}");
            }
            _ => {}
        }
    }
    for found in pods {
        if found.state() == PodSandboxState::SandboxReady {
            let metadata = found.metadata.context("no metadata")?;
            let mut config = stage.node.pod_config(&metadata.name);
            config.metadata.as_mut().context("no metadata")?.attempt = metadata.attempt;
            let pod = Pod { id: found.id.clone(), config };
            let more = stage.script(&pod, "more", "sleep 1000").await?;
            stage.sh(&more, "true").await?;
        }
        stage.node.cri.stop_pod(&found.id).await?;
        stage.node.cri.remove_pod(&found.id).await?;
    }
    ensure!(stage.node.cri.list_pods().await?.is_empty(), "pods are left");
    ensure!(stage.node.cri.list(ContainerFilter::default()).await?.is_empty(), "containers are left");
    Ok(())
}

fn container(listed: &Listed) -> Container {
    Container { id: listed.id.clone(), log: PathBuf::new() }
}

/// Marsaglia's xorshift: the same moments in every run.
struct Random(u64);

impl Random {
    /// From 0 to 1.
    fn fraction(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}
