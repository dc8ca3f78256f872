//! The server by WebSocket clients of every age, with a backend of pipes.

#![allow(missing_docs, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use stasis_streaming::{Backend, Config, Control, Failure, Request, Server, Session, Size, Streams, Tls};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

const PATIENCE: Duration = Duration::from_secs(20);

/// A process that gives back its input and ends with it.
#[derive(Default)]
struct Echo {
    ended: Notify,
    sizes: Mutex<Vec<Size>>,
    abandoned: Notify,
}

#[derive(Clone, Default)]
struct Fake(Arc<Echo>);

#[async_trait]
impl Backend for Fake {
    async fn exec(&self, _: &str, command: Vec<String>, streams: Streams) -> Result<Session, Failure> {
        if command == ["fail"] {
            return Err(Failure("no such program".to_owned()));
        }
        let (stdin, mut input) = pipe::pipe().unwrap();
        let (mut output, stdout) = pipe::pipe().unwrap();
        let echo = Arc::clone(&self.0);
        // A process whose input nobody has runs on.
        let (stdin, held) = if streams.stdin { (Some(stdin), None) } else { (None, Some(stdin)) };
        tokio::spawn(async move {
            let _held = held;
            tokio::io::copy(&mut input, &mut output).await.unwrap();
            drop(output);
            echo.ended.notify_one();
        });
        Ok(Session {
            stdin,
            stdout: Some(stdout),
            stderr: None,
            detaches_with_stdin: false,
            control: Arc::new(self.clone()),
        })
    }

    async fn attach(&self, _: &str, _: Streams) -> Result<Session, Failure> {
        Err(Failure("nothing to attach to".to_owned()))
    }

    /// Where the port is that of a listener on this host.
    async fn connect(&self, _: &str, port: u16) -> Result<TcpStream, Failure> {
        TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| Failure(error.to_string()))
    }
}

#[async_trait]
impl Control for Fake {
    async fn resize(&self, size: Size) {
        self.0.sizes.lock().unwrap().push(size);
    }

    async fn close_stdin(&self) {}

    async fn wait(&self) -> Result<Option<u32>, Failure> {
        self.0.ended.notified().await;
        Ok(Some(5))
    }

    async fn abandon(&self) {
        self.0.abandoned.notify_one();
    }
}

async fn server(backend: Fake, idle: Duration, tls: Option<Tls>) -> Server {
    let config = Config { address: "127.0.0.1:0".parse().unwrap(), tls, idle };
    let (server, serving) = Server::bind(config, Arc::new(backend)).await.unwrap();
    tokio::spawn(serving);
    server
}

fn exec(command: &str) -> Request {
    let streams = Streams { stdin: true, stdout: true, ..Streams::default() };
    Request::Exec { container: "c".to_owned(), command: vec![command.to_owned()], streams }
}

fn parts(url: &str) -> (SocketAddr, String) {
    let (_, rest) = url.split_once("://").unwrap();
    let (address, path) = rest.split_once('/').unwrap();
    (address.parse().unwrap(), format!("/{path}"))
}

/// Upgrades a connection; the answer's head is given, too.
async fn upgrade<T: AsyncRead + AsyncWrite + Unpin>(
    mut io: T,
    path: &str,
    protocol: &str,
) -> (WebSocketStream<T>, String) {
    let offer = if protocol.is_empty() { String::new() } else { format!("Sec-WebSocket-Protocol: {protocol}\r\n") };
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{offer}\r\n"
    );
    io.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(io.read_u8().await.unwrap());
    }
    (WebSocketStream::from_raw_socket(io, Role::Client, None).await, String::from_utf8(answer).unwrap())
}

async fn connect(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let (address, path) = parts(url);
    let (socket, answer) = upgrade(TcpStream::connect(address).await.unwrap(), &path, protocol).await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    let named = answer.to_ascii_lowercase().contains("sec-websocket-protocol");
    assert_eq!(named, !protocol.is_empty(), "{answer}");
    socket
}

