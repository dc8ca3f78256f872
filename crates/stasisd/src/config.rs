//! The daemon's configuration: what may be set, the defaults, and refusal of everything else by line and column.
//!
//! `config/default.toml` is the documentation of every key and the list of those that exist; the structures here hold
//! the same defaults (a test compares the two). This module reads files and text; it looks at nothing else of the host.

mod document;
mod origin;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stasis_pod::{CheckpointLimits, CheckpointPolicy};

use self::document::Document;
pub(crate) use self::origin::dump;
use crate::engines::SHIM;

/// Every key with its default and a sentence about it: what `stasisd config default` prints.
pub(crate) const DEFAULT_TOML: &str = include_str!("config/default.toml");

/// Where the configuration is looked for when none is named.
pub(crate) const DEFAULT_PATH: &str = "/etc/stasis/config.toml";

/// The version of the format that this daemon reads.
const VERSION: u32 = 1;

/// Longest configuration file that is read: a hundred times the documented default one.
const FILE_MAX: u64 = 512 * 1024;

/// Name of the socket below the state directory where `listen` is not set.
const SOCKET_NAME: &str = "stasis.sock";

/// The handler that exists without being configured.
const BUILT_IN_RUNTIME: &str = "runc";

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) version: u32,
    pub(crate) root: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) listen: Option<String>,
    pub(crate) default_runtime: String,
    pub(crate) log: Log,
    pub(crate) metrics: Metrics,
    pub(crate) engines: Engines,
    pub(crate) cni: Cni,
    pub(crate) cdi: Cdi,
    pub(crate) cgroup: Cgroup,
    pub(crate) shim: Shim,
    pub(crate) runtimes: BTreeMap<String, Runtime>,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) registry: Registry,
    pub(crate) image: Image,
    pub(crate) streaming: Streaming,
    pub(crate) limits: Limits,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    pub(crate) level: String,
    pub(crate) format: LogFormat,
}

/// `[metrics]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Metrics {
    pub(crate) address: Option<SocketAddr>,
}

/// `[log] format`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// `[engines]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Engines {
    pub(crate) runc: PathBuf,
    pub(crate) criu: PathBuf,
    pub(crate) path: Vec<PathBuf>,
}

/// `[cni]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Cni {
    pub(crate) conf_dir: PathBuf,
    pub(crate) bin_dirs: Vec<PathBuf>,
    pub(crate) plugin_timeout_seconds: u64,
}

/// `[cdi]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Cdi {
    pub(crate) spec_dirs: Vec<PathBuf>,
}

/// `[cgroup]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Cgroup {
    pub(crate) driver: CgroupDriver,
}

/// `[cgroup] driver`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CgroupDriver {
    #[default]
    Auto,
    Cgroupfs,
    Systemd,
}

/// `[shim]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Shim {
    pub(crate) path: Option<PathBuf>,
}

/// `[runtimes.NAME]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Runtime {
    pub(crate) r#type: String,
    pub(crate) binary: Option<PathBuf>,
    pub(crate) checkpoint_options: Vec<String>,
    pub(crate) checkpoint_pod_options: Vec<String>,
    pub(crate) checkpoint_pod_ghost_limit_max: u64,
    pub(crate) checkpoint_pod_image_prefix: String,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Checkpoint {
    pub(crate) level: Level,
    pub(crate) archive_dirs: Vec<PathBuf>,
    pub(crate) max_timeout_seconds: u64,
    pub(crate) parallel: usize,
    pub(crate) buffer_bytes: u64,
    pub(crate) reserve_bytes: u64,
    pub(crate) retention: Retention,
}

/// `[checkpoint.retention]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Retention {
    pub(crate) max_age_seconds: u64,
    pub(crate) container_count: u64,
    pub(crate) container_bytes: u64,
    pub(crate) namespace_count: u64,
    pub(crate) namespace_bytes: u64,
    pub(crate) node_count: u64,
    pub(crate) node_bytes: u64,
}

/// `[checkpoint] level`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    None,
    #[default]
    CheckpointOnly,
    CheckpointRestore,
}

/// `[registry]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Registry {
    pub(crate) hosts_dir: Option<PathBuf>,
    pub(crate) insecure: Vec<String>,
}

/// `[image]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Image {
    pub(crate) max_concurrent_downloads: usize,
    pub(crate) pinned: Vec<String>,
}

