//! Why a device cannot be had, in words for whoever asked for it.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a device cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The name is no name of a CDI device.
    #[error("{name:?} is not the name of a CDI device: vendor.example/class=device")]
    Name {
        /// As it was asked for.
        name: String,
    },
    /// No file has the device.
    #[error("no CDI device {name}: no specification in {dirs:?} has it{}", in_words(.unusable))]
    NotFound {
        /// As it was asked for.
        name: String,
        /// Where specifications are looked for.
        dirs: Vec<PathBuf>,
        /// Files that cannot be used, and why; the device may be in one of them.
        unusable: Vec<String>,
    },
    /// Two files of one directory have it.
    #[error("CDI device {name} is in both {} and {}: remove it from one of them", .one.display(), .other.display())]
    Conflict {
        /// The device.
        name: String,
        /// One file.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
}

fn in_words(files: &[String]) -> String {
    if files.is_empty() { String::new() } else { format!("; files that cannot be used: {}", files.join("; ")) }
}
