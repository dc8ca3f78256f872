//! A registry, a node's image store, and a proxy that breaks connections.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use stasis_image::{Config, Images, Progress};
use tempfile::TempDir;

/// How long a registry may take to listen, and the background to tidy up. Far more than either needs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running `docker-registry`; ended and removed when dropped.
pub(crate) struct RegistryServer {
    child: Child,
    port: u16,
    _dir: TempDir,
}

impl RegistryServer {
    pub(crate) fn start() -> RegistryServer {
        RegistryServer::with_config("")
    }

    /// One that wants the user `user` with the password `secret`.
    pub(crate) fn with_password() -> RegistryServer {
        RegistryServer::with_config("auth:\n  htpasswd:\n    realm: test\n    path: {dir}/htpasswd\n")
    }

    /// One that speaks TLS with a certificate of `tls/ca.pem`.
    pub(crate) fn with_tls() -> RegistryServer {
        let files = tls_file("server").with_extension("");
        let files = files.display();
        RegistryServer::with_config(&format!("  tls:\n    certificate: {files}.pem\n    key: {files}.key\n"))
    }

    fn with_config(extra: &str) -> RegistryServer {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let here = dir.path().display();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {here}/data\n\
             http:\n  addr: 127.0.0.1:{port}\n{}",
            extra.replace("{dir}", &here.to_string())
        );
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        // bcrypt of "secret".
        let hash = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
        std::fs::write(dir.path().join("htpasswd"), hash).unwrap();
        let child = Command::new(engine("docker-registry"))
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry starts");
        let server = RegistryServer { child, port, _dir: dir };
        eventually("the registry listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for RegistryServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A certificate of the tests: `ca` or `server`. They are valid for a hundred years and for 127.0.0.1 only.
pub(crate) fn tls_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/tls").join(name).with_extension("pem")
}

fn engine(name: &str) -> PathBuf {
    let prefix = std::env::var_os("STASIS_ENGINES")
        .expect("STASIS_ENGINES must name the directory whose bin/ holds docker-registry (cargo xtask test sets it)");
    let path = Path::new(&prefix).join("bin").join(name);
    assert!(path.exists(), "{} is missing: run cargo xtask setup", path.display());
    path
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for a condition that comes about in the background.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A node's images in a temporary directory.
pub(crate) struct Node {
    pub(crate) images: Images,
    dir: TempDir,
}

impl Node {
    pub(crate) fn new() -> Node {
        Node::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let images = open(dir.path(), change).expect("open the images");
        Node { images, dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Closes the store and opens it again, as a restart does.
    pub(crate) fn reopen(self) -> Result<Node, stasis_image::Error> {
        let Node { images, dir } = self;
        drop(images);
        Ok(Node { images: open(dir.path(), |_| {})?, dir })
    }

    /// Closes the store and gives its directory.
    pub(crate) fn close(self) -> TempDir {
        self.dir
    }

    pub(crate) async fn pull(&self, reference: &str) -> Result<Arc<stasis_image::Image>, stasis_image::Error> {
        self.images.pull(reference, None, |_| {}).await
    }

    /// Files in a part of the store.
    fn entries(&self, part: &str) -> usize {
        std::fs::read_dir(self.dir.path().join(part)).map_or(0, |entries| entries.count())
    }

    pub(crate) fn blobs(&self) -> usize {
        self.entries("content/blobs/sha256")
    }

    pub(crate) fn has_blob(&self, digest: &str) -> bool {
        self.dir.path().join("content/blobs").join(digest.replace(':', "/")).exists()
    }

    /// That no image, blob, unfinished blob or layer is left.
    pub(crate) fn assert_empty(&self) {
        assert!(self.images.list().is_empty());
        let parts = ["content/blobs/sha256", "content/ingest", "snapshots/layers", "snapshots/active", "snapshots/tmp"];
        eventually("everything is cleared away", || parts.iter().all(|part| self.entries(part) == 0));
    }
}

pub(crate) fn open(root: &Path, change: impl FnOnce(&mut Config)) -> Result<Images, stasis_image::Error> {
    let mut config = Config {
        root: root.to_owned(),
        registry: stasis_image::RegistryConfig::default(),
        max_concurrent_downloads: stasis_image::CONCURRENT_DOWNLOADS,
        pinned: Vec::new(),
    };
    change(&mut config);
    let db = redb::Database::create(root.join("meta.redb")).expect("the database");
    Images::open(config, Arc::new(db))
}

/// Collects progress reports.
#[derive(Clone, Default)]
pub(crate) struct Reports(Arc<std::sync::Mutex<Vec<Progress>>>);

impl Reports {
    pub(crate) fn sink(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let reports = self.clone();
        move |report| reports.0.lock().unwrap().push(report)
    }

    pub(crate) fn has(&self, phase: &str) -> bool {
        self.0.lock().unwrap().iter().any(|report| report.phase == phase)
    }

    pub(crate) fn all(&self) -> Vec<Progress> {
        self.0.lock().unwrap().clone()
    }
}

/// A TCP proxy on loopback that breaks the first `breaks` connections that have carried more than `after` bytes to the client.
pub(crate) struct BreakingProxy {
    port: u16,
    pub(crate) broken: Arc<AtomicUsize>,
}

impl BreakingProxy {
    pub(crate) fn start(to: u16, after: usize, breaks: usize) -> BreakingProxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let broken = Arc::new(AtomicUsize::new(0));
        let count = broken.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), count) = (client, count.clone()) else { return };
                std::thread::spawn(move || carry(client, to, after, breaks, &count));
            }
        });
        BreakingProxy { port, broken }
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

fn carry(mut client: TcpStream, to: u16, after: usize, breaks: usize, broken: &AtomicUsize) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", to)) else { return };
    let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let (mut buffer, mut carried) = (vec![0; 16 << 10], 0);
    while let Ok(count @ 1..) = server.read(&mut buffer) {
        carried += count;
        if carried > after && broken.fetch_add(1, Ordering::SeqCst) < breaks {
            break;
        }
        if client.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}
