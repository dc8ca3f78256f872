//! The Container Device Interface: files in which vendors say what a container needs to use their devices.
//!
//! [`Registry`] finds the devices that are named, in directories that belong to root, and gives what to change in the
//! container: [`Edits`]. Files are read when they are needed, and again when they changed. One that is wrong takes away
//! its own devices alone, and says why when one of them is asked for.
//!
//! It knows neither containers nor the OCI runtime's configuration. Source: CDI specification, `SPEC.md`, versions 0.3.0
//! to 1.0.0; of these `intelRdt` is refused.

mod error;
mod registry;
mod spec;
mod validate;
mod yaml;

pub use error::{Error, Result};
pub use registry::{Overview, Registry};
pub use spec::{DeviceNode, Edits, Hook, Mount};
