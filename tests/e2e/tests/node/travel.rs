//! Two nodes with nothing in common but a registry: a container goes from one to the other.

use anyhow::Result;
use stasis_e2e::{Stage, check, counts, counts_beyond, ground};
use xtask::cri::container_config;
use xtask::layout::Image;
use xtask::node::{Node, Runtime, Setup};
use xtask::registry::Registry;

#[test]
fn a_checkpoint_travels_to_another_node() {
    check("depart", Setup::default(), async |stage| {
        let registry = Registry::start(&stage.places.engines(), &stage.node.ground.registry())?;
        let image = Image::read(&stage.places.images().join("counter.tar"))?;
        let base = registry.push(&image, "counter", "latest")?;
        let frozen = format!("{}/frozen:latest", registry.name());
        stage.node.cri.pull(&base).await?;
        let pod = stage.pod("pod").await?;
        let counter = stage.container(&pod, container_config("counter", &base, &[])).await?;
        let before = counts_beyond(&counter, 10).await?;
        let archive = stage.archive("a.tar");
        stage.node.cri.checkpoint(&counter, &archive).await?;
        stage.stasis(&["checkpoint", "to-image", &archive.display().to_string(), &frozen])?;
        stage.stasis(&["push", &frozen])?;
        stage.remove(&pod).await?;

        let node = Node::start(&stage.places, ground("arrive"), Runtime::Stasis, &Setup::default()).await?;
        let mut there = Stage { node, places: stage.places.clone() };
        arrive(&mut there, &base, &frozen, before).await?;
        let left = there.node.stop().await?;
        assert!(left.is_empty(), "left behind on the other node: {left:?}");
        Ok(())
    });
}

async fn arrive(stage: &mut Stage, base: &str, frozen: &str, before: u64) -> Result<()> {
    stage.node.cri.pull(base).await?;
    stage.node.cri.pull(frozen).await?;
    let pod = stage.pod("pod").await?;
    let counter = stage.node.cri.create(&pod, container_config("counter", frozen, &[])).await?;
    stage.node.cri.start(&counter).await?;
    let carried = counts(&counter).last().copied().unwrap_or_default();
    assert!(carried >= before, "the log so far ends with {carried}");
    counts_beyond(&counter, carried + 3).await?;
    let counts = counts(&counter);
    assert!(counts.iter().enumerate().all(|(at, count)| *count == at as u64 + 1), "{counts:?}");
    stage.remove(&pod).await
}
