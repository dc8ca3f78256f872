//! `pods`, `stopp`, `rmp`.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use stasis_cri_api::runtime::{
    PodSandbox, PodSandboxState, PodSandboxStatusRequest, RemovePodSandboxRequest, StopPodSandboxRequest,
};

use super::Batch;
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::lookup;
use crate::output::{Output, Row};
use crate::units::{age, rfc3339, short_id};

/// Time for stopping a pod: its containers' grace periods, which the daemon keeps, and its network.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);

/// A pod of `pods`.
#[derive(Debug, Serialize)]
pub(crate) struct PodRow {
    id: String,
    name: String,
    namespace: String,
    uid: String,
    state: &'static str,
    attempt: u32,
    created: Option<String>,
    ips: Vec<String>,
    runtime_handler: String,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    created_ns: i64,
}

impl PodRow {
    fn new(pod: PodSandbox, ips: Vec<String>) -> Self {
        let metadata = pod.metadata.unwrap_or_default();
        let ready = pod.state == i32::from(PodSandboxState::SandboxReady);
        Self {
            id: pod.id,
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            state: if ready { "ready" } else { "not ready" },
            attempt: metadata.attempt,
            created: rfc3339(pod.created_at),
            ips,
            runtime_handler: pod.runtime_handler,
            labels: pod.labels.into_iter().collect(),
            created_ns: pod.created_at,
        }
    }
}

impl Row for PodRow {
    const COLUMNS: &'static [&'static str] = &["POD", "NAME", "NAMESPACE", "STATE", "ATTEMPT", "CREATED", "IP"];

    fn id(&self) -> &str {
        &self.id
    }

    fn lines(&self, now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            short_id(&self.id).to_owned(),
            self.name.clone(),
            self.namespace.clone(),
            self.state.to_owned(),
            self.attempt.to_string(),
            age(self.created_ns, now),
            self.ips.first().cloned().unwrap_or_else(|| "-".to_owned()),
        ]]
    }
}

pub(crate) async fn pods(client: &Client, output: Output) -> Result<()> {
    let mut pods = lookup::pods(client).await?;
    pods.sort_by_key(|p| std::cmp::Reverse(p.created_at));
    let mut rows = Vec::with_capacity(pods.len());
    for pod in pods {
        let ips = ips(client, &pod.id).await?;
        rows.push(PodRow::new(pod, ips));
    }
    output.list(&rows)
}

/// The addresses of a pod, which only its status has. A pod that is gone by now has none.
async fn ips(client: &Client, pod: &str) -> Result<Vec<String>> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: false };
    let mut runtime = client.runtime.clone();
    let status = match client.call("ask for a pod", runtime.pod_sandbox_status(request)).await {
        Err(Failure::Daemon { code: tonic::Code::NotFound, .. }) => return Ok(Vec::new()),
        answer => answer?.status,
    };
    let network = status.and_then(|s| s.network).unwrap_or_default();
    let all = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|i| i.ip));
    Ok(all.filter(|ip| !ip.is_empty()).collect())
}

pub(crate) async fn stop(client: &Client, output: Output, wanted: &[String]) -> Result<()> {
    let mut batch = Batch::new(output, "stopped");
    for name in wanted {
        batch.note(name, stop_one(client, name).await);
    }
    batch.finish()
}

async fn stop_one(client: &Client, name: &str) -> Result<String> {
    let id = lookup::pod(client, name).await?;
    stop_by_id(client, name, &id).await?;
    Ok(id)
}

async fn stop_by_id(client: &Client, name: &str, id: &str) -> Result<()> {
    let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
    let mut runtime = client.runtime.clone();
    let call = runtime.stop_pod_sandbox(request);
    client.call_within(format!("stop the pod {name}"), Some(STOP_TIMEOUT), call).await.map(drop)
}

pub(crate) async fn remove(client: &Client, output: Output, wanted: &[String], force: bool) -> Result<()> {
    let mut batch = Batch::new(output, "removed");
    for name in wanted {
        batch.note(name, remove_one(client, name, force).await);
    }
    batch.finish()
}

async fn remove_one(client: &Client, name: &str, force: bool) -> Result<String> {
    let id = lookup::pod(client, name).await?;
    // CRI's remove ends what runs without a word.
    let ready =
        lookup::pods(client).await?.iter().any(|p| p.id == id && p.state == i32::from(PodSandboxState::SandboxReady));
    if ready && !force {
        return Err(Failure::State(format!("the pod {name} is ready: stop it first, or give --force")));
    }
    stop_by_id(client, name, &id).await?;
    let request = RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
    let mut runtime = client.runtime.clone();
    let call = runtime.remove_pod_sandbox(request);
    client.call_within(format!("remove the pod {name}"), Some(STOP_TIMEOUT), call).await?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use stasis_cri_api::runtime::PodSandboxMetadata;

    use super::*;
    use crate::output::tests::every_form;

    #[test]
    fn pods() {
        let pod = |id: &str, name: &str, state: PodSandboxState| PodSandbox {
            id: id.repeat(64),
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                namespace: "shop".into(),
                uid: "0b8e".into(),
                attempt: 1,
            }),
            state: state.into(),
            created_at: 1_699_000_000_000_000_000,
            runtime_handler: "runc".into(),
            ..Default::default()
        };
        let rows = [
            PodRow::new(pod("a", "web", PodSandboxState::SandboxReady), vec!["10.88.0.2".into(), "fd00::2".into()]),
            PodRow::new(pod("b", "database", PodSandboxState::SandboxNotready), vec![]),
        ];
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("pods", every_form(&rows));
        });
    }
}
