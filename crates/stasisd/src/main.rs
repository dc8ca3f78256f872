//! The daemon: configuration, start-up, signals.

fn main() {}
