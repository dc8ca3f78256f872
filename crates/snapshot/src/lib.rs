//! Overlayfs snapshots; applying OCI layers to them and cutting layers from them.
//!
//! ```text
//! <root>/snapshots/            0700
//!   layers/<64 hex>/           a layer, named by its chain ID; read-only, shared
//!     fs/                      its files, as overlayfs wants a lower directory: whiteouts are devices 0/0
//!     usage                    "<bytes> <inodes>\n"
//!   active/<key>/              a writable snapshot, one a container
//!     fs/ work/                upper and work directory
//!     layers                   the chain IDs below, lowest first, one a line
//!   tmp/<random>/              what is being made or removed; emptied when the store is opened
//! ```
//!
//! Layers and snapshots appear and vanish by one rename; so after a crash at any moment each is there as a whole or not
//! at all. A layer is flushed with one `syncfs(2)` before its rename: a layer that is there is complete even after the
//! power failed. Writable snapshots are not flushed, since their containers do not outlive the power; who finds one after
//! a reboot removes it. It knows nothing of images: which layers belong together, and which are needed no more, others say.

mod apply;
mod decompress;
mod delete;
mod diff;
mod error;
mod limits;
mod overlay;
mod store;
mod tar_reader;
mod tar_writer;
mod tree;

pub use decompress::decompress;
pub use delete::delete_paths;
pub use diff::{DiffStats, write_diff, write_diff_filtered, write_tree};
pub use error::{Error, Result};
pub use limits::Limits;
pub use store::Snapshots;
pub use tree::{Usage, apparent_bytes};

/// What an unpacked layer takes on disk.
pub type LayerStats = Usage;

use error::Doing as _;
use stasis_sys::path::Root;
use std::io::Read;
use std::path::Path;

/// Applies a layer, such as the writable layer in a checkpoint, to the upper directory `dir` of an overlay that is not
/// mounted. It is a tar archive, plain or in gzip or zstd; whiteouts in it become overlayfs's own.
///
/// A directory that the layer needs and neither mentions nor finds in `dir` is made with mode 0755, which hides the owner
/// and mode that it has in the layers below; [`Snapshots::apply_diff`] knows those and is to be preferred.
pub fn apply_diff(dir: &Path, tar: impl Read, limits: Limits) -> Result<()> {
    let root = Root::open(dir).doing("opening", dir)?;
    apply::apply(&root, decompress::decompress(tar)?, apply::Whiteouts::Written, limits)
}

#[cfg(test)]
mod tests;
