//! CRI's metrics: what the kubelet serves under `/metrics/cadvisor`, collected by the runtime.
//!
//! They come from the same accounts as the statistics, in full detail, and are read when asked. CRI's values are whole
//! numbers: times are told in whole seconds.

mod families;
mod process;

use std::sync::Arc;

use stasis_cgroup::{Cgroup, Cpu, Detail, Device, HugePages, Memory, Pressure, Stats};
use stasis_cri_api::runtime::{
    ContainerMetrics, LinuxContainerResources, Metric, MetricDescriptor, PodSandboxMetrics, UInt64Value,
};

use self::families::Family;
use crate::error::Result;
use crate::pods::{Container, Pod, Pods};
use crate::record::{ContainerRecord, Phase, PodRecord};
use crate::stats::{Interface, read_group};

/// The device that stands for a container's root file system, as in cAdvisor's dashboards and containerd.
const ROOT_DEVICE: &str = "/";

const NANOSECONDS: u64 = 1_000_000_000;

/// Values of the labels that every metric has: [`families::BASE`].
type Labels = [String; families::BASE.len()];

/// Metrics of one pod or container in the making.
struct Sheet {
    labels: Labels,
    metrics: Vec<Metric>,
}

impl Sheet {
    fn new(labels: Labels) -> Self {
        Self { labels, metrics: Vec::new() }
    }

    /// Adds a value read just now.
    fn add(&mut self, family: &Family, extra: &[&str], value: u64) {
        self.add_at(family, extra, value, 0);
    }

    /// Adds a value that was read at `timestamp`; "Timestamp should be 0 if the metric was gathered live" (CRI).
    fn add_at(&mut self, family: &Family, extra: &[&str], value: u64, timestamp: i64) {
        let labels = self.labels.iter().cloned().chain(extra.iter().map(|value| (*value).to_owned()));
        self.metrics.push(Metric {
            name: family.name.to_owned(),
            timestamp,
            metric_type: family.kind.into(),
            label_values: labels.collect(),
            value: Some(UInt64Value { value }),
        });
    }

    fn add_if(&mut self, family: &Family, value: Option<u64>) {
        if let Some(value) = value {
            self.add(family, &[], value);
        }
    }

    /// Adds whole seconds.
    fn add_time(&mut self, family: &Family, nanoseconds: u64) {
        self.add(family, &[], nanoseconds / NANOSECONDS);
    }

    fn accounts(&mut self, stats: &Stats) {
        if let Some(cpu) = &stats.cpu {
            self.cpu(cpu);
        }
        if let Some(memory) = &stats.memory {
            self.memory(memory);
        }
        self.pressure(&families::IO_WAITING, &families::IO_STALLED, stats.io_pressure.as_ref());
        stats.huge_pages.iter().for_each(|pages| self.huge_pages(pages));
        if let Some(pids) = &stats.pids {
            self.add(&families::THREADS, &[], pids.current);
            self.add(&families::THREADS_MAX, &[], pids.limit.unwrap_or(0));
        }
        stats.devices.iter().for_each(|device| self.device(device));
    }

    fn cpu(&mut self, cpu: &Cpu) {
        self.add_time(&families::CPU_USAGE, cpu.usage);
        self.add_if(&families::CPU_USER, cpu.user.map(|user| user / NANOSECONDS));
        self.add_if(&families::CPU_SYSTEM, cpu.system.map(|system| system / NANOSECONDS));
        if let Some(throttling) = &cpu.throttling {
            self.add(&families::CPU_PERIODS, &[], throttling.periods);
            self.add(&families::CPU_THROTTLED_PERIODS, &[], throttling.throttled_periods);
            self.add_time(&families::CPU_THROTTLED, throttling.throttled);
        }
        self.pressure(&families::CPU_WAITING, &families::CPU_STALLED, cpu.pressure.as_ref());
    }

