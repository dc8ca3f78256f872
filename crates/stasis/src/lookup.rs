//! From what people type to an ID: an ID, a unique beginning of one, or a name.

use stasis_cri_api::runtime::{
    Container, ContainerState, ImageSpec, ImageStatusRequest, ListContainersRequest, ListImagesRequest,
    ListPodSandboxRequest, PodSandbox, PodSandboxState,
};

use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::units::short_id;

/// Label of the kubelet with the name of a container's pod.
pub(crate) const POD_NAME_LABEL: &str = "io.kubernetes.pod.name";
/// Label of the kubelet with the namespace of a container's pod.
pub(crate) const POD_NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

/// What a name may mean.
#[derive(Clone, Debug)]
struct Candidate {
    id: String,
    names: Vec<String>,
    /// Running or ready: meant before others of the same name.
    live: bool,
}

/// The ID of a container.
pub(crate) async fn container(client: &Client, wanted: &str) -> Result<String> {
    let containers = containers(client).await?;
    let pods = pods(client).await?;
    let candidates = containers.iter().map(|c| container_candidate(c, &pods)).collect::<Vec<_>>();
    choose("container", wanted, &candidates)
}

fn container_candidate(container: &Container, pods: &[PodSandbox]) -> Candidate {
    let name = container.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
    let pod = pods.iter().find(|p| p.id == container.pod_sandbox_id).and_then(|p| p.metadata.as_ref());
    let mut names = vec![name.clone()];
    if let Some(pod) = pod {
        names.push(format!("{}/{name}", pod.name));
        names.push(format!("{}/{}/{name}", pod.namespace, pod.name));
    }
    let live = container.state == i32::from(ContainerState::ContainerRunning);
    Candidate { id: container.id.clone(), names, live }
}

/// The ID of a pod.
pub(crate) async fn pod(client: &Client, wanted: &str) -> Result<String> {
    let candidate = |pod: &PodSandbox| {
        let metadata = pod.metadata.clone().unwrap_or_default();
        let names = vec![metadata.name.clone(), format!("{}/{}", metadata.namespace, metadata.name)];
        Candidate { id: pod.id.clone(), names, live: pod.state == i32::from(PodSandboxState::SandboxReady) }
    };
    choose("pod", wanted, &pods(client).await?.iter().map(candidate).collect::<Vec<_>>())
}

/// An image as requests name it, and its ID.
#[derive(Debug)]
pub(crate) struct FoundImage {
    /// As it was typed where the daemon knows it so, else the ID.
    pub(crate) name: String,
    pub(crate) id: String,
}

/// Finds a local image.
pub(crate) async fn image(client: &Client, wanted: &str) -> Result<FoundImage> {
    let image = Some(ImageSpec { image: wanted.to_owned(), ..Default::default() });
    let mut images = client.images.clone();
    let request = ImageStatusRequest { image, verbose: false };
    let what = format!("look up the image {wanted}");
    if let Some(image) = client.call(what, images.image_status(request)).await?.image {
        return Ok(FoundImage { name: wanted.to_owned(), id: image.id });
    }
    let all = client.call("list images", images.list_images(ListImagesRequest { filter: None })).await?.images;
    let candidates: Vec<Candidate> = all
        .into_iter()
        .map(|i| {
            let hex = i.id.split_once(':').map(|(_, hex)| hex.to_owned());
            Candidate { names: hex.into_iter().collect(), id: i.id, live: false }
        })
        .collect();
    let id = choose("image", wanted, &candidates)?;
    Ok(FoundImage { name: id.clone(), id })
}

/// All containers.
pub(crate) async fn containers(client: &Client) -> Result<Vec<Container>> {
    let mut runtime = client.runtime.clone();
    let call = runtime.list_containers(ListContainersRequest { filter: None });
    Ok(client.call("list containers", call).await?.containers)
}

/// All pods.
pub(crate) async fn pods(client: &Client) -> Result<Vec<PodSandbox>> {
    let mut runtime = client.runtime.clone();
    let call = runtime.list_pod_sandbox(ListPodSandboxRequest { filter: None });
    Ok(client.call("list pods", call).await?.items)
}

/// An exact ID goes before a name, a name before the beginning of an ID; of several with one name, the live one.
fn choose(kind: &'static str, wanted: &str, candidates: &[Candidate]) -> Result<String> {
    let not_found = || Failure::NotFound { kind, wanted: wanted.to_owned() };
    if wanted.is_empty() {
        return Err(not_found());
    }
    if let Some(exact) = candidates.iter().find(|c| c.id == wanted) {
        return Ok(exact.id.clone());
    }
    let named: Vec<&Candidate> = candidates.iter().filter(|c| c.names.iter().any(|n| n == wanted)).collect();
    let live: Vec<&Candidate> = named.iter().copied().filter(|c| c.live).collect();
    let begins = |c: &&Candidate| {
        let hex = c.id.split_once(':').map_or(c.id.as_str(), |(_, hex)| hex);
        c.id.starts_with(wanted) || hex.starts_with(wanted)
    };
    let fitting = match (named.len(), live.len()) {
        (0, _) => candidates.iter().filter(begins).collect(),
        (_, 1) => live,
        _ => named,
    };
    match &fitting[..] {
        [] => Err(not_found()),
        [one] => Ok(one.id.clone()),
        several => Err(Failure::Ambiguous {
            kind,
            wanted: wanted.to_owned(),
            candidates: several.iter().map(|c| short_id(&c.id)).collect::<Vec<_>>().join(", "),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: &str) -> String {
        let candidate = |id: &str, names: &[&str], live| Candidate {
            id: id.into(),
            names: names.iter().map(ToString::to_string).collect(),
            live,
        };
        let all = [
            candidate("abc1", &["web", "shop/web"], false),
            candidate("abc2", &["web", "shop/web"], true),
            candidate("abd3", &["db"], false),
            candidate("abd4", &["db", "abc1"], false),
            candidate("sha256:ffee", &[], false),
        ];
        choose("container", wanted, &all).unwrap_or_else(|failure| failure.to_string())
    }

    #[test]
    fn ids_names_and_beginnings() {
        assert_eq!(check("abc1"), "abc1", "an exact ID goes before a name");
        assert_eq!(check("web"), "abc2", "the live one");
        assert_eq!(check("shop/web"), "abc2");
        assert_eq!(check("db"), r#"more than one container fits "db": abd3, abd4"#);
        assert_eq!(check("abd"), r#"more than one container fits "abd": abd3, abd4"#);
        assert_eq!(check("abd3"), "abd3");
        assert_eq!(check("ff"), "sha256:ffee");
        assert_eq!(check("sha256:f"), "sha256:ffee");
        assert_eq!(check("x"), r#"there is no container "x""#);
        assert_eq!(check(""), r#"there is no container """#);
    }
}
