//! `cargo xtask demo`: the main job end to end, a line of plain words a step.
//!
//! A pod with Redis and a counter runs, both are checkpointed, carried as images through a registry, and go on in a
//! new pod. Every claim that is printed was checked; a check that fails ends the demo with the reason.

mod report;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use stasis_cri_api::runtime::{ContainerConfig, Int64Value};
use stasis_cri_api::stasis::{CheckpointResult, CreateCheckpointRequest};

use self::report::{Report, megabytes, seconds};
use crate::compile;
use crate::cri::{Container, Pod, await_message, container_config, messages, stamped_messages};
use crate::engines;
use crate::images;
use crate::layout::Image;
use crate::node::{Ground, Node, Runtime, Setup};
use crate::places::Places;
use crate::process::{LONG, run as run_program};
use crate::registry::Registry;

/// Name of the demo's node.
const NODE: &str = "demo";

/// Time for a workload to say what is awaited.
const OUTPUT: Duration = Duration::from_secs(30);

/// The counter runs this far before it is checkpointed: a counter that began anew would be seen.
const COUNT_FIRST: u64 = 20;

/// Keys that are written to Redis.
const KEYS: u32 = 1000;

const GREETING: &str = "carried through a registry";

/// How the demo is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Leave everything running at the end, and print commands to try
    #[arg(long)]
    keep: bool,
    /// Only end and remove what a demo with --keep left
    #[arg(long, conflicts_with = "keep")]
    stop: bool,
}

/// The two containers, before or after.
#[derive(Debug)]
struct Pair {
    pod: Pod,
    redis: Container,
    counter: Container,
}

/// A container that was checkpointed.
#[derive(Debug)]
struct Frozen {
    name: &'static str,
    archive: PathBuf,
    result: CheckpointResult,
    /// The reference of its checkpoint image.
    image: String,
}

/// What Redis says of itself and of its keys.
#[derive(Debug, PartialEq, Eq)]
struct RedisState {
    run_id: String,
    uptime_seconds: u64,
    keys: String,
    greeting: String,
}

/// Sets up what is missing and runs the demo.
pub(crate) async fn run(places: &Places, options: &Options) -> Result<()> {
    if options.stop {
        return Ground::clear(places, NODE)?.sweep();
    }
    let mut report = Report::begin();
    report.step("Set up what is missing: engines, test images, a build");
    engines::set_up_engines(places)?;
    images::set_up(places, &["redis", "counter"])?;
    compile::programs(places)?;

    let ground = Ground::clear(places, NODE)?;
    report.step("Start a registry on loopback and put a Redis and a counter image into it");
    let registry = Registry::start(&places.engines(), &ground.registry())?;
    let push = |name: &str| registry.push(&Image::read(&images::path(places, name))?, name, "latest");
    let sources = [push("redis")?, push("counter")?];
    report.detail(&format!("{} and {}", sources[0], sources[1]));

    report.step("Start stasisd in directories of its own");
    let mut node = Node::start(places, ground, Runtime::Stasis, &Setup::default()).await?;
    report.detail(&format!("{} on {}", node.cri.version().await?, node.ground.socket().display()));

    let mut demo = Demo { places, registry: &registry, node: &mut node, report: &mut report };
    demo.play(&sources).await?;

    if options.keep {
        report.keep(places, &node, &registry);
        node.keep();
        registry.keep();
        return Ok(());
    }
    report.step("Stop everything and look for what is left behind");
    drop(registry);
    let left = node.stop().await?;
    ensure!(left.is_empty(), "left behind: {}", left.join(", "));
    report.detail("no mount, no process, no cgroup, no interface");
    report.end();
    Ok(())
}

struct Demo<'a> {
    places: &'a Places,
    registry: &'a Registry,
    node: &'a mut Node,
    report: &'a mut Report,
}

