//! Takes the files of a dump one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::files::take_file;
use super::tree::Core;
use super::{File, Ghost, ImageSet, Mapping, Namespaces};
use crate::error::{Error, Fault, Result};
use crate::image::{Entry, Extra, ImageReader};
use crate::kind::{FileKind, Kind};
use crate::{limits, messages};

/// Takes the files of a dump one by one, in any order.
#[derive(Debug, Default)]
pub struct SetBuilder {
    pub(super) kept: usize,
    pub(super) names: BTreeSet<String>,
    pub(super) inventory: Option<messages::InventoryEntry>,
    pub(super) tree: Vec<messages::PstreeEntry>,
    pub(super) cores: BTreeMap<u64, Core>,
    pub(super) ids: BTreeMap<u64, Ids>,
    pub(super) directories: BTreeMap<u64, (u32, u32)>,
    pub(super) memory: BTreeMap<u64, (u32, Vec<Mapping>)>,
    pub(super) pagemaps: BTreeMap<(bool, u64), Pagemap>,
    pub(super) pages: BTreeMap<u64, u64>,
    pub(super) descriptors: BTreeMap<u32, Vec<messages::FdinfoEntry>>,
    pub(super) files: BTreeMap<u32, (messages::FdTypes, File)>,
    /// Files that files refer to.
    pub(super) file_references: Vec<(u32, u32)>,
    pub(super) mounts: BTreeMap<u32, Vec<messages::MntEntry>>,
    pub(super) filters: Vec<messages::SeccompFilter>,
    pub(super) cgroup: messages::CgroupEntry,
    pub(super) ghosts: BTreeMap<u64, Ghost>,
    pub(super) remaps: Vec<messages::RemapFilePathEntry>,
    pub(super) pipe_data: BTreeSet<(bool, u32)>,
    pub(super) packets: Vec<messages::SkPacketEntry>,
    pub(super) streams: BTreeSet<u64>,
    pub(super) terminals: Vec<messages::TtyInfoEntry>,
    pub(super) terminal_data: Vec<u32>,
    pub(super) memory_files: BTreeMap<u64, u32>,
    pub(super) locks: Vec<messages::FileLockEntry>,
    pub(super) user_namespaces: BTreeMap<u32, messages::UsernsEntry>,
    pub(super) host_names: BTreeMap<u32, messages::UtsnsEntry>,
    pub(super) segments: BTreeSet<u64>,
    pub(super) images: BTreeSet<(Kind, u64)>,
    pub(super) cpu: Option<messages::CpuinfoEntry>,
}

/// IDs of what a process shares with others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    pub(super) files: u32,
    pub(super) namespaces: Namespaces,
}

/// Where pages belong.
#[derive(Debug, Default)]
pub(super) struct Pagemap {
    pub(super) pages: u64,
    /// First byte, number of pages, whether they are in the file.
    pub(super) runs: Vec<(u64, u64, bool)>,
}

impl SetBuilder {
    /// Whether the content of a file of this name is to be given to [`SetBuilder::add`]; else its size is enough.
    pub fn wants_content(name: &str) -> bool {
        matches!(FileKind::of(name), Some(FileKind::Image(..) | FileKind::Pagemap(..)))
    }

    /// Takes a file.
    ///
    /// # Errors
    /// If the name belongs to no image or comes twice, and if the content is not what the name says.
    pub fn add(&mut self, name: &str, size: u64, content: impl Read) -> Result<()> {
        self.take(name, size, content).map_err(|error| error.in_file(name))
    }

    fn take(&mut self, name: &str, size: u64, content: impl Read) -> Result<()> {
        let shown: String = name.chars().take(80).collect();
        let kind = FileKind::of(name)
            .ok_or_else(|| Error::new(Fault::UnknownImage, format!("CRIU 4.2.1 has no image of the name {shown:?}")))?;
        self.keep(name.len() + 64)?;
        if !self.names.insert(name.to_owned()) {
            return Err(Error::new(Fault::Duplicate, "it comes twice"));
        }
        match kind {
            FileKind::Pages(id) => {
                self.pages.insert(id, size);
                Ok(())
            }
            FileKind::Tmpfs(..) | FileKind::Network(..) | FileKind::Passive => Ok(()),
            FileKind::Image(kind, number) => self.take_image(kind, number.unwrap_or_default(), content),
            FileKind::Pagemap(shared, id) => self.take_pagemap(shared, id, content),
        }
    }

