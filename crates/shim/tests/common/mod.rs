//! A pod with a shim of its own: its directory, its clients, its containers, and a guard that leaves nothing behind.
//!
//! Needs root, and `STASIS_ENGINES` for runc, CRIU and busybox.

#![allow(dead_code, unused_imports, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub use containerd_shim_protos::api::*;
pub use containerd_shim_protos::sandbox_api::*;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::oci;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::Message as _;
pub use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
pub use stasis_shim_api::{NamespaceSource, SANDBOX_SPEC_URL, SERVICE, SandboxSpec};
use stasis_sys::file::random_id;
pub use ttrpc::Code;
use ttrpc::context::{Context, with_timeout};

/// More than anything here takes.
const CALL_NANOS: i64 = 60_000_000_000;

/// How long something that happens by itself may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Applets that the test containers use.
const APPLETS: [&str; 17] = [
    "sh", "sleep", "cat", "echo", "ls", "hostname", "seq", "yes", "head", "stty", "true", "readlink", "kill", "dd",
    "ps", "wc", "tr",
];

pub fn context() -> Context {
    with_timeout(CALL_NANOS)
}

pub fn engines() -> PathBuf {
    let engines = std::env::var_os("STASIS_ENGINES")
        .expect("STASIS_ENGINES must name the directory whose bin/ has runc, criu and busybox; see `cargo xtask test`");
    PathBuf::from(engines)
}

/// A running shim and its pod.
pub struct Pod {
    pub id: String,
    pub dir: PathBuf,
    pub address: String,
    pub client: Client,
    pub task: TaskClient,
    pub sandbox: SandboxClient,
    root: tempfile::TempDir,
    cgroup: String,
}

/// How a test container differs from the plain one.
#[derive(Default, Clone)]
pub struct Plan {
    pub script: String,
    pub terminal: bool,
    pub stdin: String,
    pub stdout: Option<String>,
    pub checkpoint: String,
    /// Namespaces by OCI type: joined where there is a path.
    pub namespaces: BTreeMap<&'static str, Option<PathBuf>>,
}

impl Plan {
    pub fn script(script: &str) -> Plan {
        Plan { script: script.to_owned(), ..Plan::default() }
    }
}

pub fn plain_sandbox() -> SandboxSpec {
    SandboxSpec {
        network: NamespaceSource::New,
        ipc: NamespaceSource::New,
        uts: NamespaceSource::New,
        pid: NamespaceSource::PerContainer,
        hostname: Some("pod-host".to_owned()),
        sysctls: BTreeMap::new(),
        shm_size_bytes: 1 << 20,
    }
}

/// The command of the shim in a pod's directory.
pub fn shim_command(dir: &Path, id: &str) -> Command {
    // Another build of the shim can be put to the same tests.
    let shim = std::env::var_os("STASIS_TEST_SHIM");
    let mut command = Command::new(shim.unwrap_or_else(|| env!("CARGO_BIN_EXE_containerd-shim-stasis-v1").into()));
    command.current_dir(dir).args(["-namespace", "test", "-address", "/none", "-publish-binary", "/none", "-id", id]);
    let path = format!("{}:{}", engines().join("bin").display(), std::env::var("PATH").unwrap_or_default());
    command.env("PATH", path);
    command
}

