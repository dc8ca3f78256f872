//! The little HTTP/1.1 that it takes to put images into a registry on loopback. Not for any other server.

use std::io::{BufRead, BufReader, Read, Write, copy};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The registry writes a gigabyte to disk before it answers.
const ANSWER: Duration = Duration::from_secs(120);

/// Longest body of an answer that is read: an error text, a manifest.
const BODY_MAX: u64 = 1 << 20;

/// What the server said.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The value of a header; names are compared without case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// One request on a connection of its own; `body` gives exactly `length` bytes.
pub(crate) fn request(
    server: SocketAddr,
    method: &str,
    target: &str,
    content_type: &str,
    length: u64,
    body: &mut dyn Read,
) -> Result<Answer> {
    let what = || format!("{method} http://{server}{target}");
    let mut stream = TcpStream::connect(server).with_context(what)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\
         Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).with_context(what)?;
    copy(&mut body.take(length), &mut stream).with_context(what)?;
    answer(stream, method == "HEAD").with_context(what)
}

fn answer(stream: TcpStream, headers_only: bool) -> Result<Answer> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no HTTP answer")?;
    let mut headers = Vec::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            bail!("the answer ends within its headers");
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut body = Vec::new();
    if !headers_only {
        // `Connection: close` ends the body; the registry's small answers are not chunked.
        reader.take(BODY_MAX).read_to_end(&mut body)?;
    }
    Ok(Answer { status, headers, body })
}
