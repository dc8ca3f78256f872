//! Import and export.

use std::path::{Path, PathBuf};

use stasis_image::Kind;
use stasis_registry::sha256;

use crate::build::{Built, gzip, gzip_layer, image, plain_layer, tar, zstd_layer};
use crate::fixtures::{Node, RegistryServer};

fn built() -> Built {
    let base = gzip_layer(&[("etc/passwd", b"archived")]);
    image(&[base, zstd_layer(&[("z", b"z")]), plain_layer(&[("p", b"p")])], "archived")
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Members of an archive: names and contents.
type Members = Vec<(String, Vec<u8>)>;

/// The members of an OCI layout with one image.
fn layout(built: &Built, annotations: &str) -> Members {
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{}","size":{},"annotations":{{{annotations}}}}}]}}"#,
        built.media_type,
        built.digest(),
        built.manifest.len()
    );
    let mut members = vec![
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".to_owned(), index.into_bytes()),
    ];
    let blobs = built.blobs().into_iter().chain([(built.digest(), built.manifest.clone())]);
    members.extend(blobs.map(|(digest, blob)| (format!("blobs/{}", digest.replace(':', "/")), blob)));
    members
}

fn tar_of(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    tar(&members)
}

async fn check_import(path: &Path, reference: Option<&str>, built: &Built, references: &[&str]) {
    let node = Node::new();
    let images = node.images.import(path, reference, |_| {}).await.expect("import");
    assert_eq!(images.len(), 1);
    assert_eq!(
        (&images[0].id, &images[0].references[..]),
        (&built.id(), &references.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>()[..])
    );
    let passwd = node.images.read_rootfs_file(&images[0], "/etc/passwd", 100).expect("readable");
    assert_eq!(passwd.as_deref(), Some(&b"archived"[..]));
    node.images.remove(references[0]).await.expect("remove");
    node.assert_empty();
}

