//! Frames as bytes: pure functions in both directions.

use crate::error::Error;

/// Length of what every frame begins with.
pub(crate) const HEADER: usize = 8;

/// Longest control frame that is taken, in bytes after its header. SPDY lets a receiver choose, from 8 KiB on.
pub(crate) const CONTROL_MAX: usize = 16 * 1024;

/// Most entries of a SETTINGS frame that are taken: SPDY/3.1 knows eight.
const SETTINGS_MAX: usize = 64;

const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;
const INITIAL_WINDOW_SIZE: u32 = 7;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Why a stream is reset: the codes that are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reset {
    ProtocolError = 1,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
    StreamAlreadyClosed = 9,
}

/// Why no more streams are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoAway {
    Ok = 0,
    ProtocolError = 1,
}

/// What a frame begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Header {
    Data { stream: u32, fin: bool, length: usize },
    Control { kind: u16, flags: u8, length: usize },
}

/// A control frame; header blocks are still compressed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Control<'a> {
    SynStream { stream: u32, fin: bool, unidirectional: bool, block: &'a [u8] },
    SynReply { block: &'a [u8] },
    RstStream { stream: u32 },
    Settings { initial_window: Option<u32> },
    Ping { id: u32 },
    GoAway,
    Headers { stream: u32, fin: bool, block: &'a [u8] },
    WindowUpdate { stream: u32, delta: u32 },
    Unknown,
}

impl Header {
    pub(crate) fn parse(bytes: [u8; HEADER]) -> Result<Header, Error> {
        let word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let flags = bytes[4];
        let length = u32::from_be_bytes([0, bytes[5], bytes[6], bytes[7]]) as usize;
        if word >> 31 == 0 {
            return Ok(Header::Data { stream: word, fin: flags & FLAG_FIN != 0, length });
        }
        if (word >> 16) as u16 & 0x7fff != VERSION {
            return Err(Error::Protocol("a frame of another version than 3"));
        }
        if length > CONTROL_MAX {
            return Err(Error::HeadersTooLarge(CONTROL_MAX));
        }
        Ok(Header::Control { kind: word as u16, flags, length })
    }
}

impl Control<'_> {
    pub(crate) fn parse(kind: u16, flags: u8, body: &[u8]) -> Result<Control<'_>, Error> {
        let fin = flags & FLAG_FIN != 0;
        match kind {
            SYN_STREAM => Ok(Control::SynStream {
                stream: id(body, 0)?,
                fin,
                unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                // After the stream come the associated stream, priority and slot.
                block: body.get(10..).ok_or(SHORT)?,
            }),
            SYN_REPLY => Ok(Control::SynReply { block: body.get(4..).ok_or(SHORT)? }),
            RST_STREAM => Ok(Control::RstStream { stream: id(body, 0)? }),
            SETTINGS => settings(body),
            PING => Ok(Control::Ping { id: word(body, 0)? }),
            GOAWAY => Ok(Control::GoAway),
            HEADERS => Ok(Control::Headers { stream: id(body, 0)?, fin, block: body.get(4..).ok_or(SHORT)? }),
            WINDOW_UPDATE => Ok(Control::WindowUpdate { stream: id(body, 0)?, delta: id(body, 4)? }),
            // "If the frame type is not recognised, the frame must be ignored."
            _ => Ok(Control::Unknown),
        }
    }
}

const SHORT: Error = Error::Protocol("a control frame that is too short");

fn settings(body: &[u8]) -> Result<Control<'static>, Error> {
    let count = word(body, 0)? as usize;
    if count > SETTINGS_MAX {
        return Err(Error::Protocol("too many settings"));
    }
    let mut initial_window = None;
    for entry in 0..count {
        let (flags_and_id, value) = (word(body, 4 + entry * 8)?, word(body, 8 + entry * 8)?);
        if flags_and_id & 0x00ff_ffff == INITIAL_WINDOW_SIZE {
            initial_window = Some(value);
        }
    }
    Ok(Control::Settings { initial_window })
}

fn word(body: &[u8], at: usize) -> Result<u32, Error> {
    let bytes = body.get(at..at + 4).ok_or(SHORT)?;
    Ok(u32::from_be_bytes(bytes.try_into().map_err(|_| SHORT)?))
}

/// A word whose first bit is reserved.
fn id(body: &[u8], at: usize) -> Result<u32, Error> {
    Ok(word(body, at)? & 0x7fff_ffff)
}

fn control(kind: u16, flags: u8, words: &[u32], rest: &[u8]) -> Vec<u8> {
    let length = words.len() * 4 + rest.len();
    let mut frame = Vec::with_capacity(HEADER + length);
    frame.extend_from_slice(&(1 << 31 | u32::from(VERSION) << 16 | u32::from(kind)).to_be_bytes());
    frame.extend_from_slice(&flags_and_length(flags, length));
    for word in words {
        frame.extend_from_slice(&word.to_be_bytes());
    }
    frame.extend_from_slice(rest);
    frame
}

fn flags_and_length(flags: u8, length: usize) -> [u8; 4] {
    let length = (length as u32).to_be_bytes();
    [flags, length[1], length[2], length[3]]
}

pub(crate) fn syn_reply(stream: u32, block: &[u8]) -> Vec<u8> {
    control(SYN_REPLY, 0, &[stream], block)
}

pub(crate) fn rst_stream(stream: u32, why: Reset) -> Vec<u8> {
    control(RST_STREAM, 0, &[stream, why as u32], &[])
}

pub(crate) fn settings_window(initial_window: u32) -> Vec<u8> {
    control(SETTINGS, 0, &[1, INITIAL_WINDOW_SIZE, initial_window], &[])
}

pub(crate) fn ping(id: u32) -> Vec<u8> {
    control(PING, 0, &[id], &[])
}

pub(crate) fn go_away(last_stream: u32, why: GoAway) -> Vec<u8> {
    control(GOAWAY, 0, &[last_stream, why as u32], &[])
}

pub(crate) fn window_update(stream: u32, delta: u32) -> Vec<u8> {
    control(WINDOW_UPDATE, 0, &[stream, delta], &[])
}

/// What a data frame of up to 16 MiB begins with.
pub(crate) fn data_header(stream: u32, fin: bool, length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&stream.to_be_bytes());
    header[4..].copy_from_slice(&flags_and_length(u8::from(fin) * FLAG_FIN, length));
    header
}

/// For tests, which are clients.
#[cfg(test)]
pub(crate) mod client {
    use super::{FLAG_FIN, HEADERS, SETTINGS, SYN_STREAM, control};

    pub(crate) fn syn_stream(stream: u32, fin: bool, block: &[u8]) -> Vec<u8> {
        let rest = [&[0, 0], block].concat();
        control(SYN_STREAM, u8::from(fin) * FLAG_FIN, &[stream, 0], &rest)
    }

    pub(crate) fn headers(stream: u32, fin: bool, block: &[u8]) -> Vec<u8> {
        control(HEADERS, u8::from(fin) * FLAG_FIN, &[stream], block)
    }

    pub(crate) fn many_settings(count: u32) -> Vec<u8> {
        control(SETTINGS, 0, &[count], &[])
    }
}
