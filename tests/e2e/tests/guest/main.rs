//! Tests that need a host with control groups of version 2 alone, AppArmor, systemd and all capabilities: `cargo xtask
//! vm` runs them in a virtual machine. Elsewhere they are ignored, and say so when they are run all the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod host;

