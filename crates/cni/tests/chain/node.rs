//! A node to test with: directories, a configuration, plugins of shell, a network namespace; all removed at the end.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::{Value, json};
use stasis_cni::{Cni, Config, PodNetwork};
use stasis_sys::namespace::{Kind, NewNamespaces, pin_new};

/// Directories of one test, and its namespace.
pub(crate) struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    pub(crate) fn new() -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["net.d", "bin", "ns"] {
            fs::create_dir(node.path(dir)).unwrap();
        }
        let new = NewNamespaces { kinds: &[Kind::Net], ..NewNamespaces::default() };
        pin_new(&node.path("ns"), &new).expect("making a network namespace needs root");
        node
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn netns(&self) -> PathBuf {
        self.path("ns/net")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path("log")
    }

    pub(crate) fn conf_file(&self) -> PathBuf {
        self.path("net.d/10-test.conflist")
    }

    pub(crate) fn configure(&self, version: &str, plugins: Value) {
        let list = json!({"cniVersion": version, "name": "test", "plugins": plugins});
        fs::write(self.conf_file(), list.to_string()).unwrap();
    }

    /// A plugin of shell.
    pub(crate) fn plugin(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            conf_dir: self.path("net.d"),
            bin_dirs: vec![self.path("bin")],
            cache_dir: self.path("cache"),
            ..Config::default()
        }
    }

    /// The network, as a daemon that has just started sees it.
    pub(crate) fn cni(&self) -> Cni {
        Cni::new(self.config())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = stasis_sys::mount::unmount_all_below(self.dir.path());
    }
}

/// A pod in the node's namespace.
pub(crate) fn pod(node: &Node) -> PodNetwork {
    PodNetwork {
        id: stasis_sys::file::random_id(),
        netns: node.netns(),
        name: "web-1".into(),
        namespace: "default".into(),
        uid: "u-1".into(),
        ..PodNetwork::default()
    }
}
