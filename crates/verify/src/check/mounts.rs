//! Check 6: the mounts of the images are the request's, to the place, type and restriction.

use std::collections::{BTreeMap, BTreeSet};

use stasis_criu_image::ImageSet;
use stasis_criu_image::messages::{Fstype, MntEntry};

use crate::error::{Reason, Refusal};
use crate::grant::{Grant, GrantedMount, normalized};

/// Flags of a mount that restrict it, by OCI's names.
const RESTRICTIONS: [(&str, u32); 4] = [("ro", 1), ("nosuid", 2), ("nodev", 4), ("noexec", 8)];
const READ_ONLY: u32 = 1;

pub(super) fn check(images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    let mut there: BTreeMap<String, &MntEntry> = BTreeMap::new();
    for mount in images.mounts.values().flatten() {
        let place = place(mount)?;
        if there.insert(place.clone(), mount).is_some() {
            return Err(refuse(Reason::MountTwice, &place, "something is mounted on it twice: one hides the other"));
        }
    }
    if there.is_empty() {
        return Err(refuse(Reason::MountMissing, "/", "the checkpoint has no mounts of its own"));
    }
    let wanted: BTreeMap<&str, &GrantedMount> =
        grant.mounts.iter().map(|mount| (mount.destination.as_str(), mount)).collect();
    let masked: BTreeSet<String> = grant.masked.iter().map(|path| normalized(path)).collect();
    let read_only: BTreeSet<String> = grant.read_only.iter().map(|path| normalized(path)).collect();
    for (place, mount) in &there {
        if let Some(wanted) = wanted.get(place.as_str()) {
            check_wanted(place, mount, wanted)?;
        } else if place == "/" {
            check_root(place, mount)?;
        } else {
            check_provided(place, mount, grant)?;
        }
    }
    let missing: Vec<&str> = wanted.keys().filter(|place| !there.contains_key(**place)).copied().collect();
    if !missing.is_empty() {
        let why = "the request mounts it and the checkpoint was taken without it";
        return Err(refuse(Reason::MountMissing, &missing.join(", "), why));
    }
    for path in &masked {
        if !there.get(path).is_some_and(|mount| is_mask(mount)) {
            return Err(refuse(Reason::MountUnmasked, path, "it must be masked here, and in the checkpoint it is not"));
        }
    }
    for path in &read_only {
        let restricted = there.get(path).is_some_and(|mount| mount.flags & READ_ONLY != 0);
        if !restricted {
            return Err(refuse(Reason::MountUnmasked, path, "it must be read-only, and in the checkpoint it is not"));
        }
    }
    Ok(())
}

/// Where a mount is, as every reader understands it.
fn place(mount: &MntEntry) -> Result<String, Refusal> {
    let path = mount.mountpoint.strip_prefix('.').unwrap_or(&mount.mountpoint);
    let place = normalized(path);
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") || place != path {
        return Err(refuse(Reason::MountExtra, &mount.mountpoint, "it is no plain path of a mount"));
    }
    if mount.with_plugin() {
        return Err(refuse(Reason::MountExternal, &place, "a plugin of CRIU is to mount it"));
    }
    Ok(place)
}

