//! The benchmarks: Stasis and containerd side by side in the same run, round by round in turn, medians, ratios.
//!
//! `cargo xtask bench` prints a table with each bar and whether it is met. Both runtimes have the same engines, the
//! same network configuration, the same images from the same registry, and the same client.

mod crowd;
mod lists;
mod measure;
mod table;

use std::path::Path;

use anyhow::{Context, Result, bail};

use self::lists::Lists;
use self::measure::{Bench, Load};
use self::table::{Bar, Table};
use crate::compile;
use crate::engines;
use crate::images;
use crate::layout::Image;
use crate::node::{Ground, Network, Node, Runtime, Setup};
use crate::places::Places;
use crate::registry::Registry;

/// What can be measured, with the word that chooses it. All but `masquerade` have a plain bridge: with masquerading and
/// port mappings most of a pod's start and end is the plugins' calls of iptables, which are the same under any runtime.
pub(crate) const NAMES: [&str; 10] = [
    "lifecycle",
    "masquerade",
    "checkpoint",
    "processes",
    "gigabyte",
    "four-gigabytes",
    "crowd",
    "memory",
    "stats",
    "lists",
];

/// Checkpoints by name: what is frozen, and the bars of call, freeze, restore and writes.
const CHECKPOINTS: [(&str, Load, [Bar; 4]); 4] = [
    (
        "checkpoint",
        Load { mebibytes: 1, processes: 1 },
        [Bar::Ratio(0.5), Bar::Both(0.5, 30.0), Bar::Ratio(1.0), Bar::None],
    ),
    ("processes", Load { mebibytes: 1, processes: 100 }, [Bar::None, Bar::AtMost(300.0), Bar::Ratio(1.0), Bar::None]),
    (
        "gigabyte",
        Load { mebibytes: 1024, processes: 1 },
        [Bar::Ratio(0.25), Bar::Ratio(0.2), Bar::Ratio(1.0), Bar::AtMost(1.05)],
    ),
    (
        "four-gigabytes",
        Load { mebibytes: 4096, processes: 1 },
        [Bar::None, Bar::AtMost(1000.0), Bar::None, Bar::AtMost(1.05)],
    ),
];

/// Pods of the benchmarks of memory and statistics.
const PODS: usize = 60;

/// Which benchmarks, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// One of lifecycle, masquerade, checkpoint, processes, gigabyte, four-gigabytes, crowd, memory, stats, lists; all of them if
    /// none is named
    name: Option<String>,
    /// Rounds of each measurement; the table shows medians
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Measures containerd alone
    #[arg(long)]
    peer_only: bool,
}

impl Options {
    fn chosen(&self, name: &str) -> bool {
        self.name.as_deref().is_none_or(|only| only == name)
    }
}

fn network_of(name: &str) -> Network {
    if name == "masquerade" { Network::Masquerade } else { Network::Bridge }
}

/// Sets up what is missing, measures, prints the table. A bar that is not met is an error.
pub(crate) async fn run(places: &Places, options: &Options) -> Result<()> {
    if let Some(name) = options.name.as_ref().filter(|name| !NAMES.contains(&name.as_str())) {
        bail!("no benchmark is called {name}; there are {}", NAMES.join(", "));
    }
    engines::set_up_engines(places)?;
    engines::set_up_peers(places)?;
    images::set_up(places, &["pause", "busybox", "hog"])?;
    if !options.peer_only {
        compile::programs(places)?;
    }
    let mut table = Table::default();
    for network in [Network::Bridge, Network::Masquerade] {
        if NAMES.iter().any(|name| options.chosen(name) && network_of(name) == network) {
            run_on(places, options, network, &mut table).await?;
        }
    }
    println!("{table}");
    match table.missed() {
        0 => Ok(()),
        missed => bail!("{missed} of the bars are not met"),
    }
}

/// Measures with nodes that have that network.
async fn run_on(places: &Places, options: &Options, network: Network, table: &mut Table) -> Result<()> {
    let ground = Ground::clear(places, "peer")?;
    let registry = Registry::start(&places.engines(), &ground.registry())?;
    let pause = push(places, &registry, "pause")?;
    let setup = Setup { network, sandbox_image: pause, ..Setup::default() };
    let mut nodes = vec![Node::start(places, ground, Runtime::Containerd, &setup).await?];
    if !options.peer_only {
        let ground = Ground::clear(places, "bench")?;
        nodes.push(Node::start(places, ground, Runtime::Stasis, &setup).await?);
    }
    table.of(&nodes);
    let measured = measure(places, options, network, &registry, &mut nodes, table).await;
    drop(registry);
    for node in nodes {
        let name = node.runtime.name();
        let left = node.stop().await.with_context(|| format!("end {name}"));
        match left {
            Ok(left) if left.is_empty() => {}
            Ok(left) => eprintln!("left behind by {name}, now removed: {}", left.join(", ")),
            Err(error) => eprintln!("{error:#}"),
        }
    }
    measured
}

