//! Processes of users other than root, whose memory CRIU can describe only with CAP_SYS_RESOURCE.

use std::time::Duration;

use anyhow::Result;
use stasis_e2e::{Stage, check, eventually};
use xtask::cri::{Container, container_config};
use xtask::node::Setup;

use crate::carry;

const REDIS: &str = "localhost/redis:latest";
const KEYS: usize = 200;

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn redis_of_a_user_goes_on_with_its_keys() {
    check("redis", Setup::default(), async |stage| {
        stage.import(&["redis"])?;
        let pod = stage.pod("first").await?;
        let config = container_config("redis", REDIS, &[]);
        let redis = stage.container(&pod, config.clone()).await?;
        eventually("an answer of Redis", async || {
            Ok(stage.node.cri.exec(&redis, &["redis-cli", "ping"]).await.is_ok_and(|said| said == "PONG").then_some(()))
        })
        .await?;
        let script =
            format!("for i in $(seq {KEYS}); do echo set key:$i value-$i; done | redis-cli | sort | uniq -c | xargs");
        assert_eq!(stage.sh(&redis, &script).await?, format!("{KEYS} OK"));
        let run = run_id(stage, &redis).await?;
        is_the_users(stage, &redis).await?;

        let (pod, restored) = carry(stage, &pod, &redis, config).await?;
        assert_eq!(run_id(stage, &restored).await?, run, "it is the same process that goes on");
        assert_eq!(stage.sh(&restored, "redis-cli dbsize; redis-cli get key:7").await?, format!("{KEYS}\nvalue-7"));
        is_the_users(stage, &restored).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(stage.sh(&restored, "redis-cli set more 1").await?, "OK");
        stage.remove(&pod).await
    });
}

async fn run_id(stage: &mut Stage, redis: &Container) -> Result<String> {
    stage.sh(redis, "redis-cli info server | grep ^run_id").await
}

async fn is_the_users(stage: &mut Stage, redis: &Container) -> Result<()> {
    let status = std::fs::read_to_string(stage.process(redis).await?.join("status"))?;
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
    assert_eq!(line("Uid:"), "999\t999\t999\t999");
    assert_eq!(line("Gid:"), "999\t999\t999\t999");
    assert_eq!(u64::from_str_radix(line("CapEff:"), 16)?, 0);
    assert_eq!(line("Seccomp:"), "2");
    Ok(())
}
