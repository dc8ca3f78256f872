//! `cargo xtask vm`: the tests that need a host of control groups version 2 and AppArmor, in a virtual machine with a
//! stock Debian kernel.
//!
//! The guest is a small Debian with systemd as its first process, on a disk that forgets. Programs, engines and images
//! are those that are built and set up on the host, at the same paths, read only; test results come out over the
//! console. Nothing is installed on the host. Knows nothing of what the tests do.

mod guest;
mod initramfs;
mod kernel;
mod machine;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::clients;
use crate::compile::{cargo, programs};
use crate::debian::remove_tree;
use crate::engines;
use crate::images;
use crate::places::{DEV_DIR_VARIABLE, Places};
use crate::process::{BUILD, run as run_quietly};

use self::machine::{Machine, Share};

/// Test binaries: those that run in the guest only, and those that run everywhere.
const GUEST: &str = "guest";
const NODE: &str = "node";

/// Tests of the short form, which is part of `cargo xtask test`: what would be missed first.
const SHORT_FORM: [&str; 4] = [
    "host::the_host_has_version_2_alone_apparmor_and_all_capabilities",
    "freezer::a_checkpoint_freezes_its_own_container_and_no_other",
    "users::redis_of_a_user_goes_on_with_its_keys",
    "systemd::containers_of_the_driver_systemd_live_and_are_carried",
];

/// Directory of the tests' nodes in the guest: on its own disk, as overlayfs cannot stand on a shared directory.
const GUEST_DEV_DIR: &str = "/var/lib/stasis-dev";

/// Time for a run. An emulated machine is more than ten times slower than its host.
const RUN: Duration = Duration::from_secs(3600);
const SHORT_RUN: Duration = Duration::from_secs(600);

/// What to run in the virtual machine.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only tests whose name contains one of these, of both kinds
    filter: Vec<String>,
    /// Also the tests that run on any host
    #[arg(long)]
    full: bool,
    /// A shell instead of tests
    #[arg(long, conflicts_with_all = ["filter", "full"])]
    shell: bool,
}

/// What the guest does.
#[derive(Debug)]
enum Work {
    /// A shell at the console.
    Shell,
    /// Test binaries with their arguments.
    Tests(Vec<(PathBuf, Vec<String>)>),
}

/// Sets up and builds what is needed, boots, and fails if a test in the guest does.
pub(crate) fn run(places: &Places, options: &Options) -> Result<()> {
    engines::set_up_engines(places)?;
    engines::set_up_peers(places)?;
    clients::set_up(places)?;
    images::set_up(places, &images::NAMES)?;
    programs(places)?;
    let work = if options.shell { Work::Shell } else { Work::Tests(chosen(places, options)?) };
    boot(places, &work, RUN)
}

/// The short form; everything else has been set up and built before.
pub(crate) fn run_short_form(places: &Places) -> Result<()> {
    let tests = vec![(binary(places, GUEST)?, only(SHORT_FORM.map(str::to_owned)))];
    boot(places, &Work::Tests(tests), SHORT_RUN)
}

fn chosen(places: &Places, options: &Options) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let filter = || only(options.filter.iter().cloned());
    let mut tests = vec![(binary(places, GUEST)?, filter())];
    if options.full || !options.filter.is_empty() {
        tests.push((binary(places, NODE)?, filter()));
    }
    Ok(tests)
}

/// One test at a time, as there is one processor, each saying at once what it has to say; those of the guest are
/// ignored elsewhere.
fn only(names: impl IntoIterator<Item = String>) -> Vec<String> {
    names.into_iter().chain(["--include-ignored", "--test-threads=1", "--nocapture"].map(str::to_owned)).collect()
}

/// Builds a test binary of the workspace and returns where it is.
fn binary(places: &Places, name: &str) -> Result<PathBuf> {
    let arguments = ["test", "--release", "--workspace", "--no-run", "--quiet", "--test", name];
    let mut command = cargo(places);
    let text = run_quietly(command.args(arguments).arg("--message-format=json-render-diagnostics"), BUILD)?;
    let built = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let this = message["target"]["name"] == name;
        message["executable"].as_str().filter(|_| this).map(PathBuf::from)
    });
    built.with_context(|| format!("cargo names no program for the tests {name}"))
}

