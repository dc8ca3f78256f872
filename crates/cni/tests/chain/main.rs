//! Chains of plugins in real namespaces: of shell, where they must misbehave, and the real ones. Needs root.

// A test's panic is its message.
#![allow(clippy::unwrap_used)]

mod bridge;
mod node;
mod plugins;
