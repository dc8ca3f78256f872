//! The engines that Stasis drives, and the peers that it is compared with: what is good enough, and where it is had.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::find_program;
use crate::places::Places;
use crate::prefix::{Form, Program, Recipe};
use crate::process::{SHORT, ask, run};

/// CRIU before this crashes on the private configuration file of an operation.
const CRIU_NEEDED: [u32; 3] = [4, 2, 1];

/// runc before this has no `features` that say all we ask.
const RUNC_NEEDED: [u32; 3] = [1, 2, 0];

/// The CNI version that our configurations speak.
const CNI_NEEDED: &str = "\"1.0.0\"";

const XTABLES: &str = "usr/sbin/xtables-nft-multi";

const ENGINES: &[Program] = &[
    relocated("criu", "criu", "usr/sbin/criu", system_criu),
    relocated("runc", "runc", "usr/sbin/runc", system_runc),
    Program {
        name: "cni",
        package: "containernetworking-plugins",
        file: "usr/lib/cni",
        form: Form::AsItIs,
        system: system_cni,
    },
    Program {
        name: "docker-registry",
        package: "docker-registry",
        file: "usr/bin/docker-registry",
        form: Form::AsItIs,
        system: || answering("docker-registry", "--version"),
    },
    Program {
        name: "busybox",
        package: "busybox-static",
        file: "usr/bin/busybox",
        form: Form::AsItIs,
        system: system_busybox,
    },
    xtables("nft", "nftables", "usr/sbin/nft", || answering("nft", "--version")),
    xtables("iptables", "iptables", XTABLES, || answering("iptables", "--version")),
    xtables("iptables-save", "iptables", XTABLES, || answering("iptables-save", "--version")),
    xtables("iptables-restore", "iptables", XTABLES, || answering("iptables-restore", "--version")),
    xtables("ip6tables", "iptables", XTABLES, || answering("ip6tables", "--version")),
    xtables("ip6tables-save", "iptables", XTABLES, || answering("ip6tables-save", "--version")),
    xtables("ip6tables-restore", "iptables", XTABLES, || answering("ip6tables-restore", "--version")),
];

/// The peers always come from packages: a comparison names the version that it was made with.
const PEERS: &[Program] = &[
    relocated("containerd", "containerd", "usr/bin/containerd", || None),
    relocated("containerd-shim-runc-v2", "containerd", "usr/bin/containerd-shim-runc-v2", || None),
    relocated("ctr", "containerd", "usr/bin/ctr", || None),
];

/// What boots a virtual machine and makes its disk.
const MACHINE: &[Program] = &[
    relocated("qemu-system-x86_64", "qemu-system-x86", "usr/bin/qemu-system-x86_64", || {
        answering("qemu-system-x86_64", "--version")
    }),
    relocated("mke2fs", "e2fsprogs", "usr/sbin/mke2fs", || answering("mke2fs", "-V")),
];

const fn relocated(
    name: &'static str,
    package: &'static str,
    file: &'static str,
    system: fn() -> Option<PathBuf>,
) -> Program {
    Program { name, package, file, form: Form::Relocated, system }
}

const fn xtables(
    name: &'static str,
    package: &'static str,
    file: &'static str,
    system: fn() -> Option<PathBuf>,
) -> Program {
    Program { name, package, file, form: Form::Xtables, system }
}

/// The recipe of the engines' prefix.
pub(crate) fn engines(places: &Places) -> Recipe {
    Recipe { place: places.engines(), programs: ENGINES }
}

/// The recipe of the peers' prefix.
pub(crate) fn peers(places: &Places) -> Recipe {
    Recipe { place: places.peers(), programs: PEERS }
}

/// The recipe of the virtual machine's prefix.
pub(crate) fn machine(places: &Places) -> Recipe {
    Recipe { place: places.dev.join("machine"), programs: MACHINE }
}

/// Sets up the engines' prefix if need be, and tries the new ones.
pub(crate) fn set_up_engines(places: &Places) -> Result<()> {
    let _lock = places.lock()?;
    let recipe = engines(places);
    if recipe.make(places)? {
        check(&recipe.place)?;
    }
    Ok(())
}

