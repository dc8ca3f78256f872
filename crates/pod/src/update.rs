//! New limits for what exists: CRI UpdateContainerResources and UpdatePodSandboxResources.
//!
//! The OCI runtime changes the control group; the bundle's specification and the record follow, so that a start, a
//! checkpoint and every status answer have the same limits.

use std::sync::Arc;

use serde_json::Value;
use stasis_cri_api::runtime::LinuxContainerResources as Resources;

use crate::error::{Error, IoContext as _, Result};
use crate::pods::{Container, Pods};
use crate::record::Phase;
use crate::spec;
use crate::state::{Operation, admit};

impl Pods {
    /// Gives a container new limits; what is zero or empty stays as it was: CRI UpdateContainerResources.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for a container that has ended; `InvalidArgument` for a limit that is none. What
    /// the kernel refuses, such as a memory limit below what is in use, is told in its words, and nothing has changed.
    pub async fn update_container_resources(&self, id: &str, wanted: Resources) -> Result<()> {
        let container = self.container(id)?;
        let pods = self.clone();
        self.detached(async move {
            let _turn = container.turn().await?;
            let updated = pods.update_container(&container, &wanted).await;
            updated.map_err(|error| error.context(format_args!("update of container {}", container.id)))
        })
        .await
    }

    async fn update_container(&self, container: &Arc<Container>, wanted: &Resources) -> Result<()> {
        let record = container.record().clone();
        admit(Operation::Update, record.phase(), &container.id)?;
        let linux = record.config.as_ref().and_then(|config| config.linux.as_ref());
        let before = linux.and_then(|linux| linux.resources.clone()).unwrap_or_default();
        let after = merged(before, wanted);
        let limits = spec::limits(&after, self.cgroups.mode() == stasis_cgroup::Mode::V2, &self.host)?;
        let limits = serde_json::to_value(&limits)
            .map_err(|error| Error::internal(format!("cannot write the limits: {error}")))?;
        if record.phase() == Phase::Running {
            let task = container.task().ok_or_else(|| Error::precondition("it has no shim any more"))?;
            task.update(limits.to_string().as_bytes()).await?;
        }
        self.write_limits(container, limits)?;
        container
            .update(&self.store, |record| {
                let config = record.config.get_or_insert_default();
                config.linux.get_or_insert_default().resources = Some(after);
            })
            .await
    }

    /// Puts limits into the bundle's specification; the rules for devices stay.
    fn write_limits(&self, container: &Container, mut limits: Value) -> Result<()> {
        let path = self.bundle(&container.pod_id, &container.id).join("config.json");
        let text = std::fs::read(&path).doing(format_args!("read {}", path.display()))?;
        let wrong = |error| Error::internal(format!("{} is no specification: {error}", path.display()));
        let mut spec: Value = serde_json::from_slice(&text).map_err(wrong)?;
        let place = &mut spec["linux"]["resources"];
        if let Some(devices) = place.get_mut("devices") {
            limits["devices"] = devices.take();
        }
        *place = limits;
        stasis_sys::file::write_volatile(&path, spec.to_string().as_bytes(), 0o600)
            .doing(format_args!("write {}", path.display()))
    }

    /// Notes the limits of a pod as a whole, whose control group the kubelet has changed itself: CRI
    /// UpdatePodSandboxResources.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn update_pod_sandbox_resources(
        &self,
        id: &str,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Result<()> {
        let pod = self.pod(id)?;
        let pods = self.clone();
        self.detached(async move {
            let _operation = pod.operation.lock().await;
            // It may have been removed meanwhile, and its record must not come back.
            let pod = pods.pod(&pod.id)?;
            pod.update(&pods.store, |record| {
                let linux = record.config.get_or_insert_default().linux.get_or_insert_default();
                linux.overhead = overhead.or(linux.overhead.take());
                linux.resources = resources.or(linux.resources.take());
            })
            .await
        })
        .await
    }
}

/// The limits of `before` with those of `wanted` over them. CRI: zero and empty mean "not specified".
fn merged(before: Resources, wanted: &Resources) -> Resources {
    let number = |before: i64, wanted: i64| if wanted == 0 { before } else { wanted };
    let text = |before: String, wanted: &str| if wanted.is_empty() { before } else { wanted.to_owned() };
    let mut unified = before.unified;
    unified.extend(wanted.unified.clone());
    let mut hugepage_limits = before.hugepage_limits;
    for limit in &wanted.hugepage_limits {
        hugepage_limits.retain(|known| known.page_size != limit.page_size);
        hugepage_limits.push(limit.clone());
    }
    Resources {
        cpu_period: number(before.cpu_period, wanted.cpu_period),
        cpu_quota: number(before.cpu_quota, wanted.cpu_quota),
        cpu_shares: number(before.cpu_shares, wanted.cpu_shares),
        memory_limit_in_bytes: number(before.memory_limit_in_bytes, wanted.memory_limit_in_bytes),
        oom_score_adj: number(before.oom_score_adj, wanted.oom_score_adj),
        cpuset_cpus: text(before.cpuset_cpus, &wanted.cpuset_cpus),
        cpuset_mems: text(before.cpuset_mems, &wanted.cpuset_mems),
        hugepage_limits,
        unified,
        memory_swap_limit_in_bytes: number(before.memory_swap_limit_in_bytes, wanted.memory_swap_limit_in_bytes),
    }
}

#[cfg(test)]
mod tests {
    use stasis_cri_api::runtime::HugepageLimit;

    use super::*;

    #[test]
    fn what_is_not_specified_stays() {
        let pages = |limit| HugepageLimit { page_size: "2MB".into(), limit };
        let before = Resources {
            cpu_shares: 512,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 30,
            cpuset_cpus: "0".into(),
            hugepage_limits: vec![pages(1)],
            unified: [("memory.high".to_owned(), "1".to_owned()), ("pids.max".to_owned(), "5".to_owned())].into(),
            ..Resources::default()
        };
        assert_eq!(merged(before.clone(), &Resources::default()), before);
        let wanted = Resources {
            cpu_quota: -1,
            memory_limit_in_bytes: 1 << 31,
            hugepage_limits: vec![pages(2)],
            unified: [("memory.high".to_owned(), "2".to_owned())].into(),
            ..Resources::default()
        };
        let after = merged(before.clone(), &wanted);
        assert_eq!((after.cpu_quota, after.cpu_shares, after.memory_limit_in_bytes), (-1, 512, 1 << 31));
        assert_eq!((after.cpuset_cpus.as_str(), &after.hugepage_limits), ("0", &vec![pages(2)]));
        assert_eq!((after.unified["memory.high"].as_str(), after.unified["pids.max"].as_str()), ("2", "5"));
    }
}
