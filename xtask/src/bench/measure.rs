//! The measurements themselves, each on all nodes in turn. Times are milliseconds, sizes megabytes (10⁶ bytes).

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use stasis_cri_api::runtime::ListContainerStatsRequest;

use super::checkpoint_image;
use crate::cri::{Container, Pod, await_message, container_config};
use crate::node::Node;
use crate::registry::Registry;

/// Time for a workload to fill its memory and to say something.
const OUTPUT: Duration = Duration::from_secs(60);

/// Calls in a row whose processor time is measured: the kernel counts it in hundredths of a second.
const STATISTICS_CALLS: u32 = 20;

/// Ticks of the workload that are seen before a checkpoint begins.
const WARM_TICKS: usize = 50;

/// The nodes to compare.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    pub(super) nodes: &'a mut [Node],
    pub(super) registry: &'a Registry,
    pub(super) rounds: usize,
}

/// One measured quantity: for each node the values of all rounds.
pub(super) type Series = Vec<Vec<f64>>;

/// A pod's life, in milliseconds.
#[derive(Debug)]
pub(super) struct Lifecycle {
    /// RunPodSandbox, CreateContainer and StartContainer.
    pub(super) up: Series,
    pub(super) exec: Series,
    /// StopPodSandbox and RemovePodSandbox.
    pub(super) down: Series,
}

/// A checkpoint and a restore, in milliseconds.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// CheckpointContainer.
    pub(super) call: Series,
    /// The largest gap in the workload's own clock around the call.
    pub(super) frozen: Series,
    /// CreateContainer, StartContainer, and on to the workload's next tick.
    pub(super) restore: Series,
    /// Bytes that went to the disk meanwhile, as a share of the archive's. The machine's own writes are among them.
    pub(super) written: Series,
}

/// What is frozen: a hog of a size, with sleeping processes beside it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) mebibytes: usize,
    /// All together.
    pub(super) processes: usize,
}

impl Load {
    fn command(self) -> String {
        let others = self.processes - 1;
        format!("for i in $(seq {others}); do sleep 100000 & done; exec /hog {}", self.mebibytes)
    }

    fn name(self) -> String {
        format!("{}-{}", self.mebibytes, self.processes)
    }
}

/// Memory with many pods, in megabytes.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) daemon: Series,
    pub(super) shim_resident: Series,
    pub(super) shim_proportional: Series,
}

/// Statistics of many containers, in milliseconds a call.
#[derive(Debug)]
pub(super) struct Statistics {
    /// ListContainerStats.
    pub(super) call: Series,
    /// Processor time of the daemon and its shims.
    pub(super) processor: Series,
}

