//! Exec and attach with streams, and connections into a pod's network: what the streaming server serves.
//!
//! A process's streams are FIFOs between the shim and us. The names go as soon as both ends are open.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stasis_shim_api::{AttachRequest, layout};
use stasis_sys::namespace::{AddressFamily, tcp_socket_in};
use stasis_task::{ExecSpec, Fifos, Process, Streams, Task};
use tokio::net::unix::pipe;
use tokio::net::{TcpSocket, TcpStream};
use tracing::{debug, warn};

use crate::error::{Error, Kind, Result};
use crate::exec::read_spec;
use crate::files;
use crate::pods::{Container, Pods};
use crate::spec;
use crate::state::{Operation, admit};

/// How long a connection to a port of a pod may take: it stays on this host.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What a terminal's processes get when its line is cut.
const SIGHUP: u32 = 1;

/// A process with our ends of its streams; those that were not asked for are absent.
#[derive(Debug)]
pub struct Session {
    /// What is written here is its input.
    pub stdin: Option<pipe::Sender>,
    /// Its output.
    pub stdout: Option<pipe::Receiver>,
    /// Its error output.
    pub stderr: Option<pipe::Receiver>,
    /// Whether the client goes when its input ends, and leaves the process as it is.
    pub detaches_with_stdin: bool,
    /// Everything else about it.
    pub control: Control,
}

/// A process of a [`Session`]. Dropped, the process of an exec goes on; its shim is told to forget it when it has ended.
#[derive(Debug)]
pub struct Control(Target);

enum Target {
    Exec { process: Arc<dyn Process>, terminal: bool },
    Attached { container: Arc<Container>, task: Arc<dyn Task> },
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Exec { process, .. } => f.debug_tuple("Exec").field(&process.id()).finish(),
            Target::Attached { container, .. } => f.debug_tuple("Attached").field(container).finish(),
        }
    }
}

impl Control {
    /// Sets the size of its terminal, in characters. Without effect on a process that is ending.
    pub async fn resize(&self, width: u16, height: u16) {
        let (width, height) = (width.into(), height.into());
        let resized = match &self.0 {
            Target::Exec { process, .. } => process.resize_pty(width, height).await,
            Target::Attached { task, .. } => task.resize_pty(width, height).await,
        };
        if let Err(error) = resized {
            debug!(%error, "cannot resize a terminal");
        }
    }

    /// Its input has ended: our end was dropped before. The input of a container belongs to its shim.
    pub async fn close_stdin(&self) {
        if let Target::Exec { process, .. } = &self.0
            && let Err(error) = process.close_stdin().await
        {
            debug!(%error, "cannot close the input of a command");
        }
    }

    /// Waits for its end; the exit code is that of a command.
    ///
    /// # Errors
    /// Where the shim is lost.
    pub async fn wait(&self) -> Result<Option<u32>> {
        match &self.0 {
            Target::Exec { process, .. } => Ok(Some(process.wait().await?.status)),
            Target::Attached { container, .. } => {
                container.exited().await;
                Ok(None)
            }
        }
    }

    /// The client is gone. A command on a terminal is told as it would be if the terminal's line were cut; any other goes
    /// on without input, as in the peers.
    pub async fn abandon(&self) {
        if let Target::Exec { process, terminal: true } = &self.0
            && let Err(error) = process.kill(SIGHUP).await
            && !error.is_not_found()
        {
            debug!(%error, "cannot hang up on a command");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Target::Exec { process, .. } = &self.0 {
            let process = Arc::clone(process);
            tokio::spawn(async move { forget(&*process).await });
        }
    }
}

/// Waits for the end of a command and has its shim forget it.
async fn forget(process: &dyn Process) {
    let ended = match process.wait().await {
        Ok(_) => process.delete().await.map(drop),
        Err(error) => Err(error),
    };
    if let Err(error) = ended
        && !error.is_not_found()
        && !error.is_shim_lost()
    {
        warn!(exec = process.id(), %error, "cannot delete the process of a command");
    }
}

impl Pods {
    /// The whole ID of a container that a command can be run in.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it runs.
    pub fn container_for_exec(&self, id: &str) -> Result<String> {
        self.running(id, Operation::Exec).map(|container| container.id.clone())
    }

    /// The whole ID of a container that can be attached to.
    ///
    /// # Errors
    /// As [`Pods::container_for_exec`].
    pub fn container_for_attach(&self, id: &str) -> Result<String> {
        self.running(id, Operation::Attach).map(|container| container.id.clone())
    }

    /// The whole ID of a pod whose ports can be reached.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it is ready.
    pub fn pod_for_ports(&self, id: &str) -> Result<String> {
        self.network_of(id).map(|(id, _)| id)
    }

    /// Begins a command in a running container: CRI Exec.
    ///
    /// # Errors
    /// `FailedPrecondition` unless the container runs; else what the OCI runtime said.
    pub async fn exec_stream(&self, id: &str, command: Vec<String>, streams: Streams) -> Result<Session> {
        let container = self.running(id, Operation::Exec)?;
        let pods = self.clone();
        self.detached(async move {
            let begun = pods.begin_exec(&container, &command, streams).await;
            begun.map_err(|error| error.context(format_args!("command {command:?} in container {}", container.id)))
        })
        .await
    }

