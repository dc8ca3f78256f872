//! Where the development tasks keep things. Nothing outside these directories is written.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Names the directory of everything that the tasks set up, instead of `target/dev` of the work tree.
pub(crate) const DEV_DIR_VARIABLE: &str = "STASIS_DEV_DIR";

/// The directories of one work tree.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The work tree.
    pub(crate) repository: PathBuf,
    /// What the tasks set up: engines, peers, images, running nodes.
    pub(crate) dev: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
}

impl Places {
    /// Finds the directories and makes the development directory.
    pub(crate) fn find() -> Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let repository = Path::new(&manifest)
            .parent()
            .with_context(|| format!("{} has no parent directory", Path::new(&manifest).display()))?
            .to_path_buf();
        let here = env::current_dir().context("find the current directory")?;
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), |dir| here.join(dir));
        let dev = env::var_os(DEV_DIR_VARIABLE).map_or_else(|| repository.join("target/dev"), |dir| here.join(dir));
        fs::create_dir_all(&dev).with_context(|| format!("create {}", dev.display()))?;
        let dev = dev.canonicalize().with_context(|| format!("resolve {}", dev.display()))?;
        Ok(Self { repository, dev, target })
    }

    /// The prefix of the engines.
    pub(crate) fn engines(&self) -> PathBuf {
        self.dev.join("engines")
    }

    /// The prefix of the runtimes that ours is compared with.
    pub(crate) fn peers(&self) -> PathBuf {
        self.dev.join("peers")
    }

    /// The directory of the test images, one OCI layout tar an image.
    pub(crate) fn images(&self) -> PathBuf {
        self.dev.join("images")
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
