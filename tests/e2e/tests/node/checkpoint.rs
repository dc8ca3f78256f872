//! Checkpoint and restore: a container goes on where it was, in another pod, again and again.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use stasis_cri_api::runtime::{ContainerState, ListImagesRequest, Mount};
use stasis_e2e::{COUNTER, Stage, check, counts, counts_beyond, shell};
use tonic::Code;
use xtask::cri::{Container, Pod, container_config, refusal};
use xtask::node::Setup;

/// Counted before a checkpoint: one that began anew would be seen.
const COUNT_FIRST: u64 = 10;

const FROZEN: &str = "localhost/frozen:latest";

#[test]
fn a_container_goes_on_in_other_pods() {
    check("carry", Setup::default(), async |stage| {
        stage.import(&["busybox", "counter"])?;
        let (first, counter) = counting(stage, "first").await?;
        let archive = stage.archive("first.tar");
        stage.sh(&counter, "echo before > /kept; rm /etc/group; mkdir /made; ln /kept /made/link").await?;
        stage.node.cri.checkpoint(&counter, &archive).await?;
        let at = counts_beyond(&counter, COUNT_FIRST).await?;
        counts_beyond(&counter, at).await?;
        archive_is_private_and_plain(&archive)?;
        stage.remove(&first).await?;

        // As an image.
        stage.stasis(&["checkpoint", "to-image", &archive.display().to_string(), FROZEN])?;
        assert!(!is_pinned(stage, COUNTER).await?);
        let (second, restored) = restored(stage, "second", FROZEN).await?;
        is_the_same(stage, &second, &restored).await?;
        assert!(is_pinned(stage, COUNTER).await?, "a collector of images would take the base away");

        // A second checkpoint, of the restored one, as an archive.
        stage.sh(&restored, "test ! -e /etc/group && echo again >> /kept").await?;
        let again = stage.archive("again.tar");
        stage.node.cri.checkpoint(&restored, &again).await?;
        stage.remove(&second).await?;
        let (third, twice) = self::restored(stage, "third", &again.display().to_string()).await?;
        is_the_same(stage, &third, &twice).await?;
        assert_eq!(stage.sh(&twice, "cat /kept").await?, "before\nagain");
        // The counter ends with 0 when it is asked to.
        stage.node.cri.stop(&twice, 30).await?;
        let status = stage.node.cri.status(&twice).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
        stage.remove(&third).await
    });
}

/// A pod with a counter that has counted for a while.
async fn counting(stage: &mut Stage, name: &str) -> Result<(Pod, Container)> {
    let pod = stage.pod(name).await?;
    let counter = stage.container(&pod, container_config("counter", COUNTER, &[])).await?;
    counts_beyond(&counter, COUNT_FIRST).await?;
    Ok((pod, counter))
}

async fn restored(stage: &mut Stage, name: &str, from: &str) -> Result<(Pod, Container)> {
    let pod = stage.pod(name).await?;
    let container = stage.node.cri.create(&pod, container_config("counter", from, &[])).await?;
    assert_eq!(stage.node.cri.status(&container).await?.state(), ContainerState::ContainerCreated);
    let carried = *counts(&container).last().context("the log so far was not carried over")?;
    ensure!(carried >= COUNT_FIRST, "the log so far ends with {carried}");
    stage.node.cri.start(&container).await?;
    counts_beyond(&container, carried + 3).await?;
    Ok((pod, container))
}

/// What holds of every restored counter.
async fn is_the_same(stage: &mut Stage, pod: &Pod, container: &Container) -> Result<()> {
    let counts = counts(container);
    for (at, count) in counts.iter().enumerate() {
        ensure!(*count == at as u64 + 1, "line {} of the log is count {count}: {counts:?}", at + 1);
    }
    assert_eq!(stage.node.cri.status(container).await?.state(), ContainerState::ContainerRunning);
    assert!(stage.sh(container, "cat /kept").await?.starts_with("before"));
    assert_eq!(stage.sh(container, "stat -c %h /made/link").await?, "2", "names of one file are names of one file");
    assert_eq!(stage.sh(container, "ls /etc").await?.lines().filter(|name| *name == "group").count(), 0);
    let name = &pod.config.metadata.as_ref().context("no metadata")?.name;
    assert_eq!(stage.sh(container, "hostname; cat /etc/hostname").await?, format!("{name}\n{name}"));
    let ip = stage.node.cri.pod_address(&pod.id).await?;
    assert!(stage.sh(container, "cat /etc/hosts").await?.contains(&ip));
    // The restored process itself, not only what is executed beside it.
    let process = stage.process(container).await?;
    let pinned = stage.node.ground.state().join("pods").join(&pod.id).join("ns");
    for namespace in ["net", "ipc", "uts"] {
        let of_process = fs::metadata(process.join("ns").join(namespace))?.ino();
        assert_eq!(of_process, fs::metadata(pinned.join(namespace))?.ino(), "{namespace} namespace");
    }
    Ok(())
}

