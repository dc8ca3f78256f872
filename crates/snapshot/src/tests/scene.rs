//! Directories to compare, and mounts that go away.

use stasis_sys::mount::{Mount, mount, unmount_all_below};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A scratch directory; what is mounted below is unmounted in the end.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let dir = self.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Mounts on a new directory.
    pub(crate) fn mount(&self, name: &str, mounts: &[Mount]) -> PathBuf {
        let target = self.dir(name);
        for m in mounts {
            mount(m, &target).expect("this test needs root and overlayfs");
        }
        target
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        unmount_all_below(self.path()).unwrap();
    }
}

/// Everything about a file that a layer keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: char,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    /// Content, target of a link, or device number.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
    /// The first path, in order, with the same inode.
    pub(crate) same_as: PathBuf,
}

/// The files at and below `root`. Whiteouts and opaque marks of overlayfs are seen as they are on disk.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, Node> {
    let mut nodes = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(rel) = pending.pop() {
        let path = root.join(&rel);
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let (letter, content) = if kind.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| rel.join(entry.unwrap().file_name())));
            ('d', Vec::new())
        } else if kind.is_symlink() {
            ('l', fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes())
        } else if kind.is_file() {
            ('f', fs::read(&path).unwrap())
        } else if kind.is_char_device() {
            ('c', metadata.rdev().to_be_bytes().to_vec())
        } else if kind.is_block_device() {
            ('b', metadata.rdev().to_be_bytes().to_vec())
        } else if kind.is_fifo() {
            ('p', Vec::new())
        } else {
            ('s', Vec::new())
        };
        let inode = metadata.ino();
        let node = Node {
            kind: letter,
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            content,
            xattrs: xattrs(&path),
            same_as: if letter == 'd' { rel.clone() } else { PathBuf::from(inode.to_string()) },
        };
        nodes.insert(rel, node);
    }
    name_first_links(&mut nodes);
    nodes
}

fn name_first_links(nodes: &mut BTreeMap<PathBuf, Node>) {
    let mut first = BTreeMap::new();
    for (path, node) in nodes.iter_mut().filter(|(_, node)| node.kind != 'd') {
        node.same_as = first.entry(node.same_as.clone()).or_insert_with(|| path.clone()).clone();
    }
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0u8; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = String::from_utf8(names[..length].to_vec()).unwrap();
    let mut all = Vec::new();
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        // Where a file was copied up from: of no meaning to a layer.
        if ["trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.uuid"].contains(&name) {
            continue;
        }
        let mut value = vec![0u8; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        all.push((name.to_owned(), value[..length].to_vec()));
    }
    all.sort();
    all
}

/// The paths in a tree, without the root, each with a letter for what it is.
pub(crate) fn listing(root: &Path) -> Vec<String> {
    tree(root).iter().skip(1).map(|(path, node)| format!("{} {}", node.kind, path.display())).collect()
}

/// The tree without the times of its directories and without its root, where two ways of making the same differ.
pub(crate) fn essence(root: &Path) -> BTreeMap<PathBuf, Node> {
    let mut nodes = tree(root);
    nodes.remove(Path::new(""));
    for node in nodes.values_mut().filter(|node| node.kind == 'd') {
        node.mtime = (0, 0);
    }
    nodes
}
