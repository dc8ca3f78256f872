//! WebSocket: several streams by channels of messages, or one that carries the bytes of something else.
//!
//! A binary message is the number of a channel and data; a text message the number as a digit and data in base64. From
//! version 5 on `[255, N]` is the end of the client's channel N.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use crate::backend::{Failure, Session, Size, Streams};
use crate::protocol::Channels;
use crate::session::{self, Client, Reader, Writer};
use crate::spdy::last_size;
use crate::status;

/// Largest message of a client. Clients send input in pieces of 32 KiB.
const MESSAGE_MAX: usize = 4 * 1024 * 1024;

/// Data of a message that is sent.
const CHUNK: usize = 32 * 1024;

/// What a channel holds between the socket and its user.
const BUFFER: usize = 64 * 1024;

/// Messages that wait to be sent.
const QUEUE: usize = 2;

/// How long a client may take to answer our close.
const LINGER: Duration = Duration::from_secs(5);

/// How the server closes. Clients take a close without a code for a failure.
const ENDED: CloseFrame = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::from_static("") };

const CLOSE_SIGNAL: u8 = 255;
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// Channel and data; the flag says whether channels can be closed.
    Binary { close_signal: bool },
    /// Channel and data in base64.
    Base64,
    /// Data only.
    Raw,
}

impl From<Channels> for Framing {
    fn from(channels: Channels) -> Framing {
        match channels.base64 {
            true => Framing::Base64,
            false => Framing::Binary { close_signal: channels.version >= 5 },
        }
    }
}

/// A message of a client.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Data(u8, Vec<u8>),
    Closed(u8),
}

/// A socket and its channels.
pub(crate) struct Socket<T> {
    stream: WebSocketStream<T>,
    framing: Framing,
    inputs: HashMap<u8, DuplexStream>,
    outputs: Vec<(u8, DuplexStream)>,
    sizes: Option<watch::Sender<Option<Size>>>,
    greeting: Vec<(u8, Vec<u8>)>,
    idle: Duration,
}

/// Serves one exec or attach on an upgraded connection.
pub(crate) async fn serve<T>(
    io: T,
    channels: Channels,
    streams: Streams,
    idle: Duration,
    start: impl Future<Output = Result<Session, Failure>>,
) -> Result<(), String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut socket = Socket::new(io, channels.into(), idle).await;
    let client = Client {
        stdin: streams.stdin.then(|| Box::new(socket.input(STDIN)) as Reader),
        stdout: streams.stdout.then(|| Box::new(socket.output(STDOUT)) as Writer),
        stderr: streams.stderr.then(|| Box::new(socket.output(STDERR)) as Writer),
        sizes: socket.sizes(),
    };
    let mut error = socket.output(ERROR);
    // An empty message tells the client that it is connected.
    let lowest = if streams.stdout {
        STDOUT
    } else if streams.stderr {
        STDERR
    } else {
        ERROR
    };
    socket.greet(lowest, Vec::new());
    let mut pump = tokio::spawn(socket.run());
    let outcome = match start.await {
        Ok(session) => session::run(client, session, async { drop((&mut pump).await) }).await,
        Err(failure) => {
            drop(client);
            Some(Err(failure))
        }
    };
    if let Some(outcome) = outcome {
        // A client that is gone by now needs no status.
        let _ = error.write_all(&status::encode(&outcome, channels.version >= 4)).await;
        drop(error);
        if !pump.is_finished() {
            return pump.await.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Socket<T> {
    pub(crate) async fn new(io: T, framing: Framing, idle: Duration) -> Socket<T> {
        let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_MAX)).max_frame_size(Some(MESSAGE_MAX));
        let stream = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
        let (inputs, outputs) = (HashMap::new(), Vec::new());
        Socket { stream, framing, inputs, outputs, sizes: None, greeting: Vec::new(), idle }
    }

    /// A channel that the client writes.
    pub(crate) fn input(&mut self, channel: u8) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(BUFFER);
        self.inputs.insert(channel, ours);
        theirs
    }

    /// A channel that the client reads. The socket is closed when all of these have ended.
    pub(crate) fn output(&mut self, channel: u8) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(BUFFER);
        self.outputs.push((channel, ours));
        theirs
    }

    /// The sizes that come on the channel for them.
    fn sizes(&mut self) -> watch::Receiver<Option<Size>> {
        let (sizes, newest) = watch::channel(None);
        self.sizes = Some(sizes);
        newest
    }

    /// A message to begin with.
    pub(crate) fn greet(&mut self, channel: u8, data: Vec<u8>) {
        self.greeting.push((channel, data));
    }

    /// Moves the bytes until the client goes or everything was sent.
    pub(crate) async fn run(self) -> Result<(), String> {
        let (mut sink, mut stream) = self.stream.split();
        let activity = Mutex::new(Instant::now());
        for (channel, data) in self.greeting {
            sink.send(encode(self.framing, channel, &data)).await.map_err(|error| error.to_string())?;
        }
        let mut receiver =
            Receiver { framing: self.framing, inputs: self.inputs, sizes: self.sizes, activity: &activity };
        tokio::select! {
            came = receiver.run(&mut stream) => return came,
            sent = send_all(&mut sink, self.framing, self.outputs, &activity) => sent?,
            () = idle(self.idle, &activity) => return Err(format!("nothing was sent or received for {:?}", self.idle)),
        }
        sink.send(Message::Close(Some(ENDED))).await.map_err(|error| error.to_string())?;
        // Until the client has closed, too; what still comes is of no interest.
        let _ = timeout(LINGER, async { while let Some(Ok(_)) = stream.next().await {} }).await;
        Ok(())
    }
}