impl Demo<'_> {
    async fn play(&mut self, sources: &[String; 2]) -> Result<()> {
        self.report.step("Pull both images through CRI");
        for source in sources {
            self.node.cri.pull(source).await?;
        }
        self.report.step("Run a pod with both containers, in a bridge network");
        let before = self.run_pair("before", sources).await?;
        let address = self.node.cri.pod_address(&before.pod.id).await?;
        self.report.detail(&format!("pod {} has the address {address}", short(&before.pod.id)));

        self.report.step(&format!("Write {KEYS} keys to Redis and watch the counter"));
        self.write_keys(&before.redis).await?;
        let counted = self.await_count(&before.counter, COUNT_FIRST).await?;
        let redis = self.redis_state(&before.redis).await?;
        self.report.detail(&format!("Redis is up for {} s, the counter is at {counted}", redis.uptime_seconds));

        let frozen = self.freeze(&before).await?;
        let counted = self.await_count(&before.counter, counted + 1).await?;
        self.report.detail(&format!("both went on at once: the counter is at {counted}"));

        self.carry(&frozen).await?;
        let counted = last_count(&before.counter)?;
        self.forget(&before, sources, &frozen).await?;
        self.fetch(sources, &frozen).await?;
        self.thaw(&frozen, &redis, counted).await
    }

    async fn run_pair(&mut self, name: &str, references: &[String; 2]) -> Result<Pair> {
        let pod = self.node.cri.run_pod(self.node.pod_config(name)).await?;
        let config = self.redis_config(&references[0])?;
        let redis = self.node.cri.create(&pod, config).await?;
        let counter = self.node.cri.create(&pod, container_config("counter", &references[1], &[])).await?;
        self.node.cri.start(&redis).await?;
        self.node.cri.start(&counter).await?;
        Ok(Pair { pod, redis, counter })
    }

    /// Redis runs as the user that its image names, where CRIU may read the limits of another user's processes.
    fn redis_config(&mut self, reference: &str) -> Result<ContainerConfig> {
        let mut config = container_config("redis", reference, &[]);
        if !has_sys_resource()? {
            self.report.detail("without CAP_SYS_RESOURCE CRIU cannot look into other users: Redis runs as root");
            let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
            context.context("the configuration has no security context")?.run_as_user = Some(Int64Value { value: 0 });
        }
        Ok(config)
    }

    async fn write_keys(&mut self, redis: &Container) -> Result<()> {
        let ready = |messages: &[String]| messages.iter().any(|line| line.contains("Ready to accept")).then_some(());
        await_message(&redis.log, OUTPUT, "word that Redis is ready", ready).await?;
        let script = format!(
            "i=0; while [ $i -lt {KEYS} ]; do i=$((i + 1)); echo \"SET key:$i value-$i\"; done | redis-cli >/dev/null"
        );
        self.node.cri.exec(redis, &["sh", "-c", &script]).await?;
        self.node.cri.exec(redis, &["redis-cli", "SET", "greeting", GREETING]).await?;
        Ok(())
    }

    async fn redis_state(&mut self, redis: &Container) -> Result<RedisState> {
        let info = self.node.cri.exec(redis, &["redis-cli", "INFO", "server"]).await?;
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
            line.map(str::to_owned).with_context(|| format!("Redis says nothing of its {name}"))
        };
        Ok(RedisState {
            run_id: field("run_id")?,
            uptime_seconds: field("uptime_in_seconds")?.parse()?,
            keys: self.node.cri.exec(redis, &["redis-cli", "DBSIZE"]).await?,
            greeting: self.node.cri.exec(redis, &["redis-cli", "GET", "greeting"]).await?,
        })
    }

    async fn await_count(&self, counter: &Container, least: u64) -> Result<u64> {
        let reached = |messages: &[String]| counts(messages).last().copied().filter(|count| *count >= least);
        await_message(&counter.log, OUTPUT, &format!("count of {least}"), reached).await
    }

    /// Checkpoints both containers and leaves them running.
    async fn freeze(&mut self, pair: &Pair) -> Result<Vec<Frozen>> {
        self.report.step("Checkpoint both containers and leave them running");
        let mut frozen = Vec::new();
        for (name, container) in [("redis", &pair.redis), ("counter", &pair.counter)] {
            let archive = self.node.ground.archives().join(format!("{name}.tar"));
            let result = self.checkpoint(container, &archive).await.with_context(|| format!("checkpoint {name}"))?;
            self.report.detail(&format!(
                "{name}: frozen for {:.0} ms; archive of {} after {:.0} ms",
                result.frozen_us as f64 / 1e3,
                megabytes(result.size_bytes),
                result.total_us as f64 / 1e3,
            ));
            let image = format!("{}/checkpoints/{name}:demo", self.registry.name());
            frozen.push(Frozen { name, archive, result, image });
        }
        Ok(frozen)
    }

    async fn checkpoint(&mut self, container: &Container, archive: &Path) -> Result<CheckpointResult> {
        let request = CreateCheckpointRequest {
            container: container.id.clone(),
            path: archive.display().to_string(),
            ..CreateCheckpointRequest::default()
        };
        let mut progress = self.node.cri.admin().create_checkpoint(request).await?.into_inner();
        while let Some(message) = progress.message().await? {
            if let Some(result) = message.done {
                return Ok(result);
            }
        }
        bail!("the daemon reported no result")
    }

    /// Turns the archives into images and pushes them, with the command line.
    async fn carry(&mut self, frozen: &[Frozen]) -> Result<()> {
        self.report.step("Turn each archive into an OCI image and push it to the registry");
        for item in frozen {
            let archive = item.archive.display().to_string();
            self.stasis(&["checkpoint", "to-image", &archive, &item.image])?;
            self.stasis(&["push", &item.image])?;
            self.report.detail(&item.image);
        }
        Ok(())
    }

    /// Removes the pod, the archives and all images: what follows comes from the registry.
    async fn forget(&mut self, pair: &Pair, sources: &[String; 2], frozen: &[Frozen]) -> Result<()> {
        self.report.step("Delete the pod, the archives and all local images");
        let cri = &mut self.node.cri;
        cri.stop_pod(&pair.pod.id).await?;
        cri.remove_pod(&pair.pod.id).await?;
        for image in sources.iter().chain(frozen.iter().map(|item| &item.image)) {
            cri.remove_image(image).await?;
        }
        for item in frozen {
            std::fs::remove_file(&item.archive)?;
        }
        let images = cri.list_images().await?;
        ensure!(images.is_empty(), "images are left: {}", images.join(", "));
        let pods = cri.list_pods().await?;
        ensure!(pods.is_empty(), "pods are left: {}", pods.join(", "));
        self.report.detail("no pod and no image is left");
        Ok(())
    }

    /// Pulls what a restore needs: the checkpoints, and the images that their containers were made from.
    async fn fetch(&mut self, sources: &[String; 2], frozen: &[Frozen]) -> Result<()> {
        self.report.step("Pull the checkpoint images back, and the images that they are based on");
        for image in sources.iter().chain(frozen.iter().map(|item| &item.image)) {
            self.node.cri.pull(image).await?;
        }
        Ok(())
    }

    /// Restores both in a new pod and checks that they go on where they were.
    async fn thaw(&mut self, frozen: &[Frozen], redis_before: &RedisState, counted: u64) -> Result<()> {
        self.report.step("Restore both in a new pod: CreateContainer and StartContainer, nothing else");
        let begin = Instant::now();
        let begun_at = jiff::Timestamp::now();
        let after = self.run_pair("after", &[frozen[0].image.clone(), frozen[1].image.clone()]).await?;
        self.report.detail(&format!("new pod {} with both after {}", short(&after.pod.id), seconds(begin.elapsed())));

        self.report.step("Look whether they are the same");
        let redis = self.redis_state(&after.redis).await?;
        ensure!(redis.run_id == redis_before.run_id, "Redis was started anew: its run_id has changed");
        ensure!(redis.uptime_seconds >= redis_before.uptime_seconds, "the uptime of Redis went back");
        ensure!(
            (&redis.keys, &redis.greeting) == (&redis_before.keys, &redis_before.greeting),
            "Redis has {} keys and the greeting {:?}; there were {} and {:?}",
            redis.keys,
            redis.greeting,
            redis_before.keys,
            redis_before.greeting
        );
        self.report.detail(&format!(
            "Redis: {} keys, up for {} s, run_id {}… as before",
            redis.keys,
            redis.uptime_seconds,
            &redis.run_id[..8]
        ));
        let first = self.first_count_since(&after.counter, begun_at).await?;
        ensure!(first > COUNT_FIRST, "the counter began anew: its first number in the new pod is {first}");
        ensure!(first <= counted, "the counter jumped from at most {counted} to {first}");
        let later = self.await_count(&after.counter, first + 5).await?;
        self.report.detail(&format!("counter: went on with {first} in the new pod's log, is at {later} now"));
        self.report.rows(frozen, redis_before, &redis, first);
        Ok(())
    }

    /// The first number that was logged since `begun_at`; older lines are those that the checkpoint brought along.
    async fn first_count_since(&self, counter: &Container, begun_at: jiff::Timestamp) -> Result<u64> {
        let deadline = Instant::now() + OUTPUT;
        loop {
            let stamped = stamped_messages(&counter.log)?;
            let new: Vec<String> =
                stamped.into_iter().filter(|(time, _)| *time >= begun_at).map(|(_, message)| message).collect();
            if let Some(first) = counts(&new).first() {
                return Ok(*first);
            }
            ensure!(Instant::now() < deadline, "the counter says nothing in {}", counter.log.display());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn stasis(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(self.places.command_line());
        command.arg("--address").arg(self.node.ground.socket()).args(arguments);
        run_program(&mut command, LONG)?;
        Ok(())
    }
}

/// Whether this process, and so the daemon that it starts, has CAP_SYS_RESOURCE.
fn has_sys_resource() -> Result<bool> {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff in /proc")?;
    Ok(u64::from_str_radix(effective.trim(), 16)? >> CAP_SYS_RESOURCE & 1 == 1)
}

fn last_count(counter: &Container) -> Result<u64> {
    counts(&messages(&counter.log)).last().copied().context("the counter has said nothing")
}

/// The numbers that the counter has printed.
fn counts(messages: &[String]) -> Vec<u64> {
    messages.iter().filter_map(|message| message.strip_prefix("count ")?.parse().ok()).collect()
}

/// The beginning of an ID, as people read it.
fn short(id: &str) -> &str {
    &id[..id.len().min(12)]
}
