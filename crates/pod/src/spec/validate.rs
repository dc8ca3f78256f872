//! What a configuration must be before anything is done for it.
//!
//! Pure checks of the messages' own content, with a bound for each list. What depends on the image or the host is
//! checked while the specification is made.

use std::net::IpAddr;
use std::path::{Component, Path};

use stasis_cri_api::runtime::{
    ContainerConfig, ContainerMetadata, Device, DnsConfig, Int64Value, KeyValue, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, Mount, MountPropagation, NamespaceMode, NamespaceOption, PodSandboxConfig, PortMapping,
    Protocol,
};

use super::error::{Result, SpecError};
use super::mounts::normalized;
use super::user::id_of;

/// Longest name, namespace or UID: Kubernetes' limit for object names.
const NAME_MAX: usize = 253;
/// Longest host name, the kernel's; the kubelet gives a pod's whole domain name (`setHostnameAsFQDN`) up to this, too.
const HOSTNAME_MAX: usize = 64;
/// Most sysctls of a pod; there are a few hundred namespaced ones in a kernel.
const SYSCTLS_MAX: usize = 512;
/// Longest value of a sysctl; the kernel reads at most a page.
const SYSCTL_VALUE_MAX: usize = 4095;
/// Most variables of a request. A namespace with thousands of services yields seven each.
const ENVS_MAX: usize = 64 * 1024;
/// Most mounts of a request; the kernel's own limit for a mount namespace is 100 000.
const MOUNTS_MAX: usize = 4096;
/// Most devices of a request.
const DEVICES_MAX: usize = 4096;
/// Most port mappings of a pod: one for each port and protocol would be more, but no CNI plugin bears that.
const PORTS_MAX: usize = 4096;
/// Longest list of servers, searches or options of a resolver; glibc reads 3 servers and 256 bytes of searches.
const DNS_MAX: usize = 64;
/// Most bytes of labels and of annotations: Kubernetes allows 256 KiB of annotations for an object, and the kubelet
/// adds its own.
const METADATA_BYTES_MAX: usize = 1 << 20;
/// Longest path, with the terminating NUL that the kernel counts: PATH_MAX.
const PATH_MAX: usize = 4095;
/// Options of a mount that CRI 0.37 knows.
const MOUNT_OPTIONS: [&str; 3] = ["noexec", "nodev", "nosuid"];

fn invalid<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T> {
    Err(SpecError::invalid(field, reason))
}

/// Checks a pod's configuration.
pub fn validate_pod(config: &PodSandboxConfig) -> Result<()> {
    let Some(metadata) = &config.metadata else {
        return invalid("metadata", "is missing: give the pod's name, namespace and UID");
    };
    name("metadata.name", &metadata.name)?;
    name("metadata.namespace", &metadata.namespace)?;
    name("metadata.uid", &metadata.uid)?;
    hostname(&config.hostname)?;
    if !config.log_directory.is_empty() {
        absolute("log_directory", &config.log_directory)?;
    }
    strings("labels", &config.labels)?;
    strings("annotations", &config.annotations)?;
    dns(config.dns_config.as_ref())?;
    count("port_mappings", config.port_mappings.len(), PORTS_MAX)?;
    config.port_mappings.iter().try_for_each(port)?;
    config.linux.as_ref().map_or(Ok(()), linux_pod)
}

/// Checks a container's configuration.
pub fn validate_container(config: &ContainerConfig) -> Result<()> {
    let Some(ContainerMetadata { name: container, .. }) = &config.metadata else {
        return invalid("metadata", "is missing: give the container's name");
    };
    name("metadata.name", container)?;
    if config.image.as_ref().is_none_or(|i| i.image.is_empty()) {
        return invalid("image", "is missing: give an image");
    }
    log_path(&config.log_path)?;
    strings("labels", &config.labels)?;
    strings("annotations", &config.annotations)?;
    count("envs", config.envs.len(), ENVS_MAX)?;
    config.envs.iter().try_for_each(variable)?;
    count("mounts", config.mounts.len(), MOUNTS_MAX)?;
    config.mounts.iter().try_for_each(mount)?;
    count("devices", config.devices.len(), DEVICES_MAX)?;
    config.devices.iter().try_for_each(device)?;
    if !config.working_dir.is_empty() {
        absolute("working_dir", &config.working_dir)?;
    }
    count("CDI_devices", config.cdi_devices.len(), DEVICES_MAX)?;
    config.linux.as_ref().and_then(|l| l.security_context.as_ref()).map_or(Ok(()), security_context)
}

fn count(field: &str, found: usize, limit: usize) -> Result<()> {
    if found > limit { invalid(field, format!("{found} entries, the limit is {limit}")) } else { Ok(()) }
}

/// Names become parts of log lines, annotations and status answers: no control characters, no slash.
fn name(field: &str, text: &str) -> Result<()> {
    if text.is_empty() {
        return invalid(field, "is empty");
    }
    if text.len() > NAME_MAX || text.contains('/') || text.chars().any(char::is_control) {
        return invalid(
            field,
            format!("{text:?} is longer than {NAME_MAX} bytes, or holds a slash or a control character"),
        );
    }
    Ok(())
}

