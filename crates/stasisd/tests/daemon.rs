//! The daemon as a process: its socket, its locks, its answers, its signals. Each test has directories of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use stasis_cri_api::runtime::image_service_client::ImageServiceClient;
use stasis_cri_api::runtime::runtime_service_client::RuntimeServiceClient;
use stasis_cri_api::runtime::*;
use stasis_cri_api::stasis::DoctorRequest;
use stasis_cri_api::stasis::admin_client::AdminClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// Long enough for a loaded machine; a daemon that is well takes a fraction of a second.
const PATIENCE: Duration = Duration::from_secs(30);

/// Directories of one daemon, and its process; ended with the test, whatever happens.
struct Daemon {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Daemon {
    /// A daemon that serves, with `extra` in its configuration.
    fn start(extra: &str) -> Self {
        let mut daemon = Self::prepare(extra);
        daemon.spawn();
        daemon
    }

    fn prepare(extra: &str) -> Self {
        let engines = std::env::var_os("STASIS_ENGINES")
            .expect("STASIS_ENGINES must name the prefix with bin/runc and bin/criu (cargo xtask test sets it)");
        let engines = PathBuf::from(engines);
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "root = {root:?}\nstate = {state:?}\n{extra}\n\
             [engines]\npath = [{bin:?}]\n[cni]\nconf_dir = {net:?}\nbin_dirs = [{cni:?}]\n",
            root = dir.path().join("root"),
            state = dir.path().join("state"),
            bin = engines.join("bin"),
            net = dir.path().join("net.d"),
            cni = engines.join("cni"),
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        Self { dir, child: None }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stasisd"));
        command.arg("--config").arg(self.dir.path().join("config.toml"));
        command
    }

    fn spawn(&mut self) {
        let log = std::fs::File::create(self.log()).unwrap();
        let child = self.command().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.child = Some(child);
        self.wait_for("the socket", |daemon| std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok());
    }

    /// Runs a further daemon on the same directories to its end.
    fn second(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("state/stasis.sock")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn wait_for(&mut self, what: &str, is_there: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_there(self) {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
            let log = || std::fs::read_to_string(self.log()).unwrap_or_default();
            assert!(ended.is_none(), "the daemon ended ({ended:?}) before {what}:\n{}", log());
            assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}:\n{}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    async fn channel(&self) -> Channel {
        let socket = self.socket();
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn directories_and_socket_have_their_modes() {
    let daemon = Daemon::start("");
    assert_eq!(mode(&daemon.socket()), 0o600);
    assert_eq!(mode(&daemon.dir.path().join("root")), 0o700);
    assert_eq!(mode(&daemon.dir.path().join("state")), 0o711);
}

#[test]
fn sigterm_ends_it_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start("");
        daemon.signal(signal);
        assert_eq!(daemon.ended().code(), Some(0), "{}", std::fs::read_to_string(daemon.log()).unwrap());
        assert!(!daemon.socket().exists());
    }
}

#[tokio::test]
async fn a_client_that_stays_connected_does_not_hold_up_the_end() {
    let mut daemon = Daemon::start("[limits]\nshutdown_grace_seconds = 3600");
    let mut runtime = RuntimeServiceClient::new(daemon.channel().await);
    runtime.version(VersionRequest::default()).await.unwrap();
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.ended().code(), Some(0));
    assert!(runtime.version(VersionRequest::default()).await.is_err());
}

#[test]
fn it_starts_again_after_a_kill() {
    let mut daemon = Daemon::start("");
    daemon.signal(Signal::KILL);
    daemon.ended();
    assert!(daemon.socket().exists(), "a killed daemon leaves its socket; the next one must replace it");
    daemon.spawn();
}

#[test]
fn a_second_daemon_is_refused() {
    let daemon = Daemon::start("");
    let second = daemon.second(&[]);
    assert_eq!(second.status.code(), Some(1));
    let pid = daemon.child.as_ref().unwrap().id();
    let expected = format!(
        "stasisd: {} is in use by another stasisd (process {pid}); stop that one, or give this one another --root\n",
        daemon.dir.path().join("root").display()
    );
    assert!(stderr(&second).ends_with(&expected), "{}", stderr(&second));

    let other = tempfile::tempdir().unwrap();
    let path = |name: &str| other.path().join(name).display().to_string();
    let socket = daemon.socket().display().to_string();
    let third = daemon.second(&["--root", &path("root"), "--state", &path("state"), "--listen", &socket]);
    assert!(stderr(&third).contains("another process answers on"), "{}", stderr(&third));
}

#[tokio::test]
async fn it_says_who_it_is_and_how_it_is() {
    let daemon = Daemon::start("");
    let mut runtime = RuntimeServiceClient::new(daemon.channel().await);
    let version = runtime.version(VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!(version.runtime_name, "stasis");
    assert_eq!(version.runtime_api_version, "v1");
    assert_eq!(version.runtime_version, env!("CARGO_PKG_VERSION"));

    let status = runtime.status(StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    let condition = |name| conditions.iter().find(|condition| condition.r#type == name).unwrap();
    assert!(condition("RuntimeReady").status);
    let network = condition("NetworkReady");
    assert!(!network.status && !network.reason.is_empty(), "{network:?}");
    assert!(network.message.contains("net.d"), "says where a configuration is missing: {network:?}");
    let handlers: Vec<_> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(handlers, ["", "runc"]);
    assert!(status.runtime_handlers[0].features.unwrap().recursive_read_only_mounts);
    let config: serde_json::Value = serde_json::from_str(&status.info["config"]).unwrap();
    assert_eq!(config["checkpoint"]["level"], "checkpoint_only");

    let config = runtime.runtime_config(RuntimeConfigRequest {}).await.unwrap().into_inner();
    let expected =
        if Path::new("/run/systemd/system").exists() { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
    assert_eq!(config.linux.unwrap().cgroup_driver(), expected);
}

#[tokio::test]
async fn what_is_empty_is_empty_and_what_is_wrong_is_named() {
    let daemon = Daemon::start("");
    let channel = daemon.channel().await;
    let mut runtime = RuntimeServiceClient::new(channel.clone());
    let mut image = ImageServiceClient::new(channel);

    assert!(runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items.is_empty());
    assert!(
        runtime.list_containers(ListContainersRequest::default()).await.unwrap().into_inner().containers.is_empty()
    );
    assert!(image.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty());
    let usage = image.image_fs_info(ImageFsInfoRequest {}).await.unwrap().into_inner().image_filesystems;
    assert!(usage[0].timestamp > 0);

    let absent = Some(ImageSpec { image: "example.com/none:1".into(), ..ImageSpec::default() });
    let status = image.image_status(ImageStatusRequest { image: absent.clone(), verbose: true }).await.unwrap();
    assert_eq!(status.into_inner(), ImageStatusResponse::default());
    image.remove_image(RemoveImageRequest { image: absent }).await.unwrap();

    // Idempotent, as the comments of CRI say.
    let gone = "0".repeat(64);
    runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: gone.clone() }).await.unwrap();
    runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: gone.clone() }).await.unwrap();
    runtime.remove_container(RemoveContainerRequest { container_id: gone.clone() }).await.unwrap();

    let error = runtime.container_status(ContainerStatusRequest { container_id: gone, verbose: false }).await;
    assert_eq!(error.unwrap_err().code(), Code::NotFound);
    let error = runtime.start_container(StartContainerRequest::default()).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "container_id is empty"));
    let error = runtime.run_pod_sandbox(RunPodSandboxRequest::default()).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "config is missing"));
    let error = image.pull_image(PullImageRequest::default()).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "image is missing"));
}

