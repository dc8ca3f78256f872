//! Just enough of an API server for `kubectl exec`, `attach` and `port-forward`: one pod, one container, and upgrades that
//! go on to the URL that the runtime gives, byte by byte, as the kubelet passes them on.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use stasis_cri_api::runtime::{AttachRequest, ExecRequest, PortForwardRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use xtask::cri::{Container, Cri, Pod};

use crate::Stage;

/// Name of the pod and of its container, for kubectl.
pub const NAME: &str = "main";

/// Longest request head that is read.
const HEAD_MAX: usize = 64 * 1024;

/// By which way kubectl is to reach the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What kubelets of all versions speak to a runtime.
    Spdy,
    /// What kubectl tries first.
    WebSocket,
}

/// An API server that lives as long as this value.
#[derive(Debug)]
pub struct Kube {
    address: SocketAddr,
    kubectl: PathBuf,
    home: PathBuf,
    // The server's thread ends when its runtime is told to by the drop of this.
    _stop: tokio::sync::oneshot::Sender<()>,
}

/// What the server knows.
#[derive(Clone, Debug)]
struct Facts {
    socket: PathBuf,
    pod: String,
    container: String,
    stdin: bool,
    tty: bool,
}

impl Kube {
    /// Serves one container of a pod. `stdin` and `tty` are those of its configuration.
    ///
    /// # Errors
    /// Where the server cannot be started.
    pub fn start(stage: &Stage, pod: &Pod, container: &Container, stdin: bool, tty: bool) -> Result<Kube> {
        let facts = Facts {
            socket: stage.node.ground.socket(),
            pod: pod.id.clone(),
            container: container.id.clone(),
            stdin,
            tty,
        };
        let listener = StdListener::bind("127.0.0.1:0").context("listen as an API server")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        // A thread of its own: the tests wait for kubectl without letting others work.
        std::thread::Builder::new().name("api-server".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            runtime.block_on(async {
                tokio::select! {
                    _ = serve(listener, facts) => {}
                    _ = stopped => {}
                }
            });
        })?;
        let kubectl = stage.places.clients().join("bin/kubectl");
        Ok(Kube { address, kubectl, home: stage.node.ground.disk.clone(), _stop: stop })
    }

    /// kubectl with its server and nothing of the machine's own configuration.
    pub fn kubectl(&self, way: Way) -> Command {
        let mut command = Command::new(&self.kubectl);
        let websockets = (way == Way::WebSocket).to_string();
        command
            .arg(format!("--server=http://{}", self.address))
            .env("HOME", &self.home)
            .env("KUBECONFIG", "/dev/null")
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", &websockets)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", &websockets)
            .stdin(Stdio::null());
        command
    }

    /// The same as text for a shell.
    pub fn kubectl_line(&self, way: Way) -> String {
        let command = self.kubectl(way);
        let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        let variables = command.get_envs().filter_map(|(name, value)| Some(format!("{}={}", text(name), text(value?))));
        let words = std::iter::once(command.get_program()).chain(command.get_args()).map(text);
        let mut line: Vec<String> = variables.collect();
        line.extend(words);
        line.join(" ")
    }
}

async fn serve(listener: StdListener, facts: Facts) -> Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (client, _) = listener.accept().await?;
        let facts = facts.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(client, &facts).await {
                eprintln!("the API server: {error:#}");
            }
        });
    }
}

/// One request a connection.
async fn answer(mut client: TcpStream, facts: &Facts) -> Result<()> {
    let head = read_head(&mut client).await?;
    let Some((line, headers)) = head.split_once("\r\n") else { return Ok(()) };
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pod = format!("/api/v1/namespaces/default/pods/{NAME}");
    if let Some(call) = path.strip_prefix(&format!("{pod}/")) {
        let url = runtime_url(facts, call, &parse_query(query)).await?;
        return pass_on(client, method, headers, &url).await;
    }
    let body = match path {
        "/api" => json!({ "kind": "APIVersions", "versions": ["v1"] }),
        "/apis" => json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [] }),
        "/api/v1" => resources(),
        path if path == pod => pod_object(facts),
        _ => Value::Null,
    };
    let (code, body) = if body.is_null() { ("404 Not Found", String::new()) } else { ("200 OK", body.to_string()) };
    let answer = format!(
        "HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    client.write_all(answer.as_bytes()).await?;
    Ok(client.shutdown().await?)
}

