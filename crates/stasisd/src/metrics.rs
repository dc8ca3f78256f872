//! Metrics over HTTP: `GET /metrics` on a loopback address, and nothing else.
//!
//! One request a connection, with limits on its size, its time, and how many there are at once: whoever has an account on
//! this machine can connect.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Largest head of a request: Prometheus sends 300 bytes.
const REQUEST_MAX: usize = 8 * 1024;
/// Time for a request to come and its answer to leave.
const LIMIT: Duration = Duration::from_secs(10);
/// Connections that are served at once; further ones wait.
const CONNECTIONS_MAX: usize = 8;
/// Pause after an error of `accept`, which is usually a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `render` on `address` until the process ends.
pub(crate) async fn serve(
    address: SocketAddr,
    render: impl Fn() -> String + Send + Sync + 'static,
) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot serve metrics on {address}"))?;
    let local = listener.local_addr()?;
    tokio::spawn(accept(listener, Arc::new(render)));
    Ok(local)
}

async fn accept(listener: TcpListener, render: Arc<impl Fn() -> String + Send + Sync + 'static>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let render = Arc::clone(&render);
                tokio::spawn(async move {
                    // A client that goes away, or is too slow, is no concern of ours.
                    let _ = tokio::time::timeout(LIMIT, answer(stream, &*render)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, render: &(impl Fn() -> String + Sync)) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= REQUEST_MAX {
            return respond(&mut stream, "431 Request Header Fields Too Large", "text/plain", "too long\n").await;
        }
        let mut piece = [0; 1024];
        match stream.read(&mut piece).await? {
            0 => return Ok(()),
            length => head.extend_from_slice(&piece[..length]),
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics")) => {
            respond(&mut stream, "200 OK", stasis_metrics::CONTENT_TYPE, &render()).await
        }
        (Some(b"GET"), _) => respond(&mut stream, "404 Not Found", "text/plain", "there is /metrics\n").await,
        _ => respond(&mut stream, "405 Method Not Allowed", "text/plain", "there is GET\n").await,
    }
}

async fn respond(stream: &mut TcpStream, status: &str, kind: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // A request that is refused early is not read to its end, so the connection may be reset behind the answer.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn metrics_are_served_and_nothing_else() {
        let address = serve("127.0.0.1:0".parse().unwrap(), || "# EOF\n".to_owned()).await.unwrap();
        let answer = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let expected = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: 6\r\nConnection: close\r\n\r\n# EOF\n",
            stasis_metrics::CONTENT_TYPE
        );
        assert_eq!(answer, expected);
        for (request, status) in [
            ("GET /etc/passwd HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("\r\n\r\n", "405"),
            (&format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(2 * REQUEST_MAX)), "431"),
        ] {
            let answer = ask(address, request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
    }
}
