//! Verifies a checkpoint against what a request grants, before anything of it runs.
//!
//! An archive is a claim of whoever made it, and CRIU acts on the images in it as root. Two parties share the work:
//!
//! * [`run`] is called by the privileged side. It starts this crate's helper, gives it the opened archive, or the small
//!   files of an unpacked one, and the [`Grant`] of the live request, and gets back a [`Plan`] or a [`Refusal`].
//! * [`helper::main`] is that helper: an own user without privileges, no new ones, system calls for reading, writing and
//!   memory alone, limits of memory and time. It parses all that is hostile: the tar, JSON, CRIU's images, tar archives
//!   of file systems in memory.
//!
//! [`check`] holds the checks by themselves. Their numbers are those of the design; what others do before or behind them
//! (opening the archive, space, the base image, the log, the writable layer, reading back what was restored) is with
//! those who do it. Nothing here knows gRPC, pods or stores.

pub mod check;
mod error;
mod feed;
mod grant;
pub mod helper;
mod members;
mod plan;
mod run;
mod tarball;

pub use error::{Check, Error, Reason, Refusal, Result};
pub use grant::{CgroupHandling, Device, Grant, GrantedMount, GrantedUser, Host};
pub use members::{Contents, Members};
pub use plan::{Verdict, plan};
pub use run::{Helper, Source, run};
pub use stasis_shim_api::plan::Plan;
