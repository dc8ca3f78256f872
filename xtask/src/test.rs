//! `cargo xtask test`: formatting, lints, builds, and every test of the workspace with all that they need set up.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::clients;
use crate::compile::{cargo, programs};
use crate::engines;
use crate::images;
use crate::places::Places;
use crate::process::{BUILD, SHORT, run as run_quietly, show};
use crate::specification;
use crate::vm;

/// Runs all checks; the first that fails ends the task.
pub(crate) fn run(places: &Places) -> Result<()> {
    let begin = Instant::now();
    step("formatting", || show(cargo(places).args(["fmt", "--all", "--check"]), BUILD))?;
    step("specification", || specification::check(places))?;
    step("engines and test images", || {
        engines::set_up_engines(places)?;
        engines::set_up_peers(places)?;
        clients::set_up(places)?;
        images::set_up(places, &images::NAMES)
    })?;
    step("lints", || {
        let arguments = ["clippy", "--release", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        show(cargo(places).args(arguments), BUILD)
    })?;
    step("builds", || programs(places))?;
    step("tests", || {
        let arguments = ["test", "--release", "--workspace", "--no-fail-fast"];
        show(cargo(places).args(arguments).envs(places.for_tests()), BUILD)
    })?;
    step("tests in a virtual machine", || vm::run_short_form(places))?;
    println!("all checks passed in {} seconds", begin.elapsed().as_secs());
    Ok(())
}

/// Runs cargo-deny over the dependencies.
pub(crate) fn deny(places: &Places) -> Result<()> {
    let version = run_quietly(cargo(places).args(["deny", "--version"]), SHORT);
    version.context("cargo-deny is not installed; get it with: cargo install --locked cargo-deny")?;
    show(cargo(places).args(["deny", "--workspace", "check"]), BUILD)
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("== {name}");
    work().with_context(|| format!("{name} failed"))
}
