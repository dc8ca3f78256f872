//! What the worker is told, and what it says.

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use stasis_shim_api::{CheckpointReport, CheckpointRequest, Reason, ShimError};

/// Largest job: a request is a few paths.
const JOB_MAX: u64 = 1 << 20;
/// Largest `config.json` that is read.
const CONFIG_MAX: u64 = 16 << 20;

/// The job, one JSON document on standard input.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    /// What the daemon asked for.
    pub(crate) request: CheckpointRequest,
    /// OCI runtime's binary.
    pub(crate) runc: PathBuf,
    /// OCI runtime's state directory.
    pub(crate) runc_root: PathBuf,
    /// Path of the container's cgroup below the root of every hierarchy.
    pub(crate) cgroup: String,
    /// The pod's network namespace; none if the pod is on the host's network.
    pub(crate) netns: Option<PathBuf>,
    /// The container's bundle.
    pub(crate) bundle: PathBuf,
    /// An empty directory for the worker's tmpfs.
    pub(crate) work_dir: PathBuf,
}

impl Job {
    /// Reads the job from standard input, to its end.
    pub(crate) fn read() -> Result<Self, ShimError> {
        let mut text = Vec::new();
        io::stdin()
            .take(JOB_MAX)
            .read_to_end(&mut text)
            .map_err(|error| internal(format!("reading the job: {error}")))?;
        serde_json::from_slice(&text).map_err(|error| internal(format!("the job of the checkpoint worker: {error}")))
    }

    /// Whether the container has a cgroup namespace of its own. What cannot be read is taken for a yes: `soft` is right
    /// for both, only slower.
    pub(crate) fn has_cgroup_namespace(&self) -> bool {
        let config = stasis_sys::path::read_limited(&self.bundle.join("config.json"), CONFIG_MAX);
        let config: Option<Value> = config.ok().and_then(|text| serde_json::from_slice(&text).ok());
        let Some(config) = config else { return true };
        let namespaces = config.pointer("/linux/namespaces").and_then(Value::as_array);
        namespaces.is_some_and(|list| list.iter().any(|namespace| namespace["type"] == "cgroup"))
    }
}

/// What the worker says, one line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// The container is frozen.
    Frozen,
    /// The container runs again.
    Thawed {
        /// How long it was frozen, in microseconds.
        frozen_us: u64,
    },
    /// The archive is on its way.
    Writing {
        /// Bytes of it that are written.
        bytes_done: u64,
        /// Bytes that it will have, about.
        bytes_total: u64,
    },
    /// The archive is durable.
    Done {
        /// What it cost.
        report: CheckpointReport,
    },
    /// There is no archive, and the container runs.
    Error {
        /// Why.
        error: ShimError,
    },
}

/// Says `event` to the shim. If the shim is gone there is nobody to tell.
pub(crate) fn emit(event: &Event) {
    if let Ok(mut line) = serde_json::to_vec(event) {
        line.push(b'\n');
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(&line).and_then(|()| stdout.flush());
    }
}

/// An error of kind [`Reason::Internal`].
pub(crate) fn internal(message: impl Display) -> ShimError {
    ShimError { reason: Reason::Internal, message: message.to_string() }
}

/// `duration` in microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
