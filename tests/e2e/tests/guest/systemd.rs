//! The driver systemd, with a systemd that is the host's first process.

use std::path::Path;

use anyhow::Result;
use stasis_cri_api::runtime::{CgroupDriver, LinuxContainerResources, RuntimeConfigRequest};
use stasis_e2e::{COUNTER, Stage, check, counts_beyond};
use xtask::cri::{Container, container_config};
use xtask::node::Setup;

use crate::{ROOT, carry, cgroup, resources, value};

const MEMORY: i64 = 64 << 20;

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn containers_of_the_driver_systemd_live_and_are_carried() {
    let setup = Setup { cgroup_driver: CgroupDriver::Systemd, ..Setup::default() };
    check("systemd", setup, async |stage| {
        stage.import(&["counter"])?;
        let answer = stage.node.cri.runtime.runtime_config(RuntimeConfigRequest {}).await?.into_inner();
        assert_eq!(answer.linux.unwrap().cgroup_driver(), CgroupDriver::Systemd);
        let pod = stage.pod("first").await?;
        let mut config = container_config("main", COUNTER, &[]);
        let limits = LinuxContainerResources {
            memory_limit_in_bytes: MEMORY,
            cpu_period: 100_000,
            cpu_quota: 50_000,
            ..LinuxContainerResources::default()
        };
        resources(&mut config, limits);
        let container = stage.container(&pod, config.clone()).await?;
        is_a_scope(stage, "first", &container).await?;
        let at = counts_beyond(&container, 5).await?;
        assert_eq!(stage.sh(&container, "echo here").await?, "here");

        let (pod, restored) = carry(stage, &pod, &container, config.clone()).await?;
        is_a_scope(stage, "second", &restored).await?;
        let at = counts_beyond(&restored, at).await?;
        counts_beyond(&restored, at).await?;
        stage.node.cri.stop(&restored, 30).await?;
        assert_eq!(stage.node.cri.status(&restored).await?.exit_code, 0);
        let scope = scope(stage, "second", &restored);
        assert!(!Path::new(ROOT).join(&scope).exists(), "{scope} is left behind");
        stage.remove(&pod).await
    });
}

/// Where systemd makes the scope of a container of a pod.
fn scope(stage: &Stage, pod: &str, container: &Container) -> String {
    let parent = stage.node.ground.cgroup_parent.trim_start_matches('/');
    let stem = parent.trim_end_matches(".slice");
    format!("{parent}/{stem}-{pod}.slice/stasis-{}.scope", container.id)
}

async fn is_a_scope(stage: &mut Stage, pod: &str, container: &Container) -> Result<()> {
    let dir = cgroup(stage, container).await?;
    assert_eq!(dir, Path::new(ROOT).join(scope(stage, pod, container)));
    assert_eq!(value(&dir, "memory.max")?, MEMORY.to_string());
    assert_eq!(value(&dir, "cpu.max")?, "50000 100000");
    Ok(())
}
