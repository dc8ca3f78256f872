//! What of the host decides how a specification looks. Found once, at the start of the daemon.

use std::path::Path;

use rustix::thread::CapabilitySet;

use crate::apparmor;

/// Facts about the kernel and the daemon's own rights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Lowest OOM score that may be set: the daemon's own, or -1000 with CAP_SYS_RESOURCE.
    pub oom_score_adj_floor: i32,
    /// The kernel filters system calls.
    pub seccomp: bool,
    /// AppArmor is enabled.
    pub apparmor: bool,
    /// AppArmor is enabled and can be given our default profile: the program that loads profiles is there.
    pub apparmor_default: bool,
    /// SELinux is enabled.
    pub selinux: bool,
    /// Release of the kernel: major and minor.
    pub kernel: (u32, u32),
    /// Capabilities that the daemon holds itself, by number as bits: nobody can give what they do not have.
    pub capabilities: u64,
    /// The memory controller counts swap.
    pub swap_accounting: bool,
    /// There is a hugetlb controller.
    pub hugetlb: bool,
}

impl HostFacts {
    /// Looks at the running kernel. What cannot be read counts as absent.
    #[must_use]
    pub fn detect() -> Self {
        let cgroup = Path::new("/sys/fs/cgroup");
        let own = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
        let v2 = read("/sys/fs/cgroup/cgroup.controllers");
        let apparmor = read("/sys/module/apparmor/parameters/enabled").starts_with('Y');
        Self {
            oom_score_adj_floor: oom_score_adj_floor(own),
            seccomp: Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
            apparmor,
            apparmor_default: apparmor && apparmor::parser().is_some(),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            kernel: parse_release(&read("/proc/sys/kernel/osrelease")),
            capabilities: own.bits(),
            swap_accounting: cgroup.join("memory/memory.memsw.limit_in_bytes").exists() || swap_in_v2(),
            hugetlb: cgroup.join("hugetlb").is_dir() || v2.split_whitespace().any(|c| c == "hugetlb"),
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn oom_score_adj_floor(own: CapabilitySet) -> i32 {
    let may_lower = own.contains(CapabilitySet::SYS_RESOURCE);
    if may_lower { -1000 } else { read("/proc/self/oom_score_adj").trim().parse().unwrap_or(0) }
}

/// The root of cgroup v2 has no `memory.swap.*`: the daemon's own cgroup shows whether swap is counted.
fn swap_in_v2() -> bool {
    let own = read("/proc/self/cgroup");
    let path = own.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    Path::new("/sys/fs/cgroup").join(path).join("memory.swap.max").exists()
}

fn parse_release(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_described() {
        let facts = HostFacts::detect();
        assert!(facts.kernel >= (5, 10), "{facts:?}");
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let permitted = status.lines().find_map(|l| l.strip_prefix("CapPrm:")).unwrap();
        assert_eq!(facts.capabilities, u64::from_str_radix(permitted.trim(), 16).unwrap(), "{facts:?}");
        assert!((-1000..=1000).contains(&facts.oom_score_adj_floor), "{facts:?}");
    }

    #[test]
    fn kernel_release() {
        assert_eq!(parse_release("6.18.3-1-amd64"), (6, 18));
        assert_eq!(parse_release("7.0-rc1"), (7, 0));
        assert_eq!(parse_release("odd"), (0, 0));
    }
}
