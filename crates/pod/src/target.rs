//! Containers in the PID namespace of another container of their pod: CRI's mode TARGET, for ephemeral debug containers.
//!
//! The target's namespace is pinned below the pod's directory when the container starts, not named by the target's process
//! ID: that number may be another process's by the time the OCI runtime opens it. The pin stays until the container is
//! removed, as a checkpoint looks at it again.

use std::path::PathBuf;
use std::sync::Arc;

use stasis_cri_api::runtime::{ContainerConfig, NamespaceMode, NamespaceOption};
use stasis_sys::namespace::{self, Kind as NamespaceKind};
use tracing::warn;

use crate::error::{Error, IoContext as _, Kind, Result};
use crate::pods::{Container, Pod, Pods, blocking};
use crate::record::Phase;

/// Directory of the pinned namespaces of targets below a pod's, one directory a container that joins.
const DIRECTORY: &str = "targets";

/// The container whose PID namespace `config` asks to join; empty if the request leaves it out.
pub(crate) fn requested(config: &ContainerConfig) -> Option<&str> {
    let options: &NamespaceOption = config.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()?;
    (options.pid() == NamespaceMode::Target).then_some(options.target_id.as_str())
}

impl Pods {
    fn target_dir(&self, pod_id: &str, id: &str) -> PathBuf {
        self.pod_dir(pod_id).join(DIRECTORY).join(id)
    }

    /// Where the PID namespace of a container's target is pinned.
    pub(crate) fn target_pin(&self, pod_id: &str, id: &str) -> PathBuf {
        self.target_dir(pod_id, id).join(NamespaceKind::Pid.name())
    }

    /// A running container of the pod.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` if it is another pod's; `FailedPrecondition` unless it runs.
    pub(crate) fn running_target(&self, pod: &Pod, target: &str) -> Result<Arc<Container>> {
        let found = self.containers.find(target)?.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("target_id: no container {target:?} to join the PID namespace of"))
        })?;
        if found.pod_id != pod.id {
            return Err(Error::invalid(format!(
                "target_id: container {target} is in pod {}, not in {}: only a container of the same pod can be joined",
                found.pod_id, pod.id
            )));
        }
        if found.record().phase() != Phase::Running {
            return Err(Error::precondition(format!(
                "target_id: container {target} does not run, so there is no PID namespace to join"
            )));
        }
        Ok(found)
    }

    /// Pins the PID namespace of the target of a container that is about to start, if its request names one.
    ///
    /// # Errors
    /// Those of [`Pods::running_target`]; also where the target ends meanwhile.
    pub(crate) async fn pin_target(&self, pod: &Pod, id: &str, config: &ContainerConfig) -> Result<()> {
        let Some(target) = requested(config) else { return Ok(()) };
        let container = self.running_target(pod, target)?;
        let number = container.record().pid;
        let pid = i32::try_from(number).map_err(|_| Error::internal("a process ID is out of range"))?;
        let (dir, pin) = (self.target_dir(&pod.id, id), self.target_pin(&pod.id, id));
        let pinning = blocking(move || {
            std::fs::create_dir_all(&dir)?;
            // Of a start that was cut short.
            namespace::unpin(&pin)?;
            namespace::pin(pid, NamespaceKind::Pid, &dir)
        });
        let pinned = pinning.await;
        // Whatever process had that number when the namespace was opened: it is the target's if the number still is.
        let group = self.group(&container).ok_or_else(|| Error::internal("the target has no control group"))?;
        let processes = blocking(move || group.procs().map_err(std::io::Error::other)).await;
        if !processes.is_ok_and(|processes| processes.contains(&number)) {
            let words = format!("target_id: container {target} has ended, so there is no PID namespace to join");
            return Err(Error::precondition(words));
        }
        pinned.doing(format_args!("pin the PID namespace of container {target}"))
    }

    /// Lets go of the PID namespace of a container's target. That none is pinned is fine.
    pub(crate) async fn unpin_target(&self, pod_id: &str, id: &str) {
        let (dir, pin) = (self.target_dir(pod_id, id), self.target_pin(pod_id, id));
        let unpinning = blocking(move || {
            if dir.exists() { namespace::unpin(&pin).and_then(|()| std::fs::remove_dir(&dir)) } else { Ok(()) }
        });
        if let Err(error) = unpinning.await {
            warn!(container = id, %error, "cannot let go of the PID namespace of a container's target");
        }
    }
}
