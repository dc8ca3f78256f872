//! Exec, attach and port-forward as users meet them: by kubectl, over SPDY and over WebSocket.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use sha2::{Digest, Sha256};
use stasis_cri_api::runtime::{AttachRequest, ContainerConfig, ExecRequest, NamespaceMode, PortForwardRequest};
use stasis_e2e::kube::{Kube, NAME, Way, descriptors, split_url};
use stasis_e2e::{PATIENCE, Stage, check, eventually, shell};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use xtask::cri::{Container, Pod};
use xtask::node::Setup;
use xtask::process::{Said, wait};

const WAYS: [Way; 2] = [Way::Spdy, Way::WebSocket];

/// More than any window or buffer on the way.
const BULK: u64 = 128 << 20;

/// How much of the daemon's memory a forwarded connection may take, whatever its volume.
const GROWTH_MAX_KIB: u64 = 16 << 10;

/// Sessions after which nothing may have piled up.
const SESSIONS: usize = 200;

/// Runs kubectl with an input to its end.
fn ask(command: &mut Command, input: &[u8]) -> Result<Said> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("start kubectl")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let (mut stdout, mut stderr) =
        (child.stdout.take().context("no stdout")?, child.stderr.take().context("no stderr")?);
    let input = input.to_vec();
    // It may end before it has read everything.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| text)
    });
    let output = std::thread::spawn(move || {
        let mut text = Vec::new();
        stdout.read_to_end(&mut text).map(|_| text)
    });
    let status = wait(&mut child, PATIENCE);
    let text = |reader: std::thread::JoinHandle<std::io::Result<Vec<u8>>>| -> Result<String> {
        Ok(String::from_utf8_lossy(&reader.join().ok().context("a reader panicked")??).into_owned())
    };
    let said = Said { status: status?, stdout: text(output)?, stderr: text(errors)? };
    writer.join().ok().context("a writer panicked")?;
    Ok(said)
}

fn with_stdin(mut config: ContainerConfig, once: bool, tty: bool) -> ContainerConfig {
    (config.stdin, config.stdin_once, config.tty) = (true, once, tty);
    config
}

async fn scene(stage: &mut Stage, config: ContainerConfig) -> Result<(Pod, Container, Kube)> {
    stage.import(&["busybox"])?;
    let pod = stage.pod("pod").await?;
    let (stdin, tty) = (config.stdin, config.tty);
    let container = stage.container(&pod, config).await?;
    let kube = Kube::start(stage, &pod, &container, stdin, tty)?;
    Ok((pod, container, kube))
}

#[test]
fn kubectl_executes_with_input_output_and_exit_code() {
    check("sexec", Setup::default(), async |stage| {
        let (pod, _container, kube) = scene(stage, shell("main", "sleep 1000")).await?;
        for way in WAYS {
            let exec = |arguments: &[&str], input: &[u8]| {
                let mut command = kube.kubectl(way);
                ask(command.arg("exec").args(arguments), input).with_context(|| format!("{way:?} {arguments:?}"))
            };
            let said = exec(&[NAME, "--", "sh", "-c", "echo out; echo err >&2; exit 3"], b"")?;
            assert_eq!((said.stdout.as_str(), said.status.code()), ("out\n", Some(3)), "{way:?}: {said:?}");
            assert!(said.stderr.starts_with("err\n"), "{way:?}: {said:?}");
            // The end of the input reaches the command, and not before all of it.
            let input: Vec<u8> = (0..3_000_000u32).map(|number| number as u8).collect();
            let said = exec(&["-i", NAME, "--", "sha256sum"], &input)?;
            let digest: String = Sha256::digest(&input).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(
                (said.stdout.trim_end(), said.status.code()),
                (format!("{digest}  -").as_str(), Some(0)),
                "{way:?}"
            );
            // All of the output arrives, however soon the command ends after it.
            let said = exec(&[NAME, "--", "seq", "1", "200000"], b"")?;
            assert!(said.stdout.ends_with("\n200000\n"), "{way:?}");
            assert_eq!(said.stdout.lines().count(), 200_000, "{way:?}");
            // What a command leaves behind does not hold up its end.
            let said = exec(&[NAME, "--", "sh", "-c", "sleep 300 & echo begun"], b"")?;
            assert_eq!((said.stdout.as_str(), said.status.code()), ("begun\n", Some(0)), "{way:?}");
            let said = exec(&[NAME, "--", "no-such-program"], b"")?;
            ensure!(!said.status.success() && said.stderr.contains("no-such-program"), "{way:?}: {said:?}");
        }
        stage.remove(&pod).await
    });
}

