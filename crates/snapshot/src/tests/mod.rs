//! Tests on real file systems and mounts; they need root.

mod archive;
mod hostile;
mod round_trip;
mod scene;
mod store;
