//! What a connection and its streams share: buffers, windows, and who waits for what. Never held across a wait.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};

use crate::error::Error;
use crate::frame::{self, GoAway, Reset};
use crate::headers::Headers;

/// Most bytes that a stream holds on their way to the peer: two frames, so that one fills while the other is written.
pub const SEND_BUFFER: usize = 64 * 1024;

/// Longest data frame that is sent; what the peers send, too.
const FRAME_MAX: usize = 32 * 1024;

/// The window of a stream and of a connection before anybody says otherwise, in bytes (SPDY/3.1).
const INITIAL_WINDOW: i64 = 64 * 1024;

/// The largest window there can be.
const WINDOW_MAX: i64 = 0x7fff_ffff;

/// Control frames that may wait to be written. A peer that sends pings and reads no answers is not read from beyond.
const CONTROL_QUEUE_MAX: usize = 1024;

/// What one connection may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Streams at a time; more are refused.
    pub streams_max: usize,
    /// Most bytes received on a stream and not yet read.
    pub window: u32,
    /// Most bytes received on all streams and not yet read.
    pub session_window: u32,
    /// A connection on which no frame comes or goes for so long is ended.
    pub idle: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { streams_max: 1000, window: 256 * 1024, session_window: 4 * 1024 * 1024, idle: None }
    }
}

/// What everybody shares.
#[derive(Debug)]
pub(crate) struct Shared(Mutex<State>);

impl Shared {
    pub(crate) fn new(limits: Limits) -> Shared {
        Shared(Mutex::new(State::new(limits)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a connection.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) limits: Limits,
    streams: HashMap<u32, StreamState>,
    last_stream: u32,
    /// Streams that were opened and that nobody has accepted yet.
    incoming: VecDeque<(u32, Headers)>,
    accept_waker: Option<Waker>,
    /// Control frames to be written, before any data.
    control: VecDeque<Vec<u8>>,
    /// Replies to be written: their headers are compressed in the order of writing.
    ready: VecDeque<u32>,
    writer: Option<Waker>,
    reader: Option<Waker>,
    /// Whether the peer has shown that it has flow control.
    peer_has_flow_control: bool,
    peer_window: i64,
    session_send_window: i64,
    /// Bytes received on any stream and not yet read.
    session_held: usize,
    /// Bytes read, or dropped, that the peer has not been told of.
    session_owed: u32,
    /// No more streams are taken, and the connection ends once all is written.
    closing: bool,
    peer_going_away: bool,
    /// The peer has been told that no more streams are taken.
    gone_away: bool,
    /// It has ended.
    closed: bool,
}

/// The state of a stream.
#[derive(Debug)]
struct StreamState {
    inbox: BytesMut,
    /// Bytes read that the peer has not been told of.
    owed: u32,
    /// The peer sends no more.
    peer_finished: bool,
    out: BytesMut,
    send_window: i64,
    /// Whether it is among [`State::ready`].
    queued: bool,
    /// The owner writes no more.
    finished: bool,
    fin_sent: bool,
    reset: bool,
    /// Whether somebody owns it.
    owned: bool,
    read_waker: Option<Waker>,
    write_waker: Option<Waker>,
}

/// What is to be written next.
#[derive(Debug)]
pub(crate) enum Output {
    /// A whole frame.
    Control(Vec<u8>),
    /// A data frame.
    Data { header: [u8; frame::HEADER], payload: Bytes },
    /// Everything has been written.
    End,
}

/// What becomes of a piece of data that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// So much can be kept.
    For(usize),
    /// It is for a stream that nobody reads any more.
    Discard,
}

impl State {
    fn new(limits: Limits) -> State {
        let mut state = State {
            streams: HashMap::new(),
            last_stream: 0,
            incoming: VecDeque::new(),
            accept_waker: None,
            control: VecDeque::new(),
            ready: VecDeque::new(),
            writer: None,
            reader: None,
            peer_has_flow_control: false,
            peer_window: INITIAL_WINDOW,
            session_send_window: INITIAL_WINDOW,
            session_held: 0,
            session_owed: 0,
            closing: false,
            peer_going_away: false,
            gone_away: false,
            closed: false,
            limits,
        };
        state.control.push_back(frame::settings_window(state.limits.window));
        let more = i64::from(state.limits.session_window) - INITIAL_WINDOW;
        if more > 0 {
            state.control.push_back(frame::window_update(0, more as u32));
        }
        state
    }

