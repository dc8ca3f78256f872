//! A stream, as its owner sees it.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::frame::Reset;
use crate::headers::Headers;
use crate::state::Shared;

/// A stream that the peer has opened. Dropped, it is refused.
#[derive(Debug)]
pub struct Incoming {
    headers: Headers,
    stream: Stream,
    connection: Arc<dyn Reply>,
}

/// How the reply of a stream gets out: its headers belong to the compression of the connection.
pub(crate) trait Reply: Send + Sync + fmt::Debug {
    fn reply(&self, stream: u32);
}

impl Incoming {
    pub(crate) fn new(id: u32, headers: Headers, shared: Arc<Shared>, connection: Arc<dyn Reply>) -> Incoming {
        Incoming { headers, stream: Stream { id, shared }, connection }
    }

    /// Its number: odd, and larger than those of the streams before.
    pub fn id(&self) -> u32 {
        self.stream.id
    }

    /// What the peer opened it with.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Takes it, and tells the peer so.
    pub fn accept(self) -> Stream {
        self.connection.reply(self.stream.id);
        self.stream
    }

    /// Refuses it.
    pub fn refuse(self) {
        self.stream.shared.lock().reset(self.stream.id, Reset::RefusedStream);
    }
}

/// A stream in both directions.
///
/// Its end of reading is the peer's half-close; an error of the kind `ConnectionReset` is the peer's reset, one of the
/// kind `UnexpectedEof` the end of the whole connection. `shutdown` half-closes this side. Dropped without that, it is
/// reset.
pub struct Stream {
    id: u32,
    shared: Arc<Shared>,
}

impl Stream {
    /// Ends it in both directions at once; what was written and not sent is lost.
    pub fn reset(self) {
        self.shared.lock().reset(self.id, Reset::Cancel);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.id).finish()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.lock().disown(self.id);
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        self.shared.lock().poll_read(self.id, buffer.remaining(), context).map_ok(|bytes| buffer.put_slice(&bytes))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.shared.lock().poll_write(self.id, data, context)
    }

    /// What is written is sent as soon as the windows allow, without being asked.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.lock().shut_down(self.id);
        Poll::Ready(Ok(()))
    }
}
