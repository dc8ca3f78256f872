//! CRIU's own statistics: the files `stats-dump` and `stats-restore` (images/stats.proto).

use serde::Serialize;

use crate::image::{CLASS_SERVICE, entries};
use crate::wire::{Value, fields};
use crate::{Error, Result};

/// Type of a statistics file.
const STATS: u32 = 0x5709_3306;

/// What a statistics file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Of a dump.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dump: Option<DumpStats>,
    /// Of a restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreStats>,
}

/// Times in microseconds, sizes in pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DumpStats {
    /// Freezing the processes.
    pub freezing_time: u64,
    /// From frozen to running again.
    pub frozen_time: u64,
    /// Reading memory.
    pub memdump_time: u64,
    /// Writing memory.
    pub memwrite_time: u64,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages that an earlier dump holds already.
    pub pages_skipped_parent: u64,
    /// Pages written.
    pub pages_written: u64,
    /// Pages that may be restored lazily.
    pub pages_lazy: u64,
    /// Pages of shared memory looked at.
    pub shpages_scanned: u64,
    /// Pages of shared memory written.
    pub shpages_written: u64,
}

/// Times in microseconds, sizes in pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RestoreStats {
    /// Pages compared with the parent's.
    pub pages_compared: u64,
    /// Pages shared with the parent.
    pub pages_skipped_cow: u64,
    /// Creating the processes.
    pub forking_time: u64,
    /// The whole restore.
    pub restore_time: u64,
    /// Pages restored.
    pub pages_restored: u64,
}

impl Stats {
    /// Reads the content of `stats-dump` or `stats-restore`.
    pub fn decode(file: &[u8]) -> Result<Self> {
        decode(file).map_err(|why| Error::Image { file: "stats", why })
    }
}

fn decode(file: &[u8]) -> std::result::Result<Stats, String> {
    let entries = entries(file, CLASS_SERVICE, STATS)?;
    let [entry] = entries[..] else {
        return Err(format!("{} entries instead of one", entries.len()));
    };
    let mut stats = Stats::default();
    for field in fields(entry) {
        match field? {
            (1, Value::Bytes(message)) => stats.dump = Some(dump(message)?),
            (2, Value::Bytes(message)) => stats.restore = Some(restore(message)?),
            _ => {}
        }
    }
    Ok(stats)
}

fn dump(message: &[u8]) -> std::result::Result<DumpStats, String> {
    let mut stats = DumpStats::default();
    for field in fields(message) {
        let (number, Value::Varint(value)) = field? else { continue };
        match number {
            1 => stats.freezing_time = value,
            2 => stats.frozen_time = value,
            3 => stats.memdump_time = value,
            4 => stats.memwrite_time = value,
            5 => stats.pages_scanned = value,
            6 => stats.pages_skipped_parent = value,
            7 => stats.pages_written = value,
            9 => stats.pages_lazy = value,
            12 => stats.shpages_scanned = value,
            14 => stats.shpages_written = value,
            _ => {}
        }
    }
    Ok(stats)
}

fn restore(message: &[u8]) -> std::result::Result<RestoreStats, String> {
    let mut stats = RestoreStats::default();
    for field in fields(message) {
        let (number, Value::Varint(value)) = field? else { continue };
        match number {
            1 => stats.pages_compared = value,
            2 => stats.pages_skipped_cow = value,
            3 => stats.forking_time = value,
            4 => stats.restore_time = value,
            5 => stats.pages_restored = value,
            _ => {}
        }
    }
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(entry: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend(CLASS_SERVICE.to_le_bytes());
        file.extend(STATS.to_le_bytes());
        file.extend((entry.len() as u32).to_le_bytes());
        file.extend(entry);
        file
    }

    #[test]
    fn decodes_a_dump_and_a_restore() {
        let dump = [0x0a, 14, 0x08, 100, 0x10, 0xac, 0x02, 0x18, 3, 0x20, 4, 0x28, 5, 0x38, 7, 0x48];
        let stats = Stats::decode(&file(&[&dump[..], &[9]].concat())[..]);
        assert!(stats.is_err(), "the nested message is one byte longer than it says");
        let dump = [0x0a, 15, 0x08, 100, 0x10, 0xac, 0x02, 0x18, 3, 0x20, 4, 0x28, 5, 0x38, 7, 0x48, 9];
        let stats = Stats::decode(&file(&dump)).unwrap().dump.unwrap();
        assert_eq!((stats.freezing_time, stats.frozen_time, stats.pages_written), (100, 300, 7));
        assert_eq!((stats.memdump_time, stats.memwrite_time, stats.pages_lazy), (3, 4, 9));
        let restore = [0x12, 4, 0x18, 8, 0x20, 9];
        let stats = Stats::decode(&file(&restore)).unwrap().restore.unwrap();
        assert_eq!((stats.forking_time, stats.restore_time), (8, 9));
    }

    #[test]
    fn refuses_what_is_no_statistics_file() {
        assert!(Stats::decode(b"").is_err());
        assert!(Stats::decode(&[file(&[]), vec![0; 4]].concat()).is_err());
    }
}
