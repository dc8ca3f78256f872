//! stasisd: the daemon of Stasis. Configuration, start-up, signals; everything else is in the libraries.

mod cli;
mod config;
mod doctor;
mod engines;
mod listen;
mod log;
mod metrics;
mod parts;
mod reload;
mod serve;
mod settings;
mod state;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};

/// Threads for blocking work (hashing, unpacking, fsync): enough to keep a disk busy, few enough to stay small.
const BLOCKING_THREADS_MAX: usize = 64;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        None => run(&cli),
        Some(Command::Config(command)) => cli::config_command(command, &cli),
        Some(Command::Doctor) => cli.settings().and_then(|config| cli::doctor(&config)),
        Some(Command::Completions { shell }) => cli::completions(*shell),
        Some(Command::Man) => cli::man(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&error),
    }
}

/// The daemon, from its settings to its end.
fn run(cli: &Cli) -> anyhow::Result<()> {
    let config = cli.settings()?;
    let level = log::start(&config.log)?;
    let (root, state) = (config.root.display(), config.state.display());
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %root, %state, "starting");
    let directories = state::Directories::claim(&config)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build()?;
    runtime.block_on(async {
        let mut signals = serve::Signals::catch()?;
        let parts = tokio::select! {
            parts = parts::build(&config) => parts?,
            // What was begun is found and cleared at the next start.
            _ = signals.next() => return Ok(()),
        };
        let socket = listen::Socket::bind(&config.socket())?;
        let reload = reload::Reload::new(&config, level, &parts);
        serve::until_signalled(reload, || cli.settings(), parts, socket, signals).await
    })?;
    // A read that hangs in the kernel must not hold up the end.
    runtime.shutdown_background();
    drop(directories);
    Ok(())
}