/// Labels of letters, digits and hyphens, joined by dots (RFC 1123). It is written to `/etc/hosts` and
/// `/etc/hostname`, so nothing may end a line or a field.
fn hostname(text: &str) -> Result<()> {
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if text.is_empty() || (text.len() <= HOSTNAME_MAX && text.split('.').all(label)) {
        return Ok(());
    }
    invalid(
        "hostname",
        format!("{text:?} must be at most {HOSTNAME_MAX} letters, digits and hyphens, with dots between parts"),
    )
}

fn strings(field: &str, map: &std::collections::HashMap<String, String>) -> Result<()> {
    let bytes: usize = map.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > METADATA_BYTES_MAX {
        return invalid(field, format!("{bytes} bytes, the limit is {METADATA_BYTES_MAX}"));
    }
    if map.contains_key("") { invalid(field, "a key is empty") } else { Ok(()) }
}

/// Entries of `/etc/resolv.conf`: one word each, or a new line would make a new directive.
fn dns(config: Option<&DnsConfig>) -> Result<()> {
    let Some(config) = config else { return Ok(()) };
    let lists = [("servers", &config.servers), ("searches", &config.searches), ("options", &config.options)];
    for (list, entries) in lists {
        let field = format!("dns_config.{list}");
        count(&field, entries.len(), DNS_MAX)?;
        if let Some(bad) = entries.iter().find(|e| e.is_empty() || !e.bytes().all(|b| b.is_ascii_graphic())) {
            return invalid(field, format!("{bad:?} is not one word"));
        }
    }
    match config.servers.iter().find(|s| s.split('%').next().unwrap_or_default().parse::<IpAddr>().is_err()) {
        Some(bad) => invalid("dns_config.servers", format!("{bad:?} is not an address")),
        None => Ok(()),
    }
}

fn port(mapping: &PortMapping) -> Result<()> {
    let (container, host) = (mapping.container_port, mapping.host_port);
    if !(0..=65535).contains(&host) || !(0..=65535).contains(&container) || (host > 0 && container == 0) {
        return invalid(
            "port_mappings",
            format!("host port {host} to container port {container}: give ports from 1 to 65535"),
        );
    }
    if Protocol::try_from(mapping.protocol).is_err() {
        return invalid("port_mappings", format!("protocol {} is unknown", mapping.protocol));
    }
    if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<IpAddr>().is_err() {
        return invalid("port_mappings", format!("host_ip {:?} is not an address", mapping.host_ip));
    }
    Ok(())
}

fn linux_pod(linux: &LinuxPodSandboxConfig) -> Result<()> {
    let context = linux.security_context.clone().unwrap_or_default();
    if context.run_as_group.is_some() && context.run_as_user.is_none() {
        return invalid("linux.security_context.run_as_group", "set without run_as_user: give the user, too");
    }
    let options = context.namespace_options.unwrap_or_default();
    namespaces(&options)?;
    if options.pid == i32::from(NamespaceMode::Target) {
        return invalid("namespace_options.pid", "a pod has no container to target");
    }
    if let Some(user) = &options.userns_options
        && user.mode == i32::from(NamespaceMode::Pod)
    {
        return Err(SpecError::unsupported("userns_options", "user namespaces; leave hostUsers unset in the pod"));
    }
    count("linux.sysctls", linux.sysctls.len(), SYSCTLS_MAX)?;
    linux.sysctls.iter().try_for_each(|(name, value)| sysctl(name, value, &options))
}

/// A sysctl of a namespace that is the pod's own. Anything else would change the host (CVE-2022-0811,
/// CVE-2022-0532).
fn sysctl(name: &str, value: &str, options: &NamespaceOption) -> Result<()> {
    let field = format!("linux.sysctls {name:?}");
    let part = |p: &str| {
        p.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    if !name.contains('.') || !name.split('.').all(part) {
        return invalid(field, "is not the dotted name of a sysctl, such as net.ipv4.ip_forward");
    }
    let in_network = name.starts_with("net.");
    let in_ipc = name == "kernel.sem" || ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|p| name.starts_with(p));
    let node = i32::from(NamespaceMode::Node);
    match (in_network, in_ipc) {
        (false, false) => {
            return invalid(
                field,
                "belongs to the whole host; only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* \
                 are a pod's own",
            );
        }
        (true, _) if options.network == node => {
            return invalid(field, "would change the host: the pod shares its network");
        }
        (_, true) if options.ipc == node => {
            return invalid(field, "would change the host: the pod shares its IPC namespace");
        }
        _ => {}
    }
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b' ' | b'\t' | b'_' | b'-' | b'.' | b',' | b':' | b'/');
    if value.is_empty() || value.len() > SYSCTL_VALUE_MAX || !value.bytes().all(ok) {
        return invalid(field, format!("{value:?} is no value: give letters, digits, spaces and any of _-.,:/"));
    }
    Ok(())
}

