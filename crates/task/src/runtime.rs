//! Tasks through shims.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use stasis_shim_api::SandboxSpec;

use crate::{CreateOpts, Exit, PlatformRuntime, Result, Sandbox, Task};

/// How shims are found and started.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the tasks: the pods' directory. See the crate's documentation for what is made in there.
    pub state_dir: PathBuf,
    /// Where to look for the programs of shims, before `PATH`.
    pub shim_dirs: Vec<PathBuf>,
    /// Address of the daemon's socket, told to shims.
    pub address: String,
    /// containerd's namespace, told to shims: `k8s.io`.
    pub namespace: String,
    /// Environment of shims, beside what containerd sets; a `PATH` in here takes the place of the daemon's own.
    pub env: Vec<(OsString, OsString)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/run/stasis/pods".into(),
            shim_dirs: Vec::new(),
            address: "/run/stasis/stasis.sock".into(),
            namespace: "k8s.io".into(),
            env: Vec::new(),
        }
    }
}

/// The [`PlatformRuntime`] that runs tasks in shims. Cloning gives another handle of the same.
#[derive(Clone, Debug)]
pub struct ShimRuntime {}

impl ShimRuntime {
    /// A runtime on that configuration; touches nothing yet.
    pub fn new(config: Config) -> Self {
        let _ = config;
        todo!()
    }

    /// Starts our shim for a pod, in the pod's directory (absolute, 0700, made by the caller), and the sandbox in it.
    pub async fn start_sandbox(
        &self,
        pod_id: &str,
        runtime: &str,
        pod_dir: &Path,
        spec: &SandboxSpec,
    ) -> Result<Sandbox> {
        let _ = (pod_id, runtime, pod_dir, spec);
        todo!()
    }

    /// Finds the shim of a pod again after a restart of the daemon.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound) if the pod's directory holds no shim's address,
    /// [`Error::ShimLost`](crate::Error::ShimLost) if nobody answers there.
    pub async fn connect_sandbox(&self, pod_id: &str, pod_dir: &Path) -> Result<Sandbox> {
        let _ = (pod_id, pod_dir);
        todo!()
    }

    /// Cleans up after the dead shim of a pod: runs its program's `delete`, which must not need it alive.
    pub async fn clean_sandbox(&self, pod_id: &str, pod_dir: &Path) -> Result<()> {
        let _ = (pod_id, pod_dir);
        todo!()
    }
}

#[async_trait]
impl PlatformRuntime for ShimRuntime {
    fn id(&self) -> &str {
        "shim"
    }
    async fn create(&self, _task_id: &str, _opts: CreateOpts) -> Result<Arc<dyn Task>> {
        todo!()
    }
    async fn get(&self, _task_id: &str) -> Result<Arc<dyn Task>> {
        todo!()
    }
    async fn tasks(&self, _all: bool) -> Result<Vec<Arc<dyn Task>>> {
        todo!()
    }
    async fn delete(&self, _task_id: &str) -> Result<Exit> {
        todo!()
    }
}

/// Where a container's output goes so that it ends up in the file `path`: for our shim the CRI log format
/// (`cri://…`), for any other the raw output (`file://…`), as other shims know nothing of CRI.
pub fn log_uri(runtime: &str, path: &Path) -> String {
    let _ = (runtime, path);
    todo!()
}