#[test]
fn a_terminal_has_the_size_of_the_clients_and_follows_it() {
    check("stty", Setup::default(), async |stage| {
        let (pod, _container, kube) = scene(stage, shell("main", "sleep 1000")).await?;
        for way in WAYS {
            let remote = "for size in '40 132' '50 100'; do until [ \"$(stty size)\" = \"$size\" ]; do sleep 0.05; done; \
                          echo \"seen $size\"; done; exit 7";
            let kubectl = kube.kubectl_line(way);
            // The terminal changes between two sizes until both were seen on the other side.
            let local = format!(
                "T=$(tty); (while sleep 0.3; do stty -F $T rows 50 cols 100; sleep 0.3; stty -F $T rows 40 cols 132; done) & \
                 stty rows 40 cols 132; {kubectl} exec -it {NAME} -- sh -c '{}'; E=$?; kill $!; exit $E",
                remote.replace('\'', r"'\''"),
            );
            let said = ask(Command::new("script").args(["-qefc", &local, "/dev/null"]), b"")?;
            assert!(
                said.stdout.contains("seen 40 132\r\n") && said.stdout.contains("seen 50 100\r\n"),
                "{way:?}: {said:?}"
            );
            assert_eq!(said.status.code(), Some(7), "{way:?}: {said:?}");
        }
        stage.remove(&pod).await
    });
}

#[test]
fn kubectl_attaches_to_a_container_that_is_older_than_the_daemon() {
    check("sattach", Setup::default(), async |stage| {
        let script =
            "echo begun; while read line; do echo \"got $line\"; echo \"err $line\" >&2; done; echo ended; exit 5";
        let (pod, container, kube) = scene(stage, with_stdin(shell("main", script), true, false)).await?;
        stage.node.kill_daemon()?;
        stage.node.restart_daemon().await?;
        let said = ask(kube.kubectl(Way::Spdy).args(["attach", "-i", NAME]), b"one\ntwo\n")?;
        // The input of such a container ends with its first client, and the client sees the rest of the output.
        assert_eq!(said.stdout, "got one\ngot two\nended\n", "{said:?}");
        assert!(said.stderr.contains("err one\nerr two\n"), "{said:?}");
        assert_eq!(stage.exited(&container).await?.exit_code, 5);
        let mut log = xtask::cri::messages(&container.log);
        log.retain(|line| !line.starts_with("err"));
        assert_eq!(log, ["begun", "got one", "got two", "ended"]);
        stage.remove(&pod).await
    });
}

#[test]
fn clients_come_and_go_while_the_container_runs() {
    check("scome", Setup::default(), async |stage| {
        let script = "while read line; do echo \"got $line\"; done; echo ended";
        let (pod, container, _kube) = scene(stage, with_stdin(shell("main", script), false, false)).await?;
        let mut expected = Vec::new();
        for round in 0..3 {
            let mut first = attach(stage, &container, false).await?;
            let line = format!("first {round}");
            first.send(input(&format!("{line}\n"))).await?;
            assert_eq!(output(&mut first, 1, |text| text.ends_with('\n')).await?, format!("got {line}\n"));
            let mut second = attach(stage, &container, false).await?;
            let next = format!("second {round}");
            second.send(input(&format!("{next}\n"))).await?;
            for client in [&mut first, &mut second] {
                assert_eq!(output(client, 1, |text| text.ends_with('\n')).await?, format!("got {next}\n"));
            }
            expected.extend([format!("got {line}"), format!("got {next}")]);
        }
        assert_eq!(xtask::cri::messages(&container.log), expected);
        stage.remove(&pod).await
    });
}