async fn read_head(client: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    // A byte at a time: what follows the head belongs to what the connection becomes.
    while !head.ends_with(b"\r\n\r\n") {
        match client.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return Ok(String::new()),
        }
        if head.len() > HEAD_MAX {
            bail!("a request head without end");
        }
    }
    Ok(String::from_utf8(head)?)
}

/// What the kubelet would ask the runtime.
async fn runtime_url(facts: &Facts, call: &str, query: &[(String, String)]) -> Result<String> {
    let mut cri = Cri::connect(&facts.socket).await?;
    let flag = |name: &str| query.iter().any(|(key, value)| key == name && value == "true");
    let (stdin, stdout, stderr, tty) = (flag("stdin"), flag("stdout"), flag("stderr"), flag("tty"));
    let container_id = facts.container.clone();
    Ok(match call {
        "exec" => {
            let cmd = query.iter().filter(|(key, _)| key == "command").map(|(_, value)| value.clone()).collect();
            let request = ExecRequest { container_id, cmd, tty, stdin, stdout, stderr };
            cri.runtime.exec(request).await?.into_inner().url
        }
        "attach" => {
            let request = AttachRequest { container_id, stdin, tty, stdout, stderr };
            cri.runtime.attach(request).await?.into_inner().url
        }
        "portforward" => {
            let request = PortForwardRequest { pod_sandbox_id: facts.pod.clone(), port: Vec::new() };
            cri.runtime.port_forward(request).await?.into_inner().url
        }
        other => bail!("no such call: {other}"),
    })
}

/// Sends the request on to the runtime, and then every byte in both directions.
async fn pass_on(mut client: TcpStream, method: &str, headers: &str, url: &str) -> Result<()> {
    let (address, path) = split_url(url)?;
    let mut server = TcpStream::connect(address).await?;
    server.write_all(format!("{method} {path} HTTP/1.1\r\n{headers}").as_bytes()).await?;
    // One side may go away abruptly, as people do.
    let _ = copy_bidirectional(&mut client, &mut server).await;
    Ok(())
}

/// Address and path of a URL of the runtime's.
///
/// # Errors
/// Where it is none.
pub fn split_url(url: &str) -> Result<(SocketAddr, String)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("{url} is no http URL"))?;
    let (address, path) = rest.split_once('/').context("a URL without a path")?;
    Ok((address.parse()?, format!("/{path}")))
}

fn parse_query(query: &str) -> Vec<(String, String)> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decode(key), decode(value))).collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits = [rest.next().unwrap_or(b'0'), rest.next().unwrap_or(b'0')];
                bytes.push(u8::from_str_radix(&String::from_utf8_lossy(&digits), 16).unwrap_or(b'?'));
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn resources() -> Value {
    let resource = |name: &str, kind: &str| json!({ "name": name, "singularName": "", "namespaced": true, "kind": kind, "verbs": ["get", "create"] });
    json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": "v1",
        "resources": [
            resource("pods", "Pod"),
            resource("pods/exec", "PodExecOptions"),
            resource("pods/attach", "PodAttachOptions"),
            resource("pods/portforward", "PodPortForwardOptions"),
        ],
    })
}

fn pod_object(facts: &Facts) -> Value {
    json!({
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": { "name": NAME, "namespace": "default", "uid": "1" },
        "spec": { "containers": [{ "name": NAME, "image": "x", "stdin": facts.stdin, "tty": facts.tty }] },
        "status": {
            "phase": "Running",
            "conditions": [{ "type": "Ready", "status": "True" }],
            "containerStatuses": [{ "name": NAME, "ready": true, "state": { "running": {} } }],
        },
    })
}

/// What the open descriptors of a process are.
///
/// # Errors
/// Where they cannot be read.
pub fn descriptors(pid: u32) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd"))? {
        // One that was closed meanwhile is none.
        names.extend(std::fs::read_link(entry?.path()).map(|target| target.display().to_string()));
    }
    Ok(names)
}
