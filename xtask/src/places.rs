//! Where the development tasks keep things. Nothing outside these directories is written.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Names the directory of everything that the tasks set up, instead of `target/dev` of the work tree.
pub const DEV_DIR_VARIABLE: &str = "STASIS_DEV_DIR";

/// What tests find in their environment.
const ENGINES_VARIABLE: &str = "STASIS_ENGINES";
const PEERS_VARIABLE: &str = "STASIS_PEERS";
const CLIENTS_VARIABLE: &str = "STASIS_CLIENTS";
const IMAGES_VARIABLE: &str = "STASIS_IMAGES";
const BIN_VARIABLE: &str = "STASIS_BIN";
const SHIM_VARIABLE: &str = "STASIS_SHIM";

/// Cargo's profile that makes the shim small, and so the directory that it is built to.
pub(crate) const SHIM_PROFILE: &str = "shim";

/// The directories of one work tree.
#[derive(Clone, Debug)]
pub struct Places {
    /// The work tree.
    pub repository: PathBuf,
    /// What the tasks set up: engines, peers, images, running nodes.
    pub dev: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    engines: PathBuf,
    peers: PathBuf,
    clients: PathBuf,
    images: PathBuf,
    bin: PathBuf,
    shim: PathBuf,
}

impl Places {
    /// Finds the directories and makes the development directory.
    pub(crate) fn find() -> Result<Self> {
        let repository = repository()?;
        let here = env::current_dir().context("find the current directory")?;
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), |dir| here.join(dir));
        let dev = env::var_os(DEV_DIR_VARIABLE).map_or_else(|| repository.join("target/dev"), |dir| here.join(dir));
        fs::create_dir_all(&dev).with_context(|| format!("create {}", dev.display()))?;
        let dev = dev.canonicalize().with_context(|| format!("resolve {}", dev.display()))?;
        Ok(Self {
            engines: dev.join("engines"),
            peers: dev.join("peers"),
            clients: dev.join("clients"),
            images: dev.join("images"),
            bin: target.join("release"),
            shim: target.join(SHIM_PROFILE).join("containerd-shim-stasis-v1"),
            repository,
            dev,
            target,
        })
    }

    /// The places that `cargo xtask test` names to the tests that it runs.
    ///
    /// # Errors
    /// Where a variable is not set; the message says what sets it.
    pub fn of_tests() -> Result<Self> {
        let named = |variable: &str| {
            let value = env::var_os(variable).map(PathBuf::from);
            value.with_context(|| format!("{variable} is not set: run the tests with `cargo xtask test`"))
        };
        let bin = named(BIN_VARIABLE)?;
        let parent = bin.parent().with_context(|| format!("{} has no parent directory", bin.display()))?;
        Ok(Self {
            repository: repository()?,
            dev: named(DEV_DIR_VARIABLE)?,
            target: parent.to_path_buf(),
            engines: named(ENGINES_VARIABLE)?,
            peers: named(PEERS_VARIABLE)?,
            clients: named(CLIENTS_VARIABLE)?,
            images: named(IMAGES_VARIABLE)?,
            shim: named(SHIM_VARIABLE)?,
            bin,
        })
    }

    /// What tests find in their environment: places that differ from machine to machine.
    pub(crate) fn for_tests(&self) -> Vec<(&'static str, PathBuf)> {
        vec![
            // Prefix with bin/{criu,runc,docker-registry,iptables,nft,busybox} and cni/.
            (ENGINES_VARIABLE, self.engines()),
            // Prefix with bin/{containerd,containerd-shim-runc-v2,ctr}.
            (PEERS_VARIABLE, self.peers()),
            // Prefix with bin/kubectl.
            (CLIENTS_VARIABLE, self.clients()),
            // Our shim, built small.
            (SHIM_VARIABLE, self.shim()),
            // Directory of stasisd and stasis.
            (BIN_VARIABLE, self.bin()),
            // Directory of the test images, OCI layouts in tars.
            (IMAGES_VARIABLE, self.images()),
            // Directory of the tests' nodes.
            (DEV_DIR_VARIABLE, self.dev.clone()),
        ]
    }

    /// The prefix of the engines.
    pub fn engines(&self) -> PathBuf {
        self.engines.clone()
    }

    /// The prefix of the runtimes that ours is compared with.
    pub fn peers(&self) -> PathBuf {
        self.peers.clone()
    }

    /// The prefix of the clients that are not ours.
    pub fn clients(&self) -> PathBuf {
        self.clients.clone()
    }

    /// The directory of the test images, one OCI layout tar an image.
    pub fn images(&self) -> PathBuf {
        self.images.clone()
    }

    /// The directory of `stasisd` and `stasis`.
    pub(crate) fn bin(&self) -> PathBuf {
        self.bin.clone()
    }

    /// The daemon.
    pub fn daemon(&self) -> PathBuf {
        self.bin.join("stasisd")
    }

    /// The command line.
    pub fn command_line(&self) -> PathBuf {
        self.bin.join("stasis")
    }

    /// The shim.
    pub fn shim(&self) -> PathBuf {
        self.shim.clone()
    }

    /// Takes the lock of the development directory and waits for it; it ends with the returned file.
    ///
    /// Whatever is set up below `dev` is set up under this lock, so that tasks may run side by side.
    pub(crate) fn lock(&self) -> Result<fs::File> {
        let path = self.dev.join("lock");
        let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
        file.lock().with_context(|| format!("lock {}", path.display()))?;
        Ok(file)
    }
}

fn repository() -> Result<PathBuf> {
    // Of this crate, not of the test that uses it.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let parent = manifest.parent().with_context(|| format!("{} has no parent directory", manifest.display()))?;
    Ok(parent.to_path_buf())
}
