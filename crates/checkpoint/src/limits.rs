//! What an archive may cost before anything in it is believed.

/// Entries of an archive. A process takes 7 image files, and the kernel's default allows 32768 processes on a host.
pub const ENTRIES_MAX: u64 = 300_000;
/// Length of a member's name. CRIU's are under 40 bytes; the longest accepted are volume names (255).
pub const NAME_MAX: usize = 300;
/// An extended header (PAX) or a long name. Writers put a path, a size and times into it.
pub const EXTENDED_HEADER_MAX: u64 = 64 * 1024;
/// A JSON member. An OCI spec is 10-100 KiB; etcd allows 1.5 MiB for the objects that it grows from. Parsed, a hostile one
/// takes a dozen times its size.
pub const JSON_MAX: u64 = 4 << 20;
/// `deleted.files`: a path for every deleted file of the image. Parsed, a hostile one takes eight times its size.
pub const DELETED_FILES_MAX: u64 = 8 << 20;
/// Extended headers before one entry. Writers put one or two there.
pub const EXTENDED_HEADERS_MAX: usize = 16;
/// A container's log or CRIU's. The kubelet rotates at 10 MiB by default.
pub const LOG_MAX: u64 = 4 << 30;
/// Most of a container's log that is archived and carried over by a restore: the end of a longer one.
pub const LOG_CARRIED_MAX: u64 = 256 << 20;
/// One file, such as memory or a writable layer.
pub const FILE_MAX: u64 = 1 << 40;
/// The whole archive, uncompressed.
pub const TOTAL_MAX: u64 = 2 << 40;
/// Bytes that one compressed byte may become. Memory of text is about 4; gzip ends at 1032.
pub const RATIO_MAX: u64 = 1000;
/// What may come out before the ratio counts: small archives of zeros are no danger.
pub const RATIO_FREE: u64 = 64 << 20;
/// Window of a zstd stream as a power of two: 128 MiB, what `zstd --long` uses at most.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Bytes that must stay free on a file system when an archive is unpacked or written: room for the node to go on.
pub const SPACE_RESERVE: u64 = 128 << 20;
/// A small image that is decoded (`pstree.img`): 1 KiB a process would be plenty.
pub const DECODED_IMAGE_MAX: u64 = 64 << 20;