    fn take_image(&mut self, kind: Kind, number: u64, content: impl Read) -> Result<()> {
        if is_legacy(kind) {
            return Err(Error::new(Fault::UnknownImage, "images of this kind are of a CRIU before 3.0: dump again"));
        }
        let mut reader = reader(kind, content)?;
        let mut entries = 0u64;
        while let Some(entry) = reader.next_entry(false)? {
            entries += 1;
            if entries > 1 && is_single(kind) {
                return Err(Error::new(Fault::Malformed, "it has more than one entry"));
            }
            self.take_entry(kind, number, &entry)?;
        }
        self.images.insert((kind, number));
        Ok(())
    }

    fn take_entry(&mut self, kind: Kind, number: u64, entry: &Entry) -> Result<()> {
        // What is kept of an entry is about as large as the entry.
        let size = entry.bytes.len();
        match kind {
            Kind::Core => return self.take_core(number, entry),
            Kind::Mm => return self.take_memory(number, entry),
            Kind::GhostFile => return self.take_ghost(number, entry),
            _ => {}
        }
        let narrow = || u32::try_from(number).map_err(|_| Error::new(Fault::Malformed, "its number is too large"));
        match kind {
            Kind::Inventory => self.inventory = Some(entry.decode()?),
            Kind::Pstree => {
                self.keep(2 * size + 96)?;
                self.tree.push(entry.decode()?);
            }
            Kind::Ids => {
                self.keep(96)?;
                self.ids.insert(number, ids(&entry.decode()?));
            }
            Kind::Fs => {
                self.keep(64)?;
                let fs: messages::FsEntry = entry.decode()?;
                self.directories.insert(number, (fs.cwd_id, fs.root_id));
            }
            Kind::Descriptors => {
                self.keep(size + 64)?;
                self.descriptors.entry(narrow()?).or_default().push(entry.decode()?);
            }
            Kind::Files => {
                self.keep(size + 192)?;
                take_file(self, &entry.decode()?)?;
            }
            Kind::Mounts => {
                self.keep(2 * size + 256)?;
                self.mounts.entry(narrow()?).or_default().push(entry.decode()?);
            }
            Kind::Seccomp => {
                let filters: messages::SeccompEntry = entry.decode()?;
                self.keep(size + filters.seccomp_filters.len() * size_of::<messages::SeccompFilter>())?;
                self.filters = filters.seccomp_filters;
            }
            Kind::Cgroup => {
                self.keep(4 * size)?;
                self.cgroup = entry.decode()?;
            }
            Kind::RemapFpath => {
                self.keep(32)?;
                self.remaps.push(entry.decode()?);
            }
            Kind::PipesData | Kind::FifoData => self.take_pipe_data(kind, entry)?,
            Kind::SkQueues => {
                self.keep(2 * size + 64)?;
                self.packets.push(entry.decode()?);
            }
            Kind::TcpStream => {
                self.keep(64)?;
                self.streams.insert(number);
            }
            Kind::TtyInfo => {
                self.keep(size + 512)?;
                self.terminals.push(entry.decode()?);
            }
            Kind::TtyData => {
                self.keep(16)?;
                let data: messages::TtyDataEntry = entry.decode()?;
                self.terminal_data.push(data.tty_id);
            }
            Kind::MemfdInode => {
                self.keep(64)?;
                let inode: messages::MemfdInodeEntry = entry.decode()?;
                self.memory_files.insert(inode.inode_id, inode.shmid);
            }
            Kind::FileLocks => {
                self.keep(64)?;
                self.locks.push(entry.decode()?);
            }
            Kind::Userns => {
                self.keep(4 * size)?;
                self.user_namespaces.insert(narrow()?, entry.decode()?);
            }
            Kind::Utsns => {
                self.keep(size + 64)?;
                self.host_names.insert(narrow()?, entry.decode()?);
            }
            Kind::IpcnsShm => {
                self.keep(64)?;
                let segment: messages::IpcShmEntry = entry.decode()?;
                self.segments.insert(segment.desc.id.into());
            }
            Kind::Cpuinfo => {
                self.keep(4 * size)?;
                self.cpu = Some(entry.decode()?);
            }
            // Checked in form by the reader; nothing refers to what is in them.
            _ => {}
        }
        Ok(())
    }

    fn take_pipe_data(&mut self, kind: Kind, entry: &Entry) -> Result<()> {
        self.keep(64)?;
        let data: messages::PipeDataEntry = entry.decode()?;
        if !self.pipe_data.insert((kind == Kind::FifoData, data.pipe_id)) {
            return Err(Error::new(Fault::Duplicate, format!("pipe {} is filled twice", data.pipe_id)));
        }
        Ok(())
    }

