//! From CRI's configuration to the OCI runtime specification: the only place where one becomes the other.
//!
//! Data in, data out: no container, no state, no socket. What it reads of the host are device nodes and seccomp
//! profiles that a request names, and [`HostFacts`], which are found once. Everything in a specification comes from
//! the live request, the image's configuration or the host; nothing comes from a checkpoint archive, and no
//! annotation of a request reaches the OCI runtime.
//!
//! ```text
//!   validate      what a request must be             confinement  AppArmor, SELinux, masked paths
//!   process       arguments, environment, directory  seccomp      profile files → filter
//!   user          who it runs as                     mounts       standard, the pod's, the request's
//!   capabilities  default, added, dropped            devices, resources, cgroups
//!   cdi           what CDI devices need, last
//! ```

mod capabilities;
pub(crate) mod cdi;
mod cgroups;
mod confinement;
mod devices;
mod error;
mod host;
mod mounts;
mod process;
mod resources;
mod seccomp;
mod user;
mod validate;

#[cfg(test)]
mod runc_tests;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Root, Spec};
use stasis_cri_api::runtime::{
    ContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, LinuxSandboxSecurityContext,
    PodSandboxConfig,
};

pub use cgroups::cgroups_path;
pub use error::{Result, SpecError};
pub use host::HostFacts;
pub use mounts::resolve_mount_sources;
pub use process::exec_process;
pub use user::ACCOUNT_FILE_MAX;
pub use validate::{validate_container, validate_pod};

/// The version of the specification that we write: the first with recursive read-only mounts.
const OCI_VERSION: &str = "1.1.0";

/// Root file system, relative to the bundle.
const ROOTFS: &str = "rootfs";

/// Everything that a container's specification depends on.
#[derive(Debug)]
pub struct ContainerInput<'a> {
    /// Container ID.
    pub id: &'a str,
    /// ID of its pod.
    pub pod_id: &'a str,
    /// Configuration of its pod.
    pub pod: &'a PodSandboxConfig,
    /// The request. Host paths of its mounts exist and are resolved ([`resolve_mount_sources`]).
    pub config: &'a ContainerConfig,
    /// Configuration of the image that the root file system stands on.
    pub image: &'a ImageConfiguration,
    /// `/etc/passwd` of the image, if it has one; at most [`ACCOUNT_FILE_MAX`] bytes.
    pub passwd: Option<&'a [u8]>,
    /// `/etc/group` of the image, if it has one; at most [`ACCOUNT_FILE_MAX`] bytes.
    pub group: Option<&'a [u8]>,
    /// Namespaces to join.
    pub namespaces: Namespaces,
    /// Directory with the image volumes that the request names, each by its place among the mounts.
    pub volumes: PathBuf,
    /// What the CDI devices of the request need.
    pub cdi: stasis_cdi::Edits,
    /// Of [`cgroups_path`].
    pub cgroups_path: String,
    /// Whether the node's controllers are those of cgroup v2.
    pub cgroup_v2: bool,
    /// Files of the pod on the host.
    pub files: PodFiles,
    /// Configuration file of CRIU, which the OCI runtime takes from the annotation `org.criu.config`.
    pub criu_config: PathBuf,
    /// The host.
    pub host: &'a HostFacts,
    /// A privileged container does not see the host's devices (a runtime handler's setting).
    pub privileged_without_host_devices: bool,
}

/// Namespaces that a container joins by path; where there is none, it stays in the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// Network.
    pub net: Option<PathBuf>,
    /// System V IPC and POSIX message queues.
    pub ipc: Option<PathBuf>,
    /// Host name.
    pub uts: Option<PathBuf>,
    /// Process IDs.
    pub pid: PidNamespace,
}

/// Which PID namespace a container is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    /// A new one of its own.
    Private,
    /// The host's.
    Host,
    /// That of the pod or of another container.
    Path(PathBuf),
}

/// Files of a pod that each of its containers gets, unless the request mounts something else over them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// For `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// For `/etc/hostname`.
    pub hostname: Option<PathBuf>,
    /// For `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// For `/dev/shm`; none in the host's IPC namespace, where the host's is used.
    pub shm: Option<PathBuf>,
}

impl ContainerInput<'_> {
    fn context(&self) -> Option<&LinuxContainerSecurityContext> {
        self.config.linux.as_ref()?.security_context.as_ref()
    }

    fn pod_context(&self) -> Option<&LinuxSandboxSecurityContext> {
        self.pod.linux.as_ref()?.security_context.as_ref()
    }

    fn privileged(&self) -> bool {
        self.context().is_some_and(|c| c.privileged)
    }

    fn readonly_rootfs(&self) -> bool {
        self.context().is_some_and(|c| c.readonly_rootfs)
    }
}

