//! Pulls that fail: each says why, and leaves nothing.

use stasis_image::Kind;
use stasis_registry::{OCI_CONFIG, OCI_MANIFEST, sha256};

use crate::build::{Built, Layer, image, noise, plain_layer, push_index, tar, with_config};
use crate::fixtures::{BreakingProxy, Node, RegistryServer, Reports, eventually, open};
use crate::http::{Answer, Request, Server};

fn small() -> Built {
    image(&[plain_layer(&[("f", b"content")])], "small")
}

/// Pulls from a server that answers `change` instead of the truth, and gives the error's words.
async fn fails(
    built: &Built,
    reference: &str,
    kind: Kind,
    change: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
) -> String {
    let (server, node) = (Server::of_image(built, change), Node::new());
    let error = node.pull(&format!("{}/{reference}", server.host())).await.expect_err("a lie was believed");
    assert_eq!(error.kind(), kind, "{error}");
    node.assert_empty();
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_cut_off_for_good_is_named_with_the_place() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let built = image(&[plain_layer(&[("big", &noise(3, 2 << 20))])], "cut");
    built.push(&format!("{}/cut:1", registry.host()), None).await;
    let proxy = BreakingProxy::start(registry.port(), 200 << 10, usize::MAX);
    let error = node.pull(&format!("{}/cut:1", proxy.host())).await.expect_err("the connection always breaks");
    assert_eq!(error.kind(), Kind::Unavailable);
    let text = error.to_string();
    assert!(text.contains("interrupted at byte") && text.contains(&proxy.host()), "{text}");
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_dies_in_mid_pull_leaves_nothing() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let built = image(&[plain_layer(&[("a", &noise(4, 1 << 20))]), plain_layer(&[("b", &noise(5, 8 << 20))])], "dies");
    let reference = format!("{}/dies:1", registry.host());
    built.push(&reference, None).await;
    let reports = Reports::default();
    let stopper = std::sync::Mutex::new(Some(registry));
    let sink = reports.sink();
    let result = node
        .images
        .pull(&reference, None, move |report| {
            if report.phase == "downloading" && report.done > 0 {
                drop(stopper.lock().unwrap().take());
            }
            sink(report);
        })
        .await;
    // The bytes that were on their way may have sufficed; then the image is whole.
    if let Err(error) = result {
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        node.assert_empty();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_blobs_are_found_out() {
    let built = small();
    let layer = sha256(&built.layers[0].blob);
    let (of, mut other) = (layer.clone(), built.layers[0].blob.clone());
    other[0] ^= 1;
    let text =
        fails(&built, "x:1", Kind::DataLoss, move |r| r.path.ends_with(&of).then(|| Answer::ok(other.clone()))).await;
    assert!(text.contains(&layer), "{text}");

    let of = layer.clone();
    let text = fails(&built, "x:1", Kind::DataLoss, move |r| r.path.ends_with(&of).then(|| Answer::ok("short"))).await;
    assert!(text.contains("5 bytes"), "{text}");

    let (config, id) = (built.id(), built.id());
    let text = fails(&built, "x:1", Kind::DataLoss, move |r| r.path.ends_with(&config).then(|| Answer::ok("{}"))).await;
    assert!(text.contains(&id), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_manifests_are_found_out() {
    let built = small();
    let wanted = sha256(b"another manifest");
    let text = fails(&built, &format!("x@{wanted}"), Kind::DataLoss, |_| None).await;
    assert!(text.contains(&wanted) && text.contains(&built.digest()), "{text}");

    let huge = vec![b' '; (4 << 20) + 1];
    let text = fails(&built, "x:1", Kind::FailedPrecondition, move |r| {
        r.path.contains("/manifests/").then(|| Answer::ok(huge.clone()))
    })
    .await;
    assert!(text.contains("larger than the 4194304 bytes"), "{text}");

    let both = String::from_utf8(built.manifest.clone()).unwrap().replacen('{', "{\"manifests\":[],", 1);
    let text = fails(&built, "x:1", Kind::FailedPrecondition, move |r| {
        r.path.contains("/manifests/").then(|| Answer::ok(both.clone()))
    })
    .await;
    assert!(text.contains("both"), "{text}");

    // A size that is not that of the bytes, as it would be summed up with others for ever.
    let text = String::from_utf8(built.manifest.clone()).unwrap();
    let at = text.find("\"size\":").unwrap() + "\"size\":".len();
    let digits = text[at..].find(|c: char| !c.is_ascii_digit()).unwrap();
    let inflated = format!("{}{}{}", &text[..at], u64::MAX / 2, &text[at + digits..]);
    let text = fails(&built, "x:1", Kind::FailedPrecondition, move |r| {
        r.path.contains("/manifests/").then(|| Answer::ok(inflated.clone()))
    })
    .await;
    assert!(text.contains("bytes of its configuration"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    let layer = plain_layer(&[("f", b"content")]);
    let claims = Layer { diff_id: sha256(b"something else"), ..layer };
    let built = image(&[claims], "wrong diff ID");
    let text = fails(&built, "x:1", Kind::FailedPrecondition, |_| None).await;
    assert!(text.contains("diff ID"), "{text}");

    let mut cut = tar(&[("f", &noise(1, 5000))]);
    cut.truncate(2000);
    let diff_id = sha256(&cut);
    let built = image(&[Layer { blob: cut, diff_id, ..plain_layer(&[]) }], "a torn tar");
    let text = fails(&built, "x:1", Kind::FailedPrecondition, |_| None).await;
    assert!(text.contains("cannot be unpacked"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_for_us_is_refused_before_it_is_fetched() {
    let layer = plain_layer(&[("f", b"content")]);
    let artifact = with_config(
        std::slice::from_ref(&layer),
        b"{}".to_vec(),
        (OCI_MANIFEST, "application/vnd.cncf.helm.config.v1+json"),
    );
    let text = fails(&artifact, "x:1", Kind::FailedPrecondition, |_| None).await;
    assert!(text.contains("helm"), "{text}");

    let strange = Layer { media_type: "application/x-thing", ..layer.clone() };
    let text = fails(&image(&[strange], "strange"), "x:1", Kind::FailedPrecondition, |_| None).await;
    assert!(text.contains("application/x-thing"), "{text}");

    let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let uneven = with_config(&[layer], config.to_vec(), (OCI_MANIFEST, OCI_CONFIG));
    let text = fails(&uneven, "x:1", Kind::FailedPrecondition, |_| None).await;
    assert!(text.contains("1 layers, its configuration 0"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_to_be_missing() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let error = node.pull(&format!("{}/nothing:1", registry.host())).await.expect_err("nothing was pushed");
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains(&format!("{}/nothing:1 not found", registry.host())), "{error}");

    let foreign = small();
    foreign.push(&format!("{}/multi:only", registry.host()), None).await;
    push_index(&format!("{}/multi:1", registry.host()), &[("mips64", &foreign)]).await;
    let error = node.pull(&format!("{}/multi:1", registry.host())).await.expect_err("no image for us");
    assert!(error.to_string().contains("it has: linux/mips64"), "{error}");

    let host = registry.host();
    drop(registry);
    let error = node.pull(&format!("{host}/nothing:1")).await.expect_err("the registry is down");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains(&host), "{error}");
    let error = node.pull("Not/A/Reference").await.expect_err("no reference");
    assert_eq!(error.kind(), Kind::InvalidArgument);
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_given_up_leaves_nothing() {
    let built = image(&[plain_layer(&[("a", b"a")]), plain_layer(&[("b", &noise(6, 2 << 20))])], "slow");
    let slow = sha256(&built.layers[1].blob);
    let blob = built.layers[1].blob.clone();
    let server = Server::of_image(&built, move |request| {
        request.path.ends_with(&slow).then(|| Answer { stall_after: Some(1 << 20), ..Answer::ok(blob.clone()) })
    });
    let node = Node::new();
    let reports = Reports::default();
    let (images, reference, sink) = (node.images.clone(), format!("{}/slow:1", server.host()), reports.sink());
    let pull = tokio::spawn(async move { images.pull(&reference, None, sink).await.map(drop) });
    let arrived = reports.clone();
    tokio::task::spawn_blocking(move || {
        eventually("half of it arrived", || arrived.all().iter().any(|report| report.done >= 512 << 10));
    })
    .await
    .unwrap();
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    node.assert_empty();
}

/// A small file system, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> SmallDisk {
        let disk = SmallDisk(tempfile::tempdir().unwrap());
        stasis_sys::mount::tmpfs(disk.0.path(), bytes, 0o700, &[]).expect("mount a tmpfs, as root");
        disk
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = stasis_sys::mount::unmount_all_below(self.0.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_to_be_full_and_is_free_again() {
    let built = image(&[plain_layer(&[("big", &noise(8, 6 << 20))])], "full");
    let server = Server::of_image(&built, |_| None);
    // Too small for the blob; large enough for the blob, too small for the unpacked layer.
    for megabytes in [4, 9] {
        let disk = SmallDisk::new(megabytes << 20);
        let images = open(disk.0.path(), |_| {}).expect("open the images");
        let free = stasis_sys::file::available_bytes(disk.0.path()).unwrap();
        let error = images.pull(&format!("{}/full:1", server.host()), None, |_| {}).await.expect_err("no space");
        assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
        assert!(error.to_string().contains("No space left"), "{error}");
        assert!(images.list().is_empty());
        eventually("the space is free again", || {
            stasis_sys::file::available_bytes(disk.0.path()).unwrap() + 4096 >= free
        });
    }
}
