//! Real dumps of CRIU 4.2.1: told as crit tells them, accepted as they are, and refused once they are changed.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Dump, told_by_crit};
use proptest::prelude::*;
use stasis_criu_image::{Fault, File, FileKind, Style, messages, write_json};

const DUMPS: [&str; 2] = ["container", "many"];

fn json(content: &[u8], style: Style) -> String {
    let mut text = Vec::new();
    write_json(content, style, &mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn json_is_what_crit_says() {
    for dump in DUMPS {
        let files = Dump::recorded(dump).files;
        let told = told_by_crit(dump);
        assert!(told.len() > 15, "{}", told.len());
        for (name, pretty, expected) in told {
            let style = if pretty { Style::Pretty } else { Style::Plain };
            assert_eq!(json(&files[&name], style).trim_end(), expected, "{dump}/{name}");
        }
    }
}

#[test]
fn a_real_dump_is_accepted() {
    let container = Dump::recorded("container").load().unwrap();
    assert_eq!(container.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [1, 8, 9, 10, 11]);
    assert_eq!(container.memory, Dump::recorded("container").pages.values().sum::<u64>());
    let root = container.processes[0].task.as_ref().unwrap();
    let File::Regular { path, .. } = &container.files[&root.executable] else { panic!() };
    assert_eq!(path, "/usr/bin/busybox");
    assert_eq!(container.processes[0].threads[0].credentials.effective, 0xa804_25fb);
    assert_eq!(container.filters_of(&container.processes[0].threads[0]).len(), 1);

    let many = Dump::recorded("many").load().unwrap();
    let threads: Vec<_> = many.processes.iter().map(|process| process.threads.len()).collect();
    assert_eq!(threads, [4, 1, 0], "the last is a zombie");
}

/// Changes the first entry of an image and writes it back.
fn edit<M: prost::Message + Default>(dump: &mut Dump, name: &str, entry: usize, change: impl FnOnce(&mut M)) {
    let content = dump.files.get_mut(name).unwrap();
    let mut at = if name == "inventory.img" { 4 } else { 8 };
    for _ in 0..entry {
        at += 4 + u32::from_le_bytes(content[at..at + 4].try_into().unwrap()) as usize;
    }
    let length = u32::from_le_bytes(content[at..at + 4].try_into().unwrap()) as usize;
    let mut message = M::decode(&content[at + 4..at + 4 + length]).unwrap();
    change(&mut message);
    let new = message.encode_to_vec();
    let mut framed = u32::try_from(new.len()).unwrap().to_le_bytes().to_vec();
    framed.extend(new);
    content.splice(at..at + 4 + length, framed);
}

#[track_caller]
fn refused(fault: Fault, file: &str, change: impl FnOnce(&mut Dump)) {
    let mut dump = Dump::recorded("container");
    change(&mut dump);
    let error = dump.load().expect_err("it was accepted");
    assert_eq!((error.fault, error.file.as_str()), (fault, file), "{error}");
}

#[test]
fn contradictions_are_found() {
    use Fault::{Dangling, Duplicate, Inconsistent, Malformed, Memory, UnknownField, UnknownImage, WrongType};
    let remove = |name: &'static str| move |dump: &mut Dump| drop(dump.files.remove(name).unwrap());
    for name in ["core-8.img", "ids-9.img", "fs-10.img"] {
        refused(Dangling, name, remove(name));
    }
    refused(Dangling, "pagemap-1.img", remove("mm-1.img"));
    refused(Inconsistent, "pages-5.img", remove("pagemap-11.img"));
    refused(Dangling, "inventory.img", remove("inventory.img"));
    refused(Dangling, "remap-fpath.img", remove("ghost-file-1.img"));
    refused(Dangling, "core-12.img", |dump| {
        drop(dump.files.insert("core-12.img".into(), dump.files["core-8.img"].clone()))
    });
    refused(UnknownImage, "amdgpu-1.img", |dump| drop(dump.files.insert("amdgpu-1.img".into(), Vec::new())));
    refused(UnknownImage, "creds-1.img", |dump| drop(dump.files.insert("creds-1.img".into(), Vec::new())));
    refused(WrongType, "mm-8.img", |dump| drop(dump.files.insert("mm-8.img".into(), dump.files["core-8.img"].clone())));
    refused(Inconsistent, "pages-1.img", |dump| *dump.pages.get_mut("pages-1.img").unwrap() -= 4096);
    refused(Dangling, "pages-2.img", |dump| {
        let _ = dump.pages.remove("pages-2.img");
    });
    refused(Inconsistent, "pages-9.img", |dump| {
        let _ = dump.pages.insert("pages-9.img".into(), 4096);
    });
    let run = |change: fn(&mut messages::PagemapEntry)| move |dump: &mut Dump| edit(dump, "pagemap-1.img", 2, change);
    refused(Memory, "pagemap-1.img", run(|run| run.vaddr = u64::MAX - 4095));
    refused(Memory, "pagemap-1.img", run(|run| run.vaddr = 4096));
    refused(Memory, "pagemap-1.img", run(|run| run.vaddr += 1));
    refused(Memory, "pagemap-1.img", run(|run| run.nr_pages = Some(u64::MAX / 4096)));
    refused(Malformed, "pagemap-1.img", run(|run| run.flags = Some(1)));
    let tree = |at, change: fn(&mut messages::PstreeEntry)| move |dump: &mut Dump| edit(dump, "pstree.img", at, change);
    refused(Inconsistent, "pstree.img", tree(1, |process| process.ppid = 0));
    refused(Dangling, "pstree.img", tree(1, |process| process.ppid = 77));
    refused(Dangling, "pstree.img", tree(1, |process| process.ppid = process.pid));
    refused(Duplicate, "pstree.img", tree(1, |process| process.pid = 9));
    refused(Dangling, "core-9.img", tree(1, |process| process.threads.push(9)));
    let map = |change: fn(&mut messages::MmEntry)| move |dump: &mut Dump| edit(dump, "mm-1.img", 0, change);
    refused(Memory, "mm-1.img", map(|mm| mm.vmas[1].start = mm.vmas[0].start));
    refused(Memory, "mm-1.img", map(|mm| mm.vmas[3].status |= 1 << 31));
    refused(Dangling, "mm-1.img", map(|mm| mm.vmas[0].shmid = 4711));
    refused(Dangling, "files.img", map(|mm| mm.exe_file_id = 4711));
    let table = |change: fn(&mut messages::FdinfoEntry)| move |dump: &mut Dump| edit(dump, "fdinfo-2.img", 1, change);
    refused(Dangling, "fdinfo-2.img", table(|descriptor| descriptor.id = 4711));
    refused(Duplicate, "fdinfo-2.img", table(|descriptor| descriptor.fd = 0));
    refused(Inconsistent, "fdinfo-2.img", table(|descriptor| descriptor.r#type = messages::FdTypes::Reg as i32));
    refused(Inconsistent, "files.img", |dump| {
        edit(dump, "files.img", 0, |file: &mut messages::FileEntry| file.id = 4711);
    });
    refused(Dangling, "core-1.img", |dump| {
        edit(dump, "core-1.img", 0, |core: &mut messages::CoreEntry| {
            core.thread_core.as_mut().unwrap().seccomp_filter = Some(99);
        });
    });
    refused(Inconsistent, "seccomp.img", |dump| {
        edit(dump, "seccomp.img", 0, |filters: &mut messages::SeccompEntry| {
            filters.seccomp_filters[0].prev = Some(1);
            filters.seccomp_filters[1].prev = Some(0);
        });
    });
    refused(Dangling, "mountpoints-12.img", |dump| {
        edit(dump, "mountpoints-12.img", 3, |mount: &mut messages::MntEntry| mount.parent_mnt_id = 4711);
    });
    refused(UnknownField, "fs-1.img", |dump| {
        let content = dump.files.get_mut("fs-1.img").unwrap();
        let length = content[8] + 3;
        content[8] = length;
        content.extend([0xf8, 0x01, 0]);
    });
    // CRIU takes the second of two, another decoder may take the first.
    refused(Malformed, "fs-1.img", |dump| {
        let content = dump.files.get_mut("fs-1.img").unwrap();
        let length = content[8] + 2;
        content[8] = length;
        content.extend([0x08, 1]);
    });
    refused(Malformed, "fs-1.img", |dump| {
        let content = dump.files.get_mut("fs-1.img").unwrap();
        content.truncate(12);
        content[8] = 0;
    });
}

#[test]
fn an_earlier_dump_and_a_pre_dump_are_named() {
    let mut dump = Dump::recorded("container");
    edit(&mut dump, "pagemap-1.img", 2, |run: &mut messages::PagemapEntry| run.in_parent = Some(true));
    assert!(dump.load().unwrap_err().why.contains("without a pre-dump"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 64 } else { 2000 }))]

    /// Any change of a real image ends in an answer, and where the image is still accepted so is its JSON.
    #[test]
    fn changed_images_never_panic(dump in 0..2usize, file in any::<prop::sample::Index>(),
                                  changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
                                  cut in prop::option::of(any::<prop::sample::Index>())) {
        let mut dump = Dump::recorded(DUMPS[dump]);
        let name = file.get(&dump.files.keys().cloned().collect::<Vec<_>>()).clone();
        let content = dump.files.get_mut(&name).unwrap();
        for (at, byte) in changes {
            if !content.is_empty() {
                let at = at.index(content.len());
                content[at] = byte;
            }
        }
        if let Some(cut) = cut {
            content.truncate(cut.index(content.len() + 1));
        }
        let content = content.clone();
        if matches!(FileKind::of(&name), Some(FileKind::Image(..) | FileKind::Pagemap(..))) {
            for style in [Style::Plain, Style::Pretty] {
                let _ = write_json(content.as_slice(), style, &mut Vec::new());
            }
        }
        let _ = dump.load();
    }
}