    fn memory(&mut self, memory: &Memory) {
        self.add(&families::MEMORY_USAGE, &[], memory.usage);
        self.add_if(&families::MEMORY_MAX_USAGE, memory.max_usage);
        self.add(&families::MEMORY_WORKING_SET, &[], memory.working_set());
        self.add(&families::MEMORY_RSS, &[], memory.anonymous);
        self.add(&families::MEMORY_CACHE, &[], memory.cache);
        self.add(&families::MEMORY_MAPPED, &[], memory.mapped);
        self.add_if(&families::MEMORY_KERNEL, memory.kernel);
        self.add_if(&families::MEMORY_SWAP, memory.swap);
        self.add(&families::MEMORY_ACTIVE_FILE, &[], memory.active_file);
        self.add(&families::MEMORY_INACTIVE_FILE, &[], memory.inactive_file);
        self.add_if(&families::MEMORY_FAILCNT, memory.limit_hits);
        self.add_if(&families::OOM_EVENTS, memory.oom_kills);
        // The counters are those of the group and all below it; a container rarely has anything below it.
        for scope in ["container", "hierarchy"] {
            self.add(&families::MEMORY_FAILURES, &["pgfault", scope], memory.page_faults);
            self.add(&families::MEMORY_FAILURES, &["pgmajfault", scope], memory.major_page_faults);
        }
        self.pressure(&families::MEMORY_WAITING, &families::MEMORY_STALLED, memory.pressure.as_ref());
    }

    fn pressure(&mut self, waiting: &Family, stalled: &Family, pressure: Option<&Pressure>) {
        if let Some(pressure) = pressure {
            self.add_time(waiting, pressure.some.total);
            self.add_time(stalled, pressure.full.total);
        }
    }

    fn huge_pages(&mut self, pages: &HugePages) {
        let size = [pages.size.as_str()];
        self.add(&families::HUGETLB_USAGE, &size, pages.usage);
        if let Some(most) = pages.max_usage {
            self.add(&families::HUGETLB_MAX_USAGE, &size, most);
        }
        if let Some(hits) = pages.limit_hits {
            self.add(&families::HUGETLB_FAILCNT, &size, hits);
        }
    }

    fn device(&mut self, device: &Device) {
        let name = device_name(device.major, device.minor);
        self.add(&families::FS_READ_BYTES, &[&name], device.read_bytes);
        self.add(&families::FS_READS, &[&name], device.reads);
        self.add(&families::FS_WRITE_BYTES, &[&name], device.write_bytes);
        self.add(&families::FS_WRITES, &[&name], device.writes);
        let (major, minor) = (device.major.to_string(), device.minor.to_string());
        for (operation, bytes) in [("Read", device.read_bytes), ("Write", device.write_bytes)] {
            self.add(&families::BLKIO_USAGE, &[&name, &major, &minor, operation], bytes);
        }
    }

    fn interface(&mut self, interface: &Interface) {
        let name = [interface.name.as_str()];
        let (received, sent) = (&interface.received, &interface.sent);
        self.add(&families::RX_BYTES, &name, received.bytes);
        self.add(&families::RX_PACKETS, &name, received.packets);
        self.add(&families::RX_DROPPED, &name, received.dropped);
        self.add(&families::RX_ERRORS, &name, received.errors);
        self.add(&families::TX_BYTES, &name, sent.bytes);
        self.add(&families::TX_PACKETS, &name, sent.packets);
        self.add(&families::TX_DROPPED, &name, sent.dropped);
        self.add(&families::TX_ERRORS, &name, sent.errors);
    }

    fn spec(&mut self, resources: &LinuxContainerResources) {
        let positive = |value: i64| u64::try_from(value).unwrap_or(0);
        if resources.cpu_period > 0 {
            self.add(&families::SPEC_CPU_PERIOD, &[], positive(resources.cpu_period));
        }
        if resources.cpu_quota > 0 {
            self.add(&families::SPEC_CPU_QUOTA, &[], positive(resources.cpu_quota));
        }
        if resources.cpu_shares > 0 {
            self.add(&families::SPEC_CPU_SHARES, &[], positive(resources.cpu_shares));
        }
        self.add(&families::SPEC_MEMORY_LIMIT, &[], positive(resources.memory_limit_in_bytes));
        self.add(&families::SPEC_MEMORY_RESERVATION, &[], 0);
        self.add(&families::SPEC_MEMORY_SWAP, &[], positive(resources.memory_swap_limit_in_bytes));
    }
}

