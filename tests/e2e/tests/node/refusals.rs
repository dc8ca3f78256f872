//! What a node lacks or is asked wrongly: words that a stranger can act on, and nothing left behind.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use rustix::mount::{MountFlags, mount, mount_remount};
use stasis_cri_api::runtime::{ContainerFilter, StatusRequest};
use stasis_e2e::{Stage, check, check_on, ground, shell};
use tonic::Code;
use xtask::cri::{container_config, refusal};
use xtask::layout::Image;
use xtask::node::{Network, Setup};
use xtask::process::{SHORT, ask};
use xtask::registry::Registry;

/// Enough for the state database, too little for an image.
const SMALL_DISK: &str = "size=3m";

#[test]
fn without_a_network_configuration_no_pod_is_left_half_made() {
    let setup = Setup { network: Network::Absent, ..Setup::default() };
    check("nonet", setup, async |stage| {
        let status = stage.node.cri.runtime.status(StatusRequest { verbose: false }).await?.into_inner();
        let conditions = status.status.map(|status| status.conditions).unwrap_or_default();
        let network = conditions.iter().find(|condition| condition.r#type == "NetworkReady").unwrap();
        assert!(!network.status && !network.reason.is_empty(), "{network:?}");
        let dir = stage.node.ground.cni().display().to_string();
        assert!(network.message.contains(&dir), "{network:?}");
        let (code, message) = refusal(stage.pod("pod").await)?;
        assert_eq!(code, Code::FailedPrecondition);
        assert!(message.contains(&dir), "says where a configuration is missing: {message}");
        assert!(stage.node.cri.list_pods().await?.is_empty());
        assert!(stage.node.shims()?.is_empty());
        Ok(())
    });
}

#[test]
fn what_is_asked_wrongly_is_refused_in_words() {
    check("wrong", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        images(stage).await?;
        pods_and_containers(stage).await?;
        wrong_socket(stage)
    });
}

async fn images(stage: &mut Stage) -> Result<()> {
    // Nobody listens there: a registry that is down.
    let (code, message) = refusal(stage.node.cri.pull("127.0.0.1:1/app:1").await)?;
    assert_eq!(code, Code::Unavailable);
    assert!(message.contains("127.0.0.1:1"), "names the registry: {message}");

    let mut registry = Registry::start(&stage.places.engines(), &stage.node.ground.registry())?;
    let image = Image::read(&stage.places.images().join("busybox.tar"))?;
    let reference = registry.push(&image, "busybox", "latest")?;
    let absent = format!("{}/busybox:absent", registry.name());
    let (code, message) = refusal(stage.node.cri.pull(&absent).await)?;
    assert_eq!(code, Code::NotFound);
    assert!(message.contains(&absent), "{message}");
    stage.node.cri.pull(&reference).await?;
    registry.end()?;
    let (code, _) = refusal(stage.node.cri.pull(&absent).await)?;
    assert_eq!(code, Code::Unavailable);
    Ok(())
}

async fn pods_and_containers(stage: &mut Stage) -> Result<()> {
    let (code, message) = refusal(stage.node.cri.run_pod_with(stage.node.pod_config("pod"), "absent").await)?;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.contains("\"absent\"") && message.contains("runc"), "names those that exist: {message}");

    let pod = stage.pod("pod").await?;
    let missing = container_config("main", "localhost/absent:1", &["true"]);
    let (code, message) = refusal(stage.node.cri.create(&pod, missing).await)?;
    assert_eq!(code, Code::NotFound);
    assert!(message.contains("localhost/absent:1") && message.contains("pull"), "{message}");

    let mut source = shell("main", "true");
    source.mounts.push(stasis_cri_api::runtime::Mount {
        container_path: "/data".into(),
        host_path: "/no/such/dir".into(),
        ..Default::default()
    });
    let (code, message) = refusal(stage.node.cri.create(&pod, source).await)?;
    assert!(message.contains("/no/such/dir"), "{code:?} {message}");

    let mut user = shell("main", "true");
    let linux = user.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().run_as_username = "nobody-of-that-name".into();
    let (code, message) = refusal(stage.node.cri.create(&pod, user).await)?;
    assert!(message.contains("nobody-of-that-name"), "{code:?} {message}");

    // None of them holds the name.
    assert!(stage.node.cri.list(ContainerFilter::default()).await?.is_empty());
    stage.script(&pod, "main", "exec sleep 1000").await?;
    stage.remove(&pod).await
}

fn wrong_socket(stage: &Stage) -> Result<()> {
    let socket = stage.node.ground.run.join("nobody.sock");
    let mut command = Command::new(stage.places.command_line());
    let said = ask(command.arg("--address").arg(&socket).arg("ps"), SHORT)?;
    assert_eq!(said.status.code(), Some(3), "{said:?}");
    assert!(said.stderr.contains(&socket.display().to_string()), "names the socket: {}", said.stderr);
    Ok(())
}

#[test]
fn a_full_disk_is_told_and_leaves_room() {
    let ground = ground("full");
    let root = ground.root();
    mount("tmpfs", &root, "tmpfs", MountFlags::empty(), Some(&*std::ffi::CString::new(SMALL_DISK).unwrap())).unwrap();
    let expected = [format!("mount {}", root.display())];
    check_on(ground, Setup::default(), &expected, async |stage| {
        let registry = Registry::start(&stage.places.engines(), &stage.node.ground.registry())?;
        let image = Image::read(&stage.places.images().join("redis.tar"))?;
        let reference = registry.push(&image, "redis", "latest")?;
        let (code, message) = refusal(stage.node.cri.pull(&reference).await)?;
        assert_eq!(code, Code::ResourceExhausted, "{message}");
        assert!(message.contains("space"), "{message}");
        assert!(stage.node.cri.list_images().await?.is_empty());
        for dir in ["content/ingest", "snapshots/tmp", "snapshots/layers"] {
            let left: Vec<_> = fs::read_dir(root.join(dir)).into_iter().flatten().flatten().collect();
            assert!(left.is_empty(), "left in {dir}: {left:?}");
        }
        // With more room the same pull works.
        let more = std::ffi::CString::new("size=100m")?;
        mount_remount(&root, MountFlags::empty(), &*more)?;
        stage.node.cri.pull(&reference).await?;

        // With none left, nothing is half created.
        let pod = stage.pod("pod").await?;
        let filler = root.join("filler");
        fill(&filler)?;
        let (code, message) = refusal(stage.node.cri.create(&pod, container_config("main", &reference, &[])).await)?;
        assert_eq!(code, Code::ResourceExhausted, "{message}");
        let (code, message) = refusal(stage.pod("second").await)?;
        assert_eq!(code, Code::ResourceExhausted, "{message}");
        fs::remove_file(&filler)?;
        assert_eq!(stage.node.cri.list_pods().await?, std::slice::from_ref(&pod.id));
        assert!(stage.node.cri.list(ContainerFilter::default()).await?.is_empty());
        let active: Vec<_> = fs::read_dir(root.join("snapshots/active"))?.collect();
        assert!(active.is_empty(), "{active:?}");
        stage.container(&pod, container_config("main", &reference, &["sleep", "1000"])).await?;
        stage.remove(&pod).await
    });
}

/// Writes a file until the disk is full.
fn fill(path: &Path) -> Result<()> {
    let mut file = fs::File::create(path)?;
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
    Ok(())
}
