//! What images may cost before anything in them is believed.

/// One entry. The largest of real dumps is the list of memory mappings: about 60 bytes each, and the kernel's default
/// allows 65530 a process; data that follows an entry is not counted.
pub const ENTRY_MAX: u32 = 16 << 20;
/// Messages within one entry. Each is at most about 100 bytes in memory; four times the kernel's default number of
/// mappings.
pub const MESSAGES_MAX: usize = 270_000;
/// Depth of messages in messages: CRIU's own is 5, and directories of cgroups nest.
pub const DEPTH_MAX: usize = 64;
/// What a set of images may keep in memory, in bytes: 4 GiB of memory whose every other page is dumped need 20 MiB.
pub const SET_MAX: usize = 36 << 20;
/// Instructions of one seccomp filter, as the kernel limits them (`BPF_MAXINSNS`).
pub const FILTER_INSTRUCTIONS_MAX: usize = 4096;
