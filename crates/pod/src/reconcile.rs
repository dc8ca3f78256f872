//! After a start of the daemon: makes the records true again, and takes away what has none.
//!
//! | found | meaning | done |
//! |---|---|---|
//! | record of a ready pod, shim answers | the daemon was restarted | connect |
//! | record of a ready pod, no shim | reboot, or the shim died | not ready; containers are ended and exited 255 |
//! | record of a running container, task running | | wait for it again |
//! | …, task stopped | it ended meanwhile | record the exit, have the shim forget it |
//! | record of a created container, task there | a start was cut short | the task is ended; created again |
//! | record of a created container, no bundle | …, and its task ended already | the bundle is made again |
//! | pod directory, snapshot or network without a record | the call was never answered | taken away |

use std::collections::HashSet;
use std::sync::Arc;

use stasis_task::{Status, Task};
use tracing::{info, warn};

use crate::container::{container_name, discard_task};
use crate::error::{IoContext as _, Result};
use crate::pods::{Container, Pod, Pods};
use crate::record::{ContainerRecord, Phase, PodRecord, nanoseconds, now};
use crate::sandbox::pod_name;
use crate::state::{Event, UNKNOWN_CODE, apply};

impl Pods {
    pub(crate) async fn reconcile(&self) -> Result<()> {
        let (pods, containers) = (self.store.pods()?, self.store.containers()?);
        info!(pods = pods.len(), containers = containers.len(), "finding pods and containers again");
        for record in pods {
            self.find_pod(record).await?;
        }
        for record in containers {
            self.find_container(record).await?;
        }
        self.clear_leftovers().await
    }

    async fn find_pod(&self, record: PodRecord) -> Result<()> {
        let dir = self.pod_dir(&record.id);
        let config = record.config.clone().unwrap_or_default();
        self.names.reserve("pod", pod_name(&config), &record.id)?.keep();
        let sandbox = if record.ready { self.runtime.connect_sandbox(&record.id, &dir).await.ok() } else { None };
        let lost = record.ready && sandbox.is_none();
        let id = record.id.clone();
        let pod = self.pods.insert(&id, Pod::new(record, sandbox));
        if lost {
            warn!(pod = id, "the shim of a ready pod is gone; the pod is not ready any more");
            pod.update(&self.store, |record| record.ready = false).await?;
        }
        self.watch_sandbox(pod);
        Ok(())
    }

    async fn find_container(&self, record: ContainerRecord) -> Result<()> {
        let Some(pod) = self.pods.get(&record.pod_id) else {
            // The pod was removed, and its containers with it, but the daemon ended in between.
            self.discard_container(&record.pod_id, &record.id).await;
            return self.store.delete_container(&record.id).await;
        };
        if let Some(config) = &record.config {
            self.names.reserve("container", container_name(&record.pod_id, config), &record.id)?.keep();
        }
        let id = record.id.clone();
        let container = self.containers.insert(&id, Container::new(record));
        // Also where the shim is lost: what it left of the task is cleared away with the task.
        let task = stasis_task::PlatformRuntime::get(&*self.runtime, &id).await.ok();
        let phase = container.record().phase();
        match (phase, task) {
            (Phase::Running, Some(task)) => self.find_running(Arc::clone(&container), task).await,
            (Phase::Running, None) => {
                self.end_without_shim(&container);
                let event = Event::Lost { message: "its shim was gone when the daemon started".into(), at: now() };
                container.update(&self.store, |record| apply(record, event)).await?;
            }
            (_, Some(task)) => {
                if let Err(error) = discard_task(&*task).await {
                    warn!(container = id, %error, "cannot end a task that no record stands for");
                }
            }
            (_, None) => {}
        }
        if phase == Phase::Created && pod.sandbox().is_some() {
            self.renew_bundle(&pod, &container)?;
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
        let text = self.spec(pod, &container.id, &config, &pod_config, &image, &record.cgroups_path)?;
        let bundle = self.bundle(&pod.id, &container.id);
        std::fs::create_dir_all(&bundle).doing(format_args!("make the bundle {}", bundle.display()))?;
        std::fs::write(&path, text).doing(format_args!("write {}", path.display()))
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
                    oom: false,
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
            self.tear_down(&id).await;
        }
        for key in self.images.rootfs_keys()? {
            if self.containers.get(crate::restore::container_of_key(&key)).is_none() {
                info!(snapshot = key, "removing a root file system that no container stands for");
                self.images.remove_rootfs(&key).await?;
            }
        }
        self.clear_extracted_archives().await
    }
}
