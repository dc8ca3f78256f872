//! How much a layer may ask for.

/// The longest name of an entry or a link's target, in bytes: the kernel's `PATH_MAX`, less its terminating zero.
pub(crate) const PATH_BYTES_MAX: usize = 4095;

/// The largest extended header of one entry. A PAX header holds names and extended attributes, which together are far
/// smaller in every archive that has been made in earnest; Go's reader allows the same.
pub(crate) const EXTENDED_HEADER_BYTES_MAX: u64 = 1 << 20;

/// The most extended attributes of one entry, and the largest value, which is what ext4 and XFS can hold.
pub(crate) const XATTRS_MAX: usize = 256;
pub(crate) const XATTR_BYTES_MAX: usize = 64 << 10;

/// The sum of the names of all entries: what the applier remembers of them (times of directories) must fit into memory.
pub(crate) const NAME_BYTES_MAX: u64 = 512 << 20;

/// A stream may unpack to so many times its size: what gzip can do at best, as with a preallocated file that is all zero.
/// Real layers stay below 50; zstd could do thousands.
pub(crate) const RATIO_MAX: u64 = 1032;

/// Unpacked bytes that are allowed at any ratio.
pub(crate) const RATIO_FREE_BYTES: u64 = 256 << 20;

/// The largest window that zstd may ask for, as a power of two: 128 MiB, its own default. Bounds the memory of unpacking.
pub(crate) const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How much a layer, or the writable layer in a checkpoint, may hold in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries: files, directories, links, whiteouts.
    pub entries: u64,
    /// Bytes of the uncompressed archive.
    pub bytes: u64,
}

impl Limits {
    /// For the layers of images: a few times the largest known ones.
    pub const LAYER: Limits = Limits { entries: 4 << 20, bytes: 1 << 40 };
}
