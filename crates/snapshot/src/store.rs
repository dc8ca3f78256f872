//! The store of layers and writable snapshots. The layout on disk is drawn in the crate's own documentation.

use crate::apply::{self, Whiteouts};
use crate::decompress::decompress;
use crate::delete::delete;
use crate::error::{Doing, Error, Result};
use crate::limits::Limits;
use crate::tree::{self, Usage};
use crate::{LayerStats, overlay};
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with, syncfs};
use rustix::io::Errno;
use stasis_sys::file::{random_id, sync_dir};
use stasis_sys::mount::{Mount, open_detached};
use stasis_sys::path::{Root, read_limited};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

/// The cap on our own small files: 500 chain IDs, the most layers that overlayfs takes, are 36 kB.
const SMALL_FILE_BYTES_MAX: u64 = 1 << 20;

/// The store below one root directory. Cloning is cheap and gives the same store.
#[derive(Debug, Clone)]
pub struct Snapshots {
    layers: PathBuf,
    active: PathBuf,
    temporary: PathBuf,
}

impl Snapshots {
    /// Opens the store in `<root>/snapshots`, making its directories (0700) if needed, and removes what an earlier process
    /// left half made or half removed. Only one process may have a store open.
    pub fn open(root: &Path) -> Result<Snapshots> {
        if root.to_str().is_none_or(|path| path.contains([',', ':', '\\'])) {
            return Err(Error::InvalidRoot { path: root.to_path_buf() });
        }
        let dir = root.join("snapshots");
        let store = Snapshots { layers: dir.join("layers"), active: dir.join("active"), temporary: dir.join("tmp") };
        for dir in [&store.layers, &store.active, &store.temporary] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).doing("making", dir)?;
        }
        for name in names(&store.temporary)? {
            remove_tree(&store.temporary.join(name))?;
        }
        Ok(store)
    }

    /// Whether the layer is unpacked here. A chain ID that is none is not.
    pub fn has_layer(&self, chain_id: &str) -> bool {
        self.layer(chain_id).is_ok_and(|dir| dir.is_dir())
    }

    /// Unpacks a layer, a tar archive that is plain or in gzip or zstd, onto its parents (lowest first), and says what it
    /// takes. One that is there already is not read. The archive is read to its very end, and becomes a layer only after
    /// its reader has given that without an error: there the caller compares its digest.
    pub fn apply_layer(&self, chain_id: &str, layer: impl Read, parents: &[String]) -> Result<LayerStats> {
        let target = self.layer(chain_id)?;
        if target.is_dir() {
            return read_usage(&target);
        }
        let parents = self.view_paths(parents)?;
        let temporary = Temporary::new(&self.temporary)?;
        self.unpack(&temporary, &parents, layer)?;
        let stats = tree::usage(&temporary.fs())?;
        let text = format!("{} {}\n", stats.bytes, stats.inodes);
        let file = temporary.0.join("usage");
        fs::write(&file, text).doing("writing", &file)?;
        temporary.flush()?;
        // Another one may have unpacked the same layer meanwhile; then this is as good as that.
        temporary.publish(&target)?;
        sync_dir(&self.layers).doing("flushing", &self.layers)?;
        Ok(stats)
    }

    /// Makes the writable snapshot `key` on layers (lowest first), if it is not there already, and says how to mount it.
    pub fn prepare(&self, key: &str, layers: &[String]) -> Result<Vec<Mount>> {
        let target = self.snapshot(key)?;
        let lowers = self.view_paths(layers)?;
        if !target.is_dir() {
            let temporary = Temporary::new(&self.temporary)?;
            make_upper(&temporary.fs(), &lowers)?;
            make_dir(&temporary.work(), 0o711)?;
            let file = temporary.0.join("layers");
            let text: String = layers.iter().map(|layer| format!("{layer}\n")).collect();
            fs::write(&file, text).doing("writing", &file)?;
            // Nothing is flushed: it is on the way of each start, and no container outlives the power.
            temporary.publish(&target)?;
        }
        if self.layers_below(key)? != layers {
            return Err(Error::KeyTaken { key: key.to_owned() });
        }
        self.mounts(key)
    }

    /// How to mount the snapshot `key`: one overlay, or a bind mount of its directory if it stands on no layer.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let lowers = self.view_paths(&self.layers_below(key)?)?;
        let (upper, work) = (self.upper_dir(key), self.snapshot(key)?.join("work"));
        if lowers.is_empty() {
            let options = vec!["rbind".to_owned(), "rw".to_owned()];
            let source = upper.to_string_lossy().into_owned();
            return Ok(vec![Mount { fs_type: "bind".to_owned(), source, options }]);
        }
        Ok(vec![overlay::mount(&borrowed(&lowers), Some((&upper, &work)))])
    }

    /// How to mount the layers of the snapshot `key` read-only, as they are without its changes. Its own directory, in
    /// which nothing was written, is the topmost: overlayfs wants two at least, and a lone layer would show its whiteouts.
    pub fn read_only_mount(&self, key: &str) -> Result<Mount> {
        let mut lowers = vec![self.upper_dir(key)];
        lowers.extend(self.view_paths(&self.layers_below(key)?)?);
        if let [only] = &lowers[..] {
            let options = vec!["bind".to_owned(), "ro".to_owned()];
            return Ok(Mount { fs_type: "bind".to_owned(), source: only.to_string_lossy().into_owned(), options });
        }
        Ok(overlay::mount(&borrowed(&lowers), None))
    }

    /// The directories of layers that are given lowest first, topmost first, as `lowerdir=` takes them.
    pub fn view_paths(&self, layers: &[String]) -> Result<Vec<PathBuf>> {
        let path = |chain_id: &String| {
            let dir = self.layer(chain_id)?.join("fs");
            if dir.is_dir() { Ok(dir) } else { Err(Error::NoLayer { chain_id: chain_id.clone() }) }
        };
        layers.iter().rev().map(path).collect()
    }

    /// The merged files of layers (lowest first, at least one) for reading, such as `/etc/passwd` of an image, by a mount
    /// that nobody else sees and that ends with the value.
    pub fn open_view(&self, layers: &[String]) -> Result<Root> {
        let lowers = self.view_paths(layers)?;
        match &lowers[..] {
            [only] => Root::open(only).doing("opening", only),
            _ => open_overlay(&overlay::mount(&borrowed(&lowers), None), &self.layers),
        }
    }

    /// Applies a layer, such as the writable layer in a checkpoint, to the snapshot `key`, which must not be mounted.
    /// Directories that the layer does not mention keep the owner and mode that they have below.
    pub fn apply_diff(&self, key: &str, tar: impl Read, limits: Limits) -> Result<()> {
        let (root, whiteouts) = self.open_snapshot(key)?;
        apply::apply(&root, decompress(tar)?, whiteouts, limits)
    }

    /// Deletes paths from the snapshot `key`, which must not be mounted, as [`crate::delete_paths`] does.
    pub fn delete_paths(&self, key: &str, paths: &[String]) -> Result<()> {
        delete(&self.open_snapshot(key)?.0, paths)
    }

    /// The upper directory of a snapshot: what its container has changed. For a key that is none, a path that is absent.
    pub fn upper_dir(&self, key: &str) -> PathBuf {
        self.snapshot(key).unwrap_or_else(|_| self.temporary.join("no-such-snapshot")).join("fs")
    }

    /// The files of a layer, of it alone. For a chain ID that is none, a path that is absent.
    pub fn layer_dir(&self, chain_id: &str) -> PathBuf {
        self.layer(chain_id).unwrap_or_else(|_| self.temporary.join("no-such-layer")).join("fs")
    }

    /// Removes a snapshot, which must not be mounted any more. That it is absent is no error.
    pub fn remove(&self, key: &str) -> Result<()> {
        self.discard(&self.snapshot(key)?)
    }

    /// Removes a layer that no snapshot stands on. That it is absent is no error.
    pub fn remove_layer(&self, chain_id: &str) -> Result<()> {
        let dir = self.layer(chain_id)?;
        for (key, layers) in self.active()? {
            if layers.iter().any(|layer| layer == chain_id) {
                return Err(Error::LayerInUse { chain_id: chain_id.to_owned(), key });
            }
        }
        self.discard(&dir)
    }

    /// The chain IDs of all layers, sorted.
    pub fn layers(&self) -> Result<Vec<String>> {
        let ids = names(&self.layers)?.into_iter().map(|name| format!("sha256:{name}"));
        Ok(ids.filter(|id| self.layer(id).is_ok()).collect())
    }

    /// All writable snapshots with the chain IDs below, lowest first, sorted by key.
    pub fn active(&self) -> Result<Vec<(String, Vec<String>)>> {
        let mut all = Vec::new();
        for key in names(&self.active)? {
            match self.layers_below(&key) {
                Ok(layers) => all.push((key, layers)),
                // Removed since it was listed.
                Err(Error::NoSnapshot { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// What the container has written, on disk.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let upper = self.snapshot(key)?.join("fs");
        if !upper.is_dir() {
            return Err(Error::NoSnapshot { key: key.to_owned() });
        }
        tree::usage(&upper)
    }

    fn unpack(&self, temporary: &Temporary, parents: &[PathBuf], layer: impl Read) -> Result<()> {
        let fs = temporary.fs();
        make_upper(&fs, parents)?;
        if parents.is_empty() {
            let root = Root::open(&fs).doing("opening", &fs)?;
            return apply::apply(&root, decompress(layer)?, Whiteouts::Written, Limits::LAYER);
        }
        let work = temporary.work();
        make_dir(&work, 0o700)?;
        let root = open_overlay(&overlay::mount(&borrowed(parents), Some((&fs, &work))), &fs)?;
        apply::apply(&root, decompress(layer)?, Whiteouts::CarriedOut, Limits::LAYER)?;
        drop(root);
        remove_tree(&work)
    }

    fn open_snapshot(&self, key: &str) -> Result<(Root, Whiteouts)> {
        let (lowers, upper) = (self.view_paths(&self.layers_below(key)?)?, self.upper_dir(key));
        if lowers.is_empty() {
            return Ok((Root::open(&upper).doing("opening", &upper)?, Whiteouts::Written));
        }
        let work = self.snapshot(key)?.join("work");
        let mount = overlay::mount(&borrowed(&lowers), Some((&upper, &work)));
        Ok((open_overlay(&mount, &upper)?, Whiteouts::CarriedOut))
    }

    fn layers_below(&self, key: &str) -> Result<Vec<String>> {
        let file = self.snapshot(key)?.join("layers");
        match read_limited(&file, SMALL_FILE_BYTES_MAX) {
            Ok(text) => Ok(String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoSnapshot { key: key.to_owned() }),
            Err(error) => Err(Error::io("reading", &file, error)),
        }
    }

    /// Gone for all others at once; then removed file by file.
    fn discard(&self, dir: &Path) -> Result<()> {
        let doomed = self.temporary.join(random_id());
        match fs::rename(dir, &doomed) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("removing", dir, error)),
        }
        remove_tree(&doomed)
    }

    fn layer(&self, chain_id: &str) -> Result<PathBuf> {
        let is_hex = |hex: &&str| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match chain_id.strip_prefix("sha256:").filter(is_hex) {
            Some(hex) => Ok(self.layers.join(hex)),
            None => Err(Error::InvalidChainId { id: chain_id.chars().take(160).collect() }),
        }
    }

    fn snapshot(&self, key: &str) -> Result<PathBuf> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if key.is_empty() || key.len() > 128 || key.starts_with('.') || !key.bytes().all(is_allowed) {
            return Err(Error::InvalidKey { key: key.chars().take(160).collect() });
        }
        Ok(self.active.join(key))
    }
}

