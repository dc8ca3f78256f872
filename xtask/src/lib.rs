//! The development tasks, the only entry point besides cargo itself: `cargo xtask --help`.
//!
//! This file is a table of contents; each task has a file of its own. What the end-to-end tests share with the tasks is
//! public: a [`node`] of its own with a [`cri`] client, a [`registry`], and [`layout`] to make images.

#![allow(clippy::print_stdout, reason = "a task's result is its output; progress and errors go to stderr")]

mod bench;
mod clients;
mod compile;
pub mod cri;
mod debian;
mod demo;
mod engines;
mod http;
pub mod images;
pub mod layout;
pub mod node;
pub mod places;
mod prefix;
pub mod process;
pub mod registry;
mod specification;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
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
    /// Set up the engines (CRIU, runc, CNI plugins, …), the peers, the clients and the test images
    Engines,
    /// The main job end to end: run a pod, freeze it, carry it as an image, thaw it
    Demo(demo::Options),
    /// Format check, lints, builds, and all tests
    Test,
    /// Tests in a virtual machine with control groups version 2 and AppArmor
    Vm(vm::Options),
    /// Check licences, advisories and sources of the dependencies
    Deny,
    /// Compare with containerd: times and memory, with the bars that are to be met
    Bench(bench::Options),
}

/// Runs the task that the command line names.
pub fn main() -> ExitCode {
    match run(&Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<()> {
    if !matches!(task, Task::Deny) && !rustix::process::geteuid().is_root() {
        bail!("mounts, namespaces, cgroups and CRIU need root: run this task as root");
    }
    let places = Places::find()?;
    match task {
        Task::Engines => set_up(&places),
        Task::Demo(options) => block_on(demo::run(&places, options)),
        Task::Test => test::run(&places),
        Task::Vm(options) => vm::run(&places, options),
        Task::Deny => test::deny(&places),
        Task::Bench(options) => block_on(bench::run(&places, options)),
    }
}

fn set_up(places: &Places) -> Result<()> {
    engines::set_up_engines(places)?;
    engines::set_up_peers(places)?;
    clients::set_up(places)?;
    images::set_up(places, &images::NAMES)?;
    let prefixes = [engines::engines(places), engines::peers(places), clients::clients(places)];
    for prefix in prefixes {
        print!("{}", prefix.versions()?);
    }
    for (variable, value) in places.for_tests() {
        println!("export {variable}={}", value.display());
    }
    Ok(())
}

/// Runs a task that waits for daemons, on one thread; an interrupt drops it, and with it all that it started.
fn block_on(task: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start the async runtime")?.block_on(async {
        tokio::select! {
            result = task => result,
            interrupt = tokio::signal::ctrl_c() => {
                interrupt.context("wait for an interrupt")?;
                bail!("interrupted")
            }
        }
    })
}
