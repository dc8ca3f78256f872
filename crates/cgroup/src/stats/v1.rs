//! The accounts of version 1: `Documentation/admin-guide/cgroup-v1/` of the kernel. Memory is that of the cgroup and all
//! below it (the `total_` lines), as usage and limit are.

use super::files::{Files, device_numbers, huge_page_sizes, pairs};
use super::{Cpu, Detail, Device, HugePages, Memory, Pids, Stats, Throttling};
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};

pub(super) fn stats(cgroup: &Cgroup, detail: Detail) -> Result<Stats> {
    let mut stats = Stats {
        cpu: controller(cgroup, "cpuacct", |files| read_cpu(files, detail))?,
        memory: controller(cgroup, "memory", |files| read_memory(files, detail))?,
        ..Stats::default()
    };
    if detail == Detail::Full {
        if let Some(cpu) = &mut stats.cpu {
            cpu.throttling = controller(cgroup, "cpu", |files| Ok(files.text("cpu.stat")?.map(throttling)))?;
        }
        stats.pids = controller(cgroup, "pids", |files| {
            let Some(current) = files.number("pids.current")? else { return Ok(None) };
            Ok(Some(Pids { current, limit: files.limit("pids.max")? }))
        })?;
        stats.devices = controller(cgroup, "blkio", |files| read_devices(files).map(Some))?.unwrap_or_default();
        stats.huge_pages = controller(cgroup, "hugetlb", |files| huge_pages(files).map(Some))?.unwrap_or_default();
    }
    Ok(stats)
}

/// What `read` finds in the hierarchy of `controller`; nothing if the host does not have it.
fn controller<T>(
    cgroup: &Cgroup,
    controller: &'static str,
    read: impl FnOnce(&mut Files) -> Result<Option<T>>,
) -> Result<Option<T>> {
    match cgroup.dir(controller) {
        Ok(dir) => read(&mut Files::open(dir)?),
        Err(Error::NoController { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_cpu(files: &mut Files, detail: Detail) -> Result<Option<Cpu>> {
    let Some(usage) = files.number("cpuacct.usage")? else { return Ok(None) };
    let mut cpu = Cpu { usage, ..Cpu::default() };
    if detail == Detail::Full {
        cpu.user = files.number("cpuacct.usage_user")?;
        cpu.system = files.number("cpuacct.usage_sys")?;
    }
    Ok(Some(cpu))
}

fn read_memory(files: &mut Files, detail: Detail) -> Result<Option<Memory>> {
    let Some(usage) = files.number("memory.usage_in_bytes")? else { return Ok(None) };
    let mut memory = files.text("memory.stat")?.map(memory).unwrap_or_default();
    memory.usage = usage;
    memory.limit = files.limit("memory.limit_in_bytes")?;
    // Version 1 limits memory and swap together.
    let both = files.limit("memory.memsw.limit_in_bytes")?;
    memory.swap_limit = both.map(|both| both.saturating_sub(memory.limit.unwrap_or(0)));
    if detail == Detail::Full {
        memory.max_usage = files.number("memory.max_usage_in_bytes")?;
        memory.kernel = files.number("memory.kmem.usage_in_bytes")?;
        memory.limit_hits = files.number("memory.failcnt")?;
        let oom = files.text("memory.oom_control")?;
        memory.oom_kills = oom.and_then(|text| pairs(text).find(|(key, _)| *key == "oom_kill").map(|(_, kills)| kills));
    }
    Ok(Some(memory))
}

/// `cpu.stat`, in nanoseconds.
pub(super) fn throttling(text: &str) -> Throttling {
    let mut throttling = Throttling::default();
    for (key, value) in pairs(text) {
        match key {
            "nr_periods" => throttling.periods = value,
            "nr_throttled" => throttling.throttled_periods = value,
            "throttled_time" => throttling.throttled = value,
            _ => {}
        }
    }
    throttling
}

/// `memory.stat`. Its line about swap is there only where swap is counted.
pub(super) fn memory(text: &str) -> Memory {
    let mut memory = Memory::default();
    for (key, value) in pairs(text) {
        match key {
            "total_rss" => memory.anonymous = value,
            "total_cache" => memory.cache = value,
            "total_mapped_file" => memory.mapped = value,
            "total_active_file" => memory.active_file = value,
            "total_inactive_file" => memory.inactive_file = value,
            "total_pgfault" => memory.page_faults = value,
            "total_pgmajfault" => memory.major_page_faults = value,
            "total_swap" => memory.swap = Some(value),
            _ => {}
        }
    }
    memory
}

fn read_devices(files: &mut Files) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    if let Some(text) = files.text("blkio.throttle.io_service_bytes_recursive")? {
        count(&mut devices, text, |device| (&mut device.read_bytes, &mut device.write_bytes));
    }
    if let Some(text) = files.text("blkio.throttle.io_serviced_recursive")? {
        count(&mut devices, text, |device| (&mut device.reads, &mut device.writes));
    }
    Ok(devices)
}

/// `8:16 Read 4096`, `8:16 Write 0` and others; the last line is the sum over all devices.
pub(super) fn count(devices: &mut Vec<Device>, text: &str, field: impl Fn(&mut Device) -> (&mut u64, &mut u64)) {
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(numbers), Some(operation), Some(value)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let (Some((major, minor)), Ok(value)) = (device_numbers(numbers), value.parse::<u64>()) else { continue };
        let known = devices.iter().position(|device| (device.major, device.minor) == (major, minor));
        let index = known.unwrap_or_else(|| {
            devices.push(Device { major, minor, ..Device::default() });
            devices.len() - 1
        });
        let (read, write) = field(&mut devices[index]);
        match operation {
            "Read" => *read = value,
            "Write" => *write = value,
            _ => {}
        }
    }
}

fn huge_pages(files: &mut Files) -> Result<Vec<HugePages>> {
    let mut all = Vec::new();
    for size in huge_page_sizes() {
        let Some(usage) = files.number(&format!("hugetlb.{size}.usage_in_bytes"))? else { continue };
        let max_usage = files.number(&format!("hugetlb.{size}.max_usage_in_bytes"))?;
        let limit_hits = files.number(&format!("hugetlb.{size}.failcnt"))?;
        all.push(HugePages { size: size.clone(), usage, max_usage, limit_hits });
    }
    Ok(all)
}
