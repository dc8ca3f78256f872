//! Memory that is really there: anonymous, in huge pages where the system allows it, backed before it is used.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// A transparent huge page; [`Populated`] begins and ends at multiples of it.
pub const HUGE_PAGE: usize = 2 << 20;

/// So much is populated at once.
const STEP: usize = 32 << 20;

/// How long a step in huge pages may take: 1.3 s a GiB, about what small pages take. Usual are 4 to 15 ms.
const STEP_TIME: Duration = Duration::from_millis(40);

/// A range of memory, zeroed and populated, aligned to [`HUGE_PAGE`]. Filling it never faults.
#[derive(Debug)]
pub struct Populated {
    start: NonNull<u8>,
    length: usize,
    mapping: NonNull<u8>,
    mapping_length: usize,
}

// SAFETY: the memory belongs to this value alone, like that of a boxed slice.
unsafe impl Send for Populated {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Populated {}

impl Populated {
    /// Maps at least `length` bytes and backs them with memory. The caller has looked how much is free: a system that
    /// promises more than it has ends processes instead of answering with an error.
    ///
    /// # Errors
    /// If the system will not promise that much, among others; nothing stays mapped then.
    pub fn new(length: usize) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let length = length.max(1).checked_next_multiple_of(HUGE_PAGE).ok_or_else(too_large)?;
        let mapping_length = length.checked_add(HUGE_PAGE).ok_or_else(too_large)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory of ours.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), mapping_length, access, MapFlags::PRIVATE)? };
        let mapping = NonNull::new(mapping.cast::<u8>()).ok_or_else(too_large)?;
        let skip = mapping.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: `skip` is at most HUGE_PAGE, which is how much longer the mapping is than `length`.
        let start = unsafe { mapping.add(skip) };
        let memory = Self { start, length, mapping, mapping_length };
        memory.populate()?;
        Ok(memory)
    }

    /// Huge pages first. Where a hypervisor takes free memory back, it does so in blocks of their size and brings them
    /// back slowly (8 s a GiB were seen); small pages come out of blocks in part use, which are still there (1.5 s).
    fn populate(&self) -> io::Result<()> {
        // Without huge pages it only is slower.
        let _ = self.advise(0, self.length, Advice::LinuxHugepage);
        let mut at = 0;
        let mut is_slow = false;
        while at < self.length {
            let length = STEP.min(self.length - at);
            let started = Instant::now();
            self.advise(at, length, Advice::LinuxPopulateWrite)?;
            at += length;
            if !is_slow && started.elapsed() > STEP_TIME {
                is_slow = true;
                let _ = self.advise(at, self.length - at, Advice::LinuxNoHugepage);
            }
        }
        Ok(())
    }

    fn advise(&self, at: usize, length: usize, advice: Advice) -> io::Result<()> {
        debug_assert!(at + length <= self.length);
        // SAFETY: the range is part of a mapping of our own, which loses no data by the kinds of advice given here.
        Ok(unsafe { madvise(self.start.as_ptr().add(at).cast(), length, advice) }?)
    }
}

impl Deref for Populated {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` bytes from `start` lie in the mapping, which is readable, initialised (zeros) and ours.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Populated {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Populated {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and no reference into it outlives this value.
        let unmapped = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapping_length) };
        debug_assert!(unmapped.is_ok(), "an existing mapping can be unmapped");
    }
}

/// Memory that programs can still get without swapping, in bytes (`MemAvailable` of proc(5)); 0 where the kernel does not
/// say.
pub fn available() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes: Option<u64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zeroed_aligned_writable_and_long_enough() {
        let mut memory = Populated::new(3 << 20).unwrap();
        assert!(memory.len() >= 3 << 20);
        assert_eq!(memory.as_ptr().align_offset(HUGE_PAGE), 0);
        assert!(memory.iter().all(|byte| *byte == 0));
        memory.fill(7);
        assert!(memory.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn free_memory_is_seen() {
        assert!(available() > 0);
    }

    #[test]
    fn too_much_is_an_error() {
        assert!(Populated::new(usize::MAX).is_err());
        // More than any machine's memory: refused before a page of it is touched.
        assert!(Populated::new(1 << 56).is_err());
    }
}