    // What the peer does.

    /// The peer opens a stream.
    pub(crate) fn open(&mut self, id: u32, headers: Headers, fin: bool, unidirectional: bool) -> Result<(), Error> {
        if id.is_multiple_of(2) || id <= self.last_stream {
            return Err(Error::Protocol("a stream whose number is even or not larger than those before"));
        }
        self.last_stream = id;
        if self.streams.len() >= self.limits.streams_max || self.closing || self.peer_going_away {
            self.push_control(frame::rst_stream(id, Reset::RefusedStream));
            return Ok(());
        }
        let stream = StreamState {
            inbox: BytesMut::new(),
            owed: 0,
            peer_finished: fin,
            out: BytesMut::new(),
            send_window: self.peer_window,
            queued: false,
            finished: unidirectional,
            fin_sent: unidirectional,
            reset: false,
            owned: true,
            read_waker: None,
            write_waker: None,
        };
        self.streams.insert(id, stream);
        self.incoming.push_back((id, headers));
        wake(&mut self.accept_waker);
        Ok(())
    }

    /// How much of the data for a stream can be taken now.
    pub(crate) fn room(&mut self, id: u32) -> Result<Room, Error> {
        let Some(stream) = self.streams.get(&id) else {
            if id == 0 || id > self.last_stream {
                return Err(Error::Protocol("data for a stream that was never opened"));
            }
            return Ok(Room::Discard);
        };
        if stream.peer_finished {
            self.reset(id, Reset::StreamAlreadyClosed);
            return Ok(Room::Discard);
        }
        if stream.reset || !stream.owned {
            return Ok(Room::Discard);
        }
        let of_stream = (self.limits.window as usize).saturating_sub(stream.inbox.len());
        let of_session = (self.limits.session_window as usize).saturating_sub(self.session_held);
        Ok(Room::For(of_stream.min(of_session)))
    }

