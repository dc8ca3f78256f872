//! stasisd: the daemon of Stasis. Configuration, start-up, signals; everything else is in the libraries.

// The daemon itself follows once the parts that it puts together are there.
#![allow(dead_code)]

mod cli;
mod config;
mod doctor;
mod engines;
mod listen;
mod log;
mod state;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        None => Err(anyhow::anyhow!("not built yet")),
        Some(Command::Config(command)) => cli::config_command(command, cli.config.as_deref()),
        Some(Command::Doctor) => cli.settings().and_then(|config| cli::doctor(&config)),
        Some(Command::Completions { shell }) => cli::completions(*shell),
        Some(Command::Man) => cli::man(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&error),
    }
}
