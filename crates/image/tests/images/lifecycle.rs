//! Removal, restart, tags that move, images made on the node, and their way to another node.

use std::collections::BTreeMap;
use std::io::Write as _;

use stasis_image::{Images, NewLayer};
use stasis_registry::OCI_LAYER;

use crate::build::{docker_image, gzip_layer, image, noise, plain_layer, tar};
use crate::fixtures::{Node, RegistryServer, eventually, open};

#[tokio::test(flavor = "multi_thread")]
async fn removing_frees_what_no_other_image_needs() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let base = gzip_layer(&[("base", &noise(1, 100_000))]);
    let one = image(&[base.clone(), plain_layer(&[("one", b"1")])], "one");
    let two = image(&[base.clone(), plain_layer(&[("two", b"2")])], "two");
    let (first, second) = (format!("{}/one:1", registry.host()), format!("{}/two:1", registry.host()));
    one.push(&first, None).await;
    two.push(&second, None).await;
    node.pull(&first).await.expect("pull");
    let alone = node.images.fs_info().await.expect("usage");
    node.pull(&second).await.expect("pull");
    let both = node.images.fs_info().await.expect("usage");
    assert!(both.bytes > alone.bytes && both.bytes < alone.bytes + 100_000, "the base counts once: {alone:?} {both:?}");
    assert_eq!(node.blobs(), 7, "two manifests, two configurations, three layers");

    node.images.remove(&second).await.expect("remove by reference");
    assert_eq!(node.images.fs_info().await.expect("usage"), alone);
    assert_eq!(node.blobs(), 4);
    assert!(node.images.resolve(&second).is_none());
    let left = node.images.resolve(&first).expect("the other stays");
    assert!(node.images.read_rootfs_file(&left, "/base", 200_000).expect("readable").is_some());
    node.images.remove(&second).await.expect("removing twice is no error");
    node.images.remove(&one.id()[7..30]).await.expect("remove by a part of the ID");
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_images_and_clears_leftovers() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let built = image(&[gzip_layer(&[("f", b"x")])], "kept");
    let lost = image(&[plain_layer(&[("g", b"y")])], "lost");
    let (kept, gone) = (format!("{}/kept:1", registry.host()), format!("{}/lost:1", registry.host()));
    built.push(&kept, None).await;
    lost.push(&gone, None).await;
    let before = node.pull(&kept).await.expect("pull");
    node.pull(&gone).await.expect("pull");

    let content = stasis_content::Content::open(node.path()).expect("blobs");
    let mut garbage = content.writer().expect("writer");
    garbage.write_all(b"of a pull that a crash ended").unwrap();
    let (garbage, _) = garbage.commit(None, None).expect("commit");
    content.delete(&stasis_registry::sha256(&lost.layers[0].blob).parse().unwrap()).expect("damage");

    let node = node.reopen().expect("reopen");
    let after = node.images.resolve(&kept).expect("kept");
    assert_eq!(
        (&after.id, &after.references, &after.repo_digests),
        (&before.id, &before.references, &before.repo_digests)
    );
    assert_eq!((after.size, &after.chain_ids, &after.config), (before.size, &before.chain_ids, &before.config));
    assert!(node.images.resolve(&gone).is_none(), "an image that is not whole is dropped");
    assert!(!node.has_blob(&garbage.to_string()));
    assert_eq!(node.blobs(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_a_newer_release_stops_the_start_in_words() {
    let dir = Node::new().close();
    {
        let db = redb::Database::create(dir.path().join("meta.redb")).unwrap();
        let write = db.begin_write().unwrap();
        let table = redb::TableDefinition::<&str, &[u8]>::new("images");
        write.open_table(table).unwrap().insert("sha256:x", &b"\x63{}"[..]).unwrap();
        write.commit().unwrap();
    }
    let text = open(dir.path(), |_| {}).expect_err("an unknown version").to_string();
    assert!(text.contains("version 99") && text.contains("newer release"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves_and_the_old_image_keeps_its_digest() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let reference = format!("{}/moving:1", registry.host());
    let old = image(&[plain_layer(&[("v", b"1")])], "old");
    let new = image(&[plain_layer(&[("v", b"2")])], "new");
    old.push(&reference, None).await;
    node.pull(&reference).await.expect("pull");
    new.push(&reference, None).await;
    node.pull(&reference).await.expect("pull again");

    let node = node.reopen().expect("reopen");
    assert_eq!(node.images.resolve(&reference).expect("named").id, new.id());
    let untagged = node.images.resolve(&old.id()).expect("kept");
    assert!(untagged.references.is_empty());
    assert_eq!(untagged.repo_digests, [format!("{}/moving@{}", registry.host(), old.digest())]);
    assert_eq!(node.images.resolve(&untagged.repo_digests[0]).expect("named by digest").id, old.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_image_under_two_manifests_is_one_image() {
    let (registry, node) = (RegistryServer::start(), Node::new());
    let layers = [gzip_layer(&[("f", b"x")])];
    let (oci, docker) = (image(&layers, "twice"), docker_image(&layers, "twice"));
    let (first, second) = (format!("{}/twice:oci", registry.host()), format!("{}/twice:docker", registry.host()));
    oci.push(&first, None).await;
    docker.push(&second, None).await;
    node.pull(&first).await.expect("pull");
    let both = node.pull(&second).await.expect("pull");
    assert_eq!((both.id.clone(), both.manifest.to_string()), (oci.id(), docker.digest()));
    assert_eq!(both.references, [second.as_str(), first.as_str()]);
    assert_eq!(both.repo_digests.len(), 2);
    assert_eq!(node.images.list().len(), 1);
    eventually("the manifest that nobody names is collected", || !node.has_blob(&oci.digest()));
    assert!(node.has_blob(&docker.digest()));
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_images_are_marked() {
    let registry = RegistryServer::start();
    let reference = format!("{}/pinned:1", registry.host());
    image(&[], "pinned").push(&reference, None).await;
    let node = Node::with(|config| config.pinned = vec![reference.clone()]);
    assert!(node.pull(&reference).await.expect("pull an image without layers").pinned);
}

fn checkpoint_layer(dir: &std::path::Path) -> NewLayer {
    let file = dir.join("layer.tar");
    let bytes = tar(&[("config.dump", b"{}"), ("checkpoint/", b""), ("checkpoint/pages-1.img", &noise(9, 1 << 20))]);
    std::fs::write(&file, bytes).unwrap();
    NewLayer { file, media_type: OCI_LAYER.to_owned(), known: None }
}

async fn add(images: &Images, reference: &str, dir: &std::path::Path) -> std::sync::Arc<stasis_image::Image> {
    let config =
        format!(r#"{{"architecture":"{}","os":"linux","config":{{"User":"redis"}}}}"#, crate::build::architecture());
    let annotations = BTreeMap::from([("org.criu.checkpoint.container.name".to_owned(), "counter".to_owned())]);
    images
        .add(reference, config.into_bytes(), None, vec![checkpoint_layer(dir)], annotations, |_| {})
        .await
        .expect("add")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_becomes_an_image_and_travels() {
    let (registry, here, there) = (RegistryServer::start(), Node::new(), Node::new());
    let dir = tempfile::tempdir().unwrap();
    let reference = format!("{}/checkpoints/counter:1", registry.host());
    let added = add(&here.images, &reference, dir.path()).await;
    assert!(added.is_checkpoint());
    assert_eq!(added.config.config().as_ref().and_then(|config| config.user().as_deref()), Some("redis"));
    let members = here.images.checkpoint_dir(&added).expect("a checkpoint");
    assert_eq!(std::fs::read(members.join("checkpoint/pages-1.img")).unwrap(), noise(9, 1 << 20));
    std::fs::remove_file(dir.path().join("layer.tar")).expect("the file is still there");

    let digest = here.images.push(&added.id, None, None, |_| {}).await.expect("push");
    let named = here.images.resolve(&added.id).expect("image");
    assert_eq!(named.repo_digests, [format!("{}/checkpoints/counter@{digest}", registry.host())]);

    let pulled = there.pull(&reference).await.expect("pull elsewhere");
    assert_eq!((&pulled.id, &pulled.target, &pulled.annotations), (&added.id, &digest, &added.annotations));
    let found = there.images.resolve(&pulled.id).expect("by ID");
    let members = there.images.checkpoint_dir(&found).expect("a checkpoint, found by ID");
    assert_eq!(std::fs::read(members.join("config.dump")).unwrap(), b"{}");
    here.images.remove(&added.id).await.expect("remove");
    here.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_added_leaves_nothing() {
    let node = Node::new();
    let missing = NewLayer { file: "/no/such/layer.tar".into(), media_type: OCI_LAYER.to_owned(), known: None };
    let no_annotations = BTreeMap::new;
    for (reference, config, layer) in
        [("r.example/a:1", "{}", missing), ("r.example/a:1", "[]", checkpoint_layer(node.path()))]
    {
        let added = node.images.add(reference, config.into(), None, vec![layer], no_annotations(), |_| {}).await;
        added.expect_err("must be refused");
        node.assert_empty();
    }
}