    fn take_ghost(&mut self, number: u64, entry: &Entry) -> Result<()> {
        let size = if let Extra::Data(size, _) = entry.extra { size } else { 0 };
        if let Some(ghost) = self.ghosts.get_mut(&number) {
            ghost.size = ghost.size.saturating_add(size);
            return Ok(());
        }
        let ghost: messages::GhostFileEntry = entry.decode()?;
        self.keep(128 + entry.bytes.len())?;
        let device = ghost.rdev.unwrap_or_default();
        let (mode, uid, gid, target) = (ghost.mode, ghost.uid, ghost.gid, ghost.symlnk_target);
        self.ghosts.insert(number, Ghost { mode, uid, gid, device, size, target });
        Ok(())
    }

    /// Counts what is kept.
    pub(super) fn keep(&mut self, bytes: usize) -> Result<()> {
        self.kept = self.kept.saturating_add(bytes);
        if self.kept > limits::SET_MAX {
            return Err(Error::new(Fault::TooLarge, "the dump needs more memory to be checked than is accepted"));
        }
        Ok(())
    }

    /// Checks that all files fit together.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn finish(mut self) -> Result<ImageSet> {
        let inventory =
            self.inventory.take().ok_or_else(|| Error::of("inventory.img", Fault::Dangling, "it is missing"))?;
        if !inventory.fdinfo_per_id() || !inventory.ns_per_id() {
            let why = "it is of a CRIU before 1.0: dump again";
            return Err(Error::of("inventory.img", Fault::UnknownImage, why));
        }
        self.check_files()?;
        self.check_seccomp()?;
        let memory = self.check_memory()?;
        let processes = self.check_tree(&inventory)?;
        self.check_users(&processes)?;
        let descriptors = self
            .descriptors
            .iter()
            .map(|(id, table)| (*id, table.iter().map(|descriptor| (descriptor.fd, descriptor.id)).collect()));
        Ok(ImageSet {
            descriptors: descriptors.collect(),
            inventory,
            processes,
            files: self.files.into_iter().map(|(id, (_, file))| (id, file)).collect(),
            mounts: self.mounts,
            filters: self.filters,
            cgroup: self.cgroup,
            ghosts: self.ghosts,
            remaps: self.remaps,
            user_namespaces: self.user_namespaces,
            host_names: self.host_names,
            terminals: self.terminals,
            names: self.names,
            memory,
            cpu: self.cpu,
        })
    }
}

/// A reader of a file whose name says what it is.
pub(super) fn reader<R: Read>(kind: Kind, content: R) -> Result<ImageReader<R>> {
    let reader = ImageReader::new(content)?;
    if reader.kind() != kind {
        let why = format!("it holds {}, where its name says {}", reader.kind().name(), kind.name());
        return Err(Error::new(Fault::WrongType, why));
    }
    Ok(reader)
}

pub(super) fn ids(ids: &messages::TaskKobjIdsEntry) -> Ids {
    let namespaces = Namespaces {
        pid: ids.pid_ns_id(),
        net: ids.net_ns_id(),
        ipc: ids.ipc_ns_id(),
        uts: ids.uts_ns_id(),
        mnt: ids.mnt_ns_id(),
        user: ids.user_ns_id(),
        cgroup: ids.cgroup_ns_id(),
        time: ids.time_ns_id(),
    };
    Ids { files: ids.files_id, namespaces }
}

/// Images of which CRIU reads the first entry only.
fn is_single(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Inventory
            | Kind::Core
            | Kind::Ids
            | Kind::Mm
            | Kind::Fs
            | Kind::Seccomp
            | Kind::Cgroup
            | Kind::Userns
            | Kind::Utsns
            | Kind::Timens
            | Kind::Pidns
            | Kind::IpcVar
            | Kind::Netns
            | Kind::TcpStream
            | Kind::Cpuinfo
            | Kind::Apparmor
    )
}

/// What CRIU once wrote in files of its own and reads to this day. Nothing that is checked here says the same.
fn is_legacy(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::RegFiles
            | Kind::ExtFiles
            | Kind::NsFiles
            | Kind::EventfdFile
            | Kind::EventpollFile
            | Kind::EventpollTfd
            | Kind::Signalfd
            | Kind::Timerfd
            | Kind::InotifyFile
            | Kind::InotifyWd
            | Kind::FanotifyFile
            | Kind::FanotifyMark
            | Kind::Pipes
            | Kind::Fifo
            | Kind::UnixSockets
            | Kind::InetSockets
            | Kind::PacketSockets
            | Kind::NetlinkSockets
            | Kind::TtyFiles
            | Kind::TunFiles
            | Kind::Vmas
            | Kind::Sigact
            | Kind::Itimers
            | Kind::PosixTimers
            | Kind::Creds
            | Kind::Rlimit
            | Kind::Signal
            | Kind::BpfmapFile
            | Kind::Pidfd
    )
}