impl Bench<'_> {
    /// Runs and removes a pod with one sleeping container.
    pub(super) async fn lifecycle(&mut self, image: &str) -> Result<Lifecycle> {
        let mut times = Lifecycle { up: self.series(), exec: self.series(), down: self.series() };
        for round in 0..=self.rounds {
            for (number, node) in self.nodes.iter_mut().enumerate() {
                let begin = Instant::now();
                let pod = node.cri.run_pod(node.pod_config(&format!("life-{round}"))).await?;
                let container = node.cri.create(&pod, container_config("main", image, &["sleep", "1000"])).await?;
                node.cri.start(&container).await?;
                let up = milliseconds(begin);
                let begin = Instant::now();
                node.cri.exec(&container, &["true"]).await?;
                let exec = milliseconds(begin);
                let begin = Instant::now();
                remove(node, &pod).await?;
                // The first round fills caches.
                if round > 0 {
                    times.up[number].push(up);
                    times.exec[number].push(exec);
                    times.down[number].push(milliseconds(begin));
                }
            }
        }
        Ok(times)
    }

    /// Checkpoints a workload and restores it in a new pod.
    pub(super) async fn checkpoint(&mut self, image: &str, load: Load) -> Result<Checkpoint> {
        let mut times =
            Checkpoint { call: self.series(), frozen: self.series(), restore: self.series(), written: self.series() };
        let mut checkpoints: Vec<Option<String>> = vec![None; self.nodes.len()];
        for round in 0..=self.rounds {
            for (number, node) in self.nodes.iter_mut().enumerate() {
                let archive = node.ground.archives().join("archive.tar");
                let frozen = freeze(node, image, load, round, &archive).await?;
                let checkpoint = match &checkpoints[number] {
                    Some(reference) => reference.clone(),
                    None => {
                        let repository = format!("checkpoint-{}-{}", node.ground.name, load.name());
                        let image = checkpoint_image(&archive, "main")?;
                        let reference = self.registry.push(&image, &repository, "latest")?;
                        node.cri.pull(&reference).await?;
                        checkpoints[number].insert(reference).clone()
                    }
                };
                fs::remove_file(&archive)?;
                let restore = restore(node, &checkpoint, load, round).await?;
                if round > 0 {
                    times.call[number].push(frozen.call);
                    times.frozen[number].push(frozen.frozen);
                    times.written[number].push(frozen.written);
                    times.restore[number].push(restore);
                }
            }
        }
        Ok(times)
    }

    /// Runs many pods on each node and asks for the statistics of all of them.
    pub(super) async fn statistics(&mut self, image: &str, pods: usize) -> Result<Statistics> {
        let mut times = Statistics { call: self.series(), processor: self.series() };
        let mut running = Vec::new();
        for node in self.nodes.iter_mut() {
            running.push(run_many(node, image, pods).await?);
        }
        for round in 0..=self.rounds {
            for (number, node) in self.nodes.iter_mut().enumerate() {
                let (call, processor) = ask_for_statistics(node, pods).await?;
                // The first round fills caches.
                if round > 0 {
                    times.call[number].extend(call);
                    times.processor[number].push(processor);
                }
            }
        }
        for (node, pods) in self.nodes.iter_mut().zip(&running) {
            for pod in pods {
                remove(node, pod).await?;
            }
        }
        Ok(times)
    }

    /// Runs many pods on each node and reads the memory of daemon and shims.
    pub(super) async fn memory(&mut self, image: &str, pods: usize) -> Result<Memory> {
        let mut memory =
            Memory { daemon: self.series(), shim_resident: self.series(), shim_proportional: self.series() };
        for (number, node) in self.nodes.iter_mut().enumerate() {
            let running = run_many(node, image, pods).await?;
            memory.daemon[number].push(rollup(node.pid(), "Rss:")?);
            for shim in node.shims()? {
                memory.shim_resident[number].push(rollup(shim, "Rss:")?);
                memory.shim_proportional[number].push(rollup(shim, "Pss:")?);
            }
            for pod in &running {
                remove(node, pod).await?;
            }
        }
        Ok(memory)
    }

    pub(super) fn series(&self) -> Series {
        vec![Vec::new(); self.nodes.len()]
    }
}

/// One checkpoint: milliseconds, and what was written as a share of the archive.
struct Frozen {
    call: f64,
    frozen: f64,
    written: f64,
}

/// Starts the workload, checkpoints it once, removes it.
async fn freeze(node: &mut Node, image: &str, load: Load, round: usize, archive: &Path) -> Result<Frozen> {
    let (pod, container) = start(node, image, load, &format!("freeze-{}-{round}", load.name())).await?;
    rustix::fs::sync();
    let (before, written_before) = (now(), written()?);
    let begin = Instant::now();
    node.cri.checkpoint(&container, archive).await?;
    let call = milliseconds(begin);
    let after = now();
    rustix::fs::sync();
    let written = (written()? - written_before) as f64 / fs::metadata(archive)?.len() as f64;
    let frozen = largest_gap(&container, before, after).await?;
    remove(node, &pod).await?;
    Ok(Frozen { call, frozen, written })
}

/// Runs the workload in a pod of its own until it ticks.
pub(super) async fn start(node: &mut Node, image: &str, load: Load, pod: &str) -> Result<(Pod, Container)> {
    let pod = node.cri.run_pod(node.pod_config(pod)).await?;
    let config = container_config("main", image, &["sh", "-c", &load.command()]);
    let container = node.cri.create(&pod, config).await?;
    node.cri.start(&container).await?;
    let warm = |messages: &[String]| (ticks(messages).len() >= WARM_TICKS).then_some(());
    await_message(&container.log, OUTPUT, "tick", warm).await?;
    Ok((pod, container))
}

/// Bytes written to all disks since the machine started (`/proc/diskstats`: sectors written are the tenth field; a
/// partition counts in its disk, which stands before it).
fn written() -> Result<u64> {
    let text = fs::read_to_string("/proc/diskstats").context("read /proc/diskstats")?;
    let sectors = |line: &str| -> Option<u64> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_disk = Path::new("/sys/block").join(fields.get(2)?).exists();
        if is_disk { fields.get(9)?.parse().ok() } else { None }
    };
    Ok(text.lines().filter_map(sectors).sum::<u64>() * 512)
}

