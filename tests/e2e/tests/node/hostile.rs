//! Checkpoints that fail and archives that are refused: the container counts on, and nothing is left behind.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use stasis_cri_api::runtime::ContainerFilter;
use stasis_e2e::{BUSYBOX, COUNTER, Stage, check, counts_beyond, eventually};
use tonic::Code;
use xtask::cri::{Container, Pod, container_config, refusal};
use xtask::node::Setup;

/// Kills of the worker, each a little later in its work.
const KILLS: u32 = 6;

const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";

#[test]
fn a_failed_checkpoint_leaves_the_container_counting() {
    check("fail", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        connected_container(stage, &pod).await?;
        killed_worker(stage, &pod).await?;
        stage.remove(&pod).await
    });
}

/// An established TCP connection is refused unless it is asked to keep it.
async fn connected_container(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let connect = "sleep 1000 | nc -l -p 7777 & sleep 0.5; sleep 1000 | nc 127.0.0.1 7777 & ";
    let container = stage.script(pod, "connected", &format!("{connect}{COUNT}")).await?;
    counts_beyond(&container, 10).await?;
    eventually("an established connection", async || {
        // State 01 is ESTABLISHED.
        let table = stage.sh(&container, "cat /proc/net/tcp").await?;
        Ok(table.lines().any(|line| line.split_whitespace().nth(3) == Some("01")).then_some(()))
    })
    .await?;
    let before = archives(stage)?;
    let (code, message) = refusal(stage.node.cri.checkpoint(&container, &stage.archive("no.tar")).await)?;
    assert_eq!(code, Code::FailedPrecondition, "{message}");
    assert!(message.to_lowercase().contains("tcp"), "what CRIU said, and what to do: {message}");
    assert_eq!(archives(stage)?, before, "a partial archive is left");
    goes_on(stage, &container).await
}

async fn killed_worker(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let container = stage.script(pod, "killed", COUNT).await?;
    counts_beyond(&container, 3).await?;
    let before = archives(stage)?;
    for kill in 0..KILLS {
        let (mut cri, of_call) = (stage.node.cri.clone(), container.clone());
        let archive = stage.archive("killed.tar");
        let call = tokio::spawn(async move { cri.checkpoint(&of_call, &archive).await });
        let worker = eventually("the worker", async || Ok(worker()?)).await?;
        tokio::time::sleep(Duration::from_millis(10) * kill).await;
        // It may have ended by itself.
        let killed = kill_process(worker, Signal::KILL).is_ok();
        let result = call.await?;
        ensure!(killed || result.is_ok(), "{result:?}");
        if result.is_ok() {
            fs::remove_file(stage.archive("killed.tar"))?;
        }
        goes_on(stage, &container).await.with_context(|| format!("killed {} ms after it was seen", 10 * kill))?;
        assert_eq!(archives(stage)?, before, "a partial archive is left");
    }
    // And a checkpoint works as if nothing had been.
    stage.node.cri.checkpoint(&container, &stage.archive("killed.tar")).await
}

/// The worker of a checkpoint: a child of the node's shim.
fn worker() -> Result<Option<Pid>> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = arguments.split(|byte| *byte == 0).collect();
        let inside = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let ours = inside.to_string_lossy().contains("st-fail-");
        if ours && words.starts_with(&[b"containerd-shim-stasis-v1", b"dump"]) {
            return Ok(Pid::from_raw(entry.file_name().to_string_lossy().parse()?));
        }
    }
    Ok(None)
}

async fn goes_on(stage: &mut Stage, container: &Container) -> Result<()> {
    let count = counts_beyond(container, 0).await?;
    counts_beyond(container, count + 1).await?;
    assert_eq!(stage.sh(container, "echo well").await?, "well");
    Ok(())
}

fn archives(stage: &Stage) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(stage.node.ground.archives())?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

