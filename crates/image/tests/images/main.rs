//! Images against a real registry, real layers and a real overlayfs. Needs root and `STASIS_ENGINES`, the directory whose
//! `bin` holds `docker-registry`.

// A test that meets the unexpected fails by it.
#![allow(clippy::unwrap_used)]

mod archives;
mod build;
mod credentials;
mod failures;
mod fixtures;
mod http;
mod lifecycle;
mod pulls;
