//! The programs and the files of their configuration: OCI runtime, CRIU, shim, pod network.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use stasis_cni::Cni;
use stasis_cri_api::stasis::Finding;
use stasis_sys::capture::{Limits, capture};

use super::{at, error, fine, warning};
use crate::config::{Config, Level};
use crate::engines::{self, Engines};

/// For one question to a program; it answers in milliseconds.
const LIMITS: Limits = Limits { time: Duration::from_secs(10), stdout: 64 * 1024, stderr_tail: 1024 };

/// What `runc features` says of its own checkpoint and restore.
const CHECKPOINT_BUILT_IN: &str = "org.opencontainers.runc.checkpoint.enabled";

/// The OCI runtime: there, answering, with checkpoint built in.
pub(super) fn runc(config: &Config, engines: &Engines) -> Finding {
    let name = config.engines.runc.display();
    let Some(path) = &engines.runc else {
        let consequence = format!("no container can run: install {name}, or set [engines] runc to its path");
        return error("runc", "not found", consequence);
    };
    let finding = match first_line(path, "--version") {
        Ok(version) => match engines::features(path) {
            Some(features)
                if features.annotations.get(CHECKPOINT_BUILT_IN).is_some_and(|built_in| built_in == "false") =>
            {
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

/// The pod network: a valid configuration and all the programs that it names.
pub(super) fn network(config: &Config, engines: &Engines) -> Finding {
    match Cni::new(config.network(engines)).status() {
        Ok(network) => {
            let plugins = network.plugins.join(" ");
            at(&network.file, fine("cni", format!("network {} ({}): {plugins}", network.name, network.cni_version)))
        }
        Err(not_ready) => {
            let consequence = format!("only pods in the host's network run: {not_ready}");
            at(&config.cni.conf_dir, warning("cni", "not ready", consequence))
        }
    }
}

fn first_line(program: &Path, argument: &str) -> Result<String, String> {
    let answer = capture(Command::new(program).arg(argument), &[], &LIMITS).map_err(|failure| failure.to_string())?;
    if !answer.status.success() {
        return Err(format!("ended with {}: {}", answer.status, String::from_utf8_lossy(&answer.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&answer.stdout).lines().next().unwrap_or_default().to_owned())
}