#[test]
fn a_terminal_that_is_attached_to_takes_keys_and_sizes() {
    check("skeys", Setup::default(), async |stage| {
        let (pod, container, _kube) = scene(stage, with_stdin(shell("main", "exec sh"), false, true)).await?;
        let mut client = attach(stage, &container, true).await?;
        client.send(Message::Binary(b"\x04{\"Width\":132,\"Height\":43}".as_slice().into())).await?;
        client.send(input("until [ \"$(stty size)\" = '43 132' ]; do sleep 0.1; done; echo se''en\n")).await?;
        let text = output(&mut client, 1, |text| text.contains("seen")).await?;
        assert!(text.contains("seen\r\n"), "{text}");
        stage.remove(&pod).await
    });
}

#[test]
fn ports_are_forwarded_whole_and_with_little_memory() {
    check("sport", Setup::default(), async |stage| {
        let script = format!(
            "mkdir /www; dd if=/dev/urandom of=/www/bulk bs=1048576 count={} 2>/dev/null; sha256sum /www/bulk; \
             httpd -p 127.0.0.1:8080 -h /www; httpd -p '[::1]:8081' -h /www; \
             sleep 1000 | nc -l -p 9000 | sha256sum",
            BULK >> 20
        );
        let (pod, container, kube) = scene(stage, shell("main", &script)).await?;
        let digest = |line: usize| {
            let log = container.log.clone();
            async move {
                eventually("a digest", async || {
                    let messages = xtask::cri::messages(&log);
                    Ok(messages.get(line).map(|line| line.split(' ').next().unwrap_or_default().to_owned()))
                })
                .await
            }
        };
        let expected = digest(0).await?;
        let before = resident_peak(stage.node.pid())?;
        for way in WAYS {
            let forward = Forward::start(&kube, way, &["8080", "8081"])?;
            for (port, target) in forward.ports.iter().zip(["127.0.0.1", "::1"]) {
                let bulk = download(*port).with_context(|| format!("{way:?} to {target}"))?;
                assert_eq!(bulk, (BULK, expected.clone()), "{way:?} to {target}");
            }
        }
        let forward = Forward::start(&kube, Way::Spdy, &["9000"])?;
        let sent = upload(forward.ports[0])?;
        // It is the end of the connection that ends the digest: the half-close went through.
        assert_eq!(digest(1).await?, sent);
        let grown = resident_peak(stage.node.pid())? - before;
        assert!(grown < GROWTH_MAX_KIB, "the daemon's memory grew by {grown} KiB");
        stage.remove(&pod).await
    });
}

#[test]
fn a_port_where_nobody_listens_and_one_of_the_host() {
    check("shost", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let mut config = stage.node.pod_config("pod");
        let options =
            config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()?.namespace_options.as_mut());
        options.context("no namespace options")?.network = NamespaceMode::Node.into();
        let pod = stage.node.cri.run_pod(config).await?;
        let container = stage.script(&pod, "main", "sleep 1000").await?;
        let kube = Kube::start(stage, &pod, &container, false, false)?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let forward = Forward::start(&kube, Way::Spdy, &[&port.to_string()])?;
        let mut client = TcpStream::connect(("127.0.0.1", forward.ports[0]))?;
        let (mut server, _) = listener.accept()?;
        server.write_all(b"hello")?;
        let mut text = [0; 5];
        client.read_exact(&mut text)?;
        assert_eq!(&text, b"hello");
        drop((server, client, listener));
        let mut client = TcpStream::connect(("127.0.0.1", forward.ports[0]))?;
        assert_eq!(client.read(&mut text).unwrap_or(0), 0);
        let said = forward.end()?;
        assert!(said.contains(&format!("cannot connect to port {port} inside pod {}", pod.id)), "{said}");
        assert!(said.contains("127.0.0.1: Connection refused") && said.contains("::1: "), "{said}");
        stage.remove(&pod).await
    });
}

#[test]
fn sessions_that_end_and_that_break_off_leave_nothing_behind() {
    check("sflat", Setup::default(), async |stage| {
        let script = "while read line; do :; done; sleep 1000";
        let (pod, container, _kube) = scene(stage, with_stdin(shell("main", script), false, false)).await?;
        let shim = *stage.node.shims()?.first().context("no shim")?;
        // The first sessions bring what stays: connections to the shim, threads.
        sessions(stage, &container, 20).await?;
        let bundle = stage.node.ground.state().join("pods").join(&pod.id).join("bundles").join(&container.id);
        no_session(&bundle, shim).await?;
        let before = [descriptors(stage.node.pid())?.len(), descriptors(shim)?.len()];
        let memory = resident_peak(stage.node.pid())?;
        sessions(stage, &container, SESSIONS).await?;
        no_session(&bundle, shim).await?;
        let after = [descriptors(stage.node.pid())?.len(), descriptors(shim)?.len()];
        // A connection to the shim or a thread of the daemon more says nothing; a tenth of the sessions would.
        assert!(after[0] <= before[0] + SESSIONS / 10 && after[1] <= before[1], "{before:?} became {after:?}");
        let grown = resident_peak(stage.node.pid())? - memory;
        assert!(grown < GROWTH_MAX_KIB, "the daemon's memory grew by {grown} KiB");
        stage.remove(&pod).await
    });
}