#[tokio::test]
async fn what_is_not_built_says_so() {
    let daemon = Daemon::start("");
    let mut runtime = RuntimeServiceClient::new(daemon.channel().await);
    let error = runtime.checkpoint_pod(CheckpointPodRequest::default()).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::Unimplemented, "method CheckpointPod not implemented"));
}

#[tokio::test]
async fn a_node_without_checkpoints_says_so_in_the_kubelets_words() {
    let request = || CheckpointContainerRequest {
        container_id: "x".into(),
        location: "/nonexistent/x.tar".into(),
        ..CheckpointContainerRequest::default()
    };
    let daemon = Daemon::start("[checkpoint]\nlevel = \"none\"");
    let mut runtime = RuntimeServiceClient::new(daemon.channel().await);
    let error = runtime.checkpoint_container(request()).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::Unknown, "checkpoint/restore support not available"));

    let daemon = Daemon::start("");
    let mut runtime = RuntimeServiceClient::new(daemon.channel().await);
    assert_eq!(runtime.checkpoint_container(request()).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn the_doctor_answers_over_the_socket_and_without_a_daemon() {
    let daemon = Daemon::start("");
    let mut admin = AdminClient::new(daemon.channel().await);
    let findings = admin.doctor(DoctorRequest {}).await.unwrap().into_inner().findings;
    let criu = findings.iter().find(|finding| finding.subject == "criu").unwrap();
    assert!(criu.found.starts_with('4'), "{criu:?}");

    let report = daemon.second(&["doctor"]);
    let report = String::from_utf8(report.stdout).unwrap();
    for finding in &findings {
        assert!(report.contains(&finding.subject), "{} is missing in:\n{report}", finding.subject);
    }
}

#[test]
fn a_wrong_configuration_is_refused_with_its_place() {
    let daemon = Daemon::prepare("[chekpoint]\nlevel = \"none\"");
    let output = daemon.second(&[]);
    assert_eq!(output.status.code(), Some(1));
    let file = daemon.dir.path().join("config.toml");
    let expected =
        format!("stasisd: {}:3:2: unknown key \"chekpoint\"; did you mean \"checkpoint\"?\n", file.display());
    assert_eq!(stderr(&output), expected);
    assert_eq!(stderr(&daemon.second(&["config", "check"])), expected);
}

#[test]
fn the_printed_default_configuration_is_accepted() {
    let printed = Command::new(env!("CARGO_BIN_EXE_stasisd")).args(["config", "default"]).output().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &printed.stdout).unwrap();
    let check =
        Command::new(env!("CARGO_BIN_EXE_stasisd")).args(["config", "check"]).arg(file.path()).output().unwrap();
    assert!(check.status.success(), "{}", stderr(&check));
}
