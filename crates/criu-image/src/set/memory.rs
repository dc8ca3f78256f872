//! Memory: mappings, page maps and the length of the pages.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::build::{Pagemap, SetBuilder, reader};
use super::{Mapping, PAGE_SIZE};
use crate::error::{Error, Fault, Result};
use crate::image::Entry;
use crate::kind::Kind;
use crate::messages;

/// Flags of a run of pages: in an earlier dump, may come later, in this dump.
const PARENT: u32 = 1;
const LAZY: u32 = 1 << 1;
const PRESENT: u32 = 1 << 2;

/// End of the addresses that a process can map, with five levels of page tables.
const ADDRESS_END: u64 = 1 << 56;
/// The page that the kernel maps for old programs, above all others.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// Status of mappings.
const FILE_PRIVATE: u32 = 1 << 6;
const FILE_SHARED: u32 = 1 << 7;
const ANON_SHARED: u32 = 1 << 8;
const SYSVIPC: u32 = 1 << 10;
const MEMFD: u32 = 1 << 14;
/// All that CRIU 4.2.1 knows and can restore.
const STATUS_KNOWN: u32 = 0x2_ffff & !(1 << 4);

impl SetBuilder {
    pub(super) fn take_memory(&mut self, number: u64, entry: &Entry) -> Result<()> {
        let mm: messages::MmEntry = entry.decode()?;
        self.keep(size_of::<Mapping>() * mm.vmas.len() + 64)?;
        let mut mappings = Vec::with_capacity(mm.vmas.len());
        let mut last = 0;
        for vma in &mm.vmas {
            let (start, end) = (vma.start, vma.end);
            let bad = |why: &str| Err(Error::new(Fault::Memory, format!("the mapping {start:#x}-{end:#x} {why}")));
            if start % PAGE_SIZE != 0 || end % PAGE_SIZE != 0 || start >= end {
                return bad("is not of whole pages");
            }
            if end > ADDRESS_END && (start, end) != (VSYSCALL, VSYSCALL + PAGE_SIZE) {
                return bad("is not in the memory of a process");
            }
            if start < last {
                return bad("overlaps the one before it, or comes after a higher one");
            }
            if vma.status & !STATUS_KNOWN != 0 {
                return bad(&format!("has the status {:#x}, which CRIU 4.2.1 cannot restore", vma.status));
            }
            last = end;
            let (status, protection, flags, source) = (vma.status, vma.prot, vma.flags, vma.shmid);
            mappings.push(Mapping { start, end, status, protection, flags, source });
        }
        self.memory.insert(number, (mm.exe_file_id, mappings));
        Ok(())
    }

    pub(super) fn take_pagemap(&mut self, shared: bool, id: u64, content: impl Read) -> Result<()> {
        let mut reader = reader(Kind::Pagemap, content)?;
        let mut map = Pagemap::default();
        let mut last = 0u64;
        let mut first = true;
        while let Some(entry) = reader.next_entry(false)? {
            if std::mem::take(&mut first) {
                let head: messages::PagemapHead = entry.decode()?;
                map.pages = head.pages_id.into();
                continue;
            }
            let (start, count, present) = run(&entry.decode()?)?;
            let bad = |why: &str| Err(Error::new(Fault::Memory, format!("{count} pages at {start:#x} {why}")));
            let end = count.checked_mul(PAGE_SIZE).and_then(|length| start.checked_add(length));
            let Some(end) = end.filter(|_| start % PAGE_SIZE == 0) else {
                return bad("are not of whole pages in memory");
            };
            if start < last {
                return bad("overlap the ones before them, or come after higher ones");
            }
            last = end;
            match map.runs.last_mut() {
                // Nobody needs to know that they came apart.
                Some((begin, length, same)) if *begin + *length * PAGE_SIZE == start && *same == present => {
                    *length += count;
                }
                _ => {
                    self.keep(size_of::<(u64, u64, bool)>())?;
                    map.runs.push((start, count, present));
                }
            }
        }
        self.keep(128)?;
        self.pagemaps.insert((shared, id), map);
        Ok(())
    }

