//! The accounts of version 2: `Documentation/admin-guide/cgroup-v2.rst` of the kernel.

use super::files::{Files, device_numbers, huge_page_sizes, pairs};
use super::{Cpu, Detail, Device, HugePages, Memory, Pids, Stats, Throttling};
use crate::cgroup::Cgroup;
use crate::error::Result;

pub(super) fn stats(cgroup: &Cgroup, detail: Detail) -> Result<Stats> {
    let mut files = Files::open(cgroup.dir("memory")?)?;
    let mut stats = Stats {
        cpu: files.text("cpu.stat")?.and_then(cpu),
        memory: read_memory(&mut files, detail)?,
        io_pressure: files.pressure("io.pressure")?,
        ..Stats::default()
    };
    if let Some(cpu) = &mut stats.cpu {
        cpu.pressure = files.pressure("cpu.pressure")?;
    }
    if detail == Detail::Full {
        stats.pids = match files.number("pids.current")? {
            Some(current) => Some(Pids { current, limit: files.limit("pids.max")? }),
            None => None,
        };
        stats.devices = files.text("io.stat")?.map(devices).unwrap_or_default();
        stats.huge_pages = huge_pages(&mut files)?;
    }
    Ok(stats)
}

fn read_memory(files: &mut Files, detail: Detail) -> Result<Option<Memory>> {
    // The root cgroup, and one without the controller, has none of these files.
    let Some(usage) = files.number("memory.current")? else { return Ok(None) };
    let mut memory = files.text("memory.stat")?.map(memory).unwrap_or_default();
    memory.usage = usage;
    memory.limit = files.limit("memory.max")?;
    memory.swap = files.number("memory.swap.current")?;
    memory.swap_limit = files.limit("memory.swap.max")?;
    memory.pressure = files.pressure("memory.pressure")?;
    if detail == Detail::Full {
        memory.max_usage = files.number("memory.peak")?;
        for (key, value) in files.text("memory.events")?.into_iter().flat_map(pairs) {
            match key {
                "max" => memory.limit_hits = Some(value),
                "oom_kill" => memory.oom_kills = Some(value),
                _ => {}
            }
        }
    }
    Ok(Some(memory))
}

/// `cpu.stat`, in microseconds. The periods are there with the controller only.
pub(super) fn cpu(text: &str) -> Option<Cpu> {
    let (mut cpu, mut usage, mut throttling) = (Cpu::default(), None, None::<Throttling>);
    let nanoseconds = |value: u64| value.saturating_mul(1000);
    for (key, value) in pairs(text) {
        match key {
            "usage_usec" => usage = Some(nanoseconds(value)),
            "user_usec" => cpu.user = Some(nanoseconds(value)),
            "system_usec" => cpu.system = Some(nanoseconds(value)),
            "nr_periods" => throttling.get_or_insert_default().periods = value,
            "nr_throttled" => throttling.get_or_insert_default().throttled_periods = value,
            "throttled_usec" => throttling.get_or_insert_default().throttled = nanoseconds(value),
            _ => {}
        }
    }
    Some(Cpu { usage: usage?, throttling, ..cpu })
}

/// `memory.stat`.
pub(super) fn memory(text: &str) -> Memory {
    let mut memory = Memory::default();
    for (key, value) in pairs(text) {
        match key {
            "anon" => memory.anonymous = value,
            "file" => memory.cache = value,
            "file_mapped" => memory.mapped = value,
            "active_file" => memory.active_file = value,
            "inactive_file" => memory.inactive_file = value,
            "kernel" => memory.kernel = Some(value),
            "pgfault" => memory.page_faults = value,
            "pgmajfault" => memory.major_page_faults = value,
            _ => {}
        }
    }
    memory
}

/// `io.stat`: `8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0`.
pub(super) fn devices(text: &str) -> Vec<Device> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = device_numbers(words.next()?)?;
            let mut device = Device { major, minor, ..Device::default() };
            let mut counted = false;
            for (name, value) in words.filter_map(|word| word.split_once('=')) {
                let place = match name {
                    "rbytes" => &mut device.read_bytes,
                    "wbytes" => &mut device.write_bytes,
                    "rios" => &mut device.reads,
                    "wios" => &mut device.writes,
                    _ => continue,
                };
                *place = value.parse().ok()?;
                counted = true;
            }
            // A device may be listed with nothing behind it.
            counted.then_some(device)
        })
        .collect()
}

fn huge_pages(files: &mut Files) -> Result<Vec<HugePages>> {
    let mut all = Vec::new();
    for size in huge_page_sizes() {
        let Some(usage) = files.number(&format!("hugetlb.{size}.current"))? else { continue };
        let events = files.text(&format!("hugetlb.{size}.events"))?;
        let limit_hits = events.and_then(|text| pairs(text).find(|(key, _)| *key == "max").map(|(_, value)| value));
        all.push(HugePages { size: size.clone(), usage, max_usage: None, limit_hits });
    }
    Ok(all)
}
