//! What containers and pods use: CRI's statistics, read from control groups and network namespaces when asked.
//!
//! One pass reads everything that an answer needs, off the async threads: a list is a snapshot of the records, then the
//! files of one container after another, with no lock held. Only the writable layers are not looked at here: measuring a
//! tree can take seconds, so [`layers`] does it in the background and answers have its last result.

mod answer;
mod layers;
mod network;
mod rate;

use std::path::PathBuf;
use std::sync::Arc;

use stasis_cgroup::{Cgroup, Detail, Stats};
use stasis_cri_api::runtime as cri;
use tracing::debug;

use crate::container::matches_labels;
use crate::error::{Error, Result};
use crate::pods::{Container, Pod, Pods};
use crate::record::{ContainerRecord, Phase, PodRecord, now};

pub(crate) use layers::{Layer, Layers, Measured};
pub(crate) use network::{Interface, interfaces};
pub(crate) use rate::Rate;

/// A container whose accounts are to be read, with all that an answer says beside them.
struct Subject {
    container: Arc<Container>,
    attributes: cri::ContainerAttributes,
    /// None unless it runs.
    group: Option<Cgroup>,
}

impl Pods {
    /// What one container uses: CRI ContainerStats. Of one that does not run, the writable layer alone is told.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn container_stats(&self, id: &str) -> Result<cri::ContainerStats> {
        let subject = self.subject(&self.container(id)?);
        let id = subject.container.id.clone();
        let read = self.off_the_async_threads(move |pods| pods.read_container(subject)).await?;
        read.ok_or_else(|| Error::precondition(format!("cannot read what container {id} uses: it has just ended")))
    }

    /// What the running containers that pass `filter` use: CRI ListContainerStats.
    ///
    /// # Errors
    /// None but an abnormal end; a container that ends meanwhile is left out.
    pub async fn list_container_stats(
        &self,
        filter: Option<&cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>> {
        let all = self.containers.all();
        let wanted = all.iter().filter(|container| {
            let record = container.record();
            record.phase() == Phase::Running && filter.is_none_or(|filter| container_passes(&record, filter))
        });
        let subjects: Vec<Subject> = wanted.map(|container| self.subject(container)).collect();
        self.off_the_async_threads(move |pods| {
            subjects.into_iter().filter_map(|subject| pods.read_container(subject)).collect()
        })
        .await
    }

    /// What one pod uses: CRI PodSandboxStats.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it is ready.
    pub async fn pod_sandbox_stats(&self, id: &str) -> Result<cri::PodSandboxStats> {
        let pod = self.pod(id)?;
        if !pod.record().ready {
            return Err(Error::precondition(format!("cannot read what pod {} uses: it is not ready", pod.id)));
        }
        self.off_the_async_threads(move |pods| pods.read_pod(&pod)).await
    }

    /// What the ready pods that pass `filter` use: CRI ListPodSandboxStats.
    ///
    /// # Errors
    /// None but an abnormal end.
    pub async fn list_pod_sandbox_stats(
        &self,
        filter: Option<&cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>> {
        let mut wanted = self.pods.all();
        wanted.retain(|pod| {
            let record = pod.record();
            record.ready && filter.is_none_or(|filter| pod_passes(&record, filter))
        });
        self.off_the_async_threads(move |pods| wanted.iter().map(|pod| pods.read_pod(pod)).collect()).await
    }

    /// Runs work that reads files of the kernel.
    pub(crate) async fn off_the_async_threads<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Pods) -> T + Send + 'static,
    ) -> Result<T> {
        let pods = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&pods)).await;
        done.map_err(|error| Error::internal(format!("the reading of statistics ended abnormally: {error}")))
    }

    fn subject(&self, container: &Arc<Container>) -> Subject {
        let (attributes, running) = {
            let record = container.record();
            (answer::container_attributes(&record), record.phase() == Phase::Running)
        };
        let group = if running { self.group(container) } else { None };
        Subject { container: Arc::clone(container), attributes, group }
    }

    /// None if the container has ended since it was chosen.
    fn read_container(&self, subject: Subject) -> Option<cri::ContainerStats> {
        let Subject { container, attributes, group } = subject;
        let stats = match &group {
            Some(group) => Some(read_group(group, &container.id, Detail::Usage)?),
            None => None,
        };
        let accounts = stats.map(|stats| answer::Accounts::new(stats, now(), &container.rate)).unwrap_or_default();
        Some(cri::ContainerStats {
            attributes: Some(attributes),
            cpu: accounts.cpu,
            memory: accounts.memory,
            swap: accounts.swap,
            io: accounts.io,
            writable_layer: container.layer.get().map(|layer| answer::writable_layer(&layer, &self.config.root)),
        })
    }

    fn read_pod(&self, pod: &Arc<Pod>) -> cri::PodSandboxStats {
        let record = pod.record().clone();
        let containers = self.containers_of(&pod.id);
        let running = || containers.iter().filter(|container| container.record().phase() == Phase::Running);
        let stats = self.pod_group(&record).and_then(|group| read_group(&group, &pod.id, Detail::Full));
        let at = now();
        let processes = stats.as_ref().and_then(|stats| stats.pids).map(|pids| pids.current);
        let accounts = stats.map(|stats| answer::Accounts::new(stats, at, &pod.rate)).unwrap_or_default();
        let linux = cri::LinuxPodSandboxStats {
            cpu: accounts.cpu,
            memory: accounts.memory,
            io: accounts.io,
            network: self.pod_interfaces(&record).map(|found| answer::network(found, at)),
            process: processes.map(|count| cri::ProcessUsage { timestamp: at, process_count: answer::value(count) }),
            containers: running().filter_map(|container| self.read_container(self.subject(container))).collect(),
        };
        let attributes = Some(answer::pod_attributes(&record));
        cri::PodSandboxStats { attributes, linux: Some(linux), windows: None }
    }

    /// The interfaces of a pod's own network namespace; none in the host's, or where they cannot be read.
    pub(crate) fn pod_interfaces(&self, record: &PodRecord) -> Option<Vec<Interface>> {
        if record.config.as_ref().is_some_and(crate::files::host_network) {
            return None;
        }
        let members: Vec<u32> = self
            .containers_of(&record.id)
            .iter()
            .map(|container| container.record().pid)
            .filter(|pid| *pid > 0)
            .collect();
        let netns: PathBuf = self.netns(&record.id);
        match interfaces(&netns, &members) {
            Ok(found) => Some(found),
            Err(error) => {
                debug!(pod = record.id, %error, "cannot read the network counters of a pod");
                None
            }
        }
    }

    /// The control group of a pod, which the kubelet makes; none if the pod's configuration names none.
    pub(crate) fn pod_group(&self, record: &PodRecord) -> Option<Cgroup> {
        let linux = record.config.as_ref().and_then(|config| config.linux.as_ref());
        let parent = linux.map(|linux| linux.cgroup_parent.as_str()).unwrap_or_default();
        let path = match (self.config.cgroup_driver, parent) {
            (cri::CgroupDriver::Cgroupfs, "") => crate::container::default_cgroup_parent(&record.id),
            (cri::CgroupDriver::Cgroupfs, parent) => format!("/{}", parent.trim_matches('/')),
            (cri::CgroupDriver::Systemd, "") => return None,
            (cri::CgroupDriver::Systemd, parent) => {
                stasis_cgroup::slice_path(parent.trim_end_matches('/').rsplit('/').next().unwrap_or(parent)).ok()?
            }
        };
        Some(self.cgroups.at(&path))
    }
}

/// The accounts of a group. That it is gone is an ordinary end; anything else is said.
pub(crate) fn read_group(group: &Cgroup, id: &str, detail: Detail) -> Option<Stats> {
    match group.stats(detail) {
        Ok(stats) => Some(stats),
        Err(error) => {
            if !error.is_not_found() {
                tracing::warn!(id, %error, "cannot read what a control group has used");
            }
            None
        }
    }
}

fn container_passes(record: &ContainerRecord, filter: &cri::ContainerStatsFilter) -> bool {
    record.id.starts_with(&filter.id)
        && record.pod_id.starts_with(&filter.pod_sandbox_id)
        && record.config.as_ref().is_some_and(|config| matches_labels(&config.labels, &filter.label_selector))
}

fn pod_passes(record: &PodRecord, filter: &cri::PodSandboxStatsFilter) -> bool {
    record.id.starts_with(&filter.id)
        && record.config.as_ref().is_some_and(|config| matches_labels(&config.labels, &filter.label_selector))
}
