//! Waits for every running task and records its exit.
//!
//! The order matters: the exit is durable before the shim is told to forget it, so it survives a crash of the daemon
//! at any point between.

use std::sync::Arc;

use stasis_cri_api::runtime::ContainerEventType;
use stasis_task::Task;
use tracing::{info, warn};

use crate::pods::{Container, Pods, blocking};
use crate::record::{nanoseconds, now};
use crate::state::{Event, apply};

impl Pods {
    /// Begins to wait for the end of a running task.
    pub(crate) fn watch_task(&self, container: Arc<Container>, task: Arc<dyn Task>) {
        let pods = self.clone();
        tokio::spawn(async move {
            let event = match task.wait().await {
                Ok(exit) => Event::Exited {
                    code: i32::try_from(exit.status).unwrap_or(crate::state::UNKNOWN_CODE),
                    oom: pods.oom_killed(&container),
                    at: nanoseconds(exit.timestamp),
                },
                Err(error) => {
                    warn!(container = container.id, %error, "the shim of a running container is gone");
                    pods.end_without_shim(&container).await;
                    Event::Lost { message: format!("its shim was lost, and it was ended: {error}"), at: now() }
                }
            };
            pods.record_exit(&container, event).await;
        });
    }

    /// Records how a container ended, then has the shim forget it.
    pub(crate) async fn record_exit(&self, container: &Container, event: Event) {
        if let Err(error) = container.update(&self.store, |record| apply(record, event)).await {
            // Removed, or the database failed; then the daemon starts anew and asks the shim again, which keeps it.
            warn!(container = container.id, %error, "cannot record the exit of a container");
            return;
        }
        info!(
            container = container.id,
            code = container.record().exit_code,
            reason = container.record().reason,
            "exited"
        );
        self.tell(ContainerEventType::ContainerStoppedEvent, &container.id, &container.pod_id);
        let _operation = container.operation.lock().await;
        // What fails is said there, and tried again by the removal.
        let _ = self.forget_task(container).await;
    }

    /// Whether the kernel killed something in the container for lack of memory. Read before the task is deleted, as
    /// its control group goes with it.
    pub(crate) fn oom_killed(&self, container: &Container) -> bool {
        self.group(container).is_some_and(|group| group.oom_kill_count().is_ok_and(|count| count > 0))
    }

    pub(crate) async fn end_without_shim(&self, container: &Container) {
        let Some(group) = self.group(container) else { return };
        if let Err(error) = end_group(group).await {
            warn!(container = container.id, %error, "cannot end the processes of a container without a shim");
        }
    }

    /// The control group of a running container.
    pub(crate) fn group(&self, container: &Container) -> Option<stasis_cgroup::Cgroup> {
        let path = container.record().cgroups_path.clone();
        if path.starts_with('/') {
            return Some(self.cgroups.at(&path));
        }
        // systemd's notation, `slice:prefix:name`.
        let mut parts = path.splitn(3, ':');
        let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
        stasis_cgroup::scope_path(slice, prefix, name).ok().map(|path| self.cgroups.at(&path))
    }
}

/// Ends the processes of a control group and removes it. Processes that wait in the kernel hold this up for seconds.
pub(crate) async fn end_group(group: stasis_cgroup::Cgroup) -> std::io::Result<()> {
    let ended = blocking(move || group.kill_all().and_then(|()| group.remove()).map_err(std::io::Error::other));
    ended.await
}
