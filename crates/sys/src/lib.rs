//! The only crate with unsafe code: mounts, namespaces, processes, descriptors, and paths resolved under a root.