pub fn start_shim(dir: &Path, id: &str) -> String {
    let output = shim_command(dir, id).arg("start").output().unwrap();
    assert!(output.status.success(), "start: {}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&answer["version"], &answer["protocol"]), (&json!(3), &json!("ttrpc")));
    answer["address"].as_str().unwrap().to_owned()
}

impl Pod {
    /// Starts a shim in a directory of its own.
    pub async fn start() -> Pod {
        let root = tempfile::Builder::new().prefix("shim").tempdir_in("/tmp").unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let id = random_id()[..16].to_owned();
        let dir = root.path().join("pod");
        fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
        fs::create_dir(dir.join("bundles")).unwrap();
        make_rootfs(&root.path().join("lower"));
        let address = start_shim(&dir, &id);
        let client = Client::connect(&address).await.unwrap();
        let cgroup = format!("/stasis-test-{id}");
        Pod {
            task: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client.clone()),
            id,
            dir,
            address,
            client,
            root,
            cgroup,
        }
    }

    /// The same with a sandbox in it.
    pub async fn with_sandbox(spec: &SandboxSpec) -> Pod {
        let pod = Pod::start().await;
        pod.create_sandbox(spec).await.unwrap();
        pod.sandbox.start_sandbox(context(), &StartSandboxRequest::new()).await.unwrap();
        pod
    }

    pub async fn create_sandbox(&self, spec: &SandboxSpec) -> ttrpc::Result<CreateSandboxResponse> {
        let options = Any {
            type_url: SANDBOX_SPEC_URL.to_owned(),
            value: serde_json::to_vec(spec).unwrap(),
            ..Default::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.dir.to_string_lossy().into_owned(),
            options: Some(options).into(),
            ..Default::default()
        };
        self.sandbox.create_sandbox(context(), &request).await
    }

    pub fn shim_pid(&self) -> i32 {
        fs::read_to_string(self.dir.join("shim.pid")).unwrap().trim().parse().unwrap()
    }

    /// Directory for logs and FIFOs.
    pub fn scratch(&self) -> &Path {
        self.root.path()
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.root.path().join(format!("{id}.log"))
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.dir.join("bundles").join(id)
    }

    /// The pod's pinned namespaces, for [`Plan::namespaces`].
    pub fn pinned(&self) -> BTreeMap<&'static str, Option<PathBuf>> {
        let pin = |kind: &str| Some(self.dir.join("ns").join(kind));
        BTreeMap::from([("network", pin("net")), ("ipc", pin("ipc")), ("uts", pin("uts")), ("pid", None)])
    }

    pub fn options(&self) -> Any {
        let options = oci::Options {
            binary_name: engines().join("bin/runc").to_string_lossy().into_owned(),
            root: self.root.path().join("runc").to_string_lossy().into_owned(),
            ..Default::default()
        };
        let value = options.write_to_bytes().unwrap();
        Any { type_url: "containerd.runc.v1.Options".to_owned(), value, ..Default::default() }
    }

    pub async fn create(&self, id: &str, plan: &Plan) -> ttrpc::Result<CreateTaskResponse> {
        let bundle = self.bundle(id);
        let layers = self.root.path().join("layers").join(id);
        for dir in [&bundle, &layers.join("upper"), &layers.join("work")] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(bundle.join("config.json"), self.config(id, plan).to_string()).unwrap();
        let rootfs = Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", self.root.path().join("lower").display()),
                format!("upperdir={}", layers.join("upper").display()),
                format!("workdir={}", layers.join("work").display()),
            ],
            ..Default::default()
        };
        let stdout = plan.stdout.clone().unwrap_or_else(|| format!("cri://{}", self.log_path(id).display()));
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            rootfs: vec![rootfs],
            terminal: plan.terminal,
            stdin: plan.stdin.clone(),
            stderr: if plan.terminal { String::new() } else { stdout.clone() },
            stdout,
            checkpoint: plan.checkpoint.clone(),
            options: Some(self.options()).into(),
            ..Default::default()
        };
        self.task.create(context(), &request).await
    }

    pub fn process(script: &str, terminal: bool) -> Value {
        json!({
            "terminal": terminal, "cwd": "/", "args": ["/bin/sh", "-c", script],
            "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"], "noNewPrivileges": true,
        })
    }

    fn config(&self, id: &str, plan: &Plan) -> Value {
        let namespaces = if plan.namespaces.is_empty() {
            BTreeMap::from([("pid", None), ("ipc", None), ("uts", None), ("network", None)])
        } else {
            plan.namespaces.clone()
        };
        let mut list = vec![json!({"type": "mount"})];
        list.extend(namespaces.iter().map(|(kind, path)| match path {
            Some(path) => json!({"type": kind, "path": path}),
            None => json!({"type": kind}),
        }));
        json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "process": Self::process(&plan.script, plan.terminal),
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {"namespaces": list, "cgroupsPath": format!("{}/{id}", self.cgroup)},
        })
    }

    pub async fn start_task(&self, id: &str) -> ttrpc::Result<u32> {
        self.start_process(id, "").await
    }

    pub async fn start_process(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        Ok(self.task.start(context(), &request).await?.pid)
    }

    pub async fn run(&self, id: &str, plan: &Plan) -> u32 {
        self.create(id, plan).await.unwrap();
        self.start_task(id).await.unwrap()
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.task.wait(context(), &request).await.unwrap().exit_status
    }

    pub async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<Empty> {
        self.task.kill(context(), &KillRequest { id: id.to_owned(), signal, ..Default::default() }).await
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.task.delete(context(), &request).await
    }

    pub async fn state(&self, id: &str) -> ttrpc::Result<StateResponse> {
        self.task.state(context(), &StateRequest { id: id.to_owned(), ..Default::default() }).await
    }

    pub async fn add_exec(
        &self,
        id: &str,
        exec_id: &str,
        script: &str,
        io: (&str, &str, &str),
    ) -> ttrpc::Result<Empty> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: Self::process(script, false).to_string().into_bytes(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: io.0.to_owned(),
            stdout: io.1.to_owned(),
            stderr: io.2.to_owned(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.task.exec(context(), &request).await
    }

    /// Runs a script in a container and returns its output, through a FIFO, and its exit status.
    pub async fn exec(&self, id: &str, script: &str) -> (String, u32) {
        let exec_id = random_id()[..8].to_owned();
        let fifo = self.fifo(&exec_id);
        let (mut reader, keeper) = open_reader(&fifo);
        let reader = std::thread::spawn(move || {
            let mut output = String::new();
            reader.read_to_string(&mut output).map(|_| output)
        });
        let path = fifo.to_string_lossy();
        self.add_exec(id, &exec_id, script, ("", &path, &path)).await.unwrap();
        self.start_process(id, &exec_id).await.unwrap();
        let status = self.wait(id, &exec_id).await;
        self.delete(id, &exec_id).await.unwrap();
        drop(keeper);
        (reader.join().unwrap().unwrap(), status)
    }

    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.root.path().join(name);
        let status = Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(status.success());
        path
    }

    /// The messages of a CRI log, pieces of a line put together.
    pub fn log(&self, id: &str) -> String {
        messages(&fs::read_to_string(self.log_path(id)).unwrap_or_default())
    }

    /// Waits until the log says something.
    pub async fn log_says(&self, id: &str, words: &str) {
        eventually(&format!("{words:?} in the log"), || self.log(id).contains(words)).await;
    }

    pub fn cgroup(&self, id: &str) -> stasis_cgroup::Cgroup {
        stasis_cgroup::Cgroups::probe().unwrap().at(&format!("{}/{id}", self.cgroup))
    }

    pub fn shim_log(&self) -> String {
        fs::read_to_string(self.dir.join("shim.log")).unwrap_or_default()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the shim's log:\n{}", self.shim_log());
        }
        if let Ok(pid) = fs::read_to_string(self.dir.join("shim.pid")) {
            let _ = stasis_sys::process::signal(pid.trim().parse().unwrap_or(0), 9);
        }
        if let Ok(output) = shim_command(&self.dir, &self.id).arg("delete").output()
            && !output.status.success()
        {
            eprintln!("delete: {}", String::from_utf8_lossy(&output.stderr));
        }
        let _ = stasis_sys::mount::unmount_all_below(self.root.path());
        if let Ok(cgroups) = stasis_cgroup::Cgroups::probe() {
            let cgroup = cgroups.at(&self.cgroup);
            let _ = cgroup.kill_all();
            let _ = cgroup.remove();
        }
    }
}

