//! Images: references, manifests, unpacked layers, import, export, push, and their garbage collection.
//!
//! [`Images`] stands on the blob store, the layer store and the registry client. An image is recorded once all its blobs are
//! stored and verified and all its layers are unpacked; before that nothing of it is visible, and if it fails nothing of
//! it stays. Lists come from an immutable snapshot, so that no status question waits for a pull.
//!
//! It knows nothing of pods and containers: to it a container is the key of a root file system.
//!
//! ```text
//! pull ─┐                       ┌ blobs: content/
//! import├─ documents ─ assemble ┤                        ─ record: meta.redb, table "images"
//! add ──┘                       └ layers: snapshots/
//! ```

mod add;
mod archive;
mod assemble;
mod error;
mod gc;
mod image;
mod lease;
mod progress;
mod pull;
mod push;
mod resolve;
mod rootfs;
mod store;
mod unpack;
mod volume;

use std::path::PathBuf;
use std::sync::Arc;

use redb::Database;
use stasis_content::Content;
use stasis_registry::Registry;
use stasis_snapshot::Snapshots;

pub use add::{KnownLayer, NewLayer, check_new_reference};
pub use error::{Error, Kind, Result};
pub use image::{CHECKPOINT_ANNOTATIONS, Image};
pub use progress::Progress;
pub use stasis_registry::{Auth, Config as RegistryConfig, Reference};

use error::{content_error, io_error, snapshot_error};
use lease::{Leases, Locks};
use store::Store;

/// Layers of one image that are downloaded at once, unless configured otherwise; containerd's default too.
pub const CONCURRENT_DOWNLOADS: usize = 3;

/// Where images are kept and how they are had.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory that gets `content/` and `snapshots/`.
    pub root: PathBuf,
    /// Registries.
    pub registry: RegistryConfig,
    /// Layers of one image that are downloaded at once; 0 counts as 1.
    pub max_concurrent_downloads: usize,
    /// References of images that the kubelet's garbage collection must leave alone.
    pub pinned: Vec<String>,
}

/// The images of this node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    root: PathBuf,
    content: Content,
    snapshots: Snapshots,
    store: Arc<Store>,
    registry: Registry,
    max_concurrent_downloads: usize,
    leases: Leases,
    locks: Locks,
    pulls: pull::Pulls,
}

/// What images take on disk: blobs and unpacked layers. Writable layers are counted with their containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// The file system that holds them, by a path on it.
    pub path: PathBuf,
    /// Bytes used.
    pub bytes: u64,
    /// Inodes used.
    pub inodes: u64,
}

impl Images {
    /// Opens the images under a root directory, drops those that are not whole any more, and deletes what a crash left
    /// behind. Blocks: for the start of the program.
    pub fn open(config: Config, db: Arc<Database>) -> Result<Images> {
        let root = config.root.display();
        let content = Content::open(&config.root).map_err(content_error(format!("open the blob store in {root}")))?;
        let snapshots =
            Snapshots::open(&config.root).map_err(snapshot_error(format!("open the layer store in {root}")))?;
        let mut pinned = Vec::new();
        for name in &config.pinned {
            pinned.push(name.parse::<Reference>()?.to_string());
        }
        let store = Store::open(db, pinned, &content, |chain_id| snapshots.has_layer(chain_id))?;
        let inner = Arc::new(Inner {
            root: config.root,
            content,
            snapshots,
            store: Arc::new(store),
            registry: Registry::new(config.registry),
            max_concurrent_downloads: config.max_concurrent_downloads.max(1),
            leases: Leases::default(),
            locks: Locks::default(),
            pulls: pull::Pulls::default(),
        });
        // Not on an async thread, where waiting for the gate would be refused.
        let collector = inner.clone();
        std::thread::spawn(move || gc::collect(&collector)).join().map_err(|_| Error::Invalid {
            reason: "the collection of unused blobs and layers ended abnormally".to_owned(),
        })??;
        Ok(Images { inner })
    }

    /// All images, as of now.
    pub fn list(&self) -> Arc<Vec<Arc<Image>>> {
        self.inner.store.list()
    }

    /// Removes an image wholly, whatever name or ID it is called by (as containerd's CRI does), and frees what no other image
    /// and no root file system needs. An image that is not there is no error.
    pub async fn remove(&self, name_or_id: &str) -> Result<()> {
        if let Some(image) = self.resolve(name_or_id) {
            self.inner.store.delete(&image.id).await?;
        }
        let inner = self.inner.clone();
        blocking(move || gc::collect(&inner)).await
    }

    /// An image's configuration as it came, for display. Its labels are nobody's instructions.
    pub async fn config_json(&self, image: &Image) -> Result<Vec<u8>> {
        let (inner, id) = (self.inner.clone(), image.id.clone());
        blocking(move || inner.read_document(&id, image::CONFIG_BYTES_MAX)).await
    }

    /// What images take on disk, from the records: nothing is walked.
    pub async fn fs_info(&self) -> Result<FsInfo> {
        let (mut blobs, mut layers) = (std::collections::HashMap::new(), std::collections::HashMap::new());
        let list = self.list();
        for image in list.iter() {
            blobs.extend(image.record.blobs().map(|blob| (blob.digest.as_str(), blob.size)));
            layers
                .extend(image.record.layers.iter().map(|layer| (layer.chain_id.as_str(), (layer.bytes, layer.inodes))));
        }
        Ok(FsInfo {
            path: self.inner.root.clone(),
            inodes: sum(layers.values().map(|(_, inodes)| *inodes).chain([blobs.len() as u64])),
            bytes: sum(blobs.into_values().chain(layers.into_values().map(|(bytes, _)| bytes))),
        })
    }
}

/// Sizes are claims until a layer is unpacked.
fn sum(sizes: impl Iterator<Item = u64>) -> u64 {
    sizes.fold(0, u64::saturating_add)
}

impl Inner {
    /// Reads a small blob whole.
    fn read_document(&self, digest: &str, limit: u64) -> Result<Vec<u8>> {
        let parsed = image::digest(digest)?;
        self.content.read(&parsed, limit).map_err(content_error(format!("read blob {digest}")))
    }

    /// Stores a small blob whose digest is known to be right, unless it is there.
    fn write_document(&self, digest: &str, bytes: &[u8]) -> Result<()> {
        use std::io::Write as _;
        let doing = || format!("store blob {digest}");
        let parsed = image::digest(digest)?;
        if self.content.has(&parsed) {
            return Ok(());
        }
        let mut writer = self.content.writer().map_err(content_error(doing()))?;
        writer.write_all(bytes).map_err(io_error(doing()))?;
        writer.commit(Some(&parsed), Some(bytes.len() as u64)).map_err(content_error(doing()))?;
        Ok(())
    }
}

/// Runs blocking work off the async threads. It runs to its end even if nobody waits any more.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Invalid { reason: "the program is shutting down".to_owned() }),
        },
    }
}
