//! Containers in the PID namespace of another: what `kubectl debug --target` makes.

use std::fs;

use anyhow::{Context, Result, ensure};
use stasis_cri_api::runtime::{ContainerConfig, ContainerState, NamespaceMode};
use stasis_e2e::{Stage, check, counts, counts_beyond, shell};
use tonic::Code;
use xtask::cri::{Container, container_config, refusal};
use xtask::node::Setup;

const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";

fn joining(mut config: ContainerConfig, target: &str) -> Result<ContainerConfig> {
    let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    let options = context.and_then(|context| context.namespace_options.as_mut()).context("no namespaces")?;
    options.set_pid(NamespaceMode::Target);
    options.target_id = target.into();
    Ok(config)
}

/// The pins of targets, of all pods.
fn pins(stage: &Stage) -> Result<usize> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let pods = stage.node.ground.state().join("pods").display().to_string();
    Ok(table.lines().filter(|line| line.contains(&pods) && line.contains("/targets/")).count())
}

async fn namespace(stage: &mut Stage, container: &Container) -> Result<std::path::PathBuf> {
    Ok(fs::read_link(stage.process(container).await?.join("ns/pid"))?)
}

#[test]
fn a_container_joins_the_processes_of_another() {
    check("target", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let target = stage.script(&pod, "app", "exec sleep 1111").await?;
        let debug = stage.container(&pod, joining(shell("debug", "sleep 3333 & exec sleep 2222"), &target.id)?).await?;
        assert_eq!(namespace(stage, &debug).await?, namespace(stage, &target).await?);
        assert_eq!(stage.sh(&debug, "cat /proc/1/cmdline | tr '\\0' ' '").await?, "sleep 1111");
        let seen = stage.sh(&target, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").await?;
        ensure!(seen.contains("sleep 2222"), "{seen}");

        // The end of the joined is that of all its processes, and not that of the target; a second one joins as well, also after a crash of the daemon.
        stage.node.cri.stop(&debug, 0).await?;
        assert_eq!(stage.node.cri.status(&target).await?.state(), ContainerState::ContainerRunning);
        let left = stage.sh(&target, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").await?;
        ensure!(!left.contains("3333"), "{left}");
        stage.node.cri.remove(&debug).await?;
        assert_eq!(pins(stage)?, 0);
        let again = stage.node.cri.create(&pod, joining(shell("again", "exec sleep 3333"), &target.id)?).await?;
        stage.node.kill_daemon()?;
        stage.node.restart_daemon().await?;
        stage.node.cri.start(&again).await?;
        assert_eq!(stage.sh(&again, "cat /proc/1/cmdline | tr '\\0' ' '").await?, "sleep 1111");

        // The namespace ends with its first process, and all that is in it.
        stage.node.cri.stop(&target, 0).await?;
        assert_eq!(stage.exited(&again).await?.exit_code, 137);
        stage.remove(&pod).await?;
        assert_eq!(pins(stage)?, 0);
        Ok(())
    });
}

#[test]
fn a_target_that_cannot_be_joined_is_refused_in_words() {
    check("notgt", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let (pod, other) = (stage.pod("pod").await?, stage.pod("other").await?);
        let elsewhere = stage.script(&other, "elsewhere", "exec sleep 1000").await?;
        let created = stage.node.cri.create(&pod, shell("created", "exec sleep 1000")).await?;
        let ended = stage.script(&pod, "ended", "true").await?;
        stage.exited(&ended).await?;
        let absent = "0".repeat(64);
        for (target, expected, words) in [
            ("", Code::InvalidArgument, "target_id"),
            (&absent, Code::NotFound, &absent),
            (&elsewhere.id, Code::InvalidArgument, "same pod"),
            (&created.id, Code::FailedPrecondition, "does not run"),
            (&ended.id, Code::FailedPrecondition, "does not run"),
        ] {
            let (code, message) = refusal(stage.node.cri.create(&pod, joining(shell("debug", "true"), target)?).await)?;
            assert_eq!(code, expected, "{message}");
            ensure!(message.contains(words), "{message}");
        }
        // One that ends between create and start.
        let target = stage.script(&pod, "short", "exec sleep 1000").await?;
        let debug = stage.node.cri.create(&pod, joining(shell("debug", "true"), &target.id)?).await?;
        stage.node.cri.stop(&target, 0).await?;
        let (code, message) = refusal(stage.node.cri.start(&debug).await)?;
        assert_eq!(code, Code::FailedPrecondition, "{message}");
        ensure!(message.contains(&target.id), "{message}");
        stage.remove(&other).await?;
        stage.remove(&pod).await?;
        assert_eq!(pins(stage)?, 0);
        Ok(())
    });
}

#[test]
fn a_container_in_the_namespace_of_another_goes_on_elsewhere() {
    check("tgtckpt", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("first").await?;
        let target = stage.script(&pod, "app", "exec sleep 1000").await?;
        // Process IDs that no other process of the second pod has.
        let script = format!("i=0; while [ $i -lt 50 ]; do true & wait; i=$((i + 1)); done; ({COUNT})");
        let debug = stage.container(&pod, joining(shell("debug", &script), &target.id)?).await?;
        counts_beyond(&debug, 5).await?;
        let archive = stage.archive("debug.tar");
        stage.node.cri.checkpoint(&debug, &archive).await?;
        let count = counts_beyond(&debug, 5).await?;
        counts_beyond(&debug, count + 2).await?;
        // The target is as it was.
        assert_eq!(stage.node.cri.status(&target).await?.state(), ContainerState::ContainerRunning);
        stage.remove(&pod).await?;

        let pod = stage.pod("second").await?;
        let target = stage.script(&pod, "app", "exec sleep 1000").await?;
        let config = joining(container_config("debug", &archive.display().to_string(), &[]), &target.id)?;
        let restored = stage.container(&pod, config).await?;
        let carried = *counts(&restored).last().context("no log was carried over")?;
        counts_beyond(&restored, carried + 3).await?;
        assert_eq!(namespace(stage, &restored).await?, namespace(stage, &target).await?);
        stage.remove(&pod).await
    });
}
