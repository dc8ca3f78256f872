//! The server against clients that are written here, frame by frame: well-behaved, careless and hostile ones.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::frame::{self, Control, Header, client};
use crate::headers::{Deflater, Headers, Inflater};
use crate::{Connection, Error, Limits, serve};

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(20);

/// What counts as "nothing came".
const SILENCE: Duration = Duration::from_millis(50);

/// Between client and server; small, so that whoever does not read is felt at once.
const PIPE: usize = 4096;

/// A client that writes frames by hand.
struct Client {
    io: DuplexStream,
    deflater: Deflater,
    inflater: Inflater,
}

/// A frame as it came.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Data { stream: u32, fin: bool, data: Vec<u8> },
    Reply { stream: u32 },
    Reset { stream: u32, status: u32 },
    Window { stream: u32, delta: u32 },
    Ping { id: u32 },
    GoAway { status: u32 },
    Settings,
}

impl Client {
    async fn send(&mut self, frame: &[u8]) {
        self.io.write_all(frame).await.unwrap();
    }

    async fn open(&mut self, stream: u32, fin: bool) {
        let headers: Headers = [("streamtype", "data")].into_iter().collect();
        let block = self.deflater.block(&headers);
        self.send(&client::syn_stream(stream, fin, &block)).await;
    }

    async fn data(&mut self, stream: u32, fin: bool, data: &[u8]) {
        self.send(&[frame::data_header(stream, fin, data.len()).as_slice(), data].concat()).await;
    }

    /// The next frame; none at the end.
    async fn next(&mut self) -> Option<Came> {
        let mut header = [0; frame::HEADER];
        if timeout(PATIENCE, self.io.read_exact(&mut header)).await.expect("a frame in time").is_err() {
            return None;
        }
        let header = Header::parse(header).unwrap();
        let (Header::Data { length, .. } | Header::Control { length, .. }) = header;
        let mut body = vec![0; length];
        self.io.read_exact(&mut body).await.unwrap();
        let word = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
        let (kind, flags) = match header {
            Header::Data { stream, fin, .. } => return Some(Came::Data { stream, fin, data: body }),
            Header::Control { kind, flags, .. } => (kind, flags),
        };
        Some(match Control::parse(kind, flags, &body).unwrap() {
            Control::SynReply { block } => {
                self.inflater.headers(block).unwrap();
                Came::Reply { stream: word(0) }
            }
            Control::RstStream { stream } => Came::Reset { stream, status: word(4) },
            Control::WindowUpdate { stream, delta } => Came::Window { stream, delta },
            Control::Ping { id } => Came::Ping { id },
            Control::GoAway => Came::GoAway { status: word(4) },
            Control::Settings { .. } => Came::Settings,
            other => panic!("{other:?}"),
        })
    }

    /// The next frame that is not about windows.
    async fn next_plain(&mut self) -> Option<Came> {
        loop {
            match self.next().await {
                Some(Came::Settings | Came::Window { .. }) => {}
                other => return other,
            }
        }
    }

    async fn silent(&mut self) -> bool {
        let mut byte = [0];
        timeout(SILENCE, self.io.read(&mut byte)).await.is_err()
    }
}

fn start(limits: Limits) -> (Client, Connection, JoinHandle<Result<(), Error>>) {
    let (ours, theirs) = tokio::io::duplex(PIPE);
    let (connection, driver) = serve(theirs, limits);
    let client = Client { io: ours, deflater: Deflater::new(), inflater: Inflater::new() };
    (client, connection, tokio::spawn(driver))
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(3 * PATIENCE, test).await.expect("the test ends") });
}

#[test]
fn a_stream_carries_bytes_both_ways_and_half_closes() {
    run(async {
        let (mut client, mut connection, driver) = start(Limits::default());
        client.open(1, false).await;
        let incoming = connection.accept().await.unwrap();
        assert_eq!(incoming.headers().get("streamtype"), Some("data"));
        let mut stream = incoming.accept();
        assert_eq!(client.next_plain().await, Some(Came::Reply { stream: 1 }));
        client.data(1, false, b"hello").await;
        client.data(1, true, b" there").await;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello there");
        stream.write_all(b"and back").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(client.next_plain().await, Some(Came::Data { stream: 1, fin: true, data: b"and back".to_vec() }));
        drop(stream);
        connection.close();
        assert_eq!(client.next_plain().await, Some(Came::GoAway { status: 0 }));
        assert_eq!(client.next_plain().await, None);
        drop(client);
        driver.await.unwrap().unwrap();
    });
}

