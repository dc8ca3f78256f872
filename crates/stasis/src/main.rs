//! The command line for operators: a thin client of stasisd's socket.
//!
//! It knows no state and no engine: everything goes through CRI and stasis.v1, but for two things that are read from
//! disk, a container's log and a checkpoint archive. Results go to standard output in one of three forms; progress,
//! errors and hints to standard error.
//!
//! ```text
//!   cli       what is accepted           commands  a file for each group of commands
//!   client    the socket                 lookup    names and beginnings of IDs
//!   output    tables, JSON, YAML         progress  bars and lines
//!   failure   words and exit codes       crilog    CRI's log files
//! ```

mod cli;
mod client;
mod commands;
mod crilog;
mod failure;
mod lookup;
mod output;
mod progress;
mod units;
mod yaml;

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot begin: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_closed_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{}", failure.text());
            ExitCode::from(failure.exit_code())
        }
    }
}
