//! The development tasks, the only entry point besides cargo itself: `cargo xtask --help`.
//!
//! This file is a table of contents; each task has a file of its own.

mod bench;
mod compile;
mod cri;
mod debian;
mod engines;
mod http;
mod images;
mod layout;
mod node;
mod places;
mod prefix;
mod process;
mod registry;
mod test;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::places::Places;

/// Development tasks of Stasis. They need root, and keep all that they make in the target directory.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Set up the engines (CRIU, runc, CNI plugins, …), the peers and the test images
    Engines,
    /// Format check, lints, builds, and all tests
    Test,
    /// Check licences, advisories and sources of the dependencies
    Deny,
    /// Compare with containerd: times and memory, with the bars that are to be met
    Bench(bench::Options),
}

fn main() -> Result<()> {
    let places = Places::find()?;
    match Arguments::parse().task {
        Task::Engines => set_up(&places),
        Task::Test => test::run(&places),
        Task::Deny => test::deny(&places),
        Task::Bench(options) => runtime()?.block_on(bench::run(&places, &options)),
    }
}

fn set_up(places: &Places) -> Result<()> {
    engines::set_up_engines(places)?;
    engines::set_up_peers(places)?;
    images::set_up(places)?;
    for (variable, value) in test::environment(places) {
        eprintln!("export {variable}={}", value.display());
    }
    Ok(())
}

/// One thread: the tasks wait for one thing at a time.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the async runtime")
}