async fn refused(path: &Path, reference: Option<&str>, words: &str) {
    let node = Node::new();
    let error = node.images.import(path, reference, |_| {}).await.expect_err(words);
    let text = error.to_string();
    assert!(text.contains(words), "{words:?} in {text:?}");
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_comes_back_the_same() {
    let (registry, node, dir) = (RegistryServer::start(), Node::new(), tempfile::tempdir().unwrap());
    let built = built();
    let reference = format!("{}/exported:1", registry.host());
    built.push(&reference, None).await;
    let pulled = node.pull(&reference).await.expect("pull");
    let path = dir.path().join("image.tar");
    node.images.export(&reference, &path, |_| {}).await.expect("export");
    node.images.export(&reference, &path, |_| {}).await.expect("export over an existing file");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");

    let other = Node::new();
    let images = other.images.import(&path, None, |_| {}).await.expect("import");
    assert_eq!(
        (&images[0].id, &images[0].target, &images[0].references),
        (&pulled.id, &pulled.target, &pulled.references)
    );
    other.images.push(&reference, Some(&format!("{}/again:1", registry.host())), None, |_| {}).await.expect("push");
    assert_eq!(node.pull(&format!("{}/again:1", registry.host())).await.expect("pull").id, pulled.id);

    // As `docker load` reads it: by manifest.json alone.
    let mut members = Vec::new();
    let mut archive = tar::Archive::new(std::fs::File::open(&path).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        members.push((entry.path().unwrap().to_str().unwrap().to_owned(), bytes));
    }
    members.retain(|(name, _)| name != "index.json" && name != "oci-layout");
    check_import(&write(dir.path(), "docker.tar", &tar_of(&members)), None, &built, &[&reference]).await;

    let missing = node.images.export("r.example/nothing:1", &path, |_| {}).await.expect_err("no such image");
    assert_eq!(missing.kind(), Kind::NotFound);
    let nowhere =
        node.images.export(&reference, Path::new("/no/such/dir/x.tar"), |_| {}).await.expect_err("no such place");
    assert_eq!(nowhere.kind(), Kind::InvalidArgument, "{nowhere}");
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_are_imported_from_tars_and_directories() {
    let (built, dir) = (built(), tempfile::tempdir().unwrap());
    let named =
        layout(&built, r#""io.containerd.image.name":"r.example/a/b:1","org.opencontainers.image.ref.name":"1""#);
    let plain = tar_of(&named);
    check_import(&write(dir.path(), "plain.tar", &plain), None, &built, &["r.example/a/b:1"]).await;
    check_import(&write(dir.path(), "x.tar.gz", &gzip(&plain)), None, &built, &["r.example/a/b:1"]).await;
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    check_import(&write(dir.path(), "x.tar.zst", &zstd), Some("other:2"), &built, &["docker.io/library/other:2"]).await;
    let layout_dir = dir.path().join("layout");
    for (name, bytes) in &named {
        write(&layout_dir, name, bytes);
    }
    std::os::unix::fs::symlink("/etc", layout_dir.join("link")).unwrap();
    check_import(&layout_dir, None, &built, &["r.example/a/b:1"]).await;

    let unnamed =
        write(dir.path(), "unnamed.tar", &tar_of(&layout(&built, r#""org.opencontainers.image.ref.name":"latest""#)));
    refused(&unnamed, None, "give a reference").await;
    check_import(&unnamed, Some("r.example/named:1"), &built, &["r.example/named:1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_docker_archives_are_imported() {
    let dir = tempfile::tempdir().unwrap();
    let layers =
        [plain_layer(&[("etc/passwd", b"archived")]), plain_layer(&[("x", b"x")]), plain_layer(&[("x", b"x")])];
    let built = image(&layers, "old");
    let config = format!("{}.json", &built.id()[7..]);
    let manifest = serde_json::json!([{
        "Config": config, "RepoTags": ["old:1", "r.example/old:1"], "Layers": ["aa/layer.tar", "bb/layer.tar", "cc/layer.tar"],
    }]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut append = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes).unwrap();
    };
    append("aa/VERSION", b"1.0");
    append("aa/json", b"{}");
    append("aa/layer.tar", &layers[0].blob);
    append("bb/layer.tar", &layers[1].blob);
    append(&config, &built.config);
    append("manifest.json", manifest.to_string().as_bytes());
    append("repositories", b"{}");
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "cc/layer.tar", "../bb/layer.tar").unwrap();
    let path = write(dir.path(), "old.tar", &builder.into_inner().unwrap());
    check_import(&path, None, &built, &["docker.io/library/old:1", "r.example/old:1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_and_broken_archives_are_refused() {
    let (built, dir) = (built(), tempfile::tempdir().unwrap());
    let good = layout(&built, r#""io.containerd.image.name":"r.example/a:1""#);
    let with = |change: &dyn Fn(&mut Members)| {
        let mut members = good.clone();
        change(&mut members);
        write(dir.path(), "x.tar", &tar_of(&members))
    };
    let layer = format!("blobs/{}", sha256(&built.layers[0].blob).replace(':', "/"));

    refused(&with(&|m| m.iter_mut().find(|(name, _)| *name == layer).unwrap().1[9] ^= 1), None, "digest").await;
    refused(&with(&|m| m.retain(|(name, _)| *name != layer)), None, "is not in it").await;
    refused(&with(&|m| m.retain(|(name, _)| name != "index.json")), None, "neither index.json").await;
    refused(
        &with(&|m| m.iter_mut().find(|(name, _)| name == "index.json").unwrap().1.truncate(20)),
        None,
        "index.json",
    )
    .await;
    refused(&with(&|m| m.push(("huge.json".into(), vec![b' '; 5 << 20]))), None, "too large").await;
    refused(&with(&|_| ()), Some("r.example/a@sha256:0"), "digest").await;
    refused(&write(dir.path(), "no.tar", &[7; 2000]), None, "not a readable tar").await;
    refused(&write(dir.path(), "cut.tar", &tar_of(&good)[..3000]), None, "image archive").await;
    refused(Path::new("/no/such/archive.tar"), None, "/no/such/archive.tar").await;
    refused(Path::new("/dev/null"), None, "neither a file nor a directory").await;

    // A blob that is a link, in a tar and in a directory.
    let secret = write(dir.path(), "secret", b"of the host");
    let digest = sha256(b"of the host");
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, format!("blobs/{}", digest.replace(':', "/")), &secret).unwrap();
    refused(&write(dir.path(), "link.tar", &builder.into_inner().unwrap()), None, "is a link").await;
    let layout_dir = dir.path().join("layout");
    for (name, bytes) in good.iter().filter(|(name, _)| *name != layer) {
        write(&layout_dir, name, bytes);
    }
    std::os::unix::fs::symlink(&secret, layout_dir.join(&layer)).unwrap();
    refused(&layout_dir, None, "is not in it").await;

    // A PAX header that would rename the next member.
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_pax_extensions([("path", &b"index.json"[..])]).unwrap();
    refused(&write(dir.path(), "pax.tar", &builder.into_inner().unwrap()), None, "extension header").await;
}
