//! The mounts of a container: the standard ones, the pod's files, and those of the request.
//!
//! Source paths are taken as they come; whoever calls has checked that they exist and has resolved their links
//! ([`resolve_mount_sources`]). Destinations lie in a stranger's root file system: the OCI runtime resolves them.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;
use stasis_cri_api::runtime::{ContainerConfig, Mount as Request, MountPropagation};

use super::error::{Result, SpecError};
use super::{ContainerInput, PodFiles};

/// What a mount of an image always has: without them the OCI runtime would clear them (`nosuid`, `nodev` of the source).
const IMAGE_OPTIONS: [&str; 2] = ["nosuid", "nodev"];

/// Replaces each host path of the request's mounts by what it resolves to. CRI: a host path that does not exist is
/// an error, and a link is followed (`Mount.host_path`). Mounts of images have none.
pub fn resolve_mount_sources(config: &mut ContainerConfig) -> Result<()> {
    for mount in config.mounts.iter_mut().filter(|mount| mount.image.is_none()) {
        let path = Path::new(&mount.host_path);
        let real = path.canonicalize().map_err(|e| SpecError::io(field(mount), path, e))?;
        mount.host_path = real
            .into_os_string()
            .into_string()
            .map_err(|path| SpecError::invalid(field(mount), format!("{} is not UTF-8", path.display())))?;
    }
    Ok(())
}

fn field(mount: &Request) -> String {
    format!("mount {:?}", mount.container_path)
}

/// An absolute path without `.`, `..` and doubled slashes; none if it is not absolute or climbs.
pub(super) fn normalized(path: &str) -> Option<PathBuf> {
    let path = Path::new(path);
    if !path.is_absolute() {
        return None;
    }
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::Normal(_) => clean.push(component),
            Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(clean)
}

fn mount(destination: impl Into<PathBuf>, typ: &str, source: impl Into<PathBuf>, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(destination.into());
    mount.set_typ(Some(typ.to_owned()));
    mount.set_source(Some(source.into()));
    mount.set_options(Some(options.iter().map(ToString::to_string).collect()));
    mount
}

/// All mounts of the container, parents before children.
pub(super) fn mounts(input: &ContainerInput<'_>) -> Result<Vec<Mount>> {
    let mut requested: HashMap<PathBuf, Mount> = HashMap::new();
    let mut order: Vec<PathBuf> = Vec::new();
    for (place, request) in input.config.mounts.iter().enumerate() {
        let mount = match &request.image {
            Some(_) => requested_mount(request, &crate::volumes::path(&input.volumes, place))?,
            None => requested_mount(request, Path::new(&request.host_path))?,
        };
        let destination = mount.destination().clone();
        if requested.insert(destination.clone(), mount).is_none() {
            order.push(destination);
        }
    }
    // A request that brings its own /dev or /sys brings all that is below.
    let replaced = |destination: &Path| {
        let below = |top: &str| requested.contains_key(Path::new(top)) && destination.starts_with(top);
        requested.contains_key(destination) || below("/dev") || below("/sys")
    };
    let mut all = standard(input);
    all.extend(pod_files(&input.files, input.readonly_rootfs()));
    all.retain(|m| !replaced(m.destination()));
    all.extend(order.iter().filter_map(|destination| requested.remove(destination)));
    all.sort_by_key(|m| m.destination().components().count());
    Ok(all)
}

fn standard(input: &ContainerInput<'_>) -> Vec<Mount> {
    let write = if input.privileged() { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        shm(input),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", write]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", write]),
    ]
}

/// The pod's shared memory; the host's where the IPC namespace is the host's; else one of the container's own.
fn shm(input: &ContainerInput<'_>) -> Mount {
    let bind = ["bind", "rprivate", "nosuid", "noexec", "nodev", "rw"];
    match (&input.files.shm, &input.namespaces.ipc) {
        (Some(path), _) => mount("/dev/shm", "bind", path, &bind),
        (None, None) => mount("/dev/shm", "bind", "/dev/shm", &bind),
        (None, Some(_)) => {
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])
        }
    }
}

fn pod_files(files: &PodFiles, readonly: bool) -> Vec<Mount> {
    let write = if readonly { "ro" } else { "rw" };
    [("/etc/hosts", &files.hosts), ("/etc/hostname", &files.hostname), ("/etc/resolv.conf", &files.resolv_conf)]
        .into_iter()
        .filter_map(|(to, from)| from.as_ref().map(|from| mount(to, "bind", from, &["bind", "rprivate", write])))
        .collect()
}

fn requested_mount(request: &Request, source: &Path) -> Result<Mount> {
    let destination = normalized(&request.container_path).ok_or_else(|| {
        SpecError::invalid(field(request), "container_path must be absolute and without `..`".to_owned())
    })?;
    if destination == Path::new("/") {
        return Err(SpecError::invalid(
            field(request),
            "the root file system is the image's, nothing can be mounted there",
        ));
    }
    if !source.is_absolute() {
        return Err(SpecError::invalid(field(request), format!("host_path {:?} must be absolute", request.host_path)));
    }
    let mut options = vec!["rbind", propagation_of(request)?];
    options.push(match (request.recursive_read_only, request.readonly || request.image.is_some()) {
        (true, _) => "rro",
        (false, true) => "ro",
        (false, false) => "rw",
    });
    if request.image.is_some() {
        options.extend(IMAGE_OPTIONS);
    }
    for option in &request.mount_options {
        if !options.contains(&option.as_str()) {
            options.push(option);
        }
    }
    Ok(mount(destination, "bind", source, &options))
}

fn propagation_of(request: &Request) -> Result<&'static str> {
    match MountPropagation::try_from(request.propagation) {
        Ok(MountPropagation::PropagationPrivate) => Ok("rprivate"),
        Ok(MountPropagation::PropagationHostToContainer) => Ok("rslave"),
        Ok(MountPropagation::PropagationBidirectional) => Ok("rshared"),
        Err(_) => Err(SpecError::invalid(field(request), format!("unknown propagation {}", request.propagation))),
    }
}

/// Propagation of the root file system: what its mounts need of it; none for the runtime's private default.
pub(super) fn rootfs_propagation(config: &ContainerConfig) -> Option<&'static str> {
    let any = |wanted: MountPropagation| config.mounts.iter().any(|m| m.propagation == i32::from(wanted));
    if any(MountPropagation::PropagationBidirectional) {
        Some("rshared")
    } else if any(MountPropagation::PropagationHostToContainer) {
        Some("rslave")
    } else {
        None
    }
}
