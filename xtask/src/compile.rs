//! Builds of the workspace.

use std::env;
use std::process::Command;

use anyhow::Result;

use crate::places::{Places, SHIM_PROFILE};
use crate::process::{BUILD, show};

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
