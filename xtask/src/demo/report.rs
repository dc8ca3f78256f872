//! What the demo says: numbered steps, details, the summary, and the commands to try afterwards.

use std::time::{Duration, Instant};

use super::{Frozen, RedisState};
use crate::node::Node;
use crate::places::Places;
use crate::registry::Registry;

/// The demo's output so far.
#[derive(Debug)]
pub(super) struct Report {
    begin: Instant,
    steps: usize,
    summary: Vec<[String; 4]>,
}

impl Report {
    pub(super) fn begin() -> Self {
        Self { begin: Instant::now(), steps: 0, summary: Vec::new() }
    }

    /// Begins a step.
    pub(super) fn step(&mut self, words: &str) {
        self.steps += 1;
        println!("{:>2}. {words}", self.steps);
    }

    /// Says what came of the step.
    pub(super) fn detail(&mut self, words: &str) {
        println!("    {words}");
    }

    /// Notes the rows of the summary.
    pub(super) fn rows(&mut self, frozen: &[Frozen], before: &RedisState, after: &RedisState, counted: u64) {
        for item in frozen {
            let proof = match item.name {
                "redis" => {
                    format!("{} keys, uptime {} → {} s", after.keys, before.uptime_seconds, after.uptime_seconds)
                }
                _ => format!("went on with {counted}"),
            };
            let frozen = format!("{:.0} ms", item.result.frozen_us as f64 / 1e3);
            self.summary.push([item.name.to_owned(), frozen, megabytes(item.result.size_bytes), proof]);
        }
    }

    /// Prints the summary.
    pub(super) fn end(&self) {
        let print = |row: [&str; 4]| println!("{:<10} {:>8} {:>9}  {}", row[0], row[1], row[2], row[3]);
        println!();
        print(["container", "frozen", "archive", "after the restore in a new pod"]);
        for row in &self.summary {
            print([&row[0], &row[1], &row[2], &row[3]]);
        }
        println!("\nAll checks passed, in {}.", seconds(self.begin.elapsed()));
    }

    /// Prints the summary, where everything is, and what to try.
    pub(super) fn keep(&self, places: &Places, node: &Node, registry: &Registry) {
        self.end();
        let stasis = places.command_line();
        let call = format!("{} --address {}", stasis.display(), node.ground.socket().display());
        println!("\nEverything is left running:");
        println!("    stasisd, process {}, log {}", node.pid(), node.ground.log().display());
        println!("    registry http://{}, process {}", registry.name(), registry.pid());
        println!("\nTry:");
        for words in ["ps", "pods", "images", "logs -f counter", "doctor"] {
            println!("    {call} {words}");
        }
        println!("    crictl --runtime-endpoint unix://{} ps", node.ground.socket().display());
        println!("\nEnd it with: cargo xtask demo --stop");
    }
}

/// A size in megabytes.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A duration in seconds.
pub(super) fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}