async fn idle(limit: Duration, activity: &Mutex<Instant>) {
    loop {
        let until = *activity.lock().unwrap_or_else(PoisonError::into_inner) + limit;
        if Instant::now() >= until {
            return;
        }
        sleep_until(until).await;
    }
}

fn note(activity: &Mutex<Instant>) {
    *activity.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
}

/// Sends what comes on the outputs until all have ended.
async fn send_all<T: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut SplitSink<WebSocketStream<T>, Message>,
    framing: Framing,
    outputs: Vec<(u8, DuplexStream)>,
    activity: &Mutex<Instant>,
) -> Result<(), String> {
    let (sender, mut messages) = mpsc::channel(QUEUE);
    let mut readers = JoinSet::new();
    for (channel, mut output) in outputs {
        let sender = sender.clone();
        readers.spawn(async move {
            let mut buffer = vec![0; CHUNK];
            while let Ok(length @ 1..) = output.read(&mut buffer).await {
                if sender.send(encode(framing, channel, &buffer[..length])).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(sender);
    while let Some(message) = messages.recv().await {
        sink.send(message).await.map_err(|error| error.to_string())?;
        note(activity);
    }
    Ok(())
}

struct Receiver<'a> {
    framing: Framing,
    inputs: HashMap<u8, DuplexStream>,
    sizes: Option<watch::Sender<Option<Size>>>,
    activity: &'a Mutex<Instant>,
}

impl Receiver<'_> {
    /// Until the client closes or is gone, which is no error.
    async fn run<T>(&mut self, stream: &mut SplitStream<WebSocketStream<T>>) -> Result<(), String>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        while let Some(message) = stream.next().await {
            let data = match message {
                Ok(Message::Binary(data)) => data,
                Ok(Message::Text(text)) => Bytes::from(text),
                Ok(Message::Close(_)) => return Ok(()),
                // Pings are answered below us.
                Ok(_) => continue,
                Err(error) => return Err(error.to_string()),
            };
            note(self.activity);
            match decode(self.framing, &data)? {
                Came::Data(RESIZE, data) if self.sizes.is_some() => {
                    if let Some(sizes) = &self.sizes {
                        last_size(&data, sizes);
                    }
                }
                Came::Data(channel, data) => {
                    if let Some(input) = self.inputs.get_mut(&channel)
                        && input.write_all(&data).await.is_err()
                    {
                        // Its user takes no more.
                        self.inputs.remove(&channel);
                    }
                }
                Came::Closed(channel) => drop(self.inputs.remove(&channel)),
            }
        }
        Ok(())
    }
}

fn encode(framing: Framing, channel: u8, data: &[u8]) -> Message {
    match framing {
        Framing::Raw => Message::Binary(Bytes::copy_from_slice(data)),
        Framing::Binary { .. } => {
            let mut message = BytesMut::with_capacity(1 + data.len());
            message.extend_from_slice(&[channel]);
            message.extend_from_slice(data);
            Message::Binary(message.freeze())
        }
        Framing::Base64 => {
            let mut text = String::from(char::from(b'0' + channel));
            BASE64_STANDARD.encode_string(data, &mut text);
            Message::Text(text.into())
        }
    }
}

fn decode(framing: Framing, message: &[u8]) -> Result<Came, String> {
    let Some((first, data)) = message.split_first() else {
        return match framing {
            Framing::Raw => Ok(Came::Data(0, Vec::new())),
            _ => Err("a message without a channel".to_owned()),
        };
    };
    match framing {
        Framing::Raw => Ok(Came::Data(0, message.to_vec())),
        Framing::Binary { close_signal: true } if *first == CLOSE_SIGNAL => match data {
            [channel] => Ok(Came::Closed(*channel)),
            _ => Err("a close signal names one channel".to_owned()),
        },
        Framing::Binary { .. } => Ok(Came::Data(*first, data.to_vec())),
        Framing::Base64 => {
            let channel = first.checked_sub(b'0').filter(|channel| *channel < 10).ok_or("a channel is a digit")?;
            let data = BASE64_STANDARD.decode(data).map_err(|error| format!("a message is no base64: {error}"))?;
            Ok(Came::Data(channel, data))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAMINGS: [Framing; 4] = [
        Framing::Raw,
        Framing::Base64,
        Framing::Binary { close_signal: true },
        Framing::Binary { close_signal: false },
    ];

    #[test]
    fn close_signals_are_for_version_5() {
        let five = Framing::Binary { close_signal: true };
        assert_eq!(decode(five, &[255, 0]), Ok(Came::Closed(0)));
        assert!(decode(five, &[255]).is_err());
        assert_eq!(decode(Framing::Binary { close_signal: false }, &[255, 0]), Ok(Came::Data(255, vec![0])));
        assert_eq!(decode(Framing::Base64, b"0aGk="), Ok(Came::Data(0, b"hi".to_vec())));
        assert!(decode(Framing::Base64, b"x").is_err());
        assert!(decode(Framing::Base64, b"0?").is_err());
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(channel in 0u8..10, data: Vec<u8>) {
            for framing in FRAMINGS {
                let message = encode(framing, channel, &data).into_data();
                let channel = if framing == Framing::Raw { 0 } else { channel };
                prop_assert_eq!(decode(framing, &message), Ok(Came::Data(channel, data.clone())));
            }
        }

        #[test]
        fn no_message_makes_the_decoder_panic(message: Vec<u8>) {
            for framing in FRAMINGS {
                let _ = decode(framing, &message);
            }
        }
    }
}
