//! Pulls that succeed.

use std::path::Path;
use std::sync::Arc;

use stasis_image::Auth;

use crate::build::{self, architecture, gzip_layer, image, noise, plain_layer, zstd_layer};
use crate::fixtures::{BreakingProxy, Node, RegistryServer, Reports};
use crate::http::Server;

/// Three layers in three compressions, with a whiteout on top.
fn three_layers() -> build::Built {
    let base =
        gzip_layer(&[("etc/", b""), ("etc/passwd", b"root:x:0:0"), ("etc/group", b"below"), ("gone/file", b"x")]);
    let middle = zstd_layer(&[("etc/group", b"middle"), (".wh.gone", b"")]);
    let top = plain_layer(&[("etc/group", b"top")]);
    image(&[base, middle, top], "three")
}

fn read(node: &Node, image: &stasis_image::Image, path: &str) -> Option<String> {
    let bytes = node.images.read_rootfs_file(image, path, 1000).expect("readable");
    bytes.map(|bytes| String::from_utf8(bytes).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_by_tag_and_by_digest() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let built = three_layers();
    let reference = format!("{}/test/three:1", registry.host());
    built.push(&reference, None).await;

    let reports = Reports::default();
    let pulled = node.images.pull(&reference, None, reports.sink()).await.expect("pull");
    let by_digest = format!("{}/test/three@{}", registry.host(), built.digest());
    assert_eq!(pulled.id, built.id());
    assert_eq!(pulled.references, [reference.as_str()]);
    assert_eq!(pulled.repo_digests, [by_digest.as_str()]);
    assert_eq!(pulled.manifest.to_string(), built.digest());
    assert_eq!(pulled.chain_ids.len(), 3);
    let blobs: usize = built.blobs().iter().map(|(_, blob)| blob.len()).sum();
    assert_eq!(pulled.size, (blobs + built.manifest.len()) as u64);
    let config = pulled.config.config().as_ref().expect("configuration");
    assert_eq!(config.user().as_deref(), Some("redis"));
    let labels = config.labels().as_ref().expect("labels");
    assert!(labels.contains_key("mark") && !labels.contains_key("io.stasis.x"));
    assert_eq!(node.images.config_json(&pulled).await.expect("configuration"), built.config);

    assert_eq!(read(&node, &pulled, "/etc/passwd").as_deref(), Some("root:x:0:0"));
    assert_eq!(read(&node, &pulled, "/etc/group").as_deref(), Some("top"));
    assert_eq!(read(&node, &pulled, "/gone/file"), None);
    for phase in ["resolving", "downloading", "unpacking"] {
        assert!(reports.has(phase), "{phase}: {:?}", reports.all());
    }

    let again = Reports::default();
    let same = node.images.pull(&by_digest, None, again.sink()).await.expect("pull by digest");
    assert_eq!((&same.id, &same.references), (&pulled.id, &pulled.references));
    assert!(again.has("exists") && !again.has("downloading") && !again.has("unpacking"), "{:?}", again.all());
    assert_eq!(node.images.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn dockers_types_and_indexes_work() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let docker = build::docker_image(&[gzip_layer(&[("etc/passwd", b"docker")])], "docker");
    docker.push(&format!("{}/d:1", registry.host()), None).await;
    let pulled = node.pull(&format!("{}/d:1", registry.host())).await.expect("pull a Docker image");
    assert_eq!(read(&node, &pulled, "/etc/passwd").as_deref(), Some("docker"));

    let ours = image(&[plain_layer(&[("etc/passwd", b"ours")])], "ours");
    let theirs = image(&[plain_layer(&[("etc/passwd", b"theirs")])], "theirs");
    ours.push(&format!("{}/multi:ours", registry.host()), None).await;
    theirs.push(&format!("{}/multi:theirs", registry.host()), None).await;
    let reference = format!("{}/multi:1", registry.host());
    let index = build::push_index(&reference, &[("mips64", &theirs), (architecture(), &ours)]).await;
    let pulled = node.pull(&reference).await.expect("pull an index");
    assert_eq!((pulled.id.clone(), pulled.target.to_string()), (ours.id(), index.clone()));
    assert_eq!(pulled.manifest.to_string(), ours.digest());
    assert_eq!(pulled.repo_digests, [format!("{}/multi@{index}", registry.host())]);
    assert_eq!(pulled.annotations.get("of").map(String::as_str), Some("the index"));
    assert_eq!(read(&node, &pulled, "/etc/passwd").as_deref(), Some("ours"));
    assert!(!node.has_blob(&theirs.digest()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_where_it_was_cut() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let big = noise(7, 6 << 20);
    let built = image(&[plain_layer(&[("big", &big)])], "cut");
    built.push(&format!("{}/cut:1", registry.host()), None).await;
    let proxy = BreakingProxy::start(registry.port(), 2 << 20, 2);
    let reports = Reports::default();
    let pulled = node.images.pull(&format!("{}/cut:1", proxy.host()), None, reports.sink()).await.expect("pull");
    assert!(proxy.broken.load(std::sync::atomic::Ordering::SeqCst) >= 2, "the proxy broke no connection");
    let done: Vec<u64> =
        reports.all().iter().filter(|report| report.phase == "downloading").map(|report| report.done).collect();
    assert!(done.is_sorted(), "a resumed download begins again: {done:?}");
    let unpacked = node.images.read_rootfs_file(&pulled, "/big", 8 << 20).expect("readable");
    assert!(unpacked.is_some_and(|bytes| bytes == big));
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_once_share_their_downloads() {
    let base = gzip_layer(&[("base", &noise(1, 300_000))]);
    let built = image(&[base, plain_layer(&[("top", &noise(2, 300_000))])], "shared");
    let (server, node) = (Server::of_image(&built, |_| None), Arc::new(Node::new()));
    let reference = format!("{}/shared:1", server.host());
    let pulls = (0..6).map(|_| {
        let (node, reference) = (node.clone(), reference.clone());
        tokio::spawn(async move { node.pull(&reference).await.expect("pull").id.clone() })
    });
    for pull in pulls.collect::<Vec<_>>() {
        assert_eq!(pull.await.unwrap(), built.id());
    }
    for layer in &built.layers {
        let digest = stasis_registry::sha256(&layer.blob);
        let fetched = server.requests().iter().filter(|request| request.path.ends_with(&digest)).count();
        assert_eq!(fetched, 1, "layer {digest}");
    }
    assert_eq!(node.images.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_tried_first_and_get_no_credentials() {
    let built = image(&[plain_layer(&[("f", b"x")])], "mirrored");
    let dead = Server::start(|_| crate::http::Answer::status(500));
    let mirror = Server::of_image(&built, |_| None);
    let hosts = tempfile::tempdir().unwrap();
    let dir = hosts.path().join("registry.invalid");
    std::fs::create_dir(&dir).unwrap();
    let text = format!(
        "[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://{}\"]\n",
        dead.host(),
        mirror.host()
    );
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
    let node = Node::with(|config| config.registry.hosts_dir = Some(hosts.path().to_owned()));
    let auth = Auth { username: "user".into(), password: "secret".into(), ..Auth::default() };
    let pulled = node.images.pull("registry.invalid/a/b:1", Some(auth), |_| {}).await.expect("pull");
    assert_eq!(pulled.references, ["registry.invalid/a/b:1"]);
    assert!(!dead.requests().is_empty());
    for request in mirror.requests().iter().chain(&dead.requests()) {
        assert_eq!(request.header("authorization"), None);
        assert!(request.path.ends_with("?ns=registry.invalid"), "{}", request.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_file_system_is_made_and_outlives_its_image() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let built = three_layers();
    let reference = format!("{}/rootfs:1", registry.host());
    built.push(&reference, None).await;
    let pulled = node.pull(&reference).await.expect("pull");
    let mounts = node.images.prepare_rootfs(&pulled, "container").await.expect("prepare");
    assert_eq!(node.images.rootfs_mounts("container").expect("mounts"), mounts);
    assert_eq!(node.images.rootfs_keys().expect("keys"), ["container"]);

    node.images.remove(&pulled.id).await.expect("remove");
    assert!(node.images.list().is_empty());
    let target = tempfile::tempdir().unwrap();
    {
        let _mounted = Mounted::new(&mounts, target.path());
        assert_eq!(std::fs::read_to_string(target.path().join("etc/group")).unwrap(), "top");
        assert!(!target.path().join("gone").exists());
        std::fs::write(target.path().join("new"), "written").unwrap();
    }
    assert_eq!(std::fs::read_to_string(node.images.upper_dir("container").join("new")).unwrap(), "written");
    assert!(node.images.usage("container").expect("usage").bytes > 0);
    for _ in 0..2 {
        node.images.remove_rootfs("container").await.expect("removing twice is no error");
    }
    node.assert_empty();
    let error = node.images.prepare_rootfs(&pulled, "late").await.expect_err("the image is gone");
    assert_eq!(error.kind(), stasis_image::Kind::NotFound);
}

struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(mounts: &[stasis_sys::mount::Mount], target: &'a Path) -> Mounted<'a> {
        let mounted = Mounted(target);
        for mount in mounts {
            stasis_sys::mount::mount(mount, target).expect("mount");
        }
        mounted
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = stasis_sys::mount::unmount_all_below(self.0);
    }
}
