//! The programs and the files of their configuration: OCI runtime, CRIU, shim, network plugins.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stasis_cri_api::stasis::Finding;
use stasis_sys::capture::{Limits, capture};

use super::{at, error, fine, warning};
use crate::config::{Config, Level};
use crate::engines::Engines;

/// For one question to a program; it answers in milliseconds.
const LIMITS: Limits = Limits { time: Duration::from_secs(10), stdout: 64 * 1024, stderr_tail: 1024 };

/// Largest network configuration that is read: the usual ones have a few hundred bytes.
const CONF_MAX: u64 = 1024 * 1024;

/// Plugins that the usual bridge network needs.
const USUAL_PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// The OCI runtime: there, answering, with checkpoint built in.
pub(super) fn runc(config: &Config, engines: &Engines) -> Finding {
    let name = config.engines.runc.display();
    let Some(path) = &engines.runc else {
        let consequence = format!("no container can run: install {name}, or set [engines] runc to its path");
        return error("runc", "not found", consequence);
    };
    let finding = match first_line(path, "--version") {
        Ok(version) => match features(path) {
            Some(features) if !features.checkpoint => {
                let consequence =
                    "no checkpoints and restores: it was built without them; use Debian's or upstream's build";
                warning("runc", version, consequence)
            }
            _ => fine("runc", version),
        },
        Err(why) => error("runc", "does not answer", format!("no container can run: {path:?} {why}")),
    };
    at(path, finding)
}

/// CRIU: there, new enough, working on this kernel.
pub(super) fn criu(config: &Config, engines: &Engines) -> Finding {
    if config.checkpoint.level == Level::None {
        return fine("criu", "not looked for: checkpoint.level is \"none\"");
    }
    let name = config.engines.criu.display();
    let Some(path) = &engines.criu else {
        let version = stasis_criu::MIN_VERSION;
        let consequence = format!(
            "no checkpoints and restores: install {name} {version} or later, or set [engines] criu to its path"
        );
        return warning("criu", "not found", consequence);
    };
    let finding = match stasis_criu::probe(path) {
        Err(failure) => warning("criu", "does not answer", format!("no checkpoints and restores: {failure}")),
        Ok(probe) => match &probe.refusal {
            Some(refusal) => {
                warning("criu", probe.version.to_string(), format!("no checkpoints and restores: {refusal}"))
            }
            None => {
                let has: Vec<_> = probe.features.iter().filter(|(_, has)| **has).map(|(name, _)| *name).collect();
                fine("criu", format!("{} ({})", probe.version, has.join(" ")))
            }
        },
    };
    at(path, finding)
}

/// The program of our shim.
pub(super) fn shim(config: &Config, engines: &Engines) -> Finding {
    match (&engines.shim, &config.shim.path) {
        (Some(path), _) => at(path, fine("shim", "found")),
        (None, Some(path)) => {
            let consequence = "no pod can run: there is no such program; correct [shim] path";
            at(path, error("shim", "not found", consequence))
        }
        (None, None) => {
            let consequence = "no pod can run: put containerd-shim-stasis-v1 beside stasisd, or set [shim] path";
            error("shim", "not found", consequence)
        }
    }
}

/// The network configuration: the first by name, as CNI says.
pub(super) fn cni_configuration(config: &Config) -> Finding {
    let dir = &config.cni.conf_dir;
    match configurations(dir).first() {
        Some(first) => at(first, fine("cni config", format!("{} plugin(s)", plugins_of(first).len()))),
        None => {
            let consequence = "only pods in the host's network run: install a network add-on, or set [cni] conf_dir";
            at(dir, warning("cni config", "no .conflist, .conf or .json file", consequence))
        }
    }
}

/// The plugins that the network configuration names; without one, those of the usual bridge network.
pub(super) fn cni_plugins(config: &Config) -> Finding {
    let named = configurations(&config.cni.conf_dir).first().map(|first| plugins_of(first)).unwrap_or_default();
    let needed = if named.is_empty() { USUAL_PLUGINS.map(str::to_owned).into() } else { named };
    let there = |plugin: &&String| config.cni.bin_dirs.iter().any(|dir| dir.join(plugin).is_file());
    let missing: Vec<_> = needed.iter().filter(|plugin| !there(plugin)).map(String::as_str).collect();
    let dirs: Vec<_> = config.cni.bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
    let dirs = dirs.join(":");
    if missing.is_empty() {
        let needed: Vec<_> = needed.iter().map(String::as_str).collect();
        return Finding { path: dirs, ..fine("cni plugins", needed.join(" ")) };
    }
    let consequence =
        "pods with a network of their own fail: install containernetworking-plugins, or set [cni] bin_dirs";
    Finding { path: dirs, ..warning("cni plugins", format!("missing: {}", missing.join(" ")), consequence) }
}

fn configurations(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let is_conf = |path: &PathBuf| {
        path.extension().is_some_and(|ext| ["conflist", "conf", "json"].map(AsRef::as_ref).contains(&ext))
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_conf).collect();
    paths.sort();
    paths
}

/// Plugins named in a configuration, with those for addresses.
fn plugins_of(path: &Path) -> BTreeSet<String> {
    let text = stasis_sys::path::read_limited(path, CONF_MAX).unwrap_or_default();
    let conf: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let list = conf["plugins"].as_array().cloned().unwrap_or_else(|| vec![conf.clone()]);
    let names = list.iter().flat_map(|plugin| [&plugin["type"], &plugin["ipam"]["type"]]);
    names.filter_map(|name| name.as_str()).map(str::to_owned).collect()
}

struct Features {
    checkpoint: bool,
}

/// What `runc features` says; nothing for runtimes that have no such command.
fn features(runc: &Path) -> Option<Features> {
    let answer =
        capture(Command::new(runc).arg("features"), &[], &LIMITS).ok().filter(|answer| answer.status.success())?;
    let features: serde_json::Value = serde_json::from_slice(&answer.stdout).ok()?;
    let checkpoint = &features["annotations"]["org.opencontainers.runc.checkpoint.enabled"];
    Some(Features { checkpoint: checkpoint.as_str() != Some("false") })
}

fn first_line(program: &Path, argument: &str) -> Result<String, String> {
    let answer = capture(Command::new(program).arg(argument), &[], &LIMITS).map_err(|failure| failure.to_string())?;
    if !answer.status.success() {
        return Err(format!("ended with {}: {}", answer.status, String::from_utf8_lossy(&answer.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&answer.stdout).lines().next().unwrap_or_default().to_owned())
}
