//! The connection: what reads frames and acts on them, and what writes them.

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until, timeout};

use crate::error::Error;
use crate::frame::{self, Control, Header};
use crate::headers::{Deflater, Headers, Inflater};
use crate::state::{Limits, Output, Room, Shared};
use crate::stream::{Incoming, Reply};

/// Read at once.
const READ_BUFFER: usize = 64 * 1024;

/// How long a peer may take to close its end once everything was sent. To close ours with something unread in it would
/// make the kernel throw away what the peer has not read yet.
const LINGER: Duration = Duration::from_secs(5);

/// Accepts the streams of one connection. When it is dropped, or [`Connection::close`]d, no more are taken, and the
/// connection ends as soon as its streams have been dropped and all that was written to them is sent.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    replies: Arc<Replies>,
}

/// Serves one client on `io`. The future must be polled for the connection to live; its end is the connection's. An end
/// by the peer is no error.
pub fn serve<T>(io: T, limits: Limits) -> (Connection, impl Future<Output = Result<(), Error>> + Send)
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let shared = Arc::new(Shared::new(limits));
    let replies = Arc::new(Replies { shared: Arc::clone(&shared), deflater: Mutex::new(Deflater::new()) });
    let connection = Connection { shared: Arc::clone(&shared), replies };
    (connection, drive(io, shared))
}

impl Connection {
    /// The next stream that the peer opens; none when no more can come.
    pub async fn accept(&mut self) -> Option<Incoming> {
        let (id, headers) = poll_fn(|context| self.shared.lock().poll_accept(context)).await?;
        let replies: Arc<dyn Reply> = Arc::clone(&self.replies) as _;
        Some(Incoming::new(id, headers, Arc::clone(&self.shared), replies))
    }

    /// Takes no more streams and ends in order.
    pub fn close(self) {}
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        while let Poll::Ready(Some((id, _))) =
            state.poll_accept(&std::task::Context::from_waker(std::task::Waker::noop()))
        {
            state.reset(id, frame::Reset::RefusedStream);
            state.disown(id);
        }
        state.close();
    }
}

#[derive(Debug)]
struct Replies {
    shared: Arc<Shared>,
    deflater: Mutex<Deflater>,
}

impl Reply for Replies {
    fn reply(&self, stream: u32) {
        // One lock over both: blocks are inflated in the order in which they are written.
        let mut deflater = self.deflater.lock().unwrap_or_else(PoisonError::into_inner);
        let block = deflater.block(&Headers::default());
        self.shared.lock().push_control(frame::syn_reply(stream, &block));
    }
}

/// Whoever waits on a stream must hear of the connection's end, also when the future is dropped.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.lock().end();
    }
}

async fn drive<T: AsyncRead + AsyncWrite + Send>(io: T, shared: Arc<Shared>) -> Result<(), Error> {
    let _ending = Ending(Arc::clone(&shared));
    let (reader, mut writer) = tokio::io::split(io);
    let activity = Activity::new();
    let mut reader =
        Reader { io: reader, buffer: BytesMut::with_capacity(READ_BUFFER), shared: &shared, activity: &activity };
    let idle = shared.lock().limits.idle;
    let read = tokio::select! {
        read = reader.run() => read,
        written = write(&mut writer, &shared, &activity) => {
            written?;
            writer.shutdown().await?;
            // What still comes is of no interest, only its end.
            let _ = timeout(LINGER, reader.discard()).await;
            return Ok(());
        }
        error = activity.idle(idle) => Err(error),
    };
    if let Err(Error::Protocol(_) | Error::HeadersTooLarge(_)) = read {
        shared.lock().blame();
        // It is told why, if it listens.
        let _ = timeout(LINGER, last_words(&mut writer, &shared)).await;
    }
    read
}

async fn last_words<T: AsyncWrite>(writer: &mut WriteHalf<T>, shared: &Shared) -> io::Result<()> {
    loop {
        let output = shared.lock().output();
        let Some(Output::Control(frame)) = output else { break };
        writer.write_all(&frame).await?;
    }
    writer.shutdown().await
}

async fn write<T: AsyncWrite>(writer: &mut WriteHalf<T>, shared: &Shared, activity: &Activity) -> Result<(), Error> {
    loop {
        let next = shared.lock().output();
        let output = match next {
            Some(output) => output,
            None => {
                writer.flush().await?;
                poll_fn(|context| shared.lock().poll_output(context)).await
            }
        };
        match output {
            Output::Control(frame) => writer.write_all(&frame).await?,
            Output::Data { header, payload } => {
                writer.write_all_buf(&mut Buf::chain(header.as_slice(), payload)).await?
            }
            Output::End => return Ok(writer.flush().await?),
        }
        activity.note();
    }
}

