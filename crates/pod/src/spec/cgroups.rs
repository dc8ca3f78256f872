//! Where a container's cgroup lies, in the syntax of `linux.cgroupsPath`.

use std::path::Path;

use stasis_cri_api::runtime::CgroupDriver;

use super::error::{Result, SpecError};
use super::mounts::normalized;

/// Parent of pods that name none, with the driver cgroupfs.
const DEFAULT_PARENT: &str = "/stasis";
/// Parent of pods that name none, with the driver systemd.
const DEFAULT_SLICE: &str = "system.slice";
/// Prefix of our scopes, with the driver systemd.
const SCOPE_PREFIX: &str = "stasis";

/// The cgroup path of container `id` in a pod whose `cgroup_parent` is given: `/parent/id` for cgroupfs,
/// `parent.slice:stasis:id` for systemd. CRI gives parents in the syntax of cgroupfs in both cases.
pub fn cgroups_path(driver: CgroupDriver, cgroup_parent: &str, id: &str) -> Result<String> {
    let field = "linux.cgroup_parent";
    let parent = if cgroup_parent.is_empty() { DEFAULT_PARENT } else { cgroup_parent };
    match driver {
        CgroupDriver::Cgroupfs => {
            let clean = normalized(parent).filter(|p| p != Path::new("/")).ok_or_else(|| {
                SpecError::invalid(field, format!("{parent:?} must be absolute, below the root and without `..`"))
            })?;
            Ok(format!("{}/{id}", clean.display()))
        }
        CgroupDriver::Systemd => {
            let slice = match cgroup_parent {
                "" => DEFAULT_SLICE,
                path => path.trim_end_matches('/').rsplit('/').next().unwrap_or(path),
            };
            let climbs = cgroup_parent.split('/').any(|part| part == "..");
            let name = slice.strip_suffix(".slice").unwrap_or_default();
            let ok = !name.is_empty()
                && !climbs
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'\\' | b'@'));
            if !ok {
                let reason =
                    format!("{cgroup_parent:?} does not end in a slice: with the driver systemd, give …/name.slice");
                return Err(SpecError::invalid(field, reason));
            }
            Ok(format!("{slice}:{SCOPE_PREFIX}:{id}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroupfs() {
        let path = |parent: &str| cgroups_path(CgroupDriver::Cgroupfs, parent, "id");
        assert_eq!(path("").unwrap(), "/stasis/id");
        assert_eq!(path("/kubepods//pod1/").unwrap(), "/kubepods/pod1/id");
        for bad in ["kubepods", "/", "/a/../b", "..", "/.."] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn systemd() {
        let path = |parent: &str| cgroups_path(CgroupDriver::Systemd, parent, "id");
        assert_eq!(path("").unwrap(), "system.slice:stasis:id");
        let parent = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice";
        assert_eq!(path(parent).unwrap(), "kubepods-besteffort-pod1.slice:stasis:id");
        assert_eq!(path("kubepods.slice").unwrap(), "kubepods.slice:stasis:id");
        for bad in ["/kubepods/pod1", "/a/../b.slice", ".slice", "/", "a:b.slice", "x\n.slice"] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }
}