fn namespaces(options: &NamespaceOption) -> Result<()> {
    for (field, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        let field = format!("namespace_options.{field}");
        match NamespaceMode::try_from(mode) {
            Err(_) => return invalid(field, format!("mode {mode} is unknown")),
            // CRI: there is no way to ask for them in the Kubernetes API.
            Ok(NamespaceMode::Container | NamespaceMode::Target) if !field.ends_with("pid") => {
                return invalid(field, "must be POD or NODE");
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// A path relative to the pod's log directory, and below it.
fn log_path(path: &str) -> Result<()> {
    let below = Path::new(path).components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if path.len() > PATH_MAX || path.contains('\0') || !below {
        return invalid("log_path", format!("{path:?} must be relative to the pod's log_directory, and without `..`"));
    }
    Ok(())
}

fn absolute(field: &str, path: &str) -> Result<()> {
    if path.len() > PATH_MAX || path.contains('\0') || normalized(path).is_none() {
        return invalid(field, format!("{path:?} must be an absolute path without `..`"));
    }
    Ok(())
}

/// Kubernetes' relaxed rule: any printable characters but `=`.
fn variable(variable: &KeyValue) -> Result<()> {
    let key = &variable.key;
    if key.is_empty() || key.contains('=') || key.chars().any(char::is_control) {
        return invalid("envs", format!("{key:?} is not the name of a variable"));
    }
    if variable.value.contains(&0) { invalid("envs", format!("the value of {key:?} holds a NUL byte")) } else { Ok(()) }
}

fn mount(mount: &Mount) -> Result<()> {
    let field = format!("mount {:?}", mount.container_path);
    absolute(&field, &mount.container_path)?;
    if let Some(image) = &mount.image {
        if !mount.host_path.is_empty() {
            return invalid(field, "names an image and a host path: give only one of them");
        }
        if image.image.is_empty() {
            return invalid(field, "has an image without a name");
        }
        // "All image mounts are per feature definition readonly."
        if !mount.readonly {
            return invalid(field, "is of an image, which is mounted read-only: set readonly");
        }
        if mount.propagation != i32::from(MountPropagation::PropagationPrivate) {
            return invalid(field, "is of an image, which nothing is mounted below: leave propagation private");
        }
        if mount.image_sub_path.len() > PATH_MAX || mount.image_sub_path.contains('\0') {
            return invalid(field, format!("image_sub_path {:?} is no path", mount.image_sub_path));
        }
    } else if !Path::new(&mount.host_path).is_absolute() || mount.host_path.contains('\0') {
        return invalid(field, format!("host_path {:?} must be absolute", mount.host_path));
    } else if !mount.image_sub_path.is_empty() {
        return invalid(field, "image_sub_path is only for image mounts");
    }
    if MountPropagation::try_from(mount.propagation).is_err() {
        return invalid(field, format!("propagation {} is unknown", mount.propagation));
    }
    if mount.recursive_read_only && (!mount.readonly || mount.propagation != 0) {
        return invalid(field, "recursive_read_only needs readonly and private propagation");
    }
    if let Some(bad) = mount.mount_options.iter().find(|o| !MOUNT_OPTIONS.contains(&o.as_str())) {
        return invalid(field, format!("option {bad:?} is unknown: give any of {}", MOUNT_OPTIONS.join(", ")));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(SpecError::unsupported(field, "ID-mapped mounts; they come with user namespaces"));
    }
    Ok(())
}

fn device(device: &Device) -> Result<()> {
    let field = format!("device {:?}", device.host_path);
    absolute(&field, &device.host_path)?;
    absolute(&field, &device.container_path)?;
    let permissions = device.permissions.as_bytes();
    let twice = (1..permissions.len()).any(|i| permissions[..i].contains(&permissions[i]));
    if permissions.is_empty() || twice || !permissions.iter().all(|b| b"rwm".contains(b)) {
        return invalid(field, format!("permissions {:?} must be one or more of r, w, m", device.permissions));
    }
    Ok(())
}

fn security_context(context: &LinuxContainerSecurityContext) -> Result<()> {
    if let Some(Int64Value { value }) = context.run_as_user {
        id_of("run_as_user", value)?;
        if !context.run_as_username.is_empty() {
            return invalid("run_as_username", "set together with run_as_user: give only one of them");
        }
    }
    if let Some(Int64Value { value }) = context.run_as_group {
        id_of("run_as_group", value)?;
        if context.run_as_user.is_none() && context.run_as_username.is_empty() {
            return invalid("run_as_group", "set without run_as_user or run_as_username: give the user, too");
        }
    }
    if context.run_as_username.contains([':', '\n', '\0', '/']) {
        return invalid("run_as_username", format!("{:?} is not the name of a user", context.run_as_username));
    }
    context.supplemental_groups.iter().try_for_each(|g| id_of("supplemental_groups", *g).map(drop))?;
    for path in context.masked_paths.iter().chain(&context.readonly_paths) {
        absolute("masked_paths and readonly_paths", path)?;
    }
    let options = context.namespace_options.clone().unwrap_or_default();
    namespaces(&options)?;
    if options.pid == i32::from(NamespaceMode::Target) && options.target_id.is_empty() {
        return invalid("namespace_options.target_id", "is empty, with the PID mode TARGET");
    }
    Ok(())
}
