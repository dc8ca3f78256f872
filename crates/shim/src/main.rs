//! The shim of one pod: containerd's Task and Sandbox services over its processes.

fn main() {}
