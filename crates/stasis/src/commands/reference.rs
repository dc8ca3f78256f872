//! `version`, `completions`, `man`: what needs no daemon.

use std::path::Path;

use clap::CommandFactory as _;
use serde::Serialize;

use super::Done;
use crate::cli::Cli;
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::output::{Output, print};

const NAME: &str = "stasis";

#[derive(Serialize)]
struct Versions<'a> {
    client: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon: Option<Daemon<'a>>,
}

#[derive(Serialize)]
struct Daemon<'a> {
    name: &'a str,
    version: &'a str,
    api: &'a str,
}

pub(crate) fn client_version(output: Output) -> Done {
    let client = env!("CARGO_PKG_VERSION");
    output.item(&Versions { client, daemon: None }, &format!("{NAME} {client}"), client)?;
    Ok(0)
}

/// Both versions; without a daemon, ours and then the failure.
pub(crate) fn version(connection: Result<Client>, output: Output) -> Done {
    let answer = match connection {
        Ok(client) => client.version,
        Err(failure) => {
            client_version(output)?;
            return Err(failure);
        }
    };
    let client = env!("CARGO_PKG_VERSION");
    let (version, api) = (answer.runtime_version.as_str(), answer.runtime_api_version.as_str());
    let daemon = Some(Daemon { name: &answer.runtime_name, version, api });
    output.item(&Versions { client, daemon }, &format!("{NAME} {client}\nstasisd {version} (CRI {api})"), version)?;
    Ok(0)
}

pub(crate) fn completions(shell: clap_complete::Shell) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

/// The main page to standard output, or all pages into a directory.
pub(crate) fn man(dir: Option<&Path>) -> Done {
    match dir {
        Some(dir) => clap_mangen::generate_to(Cli::command(), dir).map_err(|source| Failure::Io {
            what: "write manual pages to",
            path: dir.to_owned(),
            source,
        })?,
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page).map_err(Failure::Output)?;
            print(&String::from_utf8_lossy(&page))?;
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        man(Some(dir.path())).unwrap();
        for name in ["stasis", "stasis-ps", "stasis-checkpoint", "stasis-checkpoint-create", "stasis-restore"] {
            let page = std::fs::read_to_string(dir.path().join(format!("{name}.1"))).unwrap();
            assert!(page.contains(".TH") && page.contains("\\-\\-address"), "{name}");
        }
        assert!(man(Some(&dir.path().join("absent"))).unwrap_err().text().contains("absent"));
    }

    #[test]
    fn completions_know_the_commands() {
        for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("to-image") && script.contains("creds-stdin"), "{shell}");
        }
    }
}
