//! Where log messages go and which: standard error, as text or JSON, by a level or a filter.

use std::fmt;
use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::reload;

use crate::config::{Log, LogFormat};

/// The filter of a level ("info") or of a list of directives ("info,stasis_pod=debug").
pub(crate) fn filter(level: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(level)
}

/// Changes which messages are written while the process runs.
pub(crate) struct Level(Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>);

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Level")
    }
}

impl Level {
    /// From here on messages of this level are written. The level has been checked.
    pub(crate) fn set(&self, level: &str) {
        let Ok(filter) = filter(level) else { return };
        if let Err(error) = (self.0)(filter) {
            tracing::error!(%error, "cannot change the level of the log");
        }
    }
}

/// Sends the messages of this process to standard error from here on.
pub(crate) fn start(log: &Log) -> anyhow::Result<Level> {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(&log.level)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let (level, started) = match log.format {
        LogFormat::Text => {
            let subscriber = subscriber.with_target(false).with_filter_reloading();
            let handle = subscriber.reload_handle();
            (Level(Box::new(move |filter| handle.reload(filter))), subscriber.try_init())
        }
        LogFormat::Json => {
            let subscriber = subscriber.json().flatten_event(true).with_filter_reloading();
            let handle = subscriber.reload_handle();
            (Level(Box::new(move |filter| handle.reload(filter))), subscriber.try_init())
        }
    };
    started.map_err(|error| anyhow::anyhow!("cannot start logging: {error}"))?;
    Ok(level)
}
