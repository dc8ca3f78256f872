//! End-to-end tests of the daemon: a table of contents.

mod checkpoint;
mod daemon_dies;
mod hostile;
mod life;
mod refusals;
mod security;
mod shim_dies;