async fn is_pinned(stage: &mut Stage, reference: &str) -> Result<bool> {
    let images = stage.node.cri.images.list_images(ListImagesRequest::default()).await?.into_inner().images;
    let image = images.into_iter().find(|image| image.repo_tags.iter().any(|tag| tag == reference));
    Ok(image.context("the image is not there")?.pinned)
}

fn archive_is_private_and_plain(archive: &Path) -> Result<()> {
    assert_eq!(fs::metadata(archive)?.permissions().mode() & 0o7777, 0o600);
    let mut names = Vec::new();
    for entry in tar::Archive::new(File::open(archive)?).entries()? {
        names.push(entry?.path()?.display().to_string());
    }
    for needed in ["config.dump", "spec.dump", "rootfs-diff.tar", "checkpoint/inventory.img"] {
        assert_eq!(names.iter().filter(|name| *name == needed).count(), 1, "{needed} in {names:?}");
    }
    Ok(())
}

#[test]
fn a_restored_container_ends_with_its_own_exit_code() {
    check("codes", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("first").await?;
        let script = "n=0; while [ ! -e /go ]; do n=$((n + 1)); echo count $n; sleep 0.1; done; exit 9";
        let waiting = stage.script(&pod, "main", script).await?;
        counts_beyond(&waiting, COUNT_FIRST).await?;
        let archive = stage.archive("waiting.tar");
        stage.node.cri.checkpoint(&waiting, &archive).await?;
        stage.remove(&pod).await?;
        let (pod, restored) = restored(stage, "second", &archive.display().to_string()).await?;
        // An exit while the daemon is away is not lost either.
        let process = stage.process(&restored).await?;
        stage.node.kill_daemon()?;
        fs::write(process.join("root/go"), "")?;
        stage.node.restart_daemon().await?;
        let status = stage.exited(&restored).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
        let (code, message) = refusal(stage.node.cri.checkpoint(&restored, &stage.archive("exited.tar")).await)?;
        assert_eq!(code, Code::FailedPrecondition);
        assert!(message.contains("exited"), "{message}");
        stage.remove(&pod).await
    });
}

#[test]
fn mounts_are_the_choice_of_the_request() {
    check("mounts", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let (data, other) = (stage.node.ground.disk.join("data"), stage.node.ground.disk.join("other"));
        fs::create_dir_all(&data)?;
        fs::create_dir_all(&other)?;
        fs::write(other.join("go"), "")?;
        let mount = |host: &Path| Mount {
            container_path: "/data".into(),
            host_path: host.display().to_string(),
            ..Mount::default()
        };
        // It has no file of the mount open when it is checkpointed: that file would have to be in the other mount, too.
        let script =
            "n=0; while :; do n=$((n + 1)); echo count $n; [ ! -e /data/go ] || echo $n > /data/n; sleep 0.1; done";
        let mut config = shell("main", script);
        config.mounts.push(mount(&data));
        let pod = stage.pod("first").await?;
        let container = stage.container(&pod, config).await?;
        counts_beyond(&container, COUNT_FIRST).await?;
        let archive = stage.archive("mount.tar").display().to_string();
        stage.node.cri.checkpoint(&container, Path::new(&archive)).await?;
        stage.remove(&pod).await?;

        let pod = stage.pod("second").await?;
        let mut config = container_config("main", &archive, &[]);
        let (code, message) = refusal(stage.node.cri.create(&pod, config.clone()).await)?;
        assert_eq!(code, Code::InvalidArgument);
        assert!(message.contains("/data"), "names the mount: {message}");
        config.mounts.push(mount(&other));
        let container = stage.container(&pod, config).await?;
        let carried = counts(&container).last().copied().unwrap_or_default();
        counts_beyond(&container, carried + 3).await?;
        let number: u64 = fs::read_to_string(other.join("n"))?.trim().parse()?;
        ensure!(number > COUNT_FIRST, "{number} was written to the mount of the request");
        stage.remove(&pod).await
    });
}
