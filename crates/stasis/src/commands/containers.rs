//! `ps`, `exec`, `stop`, `rm`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use stasis_cri_api::runtime::{
    Container, ContainerState, ContainerStatusRequest, ExecSyncRequest, PodSandbox, RemoveContainerRequest,
    StopContainerRequest,
};

use super::{Batch, Done};
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::lookup::{self, POD_NAME_LABEL, POD_NAMESPACE_LABEL};
use crate::output::{Output, Row};
use crate::units::{age, rfc3339, short_id};

/// Time that stopping takes beyond the grace period: the kill, the exit, the record of it.
const STOP_MARGIN: Duration = Duration::from_secs(30);

/// A container of `ps`.
#[derive(Debug, Serialize)]
pub(crate) struct ContainerRow {
    id: String,
    name: String,
    pod: String,
    namespace: String,
    pod_id: String,
    state: &'static str,
    attempt: u32,
    created: Option<String>,
    image: String,
    image_id: String,
    image_ref: String,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    created_ns: i64,
}

impl ContainerRow {
    fn new(container: Container, pods: &[PodSandbox]) -> Self {
        let pod = pods.iter().find(|p| p.id == container.pod_sandbox_id).and_then(|p| p.metadata.clone());
        let label = |key: &str| container.labels.get(key).cloned().unwrap_or_default();
        let (pod, namespace) = match pod {
            Some(pod) => (pod.name, pod.namespace),
            None => (label(POD_NAME_LABEL), label(POD_NAMESPACE_LABEL)),
        };
        let metadata = container.metadata.unwrap_or_default();
        let image = container.image.unwrap_or_default();
        Self {
            id: container.id,
            name: metadata.name,
            pod,
            namespace,
            pod_id: container.pod_sandbox_id,
            state: state(container.state),
            attempt: metadata.attempt,
            created: rfc3339(container.created_at),
            image: if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image },
            image_id: container.image_id,
            image_ref: container.image_ref,
            labels: container.labels.into_iter().collect(),
            created_ns: container.created_at,
        }
    }
}

impl Row for ContainerRow {
    const COLUMNS: &'static [&'static str] = &["CONTAINER", "NAME", "POD", "STATE", "ATTEMPT", "CREATED", "IMAGE"];

    fn id(&self) -> &str {
        &self.id
    }

    fn lines(&self, now: Timestamp) -> Vec<Vec<String>> {
        let image = if self.image.starts_with("sha256:") { short_id(&self.image) } else { &self.image };
        vec![vec![
            short_id(&self.id).to_owned(),
            self.name.clone(),
            if self.pod.is_empty() { "-".to_owned() } else { self.pod.clone() },
            self.state.to_owned(),
            self.attempt.to_string(),
            age(self.created_ns, now),
            image.to_owned(),
        ]]
    }
}

/// The state in one word.
pub(crate) fn state(state: i32) -> &'static str {
    match ContainerState::try_from(state) {
        Ok(ContainerState::ContainerCreated) => "created",
        Ok(ContainerState::ContainerRunning) => "running",
        Ok(ContainerState::ContainerExited) => "exited",
        Ok(ContainerState::ContainerUnknown) | Err(_) => "unknown",
    }
}

pub(crate) async fn ps(client: &Client, output: Output, all: bool) -> Result<()> {
    let mut containers = lookup::containers(client).await?;
    let pods = lookup::pods(client).await?;
    containers.retain(|c| all || c.state == i32::from(ContainerState::ContainerRunning));
    containers.sort_by_key(|c| std::cmp::Reverse(c.created_at));
    output.list(&containers.into_iter().map(|c| ContainerRow::new(c, &pods)).collect::<Vec<_>>())
}

