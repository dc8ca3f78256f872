//! The command line of stasisd, and the subcommands that need no daemon.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use stasis_cri_api::stasis::finding::Level;

use crate::config::{self, Config};

/// Kubernetes container runtime (CRI v1) that freezes and thaws running containers.
///
/// Without a subcommand it serves CRI on a unix socket until SIGTERM; containers keep running.
#[derive(Debug, Parser)]
#[command(name = "stasisd", version)]
pub(crate) struct Cli {
    /// Configuration file [default: /etc/stasis/config.toml, if it exists].
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,

    /// Directory of images, snapshots and state; instead of `root` in the configuration.
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) root: Option<PathBuf>,

    /// Directory of the socket and the running pods; instead of `state` in the configuration.
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) state: Option<PathBuf>,

    /// Socket to serve on, unix:///PATH or an absolute path; instead of `listen` in the configuration.
    #[arg(long, value_name = "SOCKET", global = true)]
    pub(crate) listen: Option<String>,

    /// Level of the log messages: error, warn, info, debug, trace; instead of `log.level` in the configuration.
    #[arg(long, value_name = "LEVEL", global = true)]
    pub(crate) log_level: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print or check the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print what is found of the engines and of the kernel, what is missing, and what that disables.
    Doctor,
    /// Print completions for a shell.
    Completions {
        /// The shell to complete for.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff), for `man -l -`.
    Man,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the default configuration with a sentence about every key.
    Default,
    /// Print the configuration in effect, each value with where it comes from: option, line of the file, or default.
    Dump,
    /// Check a configuration file and say what is wrong with it, by line and column.
    Check {
        /// The file [default: that of --config, else /etc/stasis/config.toml].
        file: Option<PathBuf>,
    },
}

impl Cli {
    /// The configuration: the file, overruled by the command line.
    pub(crate) fn settings(&self) -> anyhow::Result<Config> {
        let mut config = Config::load(self.config.as_deref())?;
        config.root = overruled(&self.root, config.root)?;
        config.state = overruled(&self.state, config.state)?;
        if let Some(listen) = &self.listen {
            config.listen = Some(listen.clone());
            anyhow::ensure!(
                config.socket().is_absolute(),
                "--listen {listen}: neither unix:///PATH nor an absolute path; other sockets are not served"
            );
        }
        if let Some(level) = &self.log_level {
            crate::log::filter(level)
                .map_err(|_| anyhow::anyhow!("--log-level {level}: use error, warn, info, debug or trace"))?;
            config.log.level.clone_from(level);
        }
        Ok(config)
    }
}

impl Cli {
    /// The keys that the command line sets, each with its option.
    fn overruled(&self) -> Vec<(&'static str, &'static str)> {
        let options = [
            (self.root.is_some(), "root", "--root"),
            (self.state.is_some(), "state", "--state"),
            (self.listen.is_some(), "listen", "--listen"),
            (self.log_level.is_some(), "log.level", "--log-level"),
        ];
        options.into_iter().filter(|(given, _, _)| *given).map(|(_, key, option)| (key, option)).collect()
    }
}

/// The path given on the command line, made absolute; else the configured one.
fn overruled(given: &Option<PathBuf>, configured: PathBuf) -> anyhow::Result<PathBuf> {
    match given {
        Some(path) => Ok(std::path::absolute(path)?),
        None => Ok(configured),
    }
}

/// `stasisd config …`
pub(crate) fn config_command(command: &ConfigCommand, cli: &Cli) -> anyhow::Result<()> {
    let of_option = cli.config.as_deref();
    match command {
        ConfigCommand::Dump => print(config::dump(&cli.settings()?, of_option, &cli.overruled())?.as_bytes()),
        ConfigCommand::Default => print(config::DEFAULT_TOML.as_bytes()),
        ConfigCommand::Check { file } => {
            let path = file.as_deref().or(of_option).unwrap_or(Path::new(config::DEFAULT_PATH));
            Config::load(Some(path))?;
            print(format!("{}: no mistakes found\n", path.display()).as_bytes())
        }
    }
}

/// `stasisd completions SHELL`
pub(crate) fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "stasisd", &mut script);
    print(&script)
}

/// `stasisd man`
pub(crate) fn man() -> anyhow::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    print(&page)
}

/// `stasisd doctor`. Fails if something is missing without which no pod runs.
pub(crate) fn doctor(config: &Config) -> anyhow::Result<()> {
    let findings = crate::doctor::examine(config);
    print(crate::doctor::report(&findings).as_bytes())?;
    let errors = findings.iter().filter(|finding| finding.level() == Level::Error).count();
    anyhow::ensure!(errors == 0, "{errors} finding(s) keep pods from running");
    Ok(())
}

/// Says on standard error why the program failed.
pub(crate) fn fail(error: &anyhow::Error) -> ExitCode {
    // Nobody may be reading; there is no other place to say it.
    let _ = writeln!(std::io::stderr(), "stasisd: {}", chain(error));
    ExitCode::FAILURE
}

/// The error and its causes in one line. Errors that already say their cause are not made to say it twice.
fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// Writes to standard output; a reader that went away (`| head`) is no error.
pub(crate) fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_cause_is_said_twice() {
        let error = Config::load(Some(Path::new("/nonexistent"))).unwrap_err();
        let error = anyhow::Error::from(error).context("cannot begin");
        let expected =
            "cannot begin: cannot read the configuration /nonexistent: No such file or directory (os error 2)";
        assert_eq!(chain(&error), expected);
    }

    #[test]
    fn options_overrule_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "root = \"/a\"\nstate = \"/b\"\n[log]\nlevel = \"warn\"\n").unwrap();
        let args = ["stasisd", "--root", "/c", "--log-level", "debug", "--config"];
        let cli = Cli::parse_from(args.map(Into::into).into_iter().chain([file.path().as_os_str().to_owned()]));
        let config = cli.settings().unwrap();
        assert_eq!((config.root.as_path(), config.state.as_path()), (Path::new("/c"), Path::new("/b")));
        assert_eq!(config.log.level, "debug");
    }

    #[test]
    fn only_unix_sockets_are_listened_on() {
        let cli = Cli::parse_from(["stasisd", "--listen", "tcp://1.2.3.4:5", "--config", "/dev/null"]);
        let error = cli.settings().unwrap_err().to_string();
        assert!(error.starts_with("--listen tcp://1.2.3.4:5: neither unix:///PATH"), "{error}");
    }
}
