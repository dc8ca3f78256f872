//! Checkpoints as images in one go, what is said beforehand, and which of them are kept.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use stasis_cri_api::runtime::{CheckpointContainerRequest, ContainerConfig, ImageSpec, RemoveImageRequest};
use stasis_e2e::{BUSYBOX, Stage, check, counts, counts_beyond};
use tonic::Code;
use xtask::cri::{Container, Pod, container_config, refusal};
use xtask::node::Setup;

const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";

async fn counting(stage: &mut Stage, name: &str) -> Result<(Pod, Container)> {
    let pod = stage.pod(name).await?;
    let container = stage.script(&pod, "main", COUNT).await?;
    counts_beyond(&container, 3).await?;
    Ok((pod, container))
}

/// Restores from an image, and sees the count go on.
async fn goes_on(stage: &mut Stage, name: &str, config: ContainerConfig) -> Result<()> {
    let pod = stage.pod(name).await?;
    let restored = stage.container(&pod, config).await?;
    let carried = *counts(&restored).last().context("no log was carried over")?;
    counts_beyond(&restored, carried + 3).await?;
    ensure!(counts(&restored).iter().zip(1..).all(|(count, expected)| *count == expected));
    stage.remove(&pod).await
}

#[test]
fn a_container_becomes_an_image_in_one_go() {
    check("oneimg", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let (pod, container) = counting(stage, "first").await?;
        let plain = "localhost/checkpoints/plain:1";
        let said = stage.stasis(&["checkpoint", "create", &container.id, "--image", plain, "-o", "json"])?;
        let said: Value = serde_json::from_str(&said)?;
        assert_eq!(said["image"]["references"][0], plain);

        // The same by CRI, and with the base image's layers in it.
        let request = CheckpointContainerRequest {
            container_id: container.id.clone(),
            location: "image:localhost/checkpoints/cri:1".into(),
            timeout: 0,
        };
        stage.node.cri.runtime.checkpoint_container(request).await?;
        let whole = "localhost/checkpoints/whole:1";
        let create = ["checkpoint", "create", &container.id, "--image", whole, "--self-contained"];
        stage.stasis(&[&create[..], &["--option", "compression=zstd"]].concat())?;
        let at = *counts(&container).last().context("no count")?;
        counts_beyond(&container, at).await?;
        stage.remove(&pod).await?;
        let ingest = stage.node.ground.root().join("content/ingest");
        assert_eq!(fs::read_dir(ingest)?.count(), 0, "nothing is left on the way");

        for (name, image) in [("plain", plain), ("cri", "localhost/checkpoints/cri:1")] {
            let inspection = stage.stasis(&["checkpoint", "inspect", image, "-o", "json"])?;
            ensure!(inspection.contains("checkpoint/inventory.img"), "{inspection}");
            goes_on(stage, name, container_config("main", image, &[])).await?;
        }
        image_says_what_it_is(stage, plain).await?;

        // Without the base image only the one that brings it along can be restored.
        let image = Some(ImageSpec { image: BUSYBOX.into(), ..ImageSpec::default() });
        stage.node.cri.images.remove_image(RemoveImageRequest { image }).await?;
        let pod = stage.pod("refused").await?;
        let (code, message) = refusal(stage.node.cri.create(&pod, container_config("main", plain, &[])).await)?;
        ensure!(code == Code::FailedPrecondition && message.contains("pull that image"), "{message}");
        stage.remove(&pod).await?;
        goes_on(stage, "whole", container_config("main", whole, &[])).await
    });
}

/// The manifest in the store: marks of all three dialects, base by both digests, engines by version.
async fn image_says_what_it_is(stage: &Stage, image: &str) -> Result<()> {
    let export = stage.node.ground.disk.join("export.tar");
    stage.stasis(&["export", image, &export.display().to_string()])?;
    let mut archive = tar::Archive::new(fs::File::open(&export)?);
    let mut manifest = None;
    for entry in archive.entries()? {
        let mut text = String::new();
        let mut entry = entry?;
        if entry.size() < 64 * 1024 && std::io::Read::read_to_string(&mut entry, &mut text).is_ok() {
            let json: Value = serde_json::from_str(&text).unwrap_or_default();
            manifest = manifest.or_else(|| json["layers"].is_array().then_some(json));
        }
    }
    let manifest = manifest.context("no manifest")?;
    for key in [
        "org.criu.checkpoint.container.name",
        "io.kubernetes.cri-o.annotations.checkpoint.name",
        "io.podman.annotations.checkpoint.runtime.name",
        "org.criu.checkpoint.criu.version",
        "org.criu.checkpoint.runtime.version",
        "org.criu.checkpoint.host.kernel",
        "org.criu.checkpoint.cgroup.version",
        "org.criu.checkpoint.rootfsImageID",
        "org.criu.checkpoint.rootfsImageSha",
    ] {
        ensure!(manifest["annotations"][key].as_str().is_some_and(|value| !value.is_empty()), "{key}: {manifest}");
    }
    Ok(())
}

