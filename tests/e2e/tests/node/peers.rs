//! Our archives in the hands of others: containerd restores one, checkpointctl looks into one.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
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

#[test]
fn checkpointctl_shows_an_archive_of_ours() {
    check("shown", Setup::default(), async |stage| {
        stage.import(&["counter"])?;
        let pod = stage.pod("first").await?;
        let script = "echo changed > /file; while :; do sleep 0.1; done";
        let config = container_config("main", "localhost/counter:latest", &["sh", "-c", script]);
        let container = stage.container(&pod, config).await?;
        stage.sh(&container, "until [ -e /file ]; do usleep 10000; done").await?;
        let archive = stage.archive("shown.tar").display().to_string();
        stage.stasis(&["checkpoint", "create", &container.id, &archive])?;

        let program = stage.places.clients().join("bin/checkpointctl");
        let said = |arguments: &[&str]| -> Result<String> {
            let output = Command::new(&program).args(arguments).arg(&archive).output()?;
            ensure!(output.status.success(), "checkpointctl {arguments:?}: {output:?}");
            Ok(String::from_utf8(output.stdout)?)
        };
        let overview = said(&["show"])?;
        ensure!(overview.contains("localhost/counter:latest") && overview.contains(&container.id[..12]), "{overview}");
        let inspected: Value = serde_json::from_str(&said(&["inspect", "--format", "json", "--all"])?)?;
        let [one] = inspected.as_array().context("no list")?.as_slice() else { bail!("{inspected}") };
        assert_eq!((&one["container_name"], &one["id"]), (&json!("main"), &json!(container.id)));
        // Memory is beyond it: it looks for the number of pages where CRIU before 4.2 had it.
        assert_eq!(one["process_tree"]["command"], "sh");
        ensure!(one["statistics"]["pages_written"].as_u64() > Some(0), "{one}");
        ensure!(one["checkpoint_size"]["root_fs_diff_size"].as_u64() > Some(0), "{one}");
        stage.remove(&pod).await
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