    async fn begin_exec(&self, container: &Container, command: &[String], streams: Streams) -> Result<Session> {
        let task = task_of(container)?;
        let bundle = self.bundle(&container.pod_id, &container.id);
        let exec_id = stasis_sys::file::random_id();
        let mut fifos = Fifos::create(&bundle.join(format!("exec-{exec_id}")), streams).await?;
        let process = spec::exec_process(&read_spec(&bundle)?, command, streams.terminal);
        let process = serde_json::to_vec(&process)
            .map_err(|error| Error::internal(format!("cannot write the process of the command: {error}")))?;
        let process = task.exec(&exec_id, ExecSpec { process, io: fifos.io() }).await?;
        if let Err(error) = process.start().await {
            if let Err(error) = process.delete().await {
                debug!(exec = exec_id, %error, "cannot delete a command that did not start");
            }
            return Err(error.into());
        }
        fifos.connected();
        Ok(session(fifos, false, Target::Exec { process, terminal: streams.terminal }))
    }

    /// Attaches to the first process of a running container: CRI Attach.
    ///
    /// # Errors
    /// `FailedPrecondition` unless the container runs; `Unimplemented` where another shim than ours runs it.
    pub async fn attach_stream(&self, id: &str, streams: Streams) -> Result<Session> {
        let container = self.running(id, Operation::Attach)?;
        let pods = self.clone();
        self.detached(async move {
            let attached = pods.begin_attach(&container, streams).await;
            attached.map_err(|error| error.context(format_args!("attach to container {}", container.id)))
        })
        .await
    }

    async fn begin_attach(&self, container: &Arc<Container>, wanted: Streams) -> Result<Session> {
        let task = task_of(container)?;
        let pod = self.pod(&container.pod_id)?;
        let (_, handler) = self.handler(&pod.record().handler)?;
        if handler.runtime != crate::sandbox::SANDBOX_RUNTIME {
            return Err(Error::new(
                Kind::Unimplemented,
                format!("containers of the shim {} cannot be attached to, only those of ours", handler.runtime),
            ));
        }
        let sandbox = pod.sandbox().ok_or_else(|| no_shim(container))?;
        let config = container.record().config.clone().unwrap_or_default();
        // A container without an input takes none, as in the peers; one with a terminal has one output.
        let streams = Streams {
            stdin: wanted.stdin && config.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr && !config.tty,
            terminal: config.tty,
        };
        let bundle = self.bundle(&container.pod_id, &container.id);
        let mut fifos =
            Fifos::create(&bundle.join(format!("attach-{}", stasis_sys::file::random_id())), streams).await?;
        let path = |path: String| (!path.is_empty()).then(|| PathBuf::from(path));
        let io = fifos.io();
        // "remains open and accepts data until the client disconnects, at which time stdin is closed" (CRI, stdin_once).
        // With a terminal there is no end of the input but what is typed.
        let ends_stdin = config.stdin_once && !config.tty;
        let request = AttachRequest {
            id: container.id.clone(),
            stdin: path(io.stdin),
            stdout: path(io.stdout),
            stderr: path(io.stderr),
            ends_stdin,
        };
        sandbox.attach(&request).await?;
        fifos.connected();
        Ok(session(fifos, !ends_stdin, Target::Attached { container: Arc::clone(container), task }))
    }

    /// Connects to a TCP port inside a pod's network: 127.0.0.1 first, then ::1.
    ///
    /// # Errors
    /// `FailedPrecondition` unless the pod is ready; `Unavailable` where nobody listens.
    pub async fn connect(&self, pod_id: &str, port: u16) -> Result<TcpStream> {
        let (id, namespace) = self.network_of(pod_id)?;
        let mut refusals = Vec::new();
        for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let connected = connect(namespace.clone(), SocketAddr::new(address, port));
            match tokio::time::timeout(CONNECT_LIMIT, connected).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => refusals.push(format!("{address}: {error}")),
                Err(_) => refusals.push(format!("{address}: no answer within {} s", CONNECT_LIMIT.as_secs())),
            }
        }
        let refusals = refusals.join("; ");
        Err(Error::new(Kind::Unavailable, format!("cannot connect to port {port} inside pod {id}: {refusals}")))
    }

    fn running(&self, id: &str, operation: Operation) -> Result<Arc<Container>> {
        let container = self.container(id)?;
        admit(operation, container.record().phase(), &container.id)?;
        Ok(container)
    }

    /// A ready pod's ID and the pin of its network namespace; none for the host's.
    fn network_of(&self, id: &str) -> Result<(String, Option<PathBuf>)> {
        let pod = self.pod(id)?;
        if pod.sandbox().is_none() {
            return Err(Error::precondition(format!("cannot reach the ports of pod {}: it is not ready", pod.id)));
        }
        let host = pod.record().config.as_ref().is_some_and(files::host_network);
        let pinned = self.pod_dir(&pod.id).join(layout::NAMESPACES).join("net");
        Ok((pod.id.clone(), (!host).then_some(pinned)))
    }
}

fn session(mut fifos: Fifos, detaches_with_stdin: bool, target: Target) -> Session {
    Session {
        stdin: fifos.take_stdin(),
        stdout: fifos.take_stdout(),
        stderr: fifos.take_stderr(),
        detaches_with_stdin,
        control: Control(target),
    }
}

fn task_of(container: &Container) -> Result<Arc<dyn Task>> {
    container.task().ok_or_else(|| no_shim(container))
}

fn no_shim(container: &Container) -> Error {
    Error::new(Kind::Unavailable, format!("container {} has no shim any more", container.id))
}

async fn connect(namespace: Option<PathBuf>, address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = match (namespace, address) {
        (None, SocketAddr::V4(_)) => TcpSocket::new_v4()?,
        (None, SocketAddr::V6(_)) => TcpSocket::new_v6()?,
        (Some(namespace), _) => {
            let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let made = tokio::task::spawn_blocking(move || tcp_socket_in(&namespace, family));
            TcpSocket::from_std_stream(made.await.map_err(std::io::Error::other)??.into())
        }
    };
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