/// All that comes until the server closes.
async fn rest(socket: &mut WebSocketStream<impl AsyncRead + AsyncWrite + Unpin>) -> Vec<Message> {
    let mut messages = Vec::new();
    let reading = async {
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Close(_) => break,
                message => messages.push(message),
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.unwrap();
    messages
}

fn binary(data: &[u8]) -> Message {
    Message::Binary(data.to_vec().into())
}

#[tokio::test]
async fn the_protocols_of_all_ages_are_spoken() {
    let server = server(Fake::default(), PATIENCE, None).await;
    let status = r#"{"details":{"causes":[{"message":"5","reason":"ExitCode"}]},"message":"command terminated with non-zero exit code: exit status 5","metadata":{},"reason":"NonZeroExitCode","status":"Failure"}"#;
    // Only in version 5 a client can end its input.
    let mut socket = connect(&server.url(exec("echo")).unwrap(), "v5.channel.k8s.io").await;
    for message in [binary(b"\0hello"), binary(&[255, 0])] {
        socket.send(message).await.unwrap();
    }
    let expected = [binary(b"\x01"), binary(b"\x01hello"), binary(&[b"\x03", status.as_bytes()].concat())];
    assert_eq!(rest(&mut socket).await, expected);

    for (protocol, ends) in [("", "channel"), ("channel.k8s.io", ""), ("v4.channel.k8s.io", "")] {
        let mut socket = connect(&server.url(exec("fail")).unwrap(), protocol).await;
        let messages = rest(&mut socket).await;
        assert_eq!(messages[0], binary(b"\x01"), "{protocol} {ends}");
        let error = messages[1].clone().into_data();
        assert_eq!(error[0], 3);
        let text = std::str::from_utf8(&error[1..]).unwrap();
        match protocol {
            "v4.channel.k8s.io" => assert!(text.contains(r#""reason":"InternalError""#), "{text}"),
            _ => assert_eq!(text, "no such program"),
        }
    }
    let mut socket = connect(&server.url(exec("fail")).unwrap(), "base64.channel.k8s.io").await;
    assert_eq!(rest(&mut socket).await, [Message::Text("1".into()), Message::Text("3bm8gc3VjaCBwcm9ncmFt".into())]);
}

#[tokio::test]
async fn base64_is_taken_and_given() {
    let server = server(Fake::default(), PATIENCE, None).await;
    let mut socket = connect(&server.url(exec("echo")).unwrap(), "v4.base64.channel.k8s.io").await;
    socket.send(Message::Text("0aGVsbG8=".into())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Text("1".into()));
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Text("1aGVsbG8=".into()));
}

#[tokio::test]
async fn a_client_that_goes_abandons_its_process() {
    let backend = Fake::default();
    let server = server(backend.clone(), PATIENCE, None).await;
    // Without input the process does not end with it.
    let streams = Streams { stdout: true, tty: true, ..Streams::default() };
    let request = Request::Exec { container: "c".to_owned(), command: vec!["echo".to_owned()], streams };
    let mut socket = connect(&server.url(request).unwrap(), "v5.channel.k8s.io").await;
    socket.send(binary(b"\x04{\"Width\":80,\"Height\":24}")).await.unwrap();
    socket.next().await.unwrap().unwrap();
    while backend.0.sizes.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(backend.0.sizes.lock().unwrap()[..], [Size { width: 80, height: 24 }]);
    drop(socket);
    tokio::time::timeout(PATIENCE, backend.0.abandoned.notified()).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_is_idle_is_closed() {
    let backend = Fake::default();
    let server = server(backend.clone(), Duration::from_millis(100), None).await;
    let mut socket = connect(&server.url(exec("echo")).unwrap(), "v5.channel.k8s.io").await;
    rest(&mut socket).await;
    tokio::time::timeout(PATIENCE, backend.0.abandoned.notified()).await.unwrap();
}

#[tokio::test]
async fn ports_are_two_channels_each() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    // Nobody listens on the port of one that was just closed.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let server = server(Fake::default(), PATIENCE, None).await;
    let request = Request::PortForward { pod: "p".to_owned(), ports: vec![port, closed] };
    let mut socket = connect(&server.url(request).unwrap(), "v4.channel.k8s.io").await;
    let greeting = |channel: u8, port: u16| binary(&[&[channel], port.to_le_bytes().as_slice()].concat());
    for expected in [greeting(0, port), greeting(1, port), greeting(2, closed), greeting(3, closed)] {
        assert_eq!(socket.next().await.unwrap().unwrap(), expected);
    }
    let (mut peer, _) = listener.accept().await.unwrap();
    socket.send(binary(b"\0to the pod")).await.unwrap();
    let mut text = [0; 10];
    peer.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"to the pod");
    peer.write_all(b"and back").await.unwrap();
    let (mut refused, mut back) = (Vec::new(), Vec::new());
    while back != b"and back" || !String::from_utf8_lossy(&refused).contains("refused") {
        let data = socket.next().await.unwrap().unwrap().into_data();
        match data[0] {
            0 => back.extend_from_slice(&data[1..]),
            3 => refused.extend_from_slice(&data[1..]),
            other => panic!("channel {other}"),
        }
    }
    assert!(String::from_utf8(refused).unwrap().starts_with(&format!("error forwarding port {closed} to pod p: ")));
}

#[tokio::test]
async fn it_speaks_tls_and_names_a_file_that_it_cannot_use() {
    let file = |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../image/tests/images/tls").join(name);
    let tls = Tls { certificate: file("server.pem"), key: file("server.key") };
    let server = server(Fake::default(), PATIENCE, Some(tls.clone())).await;
    let url = server.url(exec("fail")).unwrap();
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let (address, path) = parts(&url);
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let (mut socket, answer) = upgrade(stream, &path, "v5.channel.k8s.io").await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    assert_eq!(rest(&mut socket).await.len(), 2);

    let broken = Config {
        address: "127.0.0.1:0".parse().unwrap(),
        tls: Some(Tls { certificate: file("none.pem"), ..tls }),
        idle: PATIENCE,
    };
    let error = Server::bind(broken, Arc::new(Fake::default())).await.err().unwrap().to_string();
    assert!(error.contains("none.pem"), "{error}");
}