/// Restores a checkpoint image in a new pod; returns the time to the first new tick.
async fn restore(node: &mut Node, checkpoint: &str, load: Load, round: usize) -> Result<f64> {
    let pod = node.cri.run_pod(node.pod_config(&format!("thaw-{}-{round}", load.name()))).await?;
    let begin = now();
    let container = node.cri.create(&pod, container_config("main", checkpoint, &[])).await?;
    node.cri.start(&container).await?;
    let first = |messages: &[String]| ticks(messages).into_iter().find(|tick| *tick > begin);
    let tick = await_message(&container.log, OUTPUT, "tick after the restore", first).await?;
    remove(node, &pod).await?;
    Ok((tick - begin) as f64 / 1e6)
}

/// The largest gap, in milliseconds, between ticks from the one before `before` to the one after `after`.
pub(super) async fn largest_gap(container: &Container, before: u128, after: u128) -> Result<f64> {
    let reached = |messages: &[String]| {
        let ticks = ticks(messages);
        (ticks.last() > Some(&after)).then_some(ticks)
    };
    let ticks = await_message(&container.log, OUTPUT, "tick after the checkpoint", reached).await?;
    let first = ticks.partition_point(|tick| *tick < before).saturating_sub(1);
    let last = ticks.partition_point(|tick| *tick <= after).min(ticks.len() - 1);
    let gap = ticks[first..=last].windows(2).map(|pair| pair[1] - pair[0]).max();
    Ok(gap.context("no two ticks around the checkpoint")? as f64 / 1e6)
}

/// Runs pods with one sleeping container each.
async fn run_many(node: &mut Node, image: &str, pods: usize) -> Result<Vec<Pod>> {
    let mut running = Vec::new();
    for pod in 0..pods {
        let pod = node.cri.run_pod(node.pod_config(&format!("many-{pod}"))).await?;
        let container = node.cri.create(&pod, container_config("main", image, &["sleep", "100000"])).await?;
        node.cri.start(&container).await?;
        running.push(pod);
    }
    Ok(running)
}

/// Asks a few times; returns the time of each call, and the processor time of one in the mean.
async fn ask_for_statistics(node: &mut Node, containers: usize) -> Result<(Vec<f64>, f64)> {
    let before = processor_time(node)?;
    let mut calls = Vec::new();
    for _ in 0..STATISTICS_CALLS {
        let begin = Instant::now();
        let answer = node.cri.runtime.list_container_stats(ListContainerStatsRequest { filter: None }).await?;
        calls.push(milliseconds(begin));
        let stats = answer.into_inner().stats;
        let told = stats.iter().filter(|stats| stats.cpu.is_some() && stats.memory.is_some()).count();
        ensure!(told == containers, "{} tells the usage of {told} containers", node.runtime.name());
    }
    Ok((calls, (processor_time(node)? - before) / STATISTICS_CALLS as f64))
}

/// Processor time that a node's daemon and shims have used, in milliseconds.
fn processor_time(node: &Node) -> Result<f64> {
    let ticks = |pid: u32| -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, in parentheses, may hold spaces; user and system time are the 12th and 13th field behind it.
        let fields = stat.rsplit_once(')').context("a stat file without a name")?.1;
        let times = fields.split_whitespace().skip(11).take(2);
        times.map(|time| time.parse::<u64>().context("a time that is none")).sum()
    };
    let mut all = ticks(node.pid())?;
    for shim in node.shims()? {
        all += ticks(shim)?;
    }
    Ok(all as f64 * 1e3 / rustix::param::clock_ticks_per_second() as f64)
}

pub(super) async fn remove(node: &mut Node, pod: &Pod) -> Result<()> {
    node.cri.stop_pod(&pod.id).await?;
    node.cri.remove_pod(&pod.id).await
}

/// The clock values, in nanoseconds, that the workload has printed.
fn ticks(messages: &[String]) -> Vec<u128> {
    let value = |message: &String| message.strip_prefix("tick ")?.split(' ').nth(1)?.parse().ok();
    messages.iter().filter_map(value).collect()
}

pub(super) fn milliseconds(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// The workload's clock.
pub(super) fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}

/// A sum over a process's memory, in megabytes.
fn rollup(pid: u32, key: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kibibytes: f64 = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("{path} has no {key}"))?;
    Ok(kibibytes * 1024.0 / 1e6)
}
