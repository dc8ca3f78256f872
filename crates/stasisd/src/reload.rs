//! SIGHUP: the configuration is read anew, and the part of it that can change while the daemon runs takes effect.
//!
//! A file that is refused changes nothing. Of keys outside of that part it is said that they wait for a restart.

use std::sync::{Arc, PoisonError, RwLock};

use stasis_cri::Parts;
use stasis_pod::Pods;

use crate::config::Config;
use crate::engines::Engines;
use crate::log::Level;
use crate::parts::probe_criu;

/// The keys that can change while the daemon runs.
pub(crate) const RELOADABLE: [&str; 5] = [
    "checkpoint.archive_dirs",
    "checkpoint.level",
    "checkpoint.max_timeout_seconds",
    "limits.shutdown_grace_seconds",
    "log.level",
];

/// What a reload changes.
#[derive(Debug)]
pub(crate) struct Reload {
    /// What the daemon was started with, and what was changed of it since.
    current: Config,
    level: Level,
    pods: Pods,
    shown: Arc<RwLock<String>>,
}

impl Reload {
    pub(crate) fn new(config: &Config, level: Level, parts: &Parts) -> Self {
        Self { current: config.clone(), level, pods: parts.pods.clone(), shown: Arc::clone(&parts.configuration) }
    }

    /// The configuration in effect.
    pub(crate) fn current(&self) -> &Config {
        &self.current
    }

    /// Puts what may change of `read` into effect; says what was done and what waits.
    pub(crate) async fn apply(&mut self, read: anyhow::Result<Config>) {
        let read = match read {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the configuration is refused; the old one stays");
                return;
            }
        };
        let (changed, waiting) = differences(&self.current, &read);
        let checkpoint = &mut self.current.checkpoint;
        checkpoint.level = read.checkpoint.level;
        checkpoint.archive_dirs = read.checkpoint.archive_dirs;
        checkpoint.max_timeout_seconds = read.checkpoint.max_timeout_seconds;
        self.current.limits.shutdown_grace_seconds = read.limits.shutdown_grace_seconds;
        self.current.log.level = read.log.level;
        self.level.set(&self.current.log.level);
        let config = self.current.clone();
        // CRIU is asked anew: it may have come since.
        let probed = tokio::task::spawn_blocking(move || probe_criu(&config, &Engines::locate(&config)));
        let unavailable = match probed.await {
            Ok((unavailable, _)) => unavailable,
            Err(error) => Some(format!("CRIU was asked in vain what it can do: {error}")),
        };
        self.pods.set_policy(self.current.policy(unavailable));
        let shown = serde_json::to_string(&self.current).unwrap_or_default();
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = shown;
        tracing::info!(?changed, "the configuration was read anew");
        if !waiting.is_empty() {
            tracing::warn!(?waiting, "these keys have changed, too, and wait for a restart of stasisd");
        }
    }
}

/// The keys whose values differ: those that take effect, and those that wait.
fn differences(old: &Config, new: &Config) -> (Vec<String>, Vec<String>) {
    let (old, new) = (old.values(), new.values());
    let mut keys: Vec<_> = old.keys().chain(new.keys()).filter(|key| old.get(*key) != new.get(*key)).cloned().collect();
    keys.sort();
    keys.dedup();
    keys.into_iter().partition(|key| RELOADABLE.contains(&key.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_take_effect_are_told_from_those_that_wait() {
        let mut new = Config::default();
        new.log.level = "debug".into();
        new.root = "/elsewhere".into();
        new.checkpoint.max_timeout_seconds = 7;
        let (changed, waiting) = differences(&Config::default(), &new);
        assert_eq!(changed, ["checkpoint.max_timeout_seconds", "log.level"]);
        assert_eq!(waiting, ["root"]);
        assert_eq!(differences(&new, &new), (vec![], vec![]));
    }

    #[test]
    fn every_reloadable_key_exists() {
        let keys = Config::default().values();
        assert!(RELOADABLE.iter().all(|key| keys.contains_key(*key)), "{keys:?}");
    }
}
