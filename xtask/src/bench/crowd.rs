//! Many checkpoints at once: how long each holds its container, and how much memory of the node they take together.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::measure::{Bench, Load, Series, largest_gap, milliseconds, now, remove, start};
use crate::node::Node;

/// Containers that are checkpointed at once.
const CONTAINERS: usize = 10;

/// What each of them holds.
const LOAD: Load = Load { mebibytes: 100, processes: 1 };

/// How often the node's free memory is looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// Ten checkpoints at once.
#[derive(Debug)]
pub(super) struct Crowd {
    /// From the first call to the last answer, in milliseconds.
    pub(super) all: Series,
    /// The longest freeze, as a multiple of that of one alone.
    pub(super) frozen: Series,
    /// Memory that was taken at the most, beyond the pages of one container, in megabytes.
    pub(super) memory: Series,
}

impl Bench<'_> {
    /// Checkpoints one container, then all at once.
    pub(super) async fn crowd(&mut self, image: &str) -> Result<Crowd> {
        let [all, frozen, memory] = [(); 3].map(|()| self.series());
        let mut crowd = Crowd { all, frozen, memory };
        for (number, node) in self.nodes.iter_mut().enumerate() {
            let mut running = Vec::new();
            for at in 0..CONTAINERS {
                running.push(start(node, image, LOAD, &format!("crowd-{at}")).await?);
            }
            // The first round fills caches.
            for round in 0..=self.rounds {
                let alone = at_once(node, &running[..1]).await?;
                let together = at_once(node, &running).await?;
                if round > 0 {
                    crowd.all[number].push(together.all);
                    crowd.frozen[number].push(together.frozen / alone.frozen);
                    crowd.memory[number].push(together.memory - LOAD.mebibytes as f64 * (1 << 20) as f64 / 1e6);
                }
            }
            for (pod, _) in &running {
                remove(node, pod).await?;
            }
        }
        Ok(crowd)
    }
}

/// Milliseconds and megabytes.
struct Measured {
    all: f64,
    frozen: f64,
    memory: f64,
}

type Running = (crate::cri::Pod, crate::cri::Container);

async fn at_once(node: &Node, running: &[Running]) -> Result<Measured> {
    rustix::fs::sync();
    let watch = Watch::start()?;
    let (before, begin) = (now(), Instant::now());
    let mut calls = Vec::new();
    for (number, (_, container)) in running.iter().enumerate() {
        let (mut cri, container) = (node.cri.clone(), container.clone());
        let archive = node.ground.archives().join(format!("crowd-{number}.tar"));
        calls.push(tokio::spawn(async move {
            cri.checkpoint(&container, &archive).await?;
            Ok::<_, anyhow::Error>(fs::remove_file(&archive)?)
        }));
    }
    for call in calls {
        call.await.context("a checkpoint")??;
    }
    let (all, after) = (milliseconds(begin), now());
    let memory = watch.finish()?;
    let mut frozen = 0f64;
    for (_, container) in running {
        frozen = frozen.max(largest_gap(container, before, after).await?);
    }
    Ok(Measured { all, frozen, memory })
}

/// A thread that looks how much memory is left.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<f64>,
}

impl Watch {
    fn start() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, before) = (Arc::clone(&stop), available());
        let look = move || {
            let mut least = before;
            while !stopped.load(Ordering::Relaxed) {
                least = least.min(available());
                thread::sleep(PAUSE);
            }
            before - least
        };
        Ok(Self { stop, thread: thread::Builder::new().spawn(look)? })
    }

    /// The most that was taken since the start, in megabytes.
    fn finish(self) -> Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread that watches the memory panicked"))
    }
}

/// Memory that programs can still get, in megabytes; what the page cache holds is among it.
fn available() -> f64 {
    stasis_sys::memory::available() as f64 / 1e6
}
