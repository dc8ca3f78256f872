//! Programs that are not ours, by which the tests speak to the daemon, and read what it wrote, as users do.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::places::Places;
use crate::prefix::{Form, Program, Recipe};
use crate::process::{SHORT, run};

/// Always from packages: what is tested against does not change with the machine.
const CLIENTS: &[Program] =
    &[packaged("kubectl", "usr/bin/kubectl"), packaged("checkpointctl", "usr/bin/checkpointctl")];

const fn packaged(name: &'static str, file: &'static str) -> Program {
    Program { name, package: name, file, form: Form::Relocated, system: || None }
}

/// The recipe of the clients' prefix.
pub(crate) fn clients(places: &Places) -> Recipe {
    Recipe { place: places.clients(), programs: CLIENTS }
}

/// Sets up the clients' prefix if need be, and tries the new ones.
pub(crate) fn set_up(places: &Places) -> Result<()> {
    let _lock = places.lock()?;
    let recipe = clients(places);
    if recipe.make(places)? {
        for (name, arguments) in [("kubectl", &["version", "--client"][..]), ("checkpointctl", &["--help"])] {
            let mut client = Command::new(recipe.place.join("bin").join(name));
            run(client.args(arguments), SHORT).with_context(|| format!("try {name}, which was set up"))?;
        }
    }
    Ok(())
}
