//! A pod to test with: directories, a root file system of busybox, and the removal of all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use stasis_shim_api::{NamespaceSource, SandboxSpec};
use stasis_sys::process::Pidfd;
use stasis_task::{Config, CreateOpts, Io, Mount, RunOptions, Sandbox, ShimRuntime, Task, log_uri};

/// A wait for what comes at once gives up after this.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which shim a test runs through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shim {
    /// `containerd-shim-stasis-v1`, one a pod.
    Ours,
    /// `containerd-shim-runc-v2` of containerd.
    RuncV2,
}

/// A pod, and what a test makes in it. The directory, processes, mounts and sockets go with the value.
pub(crate) struct Pod {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) pod_dir: PathBuf,
    pub(crate) runtime: ShimRuntime,
    program: String,
    sandbox: Option<Sandbox>,
}

fn from_env(name: &str, what: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("set {name}: {what}")).into()
}

fn engines() -> PathBuf {
    from_env("STASIS_ENGINES", "a prefix with bin/runc and bin/busybox")
}

impl Pod {
    pub(crate) async fn start(shim: Shim) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = match shim {
            Shim::Ours => from_env("STASIS_SHIM", "the program containerd-shim-stasis-v1"),
            Shim::RuncV2 => from_env("STASIS_PEERS", "a prefix with bin/containerd-shim-runc-v2")
                .join("bin/containerd-shim-runc-v2"),
        };
        assert!(program.is_file(), "{} does not exist", program.display());
        make_rootfs(&dir.path().join("lower"));
        let id = stasis_sys::file::random_id();
        let pod_dir = dir.path().join("state").join(&id);
        fs::create_dir_all(&pod_dir).unwrap();
        let mut pod = Self {
            runtime: ShimRuntime::new(config(dir.path())),
            program: program.to_str().unwrap().to_owned(),
            dir,
            id,
            pod_dir,
            sandbox: None,
        };
        if shim == Shim::Ours {
            let started = pod.runtime.start_sandbox(&pod.id, &pod.program, &pod.pod_dir, &sandbox_spec()).await;
            pod.sandbox = Some(started.unwrap());
        }
        pod
    }

    /// Another daemon on the same state.
    pub(crate) fn second_runtime(&self) -> ShimRuntime {
        ShimRuntime::new(config(self.dir.path()))
    }

    pub(crate) fn log(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("{id}.log"))
    }

    pub(crate) fn opts(&self, id: &str, args: &[&str]) -> CreateOpts {
        let root = self.dir.path();
        for layer in ["upper", "work"] {
            fs::create_dir_all(root.join(format!("{id}-{layer}"))).unwrap();
        }
        let overlay = |name: &str, dir: &str| format!("{name}={}", root.join(dir).display());
        let options = vec![
            overlay("lowerdir", "lower"),
            overlay("upperdir", &format!("{id}-upper")),
            overlay("workdir", &format!("{id}-work")),
        ];
        let run_options = RunOptions {
            binary_name: engines().join("bin/runc").to_str().unwrap().into(),
            root: root.join("runc").to_str().unwrap().into(),
            systemd_cgroup: false,
        };
        CreateOpts {
            spec: self.spec(id, args).to_string().into_bytes(),
            rootfs: vec![Mount { fs_type: "overlay".into(), source: "overlay".into(), options }],
            io: Io {
                stdout: log_uri(&self.program, &self.log(id)),
                stderr: log_uri(&self.program, &self.log(id)),
                ..Io::default()
            },
            task_options: Some(run_options.to_any()),
            runtime: self.program.clone(),
            sandbox_id: Some(self.id.clone()),
            address: self.sandbox.as_ref().map(|sandbox| sandbox.address().to_owned()),
            version: self.sandbox.as_ref().map(Sandbox::version),
            ..CreateOpts::default()
        }
    }

    pub(crate) async fn create(&self, id: &str, args: &[&str]) -> stasis_task::Result<Arc<dyn Task>> {
        use stasis_task::PlatformRuntime as _;
        self.runtime.create(id, self.opts(id, args)).await
    }

    fn spec(&self, id: &str, args: &[&str]) -> Value {
        let namespaces: Vec<Value> = ["pid", "mount", "network", "ipc", "uts"]
            .into_iter()
            .map(|kind| {
                let file = if kind == "network" { "net" } else { kind };
                let pinned = self.pod_dir.join("ns").join(file);
                if pinned.exists() { json!({"type": kind, "path": pinned}) } else { json!({"type": kind}) }
            })
            .collect();
        json!({
            "ociVersion": "1.2.0",
            "process": process(args),
            "root": {"path": "rootfs"},
            "annotations": {"io.kubernetes.cri.sandbox-id": self.id},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "linux": {"cgroupsPath": format!("/stasis-task-{}-{id}", &self.id[..16]), "namespaces": namespaces},
        })
    }

    /// The socket of the shim that serves a task.
    pub(crate) fn socket(&self, task_id: &str) -> PathBuf {
        let record = fs::read(self.pod_dir.join("bundles").join(task_id).join("bootstrap.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        record["address"].as_str().and_then(|address| address.strip_prefix("unix://")).unwrap().into()
    }

    pub(crate) fn sandbox(&self) -> &Sandbox {
        self.sandbox.as_ref().expect("only our shim serves a sandbox")
    }

    /// The shim that serves a task.
    pub(crate) fn shim_pid(&self, task_id: &str) -> i32 {
        if let Some(sandbox) = &self.sandbox {
            return i32::try_from(sandbox.pid()).unwrap();
        }
        // Its working directory is the bundle, and nobody else's is.
        let bundle = self.pod_dir.join("bundles").join(task_id);
        let processes =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let mut shims =
            processes.filter(|pid: &i32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == bundle));
        shims.next().expect("a shim runs in the bundle")
    }

    pub(crate) async fn kill_shim(&self, task_id: &str) {
        Pidfd::open(self.shim_pid(task_id)).unwrap().signal(Signal::KILL).unwrap();
    }

    /// The orderly end: nothing of the pod may be left, which is checked.
    pub(crate) async fn end(self) {
        if let Some(sandbox) = &self.sandbox {
            // A shim that was killed neither answers nor must it: shutting down cleans up after it.
            let _ = sandbox.stop().await;
            sandbox.shutdown().await.unwrap();
        }
        let root = self.dir.path();
        until("no process of the pod is left", || processes_in(root).is_empty()).await;
        assert!(!has_mount_below(root), "mounts are left below {}", root.display());
        let bundles: Vec<_> = fs::read_dir(self.pod_dir.join("bundles")).into_iter().flatten().collect();
        assert!(bundles.is_empty(), "{bundles:?}");
        assert_eq!(cgroups(&self.id), Vec::<PathBuf>::new());
    }
}