    /// Every run of pages lies in a mapping of its process, and every file of pages is used up by one map. Returns the
    /// bytes of memory.
    pub(super) fn check_memory(&self) -> Result<u64> {
        let mut used: BTreeMap<u64, (&(bool, u64), u64)> = BTreeMap::new();
        for (key, map) in &self.pagemaps {
            let name = pagemap_name(key);
            let present = map.runs.iter().filter(|(_, _, present)| *present);
            let mut bytes = 0u64;
            for (_, count, _) in present {
                let more = count.checked_mul(PAGE_SIZE).and_then(|more| bytes.checked_add(more));
                bytes = more.ok_or_else(|| Error::of(&name, Fault::Memory, "it has more pages than there can be"))?;
            }
            if bytes > 0 && used.insert(map.pages, (key, bytes)).is_some() {
                let why = format!("another map reads pages-{}.img too", map.pages);
                return Err(Error::of(&name, Fault::Inconsistent, why));
            }
        }
        for (id, (key, bytes)) in &used {
            let name = format!("pages-{id}.img");
            let size = self.pages.get(id).copied();
            if size != Some(*bytes) {
                let has = size.map_or_else(|| "is not there".to_owned(), |size| format!("has {size} bytes"));
                let fault = if size.is_some() { Fault::Inconsistent } else { Fault::Dangling };
                return Err(Error::of(name, fault, format!("it {has}, where {} says {bytes}", pagemap_name(key))));
            }
        }
        for (id, size) in &self.pages {
            if *size > 0 && !used.contains_key(id) {
                let why = format!("no page map says where its {size} bytes belong");
                return Err(Error::of(format!("pages-{id}.img"), Fault::Inconsistent, why));
            }
        }
        self.check_mapped()?;
        Ok(used.values().map(|(_, bytes)| bytes).sum())
    }

    fn check_mapped(&self) -> Result<()> {
        let mut shared = BTreeSet::new();
        for (pid, (_, mappings)) in &self.memory {
            for mapping in mappings {
                self.check_source(*pid, mapping)?;
                if mapping.status & (ANON_SHARED | SYSVIPC) != 0 {
                    shared.insert(mapping.source);
                }
            }
        }
        shared.extend(self.memory_files.values().map(|shmid| u64::from(*shmid)));
        shared.extend(&self.segments);
        for (key, map) in &self.pagemaps {
            let name = pagemap_name(key);
            match key {
                (true, id) if !shared.contains(id) => {
                    return Err(Error::of(name, Fault::Dangling, "no process maps this shared memory"));
                }
                (true, _) => {}
                (false, pid) => {
                    let Some((_, mappings)) = self.memory.get(pid) else {
                        return Err(Error::of(name, Fault::Dangling, format!("there is no mm-{pid}.img")));
                    };
                    if let Some((start, count, _)) = map.runs.iter().find(|run| !is_mapped(mappings, run)) {
                        let why = format!("{count} pages at {start:#x} are in no mapping");
                        return Err(Error::of(name, Fault::Memory, why));
                    }
                }
            }
        }
        Ok(())
    }

    fn check_source(&self, pid: u64, mapping: &Mapping) -> Result<()> {
        if mapping.status & (FILE_PRIVATE | FILE_SHARED | MEMFD) == 0 {
            return Ok(());
        }
        let there = u32::try_from(mapping.source).is_ok_and(|id| {
            let file = self.files.get(&id).map(|(kind, _)| *kind);
            matches!(file, Some(messages::FdTypes::Reg | messages::FdTypes::Memfd))
                // A terminal, a socket or a device can be mapped too.
                || file.is_some() && mapping.status & FILE_SHARED != 0
        });
        if there {
            return Ok(());
        }
        let why = format!("{:#x} maps file {}, which is not there", mapping.start, mapping.source);
        Err(Error::of(format!("mm-{pid}.img"), Fault::Dangling, why))
    }
}

/// Start, number and presence of pages, as CRIU reads an entry.
fn run(entry: &messages::PagemapEntry) -> Result<(u64, u64, bool)> {
    let bad = |why: &str| Err(Error::new(Fault::Malformed, format!("the pages at {:#x} {why}", entry.vaddr)));
    let count = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
    let flags = match entry.flags {
        Some(flags) if flags & !(PARENT | LAZY | PRESENT) != 0 => return bad("have unknown flags"),
        Some(flags) => flags,
        None => PRESENT,
    };
    if entry.in_parent() || flags & PARENT != 0 {
        return bad("are in an earlier dump: dump again without a pre-dump");
    }
    if count == 0 {
        return bad("are none");
    }
    Ok((entry.vaddr, count, flags & PRESENT != 0))
}

/// Whether a run lies in mappings that follow one another without a gap.
fn is_mapped(mappings: &[Mapping], (start, count, _): &(u64, u64, bool)) -> bool {
    let end = start + count * PAGE_SIZE;
    let mut at = mappings.partition_point(|mapping| mapping.end <= *start);
    let mut covered = *start;
    while covered < end {
        match mappings.get(at) {
            Some(mapping) if mapping.start <= covered => covered = mapping.end,
            _ => return false,
        }
        at += 1;
    }
    true
}

fn pagemap_name((shared, id): &(bool, u64)) -> String {
    if *shared { format!("pagemap-shmem-{id}.img") } else { format!("pagemap-{id}.img") }
}
