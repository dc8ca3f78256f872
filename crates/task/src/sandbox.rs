//! The pod's side of our shim: Sandbox API v1 and the service that only our shim has.

use std::path::Path;
use std::sync::Arc;

use stasis_shim_api::{CheckpointReport, CheckpointRequest};

use crate::{Exit, Result, Task};

/// A pod in its shim. Cloning gives another handle of the same.
#[derive(Clone, Debug)]
pub struct Sandbox {}

impl Sandbox {
    /// The pod's ID.
    pub fn id(&self) -> &str {
        todo!()
    }
    /// Address of the shim, for [`CreateOpts::address`](crate::CreateOpts::address).
    pub fn address(&self) -> &str {
        todo!()
    }
    /// Version of its Task API, for [`CreateOpts::version`](crate::CreateOpts::version).
    pub fn version(&self) -> u32 {
        todo!()
    }
    /// Process ID of the shim; 0 if it did not say.
    pub fn pid(&self) -> u32 {
        todo!()
    }
    /// Directory of the pod.
    pub fn dir(&self) -> &Path {
        todo!()
    }
    /// Whether the shim answers.
    pub async fn ping(&self) -> Result<()> {
        todo!()
    }
    /// Ends the pod's processes and lets go of its namespaces; the shim goes on answering.
    pub async fn stop(&self) -> Result<()> {
        todo!()
    }
    /// Ends the shim itself and waits until it is gone. A shim that is gone already is no error.
    pub async fn shutdown(&self) -> Result<()> {
        todo!()
    }
    /// Waits, without limit, for the end of the sandbox; [`Error::ShimLost`](crate::Error::ShimLost) when the
    /// connection to the shim ends before that.
    pub async fn wait(&self) -> Result<Exit> {
        todo!()
    }
    /// Writes a checkpoint archive. Refusals of the shim are [`Error::Shim`](crate::Error::Shim).
    pub async fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointReport> {
        let _ = request;
        todo!()
    }
    /// Begins the log file of a container anew, after a rotation.
    pub async fn reopen_log(&self, task_id: &str) -> Result<()> {
        let _ = task_id;
        todo!()
    }
    /// The tasks of this pod that are known to this daemon.
    pub async fn tasks(&self) -> Result<Vec<Arc<dyn Task>>> {
        todo!()
    }
}
