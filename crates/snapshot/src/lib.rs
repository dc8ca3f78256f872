//! Overlayfs snapshots; applying OCI layers to them and cutting layers from them.
