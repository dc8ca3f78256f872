//! A node of its own: one daemon (ours or a peer's) with private directories, socket, network and cgroup.
//!
//! Several nodes run side by side. Stopping a node ends all that it started; what is left then is named, which is
//! the leak check of the demo. The runtimes' own configuration is in [`runtimes`].

mod remains;
mod runtimes;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use sha2::{Digest, Sha256};

pub(crate) use self::runtimes::Runtime;

use crate::cri::{Cri, pod_config};
use crate::debian::remove_tree;
use crate::engines::path_with;
use crate::layout::hex;
use crate::places::Places;
use crate::process::{tail, wait};

/// Time for a daemon to be ready after its start.
const START: Duration = Duration::from_secs(20);

/// Time for a daemon to end after SIGTERM.
const STOP: Duration = Duration::from_secs(20);

/// Interface names have at most 15 characters, and paths of sockets 107: a node's name is short.
const NAME_MAX: usize = 7;

/// Hexadecimal digits that tell apart the nodes of several work trees on one machine.
const TREE_DIGITS: usize = 4;

/// A running node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) runtime: Runtime,
    pub(crate) cri: Cri,
    pub(crate) ground: Ground,
    interfaces_before: Vec<String>,
    daemon: Child,
}

/// A node's names and places, cleared of what an earlier node of that name left. Nobody else has them as long as
/// this value lives.
#[derive(Debug)]
pub(crate) struct Ground {
    /// `NAME-TREE`: unique on this machine.
    pub(crate) name: String,
    /// Below the development directory: all that is on disk.
    pub(crate) disk: PathBuf,
    /// Below `/run`: sockets, whose paths must be short.
    pub(crate) run: PathBuf,
    /// Parent of all cgroups of its pods.
    pub(crate) cgroup_parent: String,
    /// Where the daemon's log goes after a failure.
    last_log: PathBuf,
    busybox: PathBuf,
    _lock: fs::File,
}

impl Ground {
    /// Takes the name for this process and clears it.
    pub(crate) fn clear(places: &Places, name: &str) -> Result<Self> {
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
        fs::DirBuilder::new().mode(0o711).create(&ground.run)?;
        Ok(ground)
    }

    /// Removes everything of the node by force.
    pub(crate) fn sweep(&self) -> Result<()> {
        remains::sweep(self)
    }

    /// Name of the node's bridge.
    fn bridge(&self) -> String {
        format!("st-{}", self.name)
    }

    /// For a registry beside the node.
    pub(crate) fn registry(&self) -> PathBuf {
        self.disk.join("registry")
    }

    /// The runtime's persistent state.
    pub(crate) fn root(&self) -> PathBuf {
        self.disk.join("root")
    }

    /// The runtime's state until the next boot.
    pub(crate) fn state(&self) -> PathBuf {
        self.run.join("state")
    }

    /// The runtime's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join("cri.sock")
    }

    /// The daemon's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.disk.join("daemon.log")
    }

    /// The pods' logs.
    pub(crate) fn pod_logs(&self) -> PathBuf {
        self.disk.join("logs")
    }

    /// For checkpoint archives.
    pub(crate) fn archives(&self) -> PathBuf {
        self.disk.join("checkpoints")
    }

    /// Network configurations.
    pub(crate) fn cni(&self) -> PathBuf {
        self.disk.join("cni")
    }
}

/// The pods' network of a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network {
    /// Address translation for what leaves the machine, and port mappings: what nodes usually have.
    pub(crate) masquerade: bool,
}

impl Node {
    /// Starts the daemon and waits until it is ready.
    pub(crate) async fn start(
        places: &Places,
        ground: Ground,
        runtime: Runtime,
        network: Network,
        sandbox_image: &str,
    ) -> Result<Self> {
        write_network(&ground, network)?;
        let interfaces_before = remains::interfaces()?;
        let mut command = runtime.command(places, &ground, sandbox_image)?;
        let mut daemon = spawn(&mut command, places, &ground)?;
        match connect(&mut daemon, &ground).await {
            Ok(cri) => Ok(Self { runtime, cri, ground, interfaces_before, daemon }),
            Err(error) => {
                // It may have ended by itself; the error to report is why it is not ready.
                let _ = daemon.kill();
                let _ = daemon.wait();
                ground.sweep()?;
                Err(error.context(format!("start {}", runtime.name())))
            }
        }
    }

