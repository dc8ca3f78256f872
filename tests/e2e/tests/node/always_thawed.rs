//! A container runs again whatever becomes of its checkpoint: of CRIU, of the OCI runtime, of time, of the caller.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use stasis_cri_api::runtime::CheckpointContainerRequest;
use stasis_e2e::{PATIENCE, Stage, check, counts, counts_beyond, eventually};
use tokio::task::JoinHandle;
use tonic::{Code, Status};
use xtask::cri::{Container, Pod, container_config, refusal};
use xtask::node::Setup;

const HOG: &str = "localhost/hog:latest";

/// Counts on a connection between two processes; the memory of the third, which is dumped last, keeps CRIU busy.
const CONNECTED: &str = "tail -f /dev/null | nc -l -p 5555 & sleep 0.5; \
    (n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done | nc 127.0.0.1 5555) & \
    sleep 1; /hog 384 1000 > /dev/null & wait";

/// How often a test tries to meet CRIU in the middle of its work.
const ATTEMPTS: usize = 8;

async fn connected(stage: &mut Stage, more: &[(&str, &str)]) -> Result<(Pod, Container)> {
    stage.import(&["hog"])?;
    let mut config = stage.node.pod_config("busy");
    config.annotations.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    let pod = stage.node.cri.run_pod(config).await?;
    let config = container_config("main", HOG, &["sh", "-c", CONNECTED]);
    let container = stage.container(&pod, config).await?;
    // The third process has its memory by then.
    counts_beyond(&container, 60).await?;
    Ok((pod, container))
}

fn setup() -> Setup {
    Setup { more: "[runtimes.runc]\ncheckpoint_pod_options = [\"tcp-established\"]\n".to_owned(), ..Setup::default() }
}

/// A checkpoint that runs beside the test.
fn begin(stage: &Stage, container: &Container, archive: &Path, seconds: i64) -> JoinHandle<Result<(), Status>> {
    let request = CheckpointContainerRequest {
        container_id: container.id.clone(),
        location: archive.display().to_string(),
        timeout: seconds,
    };
    let mut client = stage.node.cri.runtime.clone();
    tokio::spawn(async move { client.checkpoint_container(request).await.map(drop) })
}

/// A process called `name` below one of the node's shims.
fn below_shims(stage: &Stage, name: &str) -> Result<Option<Pid>> {
    let mut parents = HashMap::new();
    let mut named = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(')') else { continue };
        let parent = after.split_whitespace().nth(1).and_then(|word| word.parse::<u32>().ok());
        parents.insert(pid, parent.unwrap_or(0));
        if before.split_once('(').is_some_and(|(_, own)| own == name) {
            named.push(pid);
        }
    }
    let shims = stage.node.shims()?;
    let below = |pid: &u32| {
        let chain = std::iter::successors(Some(*pid), |pid| parents.get(pid).copied().filter(|parent| *parent > 1));
        chain.take(16).any(|pid| shims.contains(&pid))
    };
    Ok(named.into_iter().find(below).and_then(|pid| Pid::from_raw(pid.cast_signed())))
}

