//! Exec and attach by SPDY: one stream for each of the process's, one for the end, one for the terminal's size.

use std::time::Duration;

use stasis_spdy::{Connection, Incoming, Limits, Stream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::watch;

use crate::backend::{Failure, Session, Size, Streams};
use crate::protocol::Channels;
use crate::session::{self, Client, Reader, Writer};
use crate::status;

/// How long a client may take to open its streams; the peers' time.
pub(crate) const CREATION_LIMIT: Duration = Duration::from_secs(30);

/// Streams of one process: five have a meaning.
const STREAMS_MAX: usize = 8;

/// The version from which on a terminal's size can be told.
const RESIZES_SINCE: u8 = 3;

/// Most bytes of one size in JSON.
const SIZE_MAX: usize = 1024;

/// The streams that a client opened.
#[derive(Default)]
struct Opened {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
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
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let limits = Limits { streams_max: STREAMS_MAX, idle: Some(idle), ..Limits::default() };
    let (mut connection, driver) = stasis_spdy::serve(io, limits);
    let mut driver = tokio::spawn(driver);
    let opened = tokio::time::timeout(CREATION_LIMIT, open(&mut connection, channels, streams)).await;
    let opened = opened.map_err(|_| format!("the client did not open its streams within {CREATION_LIMIT:?}"))??;
    let Some(mut error) = opened.error else { return Err("there is no error stream".to_owned()) };
    let (sizes, newest) = watch::channel(None);
    // kubectl takes the end of our side of this stream for the end of its own, so that comes last.
    let (input, input_end) = opened.stdin.map(tokio::io::split).unzip();
    let client = Client {
        stdin: input.map(|stream| Box::new(stream) as Reader),
        stdout: opened.stdout.map(|stream| Box::new(stream) as Writer),
        stderr: opened.stderr.map(|stream| Box::new(stream) as Writer),
        sizes: newest,
    };
    let resizing = tokio::spawn(read_sizes(opened.resize, sizes));
    let outcome = match start.await {
        Ok(session) => session::run(client, session, async { drop((&mut driver).await) }).await,
        Err(failure) => {
            for mut writer in [client.stdout, client.stderr].into_iter().flatten() {
                let _ = writer.shutdown().await;
            }
            // The connection ends when nobody has any of its streams.
            drop(client.stdin);
            Some(Err(failure))
        }
    };
    resizing.abort();
    if let Some(outcome) = outcome {
        // A client that is gone by now needs no status.
        let _ = error.write_all(&status::encode(&outcome, channels.version >= 4)).await;
        let _ = error.shutdown().await;
        if let Some(mut input_end) = input_end {
            let _ = input_end.shutdown().await;
        }
        drop(error);
        connection.close();
        if !driver.is_finished() {
            return driver.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string());
        }
    }
    Ok(())
}

/// Takes the streams that are expected, and only those.
async fn open(connection: &mut Connection, channels: Channels, streams: Streams) -> Result<Opened, String> {
    let resizes = streams.tty && channels.version >= RESIZES_SINCE;
    let mut opened = Opened::default();
    while !opened.has(streams, resizes) {
        let incoming = connection.accept().await.ok_or("the client went away before it had opened its streams")?;
        opened.take(incoming, streams, resizes).await?;
    }
    Ok(opened)
}

impl Opened {
    fn has(&self, streams: Streams, resizes: bool) -> bool {
        self.error.is_some()
            && self.stdin.is_some() == streams.stdin
            && self.stdout.is_some() == streams.stdout
            && self.stderr.is_some() == streams.stderr
            && self.resize.is_some() == resizes
    }

    async fn take(&mut self, incoming: Incoming, streams: Streams, resizes: bool) -> Result<(), String> {
        let kind = incoming.headers().get("streamtype").unwrap_or_default().to_owned();
        let (place, wanted) = match kind.as_str() {
            "error" => (&mut self.error, true),
            "stdin" => (&mut self.stdin, streams.stdin),
            "stdout" => (&mut self.stdout, streams.stdout),
            "stderr" => (&mut self.stderr, streams.stderr),
            "resize" => (&mut self.resize, resizes),
            _ => return Err(format!("a stream of the type {kind:?} is not known")),
        };
        if !wanted || place.is_some() {
            return Err(format!("the stream {kind} was not asked for, or opened twice"));
        }
        let mut stream = incoming.accept();
        if kind == "resize" {
            // Nothing is ever written to it, and a half-closed stream need not be reset at the end.
            let _ = stream.shutdown().await;
        }
        *place = Some(stream);
        Ok(())
    }
}

/// Reads sizes, one JSON object after the other, until the stream's end.
async fn read_sizes(stream: Option<Stream>, sizes: watch::Sender<Option<Size>>) {
    let Some(mut stream) = stream else { return };
    let mut text = Vec::with_capacity(SIZE_MAX);
    while let Ok(1..) = (&mut stream).take((SIZE_MAX - text.len()) as u64).read_buf(&mut text).await {
        let used = last_size(&text, &sizes);
        text.drain(..used);
        if text.len() == SIZE_MAX {
            // No size: what follows cannot be understood either, but is read, as others use the connection.
            text.clear();
        }
    }
}

/// Tells the last whole size of a text, and how much of the text is used up.
pub(crate) fn last_size(text: &[u8], sizes: &watch::Sender<Option<Size>>) -> usize {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Wire {
        width: u16,
        height: u16,
    }
    let mut values = serde_json::Deserializer::from_slice(text).into_iter::<Wire>();
    let mut last = None;
    let mut used = 0;
    while let Some(Ok(Wire { width, height })) = values.next() {
        last = Some(Size { width, height });
        used = values.byte_offset();
    }
    if last.is_some() {
        sizes.send_replace(last);
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_size_counts_and_half_a_size_waits() {
        let check = |text: &str, size: Option<(u16, u16)>, left: &str| {
            let (sizes, newest) = watch::channel(None);
            let used = last_size(text.as_bytes(), &sizes);
            assert_eq!(*newest.borrow(), size.map(|(width, height)| Size { width, height }), "{text}");
            assert_eq!(&text[used..], left);
        };
        check(r#"{"Width":80,"Height":24}"#, Some((80, 24)), "");
        check("{\"Width\":80,\"Height\":24}\n{\"Width\":132,\"Height\":43}\n{\"Wid", Some((132, 43)), "\n{\"Wid");
        check(r#"{"Width":80000,"Height":24}"#, None, r#"{"Width":80000,"Height":24}"#);
        check("nonsense", None, "nonsense");
    }
}