impl Pods {
    /// The metrics that [`Pods::list_pod_sandbox_metrics`] can have: CRI ListMetricDescriptors.
    pub fn metric_descriptors(&self) -> Vec<MetricDescriptor> {
        families::ALL.iter().map(Family::descriptor).collect()
    }

    /// The metrics of all ready pods and their running containers: CRI ListPodSandboxMetrics.
    ///
    /// # Errors
    /// None but an abnormal end.
    pub async fn list_pod_sandbox_metrics(&self) -> Result<Vec<PodSandboxMetrics>> {
        let mut ready = self.pods.all();
        ready.retain(|pod| pod.record().ready);
        self.off_the_async_threads(move |pods| ready.iter().map(|pod| pods.pod_metrics(pod)).collect()).await
    }

    fn pod_metrics(&self, pod: &Arc<Pod>) -> PodSandboxMetrics {
        let record = pod.record().clone();
        let group = self.pod_group(&record);
        let mut sheet = Sheet::new(labels(&record, group.as_ref().map(Cgroup::path), None));
        if let Some(stats) = group.and_then(|group| read_group(&group, &pod.id, Detail::Full)) {
            sheet.accounts(&stats);
        }
        self.pod_interfaces(&record).iter().flatten().for_each(|interface| sheet.interface(interface));
        let containers = self.containers_of(&pod.id);
        PodSandboxMetrics {
            pod_sandbox_id: pod.id.clone(),
            metrics: sheet.metrics,
            container_metrics: containers
                .iter()
                .filter_map(|container| self.container_metrics(&record, container))
                .collect(),
        }
    }

    /// None unless the container runs.
    fn container_metrics(&self, pod: &PodRecord, container: &Arc<Container>) -> Option<ContainerMetrics> {
        let record = container.record().clone();
        if record.phase() != Phase::Running {
            return None;
        }
        let group = self.group(container)?;
        let stats = read_group(&group, &container.id, Detail::Full)?;
        let mut sheet = Sheet::new(labels(pod, Some(group.path()), Some(&record)));
        let seconds = |nanoseconds: i64| u64::try_from(nanoseconds).unwrap_or(0) / NANOSECONDS;
        sheet.add(&families::LAST_SEEN, &[], seconds(crate::record::now()));
        sheet.add(&families::START_TIME, &[], seconds(record.started_at));
        sheet.accounts(&stats);
        self.add_file_system(&mut sheet, container);
        add_processes(&mut sheet, &group, record.pid);
        let resources = record.config.as_ref().and_then(|config| config.linux.as_ref()?.resources.as_ref());
        sheet.spec(resources.unwrap_or(&LinuxContainerResources::default()));
        Some(ContainerMetrics { container_id: container.id.clone(), metrics: sheet.metrics })
    }

    fn add_file_system(&self, sheet: &mut Sheet, container: &Container) {
        if let Some(layer) = container.layer.get() {
            sheet.add_at(&families::FS_USAGE, &[ROOT_DEVICE], layer.usage.bytes, layer.at);
        }
        if let Ok(facts) = rustix::fs::statvfs(&self.config.root) {
            sheet.add(&families::FS_LIMIT, &[ROOT_DEVICE], facts.f_blocks.saturating_mul(facts.f_frsize));
            sheet.add(&families::FS_INODES, &[ROOT_DEVICE], facts.f_files);
            sheet.add(&families::FS_INODES_FREE, &[ROOT_DEVICE], facts.f_ffree);
        }
    }
}

fn add_processes(sheet: &mut Sheet, group: &Cgroup, first: u32) {
    let processes = group.procs().unwrap_or_default();
    let descriptors = process::descriptors(&processes);
    sheet.add(&families::PROCESSES, &[], processes.len() as u64);
    sheet.add(&families::DESCRIPTORS, &[], descriptors.open);
    sheet.add(&families::SOCKETS, &[], descriptors.sockets);
    if let Some(limit) = process::open_files_limit(first) {
        sheet.add(&families::ULIMITS, &["max_open_files"], limit);
    }
}

