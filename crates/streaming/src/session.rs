//! One exec or attach: bytes between a client's streams and a process's pipes, until either ends.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::backend::{Control, Session, Size};
use crate::status::Outcome;

/// Read at once.
const CHUNK: usize = 32 * 1024;

/// After the process's end its output may still be held open by others that it started. The end is told when nothing
/// has come for so long; what the process itself wrote has arrived before its end is known.
const QUIET: Duration = Duration::from_millis(200);

pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// The client's ends of the streams that it asked for.
pub(crate) struct Client {
    pub(crate) stdin: Option<Reader>,
    pub(crate) stdout: Option<Writer>,
    pub(crate) stderr: Option<Writer>,
    /// The newest size of the client's terminal.
    pub(crate) sizes: watch::Receiver<Option<Size>>,
}

/// Runs a session to its end. None: the client went away before.
pub(crate) async fn run(client: Client, session: Session, gone: impl Future<Output = ()>) -> Option<Outcome> {
    let control = session.control;
    let (ended, watching) = watch::channel(false);
    let outputs = async {
        tokio::join!(
            copy_output(session.stdout, client.stdout, watching.clone()),
            copy_output(session.stderr, client.stderr, watching.clone())
        )
    };
    let process = async {
        let outcome = control.wait().await;
        ended.send_replace(true);
        outcome
    };
    let detached = copy_input(client.stdin, session.stdin, &*control, session.detaches_with_stdin);
    let outcome = tokio::select! {
        (outcome, _) = async { tokio::join!(process, outputs) } => return Some(outcome),
        () = detached => Some(Ok(None)),
        () = follow_sizes(client.sizes, &*control) => None,
        () = gone => None,
    };
    // The pipes are dropped by now. A process that reads its input has nothing more to wait for.
    control.close_stdin().await;
    control.abandon().await;
    outcome
}

/// Copies until the pipe's end. A client that takes no more does not stop the process: the rest is read and dropped.
async fn copy_output(from: Option<pipe::Receiver>, to: Option<Writer>, mut ended: watch::Receiver<bool>) {
    let (Some(mut from), Some(mut to)) = (from, to) else { return };
    let mut buffer = vec![0; CHUNK];
    let mut listens = true;
    loop {
        let read = tokio::select! {
            biased;
            read = from.read(&mut buffer) => read,
            () = quiet_after_end(&mut ended) => break,
        };
        match read {
            Ok(length @ 1..) if listens => listens = to.write_all(&buffer[..length]).await.is_ok(),
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
    }
    // A client that is gone needs no end.
    let _ = to.shutdown().await;
}

async fn quiet_after_end(ended: &mut watch::Receiver<bool>) {
    // An error means that the end can no longer be waited for.
    let _ = ended.wait_for(|ended| *ended).await;
    tokio::time::sleep(QUIET).await;
}

/// Copies the client's input and passes its end on. Comes back only where the client is to go then.
async fn copy_input(from: Option<Reader>, to: Option<pipe::Sender>, control: &dyn Control, detaches: bool) {
    let Some(mut from) = from else { return std::future::pending().await };
    let has_input = to.is_some();
    if copy_to_pipe(&mut from, to).await.is_ok() && has_input {
        control.close_stdin().await;
        if detaches {
            return;
        }
    }
    std::future::pending().await
}

/// Until the client's end. What a process does not take, or not any more, is read and dropped: a stream that is not read would
/// hold up the others of its connection.
async fn copy_to_pipe(from: &mut Reader, mut to: Option<pipe::Sender>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        if let Some(pipe) = &mut to
            && pipe.write_all(&buffer[..length]).await.is_err()
        {
            to = None;
        }
    }
}

async fn follow_sizes(mut sizes: watch::Receiver<Option<Size>>, control: &dyn Control) {
    while sizes.changed().await.is_ok() {
        let size = *sizes.borrow_and_update();
        if let Some(size) = size {
            control.resize(size).await;
        }
    }
    std::future::pending().await
}