/// Waits until CRIU holds a process of the container, and returns who is called `name`; none if the checkpoint was faster.
async fn in_the_dump(
    stage: &mut Stage,
    container: &Container,
    name: &str,
    call: &JoinHandle<Result<(), Status>>,
) -> Result<Option<Pid>> {
    let first = stage.process(container).await?;
    let deadline = Instant::now() + PATIENCE;
    while !call.is_finished() && Instant::now() < deadline {
        let status = fs::read_to_string(first.join("status")).unwrap_or_default();
        if status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")) {
            // Past the first steps, in which a killed CRIU has changed nothing yet.
            tokio::time::sleep(Duration::from_millis(60)).await;
            return below_shims(stage, name);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(None)
}

/// Nothing was lost, more comes, and nothing of a checkpoint is left.
async fn is_unharmed(stage: &Stage, pod: &Pod, container: &Container, archive: &Path) -> Result<()> {
    let at = *counts(container).last().context("no count")?;
    counts_beyond(container, at + 5).await?;
    let counts = counts(container);
    ensure!(counts.iter().zip(1..).all(|(count, expected)| *count == expected), "{counts:?}");
    let dir = archive.parent().context("no directory")?;
    let left: Vec<_> =
        fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
    ensure!(left.is_empty(), "left: {left:?}");
    let pod_dir = stage.node.ground.state().join("pods").join(&pod.id);
    let markers = fs::read_dir(pod_dir.join("frozen")).map_or(0, Iterator::count);
    ensure!(markers == 0, "{markers} markers are left");
    ensure!(!pod_dir.join(format!("dump-{}", container.id)).exists(), "the work directory is left");
    Ok(())
}

#[test]
fn a_live_connection_survives_a_criu_that_hangs_and_is_killed() {
    check("hang", setup(), async |stage| {
        let (pod, container) = connected(stage, &[("checkpoint.stasis/tcp-established", "true")]).await?;
        let archive = stage.archive("hang.tar");
        for attempt in 0.. {
            ensure!(attempt < ATTEMPTS, "CRIU was always faster");
            let call = begin(stage, &container, &archive, 3);
            let criu = in_the_dump(stage, &container, "criu", &call).await?;
            // From now on it neither goes on nor ends by itself.
            let stopped = criu.is_some_and(|criu| kill_process(criu, Signal::STOP).is_ok());
            if stopped {
                let (code, message) = refusal(stage.node.cri.exec(&container, &["true"]).await)?;
                ensure!(code == Code::FailedPrecondition, "an exec in the freeze: {code:?} {message}");
            }
            match call.await? {
                Err(status) => {
                    ensure!(status.code() == Code::DeadlineExceeded, "{status}");
                    break;
                }
                Ok(()) => fs::remove_file(&archive)?,
            }
        }
        is_unharmed(stage, &pod, &container, &archive).await?;
        stage.remove(&pod).await
    });
}

#[test]
fn a_container_runs_on_when_criu_or_the_runtime_is_killed() {
    check("killed", Setup::default(), async |stage| {
        stage.import(&["hog"])?;
        let script = "/hog 384 1000 > /dev/null & sleep 4; \
                      n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";
        let archive = stage.archive("killed.tar");
        for name in ["criu", "runc"] {
            let pod = stage.pod(name).await?;
            let container = stage.container(&pod, container_config("main", HOG, &["sh", "-c", script])).await?;
            counts_beyond(&container, 3).await?;
            for attempt in 0.. {
                ensure!(attempt < ATTEMPTS, "{name} was always faster");
                let call = begin(stage, &container, &archive, 60);
                let victim = in_the_dump(stage, &container, name, &call).await?;
                let killed = victim.is_some_and(|victim| kill_process(victim, Signal::KILL).is_ok());
                match call.await? {
                    Err(status) => {
                        ensure!(killed && status.code() == Code::Internal, "{name}: {status}");
                        break;
                    }
                    Ok(()) => fs::remove_file(&archive)?,
                }
            }
            is_unharmed(stage, &pod, &container, &archive).await?;
            stage.remove(&pod).await?;
        }
        Ok(())
    });
}

#[test]
fn a_caller_that_gives_up_gets_a_whole_archive_or_none() {
    check("caller", Setup::default(), async |stage| {
        stage.import(&["hog"])?;
        let pod = stage.pod("busy").await?;
        let script = "/hog 128 1000 > /dev/null & sleep 2; \
                      n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";
        let container = stage.container(&pod, container_config("main", HOG, &["sh", "-c", script])).await?;
        counts_beyond(&container, 3).await?;
        let archive = stage.archive("given-up.tar");
        let call = begin(stage, &container, &archive, 60);
        in_the_dump(stage, &container, "criu", &call).await?;
        call.abort();
        let _ = call.await;
        let at = *counts(&container).last().context("no count")?;
        counts_beyond(&container, at + 5).await?;
        eventually("the end of the checkpoint", async || Ok(archive.exists().then_some(()))).await?;
        stage.stasis(&["checkpoint", "inspect", &archive.display().to_string()])?;
        fs::remove_file(&archive)?;
        is_unharmed(stage, &pod, &container, &archive).await?;
        stage.remove(&pod).await
    });
}
