//! A node of its own: one daemon (ours or a peer's) with private directories, socket, network and cgroup.
//!
//! Several nodes run side by side. Stopping a node ends all that it started; what is left then is named, which is
//! the leak check of the demo. The runtimes' own configuration is in [`runtimes`].

mod remains;
mod runtimes;

use std::fs;
use std::net::Ipv4Addr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use sha2::{Digest, Sha256};
use stasis_cri_api::runtime::CgroupDriver;

pub use self::runtimes::Runtime;

use crate::cri::{Cri, pod_config};
use crate::debian::remove_tree;
use crate::engines::path_with;
use crate::layout::hex;
use crate::places::Places;
use crate::process::{tail, wait};

/// Time for a daemon to be ready after its start.
const START: Duration = Duration::from_secs(90);

/// Time for a daemon to end after SIGTERM.
const STOP: Duration = Duration::from_secs(20);

/// Interface names have at most 15 characters, and paths of sockets 107: a node's name is short.
const NAME_MAX: usize = 7;

/// Hexadecimal digits that tell apart the nodes of several work trees on one machine.
const TREE_DIGITS: usize = 4;

/// A running node.
#[derive(Debug)]
pub struct Node {
    /// Whose daemon it is.
    pub runtime: Runtime,
    /// A client of the daemon.
    pub cri: Cri,
    /// Names and places.
    pub ground: Ground,
    command: Command,
    daemon: Child,
    _subnet: Option<Subnet>,
}

/// What differs from node to node.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The pods' network.
    pub network: Network,
    /// Image of containerd's pause process; ours needs none.
    pub sandbox_image: String,
    /// `driver` under `[cgroup]` in our configuration.
    pub cgroup_driver: CgroupDriver,
    /// `level` under `[checkpoint]` in our configuration.
    pub checkpoint_level: &'static str,
    /// What is appended to our configuration.
    pub more: String,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            network: Network::Bridge,
            sandbox_image: String::new(),
            cgroup_driver: CgroupDriver::Cgroupfs,
            checkpoint_level: "checkpoint_restore",
            more: String::new(),
        }
    }
}

/// A node's names and places, cleared of what an earlier node of that name left. Nobody else has them as long as
/// this value lives.
#[derive(Debug)]
pub struct Ground {
    /// `NAME-TREE`: unique on this machine.
    pub name: String,
    /// Below the development directory: all that is on disk.
    pub disk: PathBuf,
    /// Below `/run`: sockets, whose paths must be short.
    pub run: PathBuf,
    /// Parent of all cgroups of its pods.
    pub cgroup_parent: String,
    /// Where the daemon's log goes after a failure.
    last_log: PathBuf,
    busybox: PathBuf,
    _lock: fs::File,
}

impl Ground {
    /// Takes the name for this process and clears it.
    ///
    /// # Errors
    /// Where another process has the name, or something of an earlier node cannot be taken away.
    pub fn clear(places: &Places, name: &str) -> Result<Self> {
        if name.len() > NAME_MAX {
            bail!("the node's name {name} is longer than {NAME_MAX} characters");
        }
        let nodes = places.dev.join("nodes");
        fs::create_dir_all(&nodes)?;
        let lock = fs::File::create(nodes.join(format!("{name}.lock")))?;
        if lock.try_lock().is_err() {
            bail!("another task uses the node {name} of this work tree: wait for its end");
        }
        let tree = &hex(&Sha256::digest(places.dev.as_os_str().as_encoded_bytes()))[..TREE_DIGITS];
        let full = format!("{name}-{tree}");
        let ground = Self {
            disk: nodes.join(name),
            run: Path::new("/run").join(format!("st-{full}")),
            cgroup_parent: format!("/st-{full}"),
            last_log: nodes.join(format!("{name}.log")),
            busybox: places.engines().join("bin/busybox"),
            name: full,
            _lock: lock,
        };
        remains::sweep(&ground)?;
        for dir in [ground.root(), ground.cni(), ground.archives(), ground.pod_logs()] {
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        ground.make_run()?;
        Ok(ground)
    }

    fn make_run(&self) -> Result<()> {
        let made = fs::DirBuilder::new().mode(0o711).create(&self.run);
        made.with_context(|| format!("create {}", self.run.display()))
    }

    /// Removes everything of the node by force.
    ///
    /// # Errors
    /// Where the system refuses to take something away.
    pub fn sweep(&self) -> Result<()> {
        remains::sweep(self)
    }

    /// Name of the node's bridge.
    fn bridge(&self) -> String {
        format!("st-{}", self.name)
    }

    /// For a registry beside the node.
    pub fn registry(&self) -> PathBuf {
        self.disk.join("registry")
    }

    /// The runtime's persistent state.
    pub fn root(&self) -> PathBuf {
        self.disk.join("root")
    }

    /// The runtime's state until the next boot.
    pub fn state(&self) -> PathBuf {
        self.run.join("state")
    }

    /// The runtime's socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("cri.sock")
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.disk.join("daemon.log")
    }

