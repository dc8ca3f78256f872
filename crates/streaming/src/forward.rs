//! Port-forward: TCP connections into a pod, each a pair of streams for its data and for what went wrong.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stasis_spdy::{Incoming, Limits, Stream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinSet;

use crate::backend::{Backend, Failure};
use crate::protocol::Channels;
use crate::spdy::CREATION_LIMIT;
use crate::websocket::{Framing, Socket};

/// Copied at once, in each direction of each connection.
const BUFFER: usize = 64 * 1024;

/// Ports of one WebSocket client: each takes two of 255 channels.
const PORTS_MAX: usize = 64;

/// The pod that ports are forwarded to.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) pod: String,
}

/// One half of a pair that waits for the other.
struct Half {
    is_data: bool,
    stream: Stream,
    port: u16,
    since: Instant,
}

/// Serves a SPDY client: two streams a connection, paired by the header `requestID`.
pub(crate) async fn spdy<T>(io: T, target: Target, idle: Duration) -> Result<(), String>
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, driver) = stasis_spdy::serve(io, Limits { idle: Some(idle), ..Limits::default() });
    let mut driver = tokio::spawn(driver);
    let mut waiting: HashMap<String, Half> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = connection.accept() => incoming,
            Some(_) = forwards.join_next() => continue,
        };
        let Some(incoming) = incoming else { break };
        waiting.retain(|_, half| half.since.elapsed() < CREATION_LIMIT);
        if let Some((data, error, port)) = pair(incoming, &mut waiting) {
            let target = target.clone();
            forwards.spawn(async move { forward(&target, port, data, error).await });
        }
    }
    drop(waiting);
    // No more come; those that run may end, unless the client is gone altogether.
    tokio::select! {
        () = async { while forwards.join_next().await.is_some() {} } => {}
        ended = &mut driver => return ended.map_err(|error| error.to_string())?.map_err(|error| error.to_string()),
    }
    connection.close();
    driver.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}

/// Both streams of a connection, as soon as the second is there.
fn pair(incoming: Incoming, waiting: &mut HashMap<String, Half>) -> Option<(Stream, Stream, u16)> {
    let headers = incoming.headers();
    let is_data = match headers.get("streamtype") {
        Some("data") => true,
        Some("error") => false,
        _ => {
            incoming.refuse();
            return None;
        }
    };
    let Some(port) = headers.get("port").and_then(|port| port.parse().ok()).filter(|port| *port > 0) else {
        incoming.refuse();
        return None;
    };
    // Early clients number nothing, and open the error stream first.
    let first = if is_data { incoming.id().saturating_sub(2) } else { incoming.id() };
    let id = headers.get("requestid").map_or_else(|| first.to_string(), str::to_owned);
    let Some(other) = waiting.remove(&id) else {
        let half = Half { is_data, stream: incoming.accept(), port, since: Instant::now() };
        waiting.insert(id, half);
        return None;
    };
    if other.is_data == is_data || other.port != port {
        incoming.refuse();
        return None;
    }
    let stream = incoming.accept();
    Some(if is_data { (stream, other.stream, port) } else { (other.stream, stream, port) })
}

/// One connection. What goes wrong is told on `error`, which is empty if nothing does.
async fn forward(
    target: &Target,
    port: u16,
    mut data: impl AsyncRead + AsyncWrite + Unpin,
    mut error: impl AsyncWrite + Unpin,
) {
    let done = async {
        let mut connection = target.backend.connect(&target.pod, port).await?;
        let (mut from_pod, mut to_pod) = connection.split();
        let (mut from_client, mut to_client) = tokio::io::split(&mut data);
        let copied = tokio::try_join!(
            copy(&mut from_client, &mut to_pod, Side::Client, Side::Pod),
            copy(&mut from_pod, &mut to_client, Side::Pod, Side::Client)
        );
        match copied {
            Err((Side::Pod, error)) if !matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                Err(Failure(error.to_string()))
            }
            // To reset a connection is a way to end it, at either side; kubectl gives up all of its connections when one
            // is said to have failed.
            _ => Ok(()),
        }
    };
    if let Err(failure) = done.await {
        let message = format!("error forwarding port {port} to pod {}: {failure}", target.pod);
        tracing::debug!(pod = target.pod, port, %failure, "a forwarded connection failed");
        // A client that is gone by now needs no message.
        let _ = error.write_all(message.as_bytes()).await;
    }
    let _ = error.shutdown().await;
}

/// At which end of a connection something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Pod,
}

/// Copies one direction, and passes its end on.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    reads: Side,
    writes: Side,
) -> Result<(), (Side, io::Error)> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await.map_err(|error| (reads, error))? {
            0 => break,
            length => to.write_all(&buffer[..length]).await.map_err(|error| (writes, error))?,
        }
    }
    to.shutdown().await.map_err(|error| (writes, error))
}

/// Serves a WebSocket client: two channels a port, one connection each. The first message of every channel is the port.
pub(crate) async fn channels<T>(
    io: T,
    channels: Channels,
    ports: &[u16],
    target: Target,
    idle: Duration,
) -> Result<(), String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut socket = Socket::new(io, channels.into(), idle).await;
    let mut forwards = JoinSet::new();
    for (number, port) in ports.iter().copied().enumerate().take(PORTS_MAX) {
        let channel = 2 * number as u8;
        let data = tokio::io::join(socket.input(channel), socket.output(channel));
        let error = socket.output(channel + 1);
        for channel in [channel, channel + 1] {
            socket.greet(channel, port.to_le_bytes().to_vec());
        }
        let target = target.clone();
        forwards.spawn(async move { forward(&target, port, data, error).await });
    }
    socket.run().await
}

/// Serves a client that sends SPDY inside of WebSocket messages.
pub(crate) async fn tunnelled<T>(io: T, target: Target, idle: Duration) -> Result<(), String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut socket = Socket::new(io, Framing::Raw, idle).await;
    let bytes = tokio::io::join(socket.input(0), socket.output(0));
    let pump = tokio::spawn(socket.run());
    let served = spdy(bytes, target, idle).await;
    // With its only output dropped the socket closes.
    pump.await.map_err(|error| error.to_string())??;
    served
}