#[test]
fn what_cannot_be_restored_is_refused_and_leaves_nothing() {
    check("refuse", Setup::default(), async |stage| {
        stage.import(&["busybox", "counter"])?;
        let pod = stage.pod("pod").await?;
        let counter = stage.container(&pod, container_config("counter", COUNTER, &[])).await?;
        counts_beyond(&counter, 3).await?;
        let good = stage.archive("good.tar");
        stage.node.cri.checkpoint(&counter, &good).await?;
        stage.node.cri.remove(&counter).await?;

        let missing = stage.node.ground.disk.join("no/such/dir/a.tar");
        let again = stage.container(&pod, container_config("again", COUNTER, &[])).await?;
        let (code, message) = refusal(stage.node.cri.checkpoint(&again, &missing).await)?;
        assert_eq!(code, Code::InvalidArgument);
        assert!(message.contains("no/such/dir"), "{message}");
        let (code, _) = refusal(stage.node.cri.checkpoint(&again, Path::new("relative.tar")).await)?;
        assert_eq!(code, Code::InvalidArgument);
        stage.node.cri.remove(&again).await?;

        let bytes = fs::read(&good)?;
        let outside = stage.node.ground.disk.join("outside.tar");
        fs::copy(&good, &outside)?;
        symlink(&good, stage.archive("link.tar"))?;
        symlink(&outside, stage.archive("link-out.tar"))?;
        fs::write(stage.archive("half.tar"), &bytes[..bytes.len() / 2])?;
        fs::write(stage.archive("few.tar"), &bytes[..1000])?;
        fs::write(stage.archive("empty.tar"), b"")?;
        fs::write(stage.archive("text.tar"), b"this is no archive\n".repeat(100))?;
        fs::create_dir(stage.archive("dir.tar"))?;
        fs::copy(&good, stage.archive("open.tar"))?;
        fs::set_permissions(stage.archive("open.tar"), Permissions::from_mode(0o622))?;
        let dotted = stage.node.ground.archives().join("../outside.tar");
        let cases = [
            (outside.as_path(), vec![Code::PermissionDenied], "archive_dirs"),
            (&dotted, vec![Code::PermissionDenied, Code::InvalidArgument], "outside.tar"),
            (&stage.archive("link.tar"), vec![Code::InvalidArgument], "link.tar"),
            (&stage.archive("link-out.tar"), vec![Code::InvalidArgument], "link-out.tar"),
            (&stage.archive("absent.tar"), vec![Code::NotFound], "absent.tar"),
            (&stage.archive("dir.tar"), vec![Code::PermissionDenied, Code::InvalidArgument], "regular file"),
            (&stage.archive("open.tar"), vec![Code::PermissionDenied], "others than root may write it"),
            (&stage.archive("half.tar"), vec![Code::InvalidArgument], "half.tar"),
            (&stage.archive("few.tar"), vec![Code::InvalidArgument], "few.tar"),
            (&stage.archive("empty.tar"), vec![Code::InvalidArgument], "empty.tar"),
            (&stage.archive("text.tar"), vec![Code::InvalidArgument], "text.tar"),
        ];
        for (path, codes, word) in cases {
            let config = container_config("main", &path.display().to_string(), &[]);
            let (code, message) = refusal(stage.node.cri.create(&pod, config).await)?;
            assert!(codes.contains(&code) && message.contains(word), "{}: {code:?} {message}", path.display());
            nothing_is_left(stage).await?;
        }

        stage.stasis(&["rmi", COUNTER])?;
        let config = container_config("main", &good.display().to_string(), &[]);
        let (code, message) = refusal(stage.node.cri.create(&pod, config).await)?;
        assert_eq!(code, Code::FailedPrecondition);
        assert!(message.contains(COUNTER), "names the base image: {message}");
        nothing_is_left(stage).await?;
        stage.remove(&pod).await
    });
}

async fn nothing_is_left(stage: &mut Stage) -> Result<()> {
    ensure!(stage.node.cri.list(ContainerFilter::default()).await?.is_empty(), "a container is left");
    for dir in ["snapshots/active", "restore"] {
        let entries = fs::read_dir(stage.node.ground.root().join(dir)).into_iter().flatten().flatten();
        let names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        ensure!(names.is_empty(), "left in {dir}: {names:?}");
    }
    Ok(())
}

#[test]
fn a_node_that_only_checkpoints_refuses_restores() {
    let setup = Setup { checkpoint_level: "checkpoint_only", ..Setup::default() };
    check("level", setup, async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let container = stage.script(&pod, "main", COUNT).await?;
        counts_beyond(&container, 3).await?;
        let archive = stage.archive("a.tar").display().to_string();
        stage.node.cri.checkpoint(&container, Path::new(&archive)).await?;
        stage.stasis(&["checkpoint", "to-image", &archive, "localhost/frozen:latest"])?;
        for source in [archive.as_str(), "localhost/frozen:latest"] {
            let (code, message) = refusal(stage.node.cri.create(&pod, container_config("r", source, &[])).await)?;
            assert_eq!(code, Code::PermissionDenied);
            assert!(message.contains("checkpoint_restore"), "says what allows it: {message}");
        }
        // What is no checkpoint is as welcome as ever.
        stage.container(&pod, container_config("other", BUSYBOX, &["sleep", "1000"])).await?;
        stage.remove(&pod).await
    });
}