    /// The pods' logs.
    pub fn pod_logs(&self) -> PathBuf {
        self.disk.join("logs")
    }

    /// For checkpoint archives.
    pub fn archives(&self) -> PathBuf {
        self.disk.join("checkpoints")
    }

    /// Addresses given to pods.
    fn addresses(&self) -> PathBuf {
        self.disk.join("addresses")
    }

    /// Network configurations.
    pub fn cni(&self) -> PathBuf {
        self.disk.join("cni")
    }
}

/// The pods' network of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// None is configured, and the node is not ready for pods.
    Absent,
    /// A bridge.
    Bridge,
    /// A bridge with address translation for what leaves the machine, and port mappings: what nodes usually have.
    Masquerade,
}

impl Node {
    /// Starts the daemon and waits until it is ready.
    ///
    /// # Errors
    /// Where it does not start, with the end of its log.
    pub async fn start(places: &Places, mut ground: Ground, runtime: Runtime, setup: &Setup) -> Result<Self> {
        if setup.cgroup_driver == CgroupDriver::Systemd {
            // A dash in the name of a slice is a step down.
            ground.cgroup_parent = format!("/{}.slice", ground.cgroup_parent[1..].replace('-', "_"));
        }
        let subnet = match setup.network {
            Network::Absent => None,
            network => Some(write_network(&ground, network)?),
        };
        let mut command = runtime.command(places, &ground, setup)?;
        command.env("PATH", path_with(&places.engines())).current_dir(&ground.disk);
        let mut daemon = spawn(&mut command, &ground)?;
        match connect(&mut daemon, &ground, subnet.is_some()).await {
            Ok(cri) => Ok(Self { runtime, cri, ground, command, daemon, _subnet: subnet }),
            Err(error) => {
                // It may have ended by itself; the error to report is why it is not ready.
                let _ = daemon.kill();
                let _ = daemon.wait();
                ground.sweep()?;
                Err(error.context(format!("start {}", runtime.name())))
            }
        }
    }

    /// Ends the daemon as a crash would, by SIGKILL, and leaves everything else.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn kill_daemon(&mut self) -> Result<()> {
        self.daemon.kill().context("kill the daemon")?;
        self.daemon.wait().context("reap the daemon")?;
        Ok(())
    }

    /// Takes away what a sudden reboot of the machine would, and starts the daemon again.
    ///
    /// # Errors
    /// Where the system refuses, and as [`Node::start`].
    pub async fn reboot(&mut self) -> Result<()> {
        self.kill_daemon()?;
        remains::reboot(&self.ground)?;
        self.ground.make_run()?;
        self.restart_daemon().await
    }

    /// Starts the daemon again after its end, and connects anew.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn restart_daemon(&mut self) -> Result<()> {
        self.daemon = spawn(&mut self.command, &self.ground)?;
        self.cri = connect(&mut self.daemon, &self.ground, self._subnet.is_some()).await?;
        Ok(())
    }

    /// Process ID of the daemon.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Process IDs of the node's shims.
    ///
    /// # Errors
    /// Where the processes cannot be listed.
    pub fn shims(&self) -> Result<Vec<u32>> {
        let run = &self.ground.run;
        let text = run.display().to_string();
        remains::processes(|process| {
            let named = process.arguments.contains(&text) || process.directory.starts_with(run);
            process.program.starts_with("containerd-shim") && named
        })
    }

    /// Configuration of a pod on this node.
    pub fn pod_config(&self, pod: &str) -> stasis_cri_api::runtime::PodSandboxConfig {
        let parent = &self.ground.cgroup_parent;
        let parent = match parent.strip_suffix(".slice") {
            Some(stem) => format!("{parent}{stem}-{pod}.slice"),
            None => format!("{parent}/{pod}"),
        };
        pod_config(pod, &self.ground.pod_logs(), &parent)
    }

    /// Stops and removes all pods, ends the daemon, and returns what is left of the node then: mounts, processes,
    /// cgroups, interfaces, files. Afterwards nothing is: the rest is removed by force.
    ///
    /// # Errors
    /// Where a pod cannot be removed, or the daemon does not end in order.
    pub async fn stop(mut self) -> Result<Vec<String>> {
        let ended = self.end().await;
        let left = remains::find(&self.ground);
        if ended.is_err() || left.as_ref().map_or(true, |left| !left.is_empty()) {
            self.save_log()?;
        }
        self.ground.sweep()?;
        ended?;
        left
    }

    /// Leaves everything running, for a person to look at.
    pub fn keep(self) {
        // A daemon that outlives this process is nobody's to reap here.
        std::mem::forget(self);
    }

    async fn end(&mut self) -> Result<()> {
        for pod in self.cri.list_pods().await? {
            self.cri.stop_pod(&pod).await?;
            self.cri.remove_pod(&pod).await?;
        }
        terminate(&mut self.daemon).with_context(|| format!("stop {}", self.runtime.name()))
    }

    /// Keeps the logs of the daemon and of the shims that are left beyond the node's end.
    fn save_log(&self) -> Result<()> {
        let mut log = fs::read(self.ground.log()).context("read the daemon's log")?;
        for pod in fs::read_dir(self.ground.state().join("pods")).into_iter().flatten().flatten() {
            log.extend(format!("--- shim of pod {}\n", pod.file_name().display()).into_bytes());
            log.extend(fs::read(pod.path().join("shim.log")).unwrap_or_default());
        }
        fs::write(&self.ground.last_log, log).context("keep the logs")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // After `stop` all of it is gone already. After an error these fail no worse than they did there.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        if self.ground.log().exists() && self.save_log().is_ok() {
            eprintln!("the log of {} is kept in {}", self.runtime.name(), self.ground.last_log.display());
        }
        let _ = self.ground.sweep();
    }
}