/// `[streaming]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Streaming {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) tls_certificate: Option<PathBuf>,
    pub(crate) tls_key: Option<PathBuf>,
    pub(crate) idle_timeout_seconds: u64,
}

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    pub(crate) shutdown_grace_seconds: u64,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file could not be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The text holds something that is refused; all of it is listed.
    #[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
    Refused(Vec<Problem>),
}

/// One thing wrong in a configuration file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The file.
    pub(crate) file: PathBuf,
    /// Line and column, both from 1; none where the problem is in no one place.
    pub(crate) place: Option<(usize, usize)>,
    /// What is wrong and what would be right.
    pub(crate) message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl Config {
    /// Reads `path`. Without one, [`DEFAULT_PATH`] if it exists, else the defaults.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, Error> {
        let (path, optional) = match path {
            Some(path) => (path, false),
            None => (Path::new(DEFAULT_PATH), true),
        };
        match read(path) {
            Ok(text) => Self::parse(path, &text),
            Err(source) if optional && source.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(Error::Read { path: path.to_owned(), source }),
        }
    }

    /// Reads the text of `file`, which is named in errors.
    pub(crate) fn parse(file: &Path, text: &str) -> Result<Self, Error> {
        let document = Document::parse(file, text)?;
        document.refuse_unknown_keys()?;
        let mut config: Self = document.deserialize()?;
        // Naming another runtime does not take the built-in one away.
        config.runtimes.entry(BUILT_IN_RUNTIME.into()).or_default();
        let problems = config.problems(&document);
        if problems.is_empty() { Ok(config) } else { Err(Error::Refused(problems)) }
    }

    /// The path of the socket: `listen` without its scheme, else the default name in the state directory.
    pub(crate) fn socket(&self) -> PathBuf {
        match &self.listen {
            Some(listen) => PathBuf::from(listen.strip_prefix("unix://").unwrap_or(listen)),
            None => self.state.join(SOCKET_NAME),
        }
    }

    /// What the types cannot say: relations between keys, absolute paths, values that would stop everything.
    fn problems(&self, document: &Document<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut check = |right: bool, key: &[&str], message: String| {
            if !right {
                problems.push(document.problem_at(key, message));
            }
        };
        check(self.version == VERSION, &["version"], {
            format!("version {} is not known; this stasisd reads version {VERSION}", self.version)
        });
        for (key, path) in self.absolute_paths() {
            check(path.is_absolute(), &key, {
                format!("{} = {:?} is not an absolute path", key.join("."), path.display().to_string())
            });
        }
        check(self.socket().is_absolute(), &["listen"], {
            let listen = self.listen.as_deref().unwrap_or_default();
            format!("listen = {listen:?} is neither unix:///PATH nor an absolute path; other sockets are not served")
        });
        check(self.runtimes.contains_key(&self.default_runtime), &["default_runtime"], {
            let known: Vec<_> = self.runtimes.keys().map(String::as_str).collect();
            format!(
                "default_runtime {:?} has no table [runtimes.NAME]; there are: {}",
                self.default_runtime,
                known.join(", ")
            )
        });
        check(self.shim.path.as_ref().is_none_or(|path| path.ends_with(SHIM)), &["shim", "path"], {
            format!("the program of the shim must be called {SHIM}, by which runtime types find it")
        });
        check(self.metrics.address.is_none_or(|address| address.ip().is_loopback()), &["metrics", "address"], {
            "metrics.address is no loopback address; metrics are not encrypted, and name pods and images".to_owned()
        });
        for (key, value) in self.positive_numbers() {
            check(value > 0, &key, format!("{} must be at least 1", key.join(".")));
        }
        for (name, runtime) in &self.runtimes {
            if let Err(why) = runtime.checkpoint_policy().check() {
                check(false, &["runtimes", name], format!("runtimes.{name}: {why}"));
            }
        }
        check(self.streaming.tls_certificate.is_some() == self.streaming.tls_key.is_some(), &["streaming"], {
            "streaming.tls_certificate and streaming.tls_key go together: set both or neither".to_owned()
        });
        check(crate::log::filter(&self.log.level).is_ok(), &["log", "level"], {
            format!("log.level {:?} is no level; use error, warn, info, debug or trace", self.log.level)
        });
        problems
    }

    fn absolute_paths(&self) -> Vec<(Vec<&str>, &Path)> {
        let mut paths: Vec<(Vec<&str>, &Path)> = vec![
            (vec!["root"], &self.root),
            (vec!["state"], &self.state),
            (vec!["cni", "conf_dir"], &self.cni.conf_dir),
        ];
        paths.extend(self.cni.bin_dirs.iter().map(|dir| (vec!["cni", "bin_dirs"], dir.as_path())));
        paths.extend(self.cdi.spec_dirs.iter().map(|dir| (vec!["cdi", "spec_dirs"], dir.as_path())));
        paths.extend(self.engines.path.iter().map(|dir| (vec!["engines", "path"], dir.as_path())));
        paths
            .extend(self.checkpoint.archive_dirs.iter().map(|dir| (vec!["checkpoint", "archive_dirs"], dir.as_path())));
        paths.extend(self.shim.path.iter().map(|path| (vec!["shim", "path"], path.as_path())));
        paths.extend(self.registry.hosts_dir.iter().map(|dir| (vec!["registry", "hosts_dir"], dir.as_path())));
        let tls = [("tls_certificate", &self.streaming.tls_certificate), ("tls_key", &self.streaming.tls_key)];
        let set = tls.into_iter().filter_map(|(key, path)| Some((vec!["streaming", key], path.as_deref()?)));
        paths.extend(set);
        paths
    }

    fn positive_numbers(&self) -> Vec<(Vec<&str>, u64)> {
        vec![
            (vec!["cni", "plugin_timeout_seconds"], self.cni.plugin_timeout_seconds),
            (vec!["checkpoint", "max_timeout_seconds"], self.checkpoint.max_timeout_seconds),
            (vec!["streaming", "idle_timeout_seconds"], self.streaming.idle_timeout_seconds),
            (vec!["image", "max_concurrent_downloads"], self.image.max_concurrent_downloads as u64),
        ]
    }
}

