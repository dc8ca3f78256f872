//! Clients that are not ours, by which the tests speak to the daemon as users do.

use std::process::Command;

use anyhow::{Context, Result};

use crate::places::Places;
use crate::prefix::{Form, Program, Recipe};
use crate::process::{SHORT, run};

/// Always from packages: what is tested against does not change with the machine.
const CLIENTS: &[Program] =
    &[Program { name: "kubectl", package: "kubectl", file: "usr/bin/kubectl", form: Form::Relocated, system: || None }];

/// The recipe of the clients' prefix.
pub(crate) fn clients(places: &Places) -> Recipe {
    Recipe { place: places.clients(), programs: CLIENTS }
}

/// Sets up the clients' prefix if need be, and tries the new ones.
pub(crate) fn set_up(places: &Places) -> Result<()> {
    let _lock = places.lock()?;
    let recipe = clients(places);
    if recipe.make(places)? {
        let mut kubectl = Command::new(recipe.place.join("bin/kubectl"));
        run(kubectl.args(["version", "--client"]), SHORT).context("try the clients that were set up")?;
    }
    Ok(())
}
