//! Checks 9 and 10: namespaces are the container's, and no image makes objects of the kernel or writes to control
//! groups.

use stasis_criu_image::{File, FileKind, ImageSet, Kind, Namespaces};

use crate::error::{Reason, Refusal};
use crate::grant::{CgroupHandling, Grant};

/// Netlink protocols that serve everybody: routes, socket diagnosis, the kernel's events, generic.
const NETLINK: [u32; 4] = [0, 4, 15, 16];

pub(super) fn check(images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    check_sharing(images, grant)?;
    for name in &images.names {
        if let Some(what) = FileKind::of(name).and_then(kernel_object) {
            return Err(Refusal::new(
                Reason::KernelObject,
                name,
                format!("it makes {what}, which is the request's to decide"),
            ));
        }
        if let Some(FileKind::Network(..) | FileKind::Image(Kind::Netdev | Kind::Netns, _)) = FileKind::of(name) {
            let why = "it configures a network namespace, and the network is the pod's: checkpoint from inside it";
            return Err(Refusal::new(Reason::NetworkConfiguration, name, why));
        }
    }
    for (id, file) in &images.files {
        let file_name = || format!("file {id}");
        match file {
            File::Namespace { .. } => {
                let why = "a descriptor of a namespace leads out of the container";
                return Err(Refusal::new(Reason::NamespaceDescriptor, file_name(), why));
            }
            File::Tun | File::BpfMap => {
                return Err(Refusal::new(
                    Reason::KernelObject,
                    file_name(),
                    "an object of the kernel that no request grants",
                ));
            }
            File::Packet if !grant.may("NET_RAW") => {
                return Err(Refusal::new(
                    Reason::KernelObject,
                    file_name(),
                    "a packet socket without the capability NET_RAW",
                ));
            }
            File::Netlink(protocol) if !NETLINK.contains(protocol) && !grant.may("NET_ADMIN") => {
                let why = format!("a netlink socket of protocol {protocol}, which no request grants");
                return Err(Refusal::new(Reason::KernelObject, file_name(), why));
            }
            _ => {}
        }
    }
    Ok(())
}

fn kernel_object(kind: FileKind) -> Option<&'static str> {
    match kind {
        FileKind::Image(Kind::Apparmor, _) => Some("security policy"),
        FileKind::Image(Kind::BinfmtMisc, _) => Some("program formats"),
        FileKind::Image(Kind::BpfmapData, _) => Some("BPF maps"),
        FileKind::Image(Kind::Autofs, _) => Some("automatic mounts"),
        FileKind::Image(Kind::IrmapCache, _) => Some("a cache of inodes"),
        _ => None,
    }
}

/// Every process is where the first one is, and that is where the request puts the container.
fn check_sharing(images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    let tasks = images.processes.iter().filter_map(|process| Some((process.pid, process.task.as_ref()?.namespaces)));
    let mut tasks = tasks.peekable();
    let Some((_, first)) = tasks.peek().copied() else {
        return Err(Refusal::new(Reason::NamespaceDiffers, "pstree.img", "no process is alive"));
    };
    for (pid, namespaces) in tasks {
        if let Some(kind) = different(&first, &namespaces) {
            let why = format!("its {kind} namespace is not that of the first process");
            return Err(Refusal::new(Reason::NamespaceDiffers, format!("process {pid}"), why));
        }
    }
    let around = images.inventory.root_ids.unwrap_or_default();
    // For CRIU, which runs in the pod's network namespace and outside of all others.
    let own = [
        ("mount", first.mnt != around.mnt_ns_id(), grant.namespaces.contains("mount")),
        ("pid", first.pid != around.pid_ns_id(), grant.namespaces.contains("pid")),
        ("network", first.net != around.net_ns_id(), false),
        ("user", first.user != around.user_ns_id(), grant.namespaces.contains("user")),
        ("time", first.time != around.time_ns_id(), grant.namespaces.contains("time")),
    ];
    for (kind, has, wanted) in own {
        if has != wanted {
            let (has, wanted) =
                (if has { "its own" } else { "CRIU's" }, if wanted { "one of its own" } else { "none" });
            let why = format!("the checkpoint has {has} {kind} namespace, where the request asks for {wanted}");
            return Err(Refusal::new(Reason::NamespaceDiffers, "inventory.img", why));
        }
    }
    Ok(())
}

fn different(one: &Namespaces, other: &Namespaces) -> Option<&'static str> {
    let pairs = [
        ("pid", one.pid, other.pid),
        ("network", one.net, other.net),
        ("ipc", one.ipc, other.ipc),
        ("uts", one.uts, other.uts),
        ("mount", one.mnt, other.mnt),
        ("user", one.user, other.user),
        ("cgroup", one.cgroup, other.cgroup),
        ("time", one.time, other.time),
    ];
    pairs.into_iter().find(|(_, one, other)| one != other).map(|(kind, _, _)| kind)
}

pub(super) fn check_cgroups(images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    let mut directories: Vec<_> = images.cgroup.controllers.iter().flat_map(|controller| &controller.dirs).collect();
    while let Some(directory) = directories.pop() {
        for property in &directory.properties {
            // Of the ones that CRIU sets where it makes a group, these alone limit nothing and allow nothing.
            let harmless = grant.cgroups == CgroupHandling::Soft && property.name.starts_with("cgroup.");
            if !harmless {
                let why = format!("it sets {} of a control group to {:?}", property.name, property.value);
                return Err(Refusal::new(Reason::CgroupProperties, "cgroup.img", why));
            }
        }
        directories.extend(&directory.children);
    }
    Ok(())
}
