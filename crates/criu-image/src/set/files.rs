//! Files: what descriptors and directories refer to, and what is behind them.

use std::collections::{BTreeMap, BTreeSet};

use super::build::SetBuilder;
use super::{File, Process};
use crate::error::{Error, Fault, Result};
use crate::limits;
use crate::messages::{self, FdTypes};

/// CRIU's name of the file of files.
const FILES: &str = "files.img";

/// Takes an entry of `files.img`, which holds one file of one of many types.
pub(super) fn take_file(set: &mut SetBuilder, entry: &messages::FileEntry) -> Result<()> {
    let id = entry.id;
    let kind = FdTypes::try_from(entry.r#type)
        .map_err(|_| Error::new(Fault::Malformed, format!("file {id} is of an unknown type")))?;
    let (inner, file) = only_one(entry, kind)?;
    if inner != id {
        return Err(Error::new(Fault::Inconsistent, format!("file {id} says that it is file {inner}")));
    }
    let refers = match &file {
        File::Fifo { regular, .. } | File::Terminal { regular, .. } => *regular,
        _ => None,
    };
    if let Some(other) = refers.filter(|other| *other != 0) {
        set.file_references.push((id, other));
    }
    if set.files.insert(id, (kind, file)).is_some() {
        return Err(Error::new(Fault::Duplicate, format!("file {id} comes twice")));
    }
    Ok(())
}

/// The one part of the entry that its type names; no other may be there.
fn only_one(entry: &messages::FileEntry, kind: FdTypes) -> Result<(u32, File)> {
    let mut parts: Vec<(FdTypes, u32, File)> = Vec::new();
    let mut part = |kind, id, file| parts.push((kind, id, file));
    if let Some(reg) = &entry.reg {
        part(FdTypes::Reg, reg.id, regular(reg));
    }
    if let Some(pipe) = &entry.pipe {
        part(FdTypes::Pipe, pipe.id, File::Pipe { pipe: pipe.pipe_id });
    }
    if let Some(fifo) = &entry.fifo {
        part(FdTypes::Fifo, fifo.id, File::Fifo { pipe: fifo.pipe_id, regular: fifo.regf_id });
    }
    if let Some(isk) = &entry.isk {
        let (kind, protocol, state, namespace, inode) = (isk.r#type, isk.proto, isk.state, isk.ns_id, isk.ino);
        part(FdTypes::Inetsk, isk.id, File::Inet { kind, protocol, state, namespace, inode });
    }
    if let Some(usk) = &entry.usk {
        let (name, directory) = (usk.name.clone(), usk.name_dir.clone());
        let (inode, peer, marks) = (usk.ino, usk.peer, usk.uflags);
        part(FdTypes::Unixsk, usk.id, File::Unix { name, directory, inode, peer, marks });
    }
    if let Some(tty) = &entry.tty {
        part(FdTypes::Tty, tty.id, File::Terminal { info: tty.tty_info_id, regular: tty.regf_id });
    }
    if let Some(nsf) = &entry.nsf {
        part(FdTypes::Ns, nsf.id, File::Namespace { namespace: nsf.ns_id, flag: nsf.ns_cflag });
    }
    if let Some(memfd) = &entry.memfd {
        part(FdTypes::Memfd, memfd.id, File::Memory { inode: memfd.inode_id });
    }
    let events = [
        (FdTypes::Eventfd, entry.efd.as_ref().map(|file| file.id)),
        (FdTypes::Eventpoll, entry.epfd.as_ref().map(|file| file.id)),
        (FdTypes::Signalfd, entry.sgfd.as_ref().map(|file| file.id)),
        (FdTypes::Timerfd, entry.tfd.as_ref().map(|file| file.id)),
    ];
    for (kind, id) in events {
        if let Some(id) = id {
            part(kind, id, File::Event);
        }
    }
    let others = [
        (FdTypes::Inotify, entry.ify.as_ref().map(|file| file.id), File::Watch(false)),
        (FdTypes::Fanotify, entry.ffy.as_ref().map(|file| file.id), File::Watch(true)),
        (FdTypes::Netlinksk, entry.nlsk.as_ref().map(|file| file.id), netlink(entry)),
        (FdTypes::Packetsk, entry.psk.as_ref().map(|file| file.id), File::Packet),
        (FdTypes::Tunf, entry.tunf.as_ref().map(|file| file.id), File::Tun),
        (FdTypes::Ext, entry.ext.as_ref().map(|file| file.id), File::External),
        (FdTypes::Bpfmap, entry.bpf.as_ref().map(|file| file.id), File::BpfMap),
        (FdTypes::Pidfd, entry.pidfd.as_ref().map(|file| file.id), File::Pidfd),
    ];
    for (kind, id, file) in others {
        if let Some(id) = id {
            part(kind, id, file);
        }
    }
    match (parts.pop(), parts.is_empty()) {
        (Some((of, id, file)), true) if of == kind => Ok((id, file)),
        _ => Err(Error::new(
            Fault::Inconsistent,
            format!("file {} is called {} and holds something else", entry.id, kind.as_str_name()),
        )),
    }
}

fn regular(reg: &messages::RegFileEntry) -> File {
    let (path, mount, flags, mode) = (reg.name.clone(), reg.mnt_id(), reg.flags, reg.mode);
    File::Regular { path, mount, flags, mode, external: reg.ext() }
}

fn netlink(entry: &messages::FileEntry) -> File {
    File::Netlink(entry.nlsk.as_ref().map_or(0, |socket| socket.protocol))
}

impl SetBuilder {
    /// Files, and what refers to them by number.
    pub(super) fn check_files(&self) -> Result<()> {
        for (file, other) in &self.file_references {
            if !matches!(self.files.get(other), Some((FdTypes::Reg, _))) {
                return Err(dangling(FILES, format!("file {file} is named by file {other}, which is no regular file")));
            }
        }
        for (table, descriptors) in &self.descriptors {
            self.check_descriptors(&format!("fdinfo-{table}.img"), descriptors)?;
        }
        self.check_mounts()?;
        let paths = self.files.iter().filter_map(|(id, (_, file))| match file {
            File::Regular { mount, .. } if *mount >= 0 => Some((id, *mount)),
            _ => None,
        });
        let mounts: BTreeSet<u32> = self.mounts.values().flatten().map(|mount| mount.mnt_id).collect();
        for (id, mount) in paths {
            // Without a mount namespace of its own a dump has no mounts.
            if !mounts.is_empty() && !mounts.contains(&mount.unsigned_abs()) {
                return Err(dangling(FILES, format!("file {id} is on mount {mount}, which is not there")));
            }
        }
        self.check_behind_files()
    }

    fn check_descriptors(&self, name: &str, descriptors: &[messages::FdinfoEntry]) -> Result<()> {
        let mut numbers = BTreeSet::new();
        for descriptor in descriptors {
            let (fd, id) = (descriptor.fd, descriptor.id);
            if !numbers.insert(fd) {
                return Err(Error::of(name, Fault::Duplicate, format!("descriptor {fd} comes twice")));
            }
            match self.files.get(&id) {
                None => return Err(dangling(name, format!("descriptor {fd} is file {id}, which is not there"))),
                Some((kind, _)) if *kind as i32 != descriptor.r#type => {
                    let why = format!("descriptor {fd} and its file {id} are of different types");
                    return Err(Error::of(name, Fault::Inconsistent, why));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn check_mounts(&self) -> Result<()> {
        for (namespace, mounts) in &self.mounts {
            let name = format!("mountpoints-{namespace}.img");
            let mut parents = BTreeMap::new();
            for mount in mounts {
                if parents.insert(mount.mnt_id, mount.parent_mnt_id).is_some() {
                    return Err(Error::of(name, Fault::Duplicate, format!("mount {} comes twice", mount.mnt_id)));
                }
            }
            let roots = mounts.iter().filter(|mount| !parents.contains_key(&mount.parent_mnt_id)).count();
            if roots != 1 {
                let why = format!("{roots} mounts have a parent that is not there, which one has, the root");
                return Err(Error::of(name, Fault::Dangling, why));
            }
            if has_cycle(&parents) {
                return Err(Error::of(name, Fault::Inconsistent, "mounts are above each other in a circle"));
            }
        }
        Ok(())
    }

    /// Pipes, sockets, terminals, deleted files.
    fn check_behind_files(&self) -> Result<()> {
        let mut pipes = BTreeSet::new();
        let mut sockets = BTreeSet::new();
        let mut peers = Vec::new();
        let mut streams = BTreeSet::new();
        let terminals: BTreeSet<u32> = self.terminals.iter().map(|terminal| terminal.id).collect();
        for (id, (_, file)) in &self.files {
            match file {
                File::Pipe { pipe } => drop(pipes.insert((false, *pipe))),
                File::Fifo { pipe, .. } => drop(pipes.insert((true, *pipe))),
                File::Inet { inode, .. } => drop(streams.insert(u64::from(*inode))),
                File::Unix { inode, peer, .. } => {
                    if !sockets.insert(*inode) {
                        return Err(Error::of(FILES, Fault::Duplicate, format!("unix socket {inode} comes twice")));
                    }
                    peers.push((*id, *peer));
                }
                File::Terminal { info, .. } if !terminals.contains(info) => {
                    return Err(dangling(FILES, format!("file {id} is terminal {info}, which is not there")));
                }
                File::Memory { inode } if !self.memory_files.contains_key(&u64::from(*inode)) => {
                    return Err(dangling(FILES, format!("file {id} is memory file {inode}, which is not there")));
                }
                _ => {}
            }
        }
        if let Some((id, peer)) = peers.iter().find(|(_, peer)| *peer != 0 && !sockets.contains(peer)) {
            return Err(dangling(FILES, format!("the peer {peer} of unix socket {id} is not there")));
        }
        if let Some((fifo, pipe)) = self.pipe_data.iter().find(|data| !pipes.contains(data)) {
            let name = if *fifo { "fifo-data.img" } else { "pipes-data.img" };
            return Err(dangling(name, format!("pipe {pipe} is filled and not there")));
        }
        if let Some(stream) = self.streams.difference(&streams).next() {
            return Err(dangling(&format!("tcp-stream-{stream:x}.img"), "its socket is not there".to_owned()));
        }
        if let Some(packet) = self.packets.iter().find(|packet| !self.files.contains_key(&packet.id_for)) {
            // CRIU names the socket by its file's ID or, for unix sockets, by that of the receiving end.
            let why = format!("datagrams are queued for socket {}, which is not there", packet.id_for);
            return Err(dangling("sk-queues.img", why));
        }
        if let Some(terminal) = self.terminal_data.iter().find(|id| !terminals.contains(id)) {
            return Err(dangling("tty-data.img", format!("terminal {terminal} is not there")));
        }
        self.check_remaps()
    }

    fn check_remaps(&self) -> Result<()> {
        let mut remapped = BTreeSet::new();
        for remap in &self.remaps {
            let name = "remap-fpath.img";
            if !matches!(self.files.get(&remap.orig_id), Some((FdTypes::Reg | FdTypes::Unixsk, _))) {
                let why = format!("file {} is to be remapped and is no file with a path", remap.orig_id);
                return Err(dangling(name, why));
            }
            if !remapped.insert(remap.orig_id) {
                let why = format!("file {} is remapped twice", remap.orig_id);
                return Err(Error::of(name, Fault::Duplicate, why));
            }
            let there = match remap.remap_type() {
                messages::RemapType::Ghost => self.ghosts.contains_key(&remap.remap_id.into()),
                messages::RemapType::Linked => self.files.contains_key(&remap.remap_id),
                messages::RemapType::Procfs => self.tree.iter().any(|process| process.pid == remap.remap_id),
            };
            if !there {
                let why = format!("file {} is remapped to {}, which is not there", remap.orig_id, remap.remap_id);
                return Err(dangling(name, why));
            }
        }
        Ok(())
    }

    /// Filters are chained backwards only, and have whole instructions.
    pub(super) fn check_seccomp(&self) -> Result<()> {
        for (at, filter) in self.filters.iter().enumerate() {
            let name = "seccomp.img";
            let length = filter.filter.len();
            if length == 0 || length % 8 != 0 || length / 8 > limits::FILTER_INSTRUCTIONS_MAX {
                let why = format!("filter {at} has {length} bytes, which are no instructions");
                return Err(Error::of(name, Fault::Malformed, why));
            }
            // CRIU numbers a filter after the one that it was put on.
            if filter.prev.is_some_and(|prev| prev as usize >= self.filters.len() || prev as usize == at) {
                return Err(dangling(name, format!("filter {at} is on filter {:?}", filter.prev)));
            }
        }
        let on = |(at, filter): (usize, &messages::SeccompFilter)| Some((u32::try_from(at).ok()?, filter.prev?));
        if has_cycle(&self.filters.iter().enumerate().filter_map(on).collect()) {
            return Err(Error::of("seccomp.img", Fault::Inconsistent, "a filter stands on itself"));
        }
        Ok(())
    }

    /// Descriptors that are locked and processes that are numbered are there.
    pub(super) fn check_users(&self, processes: &[Process]) -> Result<()> {
        let by_pid: BTreeMap<u32, &Process> = processes.iter().map(|process| (process.pid, process)).collect();
        for lock in &self.locks {
            let process = by_pid.get(&lock.pid.unsigned_abs()).filter(|_| lock.pid > 0);
            let task = process.and_then(|process| process.task.as_ref());
            let table = task.and_then(|task| self.descriptors.get(&task.descriptors));
            let there = table.is_some_and(|table| table.iter().any(|d| i64::from(d.fd) == i64::from(lock.fd)));
            if !there {
                let why = format!("process {} is to lock descriptor {}, which is not there", lock.pid, lock.fd);
                return Err(dangling("filelocks.img", why));
            }
        }
        let sets: BTreeSet<u32> = self.cgroup.sets.iter().map(|set| set.id).collect();
        if sets.len() != self.cgroup.sets.len() {
            return Err(Error::of("cgroup.img", Fault::Duplicate, "a set of control groups comes twice"));
        }
        Ok(())
    }
}

/// Whether following the parents goes round.
fn has_cycle(parents: &BTreeMap<u32, u32>) -> bool {
    let mut good = BTreeSet::new();
    for start in parents.keys() {
        let mut path = Vec::new();
        let mut at = *start;
        while let Some(parent) = parents.get(&at) {
            if good.contains(&at) {
                break;
            }
            if path.len() > parents.len() {
                return true;
            }
            path.push(at);
            at = *parent;
        }
        good.extend(path);
    }
    false
}

fn dangling(file: &str, why: String) -> Error {
    Error::of(file, Fault::Dangling, why)
}