/// A layer or a snapshot in the making. Dropped before it is published, it is removed.
struct Temporary(PathBuf);

impl Temporary {
    fn new(parent: &Path) -> Result<Temporary> {
        let dir = parent.join(random_id());
        make_dir(&dir, 0o700)?;
        Ok(Temporary(dir))
    }

    fn fs(&self) -> PathBuf {
        self.0.join("fs")
    }

    fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// One call for all files; an fsync of each would take many times as long.
    fn flush(&self) -> Result<()> {
        let dir = rustix::fs::open(&self.0, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty());
        dir.and_then(syncfs).doing("flushing", &self.0)
    }

    /// Gives it its name, if nobody has that yet.
    fn publish(&self, target: &Path) -> Result<()> {
        match renameat_with(CWD, &self.0, CWD, target, RenameFlags::NOREPLACE) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(Error::io("naming", target, error)),
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.0) {
            tracing::warn!(%error, "an unfinished snapshot stays until the next start");
        }
    }
}

fn open_overlay(mount: &Mount, of: &Path) -> Result<Root> {
    Ok(Root::from_fd(open_detached(mount).doing("mounting the layers of", of)?))
}

/// An overlay shows the owner and mode of its upper directory as those of `/`: they are to be those of the layer below.
fn make_upper(dir: &Path, lowers: &[PathBuf]) -> Result<()> {
    make_dir(dir, 0o755)?;
    let Some(below) = lowers.first() else { return Ok(()) };
    let metadata = fs::symlink_metadata(below).doing("examining", below)?;
    chown(dir, Some(metadata.uid()), Some(metadata.gid())).doing("setting the owner of", dir)?;
    set_mode(dir, metadata.mode())
}

fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    fs::create_dir(dir).doing("making", dir)?;
    set_mode(dir, mode)
}

fn set_mode(dir: &Path, mode: u32) -> Result<()> {
    let permissions = fs::Permissions::from_mode(mode & 0o7777);
    fs::set_permissions(dir, permissions).doing("setting the mode of", dir)
}

fn remove_tree(path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = Root::open(parent).doing("removing", path)?;
    tree::remove(parent.as_fd(), OsStr::new(name)).doing("removing", path)
}

fn read_usage(layer: &Path) -> Result<Usage> {
    let file = layer.join("usage");
    let text = read_limited(&file, SMALL_FILE_BYTES_MAX).doing("reading", &file)?;
    let text = String::from_utf8_lossy(&text);
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(bytes)), Some(Ok(inodes))) => Ok(Usage { bytes, inodes }),
        _ => tree::usage(&layer.join("fs")),
    }
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).doing("listing", dir)? {
        names.extend(entry.doing("listing", dir)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn borrowed(paths: &[PathBuf]) -> Vec<&Path> {
    paths.iter().map(PathBuf::as_path).collect()
}
