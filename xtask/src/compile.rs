//! Builds of the workspace, and where their programs are.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::places::Places;
use crate::process::{BUILD, show};

/// The profile that makes the shim small.
const SHIM_PROFILE: &str = "shim";

/// cargo, the one that runs this task.
pub(crate) fn cargo(places: &Places) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&places.repository).env("CARGO_TARGET_DIR", &places.target);
    command
}

/// Builds the daemon and the command line, and the shim with its own profile.
pub(crate) fn programs(places: &Places) -> Result<()> {
    // All of the workspace but this task: features are then the same as for the tests, and nothing is built twice.
    show(cargo(places).args(["build", "--release", "--quiet", "--workspace", "--bins", "--exclude", "xtask"]), BUILD)?;
    show(cargo(places).args(["build", "--profile", SHIM_PROFILE, "--quiet", "--package", "stasis-shim"]), BUILD)
}

/// Directory of `stasisd` and `stasis`.
pub(crate) fn bin(places: &Places) -> PathBuf {
    places.target.join("release")
}

/// The daemon.
pub(crate) fn daemon(places: &Places) -> PathBuf {
    bin(places).join("stasisd")
}

/// The command line.
pub(crate) fn command_line(places: &Places) -> PathBuf {
    bin(places).join("stasis")
}

/// The shim.
pub(crate) fn shim(places: &Places) -> PathBuf {
    places.target.join(SHIM_PROFILE).join("containerd-shim-stasis-v1")
}
