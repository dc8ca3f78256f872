//! After a start of the daemon: makes the records true again, and takes away what has none.
//!
//! | found | meaning | done |
//! |---|---|---|
//! | record of a ready pod, shim answers | the daemon was restarted | connect |
//! | record of a ready pod, no shim | reboot, or the shim died | not ready; containers are ended and exited 255 |
//! | record of a ready pod, shim does not answer | it is slow | ask again, in the background |
//! | record of a running container, task running | | wait for it again |
//! | …, task stopped | it ended meanwhile | record the exit, have the shim forget it |
//! | record of a created container, task there | a start was cut short | the task is ended; created again |
//! | record of a created container, no bundle | …, and its task ended already | the bundle is made again |
//! | pod directory, snapshot or network without a record | the call was never answered | taken away |

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use stasis_task::{Sandbox, Status, Task};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::container::{container_name, discard_task, write_spec};
use crate::error::{IoContext as _, Result};
use crate::pods::{Container, Pod, Pods};
use crate::record::{ContainerRecord, Phase, nanoseconds, now};
use crate::sandbox::pod_name;
use crate::state::{Event, UNKNOWN_CODE};

/// How long the start waits for shims that do not answer. One that is slow, as its disk is, may have a pod that runs well;
/// it is asked again in the background.
const SHIMS_LIMIT: Duration = Duration::from_secs(15);

/// How long a shim that did not answer is left alone.
const SHIM_AGAIN: Duration = Duration::from_secs(1);

impl Pods {
    pub(crate) async fn reconcile(&self) -> Result<()> {
        let (pods, containers) = (self.store.pods()?, self.store.containers()?);
        info!(pods = pods.len(), containers = containers.len(), "finding pods and containers again");
        for record in pods {
            let config = record.config.clone().unwrap_or_default();
            self.take_name("pod", pod_name(&config), &record.id);
            let id = record.id.clone();
            self.pods.insert(&id, Pod::new(record, None));
        }
        for record in containers {
            self.know_container(record).await?;
        }
        let mut finding = JoinSet::new();
        for pod in self.pods.all() {
            let pods = self.clone();
            finding.spawn(async move { pods.find_pod(&pod).await });
        }
        let all = async { while finding.join_next().await.is_some() {} };
        if tokio::time::timeout(SHIMS_LIMIT, all).await.is_err() {
            warn!(pods = finding.len(), "shims do not answer; they are asked again while the others are served");
            finding.detach_all();
        }
        self.clear_leftovers().await
    }

    /// Reserves a name. That another record has it, which should not be, must not keep the node from starting.
    fn take_name(&self, kind: &str, name: String, id: &str) {
        match self.names.reserve(kind, name, id) {
            Ok(reservation) => reservation.keep(),
            Err(error) => warn!(id, %error, "two records have one name"),
        }
    }

    async fn know_container(&self, record: ContainerRecord) -> Result<()> {
        if self.pods.get(&record.pod_id).is_none() {
            // The pod was removed, and its containers with it, but the daemon ended in between.
            self.release_volumes_of(&record).await;
            self.discard_container(&record.pod_id, &record.id).await;
            return self.store.delete_container(&record.id).await;
        }
        if let Some(config) = &record.config {
            self.take_name("container", container_name(&record.pod_id, config), &record.id);
        }
        let id = record.id.clone();
        self.containers.insert(&id, Container::new(record));
        Ok(())
    }

    /// Finds the shim of a pod and the tasks of its containers. What fails is logged: one pod must not keep the others
    /// from being found.
    async fn find_pod(&self, pod: &Arc<Pod>) {
        if pod.record().ready {
            match self.find_shim(pod).await {
                Some(sandbox) => pod.set_sandbox(sandbox),
                None => {
                    warn!(pod = pod.id, "the shim of a ready pod is gone; the pod is not ready any more");
                    if let Err(error) = pod.update(&self.store, |record| record.ready = false).await {
                        warn!(pod = pod.id, %error, "cannot record that a pod is not ready");
                    }
                }
            }
            self.watch_sandbox(Arc::clone(pod));
        }
        for container in self.containers_of(&pod.id) {
            if let Err(error) = self.find_container(pod, &container).await {
                warn!(container = container.id, %error, "cannot bring a container into its true state");
            }
        }
    }

    /// The shim of a ready pod; none if there is none any more. One that does not answer may be slow: only its absence
    /// is a loss, after which its containers are ended.
    async fn find_shim(&self, pod: &Pod) -> Option<Sandbox> {
        let dir = self.pod_dir(&pod.id);
        while pod.record().ready {
            match self.runtime.connect_sandbox(&pod.id, &dir).await {
                Ok(sandbox) => return Some(sandbox),
                Err(error) if error.is_shim_lost() || error.is_not_found() => return None,
                Err(error) => warn!(pod = pod.id, %error, "a shim does not answer"),
            }
            tokio::time::sleep(SHIM_AGAIN).await;
        }
        None
    }

