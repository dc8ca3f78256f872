//! `restore`: CRI's CreateContainer with a checkpoint for an image, and StartContainer.

use std::path::Path;

use serde::Serialize;
use stasis_cri_api::runtime::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, Mount, RemoveContainerRequest,
    StartContainerRequest,
};

use super::{absolute, checkpoint};
use crate::cli::Restore;
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::lookup;
use crate::output::Output;
use crate::progress::{Progress, Report};
use crate::units::short_id;

pub(crate) async fn restore(client: &Client, output: Output, options: Restore) -> Result<()> {
    let pod = lookup::pod(client, &options.pod).await?;
    let image = source(&options.source)?;
    let name = match options.name.clone() {
        Some(name) => name,
        None => former_name(client, &options.source).await?,
    };
    let config = config(&options, image, &name)?;
    let mut progress = Progress::new(output);
    let result = create_and_start(client, pod, config, &name, &mut progress).await;
    progress.finish();
    let id = result?;
    #[derive(Serialize)]
    struct Outcome<'a> {
        id: &'a str,
        name: &'a str,
    }
    let human = format!("restored {name} ({}) from {}", short_id(&id), options.source);
    output.item(&Outcome { id: &id, name: &name }, &human, &id)
}

/// The archive's absolute path, or the image's reference. What is a file here is taken for an archive.
fn source(source: &str) -> Result<String> {
    let path = Path::new(source);
    if path.is_absolute() || path.is_file() || source.starts_with("./") || source.starts_with("../") {
        return absolute(path);
    }
    Ok(source.to_owned())
}

/// The name that the container had.
async fn former_name(client: &Client, source: &str) -> Result<String> {
    let value = match checkpoint::local(source)? {
        Some(value) => value,
        None => checkpoint::remote(client, source).await?,
    };
    match value["container"].as_str() {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(Failure::Usage("the checkpoint does not say what the container was called: give --name".to_owned())),
    }
}

fn config(options: &Restore, image: String, name: &str) -> Result<ContainerConfig> {
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: image.clone(), user_specified_image: image, ..Default::default() }),
        log_path: options.log_path.clone().unwrap_or_else(|| format!("{name}.log")),
        mounts: options.mount.iter().map(|m| mount(m)).collect::<Result<_>>()?,
        tty: options.tty,
        ..Default::default()
    })
}

/// `HOST:CONTAINER[:ro]`.
fn mount(text: &str) -> Result<Mount> {
    let wrong = || Failure::Usage(format!("{text:?} is not a mount: give HOST:CONTAINER or HOST:CONTAINER:ro"));
    let parts: Vec<&str> = text.split(':').collect();
    let (host, container, readonly) = match parts[..] {
        [host, container] | [host, container, "rw"] => (host, container, false),
        [host, container, "ro"] => (host, container, true),
        _ => return Err(wrong()),
    };
    if host.is_empty() || !container.starts_with('/') {
        return Err(wrong());
    }
    Ok(Mount {
        host_path: absolute(Path::new(host))?,
        container_path: container.to_owned(),
        readonly,
        ..Default::default()
    })
}

/// Creates and starts; a container that does not start is removed again.
async fn create_and_start(
    client: &Client,
    pod_sandbox_id: String,
    config: ContainerConfig,
    name: &str,
    progress: &mut Progress,
) -> Result<String> {
    let mut runtime = client.runtime.clone();
    let step = |phase| Report { subject: "", phase, done: 0, total: 0 };
    progress.report(step("restoring"));
    let what = format!("restore {name}");
    // The daemon takes the pod's configuration from its own records.
    let request = CreateContainerRequest { pod_sandbox_id, config: Some(config), sandbox_config: None };
    let container_id = client.call_within(&what, None, runtime.create_container(request)).await?.container_id;
    progress.report(step("starting"));
    let request = StartContainerRequest { container_id: container_id.clone() };
    if let Err(failure) = client.call_within(&what, None, runtime.start_container(request)).await {
        let request = RemoveContainerRequest { container_id };
        // The failure that is told is the first one.
        let _ = client.call("remove what did not start", runtime.remove_container(request)).await;
        return Err(failure);
    }
    Ok(container_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts() {
        let parsed = mount("/srv/data:/data:ro").unwrap();
        assert_eq!(
            (parsed.host_path.as_str(), parsed.container_path.as_str(), parsed.readonly),
            ("/srv/data", "/data", true)
        );
        assert!(!mount("/a:/b").unwrap().readonly);
        for bad in ["", "/a", ":/b", "/a:b", "/a:/b:x", "/a:/b:ro:z"] {
            assert!(mount(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_path_goes_to_the_daemon_absolute() {
        assert_eq!(source("/var/x.tar").unwrap(), "/var/x.tar");
        assert!(source("./x.tar").unwrap().starts_with('/'));
        assert_eq!(source("registry.local/app:frozen").unwrap(), "registry.local/app:frozen");
    }
}
