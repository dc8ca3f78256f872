//! Check 13: whether this host can run it, said before anything is taken down for it.

use stasis_criu_image::messages::Lsmtype;
use stasis_criu_image::messages::core_entry::March;
use stasis_criu_image::{File, ImageSet};

use crate::error::{Reason, Refusal};
use crate::grant::Grant;

/// Version of the images that CRIU 4.2.1 writes.
const IMAGE_VERSION: u32 = 2;
/// Processes that CRIU needs beside the container's own while it restores.
const RESTORER_PROCESSES: u64 = 5;
/// TCP's states of a connection that has a peer: all but closed and listening.
const TCP: u32 = 6;
const TCP_IDLE: [u32; 2] = [7, 10];

pub(super) fn check(images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    let inventory = &images.inventory;
    if inventory.img_version > IMAGE_VERSION {
        let why = format!("its version is {}, of a later CRIU than 4.2.1", inventory.img_version);
        return Err(Refusal::new(Reason::ImageVersion, "inventory.img", why));
    }
    let here = architecture();
    if let Some(process) = images.processes.iter().find(|process| Some(process.architecture) != here) {
        let why = format!("it runs on {:?}, this host is {}", process.architecture, std::env::consts::ARCH);
        return Err(Refusal::new(Reason::Architecture, format!("process {}", process.pid), why));
    }
    if inventory.lsmtype() != Lsmtype::NoLsm && grant.user.label.is_none() {
        let why = format!("it was taken under {:?}, and the request has no label of such", inventory.lsmtype());
        return Err(Refusal::new(Reason::SecurityModule, "inventory.img", why));
    }
    if let Some(limit) = grant.memory_limit.filter(|limit| images.memory > *limit) {
        let why = format!("it has {} bytes of memory, the request's limit is {limit}", images.memory);
        return Err(Refusal::new(Reason::MemoryLimit, "memory", why));
    }
    let threads = images.threads().count() as u64 + RESTORER_PROCESSES;
    if let Some(limit) = grant.process_limit.filter(|limit| threads > *limit) {
        let why = format!("{threads} processes are needed to restore it, the request's limit is {limit}");
        return Err(Refusal::new(Reason::ProcessLimit, "processes", why));
    }
    let connected = images
        .files
        .iter()
        .find(|(_, file)| matches!(file, File::Inet { protocol: TCP, state, .. } if !TCP_IDLE.contains(state)));
    match connected {
        Some((id, _)) if !grant.tcp_established => {
            let why = "it is an established TCP connection, which this handler does not restore";
            Err(Refusal::new(Reason::TcpEstablished, format!("file {id}"), why))
        }
        _ => Ok(()),
    }
}

fn architecture() -> Option<March> {
    match std::env::consts::ARCH {
        "x86_64" => Some(March::X8664),
        "aarch64" => Some(March::Aarch64),
        "arm" => Some(March::Arm),
        "powerpc64" => Some(March::Ppc64),
        "s390x" => Some(March::S390),
        "riscv64" => Some(March::Riscv64),
        "loongarch64" => Some(March::Loongarch64),
        _ => None,
    }
}