impl Runtime {
    /// What the pod engine needs to know of it.
    pub(crate) fn checkpoint_policy(&self) -> CheckpointPolicy {
        CheckpointPolicy {
            defaults: self.checkpoint_options.clone(),
            pod_options: self.checkpoint_pod_options.clone(),
            pod_ghost_limit_max: self.checkpoint_pod_ghost_limit_max,
            pod_image_prefix: self.checkpoint_pod_image_prefix.clone(),
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let size = std::fs::metadata(path)?.len();
    if size > FILE_MAX {
        return Err(io::Error::other(format!("it has {size} bytes; more than {FILE_MAX} are not read")));
    }
    std::fs::read_to_string(path)
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: VERSION,
            root: "/var/lib/stasis".into(),
            state: "/run/stasis".into(),
            listen: None,
            default_runtime: BUILT_IN_RUNTIME.into(),
            log: Log::default(),
            metrics: Metrics::default(),
            engines: Engines::default(),
            cni: Cni::default(),
            cdi: Cdi::default(),
            cgroup: Cgroup::default(),
            shim: Shim::default(),
            runtimes: BTreeMap::from([(BUILT_IN_RUNTIME.into(), Runtime::default())]),
            checkpoint: Checkpoint::default(),
            registry: Registry::default(),
            image: Image::default(),
            streaming: Streaming::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::default() }
    }
}

impl Default for Engines {
    fn default() -> Self {
        Self { runc: "runc".into(), criu: "criu".into(), path: Vec::new() }
    }
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            plugin_timeout_seconds: 60,
        }
    }
}

impl Default for Cdi {
    fn default() -> Self {
        Self { spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()] }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            r#type: "io.containerd.stasis.v1".into(),
            binary: None,
            checkpoint_options: Vec::new(),
            checkpoint_pod_options: vec!["file-locks".into()],
            // CRIU's own default.
            checkpoint_pod_ghost_limit_max: 1 << 20,
            checkpoint_pod_image_prefix: String::new(),
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        let limits = CheckpointLimits::default();
        Self {
            level: Level::default(),
            archive_dirs: Vec::new(),
            max_timeout_seconds: 600,
            parallel: limits.parallel,
            buffer_bytes: limits.buffer_bytes,
            reserve_bytes: limits.reserve_bytes,
            retention: Retention::default(),
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self { max_concurrent_downloads: stasis_image::CONCURRENT_DOWNLOADS, pinned: Vec::new() }
    }
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            tls_certificate: None,
            tls_key: None,
            idle_timeout_seconds: 4 * 3600,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { shutdown_grace_seconds: 20 }
    }
}