/// Waits until no session has a file or, in the shim, a descriptor.
async fn no_session(bundle: &Path, shim: u32) -> Result<()> {
    eventually("the end of all sessions", async || {
        let files = std::fs::read_dir(bundle)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let open = descriptors(shim)?.into_iter().filter_map(|name| Some(name.rsplit_once("/bundles/")?.1.to_owned()));
        let mut names = files.chain(open);
        Ok((!names.any(|name| name.contains("exec-") || name.contains("attach-"))).then_some(()))
    })
    .await
}

/// Commands that end, commands that are left by their client, and attaches that break off.
async fn sessions(stage: &mut Stage, container: &Container, count: usize) -> Result<()> {
    for number in 0..count {
        let mut ends = exec(stage, container, &["sh", "-c", "cat; exit 4"]).await?;
        ends.send(input("bye")).await?;
        ends.send(Message::Binary([255, 0].as_slice().into())).await?;
        let status = output(&mut ends, 3, |text| text.ends_with('}')).await?;
        ensure!(status.contains(r#""message":"4""#), "{status}");
        if number % 4 == 0 {
            // cat ends with its input, which ends with its client.
            let mut left = exec(stage, container, &["cat"]).await?;
            left.send(input("x")).await?;
            output(&mut left, 1, |text| text == "x").await?;
            drop(left);
            let mut attached = attach(stage, container, false).await?;
            attached.send(input("line\n")).await?;
            drop(attached);
        }
    }
    Ok(())
}

#[test]
fn a_url_works_once_and_says_what_is_wrong() {
    check("surl", Setup::default(), async |stage| {
        let (pod, container, _kube) = scene(stage, shell("main", "sleep 1000")).await?;
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: vec!["true".to_owned()],
            stdout: true,
            ..ExecRequest::default()
        };
        let url = stage.node.cri.runtime.exec(request.clone()).await?.into_inner().url;
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        let get = async |headers: &str| -> Result<String> {
            let (address, path) = split_url(&url)?;
            let mut stream = tokio::net::TcpStream::connect(address).await?;
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes()).await?;
            let mut answer = vec![0; 4096];
            let length = stream.read(&mut answer).await?;
            Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
        };
        // Not an upgrade: refused, and the token stays.
        let plain = get("").await?;
        assert!(plain.starts_with("HTTP/1.1 400") && plain.contains("SPDY/3.1 or websocket"), "{plain}");
        let offer = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
        let taken = get(offer).await?;
        assert!(taken.starts_with("HTTP/1.1 101"), "{taken}");
        let again = get(offer).await?;
        assert!(again.starts_with("HTTP/1.1 404") && again.contains("works once"), "{again}");
        let runtime = &mut stage.node.cri.runtime;
        let refused = runtime.exec(ExecRequest { tty: true, stderr: true, ..request.clone() }).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        let refused = runtime.exec(ExecRequest { stdout: false, ..request }).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        let forward = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![70_000] };
        assert_eq!(runtime.port_forward(forward).await.unwrap_err().code(), tonic::Code::InvalidArgument);
        stage.node.cri.stop(&container, 0).await?;
        let attach = AttachRequest { container_id: container.id.clone(), stdout: true, ..AttachRequest::default() };
        let refused = stage.node.cri.runtime.attach(attach).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("must be running"), "{refused}");
        stage.remove(&pod).await
    });
}

/// Input for a process.
fn input(text: &str) -> Message {
    Message::Binary([b"\0", text.as_bytes()].concat().into())
}

type Client = WebSocketStream<tokio::net::TcpStream>;