fn boot(places: &Places, work: &Work, limit: Duration) -> Result<()> {
    if env::consts::ARCH != "x86_64" {
        bail!("the virtual machine is one of x86_64, this host is {}: run this task there", env::consts::ARCH);
    }
    let path = places.dev.join("vm.lock");
    let alone = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    if alone.try_lock().is_err() {
        bail!("another task uses the virtual machine of this work tree: wait for its end");
    }
    let machine = {
        let _lock = places.lock()?;
        let qemu = engines::machine(places);
        qemu.make(places)?;
        guest::set_up(places, &qemu.place)?;
        Machine::new(guest::place(places), &qemu.place)?
    };
    let exchange = guest::place(places).join("exchange");
    remove_tree(&exchange)?;
    fs::create_dir_all(&exchange).with_context(|| format!("create {}", exchange.display()))?;
    let shares = shares(places, work)?;
    fs::write(exchange.join("run"), script(places, work, &shares))?;
    machine.run(&exchange, &shares, matches!(work, Work::Shell), limit)?;
    if matches!(work, Work::Shell) {
        return Ok(());
    }
    let status = fs::read_to_string(exchange.join("status")).context("the guest ended without a result")?;
    match status.trim() {
        "0" => Ok(()),
        _ => bail!("tests failed in the guest; the logs of their nodes are in {}", exchange.display()),
    }
}

/// Directories that the guest sees, none inside another.
fn shares(places: &Places, work: &Work) -> Result<Vec<Share>> {
    let mut dirs = vec![places.engines(), places.peers(), places.clients(), places.images(), places.bin()];
    dirs.extend(places.shim().parent().map(Path::to_path_buf));
    if let Work::Tests(tests) = work {
        dirs.extend(tests.iter().filter_map(|(binary, _)| Some(binary.parent()?.to_path_buf())));
    }
    dirs.sort();
    dirs.dedup_by(|inner, outer| inner.starts_with(outer));
    if let Some(absent) = dirs.iter().find(|dir| !dir.is_dir()) {
        bail!("{} is missing", absent.display());
    }
    Ok(dirs.into_iter().enumerate().map(|(number, dir)| Share { tag: format!("share{number}"), dir }).collect())
}

/// What the guest runs once it is up, a shell script.
fn script(places: &Places, work: &Work, shares: &[Share]) -> String {
    let mut text = String::new();
    for Share { tag, dir } in shares {
        text += &format!(
            "mkdir -p '{dir}' && mount -t 9p -o {} {tag} '{dir}'\n",
            machine::OPTIONS_READONLY,
            dir = dir.display()
        );
    }
    for (variable, value) in places.for_tests() {
        let value = if variable == DEV_DIR_VARIABLE { Path::new(GUEST_DEV_DIR).to_path_buf() } else { value };
        text += &format!("export {variable}='{}'\n", value.display());
    }
    text += &format!(
        "export PATH=\"$PATH:{}\"\nmkdir -p {GUEST_DEV_DIR}\ncd {GUEST_DEV_DIR}\n",
        places.engines().join("bin").display()
    );
    match work {
        Work::Shell => text += "sh -i\n",
        Work::Tests(tests) => {
            text += "status=0\n";
            for (binary, arguments) in tests {
                text += &format!("'{}' {} || status=1\n", binary.display(), quoted(arguments));
            }
            text +=
                &format!("cp {GUEST_DEV_DIR}/nodes/*.log /exchange/ 2>/dev/null\necho $status > /exchange/status\n");
        }
    }
    text
}

fn quoted(arguments: &[String]) -> String {
    let words = arguments.iter().map(|argument| format!("'{}'", argument.replace('\'', "'\\''")));
    words.collect::<Vec<_>>().join(" ")
}
