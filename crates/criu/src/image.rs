//! The framing of CRIU's image files, and the process tree.
//!
//! ```text
//! u32 magic of the class   0x54564319 images, 0x55105940 service files (statistics)
//! u32 magic of the type
//! { u32 length, protobuf message } …      little endian throughout
//! ```
//!
//! The bytes may come out of an archive: every length is checked, nothing is trusted.

use crate::wire::{Value, fields};
use crate::{Error, Result};

/// First word of an image file.
const CLASS_IMAGE: u32 = 0x5456_4319;
/// First word of a service file.
pub(crate) const CLASS_SERVICE: u32 = 0x5510_5940;
/// Type of `pstree.img`.
const PSTREE: u32 = 0x5027_3030;

/// One process of a dumped tree (`pstree_entry`), with the IDs of its own PID namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Process ID.
    pub pid: u32,
    /// Parent's process ID; 0 for the root of the tree.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Number of threads, the main thread included.
    pub threads: u32,
}

/// Reads `pstree.img`: the dumped processes, root first.
pub fn processes(pstree: &[u8]) -> Result<Vec<Process>> {
    let malformed = |why: String| Error::Image { file: "pstree.img", why };
    entries(pstree, CLASS_IMAGE, PSTREE)
        .and_then(|entries| entries.into_iter().map(process).collect())
        .map_err(malformed)
}

fn process(message: &[u8]) -> std::result::Result<Process, String> {
    let mut process = Process::default();
    for field in fields(message) {
        match field? {
            (1, Value::Varint(pid)) => process.pid = id(pid)?,
            (2, Value::Varint(pid)) => process.parent = id(pid)?,
            (3, Value::Varint(pid)) => process.group = id(pid)?,
            (4, Value::Varint(pid)) => process.session = id(pid)?,
            (5, Value::Varint(_)) => process.threads = process.threads.saturating_add(1),
            _ => {}
        }
    }
    Ok(process)
}

fn id(value: u64) -> std::result::Result<u32, String> {
    u32::try_from(value).map_err(|_| format!("process ID {value} is larger than 32 bits"))
}

/// The messages of an image file of the given class and type.
pub(crate) fn entries(image: &[u8], class: u32, kind: u32) -> std::result::Result<Vec<&[u8]>, String> {
    let (magics, mut rest) = image.split_at_checked(8).ok_or("the file is shorter than its magic")?;
    if magics[..4] != class.to_le_bytes() || magics[4..] != kind.to_le_bytes() {
        return Err(format!("the magic is {magics:02x?}"));
    }
    let mut messages = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let (message, after) = after.split_at_checked(length).ok_or("an entry is longer than the file")?;
        messages.push(message);
        rest = after;
    }
    if rest.is_empty() { Ok(messages) } else { Err("bytes follow the last entry".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two processes; the first has two threads.
    fn pstree() -> Vec<u8> {
        let mut image = Vec::new();
        image.extend(CLASS_IMAGE.to_le_bytes());
        image.extend(PSTREE.to_le_bytes());
        let first: &[u8] = &[0x08, 1, 0x10, 0, 0x18, 1, 0x20, 1, 0x28, 1, 0x28, 9];
        let second: &[u8] = &[0x08, 7, 0x10, 1, 0x18, 1, 0x20, 1, 0x28, 7];
        for message in [first, second] {
            image.extend((message.len() as u32).to_le_bytes());
            image.extend(message);
        }
        image
    }

    #[test]
    fn reads_the_process_tree() {
        let read = processes(&pstree()).unwrap();
        assert_eq!(read[0], Process { pid: 1, parent: 0, group: 1, session: 1, threads: 2 });
        assert_eq!(read[1], Process { pid: 7, parent: 1, group: 1, session: 1, threads: 1 });
    }

    #[test]
    fn refuses_other_files_and_torn_ones() {
        let good = pstree();
        for bad in [&good[..3], &good[1..], &good[..good.len() - 1], &[&good[..], &[1]].concat()] {
            assert!(matches!(processes(bad), Err(Error::Image { file: "pstree.img", .. })));
        }
    }

    proptest! {
        #[test]
        fn mutated_images_never_panic(at in 0usize..48, byte in any::<u8>()) {
            let mut image = pstree();
            let at = at % image.len();
            image[at] = byte;
            let _ = processes(&image);
        }
    }
}