async fn exec(stage: &mut Stage, container: &Container, command: &[&str]) -> Result<Client> {
    let request = ExecRequest {
        container_id: container.id.clone(),
        cmd: command.iter().map(|word| (*word).to_owned()).collect(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    connect(&stage.node.cri.runtime.exec(request).await?.into_inner().url).await
}

async fn attach(stage: &mut Stage, container: &Container, tty: bool) -> Result<Client> {
    let request = AttachRequest { container_id: container.id.clone(), stdin: true, stdout: true, stderr: !tty, tty };
    let mut client = connect(&stage.node.cri.runtime.attach(request).await?.into_inner().url).await?;
    // The empty message says that the connection is there, not that the container is attached to: what it then says
    // could be missed. That it takes input says so.
    let _ = client.next().await;
    Ok(client)
}

async fn connect(url: &str) -> Result<Client> {
    let (address, path) = split_url(url)?;
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await?);
    }
    let answer = String::from_utf8_lossy(&answer).to_ascii_lowercase();
    ensure!(answer.starts_with("http/1.1 101") && answer.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{answer}");
    Ok(WebSocketStream::from_raw_socket(stream, Role::Client, None).await)
}

/// What comes on one channel until it is what is looked for.
async fn output(client: &mut Client, channel: u8, found: impl Fn(&str) -> bool) -> Result<String> {
    let mut text = String::new();
    let looking = async {
        while !found(&text) {
            let message = client.next().await.context("the server closed the connection")??;
            if let Message::Binary(data) = message
                && let Some((first, data)) = data.split_first()
                && *first == channel
            {
                text.push_str(&String::from_utf8_lossy(data));
            }
        }
        Ok(())
    };
    let looked = tokio::time::timeout(PATIENCE, looking).await.context("not in time").and_then(|found| found);
    looked.with_context(|| format!("channel {channel} said {text:?}"))?;
    Ok(text)
}

/// `kubectl port-forward`, ended with the value.
struct Forward {
    child: Child,
    ports: Vec<u16>,
}

impl Forward {
    fn start(kube: &Kube, way: Way, targets: &[&str]) -> Result<Forward> {
        let mut command = kube.kubectl(way);
        command.arg("port-forward").arg(format!("pod/{NAME}")).arg("--address=127.0.0.1");
        command.args(targets.iter().map(|target| format!(":{target}")));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start kubectl")?;
        let mut forward = Forward { child, ports: Vec::new() };
        let mut lines = BufReader::new(forward.child.stdout.take().context("no stdout")?).lines();
        while forward.ports.len() < targets.len() {
            let line = lines.next().context("kubectl ended")??;
            let port = line.strip_prefix("Forwarding from 127.0.0.1:").and_then(|rest| rest.split(' ').next());
            forward.ports.extend(port.and_then(|port| port.parse::<u16>().ok()));
        }
        // It goes on writing a line for each connection.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(forward)
    }

    /// Ends it and gives what it complained of.
    fn end(mut self) -> Result<String> {
        let mut stderr = self.child.stderr.take().context("no stderr")?;
        // It writes a complaint before it closes the client's connection; on a busy machine a little later.
        std::thread::sleep(Duration::from_millis(500));
        self.child.kill()?;
        let mut text = String::new();
        stderr.read_to_string(&mut text)?;
        Ok(text)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Length and digest of what the pod's web server has.
fn download(port: u16) -> Result<(u64, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /bulk HTTP/1.0\r\n\r\n")?;
    let mut reader = BufReader::with_capacity(1 << 20, stream);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        ensure!(!line.is_empty(), "no answer");
        if line == "\r\n" {
            break;
        }
    }
    let (mut digest, mut length, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        match reader.read(&mut buffer)? {
            0 => break,
            count => {
                digest.update(&buffer[..count]);
                length += count as u64;
            }
        }
    }
    Ok((length, hex(&digest.finalize())))
}

/// Sends as much to a port, closes, and gives the digest of it.
fn upload(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let (mut digest, chunk) = (Sha256::new(), vec![0x5a; 1 << 20]);
    for _ in 0..BULK >> 20 {
        stream.write_all(&chunk)?;
        digest.update(&chunk);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // Until the other side has seen it.
    let _ = stream.read(&mut [0]);
    Ok(hex(&digest.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The most memory that a process ever had resident, in KiB.
fn resident_peak(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
}
