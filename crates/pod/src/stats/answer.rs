//! From accounts to CRI's messages. What the kernel does not say stays unset: zero would be a claim.

use std::path::Path;
use std::time::Instant;

use stasis_cgroup::{Cpu, Memory, Pressure, Stall, Stats};
use stasis_cri_api::runtime::*;

use super::network::Interface;
use super::{Measured, Rate};
use crate::record::{ContainerRecord, PodRecord};

/// The interface that a pod is known by, as the network plugins name it.
const DEFAULT_INTERFACE: &str = "eth0";

/// The accounts of a container or pod as CRI has them.
#[derive(Default)]
pub(super) struct Accounts {
    pub(super) cpu: Option<CpuUsage>,
    pub(super) memory: Option<MemoryUsage>,
    pub(super) swap: Option<SwapUsage>,
    pub(super) io: Option<IoUsage>,
}

impl Accounts {
    /// `timestamp` is when `stats` were read; `rate` remembers the processor time of the last time.
    pub(super) fn new(stats: Stats, timestamp: i64, rate: &Rate) -> Self {
        let Stats { cpu: used, memory: taken, io_pressure, .. } = stats;
        Self {
            cpu: used.map(|used| cpu(&used, timestamp, rate.of(used.usage, Instant::now()))),
            swap: taken.as_ref().and_then(|taken| swap(taken, timestamp)),
            memory: taken.map(|taken| memory(&taken, timestamp)),
            io: io_pressure.map(|pressure| IoUsage { timestamp, psi: Some(psi(&pressure)) }),
        }
    }
}

fn cpu(cpu: &Cpu, timestamp: i64, nano_cores: Option<u64>) -> CpuUsage {
    CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(cpu.usage),
        usage_nano_cores: nano_cores.and_then(value),
        psi: cpu.pressure.as_ref().map(psi),
    }
}

fn memory(memory: &Memory, timestamp: i64) -> MemoryUsage {
    MemoryUsage {
        timestamp,
        working_set_bytes: value(memory.working_set()),
        available_bytes: memory.available().and_then(value),
        usage_bytes: value(memory.usage),
        rss_bytes: value(memory.anonymous),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: memory.pressure.as_ref().map(psi),
    }
}

fn swap(memory: &Memory, timestamp: i64) -> Option<SwapUsage> {
    let used = memory.swap?;
    let available = memory.swap_limit.map(|limit| limit.saturating_sub(used));
    Some(SwapUsage { timestamp, swap_available_bytes: available.and_then(value), swap_usage_bytes: value(used) })
}

fn psi(pressure: &Pressure) -> PsiStats {
    let data =
        |stall: &Stall| PsiData { total: stall.total, avg10: stall.avg10, avg60: stall.avg60, avg300: stall.avg300 };
    PsiStats { full: Some(data(&pressure.full)), some: Some(data(&pressure.some)) }
}

/// "Stats for all found network interfaces, excluding the default" (CRI); without an interface of the usual name, the
/// first one stands for the pod.
pub(super) fn network(interfaces: Vec<Interface>, timestamp: i64) -> NetworkUsage {
    let mut interfaces: Vec<_> = interfaces.into_iter().map(interface).collect();
    let usual = interfaces.iter().position(|interface| interface.name == DEFAULT_INTERFACE).unwrap_or(0);
    let default_interface = (usual < interfaces.len()).then(|| interfaces.remove(usual));
    NetworkUsage { timestamp, default_interface, interfaces }
}

fn interface(interface: Interface) -> NetworkInterfaceUsage {
    NetworkInterfaceUsage {
        rx_bytes: value(interface.received.bytes),
        rx_errors: value(interface.received.errors),
        tx_bytes: value(interface.sent.bytes),
        tx_errors: value(interface.sent.errors),
        name: interface.name,
    }
}

pub(super) fn writable_layer(measured: &Measured, root: &Path) -> FilesystemUsage {
    FilesystemUsage {
        timestamp: measured.at,
        fs_id: Some(FilesystemIdentifier { mountpoint: root.display().to_string() }),
        used_bytes: value(measured.usage.bytes),
        inodes_used: value(measured.usage.inodes),
    }
}

pub(super) fn container_attributes(record: &ContainerRecord) -> ContainerAttributes {
    let config = record.config.as_ref();
    ContainerAttributes {
        id: record.id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
    }
}

pub(super) fn pod_attributes(record: &PodRecord) -> PodSandboxAttributes {
    let config = record.config.as_ref();
    PodSandboxAttributes {
        id: record.id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
    }
}

/// CRI wraps its numbers, so that zero and "not told" differ.
pub(super) fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::network::Traffic;

    fn named(name: &str, bytes: u64) -> Interface {
        Interface { name: name.into(), received: Traffic { bytes, ..Traffic::default() }, sent: Traffic::default() }
    }

    #[test]
    fn the_default_interface_stands_apart_from_the_others() {
        let check = |names: &[&str], default: Option<&str>, others: &[&str]| {
            let usage = network(names.iter().map(|name| named(name, 7)).collect(), 1);
            assert_eq!(usage.default_interface.map(|interface| interface.name).as_deref(), default);
            let named: Vec<_> = usage.interfaces.iter().map(|interface| interface.name.as_str()).collect();
            assert_eq!(named, others);
        };
        check(&["net1", "eth0"], Some("eth0"), &["net1"]);
        check(&["net1", "net2"], Some("net1"), &["net2"]);
        check(&[], None, &[]);
    }

    #[test]
    fn no_limit_is_no_available_memory_and_never_zero() {
        let unlimited = Memory { usage: 10, inactive_file: 4, ..Memory::default() };
        let usage = memory(&unlimited, 1);
        assert_eq!((usage.working_set_bytes, usage.available_bytes), (value(6), None));
        assert!(swap(&unlimited, 1).is_none(), "swap is not counted");
        let limited = Memory { limit: Some(16), swap: Some(3), swap_limit: Some(2), ..unlimited };
        assert_eq!(memory(&limited, 1).available_bytes, value(10));
        assert_eq!(swap(&limited, 1).unwrap().swap_available_bytes, value(0));
    }
}
