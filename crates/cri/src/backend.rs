//! The pod engine as what runs behind the streaming server's URLs.

use std::sync::Arc;

use stasis_pod::Pods;
use stasis_streaming::{Backend, Control, Failure, Session, Size, Streams};
use tokio::net::TcpStream;
use tonic::async_trait;

/// What runs commands, attaches and connects, for the streaming server.
pub fn backend(pods: Pods) -> Arc<dyn Backend> {
    Arc::new(Engine(pods))
}

struct Engine(Pods);

struct Running(stasis_pod::Control);

#[async_trait]
impl Backend for Engine {
    async fn exec(&self, container: &str, command: Vec<String>, streams: Streams) -> Result<Session, Failure> {
        let begun = self.0.exec_stream(container, command, engine_streams(streams)).await;
        begun.map(session).map_err(failure)
    }

    async fn attach(&self, container: &str, streams: Streams) -> Result<Session, Failure> {
        self.0.attach_stream(container, engine_streams(streams)).await.map(session).map_err(failure)
    }

    async fn connect(&self, pod: &str, port: u16) -> Result<TcpStream, Failure> {
        self.0.connect(pod, port).await.map_err(failure)
    }
}

#[async_trait]
impl Control for Running {
    async fn resize(&self, size: Size) {
        self.0.resize(size.width, size.height).await;
    }

    async fn close_stdin(&self) {
        self.0.close_stdin().await;
    }

    async fn wait(&self) -> Result<Option<u32>, Failure> {
        self.0.wait().await.map_err(failure)
    }

    async fn abandon(&self) {
        self.0.abandon().await;
    }
}

fn session(session: stasis_pod::Session) -> Session {
    Session {
        stdin: session.stdin,
        stdout: session.stdout,
        stderr: session.stderr,
        detaches_with_stdin: session.detaches_with_stdin,
        control: Arc::new(Running(session.control)),
    }
}

fn engine_streams(streams: Streams) -> stasis_pod::Streams {
    stasis_pod::Streams { stdin: streams.stdin, stdout: streams.stdout, stderr: streams.stderr, terminal: streams.tty }
}

fn failure(error: stasis_pod::Error) -> Failure {
    Failure(error.to_string())
}
