//! Garbage collection: deletes blobs and layers that no image, no root file system and no operation in progress needs.

use std::collections::HashSet;
use std::sync::Arc;

use crate::Inner;
use crate::error::{Result, content_error, snapshot_error};

/// Deletes what nobody needs. Blocks; not for async threads.
pub(crate) fn collect(inner: &Inner) -> Result<()> {
    let _gate = inner.leases.gate.blocking_lock();
    let Some(mut needed) = inner.leases.names() else {
        // The operation that holds everything collects when it ends.
        return Ok(());
    };
    for image in inner.store.list().iter() {
        needed.extend(image.record.blobs().map(|blob| blob.digest.clone()));
        needed.extend(image.chain_ids.iter().cloned());
    }
    for (_, layers) in inner.snapshots.active().map_err(snapshot_error("list the root file systems"))? {
        needed.extend(layers);
    }
    delete_layers(inner, &needed)?;
    delete_blobs(inner, &needed)
}

fn delete_layers(inner: &Inner, needed: &HashSet<String>) -> Result<()> {
    for chain_id in inner.snapshots.layers().map_err(snapshot_error("list the unpacked layers"))? {
        if !needed.contains(&chain_id) {
            tracing::debug!(layer = chain_id, "deleting an unused layer");
            inner.snapshots.remove_layer(&chain_id).map_err(snapshot_error(format!("delete layer {chain_id}")))?;
        }
    }
    Ok(())
}

fn delete_blobs(inner: &Inner, needed: &HashSet<String>) -> Result<()> {
    for digest in inner.content.list().map_err(content_error("list the blobs"))? {
        if !needed.contains(&digest.to_string()) {
            tracing::debug!(blob = %digest, "deleting an unused blob");
            inner.content.delete(&digest).map_err(content_error(format!("delete blob {digest}")))?;
        }
    }
    Ok(())
}

/// Collects in the background, from wherever this is called.
pub(crate) fn collect_later(inner: Arc<Inner>) {
    let work = move || {
        if let Err(error) = collect(&inner) {
            tracing::warn!(%error, "garbage collection of images failed; it is tried again after the next removal");
        }
    };
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(work)),
        Err(_) => drop(std::thread::spawn(work)),
    }
}
