//! Limits of a container's cgroup.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxCpu, LinuxDeviceCgroup, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use stasis_cri_api::runtime::LinuxContainerResources as Request;

use super::HostFacts;
use super::error::{Result, SpecError};

/// The cgroup limits of a request. CRI: zero and empty mean "not specified". PIDs are not limited here: the kubelet
/// limits them on the pod's cgroup.
pub(super) fn resources(
    request: &Request,
    devices: Vec<LinuxDeviceCgroup>,
    cgroup_v2: bool,
    host: &HostFacts,
) -> Result<LinuxResources> {
    let mut all = LinuxResources::default();
    all.set_devices(Some(devices));
    all.set_cpu(cpu(request)?);
    all.set_memory(memory(request, host)?);
    all.set_hugepage_limits(hugepages(request, host)?);
    all.set_unified(unified(request, cgroup_v2)?);
    Ok(all)
}

fn positive(field: &str, value: i64) -> Result<Option<u64>> {
    match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(SpecError::invalid(field, format!("{value} is negative"))),
    }
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

fn cpu(request: &Request) -> Result<Option<LinuxCpu>> {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive("resources.cpu_shares", request.cpu_shares)?);
    // -1 is cgroup v1's word for "no quota", and the kubelet uses it.
    cpu.set_quota((request.cpu_quota != 0).then_some(request.cpu_quota));
    cpu.set_period(positive("resources.cpu_period", request.cpu_period)?);
    cpu.set_cpus(text(&request.cpuset_cpus));
    cpu.set_mems(text(&request.cpuset_mems));
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

fn memory(request: &Request, host: &HostFacts) -> Result<Option<LinuxMemory>> {
    let mut memory = LinuxMemory::default();
    let limit = request.memory_limit_in_bytes;
    if limit < -1 {
        return Err(SpecError::invalid("resources.memory_limit_in_bytes", format!("{limit} is negative")));
    }
    memory.set_limit((limit != 0).then_some(limit));
    // OCI counts memory and swap together, as CRI does. Without swap accounting the limit cannot be set, nor is it
    // needed where there is no swap.
    let swap = request.memory_swap_limit_in_bytes;
    memory.set_swap((swap != 0 && host.swap_accounting).then_some(swap));
    Ok((memory != LinuxMemory::default()).then_some(memory))
}

fn hugepages(request: &Request, host: &HostFacts) -> Result<Option<Vec<LinuxHugepageLimit>>> {
    let mut limits = Vec::new();
    // The kubelet sends a limit of 0 for each page size of the node, also where the controller is absent.
    for wanted in &request.hugepage_limits {
        if !host.hugetlb {
            if wanted.limit > 0 {
                return Err(SpecError::host(
                    "resources.hugepage_limits",
                    "the kernel has no hugetlb controller; ask for no huge pages, or enable it",
                ));
            }
            continue;
        }
        let mut limit = LinuxHugepageLimit::default();
        limit.set_page_size(wanted.page_size.clone());
        limit.set_limit(i64::try_from(wanted.limit).unwrap_or(i64::MAX));
        limits.push(limit);
    }
    Ok((!limits.is_empty()).then_some(limits))
}

/// Files of cgroup v2 by name. A name with a slash would reach another cgroup; `cgroup.*` are the controls of the
/// cgroup itself, which are ours.
fn unified(request: &Request, cgroup_v2: bool) -> Result<Option<HashMap<String, String>>> {
    if request.unified.is_empty() {
        return Ok(None);
    }
    if !cgroup_v2 {
        return Err(SpecError::host("resources.unified", "the node runs cgroup v1, these are files of cgroup v2"));
    }
    for (name, value) in &request.unified {
        let ok = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_'))
            && name.contains('.')
            && !name.starts_with('.')
            && !name.starts_with("cgroup.");
        if !ok || value.contains(['\n', '\0']) {
            return Err(SpecError::invalid(
                "resources.unified",
                format!("{name:?} is no limit of cgroup v2 or its value has more than one line"),
            ));
        }
    }
    Ok(Some(request.unified.clone()))
}

/// The OOM score of the first process: a process without CAP_SYS_RESOURCE cannot go below its own, so lower wishes
/// are raised to `floor`.
pub(super) fn oom_score_adj(request: &Request, floor: i32) -> Result<i32> {
    const RANGE: std::ops::RangeInclusive<i64> = -1000..=1000;
    let wanted = request.oom_score_adj;
    if !RANGE.contains(&wanted) {
        return Err(SpecError::invalid("resources.oom_score_adj", format!("{wanted} is not within -1000 and 1000")));
    }
    Ok(i32::try_from(wanted).unwrap_or_default().max(floor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unified_reaches_no_other_cgroup() {
        for name in ["../memory.max", "cgroup.procs", "cgroup.freeze", "memory/max", "max", "", ".max", "Memory.max"] {
            let request = Request { unified: HashMap::from([(name.into(), "1".into())]), ..Default::default() };
            assert!(unified(&request, true).is_err(), "{name:?}");
        }
        let request = Request { unified: HashMap::from([("memory.max".into(), "1".into())]), ..Default::default() };
        assert!(unified(&request, true).is_ok());
        assert!(unified(&request, false).is_err(), "on cgroup v1");
        let request = Request { unified: HashMap::from([("memory.max".into(), "1\n2".into())]), ..Default::default() };
        assert!(unified(&request, true).is_err());
    }

    #[test]
    fn oom_score_is_raised_to_what_the_kernel_allows() {
        let wanted = |oom_score_adj| Request { oom_score_adj, ..Default::default() };
        assert_eq!(oom_score_adj(&wanted(-998), 0).unwrap(), 0);
        assert_eq!(oom_score_adj(&wanted(-998), -1000).unwrap(), -998);
        assert_eq!(oom_score_adj(&wanted(300), 0).unwrap(), 300);
        assert!(oom_score_adj(&wanted(1001), 0).is_err());
        assert!(oom_score_adj(&wanted(i64::MIN), 0).is_err());
    }
}
