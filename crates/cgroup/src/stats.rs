//! What a cgroup has used: processor time, memory, processes, block I/O, pressure. Read once each, summed over nothing.
//!
//! One pass over a cgroup opens its directory in each hierarchy that counts and reads files relative to that descriptor,
//! into one buffer. No process is started, nothing is remembered between passes. A file that the kernel does not have
//! (no swap accounting, no pressure information, version 1) makes its value absent, never zero.
//!
//! Units: bytes, nanoseconds, percent. Which number of the kernel's stands for "working set" is decided here, as the
//! kubelet and cAdvisor define it.

mod files;
mod v1;
mod v2;

use crate::Mode;
use crate::cgroup::Cgroup;
use crate::error::Result;

/// How much of a cgroup's accounts is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What lists of many containers need: processor time, memory, swap, pressure.
    Usage,
    /// Everything.
    Full,
}

/// The accounts of one cgroup and all below it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Processor time; absent without its controller.
    pub cpu: Option<Cpu>,
    /// Memory; absent without its controller.
    pub memory: Option<Memory>,
    /// Processes and threads; [`Detail::Full`] only.
    pub pids: Option<Pids>,
    /// Block devices; [`Detail::Full`] only.
    pub devices: Vec<Device>,
    /// Huge pages, one entry for each size; [`Detail::Full`] only.
    pub huge_pages: Vec<HugePages>,
    /// Time lost waiting for block I/O; version 2 only.
    pub io_pressure: Option<Pressure>,
}

/// Processor time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cpu {
    /// Used, in nanoseconds over all processors.
    pub usage: u64,
    /// Of it outside of the kernel.
    pub user: Option<u64>,
    /// Of it inside.
    pub system: Option<u64>,
    /// What a quota did.
    pub throttling: Option<Throttling>,
    /// Time lost waiting for a processor; version 2 only.
    pub pressure: Option<Pressure>,
}

/// What a processor quota did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Throttling {
    /// Periods that have passed.
    pub periods: u64,
    /// Periods whose quota was used up.
    pub throttled_periods: u64,
    /// Nanoseconds spent waiting for the next period.
    pub throttled: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// In use, page cache included.
    pub usage: u64,
    /// The most that ever was in use.
    pub max_usage: Option<u64>,
    /// Limit of this cgroup itself.
    pub limit: Option<u64>,
    /// Anonymous memory.
    pub anonymous: u64,
    /// Page cache.
    pub cache: u64,
    /// Of it mapped into processes.
    pub mapped: u64,
    /// Page cache that was used lately.
    pub active_file: u64,
    /// Page cache that the kernel would take back first.
    pub inactive_file: u64,
    /// The kernel's own memory on behalf of the processes.
    pub kernel: Option<u64>,
    /// Page faults.
    pub page_faults: u64,
    /// Of them those that waited for a disk.
    pub major_page_faults: u64,
    /// Swap in use; absent without swap accounting.
    pub swap: Option<u64>,
    /// Limit of swap alone.
    pub swap_limit: Option<u64>,
    /// How often the limit was met.
    pub limit_hits: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: Option<u64>,
    /// Time lost waiting for memory; version 2 only.
    pub pressure: Option<Pressure>,
}

impl Memory {
    /// What could not be taken back without hurting the workload: the usage without the inactive page cache.
    pub fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }

    /// What the limit leaves beside the working set; absent without a limit.
    pub fn available(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.working_set()))
    }
}

/// Processes and threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pids {
    /// There are so many.
    pub current: u64,
    /// There may be so many.
    pub limit: Option<u64>,
}

/// What was read from and written to one block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Device {
    /// Number of the driver.
    pub major: u32,
    /// Number of the device there.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Read operations.
    pub reads: u64,
    /// Write operations.
    pub writes: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugePages {
    /// The size as the kernel's file names have it: `2MB`.
    pub size: String,
    /// In use.
    pub usage: u64,
    /// The most that ever was in use; version 1 only.
    pub max_usage: Option<u64>,
    /// How often the limit was met.
    pub limit_hits: Option<u64>,
}

/// Time that was lost waiting for a resource (`Documentation/accounting/psi.rst` of the kernel).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// While at least one process waited.
    pub some: Stall,
    /// While all waited.
    pub full: Stall,
}

/// One line of pressure information.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stall {
    /// Nanoseconds in all.
    pub total: u64,
    /// Percent of the last ten seconds.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last five minutes.
    pub avg300: f64,
}

impl Cgroup {
    /// Reads the accounts. Blocks for as long as the kernel takes to sum up its counters.
    ///
    /// # Errors
    /// Where the cgroup is not there ([`Error::is_not_found`](crate::Error::is_not_found)), or the kernel's files make no
    /// sense.
    pub fn stats(&self, detail: Detail) -> Result<Stats> {
        match self.mode() {
            Mode::V2 => v2::stats(self, detail),
            Mode::V1 => v1::stats(self, detail),
        }
    }
}

#[cfg(test)]
mod tests;