/// Sets up the peers' prefix if need be.
pub(crate) fn set_up_peers(places: &Places) -> Result<()> {
    let _lock = places.lock()?;
    let recipe = peers(places);
    if recipe.make(places)? {
        let containerd = recipe.place.join("bin/containerd");
        run(Command::new(&containerd).arg("--version"), SHORT).context("try the peers that were set up")?;
    }
    Ok(())
}

/// `PATH` with the engines first.
pub(crate) fn path_with(engines: &Path) -> OsString {
    let mut path = OsString::from(engines.join("bin"));
    path.push(":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    path
}

/// Runs each engine once: a broken relocation shows here and not in the middle of a test.
fn check(prefix: &Path) -> Result<()> {
    let path = path_with(prefix);
    for name in ["criu", "runc", "docker-registry", "nft", "iptables"] {
        run(Command::new(prefix.join("bin").join(name)).arg("--version").env("PATH", &path), SHORT)
            .context("try the engines that were set up")?;
    }
    let said = ask(Command::new(prefix.join("bin/criu")).arg("check").env("PATH", &path), SHORT)?;
    if !said.status.success() {
        bail!("criu check says that this kernel lacks what checkpoint and restore need: {}", said.stderr.trim_end());
    }
    Ok(())
}

fn system_criu() -> Option<PathBuf> {
    let criu = find_program("criu")?;
    let said = ask(Command::new(&criu).arg("--version"), SHORT).ok()?;
    let works = || ask(Command::new(&criu).arg("check"), SHORT).is_ok_and(|said| said.status.success());
    (version_in(&said.stdout)? >= CRIU_NEEDED && works()).then_some(criu)
}

fn system_runc() -> Option<PathBuf> {
    let runc = find_program("runc")?;
    let version = ask(Command::new(&runc).arg("--version"), SHORT).ok()?;
    let features = ask(Command::new(&runc).arg("features"), SHORT).ok()?;
    (version_in(&version.stdout)? >= RUNC_NEEDED && features.stdout.contains("checkpoint")).then_some(runc)
}

/// A directory of plugins counts if all that our networks use are there and speak the version.
fn system_cni() -> Option<PathBuf> {
    let speaks = |dir: &Path, plugin: &str| {
        let mut command = Command::new(dir.join(plugin));
        command.env("CNI_COMMAND", "VERSION");
        ask(&mut command, SHORT).is_ok_and(|said| said.stdout.contains(CNI_NEEDED))
    };
    let plugins = ["bridge", "host-local", "loopback", "portmap", "firewall"];
    ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
        .map(PathBuf::from)
        .into_iter()
        .find(|dir| plugins.iter().all(|plugin| speaks(dir, plugin)))
}

/// Test images are made of it, so it must run without any library.
fn system_busybox() -> Option<PathBuf> {
    let busybox = answering("busybox", "--list")?;
    let bytes = fs::read(&busybox).ok()?;
    let named = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    (!named(b"/ld-linux") && !named(b"/ld-musl")).then_some(busybox)
}

fn answering(name: &str, argument: &str) -> Option<PathBuf> {
    let program = find_program(name)?;
    ask(Command::new(&program).arg(argument), SHORT).is_ok_and(|said| said.status.success()).then_some(program)
}

/// The first dotted number in a version text, as three parts.
fn version_in(text: &str) -> Option<[u32; 3]> {
    let word = text
        .split_whitespace()
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()) && word.contains('.'))?;
    let mut parts = word.split(|part: char| !part.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    Some([parts.next()?, parts.next().unwrap_or(0), parts.next().unwrap_or(0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_programs_print_them() {
        let check = |text: &str, expected| assert_eq!(version_in(text), expected, "{text}");
        check("Version: 4.2.1\nGitID: v4.2.1-1", Some([4, 2, 1]));
        check("runc version 1.3.6+ds1\ncommit: 1.3.6", Some([1, 3, 6]));
        check("runc version 1.2\n", Some([1, 2, 0]));
        check("no number here", None);
    }

    #[test]
    fn an_older_version_is_less_than_the_needed() {
        assert!(version_in("Version: 4.1.1").unwrap() < CRIU_NEEDED);
        assert!(version_in("Version: 4.10").unwrap() > CRIU_NEEDED);
    }
}