/// A subnet that no other node on this machine takes as long as this value lives.
#[derive(Debug)]
struct Subnet {
    text: String,
    /// A name of the kernel's that one process alone can have, and that ends with it.
    _lock: UnixListener,
}

fn write_network(ground: &Ground, network: Network) -> Result<Subnet> {
    let subnet = free_subnet()?;
    let masquerade = network == Network::Masquerade;
    let mut plugins = vec![json!({
        "type": "bridge",
        "bridge": ground.bridge(),
        "isGateway": true,
        "ipMasq": masquerade,
        "ipam": {
            "type": "host-local",
            "dataDir": ground.addresses(),
            "ranges": [[{ "subnet": subnet.text }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    })];
    if masquerade {
        plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
    }
    let list = json!({ "cniVersion": "1.0.0", "name": format!("stasis-{}", ground.name), "plugins": plugins });
    let path = ground.cni().join("10-bridge.conflist");
    fs::write(&path, serde_json::to_vec_pretty(&list)?).with_context(|| format!("write {}", path.display()))?;
    Ok(subnet)
}

/// A subnet of 10.88.0.0/16 that no route of this machine leads to, and that no other node is about to take.
fn free_subnet() -> Result<Subnet> {
    let routes = fs::read_to_string("/proc/net/route").context("read /proc/net/route")?;
    // The kernel prints addresses as it holds them in memory, first byte lowest.
    let field = |line: &str, number: usize| {
        let hex = line.split_ascii_whitespace().nth(number)?;
        Some(u32::from_be_bytes(u32::from_str_radix(hex, 16).ok()?.to_le_bytes()))
    };
    let taken: Vec<(u32, u32)> =
        routes.lines().skip(1).filter_map(|line| Some((field(line, 1)?, field(line, 7)?))).collect();
    let free = (0..=255_u8).find_map(|third| {
        let subnet = Ipv4Addr::new(10, 88, third, 0);
        let address = u32::from(subnet);
        if taken.iter().any(|(destination, mask)| *mask != 0 && address & mask == *destination) {
            return None;
        }
        let name = SocketAddr::from_abstract_name(format!("stasis-xtask-{subnet}")).ok()?;
        Some(Subnet { text: format!("{subnet}/24"), _lock: UnixListener::bind_addr(&name).ok()? })
    });
    free.context("every subnet of 10.88.0.0/16 is taken on this machine")
}

fn spawn(command: &mut Command, ground: &Ground) -> Result<Child> {
    let log = fs::File::options().create(true).append(true).open(ground.log())?;
    command
        // An interrupt at the terminal is for this task, which then stops the daemon.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))
}

/// Waits until the daemon answers and, where it has a network, says that it is ready.
async fn connect(daemon: &mut Child, ground: &Ground, network: bool) -> Result<Cri> {
    let deadline = Instant::now() + START;
    loop {
        let ready = async {
            let mut cri = Cri::connect(&ground.socket()).await?;
            if network {
                cri.ready().await?;
            }
            Ok::<Cri, anyhow::Error>(cri)
        };
        let error = match ready.await {
            Ok(cri) => return Ok(cri),
            Err(error) => error,
        };
        let ended = daemon.try_wait()?;
        if ended.is_some() || Instant::now() > deadline {
            let log = fs::read_to_string(ground.log()).unwrap_or_default();
            bail!("not ready within {START:?}: {error:#}; its log ends:\n{}", tail(&log));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn terminate(daemon: &mut Child) -> Result<()> {
    if daemon.try_wait()?.is_some() {
        bail!("it had ended by itself");
    }
    let pid = i32::try_from(daemon.id()).ok().and_then(Pid::from_raw).context("a process ID that is none")?;
    kill_process(pid, Signal::TERM).context("send SIGTERM")?;
    let status = wait(daemon, STOP)?;
    if !status.success() {
        bail!("it ended with {status}");
    }
    Ok(())
}