/// A mount of the request.
fn check_wanted(place: &str, mount: &MntEntry, wanted: &GrantedMount) -> Result<(), Refusal> {
    let shares = wanted.options.iter().any(|option| option.ends_with("shared") || option.ends_with("slave"));
    if !shares && (mount.shared_id() != 0 || mount.master_id() != 0) {
        return Err(refuse(
            Reason::MountPropagation,
            place,
            "it propagates mounts, which the request does not ask for",
        ));
    }
    for (name, flag) in RESTRICTIONS {
        // On version 1 what is mounted is a file system in memory, whose hierarchies are read-only each by itself.
        let holder = wanted.kind == "cgroup" && name == "ro" && kind(mount) == Fstype::Tmpfs;
        if wanted.has(name) && !holder && (mount.flags | mount.sb_flags()) & flag == 0 {
            return Err(refuse(
                Reason::MountFlags,
                place,
                format!("the request makes it {name}, the checkpoint does not"),
            ));
        }
    }
    if let Some(key) = &mount.ext_key {
        // The key is how CRIU asks the OCI runtime for what is mounted there; the answer is the request's.
        let outside = wanted.is_bind() || matches!(wanted.kind.as_str(), "cgroup" | "cgroup2");
        return match key == place && outside {
            true => Ok(()),
            false => Err(refuse(Reason::MountExternal, place, format!("it stands for {key:?} outside"))),
        };
    }
    if wanted.is_bind() {
        return Err(refuse(
            Reason::MountType,
            place,
            "the request mounts it from outside, the checkpoint makes it anew",
        ));
    }
    let fits = match (wanted.kind.as_str(), kind(mount)) {
        ("proc", Fstype::Proc) | ("sysfs", Fstype::Sysfs) | ("tmpfs", Fstype::Tmpfs) => true,
        ("devpts", Fstype::Devpts) | ("mqueue", Fstype::Mqueue) => true,
        // On version 1 the hierarchies are mounted below a file system in memory.
        ("cgroup", Fstype::Tmpfs | Fstype::Cgroup2) | ("cgroup2", Fstype::Cgroup2) => true,
        _ => false,
    };
    let whole = mount.root == "/" || matches!(wanted.kind.as_str(), "cgroup" | "cgroup2");
    if !fits || !whole {
        let why = format!("the request mounts {}, the checkpoint {:?} of {:?}", wanted.kind, mount.root, kind(mount));
        return Err(refuse(Reason::MountType, place, why));
    }
    Ok(())
}

fn check_root(place: &str, mount: &MntEntry) -> Result<(), Refusal> {
    if mount.ext_key.is_some() || mount.shared_id() != 0 {
        return Err(refuse(Reason::MountExternal, place, "the root file system is the request's"));
    }
    Ok(())
}

/// A mount that the OCI runtime makes by itself: masks, read-only parts of proc, hierarchies of control groups, a
/// console.
fn check_provided(place: &str, mount: &MntEntry, grant: &Grant) -> Result<(), Refusal> {
    if mount.shared_id() != 0 || mount.master_id() != 0 {
        return Err(refuse(
            Reason::MountPropagation,
            place,
            "it propagates mounts, which the request does not ask for",
        ));
    }
    let kernel = grant.mounts.iter().filter(|mount| matches!(mount.kind.as_str(), "proc" | "sysfs"));
    let in_kernel = kernel.clone().any(|mount| is_below(place, &mount.destination));
    if in_kernel && is_mask(mount) {
        return Ok(());
    }
    // A part of proc over itself, read-only.
    let over_itself = kernel.into_iter().any(|kernel| {
        let wanted = if kernel.kind == "proc" { Fstype::Proc } else { Fstype::Sysfs };
        place.strip_prefix(kernel.destination.as_str()) == Some(&mount.root) && kind(mount) == wanted
    });
    if over_itself && mount.ext_key.is_none() && mount.flags & READ_ONLY != 0 {
        return Ok(());
    }
    let cgroups = grant.mounts.iter().find(|mount| mount.kind == "cgroup");
    if let Some(cgroups) = cgroups.filter(|cgroups| is_below(place, &cgroups.destination)) {
        let outside = mount.ext_key.as_deref() == Some(place) && kind(mount) == Fstype::Cgroup;
        return match outside && (!cgroups.has("ro") || mount.flags & READ_ONLY != 0) {
            true => Ok(()),
            false => {
                Err(refuse(Reason::MountFlags, place, "a hierarchy of control groups is writable, or something else"))
            }
        };
    }
    if place == "/dev/console" && grant.terminal {
        return Ok(());
    }
    Err(refuse(Reason::MountExtra, place, "the checkpoint was taken with a mount that the request does not have"))
}

/// What hides a path: an empty read-only file system, or the null device.
fn is_mask(mount: &MntEntry) -> bool {
    let empty = mount.ext_key.is_none() && mount.root == "/" && (mount.flags | mount.sb_flags()) & READ_ONLY != 0;
    kind(mount) == Fstype::Tmpfs && (empty || mount.ext_key.as_deref() == Some("/dev/null") && mount.root == "/null")
}

fn kind(mount: &MntEntry) -> Fstype {
    i32::try_from(mount.fstype).ok().and_then(|kind| Fstype::try_from(kind).ok()).unwrap_or(Fstype::Unsupported)
}

fn is_below(place: &str, above: &str) -> bool {
    place.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'))
}

fn refuse(reason: Reason, place: &str, why: impl Into<String>) -> Refusal {
    Refusal::new(reason, place, why)
}