/// Reads frames and acts on them.
struct Reader<'a, T> {
    io: ReadHalf<T>,
    buffer: BytesMut,
    shared: &'a Shared,
    activity: &'a Activity,
}

impl<T: AsyncRead> Reader<'_, T> {
    /// Until the peer ends the connection, which is well only between two frames.
    async fn run(&mut self) -> Result<(), Error> {
        let mut inflater = Inflater::new();
        loop {
            if self.buffer.is_empty() && !self.read_some().await? {
                return Ok(());
            }
            self.fill(frame::HEADER).await?;
            let mut header = [0; frame::HEADER];
            self.buffer.copy_to_slice(&mut header);
            match Header::parse(header)? {
                Header::Data { stream, fin, length } => self.data(stream, fin, length).await?,
                Header::Control { kind, flags, length } => {
                    self.fill(length).await?;
                    let body = self.buffer.split_to(length);
                    self.control(Control::parse(kind, flags, &body)?, &mut inflater)?;
                }
            }
            poll_fn(|context| {
                let mut state = self.shared.lock();
                if state.is_flooded() {
                    state.wait_as_reader(context);
                    return Poll::Pending;
                }
                Poll::Ready(())
            })
            .await;
        }
    }

    /// Takes the bytes of a data frame as they come, never more of them than the stream has room for.
    async fn data(&mut self, stream: u32, fin: bool, length: usize) -> Result<(), Error> {
        let mut left = length;
        // Also an empty frame must be for a stream that was opened.
        self.shared.lock().room(stream)?;
        while left > 0 {
            if self.buffer.is_empty() {
                self.fill(1).await?;
            }
            let there = self.buffer.len().min(left);
            let taken = poll_fn(|context| {
                let mut state = self.shared.lock();
                match state.room(stream) {
                    Ok(Room::For(0)) => {
                        state.wait_as_reader(context);
                        Poll::Pending
                    }
                    Ok(Room::For(room)) => {
                        let taken = there.min(room);
                        state.receive(stream, &self.buffer[..taken]);
                        Poll::Ready(Ok(taken))
                    }
                    Ok(Room::Discard) => {
                        state.discarded(there);
                        Poll::Ready(Ok(there))
                    }
                    Err(error) => Poll::Ready(Err(error)),
                }
            })
            .await?;
            self.buffer.advance(taken);
            left -= taken;
        }
        if fin {
            self.shared.lock().finish(stream);
        }
        Ok(())
    }

    /// Reads to the end and looks at nothing.
    async fn discard(&mut self) -> Result<(), Error> {
        while self.read_some().await? {
            self.buffer.clear();
        }
        Ok(())
    }

    fn control(&mut self, control: Control<'_>, inflater: &mut Inflater) -> Result<(), Error> {
        // Every block goes through the inflater, also that of a frame that is not acted on.
        match control {
            Control::SynStream { stream, fin, unidirectional, block } => {
                let headers = inflater.headers(block)?;
                self.shared.lock().open(stream, headers, fin, unidirectional)?;
            }
            Control::SynReply { block } => {
                inflater.headers(block)?;
                return Err(Error::Protocol("a reply to a stream that was never opened"));
            }
            Control::Headers { stream, fin, block } => {
                inflater.headers(block)?;
                if fin {
                    self.shared.lock().finish(stream);
                }
            }
            Control::RstStream { stream } => self.shared.lock().peer_reset(stream),
            Control::Settings { initial_window: Some(window) } => self.shared.lock().set_peer_window(window)?,
            Control::Settings { initial_window: None } | Control::Unknown => {}
            Control::Ping { id } => self.shared.lock().pong(id),
            Control::GoAway => self.shared.lock().peer_goes_away(),
            Control::WindowUpdate { stream, delta } => self.shared.lock().grow_window(stream, delta)?,
        }
        Ok(())
    }

    /// Reads until `length` bytes are there.
    async fn fill(&mut self, length: usize) -> Result<(), Error> {
        while self.buffer.len() < length {
            if !self.read_some().await? {
                return Err(Error::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    /// Whether there was anything to read.
    async fn read_some(&mut self) -> Result<bool, Error> {
        self.buffer.reserve(READ_BUFFER.saturating_sub(self.buffer.len()).max(1));
        let read = self.io.read_buf(&mut self.buffer).await?;
        self.activity.note();
        Ok(read > 0)
    }
}

/// When something last came or went.
struct Activity(Mutex<Instant>);

impl Activity {
    fn new() -> Activity {
        Activity(Mutex::new(Instant::now()))
    }

    fn note(&self) {
        *self.last() = Instant::now();
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends when nothing has come or gone for too long.
    async fn idle(&self, limit: Option<Duration>) -> Error {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            let until = *self.last() + limit;
            if Instant::now() >= until {
                return Error::Idle(limit);
            }
            sleep_until(until).await;
        }
    }
}
