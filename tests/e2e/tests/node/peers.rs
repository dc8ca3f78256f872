//! Our archives in the hands of others: containerd restores one.

use anyhow::{Context as _, Result, ensure};
use stasis_e2e::{check, counts, counts_beyond, ground, places};
use xtask::cri::container_config;
use xtask::layout::Image;
use xtask::node::{Node, Runtime, Setup};
use xtask::registry::Registry;

#[test]
fn containerd_restores_an_archive_of_ours() {
    check("ours", Setup::default(), async |stage| {
        // containerd pulls the base image by the digest that the archive names.
        let registry = Registry::start(&stage.places.engines(), &stage.node.ground.registry())?;
        let busybox = Image::read(&stage.places.images().join("busybox.tar"))?;
        let reference = registry.push(&busybox, "busybox", "latest")?;
        stage.node.cri.pull(&reference).await?;
        let pod = stage.pod("first").await?;
        let script = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";
        let config = container_config("main", &reference, &["sh", "-c", script]);
        let container = stage.container(&pod, config.clone()).await?;
        counts_beyond(&container, 3).await?;
        stage.sh(&container, "echo kept > /kept; rm /etc/group").await?;
        let archive = stage.archive("ours.tar");
        let path = archive.display().to_string();
        stage.stasis(&["checkpoint", "create", &container.id, &path, "--option", "record-cgroups"])?;
        stage.remove(&pod).await?;

        let pause = Image::read(&stage.places.images().join("pause.tar"))?;
        let setup = Setup { sandbox_image: registry.push(&pause, "pause", "latest")?, ..Setup::default() };
        let mut peer = Node::start(&places()?, ground("theirs"), Runtime::Containerd, &setup).await?;
        let restored = restore(&mut peer, &path).await;
        let left = peer.stop().await;
        restored?;
        left?;
        Ok(())
    });
}

async fn restore(peer: &mut Node, archive: &str) -> Result<()> {
    let pod = peer.cri.run_pod(peer.pod_config("second")).await?;
    let container = peer.cri.create(&pod, container_config("main", archive, &[])).await?;
    peer.cri.start(&container).await?;
    let at = *counts(&container).last().context("no log was carried over")?;
    counts_beyond(&container, at + 5).await?;
    let counts = counts(&container);
    // containerd does not always carry the whole log over.
    ensure!(counts.windows(2).all(|pair| pair[1] == pair[0] + 1), "{counts:?}");
    let files = peer.cri.exec(&container, &["sh", "-c", "cat /kept; ls /etc | grep -cx group || true"]).await?;
    assert_eq!(files, "kept\n0");
    Ok(())
}