    /// Keeps data of a stream, as much as [`State::room`] has said at most.
    pub(crate) fn receive(&mut self, id: u32, data: &[u8]) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.inbox.extend_from_slice(data);
            self.session_held += data.len();
            wake(&mut stream.read_waker);
        }
    }

    /// Data that nobody reads was dropped.
    pub(crate) fn discarded(&mut self, length: usize) {
        self.owe_session(length);
    }

    /// The peer sends no more on a stream.
    pub(crate) fn finish(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.peer_finished = true;
            wake(&mut stream.read_waker);
            self.remove_if_over(id);
        }
    }

    /// The peer resets a stream.
    pub(crate) fn peer_reset(&mut self, id: u32) {
        self.end_stream(id);
    }

    /// The peer says how much it takes on a new stream, which holds for the open ones, too.
    pub(crate) fn set_peer_window(&mut self, window: u32) -> Result<(), Error> {
        let window = i64::from(window);
        if window > WINDOW_MAX {
            return Err(Error::Protocol("an initial window of more than 2 GiB"));
        }
        self.peer_has_flow_control = true;
        let change = window - self.peer_window;
        self.peer_window = window;
        for stream in self.streams.values_mut() {
            stream.send_window += change;
        }
        self.requeue_all();
        Ok(())
    }

    /// The peer takes more, on a stream or on all.
    pub(crate) fn grow_window(&mut self, id: u32, delta: u32) -> Result<(), Error> {
        self.peer_has_flow_control = true;
        if id == 0 {
            self.session_send_window += i64::from(delta);
            if delta == 0 || self.session_send_window > WINDOW_MAX {
                return Err(Error::Protocol("a window of the connection that is not enlarged, or beyond 2 GiB"));
            }
            self.requeue_all();
            return Ok(());
        }
        // Streams that are gone may still be spoken of.
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send_window += i64::from(delta);
            if delta == 0 || stream.send_window > WINDOW_MAX {
                let why = if delta == 0 { Reset::ProtocolError } else { Reset::FlowControlError };
                self.reset(id, why);
            } else {
                self.queue(id);
            }
        }
        Ok(())
    }

    /// The peer opens no more streams.
    pub(crate) fn peer_goes_away(&mut self) {
        self.peer_going_away = true;
        wake(&mut self.accept_waker);
        self.close_if_done();
    }

    /// Answers a ping of the peer's.
    pub(crate) fn pong(&mut self, id: u32) {
        // Even ones would be answers to ours.
        if !id.is_multiple_of(2) {
            self.push_control(frame::ping(id));
        }
    }

    /// The peer has broken the protocol.
    pub(crate) fn blame(&mut self) {
        let last = self.last_stream;
        self.push_control(frame::go_away(last, GoAway::ProtocolError));
    }

    /// Whether so much waits to be written that nothing more may be read.
    pub(crate) fn is_flooded(&self) -> bool {
        self.control.len() > CONTROL_QUEUE_MAX
    }

    /// Has the reader woken at the next change.
    pub(crate) fn wait_as_reader(&mut self, context: &Context<'_>) {
        self.reader = Some(context.waker().clone());
    }

    // What the connection's owner does.

    pub(crate) fn poll_accept(&mut self, context: &Context<'_>) -> Poll<Option<(u32, Headers)>> {
        match self.incoming.pop_front() {
            Some(incoming) => Poll::Ready(Some(incoming)),
            None if self.closed || self.closing || self.peer_going_away => Poll::Ready(None),
            None => {
                self.accept_waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// No more streams; the connection ends when all is written.
    pub(crate) fn close(&mut self) {
        self.closing = true;
        wake(&mut self.accept_waker);
        wake(&mut self.writer);
    }

    /// The connection is gone: everybody who waits is told.
    pub(crate) fn end(&mut self) {
        self.closed = true;
        self.control.clear();
        self.ready.clear();
        self.incoming.clear();
        wake(&mut self.accept_waker);
        for stream in self.streams.values_mut() {
            wake(&mut stream.read_waker);
            wake(&mut stream.write_waker);
        }
    }

    pub(crate) fn push_control(&mut self, frame: Vec<u8>) {
        if !self.closed {
            self.control.push_back(frame);
            wake(&mut self.writer);
        }
    }

    // What the owner of a stream does.

    pub(crate) fn poll_read(&mut self, id: u32, most: usize, context: &Context<'_>) -> Poll<std::io::Result<Bytes>> {
        use std::io::ErrorKind::{ConnectionReset, UnexpectedEof};
        let Some(stream) = self.streams.get_mut(&id) else { return Poll::Ready(Err(ConnectionReset.into())) };
        if !stream.inbox.is_empty() {
            let bytes = stream.inbox.split_to(most.min(stream.inbox.len())).freeze();
            let length = bytes.len();
            stream.owed += length as u32;
            // Telling of each byte would cost more than the bytes.
            if !stream.peer_finished && stream.owed >= self.limits.window / 2 {
                let owed = std::mem::take(&mut stream.owed);
                self.push_control(frame::window_update(id, owed));
            }
            self.session_held -= length;
            self.owe_session(length);
            wake(&mut self.reader);
            return Poll::Ready(Ok(bytes));
        }
        if stream.reset {
            Poll::Ready(Err(ConnectionReset.into()))
        } else if stream.peer_finished {
            Poll::Ready(Ok(Bytes::new()))
        } else if self.closed {
            Poll::Ready(Err(UnexpectedEof.into()))
        } else {
            stream.read_waker = Some(context.waker().clone());
            Poll::Pending
        }
    }

    pub(crate) fn poll_write(&mut self, id: u32, data: &[u8], context: &Context<'_>) -> Poll<std::io::Result<usize>> {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
        let closed = self.closed;
        let Some(stream) = self.streams.get_mut(&id) else { return Poll::Ready(Err(ConnectionReset.into())) };
        if stream.reset || closed {
            return Poll::Ready(Err(ConnectionReset.into()));
        }
        if stream.finished {
            return Poll::Ready(Err(BrokenPipe.into()));
        }
        let room = SEND_BUFFER.saturating_sub(stream.out.len());
        if room == 0 {
            stream.write_waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let taken = room.min(data.len());
        stream.out.extend_from_slice(&data[..taken]);
        self.queue(id);
        Poll::Ready(Ok(taken))
    }

    /// The owner writes no more.
    pub(crate) fn shut_down(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.finished
        {
            stream.finished = true;
            self.queue(id);
        }
    }

    /// Ends a stream in both directions.
    pub(crate) fn reset(&mut self, id: u32, why: Reset) {
        if self.streams.get(&id).is_some_and(|stream| !stream.reset) {
            self.push_control(frame::rst_stream(id, why));
            self.end_stream(id);
        }
    }

    /// Nobody owns a stream any more. One that was finished goes on until the peer finishes, too; any other is reset.
    pub(crate) fn disown(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.owned = false;
        let finished = stream.finished;
        let unread = std::mem::take(&mut stream.inbox).len();
        self.session_held -= unread;
        self.owe_session(unread);
        if !finished {
            self.reset(id, Reset::Cancel);
        }
        self.remove_if_over(id);
        wake(&mut self.reader);
    }

    // What the writer does.

    pub(crate) fn poll_output(&mut self, context: &Context<'_>) -> Poll<Output> {
        if let Some(output) = self.output() {
            return Poll::Ready(output);
        }
        self.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// The next thing to write, if there is one.
    pub(crate) fn output(&mut self) -> Option<Output> {
        if let Some(frame) = self.control.pop_front() {
            if !self.is_flooded() {
                wake(&mut self.reader);
            }
            return Some(Output::Control(frame));
        }
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            if let Some(output) = self.data_frame(id) {
                return Some(output);
            }
        }
        let over = self.closing && self.streams.values().all(|stream| stream.out.is_empty() && !stream.owned);
        if over && !self.closed && !self.gone_away {
            // The last frame of all: Go's spdystream reads none behind it.
            self.gone_away = true;
            return Some(Output::Control(frame::go_away(self.last_stream, GoAway::Ok)));
        }
        (over || self.closed).then_some(Output::End)
    }

    /// The next data frame of a stream, if its window and the connection's allow one.
    fn data_frame(&mut self, id: u32) -> Option<Output> {
        let stream = self.streams.get_mut(&id)?;
        stream.queued = false;
        if stream.reset || stream.fin_sent {
            return None;
        }
        let mut length = stream.out.len().min(FRAME_MAX);
        if self.peer_has_flow_control {
            let window = stream.send_window.min(self.session_send_window).max(0);
            length = length.min(window as usize);
        }
        let fin = stream.finished && length == stream.out.len();
        if length == 0 && !fin {
            // It comes back with a larger window, or with more data.
            return None;
        }
        let payload = stream.out.split_to(length).freeze();
        stream.send_window -= length as i64;
        self.session_send_window -= length as i64;
        stream.fin_sent = fin;
        wake(&mut stream.write_waker);
        if !stream.out.is_empty() || stream.finished && !fin {
            stream.queued = true;
            self.ready.push_back(id);
        }
        self.remove_if_over(id);
        Some(Output::Data { header: frame::data_header(id, fin, length), payload })
    }

    // Details.

    fn queue(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.queued
        {
            stream.queued = true;
            self.ready.push_back(id);
        }
        wake(&mut self.writer);
    }

    fn requeue_all(&mut self) {
        let waiting = self.streams.iter_mut().filter(|(_, stream)| !stream.queued && !stream.out.is_empty());
        for (id, stream) in waiting {
            stream.queued = true;
            self.ready.push_back(*id);
        }
        wake(&mut self.writer);
    }

    fn owe_session(&mut self, length: usize) {
        self.session_owed += length as u32;
        if self.session_owed >= self.limits.session_window / 2 {
            let owed = std::mem::take(&mut self.session_owed);
            self.push_control(frame::window_update(0, owed));
        }
    }

    fn end_stream(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.reset = true;
        stream.out.clear();
        let unread = stream.inbox.len();
        stream.inbox.advance(unread);
        wake(&mut stream.read_waker);
        wake(&mut stream.write_waker);
        self.session_held -= unread;
        self.owe_session(unread);
        self.remove_if_over(id);
        // A stream that was to be accepted still is: its first use says what happened.
        wake(&mut self.reader);
    }

    fn remove_if_over(&mut self, id: u32) {
        let over = self
            .streams
            .get(&id)
            .is_some_and(|stream| !stream.owned && (stream.reset || stream.peer_finished && stream.fin_sent));
        if over {
            self.streams.remove(&id);
            self.close_if_done();
        }
        // The end of a connection that is being closed may hang on this stream.
        wake(&mut self.writer);
    }

    fn close_if_done(&mut self) {
        if self.peer_going_away && self.streams.is_empty() {
            self.close();
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}