/// The specification of a container.
pub fn container_spec(input: &ContainerInput<'_>) -> Result<Spec> {
    let default = LinuxContainerSecurityContext::default();
    let context = input.context().unwrap_or(&default);
    if context.privileged && !input.pod_context().is_some_and(|c| c.privileged) {
        let reason = "set for a container whose pod is not privileged (CRI: the sandbox must be, too)";
        return Err(SpecError::invalid("security_context.privileged", reason));
    }
    let process = process::process(input, context)?;
    let bounding = process.capabilities().as_ref().and_then(|c| c.bounding().clone()).unwrap_or_default();

    let mut root = Root::default();
    root.set_path(PathBuf::from(ROOTFS));
    root.set_readonly(Some(context.readonly_rootfs));

    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned());
    spec.set_root(Some(root));
    spec.set_process(Some(process));
    // The UTS namespace is the pod's, and its host name is set already.
    spec.set_hostname(None);
    spec.set_mounts(Some(mounts::mounts(input)?));
    spec.set_annotations(Some(annotations(input)));
    spec.set_linux(Some(linux(input, context, &bounding)?));
    cdi::apply(&mut spec, &input.cdi)?;
    Ok(spec)
}

fn linux(
    input: &ContainerInput<'_>,
    context: &LinuxContainerSecurityContext,
    bounding: &HashSet<oci_spec::runtime::Capability>,
) -> Result<Linux> {
    let host_devices = !input.privileged_without_host_devices;
    let devices = devices::devices(&input.config.devices, context.privileged, host_devices)?;
    let (masked, readonly) = confinement::paths(context);
    let pod_selinux = input.pod_context().and_then(|c| c.selinux_options.as_ref());
    let labels = confinement::selinux(context, pod_selinux, input.host)?;

    let mut linux = Linux::default();
    linux.set_namespaces(Some(namespaces(input)));
    linux.set_cgroups_path(Some(PathBuf::from(&input.cgroups_path)));
    linux.set_devices(Some(devices.nodes));
    linux.set_resources(Some(limits_of(input, devices.rules)?));
    linux.set_masked_paths(Some(masked));
    linux.set_readonly_paths(Some(readonly));
    linux.set_mount_label(labels.map(|(_, label)| label));
    linux.set_rootfs_propagation(mounts::rootfs_propagation(input.config).map(str::to_owned));
    linux.set_seccomp(seccomp::filter(context, bounding, input.host)?);
    Ok(linux)
}

fn limits_of(input: &ContainerInput<'_>, rules: Vec<oci_spec::runtime::LinuxDeviceCgroup>) -> Result<LinuxResources> {
    let none = LinuxContainerResources::default();
    let request = input.config.linux.as_ref().and_then(|l| l.resources.as_ref()).unwrap_or(&none);
    resources::resources(request, rules, input.cgroup_v2, input.host)
}

/// The limits of `resources` alone, without rules for devices: for a container that exists.
pub fn limits(resources: &LinuxContainerResources, cgroup_v2: bool, host: &HostFacts) -> Result<LinuxResources> {
    let mut limits = resources::resources(resources, Vec::new(), cgroup_v2, host)?;
    limits.set_devices(None);
    Ok(limits)
}

/// The mount namespace is always new; the cgroup namespace is new on v2 and the host's on v1, as in containerd.
fn namespaces(input: &ContainerInput<'_>) -> Vec<LinuxNamespace> {
    let namespace = |typ, path: Option<PathBuf>| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(typ);
        namespace.set_path(path);
        namespace
    };
    let mut all = vec![namespace(LinuxNamespaceType::Mount, None)];
    match &input.namespaces.pid {
        PidNamespace::Private => all.push(namespace(LinuxNamespaceType::Pid, None)),
        PidNamespace::Path(path) => all.push(namespace(LinuxNamespaceType::Pid, Some(path.clone()))),
        PidNamespace::Host => {}
    }
    let shared = [
        (LinuxNamespaceType::Network, &input.namespaces.net),
        (LinuxNamespaceType::Ipc, &input.namespaces.ipc),
        (LinuxNamespaceType::Uts, &input.namespaces.uts),
    ];
    all.extend(shared.into_iter().filter_map(|(typ, path)| path.clone().map(|path| namespace(typ, Some(path)))));
    if input.cgroup_v2 {
        all.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    all
}

/// Our own annotations and nothing else: those of the request stay in CRI's answers. An annotation that an OCI
/// runtime obeys would be a way round every check (CVE-2024-3154, CVE-2026-53492).
fn annotations(input: &ContainerInput<'_>) -> HashMap<String, String> {
    let container = input.config.metadata.clone().unwrap_or_default();
    let pod = input.pod.metadata.clone().unwrap_or_default();
    let image = input.config.image.clone().unwrap_or_default();
    let image_name = if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image };
    [
        ("io.kubernetes.cri.container-type", "container".to_owned()),
        ("io.kubernetes.cri.container-name", container.name),
        ("io.kubernetes.cri.sandbox-id", input.pod_id.to_owned()),
        ("io.kubernetes.cri.sandbox-name", pod.name),
        ("io.kubernetes.cri.sandbox-namespace", pod.namespace),
        ("io.kubernetes.cri.sandbox-uid", pod.uid),
        ("io.kubernetes.cri.image-name", image_name),
        ("org.criu.config", input.criu_config.display().to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}