/// Opens a FIFO to read, without waiting for a writer. It has no end as long as the second file is open.
pub fn open_reader(fifo: &Path) -> (File, File) {
    let keeper = OpenOptions::new().read(true).write(true).open(fifo).unwrap();
    (File::open(fifo).unwrap(), keeper)
}

/// Calls a method of our own service.
pub async fn call(pod: &Pod, method: &str, payload: Vec<u8>) -> ttrpc::Result<Vec<u8>> {
    let request = ttrpc::Request {
        service: SERVICE.to_owned(),
        method: method.to_owned(),
        timeout_nano: CALL_NANOS,
        payload,
        ..Default::default()
    };
    Ok(pod.client.request(request).await?.payload)
}

/// The messages in a CRI log. A line that is just being written is left out.
pub fn messages(log: &str) -> String {
    let mut text = String::new();
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    for line in whole.lines() {
        let [_, _, tag, message] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else {
            panic!("no CRI log line: {line}")
        };
        text.push_str(message);
        if tag == "F" {
            text.push('\n');
        }
    }
    text
}

pub async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn code(error: &ttrpc::Error) -> Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("no status: {other}"),
    }
}

fn make_rootfs(dir: &Path) {
    for name in ["bin", "proc", "dev", "tmp"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::copy(engines().join("bin/busybox"), dir.join("bin/busybox")).expect("STASIS_ENGINES has no bin/busybox");
    fs::set_permissions(dir.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let tick = Command::new("mkfifo").arg(dir.join("tmp/tick")).status().unwrap();
    assert!(tick.success());
    for applet in APPLETS {
        symlink("busybox", dir.join("bin").join(applet)).unwrap();
    }
}