/// As cAdvisor has them: `id` is the control group, `name` the container's ID; both a container's name and its image are
/// empty for what is the pod's as a whole.
fn labels(pod: &PodRecord, group: Option<&str>, container: Option<&ContainerRecord>) -> Labels {
    let metadata = pod.config.as_ref().and_then(|config| config.metadata.clone()).unwrap_or_default();
    let config = container.and_then(|record| record.config.as_ref());
    let container_name = config.and_then(|config| config.metadata.as_ref()).map(|metadata| metadata.name.clone());
    let image =
        config.and_then(|config| config.image.as_ref()).map(|image| match image.user_specified_image.as_str() {
            "" => image.image.clone(),
            name => name.to_owned(),
        });
    [
        container_name.unwrap_or_default(),
        group.unwrap_or_default().to_owned(),
        image.unwrap_or_default(),
        container.map(|record| record.id.clone()).unwrap_or_default(),
        metadata.namespace,
        metadata.name,
    ]
}

/// `/dev/sda`, or the numbers of a device without a name.
fn device_name(major: u32, minor: u32) -> String {
    let facts = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).unwrap_or_default();
    match facts.lines().find_map(|line| line.strip_prefix("DEVNAME=")) {
        Some(name) => format!("/dev/{name}"),
        None => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use stasis_cgroup::{Pids, Stall, Throttling};

    use super::*;

    /// All that a kernel can say, each number its own.
    fn everything() -> Stats {
        let pressure = |total| Pressure {
            some: Stall { total, ..Stall::default() },
            full: Stall { total: total / 2, ..Stall::default() },
        };
        Stats {
            cpu: Some(Cpu {
                usage: 7_900_000_000,
                user: Some(5_000_000_000),
                system: Some(2_000_000_000),
                throttling: Some(Throttling { periods: 3, throttled_periods: 2, throttled: 1_000_000_000 }),
                pressure: Some(pressure(4_000_000_000)),
            }),
            memory: Some(Memory {
                usage: 100,
                inactive_file: 30,
                max_usage: Some(200),
                kernel: Some(10),
                swap: Some(11),
                limit_hits: Some(12),
                oom_kills: Some(13),
                pressure: Some(pressure(6_000_000_000)),
                ..Memory::default()
            }),
            pids: Some(Pids { current: 14, limit: None }),
            devices: vec![Device { major: 4095, minor: 7, read_bytes: 15, ..Device::default() }],
            huge_pages: vec![HugePages { size: "2MB".into(), usage: 16, max_usage: Some(17), limit_hits: Some(18) }],
            io_pressure: Some(pressure(8_000_000_000)),
        }
    }

    #[test]
    fn every_metric_is_described_with_as_many_labels() {
        let mut sheet = Sheet::new(Labels::default());
        sheet.accounts(&everything());
        sheet.interface(&Interface { name: "eth0".into(), ..Interface::default() });
        sheet.spec(&LinuxContainerResources { cpu_period: 1, cpu_quota: 2, cpu_shares: 3, ..Default::default() });
        let described: HashMap<_, _> = families::ALL.iter().map(|family| (family.name, family.descriptor())).collect();
        assert_eq!(described.len(), families::ALL.len(), "a name was given twice");
        let mut sent = HashSet::new();
        for metric in &sheet.metrics {
            let descriptor = &described[metric.name.as_str()];
            assert_eq!(metric.label_values.len(), descriptor.label_keys.len(), "{}", metric.name);
            assert!(sent.insert((&metric.name, &metric.label_values)), "sent twice: {metric:?}");
        }
        let value = |name: &str| sheet.metrics.iter().find(|metric| metric.name == name).unwrap().value.unwrap().value;
        assert_eq!(value("container_cpu_usage_seconds_total"), 7);
        assert_eq!(value("container_memory_working_set_bytes"), 70);
        assert_eq!(value("container_pressure_io_stalled_seconds_total"), 4);
        assert_eq!(value("container_threads_max"), 0);
        assert_eq!(value("container_hugetlb_usage_bytes"), 16);
    }

    #[test]
    fn a_device_without_a_name_is_told_by_its_numbers() {
        assert_eq!(device_name(4095, 1_048_575), "4095:1048575");
    }
}
