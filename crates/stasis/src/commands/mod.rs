//! The commands, a file for each group.

mod checkpoint;
mod containers;
mod debug;
mod doctor;
mod images;
mod logs;
mod pods;
mod reference;
mod restore;
mod stored;

use serde::Serialize;

use crate::cli::{Cli, Command};
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::units::short_id;

/// Exit code of a command that ran to its end: 0, but for `exec` and `doctor`.
pub(crate) type Done = Result<u8>;

/// Runs the command.
pub(crate) async fn run(cli: Cli) -> Done {
    let output = Output::new(&cli.global);
    let global = cli.global;
    let connect = || Client::connect(&global);
    match cli.command {
        Command::Completions { shell } => return reference::completions(shell),
        Command::Man { dir } => return reference::man(dir.as_deref()),
        Command::Version { client: true } => return reference::client_version(output),
        Command::Version { client: false } => return reference::version(connect().await, output),
        Command::Checkpoint(command) => return checkpoint::run(&global, output, command).await,
        Command::Doctor => return doctor::doctor(&connect().await?, output).await,
        Command::Exec { container, command } => {
            return containers::exec(&connect().await?, &container, command, global.timeout).await;
        }
        Command::Ps { all } => containers::ps(&connect().await?, output, all).await,
        Command::Stop { containers, time } => containers::stop(&connect().await?, output, &containers, time).await,
        Command::Rm { containers, force } => containers::rm(&connect().await?, output, &containers, force).await,
        Command::Debug(command) => debug::run(&connect().await?, output, command).await,
        Command::Pods => pods::pods(&connect().await?, output).await,
        Command::Stopp { pods } => pods::stop(&connect().await?, output, &pods).await,
        Command::Rmp { pods, force } => pods::remove(&connect().await?, output, &pods, force).await,
        Command::Images => images::images(&connect().await?, output).await,
        Command::Pull { reference, credentials } => {
            let credentials = images::credentials(credentials)?;
            images::pull(&connect().await?, output, &reference, credentials).await
        }
        Command::Push { image, target, credentials } => {
            let credentials = images::credentials(credentials)?;
            images::push(&connect().await?, output, &image, target, credentials).await
        }
        Command::Import { path, reference } => images::import(&connect().await?, output, &path, reference).await,
        Command::Export { image, path } => images::export(&connect().await?, output, &image, &path).await,
        Command::Rmi { images } => images::remove(&connect().await?, output, &images).await,
        Command::Logs(logs) => logs::logs(&connect().await?, &logs).await,
        Command::Restore(restore) => restore::restore(&connect().await?, output, restore).await,
    }?;
    Ok(0)
}

/// The same operation on several objects: all are tried, whatever fails.
#[derive(Debug)]
struct Batch {
    output: Output,
    /// What was done: "stopped", "removed".
    verb: &'static str,
    done: Vec<Outcome>,
    failures: Vec<Failure>,
}

/// What was done to one object of a [`Batch`].
#[derive(Debug, Serialize)]
struct Outcome {
    id: String,
    outcome: &'static str,
}

impl Batch {
    fn new(output: Output, verb: &'static str) -> Self {
        Self { output, verb, done: Vec::new(), failures: Vec::new() }
    }

    /// Takes the result for the object that was called `name`: its ID, or a failure. People see it at once.
    fn note(&mut self, name: &str, result: Result<String>) {
        let printed = result.and_then(|id| {
            self.output.line(&format!("{} {name} ({})", self.verb, short_id(&id)), &id)?;
            Ok(id)
        });
        match printed {
            Ok(id) => self.done.push(Outcome { id, outcome: self.verb }),
            Err(failure) => self.failures.push(failure),
        }
    }

    /// Programs get one list. Of several failures all but the last are printed, and the last decides the exit code.
    fn finish(mut self) -> Result<()> {
        self.output.structure(&self.done)?;
        let Some(last) = self.failures.pop() else { return Ok(()) };
        for failure in self.failures {
            eprintln!("{}", failure.text());
        }
        Err(last)
    }
}

/// An absolute path for the daemon, which has another working directory.
fn absolute(path: &std::path::Path) -> Result<String> {
    let absolute =
        std::path::absolute(path).map_err(|source| Failure::Io { what: "resolve", path: path.into(), source })?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|path| Failure::Usage(format!("the path {} is not UTF-8", path.display())))
}
