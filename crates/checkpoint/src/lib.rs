//! The checkpoint archive: written in one pass and one form, read in three dialects, inspected, and turned into an OCI
//! image.
//!
//! The archive is one tar of regular files and directories:
//!
//! ```text
//! config.dump  spec.dump  status.dump  status          who the container was (JSON)
//! bind.mounts  deleted.files                           for other readers
//! rootfs-diff.tar                                      the writable layer
//! container.log                                        the log so far
//! checkpoint/…img  checkpoint/descriptors.json         CRIU's images, small ones first
//! stats-dump  dump.log                                 how the dump went
//! checkpoint/pages-N.img                               memory, last
//! ```
//!
//! What is read may come from a hostile party: [`reader`] refuses everything that is not expected, by name, type and
//! size, and nothing in an archive is obeyed by this crate. This crate knows no gRPC, no daemon and no runtime.

mod describe;
mod direct;
mod error;
mod extract;
mod image;
mod inspect;
mod json;
pub mod limits;
mod member;
mod metadata;
mod output;
pub mod reader;
mod restore;
mod schema;
mod tar;
mod writer;

pub use describe::{ContainerDescription, ImageDescription, MountDescription, PodDescription, Profile};
pub use direct::DirectWriter;
pub use error::{Error, Result};
pub use extract::{Extracted, extract};
pub use image::{CheckpointMark, Digests, EngineFacts, ImageParts, image_from_archive, marker};
pub use inspect::{Inspection, MemberSize, MountFacts, inspect, inspect_dir};
pub use json::parse as parse_json;
pub use member::{Dialect, Member};
pub use metadata::{ArchiveMetadata, read_metadata};
pub use output::{Codec, Form, Written};
pub use restore::RestoreSource;
pub use schema::{BindMount, ConfigDump, ContainerStatus, InternalStatus};
pub use writer::{ArchiveWriter, Sealed, is_partial};