    /// Process ID of the daemon.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Process IDs of the node's shims.
    pub(crate) fn shims(&self) -> Result<Vec<u32>> {
        let run = self.ground.run.display().to_string();
        remains::processes(|process| process.program.starts_with("containerd-shim") && process.arguments.contains(&run))
    }

    /// Configuration of a pod on this node.
    pub(crate) fn pod_config(&self, pod: &str) -> stasis_cri_api::runtime::PodSandboxConfig {
        pod_config(pod, &self.ground.pod_logs(), &self.ground.cgroup_parent)
    }

    /// Stops and removes all pods, ends the daemon, and returns what is left of the node then: mounts, processes,
    /// cgroups, interfaces. Afterwards nothing is: the rest is removed by force.
    pub(crate) async fn stop(mut self) -> Result<Vec<String>> {
        let ended = self.end().await;
        let left = remains::find(&self.ground, &self.interfaces_before);
        self.save_log()?;
        self.ground.sweep()?;
        ended?;
        left
    }

    /// Leaves everything running, for a person to look at.
    pub(crate) fn keep(self) {
        // A daemon that outlives this process is nobody's to reap here.
        std::mem::forget(self);
    }

    async fn end(&mut self) -> Result<()> {
        for pod in self.cri.list_pods().await? {
            self.cri.stop_pod(&pod).await?;
            self.cri.remove_pod(&pod).await?;
        }
        terminate(&mut self.daemon).with_context(|| format!("stop {}", self.runtime.name()))?;
        // The bridge is made by the plugin at the first pod, and no plugin removes it.
        remains::remove_interface(&self.ground.busybox, &self.ground.bridge())
    }

    /// Keeps the daemon's log beyond the node's end.
    fn save_log(&self) -> Result<()> {
        fs::copy(self.ground.log(), &self.ground.last_log).context("keep the daemon's log")?;
        Ok(())
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

fn write_network(ground: &Ground, network: Network) -> Result<()> {
    let subnet = free_subnet()?;
    let mut plugins = vec![json!({
        "type": "bridge",
        "bridge": ground.bridge(),
        "isGateway": true,
        "ipMasq": network.masquerade,
        "ipam": {
            "type": "host-local",
            "dataDir": ground.disk.join("addresses"),
            "ranges": [[{ "subnet": subnet }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    })];
    if network.masquerade {
        plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
    }
    let list = json!({ "cniVersion": "1.0.0", "name": format!("stasis-{}", ground.name), "plugins": plugins });
    let path = ground.cni().join("10-bridge.conflist");
    fs::write(&path, serde_json::to_vec_pretty(&list)?).with_context(|| format!("write {}", path.display()))
}

/// A subnet of 10.88.0.0/16 that no route of this machine leads to.
fn free_subnet() -> Result<String> {
    let routes = fs::read_to_string("/proc/net/route").context("read /proc/net/route")?;
    // The kernel prints addresses as it holds them in memory, first byte lowest.
    let field = |line: &str, number: usize| {
        let hex = line.split_ascii_whitespace().nth(number)?;
        Some(u32::from_be_bytes(u32::from_str_radix(hex, 16).ok()?.to_le_bytes()))
    };
    let taken: Vec<(u32, u32)> =
        routes.lines().skip(1).filter_map(|line| Some((field(line, 1)?, field(line, 7)?))).collect();
    let free = (0..=255_u8).map(|third| Ipv4Addr::new(10, 88, third, 0)).find(|subnet| {
        let address = u32::from(*subnet);
        taken.iter().all(|(destination, mask)| *mask == 0 || address & mask != *destination)
    });
    let subnet = free.context("every subnet of 10.88.0.0/16 has a route on this machine")?;
    Ok(format!("{subnet}/24"))
}

fn spawn(command: &mut Command, places: &Places, ground: &Ground) -> Result<Child> {
    let log = fs::File::create(ground.log())?;
    command
        .env("PATH", path_with(&places.engines()))
        .current_dir(&ground.disk)
        // An interrupt at the terminal is for this task, which then stops the daemon.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))
}

/// Waits until the daemon answers and says that it is ready.
async fn connect(daemon: &mut Child, ground: &Ground) -> Result<Cri> {
    let deadline = Instant::now() + START;
    loop {
        let ready = async {
            let mut cri = Cri::connect(&ground.socket()).await?;
            cri.ready().await?;
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
