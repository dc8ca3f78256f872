//! What operators see of the engine: its metrics, and the dump of its state for debugging.

use serde_json::{Value, json};
use stasis_metrics::{Counter, Histogram, Kind, Text};

use crate::checkpoint::CheckpointReport;
use crate::error::{IoContext as _, Result};
use crate::pods::{Pods, blocking};
use crate::record::Phase;

/// What the engine counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    checkpoints: Outcomes,
    checkpoint_time: Histogram,
    frozen: Histogram,
    archived: Counter,
    restores: Outcomes,
}

#[derive(Debug, Default)]
struct Outcomes {
    done: Counter,
    failed: Counter,
}

impl Outcomes {
    fn count<T>(&self, result: &Result<T>) {
        if result.is_ok() { self.done.add_one() } else { self.failed.add_one() }
    }

    fn write(&self, text: &mut Text) {
        text.sample(&[("result", "done")], self.done.get());
        text.sample(&[("result", "failed")], self.failed.get());
    }
}

impl Counters {
    pub(crate) fn checkpoint(&self, result: &Result<CheckpointReport>) {
        self.checkpoints.count(result);
        if let Ok(report) = result {
            self.checkpoint_time.observe(report.total);
            self.frozen.observe(report.frozen);
            self.archived.add(report.size_bytes);
        }
    }

    pub(crate) fn restore(&self, result: &Result<()>) {
        self.restores.count(result);
    }
}

impl Pods {
    /// The CDI devices of this host, and what is wrong with its specifications.
    ///
    /// # Errors
    /// Where the files were not read to the end.
    pub async fn cdi(&self) -> Result<stasis_cdi::Overview> {
        let registry = self.config.cdi.clone();
        blocking(move || Ok(registry.overview())).await.doing("read the CDI specifications")
    }

    /// Writes the metrics of pods, containers, checkpoints and restores.
    pub fn write_metrics(&self, text: &mut Text) {
        let pods = self.pods.all();
        let ready = pods.iter().filter(|pod| pod.record().ready).count();
        text.family("stasis_pods", Kind::Gauge, "Pod sandboxes by state.");
        text.sample(&[("state", "ready")], ready as u64);
        text.sample(&[("state", "not_ready")], (pods.len() - ready) as u64);
        let containers = self.containers.all();
        text.family("stasis_containers", Kind::Gauge, "Containers by state.");
        for (phase, state) in [(Phase::Created, "created"), (Phase::Running, "running"), (Phase::Exited, "exited")] {
            let count = containers.iter().filter(|container| container.record().phase() == phase).count();
            text.sample(&[("state", state)], count as u64);
        }
        let counters = &self.counters;
        text.family("stasis_checkpoints", Kind::Counter, "Checkpoints of containers by result.");
        counters.checkpoints.write(text);
        text.family("stasis_checkpoint_duration_seconds", Kind::Histogram, "Time of a checkpoint as a whole.");
        text.histogram(&[], &counters.checkpoint_time);
        text.family(
            "stasis_checkpoint_frozen_seconds",
            Kind::Histogram,
            "Time that a checkpoint kept its container still.",
        );
        text.histogram(&[], &counters.frozen);
        text.family("stasis_checkpoint_archive_bytes", Kind::Counter, "Bytes of the archives that were written.");
        text.sample(&[], counters.archived.get());
        text.family("stasis_restores", Kind::Counter, "Starts of containers out of checkpoints by result.");
        counters.restores.write(text);
    }

    /// The state of the engine as JSON, for a person who looks for a fault. Its form is no promise.
    pub fn dump(&self) -> Value {
        let pods: Vec<Value> = self
            .pods
            .all()
            .iter()
            .map(|pod| {
                let record = pod.record().clone();
                let metadata = record.config.as_ref().and_then(|config| config.metadata.clone()).unwrap_or_default();
                json!({
                    "id": record.id,
                    "name": format!("{}/{}", metadata.namespace, metadata.name),
                    "ready": record.ready,
                    "handler": record.handler,
                    "shim": pod.sandbox().map(|sandbox| sandbox.pid()),
                    "networkReleased": record.network_released,
                    "ips": record.ips,
                    "stopsOrRemoves": pod.operation.try_lock().is_err(),
                })
            })
            .collect();
        let containers: Vec<Value> = self
            .containers
            .all()
            .iter()
            .map(|container| {
                let record = container.record().clone();
                let metadata = record.config.as_ref().and_then(|config| config.metadata.clone()).unwrap_or_default();
                json!({
                    "id": record.id,
                    "pod": record.pod_id,
                    "name": metadata.name,
                    "attempt": metadata.attempt,
                    "state": format!("{:?}", record.phase()).to_lowercase(),
                    "pid": record.pid,
                    "task": container.task().map(|task| json!({ "pid": task.pid(), "bundle": task.bundle() })),
                    "exitCode": record.exit_code,
                    "reason": record.reason,
                    "message": record.message,
                    "restored": record.restored,
                    "checkpoint": record.checkpoint,
                    "cgroupsPath": record.cgroups_path,
                    "inOperation": container.operation.try_lock().is_err(),
                })
            })
            .collect();
        json!({ "pods": pods, "containers": containers, "operations": self.running_operations() })
    }
}
