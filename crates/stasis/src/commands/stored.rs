//! `checkpoint ls`, `checkpoint rm`, `checkpoint prune`, `checkpoint pin`: the checkpoints that this node made.

use jiff::Timestamp;
use serde::Serialize;
use stasis_cri_api::stasis::{
    CheckpointEntry, ListCheckpointsRequest, PinCheckpointRequest, PruneCheckpointsRequest, RemoveCheckpointsRequest,
};

use crate::client::Client;
use crate::failure::Result;
use crate::output::{Output, Row};
use crate::units::{age, size};

/// A checkpoint.
#[derive(Debug, Serialize)]
pub(crate) struct CheckpointRow {
    id: String,
    container_id: String,
    container: String,
    pod: String,
    namespace: String,
    path: String,
    image: String,
    size_bytes: u64,
    created_at: i64,
    pinned: bool,
}

impl From<CheckpointEntry> for CheckpointRow {
    fn from(of: CheckpointEntry) -> Self {
        Self {
            id: of.id,
            container_id: of.container_id,
            container: of.container,
            pod: of.pod,
            namespace: of.namespace,
            path: of.path,
            image: of.image,
            size_bytes: of.size_bytes,
            created_at: of.created_at,
            pinned: of.pinned,
        }
    }
}

impl Row for CheckpointRow {
    const COLUMNS: &'static [&'static str] = &["ID", "CONTAINER", "POD", "CREATED", "SIZE", "PINNED", "CHECKPOINT"];

    fn id(&self) -> &str {
        &self.id
    }

    fn lines(&self, now: Timestamp) -> Vec<Vec<String>> {
        let place = if self.image.is_empty() { &self.path } else { &self.image };
        vec![vec![
            self.id.clone(),
            self.container.clone(),
            format!("{}/{}", self.namespace, self.pod),
            age(self.created_at, now),
            size(self.size_bytes),
            if self.pinned { "yes" } else { "no" }.to_owned(),
            place.clone(),
        ]]
    }
}

pub(crate) async fn list(client: &Client, output: Output) -> Result<()> {
    let mut admin = client.admin.clone();
    let answer = client.call("list checkpoints", admin.list_checkpoints(ListCheckpointsRequest {})).await?;
    output.list(&rows(answer.checkpoints))
}

pub(crate) async fn remove(client: &Client, output: Output, names: Vec<String>) -> Result<()> {
    let mut admin = client.admin.clone();
    // Relative paths are the caller's.
    let names = names.into_iter().map(|name| match std::path::absolute(&name) {
        Ok(path) if path.is_file() => path.display().to_string(),
        _ => name,
    });
    let request = RemoveCheckpointsRequest { names: names.collect() };
    let answer = client.call("remove checkpoints", admin.remove_checkpoints(request)).await?;
    output.list(&rows(answer.removed))
}

pub(crate) async fn prune(client: &Client, output: Output, request: PruneCheckpointsRequest) -> Result<()> {
    let mut admin = client.admin.clone();
    let answer = client.call("prune checkpoints", admin.prune_checkpoints(request)).await?;
    output.list(&rows(answer.removed))
}

pub(crate) async fn pin(client: &Client, output: Output, name: String, unpin: bool) -> Result<()> {
    let mut admin = client.admin.clone();
    let request = PinCheckpointRequest { name: name.clone(), unpin };
    let answer = client.call(format!("pin {name}"), admin.pin_checkpoint(request)).await?;
    output.list(&rows(answer.checkpoint.into_iter().collect()))
}

fn rows(entries: Vec<CheckpointEntry>) -> Vec<CheckpointRow> {
    entries.into_iter().map(CheckpointRow::from).collect()
}