/// Runs a command and ends with its exit code.
pub(crate) async fn exec(client: &Client, container: &str, command: Vec<String>, timeout: Option<u32>) -> Done {
    let container_id = lookup::container(client, container).await?;
    let request = ExecSyncRequest { container_id, cmd: command, timeout: timeout.unwrap_or(0).into() };
    let mut runtime = client.runtime.clone();
    // The daemon ends the command when the time is up; we wait a little longer for its answer.
    let limit = timeout.map(|s| Duration::from_secs(s.into()) + STOP_MARGIN);
    let what = format!("run the command in {container}");
    let call = async {
        runtime.exec_sync(request).await.map(tonic::Response::into_inner).map_err(|s| Failure::daemon(&what, &s))
    };
    let answer = crate::client::limited(&what, limit, call).await?;
    let write = |mut to: Box<dyn std::io::Write>, bytes: &[u8]| to.write_all(bytes).and_then(|()| to.flush());
    write(Box::new(std::io::stdout()), &answer.stdout)
        .and_then(|()| write(Box::new(std::io::stderr()), &answer.stderr))
        .map_err(Failure::Output)?;
    // Shells use 128 and more for what a process has no code for.
    Ok(u8::try_from(answer.exit_code).unwrap_or(255))
}

pub(crate) async fn stop(client: &Client, output: Output, wanted: &[String], seconds: u32) -> Result<()> {
    let mut batch = Batch::new(output, "stopped");
    for name in wanted {
        batch.note(name, stop_one(client, name, seconds).await);
    }
    batch.finish()
}

async fn stop_one(client: &Client, name: &str, seconds: u32) -> Result<String> {
    let container_id = lookup::container(client, name).await?;
    let limit = Duration::from_secs(seconds.into()) + STOP_MARGIN;
    let request = StopContainerRequest { container_id: container_id.clone(), timeout: seconds.into() };
    let mut runtime = client.runtime.clone();
    client.call_within(format!("stop {name}"), Some(limit), runtime.stop_container(request)).await?;
    Ok(container_id)
}

pub(crate) async fn rm(client: &Client, output: Output, wanted: &[String], force: bool) -> Result<()> {
    let mut batch = Batch::new(output, "removed");
    for name in wanted {
        batch.note(name, rm_one(client, name, force).await);
    }
    batch.finish()
}

async fn rm_one(client: &Client, name: &str, force: bool) -> Result<String> {
    let container_id = lookup::container(client, name).await?;
    let mut runtime = client.runtime.clone();
    // CRI's remove ends a running container without a word.
    let request = ContainerStatusRequest { container_id: container_id.clone(), verbose: false };
    let status = client.call(format!("ask for {name}"), runtime.container_status(request)).await?.status;
    let running = status.is_some_and(|s| s.state == i32::from(ContainerState::ContainerRunning));
    if running && !force {
        return Err(Failure::State(format!("{name} is running: stop it first, or give --force")));
    }
    let request = RemoveContainerRequest { container_id: container_id.clone() };
    client.call(format!("remove {name}"), runtime.remove_container(request)).await?;
    Ok(container_id)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use stasis_cri_api::runtime::{ContainerMetadata, ImageSpec, PodSandboxMetadata};

    use super::*;
    use crate::output::tests::every_form;

    #[test]
    fn ps() {
        let pod = PodSandbox {
            id: "p".repeat(64),
            metadata: Some(PodSandboxMetadata { name: "web".into(), namespace: "shop".into(), ..Default::default() }),
            ..Default::default()
        };
        let container = |id: &str, name: &str, state: ContainerState| Container {
            id: id.repeat(64),
            pod_sandbox_id: pod.id.clone(),
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 2 }),
            image: Some(ImageSpec { image: format!("sha256:{}", "e".repeat(64)), ..Default::default() }),
            image_id: format!("sha256:{}", "e".repeat(64)),
            image_ref: "docker.io/library/redis@sha256:ff".into(),
            state: state.into(),
            created_at: 1_699_990_000_000_000_000,
            labels: HashMap::from([("b".into(), "2".into()), ("a".into(), "1".into())]),
            ..Default::default()
        };
        let mut named = container("b", "a-much-longer-name", ContainerState::ContainerExited);
        named.image.as_mut().unwrap().user_specified_image = "docker.io/library/redis:7".into();
        named.pod_sandbox_id = "gone".into();
        let rows = [container("a", "redis", ContainerState::ContainerRunning), named]
            .map(|c| ContainerRow::new(c, std::slice::from_ref(&pod)));
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("ps", every_form(&rows));
        });
    }
}