#[test]
fn a_preflight_says_what_stands_in_the_way() {
    check("prefl", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("busy").await?;
        let script = "tail -f /dev/null | nc -l -p 5555 > /dev/null & sleep 0.5; (while :; do echo x; sleep 0.1; done) | nc 127.0.0.1 5555 & \
                      n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";
        let container = stage.script(&pod, "main", script).await?;
        counts_beyond(&container, 10).await?;
        let refused = stage.command(&["checkpoint", "preflight", &container.id]).output()?;
        let found = String::from_utf8(refused.stdout)?;
        assert_eq!(refused.status.code(), Some(1), "{found}");
        ensure!(found.contains("tcp-established") && found.contains("127.0.0.1:5555"), "{found}");
        let allowed = ["checkpoint", "preflight", &container.id, "--option", "tcp-established", "-o", "json"];
        let found: Value = serde_json::from_str(&stage.stasis(&allowed)?)?;
        assert_eq!(found["possible"], true, "{found}");
        ensure!(found["processes"].as_u64() >= Some(3) && found["memory_bytes"].as_u64() > Some(4096), "{found}");
        stage.remove(&pod).await
    });
}

#[test]
fn the_newest_checkpoints_are_kept_and_pinned_ones_stay() {
    let setup = Setup { more: "[checkpoint.retention]\ncontainer_count = 2\n".to_owned(), ..Setup::default() };
    check("kept", setup, async |stage| {
        stage.import(&["busybox"])?;
        let (pod, container) = counting(stage, "first").await?;
        let archives: Vec<String> =
            (0..4).map(|number| stage.archive(&format!("{number}.tar")).display().to_string()).collect();
        for (number, archive) in archives.iter().enumerate() {
            stage.stasis(&["checkpoint", "create", &container.id, archive])?;
            if number == 0 {
                stage.stasis(&["checkpoint", "pin", archive])?;
            }
        }
        let there = |archives: &[String]| archives.iter().map(|path| fs::metadata(path).is_ok()).collect::<Vec<_>>();
        assert_eq!(there(&archives), [true, false, true, true], "the pinned one and the newest two");
        // The index is there after a crash, too, and forgets what somebody else took away.
        stage.node.kill_daemon()?;
        stage.node.restart_daemon().await?;
        let listed = |stage: &Stage| -> Result<Vec<Value>> {
            Ok(serde_json::from_str(&stage.stasis(&["checkpoint", "ls", "-o", "json"])?)?)
        };
        assert_eq!(listed(stage)?.len(), 3);
        fs::remove_file(&archives[3])?;
        let list = listed(stage)?;
        assert_eq!(
            list.iter().map(|row| row["path"].as_str().unwrap()).collect::<Vec<_>>(),
            [&archives[2], &archives[0]]
        );
        assert_eq!((&list[0]["pinned"], &list[1]["pinned"]), (&false.into(), &true.into()));
        stage.stasis(&["checkpoint", "prune", "--keep", "1", "--dry-run"])?;
        stage.stasis(&["checkpoint", "pin", &archives[0], "--unpin"])?;
        stage.stasis(&["checkpoint", "prune", "--keep", "1"])?;
        assert_eq!(there(&archives), [false, false, true, false]);
        let id = listed(stage)?[0]["id"].as_str().unwrap().to_owned();
        stage.stasis(&["checkpoint", "rm", &id])?;
        assert_eq!(there(&archives), [false; 4]);
        let error = stage.stasis(&["checkpoint", "rm", &id]).expect_err("gone").to_string();
        ensure!(error.contains("no checkpoint"), "{error}");
        stage.remove(&pod).await
    });
}

#[test]
fn checkpoints_asked_for_at_once_all_come_about() {
    let setup = Setup { more: "parallel = 1\n".to_owned(), ..Setup::default() };
    check("queue", setup, async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("many").await?;
        let mut containers = Vec::new();
        for number in 0..4 {
            let container = stage.script(&pod, &format!("c{number}"), COUNT).await?;
            counts_beyond(&container, 3).await?;
            containers.push(container);
        }
        let requests = containers.iter().map(|container| CheckpointContainerRequest {
            container_id: container.id.clone(),
            location: stage.archive(&format!("{}.tar", container.id)).display().to_string(),
            timeout: 60,
        });
        let calls: Vec<_> = requests
            .map(|request| {
                let mut client = stage.node.cri.runtime.clone();
                tokio::spawn(async move { client.checkpoint_container(request).await })
            })
            .collect();
        for call in calls {
            call.await??;
        }
        for container in &containers {
            ensure!(stage.archive(&format!("{}.tar", container.id)).exists());
            let at = *counts(container).last().context("no count")?;
            counts_beyond(container, at + 2).await?;
        }
        stage.remove(&pod).await
    });
}
