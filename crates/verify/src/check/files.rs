//! Check 11: every file is one of the container's own.

use std::collections::BTreeSet;

use stasis_criu_image::messages::RemapType;
use stasis_criu_image::{File, FileKind, ImageSet};

use crate::error::{Reason, Refusal};
use crate::grant::Grant;
use crate::members::Contents;

/// Types of a file in its mode.
const KIND: u32 = 0o170_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const BLOCK_DEVICE: u32 = 0o060_000;

/// CRIU's mark of unix sockets that are all inside the dump.
const UNIX_INSIDE: u32 = 0;

/// Descriptors whose kind the OCI runtime is told: the standard ones.
const STANDARD: usize = 3;

pub(super) fn check(contents: &Contents, grant: &Grant) -> Result<(), Refusal> {
    let images = &contents.images;
    for (id, file) in &images.files {
        check_file(*id, file, images)?;
    }
    for remap in &images.remaps {
        if remap.remap_type() == RemapType::Linked {
            let why = "a deleted file was linked back, which is switched off: dump again without link-remap";
            return Err(Refusal::new(Reason::LinkRemap, format!("file {}", remap.orig_id), why));
        }
    }
    for (id, ghost) in &images.ghosts {
        let name = format!("ghost-file-{id:x}.img");
        if matches!(ghost.mode & KIND, CHARACTER_DEVICE | BLOCK_DEVICE) {
            return Err(Refusal::new(Reason::GhostDevice, name, "it makes a device"));
        }
        if ghost.size > grant.ghost_max {
            let why = format!("a deleted file of {} bytes is larger than {}", ghost.size, grant.ghost_max);
            return Err(Refusal::new(Reason::GhostTooLarge, name, why));
        }
    }
    check_tarballs(contents, grant)?;
    check_descriptors(contents)
}

fn check_file(id: u32, file: &File, images: &ImageSet) -> Result<(), Refusal> {
    let name = format!("file {id}");
    match file {
        File::Regular { external: true, path, .. } => {
            Err(Refusal::new(Reason::FileExternal, name, format!("{path:?} is to be handed over from outside")))
        }
        File::Regular { path, .. } => check_path(&name, path, images),
        File::External => Err(Refusal::new(Reason::FileExternal, name, "a plugin of CRIU is to open it")),
        File::Unix { marks, directory, .. } => {
            if *marks != UNIX_INSIDE {
                return Err(Refusal::new(Reason::UnixExternal, name, "its other end is outside the container"));
            }
            directory.as_deref().map_or(Ok(()), |directory| check_path(&name, directory, images))
        }
        _ => Ok(()),
    }
}

fn check_path(name: &str, path: &str, images: &ImageSet) -> Result<(), Refusal> {
    let outside = |why: &str| Err(Refusal::new(Reason::PathOutside, name, format!("{path:?} {why}")));
    if !path.starts_with('/') {
        return outside("is no absolute path");
    }
    let mut parts = path.split('/').skip(1);
    if path.split('/').any(|part| part == "..") {
        return outside("leads upwards");
    }
    if parts.next() == Some("proc")
        && let Some(word) = parts.next()
        && word.bytes().next().is_some_and(|byte| byte.is_ascii_digit())
        && !images.processes.iter().any(|process| process.pid.to_string() == word)
    {
        return outside("is of a process that the checkpoint does not have");
    }
    Ok(())
}

/// Every archive of a file system in memory belongs to a mount, and makes no device that the container has not.
fn check_tarballs(contents: &Contents, grant: &Grant) -> Result<(), Refusal> {
    let mounts = contents.images.mounts.values().flatten();
    let known: BTreeSet<(bool, u64)> =
        mounts.flat_map(|mount| [(false, mount.mnt_id.into()), (true, minor(mount.root_dev))]).collect();
    for (name, tarball) in &contents.tarballs {
        let belongs =
            matches!(FileKind::of(name), Some(FileKind::Tmpfs(by_device, id)) if known.contains(&(by_device, id)));
        if !belongs {
            return Err(Refusal::new(Reason::TarRefused, name, "it belongs to no mount"));
        }
        if let Some((path, _, major, minor)) =
            tarball.devices.iter().find(|(_, block, major, minor)| *block || !grant.has_device(*major, *minor))
        {
            let why = format!("it makes the device {path:?} ({major}:{minor}), which the request does not grant");
            return Err(Refusal::new(Reason::TarRefused, name, why));
        }
    }
    Ok(())
}

/// Anonymous devices have major 0, and CRIU names the archive by the minor number.
fn minor(device: u32) -> u64 {
    u64::from(device & 0xf_ffff)
}

/// The OCI runtime makes of these what stands in for the container's standard descriptors.
fn check_descriptors(contents: &Contents) -> Result<(), Refusal> {
    let pipes: BTreeSet<u32> = contents.images.files.values().filter_map(pipe).collect();
    if contents.descriptors.len() > STANDARD {
        let why = format!("it names {} descriptors", contents.descriptors.len());
        return Err(Refusal::new(Reason::DescriptorsMalformed, "descriptors.json", why));
    }
    for descriptor in &contents.descriptors {
        let pipe = descriptor.strip_prefix("pipe:[").and_then(|rest| rest.strip_suffix(']'));
        let known = match pipe {
            Some(number) => number.parse().is_ok_and(|number| pipes.contains(&number)),
            None => !descriptor.contains(':'),
        };
        if !known {
            let why = format!("the standard descriptor {descriptor:?} is none of the checkpoint's");
            return Err(Refusal::new(Reason::DescriptorsMalformed, "descriptors.json", why));
        }
    }
    Ok(())
}

fn pipe(file: &File) -> Option<u32> {
    match file {
        File::Pipe { pipe } => Some(*pipe),
        _ => None,
    }
}