#[test]
fn a_window_of_the_peer_is_kept_to() {
    run(async {
        let (mut client, mut connection, _driver) = start(Limits::default());
        client.send(&frame::settings_window(10)).await;
        client.open(1, true).await;
        let mut stream = connection.accept().await.unwrap().accept();
        assert_eq!(client.next_plain().await, Some(Came::Reply { stream: 1 }));
        stream.write_all(&[7; 25]).await.unwrap();
        let data = |length, fin| Some(Came::Data { stream: 1, fin, data: vec![7; length] });
        assert_eq!(client.next_plain().await, data(10, false));
        assert!(client.silent().await);
        client.send(&frame::window_update(1, 12)).await;
        assert_eq!(client.next_plain().await, data(12, false));
        // A smaller initial window takes from the open streams, below zero, too.
        client.send(&frame::settings_window(5)).await;
        client.send(&frame::window_update(1, 6)).await;
        stream.shutdown().await.unwrap();
        assert_eq!(client.next_plain().await, data(1, false));
        client.send(&frame::window_update(1, 100)).await;
        assert_eq!(client.next_plain().await, data(2, true));
    });
}

#[test]
fn the_window_of_the_connection_is_kept_to() {
    run(async {
        let (mut client, mut connection, _driver) = start(Limits::default());
        client.send(&frame::settings_window(1 << 20)).await;
        client.open(1, true).await;
        let mut stream = connection.accept().await.unwrap().accept();
        let writing = tokio::spawn(async move {
            stream.write_all(&vec![1; 100_000]).await.unwrap();
            stream.shutdown().await.unwrap();
        });
        let mut got = 0;
        while got < 64 * 1024 {
            if let Some(Came::Data { data, .. }) = client.next_plain().await {
                got += data.len();
            }
        }
        assert_eq!(got, 64 * 1024);
        assert!(client.silent().await);
        client.send(&frame::window_update(0, 1 << 20)).await;
        while got < 100_000 {
            match client.next_plain().await {
                Some(Came::Data { data, .. }) => got += data.len(),
                other => panic!("{other:?}"),
            }
        }
        writing.await.unwrap();
    });
}