async fn measure(
    places: &Places,
    options: &Options,
    network: Network,
    registry: &Registry,
    nodes: &mut [Node],
    table: &mut Table,
) -> Result<()> {
    let chosen = |name: &str| options.chosen(name) && network_of(name) == network;
    let busybox = push(places, registry, "busybox")?;
    let hog = push(places, registry, "hog")?;
    for node in nodes.iter_mut() {
        node.cri.pull(&busybox).await?;
        node.cri.pull(&hog).await?;
    }
    let mut bench = Bench { nodes, registry, rounds: options.rounds };
    if chosen("lifecycle") {
        let times = bench.lifecycle(&busybox).await?;
        table.add("run + create + start of a pod, ms", Bar::Ratio(0.6), &times.up);
        table.add("stop + remove of a pod, ms", Bar::Ratio(0.5), &times.down);
        table.add("ExecSync, ms", Bar::None, &times.exec);
    }
    if chosen("masquerade") {
        let times = bench.lifecycle(&busybox).await?;
        table.add("masquerading: run + create + start, ms", Bar::None, &times.up);
        table.add("masquerading: stop + remove, ms", Bar::None, &times.down);
    }
    for (name, load, bars) in CHECKPOINTS {
        if chosen(name) {
            let times = bench.checkpoint(&hog, load).await?;
            let what = match load.processes {
                1 => format!("{} MiB", load.mebibytes),
                processes => format!("{processes} processes"),
            };
            let [call, frozen, restore, written] = bars;
            table.add(&format!("{what}: checkpoint, ms"), call, &times.call);
            table.add(&format!("{what}: frozen in it, ms"), frozen, &times.frozen);
            table.add(&format!("{what}: restore to first output, ms"), restore, &times.restore);
            table.add(&format!("{what}: disk writes / archive"), written, &times.written);
        }
    }
    if chosen("crowd") {
        let crowd = bench.crowd(&hog).await?;
        table.add("10 × 100 MiB at once: until all are done, ms", Bar::None, &crowd.all);
        table.add("… longest freeze / that of one alone", Bar::AtMost(2.0), &crowd.frozen);
        table.add("… memory beyond one's buffer, MB", Bar::AtMost(50.0), &crowd.memory);
    }
    if chosen("memory") {
        let memory = bench.memory(&busybox, PODS).await?;
        table.add(&format!("daemon with {PODS} pods, resident MB"), Bar::AtMost(30.0), &memory.daemon);
        table.add("shim a pod, resident MB", Bar::AtMost(5.0), &memory.shim_resident);
        table.add("shim a pod, proportional MB", Bar::AtMost(1.5), &memory.shim_proportional);
    }
    if chosen("stats") {
        let stats = bench.statistics(&busybox, PODS).await?;
        table.add(&format!("ListContainerStats of {PODS} containers, ms"), Bar::Ratio(0.1), &stats.call);
        table.add("… processor time of daemon and shims, ms", Bar::Ratio(0.1), &stats.processor);
    }
    if chosen("lists") {
        let lists = bench.lists(&busybox).await?;
        table.add(&format!("ListContainers of {}, ms", Lists::CONTAINERS), Bar::Ratio(1.0), &lists.containers);
        table.add("ListPodSandbox, ms", Bar::Ratio(1.0), &lists.pods);
        table.add("ContainerStatus, ms", Bar::AtMost(0.5), &lists.status);
        table.add_high("lists beside 10 checkpoints, ms", Bar::AtMost(5.0), &lists.beside_checkpoints);
    }
    Ok(())
}

fn push(places: &Places, registry: &Registry, name: &str) -> Result<String> {
    registry.push(&Image::read(&images::path(places, name))?, name, "latest")
}

/// Makes an image of a checkpoint archive in the form that every reader knows: one layer, marked by annotations.
fn checkpoint_image(archive: &Path, container: &str) -> Result<Image> {
    let annotations = ["org.criu.checkpoint.container.name", "io.kubernetes.cri-o.annotations.checkpoint.name"];
    let annotations = annotations.map(|key| (key, container.to_owned())).into();
    let layer = crate::layout::Layer::of_tar(archive)?;
    Image::new(vec![layer], &serde_json::json!({}), &annotations)
}
