//! What the kernel of this host offers, read from its file systems below a given root (`/`, or a made-up one in tests).

use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use stasis_cgroup::{Cgroups, Mode};
use stasis_cri_api::stasis::Finding;

use super::{error, fine, warning};

/// `statfs` magics, from `linux/magic.h`.
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
const TMPFS_MAGIC: i64 = 0x0102_1994;
const NFS_MAGIC: i64 = 0x6969;

/// Controllers without which limits of a pod are not kept.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];

/// Bit of CAP_SYS_RESOURCE in `CapEff` (capabilities(7)).
const CAP_SYS_RESOURCE: u32 = 24;

/// Bit 55 of an entry of `/proc/PID/pagemap`: written since the last clearing.
const SOFT_DIRTY_BIT: u32 = 55;

/// Which version of control groups, with which controllers.
pub(super) fn cgroup() -> Finding {
    match Cgroups::probe() {
        Ok(cgroups) => judge_cgroup(cgroups.mode(), &cgroups.controllers()),
        Err(failure) => error("cgroup", "none", format!("no container can run: {failure}")),
    }
}

pub(super) fn judge_cgroup(mode: Mode, controllers: &[String]) -> Finding {
    let (name, freezer) = match mode {
        Mode::V2 => ("v2", None),
        Mode::V1 => ("v1", Some("freezer")),
    };
    let needed = CONTROLLERS.into_iter().chain(freezer);
    let missing: Vec<_> = needed.filter(|name| !controllers.iter().any(|have| have == name)).collect();
    let found = format!("{name}: {}", controllers.join(" "));
    if missing.is_empty() {
        return fine("cgroup", found);
    }
    let missing = missing.join(", ");
    warning("cgroup", found, format!("missing controllers: {missing}; what they limit or freeze is not; enable them"))
}

/// Whether overlayfs is there, and whether the root directory's file system can carry it.
pub(super) fn overlayfs(root: &Path, images: &Path) -> Finding {
    let known = words(&root.join("proc/filesystems")).iter().any(|word| word == "overlay");
    if !known {
        return error("overlayfs", "not in /proc/filesystems", "no container can run: modprobe overlay");
    }
    let existing = images.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let advice = format!("containers cannot have a writable layer in {}: put `root` on ext4 or xfs", images.display());
    match magic(existing) {
        Some(OVERLAYFS_MAGIC) => error("overlayfs", "root directory is itself on overlayfs", advice),
        Some(NFS_MAGIC) => error("overlayfs", "root directory is on NFS", advice),
        _ => fine("overlayfs", "available"),
    }
}

/// Whether CRIU can keep its probe of the kernel.
pub(super) fn run_tmpfs() -> Finding {
    if magic(Path::new("/run")) == Some(TMPFS_MAGIC) {
        fine("kdat cache", "/run is a tmpfs")
    } else {
        let consequence = "CRIU keeps its probe of the kernel only there; Stasis keeps it instead, once a boot";
        warning("kdat cache", "/run is no tmpfs", consequence)
    }
}

/// Whether the kernel tells which pages were written: what incremental dumps stand on.
pub(super) fn soft_dirty() -> Finding {
    match soft_dirty_works() {
        Ok(true) => fine("soft-dirty", "pages are tracked"),
        Ok(false) => warning("soft-dirty", "pages are not tracked", NO_SOFT_DIRTY),
        Err(error) => warning("soft-dirty", error.to_string(), NO_SOFT_DIRTY),
    }
}

const NO_SOFT_DIRTY: &str = "no incremental checkpoints; checkpoints as such work. Needs CONFIG_MEM_SOFT_DIRTY";

/// Clears our own marks, writes to a page, and looks whether the kernel noticed.
fn soft_dirty_works() -> io::Result<bool> {
    let page_size = rustix::param::page_size();
    let mut memory = vec![1_u8; 2 * page_size];
    fs::write("/proc/self/clear_refs", "4")?;
    let inside = page_size - memory.as_ptr() as usize % page_size;
    memory[inside] = std::hint::black_box(2);
    let page = (memory.as_ptr() as usize + inside) / page_size;
    let mut pagemap = fs::File::open("/proc/self/pagemap")?;
    let mut entry = [0_u8; 8];
    pagemap.seek(SeekFrom::Start(page as u64 * 8))?;
    pagemap.read_exact(&mut entry)?;
    Ok(u64::from_ne_bytes(entry) >> SOFT_DIRTY_BIT & 1 == 1 && std::hint::black_box(memory[inside]) == 2)
}

/// Whether pages can be brought in on demand.
pub(super) fn userfaultfd(root: &Path) -> Finding {
    let there = ["dev/userfaultfd", "proc/sys/vm/unprivileged_userfaultfd"].iter().any(|file| root.join(file).exists());
    if there {
        fine("userfaultfd", "available")
    } else {
        warning("userfaultfd", "not available", "no lazy restore; restores as such work. Needs CONFIG_USERFAULTFD")
    }
}

/// Whether system calls can be filtered.
pub(super) fn seccomp(root: &Path) -> Finding {
    let actions = words(&root.join("proc/sys/kernel/seccomp/actions_avail"));
    if actions.iter().any(|action| action == "errno") {
        fine("seccomp", "filters available")
    } else {
        let consequence =
            "the default profile cannot be applied: only pods with Unconfined run. Needs CONFIG_SECCOMP_FILTER";
        error("seccomp", "no filters", consequence)
    }
}

/// Whether AppArmor profiles can be applied, and ours loaded. A host without AppArmor is a usual one.
pub(super) fn apparmor(root: &Path) -> Finding {
    let enabled = fs::read_to_string(root.join("sys/module/apparmor/parameters/enabled")).unwrap_or_default();
    if enabled.trim() != "Y" {
        return fine("apparmor", "not enabled: profiles are not applied");
    }
    if stasis_pod::APPARMOR_PARSERS.iter().any(|parser| root.join(parser.trim_start_matches('/')).is_file()) {
        return fine("apparmor", "enabled");
    }
    let advice = "containers run without the default profile: install the package apparmor, then start stasisd again";
    warning("apparmor", "enabled, but apparmor_parser is missing", advice)
}

/// Whether SELinux labels can be applied. A host without it is a usual one.
pub(super) fn selinux(root: &Path) -> Finding {
    match fs::read_to_string(root.join("sys/fs/selinux/enforce")).as_deref().map(str::trim) {
        Ok("1") => fine("selinux", "enforcing"),
        Ok(_) => fine("selinux", "permissive"),
        Err(_) => fine("selinux", "not enabled: labels are not applied"),
    }
}

/// Whether containers can get the low OOM scores that the kubelet asks for.
pub(super) fn oom_score_adj(root: &Path) -> Finding {
    let status = fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    if effective >> CAP_SYS_RESOURCE & 1 == 1 {
        return fine("oom_score_adj", "may be lowered");
    }
    let own = fs::read_to_string(root.join("proc/self/oom_score_adj")).unwrap_or_default();
    warning(
        "oom_score_adj",
        format!("no CAP_SYS_RESOURCE; own value {}", own.trim()),
        "lower values asked for a container are raised to our own, and processes of other users than root cannot be \
         checkpointed; give the daemon CAP_SYS_RESOURCE",
    )
}

fn magic(path: &Path) -> Option<i64> {
    rustix::fs::statfs(path).ok().map(|stat| stat.f_type)
}

fn words(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}
