//! Whether a container can be checkpointed now, without touching it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use stasis_criu::preflight::{Allowed, Finding, GHOST_LIMIT, Severity, examine};
use stasis_shim_api::CriuOptions;

use super::options::Settings;
use crate::error::{Error, Result};
use crate::pods::Pods;
use crate::sandbox::SANDBOX_RUNTIME;
use crate::state::{Operation, admit};

/// What stands in the way of a checkpoint, and what it needs.
#[derive(Clone, Debug, Serialize)]
pub struct Preflight {
    /// Container ID.
    pub container_id: String,
    /// Whether nothing is known that would make it fail.
    pub possible: bool,
    /// Number of processes.
    pub processes: usize,
    /// Memory that will be copied, in bytes, about.
    pub memory_bytes: u64,
    /// What was found.
    pub findings: Vec<Finding>,
}

impl Pods {
    /// Looks whether a container can be checkpointed with `options`, and into `directory` if one is given.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition` unless it runs, and for options that are refused.
    pub async fn preflight_checkpoint(
        &self,
        container_id: &str,
        options: &BTreeMap<String, String>,
        directory: Option<&Path>,
    ) -> Result<Preflight> {
        let container = self.container(container_id)?;
        admit(Operation::Checkpoint, container.record().phase(), &container.id)?;
        let pod = self.pod(&container.pod_id)?;
        let (handler, runtime) = self.handler(&pod.record().handler)?;
        let annotations = pod.record().config.clone().unwrap_or_default().annotations;
        let settings = Settings::resolve(&runtime.checkpoint, &annotations, options)?;
        let cgroup = self.group(&container).ok_or_else(|| Error::internal("the container's cgroup has no path"))?;
        let allowed = allowed(&settings.criu);
        let examined = tokio::task::spawn_blocking(move || {
            let pids = cgroup.procs().map_err(|error| Error::internal(error.to_string()))?;
            let memory = stasis_criu::preflight::memory_bytes(&pids, cgroup.memory_bytes().ok());
            Ok::<_, Error>((pids.len(), memory, examine(&pids, &allowed)))
        });
        let (processes, memory_bytes, mut findings) = examined
            .await
            .map_err(|error| Error::internal(format!("the check of {} ended abnormally: {error}", container.id)))??;
        let mut node = |code, found: String, meaning, remedy| {
            findings.insert(0, Finding::of_node(code, found, meaning, remedy));
        };
        if let Err(error) = self.allow_checkpoint() {
            node("criu", error.to_string(), "this node cannot checkpoint at all", "See `stasis doctor`.");
        }
        if runtime.runtime != SANDBOX_RUNTIME {
            let found = format!("runtime handler {handler}: {}", runtime.runtime);
            node("shim", found, "this shim writes no archives", "Run it with a handler of io.containerd.stasis.v1.");
        }
        if let Some(directory) = directory {
            let available = stasis_sys::file::available_bytes(directory).map_err(|error| {
                Error::invalid(format!("cannot see how much is free at {}: {error}", directory.display()))
            })?;
            let needed = memory_bytes + self.config.checkpoint_limits.reserve_bytes;
            if available < needed {
                let found = format!("{} has {available} bytes free of {needed}", directory.display());
                node("space", found, "the archive does not fit", "Free some space, or take another directory.");
            }
        }
        let possible = findings.iter().all(|finding| finding.severity != Severity::Blocks);
        Ok(Preflight { container_id: container.id.clone(), possible, processes, memory_bytes, findings })
    }
}

fn allowed(criu: &CriuOptions) -> Allowed {
    Allowed {
        tcp: criu.tcp_established || criu.tcp_close,
        file_locks: criu.file_locks,
        link_remap: criu.link_remap,
        ghost_limit: criu.ghost_limit.unwrap_or(GHOST_LIMIT),
    }
}