    /// The task of a container; none if there is none any more. As [`Pods::find_shim`].
    async fn find_task(&self, container: &Container) -> Option<Arc<dyn Task>> {
        while container.record().phase() != Phase::Exited {
            match stasis_task::PlatformRuntime::get(&*self.runtime, &container.id).await {
                Ok(task) => return Some(task),
                Err(error) if error.is_shim_lost() || error.is_not_found() => return None,
                Err(error) => warn!(container = container.id, %error, "a shim does not answer"),
            }
            tokio::time::sleep(SHIM_AGAIN).await;
        }
        // What is left of the task of an exited container is cleared away, if its shim answers.
        stasis_task::PlatformRuntime::get(&*self.runtime, &container.id).await.ok()
    }

    async fn find_container(&self, pod: &Pod, container: &Arc<Container>) -> Result<()> {
        // Also where the shim is lost: what it left of the task is cleared away with the task.
        let task = self.find_task(container).await;
        let phase = container.record().phase();
        match (phase, task) {
            (Phase::Running, Some(task)) => self.find_running(Arc::clone(container), task).await,
            (Phase::Running, None) => {
                self.end_without_shim(container).await;
                let event = Event::Lost { message: "its shim was gone when the daemon started".into(), at: now() };
                self.record_exit(container, event).await;
            }
            (_, Some(task)) => {
                if let Err(error) = discard_task(&*task).await {
                    warn!(container = container.id, %error, "cannot end a task that no record stands for");
                }
            }
            (_, None) => {}
        }
        if phase == Phase::Created && pod.sandbox().is_some() {
            self.renew_bundle(pod, container)?;
        }
        Ok(())
    }

    /// Makes the bundle of a created container again: it went with the task of a start that was cut short.
    fn renew_bundle(&self, pod: &Pod, container: &Container) -> Result<()> {
        let path = self.bundle(&pod.id, &container.id).join("config.json");
        if path.exists() {
            return Ok(());
        }
        let record = container.record().clone();
        let Some(image) = self.images.resolve(&record.base_image_id) else {
            warn!(container = container.id, image = record.base_image_id, "the image of a created container is gone");
            return Ok(());
        };
        let (config, pod_config) = (record.config.unwrap_or_default(), pod.record().config.clone().unwrap_or_default());
        let spec = self.spec(pod, &container.id, &config, &pod_config, &image, &record.cgroups_path)?;
        let bundle = self.bundle(&pod.id, &container.id);
        std::fs::create_dir_all(&bundle).doing(format_args!("make the bundle {}", bundle.display()))?;
        write_spec(&bundle, &spec)
    }

    async fn find_running(&self, container: Arc<Container>, task: Arc<dyn Task>) {
        let stopped = match task.state().await {
            Ok(state) if state.status == Status::Stopped => Some(state.exit),
            Ok(_) => None,
            Err(error) => {
                info!(container = container.id, %error, "the shim does not tell the state of a task; waiting for its end");
                None
            }
        };
        container.set_task(Some(Arc::clone(&task)));
        match stopped {
            Some(exit) => {
                let event = Event::Exited {
                    code: exit.map_or(UNKNOWN_CODE, |exit| i32::try_from(exit.status).unwrap_or(UNKNOWN_CODE)),
                    oom: self.oom_killed(&container),
                    at: exit.map_or_else(now, |exit| nanoseconds(exit.timestamp)),
                };
                self.record_exit(&container, event).await;
            }
            None => self.watch_task(container, task),
        }
    }

    /// Takes away pods, containers' files and networks that no record stands for.
    async fn clear_leftovers(&self) -> Result<()> {
        let pods_dir = self.config.state.join("pods");
        std::fs::create_dir_all(&pods_dir).doing(format_args!("make {}", pods_dir.display()))?;
        let listed = std::fs::read_dir(&pods_dir).doing(format_args!("list {}", pods_dir.display()))?;
        let mut leftover: HashSet<String> =
            listed.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        leftover.extend(self.cni.cached());
        leftover.retain(|id| self.pods.get(id).is_none());
        for id in leftover {
            info!(pod = id, "clearing away a pod that no record stands for");
            // What fails of it is logged, and tried again at the next start.
            let _ = self.tear_down(&id).await;
        }
        // Before the layers below them.
        self.clear_volumes().await;
        for key in self.images.rootfs_keys()? {
            if self.containers.get(crate::restore::container_of_key(&key)).is_none() {
                info!(snapshot = key, "removing a root file system that no container stands for");
                if let Err(error) = self.images.remove_rootfs(&key).await {
                    warn!(snapshot = key, %error, "cannot remove a root file system that no container stands for");
                }
            }
        }
        self.clear_extracted_archives().await
    }
}
