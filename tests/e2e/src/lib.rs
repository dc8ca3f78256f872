//! What the end-to-end tests share: a node of the test's own with images on it, and the check that nothing is left.
//!
//! The tests need root and the places that `cargo xtask test` names in their environment.

pub mod kube;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use stasis_cri_api::runtime::{ContainerConfig, ContainerState, ContainerStatus, ContainerStatusRequest};
use xtask::cri::{Container, Pod, container_config};
use xtask::node::{Ground, Node, Runtime, Setup};
use xtask::places::Places;
use xtask::process::{SHORT, run};

/// The image with a shell.
pub const BUSYBOX: &str = "localhost/busybox:latest";

/// The image that counts on its standard output, ten numbers a second.
pub const COUNTER: &str = "localhost/counter:latest";

/// Longer than anything takes that is awaited here, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(20);

/// A node and what tests do on it.
#[derive(Debug)]
pub struct Stage {
    /// The node.
    pub node: Node,
    /// Where programs and images are.
    pub places: Places,
}

/// Runs `body` on a node called `name`, and checks that nothing of it is left afterwards.
///
/// # Panics
/// Where the body fails, or something is left.
pub fn check(name: &str, setup: Setup, body: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    let ground = ground(name);
    check_on(ground, setup, &[], body);
}

/// The ground of a node, for tests that prepare it.
///
/// # Panics
/// Where it cannot be cleared.
pub fn ground(name: &str) -> Ground {
    places().and_then(|places| Ground::clear(&places, name)).unwrap_or_else(|error| panic!("{error:#}"))
}

/// As [`check`], on a ground that was prepared with what is expected to be left.
///
/// # Panics
/// Where the body fails, or something else is left.
pub fn check_on(ground: Ground, setup: Setup, expected: &[String], body: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an async runtime");
    let left = runtime.block_on(async {
        let places = places()?;
        let node = Node::start(&places, ground, Runtime::Stasis, &setup).await?;
        let mut stage = Stage { node, places };
        body(&mut stage).await?;
        stage.node.stop().await
    });
    match left {
        Ok(left) => assert_eq!(left, expected, "left behind"),
        Err(error) => panic!("{error:#}"),
    }
}

/// Where programs and images are.
///
/// # Errors
/// Where the environment does not say so, or the test does not run as root.
pub fn places() -> Result<Places> {
    let places = Places::of_tests()?;
    let root = std::fs::metadata("/proc/self").map(|facts| std::os::unix::fs::MetadataExt::uid(&facts));
    match root {
        Ok(0) => Ok(places),
        _ => bail!("end-to-end tests make mounts, namespaces and cgroups: run them as root"),
    }
}

/// Waits until `found` has an answer.
///
/// # Errors
/// Where it has none in time, or fails.
pub async fn eventually<T>(what: &str, mut found: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = found().await? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {PATIENCE:?}");
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The numbers in a counter's log so far.
pub fn counts(container: &Container) -> Vec<u64> {
    let messages = xtask::cri::messages(&container.log);
    messages.iter().filter_map(|message| message.strip_prefix("count ")?.parse().ok()).collect()
}

/// Waits until a counter has said a number above `least`, and returns the last one.
///
/// # Errors
/// Where it does not in time.
pub async fn counts_beyond(container: &Container, least: u64) -> Result<u64> {
    let what = format!("a count beyond {least} in {}", container.log.display());
    eventually(&what, async || Ok(counts(container).last().copied().filter(|count| *count > least))).await
}

impl Stage {
    /// Puts test images onto the node.
    ///
    /// # Errors
    /// Where the import fails.
    pub fn import(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let file = self.places.images().join(format!("{name}.tar")).display().to_string();
            self.stasis(&["import", &file])?;
        }
        Ok(())
    }

    /// Runs the command line against this node and returns its output.
    ///
    /// # Errors
    /// Where its exit code is not 0.
    pub fn stasis(&self, arguments: &[&str]) -> Result<String> {
        run(&mut self.command(arguments), SHORT)
    }

    /// The command line with that node, for those who want to see how it ends.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.places.command_line());
        command.arg("--address").arg(self.node.ground.socket()).args(arguments);
        command
    }

    /// Checkpoints a container and removes its pod; returns the archive's path.
    ///
    /// # Errors
    /// Those of both.
    pub async fn put_away(&mut self, pod: &Pod, container: &Container, archive: &str) -> Result<String> {
        let archive = self.archive(archive);
        self.node.cri.checkpoint(container, &archive).await?;
        self.remove(pod).await?;
        Ok(archive.display().to_string())
    }

    /// Runs a pod.
    ///
    /// # Errors
    /// Those of RunPodSandbox.
    pub async fn pod(&mut self, name: &str) -> Result<Pod> {
        self.node.cri.run_pod(self.node.pod_config(name)).await
    }

    /// Stops and removes a pod.
    ///
    /// # Errors
    /// Those of the two calls.
    pub async fn remove(&mut self, pod: &Pod) -> Result<()> {
        self.node.cri.stop_pod(&pod.id).await?;
        self.node.cri.remove_pod(&pod.id).await
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    /// Those of the two calls.
    pub async fn container(&mut self, pod: &Pod, config: ContainerConfig) -> Result<Container> {
        let container = self.node.cri.create(pod, config).await?;
        self.node.cri.start(&container).await?;
        Ok(container)
    }

    /// Creates and starts a container that runs a shell script.
    ///
    /// # Errors
    /// Those of the two calls.
    pub async fn script(&mut self, pod: &Pod, name: &str, script: &str) -> Result<Container> {
        self.container(pod, shell(name, script)).await
    }

    /// Runs a shell script in a container and returns its output; another exit code than 0 is an error.
    ///
    /// # Errors
    /// Those of ExecSync.
    pub async fn sh(&mut self, container: &Container, script: &str) -> Result<String> {
        self.node.cri.exec(container, &["sh", "-c", script]).await
    }

    /// Waits for the end of a container and returns its status then.
    ///
    /// # Errors
    /// Where it does not end in time.
    pub async fn exited(&mut self, container: &Container) -> Result<ContainerStatus> {
        eventually("the end of a container", async || {
            let status = self.node.cri.status(container).await?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// What ContainerStatus tells in its verbose form.
    ///
    /// # Errors
    /// Those of the call.
    pub async fn info(&mut self, container: &Container) -> Result<Value> {
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: true };
        let answer = self.node.cri.runtime.container_status(request).await?.into_inner();
        Ok(serde_json::from_str(answer.info.get("info").context("no verbose information")?)?)
    }

    /// The container's first process, as the host numbers it.
    ///
    /// # Errors
    /// Those of ContainerStatus.
    pub async fn process(&mut self, container: &Container) -> Result<PathBuf> {
        let info = self.info(container).await?;
        let pid = info["pid"].as_u64().filter(|pid| *pid > 0).context("the container has no process")?;
        Ok(Path::new("/proc").join(pid.to_string()))
    }

    /// Path of an archive in the directory that the node restores from.
    pub fn archive(&self, name: &str) -> PathBuf {
        self.node.ground.archives().join(name)
    }
}

/// A container that runs a shell script.
pub fn shell(name: &str, script: &str) -> ContainerConfig {
    container_config(name, BUSYBOX, &["sh", "-c", script])
}
