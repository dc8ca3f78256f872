//! CRIU's image files, of CRIU 4.2.1 and what went before it: strictly decoded, cross-checked, told as JSON.
//!
//! ```text
//! u32 magic of the class   0x54564319 images, 0x55105940 service files (statistics); inventory.img begins at the next
//! u32 magic of the type    one for each of `Kind`
//! { u32 length, protobuf message, data that follows some messages } …      little endian throughout
//! ```
//!
//! * [`ImageReader`] goes through one file of any type, an entry at a time.
//! * [`write_json`] tells a file as `crit decode` does, byte for byte.
//! * [`ImageSet`] takes all files of a dump and checks that they fit together: the process tree, cores, memory maps,
//!   page maps and the length of the pages, descriptors, files, mounts, sockets, credentials.
//!
//! Images are a claim of whoever made them. Every reader here ends in an answer or an [`Error`], never in a panic, in
//! time linear in the input, with at most [`limits::ENTRY_MAX`] bytes and [`limits::MESSAGES_MAX`] messages for an entry at
//! once and, for a whole set, [`limits::SET_MAX`] bytes that stay. It is strict where CRIU is lenient: what CRIU would pass over (fields it does not know, a field
//! that comes twice, numbers written too long) is refused, so that nothing means one thing here and another to CRIU.
//!
//! What a restore may and may not do is not known here, and no file is opened.

mod error;
mod image;
mod json;
mod kind;
pub mod limits;
mod pretty;
mod schema;
mod set;
mod wire;

/// CRIU's messages, generated from its protos.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}

pub use error::{Error, Fault, Result};
pub use image::{Entry, Extra, ImageReader};
pub use json::{Style, write_json};
pub use kind::{FileKind, Kind};
pub use set::{Credentials, File, Ghost, ImageSet, Mapping, Namespaces, PAGE_SIZE, Process, SetBuilder, Task, Thread};
