//! Limits of containers, as the files of cgroup v2 show them.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use stasis_cri_api::runtime::LinuxContainerResources;
use stasis_e2e::{check, eventually, shell};
use xtask::node::Setup;

use crate::{carry, cgroup, keyed, resources, value};

const MEMORY: i64 = 64 << 20;

fn limits() -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        cpuset_cpus: "0".into(),
        memory_limit_in_bytes: MEMORY,
        memory_swap_limit_in_bytes: MEMORY,
        unified: HashMap::from([("pids.max".into(), "20".into()), ("memory.high".into(), (MEMORY / 2).to_string())]),
        ..LinuxContainerResources::default()
    }
}

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn limits_are_in_the_files_of_version_2_also_after_a_restore() {
    check("limits", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let mut config = shell("main", "while :; do sleep 1; done");
        resources(&mut config, limits());
        let container = stage.container(&pod, config.clone()).await?;
        assert_eq!(stage.sh(&container, "cat /proc/1/cgroup").await?, "0::/", "a cgroup namespace of its own");
        let check = |dir: &std::path::Path| -> Result<()> {
            assert_eq!(value(dir, "memory.max")?, MEMORY.to_string());
            assert_eq!(value(dir, "memory.high")?, (MEMORY / 2).to_string());
            assert_eq!(value(dir, "memory.swap.max")?, "0", "version 1 counts memory and swap together");
            assert_eq!(value(dir, "cpu.max")?, "50000 100000");
            assert_eq!(value(dir, "cpuset.cpus")?, "0");
            assert_eq!(value(dir, "pids.max")?, "20");
            let weight: u64 = value(dir, "cpu.weight")?.parse()?;
            ensure!((1..100).contains(&weight), "512 shares are half of the default, the weight is {weight}");
            Ok(())
        };
        let dir = cgroup(stage, &container).await?;
        check(&dir)?;
        let (pod, restored) = carry(stage, &pod, &container, config).await?;
        check(&cgroup(stage, &restored).await?)?;
        assert_eq!(stage.sh(&restored, "cat /proc/1/cgroup").await?, "0::/");
        stage.remove(&pod).await
    });
}

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn memory_that_runs_out_is_told() {
    check("oom", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let tight = LinuxContainerResources {
            memory_limit_in_bytes: MEMORY / 2,
            memory_swap_limit_in_bytes: MEMORY / 2,
            ..LinuxContainerResources::default()
        };
        let mut config = shell("greedy", "x=a; while :; do x=$x$x; done");
        resources(&mut config, tight.clone());
        let greedy = stage.container(&pod, config).await?;
        let status = stage.exited(&greedy).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));

        // A child that is killed for memory is not the container's end.
        let mut config = shell("careful", "sh -c 'x=a; while :; do x=$x$x; done'; echo survived; exec sleep 1000");
        resources(&mut config, tight);
        let careful = stage.container(&pod, config).await?;
        let dir = cgroup(stage, &careful).await?;
        eventually("the child's end", async || {
            Ok(xtask::cri::messages(&careful.log).iter().any(|line| line == "survived").then_some(()))
        })
        .await?;
        assert_eq!(keyed(&dir, "memory.events", "oom_kill")?, 1);
        stage.node.cri.stop(&careful, 0).await?;
        stage.remove(&pod).await
    });
}

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn processes_beyond_the_limit_are_refused() {
    check("forks", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        // A shell ends when it cannot fork: the inner one, and the outer becomes another program without a fork.
        let mut config = shell("main", "(for i in $(seq 40); do sleep 1000 & done); echo refused; exec sleep 1000");
        resources(&mut config, limits());
        let container = stage.container(&pod, config).await?;
        eventually("the end of the inner shell", async || {
            Ok(xtask::cri::messages(&container.log).iter().any(|line| line == "refused").then_some(()))
        })
        .await?;
        let dir = cgroup(stage, &container).await?;
        ensure!(keyed(&dir, "pids.events", "max")? > 0);
        let alive: u64 = value(&dir, "pids.current")?.parse()?;
        ensure!(alive <= 20, "{alive} processes");
        stage.node.cri.stop(&container, 0).await?;
        stage.remove(&pod).await
    });
}
