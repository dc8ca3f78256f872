//! An archive that was edited: what it claims decides nothing, the live request does.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stasis_cri_api::runtime::LinuxContainerResources;
use stasis_e2e::{COUNTER, Stage, check, counts, counts_beyond};
use tonic::Code;
use xtask::cri::{Container, container_config, refusal};
use xtask::node::Setup;

/// What the request allows.
const MEMORY: i64 = 200 << 20;

#[test]
fn a_forged_archive_decides_nothing() {
    check("forged", Setup::default(), async |stage| {
        stage.import(&["busybox", "counter"])?;
        let pod = stage.pod("first").await?;
        let counter = stage.container(&pod, container_config("counter", COUNTER, &[])).await?;
        counts_beyond(&counter, 3).await?;
        let (good, evil) = (stage.archive("good.tar"), stage.archive("evil.tar"));
        stage.node.cri.checkpoint(&counter, &good).await?;
        stage.remove(&pod).await?;
        let images = stage.node.cri.list_images().await?;

        let proof = stage.node.ground.disk.join("the-hook-ran");
        forge(&good, &evil, |name, document| match name {
            "config.dump" => {
                document["name"] = json!("../../../evil");
                document["ociRuntime"] = json!("/bin/false");
            }
            "spec.dump" => claim_everything(document, &proof),
            _ => {}
        })?;
        let pod = stage.pod("second").await?;
        let mut config = container_config("counter", &evil.display().to_string(), &[]);
        config.labels = HashMap::from([("label".to_owned(), "of the request".to_owned())]);
        config.annotations = HashMap::from([("annotation".to_owned(), "of the request".to_owned())]);
        let linux = config.linux.as_mut().context("no linux part")?;
        linux.resources =
            Some(LinuxContainerResources { memory_limit_in_bytes: MEMORY, ..LinuxContainerResources::default() });
        let (labels, annotations) = (config.labels.clone(), config.annotations.clone());
        let restored = stage.container(&pod, config).await?;
        let carried = counts(&restored).last().copied().unwrap_or_default();
        counts_beyond(&restored, carried + 3).await?;

        let status = stage.node.cri.status(&restored).await?;
        assert_eq!((status.labels, status.annotations), (labels, annotations));
        assert_eq!(memory_limit(stage, &restored).await?, MEMORY as u64);
        ensure!(!proof.exists(), "a hook of the archive ran");
        assert_eq!(stage.node.cri.list_images().await?, images, "a reference was made out of an archive");
        stage.remove(&pod).await?;

        // A mount that the request does not have is refused, and its source never looked at.
        forge(&good, &evil, |name, document| {
            if name == "spec.dump"
                && let Some(mounts) = document["mounts"].as_array_mut()
            {
                mounts.push(json!({ "destination": "/host", "source": "/", "type": "bind", "options": ["rbind"] }));
            }
        })?;
        let pod = stage.pod("third").await?;
        let config = container_config("counter", &evil.display().to_string(), &[]);
        let (code, message) = refusal(stage.node.cri.create(&pod, config.clone()).await)?;
        assert_eq!(code, Code::InvalidArgument);
        assert!(message.contains("/host"), "names the mount: {message}");

        // Another image has the name by now: the memory must not be laid upon its files.
        forge(&good, &evil, |name, document| {
            if name == "config.dump" {
                document["rootfsImageRef"] = json!(format!("sha256:{}", "0".repeat(64)));
                document["rootfsImageID"] = json!("0".repeat(64));
                document["rootfsImageName"] = json!(COUNTER);
                document["rootfsImage"] = json!(COUNTER);
            }
        })?;
        let (code, message) = refusal(stage.node.cri.create(&pod, config).await)?;
        assert_eq!(code, Code::FailedPrecondition, "{message}");
        assert!(message.contains(COUNTER), "names the image: {message}");
        stage.remove(&pod).await
    });
}

/// A specification that grants itself what there is.
fn claim_everything(spec: &mut Value, proof: &Path) {
    let hook = json!([{ "path": "/bin/touch", "args": ["touch", proof.display().to_string()] }]);
    spec["hooks"] = json!({
        "prestart": hook, "createRuntime": hook, "createContainer": hook, "startContainer": hook, "poststart": hook,
    });
    spec["annotations"] = json!({ "evil": "yes", "org.criu.config": "/etc/passwd" });
    spec["root"] = json!({ "path": "/", "readonly": false });
    spec["linux"]["resources"] = json!({ "memory": { "limit": -1 }, "devices": [{ "allow": true, "access": "rwm" }] });
    spec["linux"]["maskedPaths"] = json!([]);
    spec["linux"]["readonlyPaths"] = json!([]);
    spec["linux"]["cgroupsPath"] = json!("/");
    spec["linux"]["seccomp"] = Value::Null;
    spec["process"]["noNewPrivileges"] = json!(false);
}

/// Copies an archive with its JSON documents edited.
fn forge(from: &Path, to: &Path, edit: impl Fn(&str, &mut Value)) -> Result<()> {
    let out = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to)?;
    let mut out = tar::Builder::new(out);
    let mut archive = tar::Archive::new(File::open(from)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let (path, mut header) = (entry.path()?.into_owned(), entry.header().clone());
        let name = path.display().to_string();
        if !name.ends_with(".dump") {
            out.append_data(&mut header, &path, &mut entry)?;
            continue;
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        let mut document: Value = serde_json::from_slice(&bytes).with_context(|| format!("{name} is no JSON"))?;
        edit(&name, &mut document);
        let bytes = serde_json::to_vec(&document)?;
        header.set_size(bytes.len() as u64);
        out.append_data(&mut header, &path, bytes.as_slice())?;
    }
    out.finish()?;
    Ok(())
}

/// The limit in the control group of a container's first process.
async fn memory_limit(stage: &mut Stage, container: &Container) -> Result<u64> {
    let groups = fs::read_to_string(stage.process(container).await?.join("cgroup"))?;
    let of = |controller: &str| {
        groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            (controllers == controller).then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let file = match of("memory") {
        Some(path) => Path::new("/sys/fs/cgroup/memory").join(path).join("memory.limit_in_bytes"),
        None => {
            Path::new("/sys/fs/cgroup").join(of("").context("the process is in no control group")?).join("memory.max")
        }
    };
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    text.trim().parse().with_context(|| format!("{} has {text:?}", file.display()))
}