impl Drop for Pod {
    /// After a test that failed; after an orderly end there is nothing to do.
    fn drop(&mut self) {
        let root = self.dir.path();
        for bundle in fs::read_dir(self.pod_dir.join("bundles")).into_iter().flatten().flatten() {
            let address = fs::read_to_string(bundle.path().join("bootstrap.json")).unwrap_or_default();
            let socket = address.split('"').find_map(|part| part.strip_prefix("unix://").map(PathBuf::from));
            let _ = socket.map(fs::remove_file);
        }
        let groups = cgroups(&self.id);
        for group in &groups {
            let _ = fs::write(group.join("freezer.state"), "THAWED");
            let _ = fs::write(group.join("cgroup.freeze"), "0");
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let inside = groups.iter().flat_map(|group| pids_in(group));
            let left: Vec<i32> = inside.chain(processes_in(root)).collect();
            if left.is_empty() || Instant::now() > end {
                break;
            }
            for pid in left {
                let _ = Pidfd::open(pid).and_then(|process| process.signal(Signal::KILL));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = stasis_sys::mount::unmount_all_below(root);
        for group in groups {
            let _ = fs::remove_dir(group);
        }
    }
}

fn config(root: &Path) -> Config {
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", engines().join("bin").display());
    Config {
        state_dir: root.join("state"),
        address: root.join("stasis.sock").to_str().unwrap().into(),
        env: vec![("PATH".into(), path.into())],
        ..Config::default()
    }
}

fn sandbox_spec() -> SandboxSpec {
    SandboxSpec {
        network: NamespaceSource::New,
        ipc: NamespaceSource::New,
        uts: NamespaceSource::New,
        pid: NamespaceSource::PerContainer,
        hostname: Some("test".into()),
        sysctls: Default::default(),
        shm_size_bytes: 1 << 20,
    }
}

/// `process` of an OCI spec.
pub(crate) fn process(args: &[&str]) -> Value {
    json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
}

fn make_rootfs(dir: &Path) {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin).unwrap();
    for empty in ["proc", "dev"] {
        fs::create_dir(dir.join(empty)).unwrap();
    }
    fs::copy(engines().join("bin/busybox"), bin.join("busybox")).expect("a busybox in STASIS_ENGINES");
    for applet in ["sh", "sleep", "cat", "true", "echo"] {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
    }
}

/// Processes that work in a directory below, or whose arguments name it: shims, runc, and what a container left.
fn processes_in(dir: &Path) -> Vec<i32> {
    let name = dir.to_str().unwrap();
    let of_ours = |pid: &i32| {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        cwd.starts_with(dir) || String::from_utf8_lossy(&arguments).contains(name)
    };
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    all.filter(of_ours).collect()
}

fn pids_in(cgroup: &Path) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn cgroups(pod_id: &str) -> Vec<PathBuf> {
    let prefix = format!("stasis-task-{}-", &pod_id[..16]);
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let roots = hierarchies.chain(["/sys/fs/cgroup".into()]);
    let groups = roots.flat_map(|root| fs::read_dir(root).into_iter().flatten().flatten());
    let ours = groups.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    ours.map(|entry| entry.path()).collect()
}

pub(crate) fn has_mount_below(dir: &Path) -> bool {
    !stasis_sys::mount::mounts_below(dir).unwrap().is_empty()
}

/// Waits for a condition that comes true at once unless something is broken.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
