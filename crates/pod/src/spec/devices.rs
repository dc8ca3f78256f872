//! Device nodes and the rules of the device cgroup.
//!
//! Reads device numbers of the host's nodes: a request names a device by its path on the host.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use rustix::fs::{FileType, Stat};
use stasis_cri_api::runtime::Device;

use super::error::{Result, SpecError};
use super::mounts::normalized;

/// Most device nodes of one container. A large host has a few thousand; a directory of a million is a mistake.
const DEVICES_MAX: usize = 16 * 1024;

/// Deepest directory below `/dev` that is searched for nodes.
const DEPTH_MAX: usize = 8;

/// What a container has of its own below `/dev`, or must not see there.
const NOT_FROM_HOST: [&str; 6] = ["pts", "shm", "fd", "mqueue", "console", ".udev"];

/// Nodes of a container and the rules that let it use them.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) nodes: Vec<LinuxDevice>,
    pub(super) rules: Vec<LinuxDeviceCgroup>,
}

/// The devices of a request. Everything is denied but them and those that each OCI runtime adds by itself
/// (`/dev/null` and its kin). A privileged container may use any device, and sees those of the host.
pub(super) fn devices(requested: &[Device], privileged: bool, with_host_devices: bool) -> Result<Devices> {
    let mut nodes = BTreeMap::new();
    let mut rules = vec![rule(privileged, None, "rwm")];
    if privileged && with_host_devices {
        let found = host_devices(Path::new("/dev")).map_err(|e| SpecError::io("privileged", "/dev", e))?;
        nodes.extend(found.into_iter().map(|d| (d.path().clone(), d)));
    }
    for request in requested {
        for node in requested_nodes(request)? {
            if !privileged {
                rules.push(rule(true, Some(&node), &request.permissions));
            }
            nodes.insert(node.path().clone(), node);
        }
    }
    Ok(Devices { nodes: nodes.into_values().collect(), rules })
}

pub(super) fn rule(allow: bool, node: Option<&LinuxDevice>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow);
    rule.set_typ(node.map(LinuxDevice::typ));
    rule.set_major(node.map(LinuxDevice::major));
    rule.set_minor(node.map(LinuxDevice::minor));
    rule.set_access(Some(access.to_owned()));
    rule
}

/// One node, or all nodes in a directory, as in containerd.
fn requested_nodes(request: &Device) -> Result<Vec<LinuxDevice>> {
    let field = format!("device {:?}", request.host_path);
    let host = Path::new(&request.host_path);
    let to = normalized(&request.container_path)
        .ok_or_else(|| SpecError::invalid(&field, "container_path must be absolute and without `..`"))?;
    // Links are followed: /dev/disk/by-id/… is how operators name a device.
    let stat = rustix::fs::stat(host).map_err(|e| SpecError::io(&field, host, e.into()))?;
    if let Some(node) = node(&to, &stat) {
        return Ok(vec![node]);
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(SpecError::invalid(&field, "is neither a device node nor a directory of them"));
    }
    let found = host_devices(host).map_err(|e| SpecError::io(&field, host, e))?;
    let below = |mut node: LinuxDevice| {
        let relative = node.path().strip_prefix(host).map(Path::to_owned).unwrap_or_default();
        node.set_path(to.join(relative));
        node
    };
    Ok(found.into_iter().map(below).collect())
}

pub(super) fn node(path: &Path, stat: &Stat) -> Option<LinuxDevice> {
    let typ = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => LinuxDeviceType::C,
        FileType::BlockDevice => LinuxDeviceType::B,
        _ => return None,
    };
    let mut device = LinuxDevice::default();
    device.set_path(path.to_owned());
    device.set_typ(typ);
    device.set_major(i64::from(rustix::fs::major(stat.st_rdev)));
    device.set_minor(i64::from(rustix::fs::minor(stat.st_rdev)));
    device.set_file_mode(Some(stat.st_mode & 0o7777));
    device.set_uid(Some(stat.st_uid));
    device.set_gid(Some(stat.st_gid));
    Some(device)
}

/// All device nodes below `top`, sorted by path. Links are not followed; nodes that vanish meanwhile are left out.
pub(super) fn host_devices(top: &Path) -> io::Result<Vec<LinuxDevice>> {
    let mut nodes = Vec::new();
    let mut directories: Vec<(PathBuf, usize)> = vec![(top.to_owned(), 0)];
    while let Some((directory, depth)) = directories.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Err(e) if depth > 0 && e.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if depth == 0 && NOT_FROM_HOST.iter().any(|n| entry.file_name() == *n) {
                continue;
            }
            let path = entry.path();
            let Ok(stat) = rustix::fs::lstat(&path) else {
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && depth < DEPTH_MAX {
                directories.push((path, depth + 1));
            } else if let Some(node) = node(&path, &stat) {
                nodes.push(node);
            }
            if nodes.len() + directories.len() > DEVICES_MAX {
                return Err(io::Error::other(format!("more than {DEVICES_MAX} device nodes below {}", top.display())));
            }
        }
    }
    nodes.sort_by(|a, b| a.path().cmp(b.path()));
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str, container: &str, permissions: &str) -> Device {
        Device { host_path: host.into(), container_path: container.into(), permissions: permissions.into() }
    }

    #[test]
    fn a_requested_node_is_allowed_and_nothing_else() {
        let devices = devices(&[request("/dev/full", "/dev/fuller", "rw")], false, true).unwrap();
        let [node] = &devices.nodes[..] else { panic!("{:?}", devices.nodes) };
        assert_eq!((node.path().to_str(), node.major(), node.minor()), (Some("/dev/fuller"), 1, 7));
        let [deny, allow] = &devices.rules[..] else { panic!("{:?}", devices.rules) };
        assert!(!deny.allow() && deny.major().is_none());
        assert_eq!((allow.allow(), allow.major(), allow.minor()), (true, Some(1), Some(7)));
        assert_eq!(allow.access().as_deref(), Some("rw"));
    }

    #[test]
    fn privileged_sees_the_hosts_nodes_but_not_its_terminals() {
        let all = devices(&[], true, true).unwrap();
        let paths: Vec<_> = all.nodes.iter().map(|n| n.path().to_str().unwrap()).collect();
        assert!(paths.contains(&"/dev/null"), "{paths:?}");
        assert!(!paths.iter().any(|p| p.starts_with("/dev/pts") || *p == "/dev/console"), "{paths:?}");
        assert!(all.rules.len() == 1 && all.rules[0].allow());
        assert!(devices(&[], true, false).unwrap().nodes.is_empty(), "without the host's devices");
    }

    #[test]
    fn what_is_no_device_is_refused() {
        assert!(devices(&[request("/dev/none-such", "/dev/x", "r")], false, true).is_err());
        assert!(devices(&[request("/proc/self/status", "/dev/x", "r")], false, true).is_err());
        assert!(devices(&[request("/dev/null", "dev/x", "r")], false, true).is_err());
        assert!(devices(&[request("/dev/null", "/dev/../x", "r")], false, true).is_err());
    }
}