/// Go's spdystream never enlarges a window.
#[test]
fn a_peer_without_flow_control_gets_everything() {
    run(async {
        let (mut client, mut connection, _driver) = start(Limits::default());
        client.open(1, true).await;
        let mut stream = connection.accept().await.unwrap().accept();
        tokio::spawn(async move {
            stream.write_all(&vec![1; 1_000_000]).await.unwrap();
            stream.shutdown().await.unwrap();
        });
        let mut got = 0;
        loop {
            match client.next_plain().await {
                Some(Came::Data { data, fin, .. }) => {
                    got += data.len();
                    if fin {
                        break;
                    }
                }
                Some(Came::Reply { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(got, 1_000_000);
    });
}

#[test]
fn a_peer_that_ignores_our_window_is_held_back_and_loses_nothing() {
    const SENT: usize = 3 << 20;
    run(async {
        let limits = Limits { window: 64 * 1024, ..Limits::default() };
        let (mut client, mut connection, _driver) = start(limits);
        client.open(1, false).await;
        let stream = connection.accept().await.unwrap().accept();
        let (mut reader, mut writer) = tokio::io::split(client.io);
        // Frames of 1 MiB, larger than any window.
        let frames = (0..3).map(|number| {
            let bytes: Vec<u8> = (0..SENT / 3).map(|at| (at as u8).wrapping_add(number)).collect();
            [frame::data_header(1, number == 2, bytes.len()).as_slice(), &bytes].concat()
        });
        let frames: Vec<u8> = frames.flatten().collect();
        let expected: Vec<u8> =
            frames.chunks(frames.len() / 3).flat_map(|frame| &frame[frame::HEADER..]).copied().collect();
        let sending = tokio::spawn(async move {
            let mut sent = 0;
            while sent < frames.len() {
                match timeout(SILENCE, writer.write(&frames[sent..])).await {
                    Ok(written) => sent += written.unwrap(),
                    Err(_) => break,
                }
            }
            (writer, frames, sent)
        });
        let discarding = tokio::spawn(async move { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await });
        let (mut writer, frames, sent) = sending.await.unwrap();
        // One window, the connection's read buffer, the pipe.
        assert!(sent < 64 * 1024 + 64 * 1024 + 2 * PIPE, "{sent} bytes were taken that nobody has read");
        tokio::spawn(async move {
            writer.write_all(&frames[sent..]).await.unwrap();
            writer
        });
        let mut stream = stream;
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        discarding.abort();
    });
}

#[test]
fn what_was_read_is_given_back_to_the_windows() {
    run(async {
        let limits = Limits { window: 1000, session_window: 100_000, ..Limits::default() };
        let (mut client, mut connection, _driver) = start(limits);
        assert_eq!(client.next().await, Some(Came::Settings));
        // The connection's window begins with 64 KiB.
        assert_eq!(client.next().await, Some(Came::Window { stream: 0, delta: 100_000 - 64 * 1024 }));
        client.open(1, false).await;
        let mut stream = connection.accept().await.unwrap().accept();
        assert_eq!(client.next().await, Some(Came::Reply { stream: 1 }));
        let mut given = [0, 0];
        for _ in 0..200 {
            client.data(1, false, &[0; 500]).await;
            stream.read_exact(&mut [0; 500]).await.unwrap();
            while let Some(Came::Window { stream, delta }) = client.next().await {
                given[stream as usize] += delta;
                if stream == 1 {
                    break;
                }
            }
        }
        client.send(&frame::ping(1)).await;
        while let Some(Came::Window { stream, delta }) = client.next().await {
            given[stream as usize] += delta;
        }
        assert_eq!(given, [100_000, 100_000]);
    });
}

#[test]
fn data_that_nobody_reads_is_given_back_to_the_window_of_the_connection() {
    run(async {
        let limits = Limits { session_window: 100_000, ..Limits::default() };
        let (mut client, mut connection, _driver) = start(limits);
        client.open(1, false).await;
        drop(connection.accept().await.unwrap().accept());
        client.data(1, false, &[0; 30_000]).await;
        client.data(1, false, &[0; 30_000]).await;
        client.send(&frame::ping(1)).await;
        let mut given = 0;
        loop {
            match client.next().await {
                Some(Came::Window { stream: 0, delta }) => given += delta,
                Some(Came::Ping { id: 1 }) => break,
                Some(_) => {}
                None => panic!("it ended"),
            }
        }
        // Half a window may be owed.
        assert!(given >= 100_000 - 64 * 1024 + 50_000, "{given}");
    });
}

#[test]
fn resets_reach_both_sides() {
    run(async {
        let (mut client, mut connection, _driver) = start(Limits::default());
        client.open(1, false).await;
        client.open(3, false).await;
        client.open(5, false).await;
        let mut first = connection.accept().await.unwrap().accept();
        drop(connection.accept().await.unwrap().accept());
        connection.accept().await.unwrap().refuse();
        client.send(&frame::rst_stream(1, frame::Reset::Cancel)).await;
        let error = first.read(&mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(first.write(b"x").await.is_err());
        let mut came = Vec::new();
        for _ in 0..4 {
            came.push(client.next_plain().await.unwrap());
        }
        assert!(came.contains(&Came::Reset { stream: 3, status: 5 }), "{came:?}");
        assert!(came.contains(&Came::Reset { stream: 5, status: 3 }), "{came:?}");
    });
}

#[test]
fn more_streams_than_allowed_are_refused_and_places_come_back() {
    run(async {
        let (mut client, mut connection, _driver) = start(Limits { streams_max: 2, ..Limits::default() });
        for id in [1, 3, 5] {
            client.open(id, false).await;
        }
        assert_eq!(client.next_plain().await, Some(Came::Reset { stream: 5, status: 3 }));
        drop(connection.accept().await.unwrap());
        assert_eq!(client.next_plain().await, Some(Came::Reset { stream: 1, status: 5 }));
        client.open(7, false).await;
        drop(connection.accept().await.unwrap().accept());
        let _seventh = connection.accept().await.unwrap().accept();
        loop {
            match client.next_plain().await.unwrap() {
                Came::Reply { stream: 7 } => break,
                Came::Reset { stream: 7, .. } => panic!("no place came back"),
                _ => {}
            }
        }
    });
}

#[test]
fn a_flood_of_pings_fills_no_memory() {
    run(async {
        let (client, _connection, _driver) = start(Limits::default());
        let mut io = client.io;
        let ping = frame::ping(1);
        let mut sent = 0;
        // The answers are not read.
        while timeout(SILENCE, io.write_all(&ping)).await.is_ok() {
            sent += 1;
            assert!(sent < 20_000, "pings are taken without end");
        }
    });
}

#[test]
fn a_connection_without_traffic_ends() {
    run(async {
        let limits = Limits { idle: Some(Duration::from_millis(100)), ..Limits::default() };
        let (mut client, mut connection, driver) = start(limits);
        client.open(1, false).await;
        let mut stream = connection.accept().await.unwrap().accept();
        assert!(matches!(driver.await.unwrap(), Err(Error::Idle(_))));
        assert_eq!(stream.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(connection.accept().await.is_none());
    });
}

#[test]
fn an_abrupt_end_reaches_the_streams() {
    run(async {
        let (mut client, mut connection, driver) = start(Limits::default());
        client.open(1, false).await;
        let mut stream = connection.accept().await.unwrap().accept();
        client.data(1, false, b"last").await;
        assert_eq!(client.next_plain().await, Some(Came::Reply { stream: 1 }));
        drop(client);
        driver.await.unwrap().unwrap();
        let mut buffer = [0; 10];
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 4);
        assert_eq!(stream.read(&mut buffer).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn what_the_protocol_forbids_ends_the_connection_in_words() {
    let check = |frames: Vec<u8>, words: &str| {
        run(async {
            let (mut client, _connection, driver) = start(Limits::default());
            client.send(&frames).await;
            while let Some(came) = client.next_plain().await {
                assert_eq!(came, Came::GoAway { status: 1 });
            }
            drop(client);
            let error = driver.await.unwrap().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        });
    };
    let block = Deflater::new().block(&Headers::default());
    check(client::syn_stream(2, false, &block), "number is even");
    check(client::syn_stream(0, false, &block), "number is even");
    check(frame::data_header(9, false, 0).to_vec(), "never opened");
    check(frame::syn_reply(1, &block), "never opened");
    check(client::headers(1, false, b"no zlib"), "does not inflate");
    check(client::many_settings(1_000_000), "too many settings");
    check(frame::settings_window(u32::MAX), "2 GiB");
    check([frame::window_update(0, 0x7fff_ffff), frame::window_update(0, 1)].concat(), "2 GiB");
    check(vec![0x80, 2, 0, 1, 0, 0, 0, 0], "version");
    check(vec![0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], "headers of more than");
    check(vec![0x80, 3, 0, 1, 0, 0, 0, 2, 0, 0], "too short");
}

/// What hostile clients send: frames that are right, nearly right, and no frames at all.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let ids = || prop_oneof![Just(1u32), Just(3), Just(5), Just(0), any::<u32>()];
    let block = || {
        proptest::collection::vec((".{0,8}", ".{0,8}"), 0..3)
            .prop_map(|pairs| Deflater::new().block(&pairs.into_iter().collect()))
    };
    let piece = prop_oneof![
        (ids(), any::<bool>(), block()).prop_map(|(id, fin, block)| client::syn_stream(id, fin, &block)),
        (ids(), any::<bool>(), block()).prop_map(|(id, fin, block)| client::headers(id, fin, &block)),
        (ids(), any::<bool>(), any::<Vec<u8>>()).prop_map(|(id, fin, data)| [
            frame::data_header(id, fin, data.len()).as_slice(),
            &data
        ]
        .concat()),
        (ids(), any::<u32>()).prop_map(|(id, delta)| frame::window_update(id, delta)),
        any::<u32>().prop_map(frame::settings_window),
        ids().prop_map(|id| frame::rst_stream(id, frame::Reset::Cancel)),
        any::<u32>().prop_map(frame::ping),
        Just(frame::go_away(0, frame::GoAway::Ok)),
        any::<Vec<u8>>(),
    ];
    (
        proptest::collection::vec(piece, 0..12),
        proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    )
        .prop_map(|(pieces, damage)| {
            let mut bytes = pieces.concat();
            for (at, byte) in damage {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
            }
            bytes
        })
}

proptest! {
    /// Whatever comes, the server neither panics nor hangs once the client is gone, and its streams end.
    #[test]
    fn hostile_bytes_never_panic_and_always_end(bytes in hostile()) {
        run(async {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let (mut connection, driver) = serve(theirs, Limits { window: 64, session_window: 100, ..Limits::default() });
            let driver = tokio::spawn(driver);
            let echoing = tokio::spawn(async move {
                let mut echoes = tokio::task::JoinSet::new();
                while let Some(incoming) = connection.accept().await {
                    let mut stream = incoming.accept();
                    echoes.spawn(async move {
                        let (mut reader, mut writer) = tokio::io::split(&mut stream);
                        let _ = tokio::io::copy(&mut reader, &mut writer).await;
                        let _ = writer.shutdown().await;
                    });
                }
                while echoes.join_next().await.is_some() {}
            });
            let (mut reader, mut writer) = tokio::io::split(ours);
            let reading = tokio::spawn(async move { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await });
            let _ = writer.write_all(&bytes).await;
            let _ = writer.shutdown().await;
            drop(writer);
            let _ = driver.await.unwrap();
            let _ = reading.await.unwrap();
            echoing.await.unwrap();
        });
    }
}
