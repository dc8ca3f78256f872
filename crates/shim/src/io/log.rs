//! Log files: the CRI format, or bare bytes.
//!
//! A line of the CRI format is `2016-10-06T00:17:09.669794202Z stdout F message`. `P` in place of `F` says that the message
//! goes on in the next line of the same stream: a line longer than [`CRI_LOG_LINE_MAX`] is written in pieces.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use stasis_shim_api::CRI_LOG_LINE_MAX;

use crate::error::Error;
use crate::journal;

/// Formatted lines are written to the file when there is so much of them, and at the end of each read.
const BATCH: usize = 32 * 1024;

thread_local! {
    /// One buffer for the lines of all streams: it is never held across a wait.
    static LINES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A log file that several streams may share.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    /// Bytes that could not be written since the last that could.
    lost: u64,
    /// Whether the file ends in the middle of a line because a write failed there.
    torn: bool,
}

/// One stream's way into a log file.
#[derive(Debug)]
pub(super) struct LogWriter {
    log: Arc<Mutex<LogFile>>,
    framing: Option<Framing>,
}

pub(super) fn lock(log: &Mutex<LogFile>) -> MutexGuard<'_, LogFile> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LogFile {
    /// Opens a file to append, and makes it if there is none; its directory must exist.
    pub(super) fn open(path: PathBuf) -> Result<LogFile, Error> {
        let file = open_file(&path)?;
        Ok(LogFile { path, file, lost: 0, torn: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the file and begins it again under the same path. On an error the old one goes on.
    pub(super) fn reopen(&mut self) -> Result<(), Error> {
        self.file = open_file(&self.path)?;
        self.torn = false;
        Ok(())
    }

    /// A write that fails loses its bytes, never the container's pace; the shim's own log says so once.
    fn append(&mut self, bytes: &[u8]) {
        if self.torn && self.write_all(b"\n").is_err() {
            return self.lose(bytes.len());
        }
        match self.write_all(bytes) {
            Ok(()) => {
                self.torn = false;
                if self.lost > 0 {
                    journal::line(format_args!(
                        "{} is written again; {} bytes were lost",
                        self.path.display(),
                        self.lost
                    ));
                    self.lost = 0;
                }
            }
            Err((written, error)) => {
                if self.lost == 0 {
                    let path = self.path.display();
                    journal::line(format_args!("cannot write to {path}: {error}; output is dropped until that works"));
                }
                self.torn = written > 0 && bytes[written - 1] != b'\n' || written == 0 && self.torn;
                self.lose(bytes.len() - written);
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut written = 0;
        while written < bytes.len() {
            match self.file.write(&bytes[written..]) {
                Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
                Ok(length) => written += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((written, error)),
            }
        }
        Ok(())
    }

    fn lose(&mut self, bytes: usize) {
        self.lost = self.lost.saturating_add(bytes as u64);
    }
}

/// Never through a link, never into something that is no regular file: the directory is one that a container's volumes
/// may reach.
fn open_file(path: &Path) -> Result<File, Error> {
    let failed = |error: rustix::io::Errno| Error::io(format!("opening the log file {}", path.display()))(error.into());
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::RUSR | Mode::WUSR | Mode::RGRP).map_err(failed)?;
    match FileType::from_raw_mode(fstat(&file).map_err(failed)?.st_mode) {
        FileType::RegularFile => Ok(file.into()),
        _ => Err(Error::Invalid(format!("the log file {} is no regular file", path.display()))),
    }
}

impl LogWriter {
    pub(super) fn cri(log: Arc<Mutex<LogFile>>, stream: &'static str) -> LogWriter {
        LogWriter { log, framing: Some(Framing { stream, line: Vec::new() }) }
    }

    pub(super) fn raw(log: Arc<Mutex<LogFile>>) -> LogWriter {
        LogWriter { log, framing: None }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        let LogWriter { log, framing } = self;
        match framing {
            Some(framing) => write_lines(log, |now, out| framing.feed(bytes, now, out)),
            None => lock(log).append(bytes),
        }
    }

    /// Writes the beginning of a line that has no end yet.
    pub(super) fn flush(&mut self) {
        self.end_line('P');
    }

    /// Writes what is left of the last line.
    pub(super) fn finish(&mut self) {
        self.end_line('F');
    }

    fn end_line(&mut self, tag: char) {
        let LogWriter { log, framing } = self;
        if let Some(framing) = framing.as_mut().filter(|framing| !framing.line.is_empty()) {
            write_lines(log, |now, out| framing.emit(tag, b"", now, out));
        }
    }
}

/// The buffer of formatted lines on its way to a file.
struct Lines<'a> {
    lines: &'a mut Vec<u8>,
    log: &'a Mutex<LogFile>,
}

impl Lines<'_> {
    fn flush(&mut self) {
        if !self.lines.is_empty() {
            lock(self.log).append(self.lines);
            self.lines.clear();
        }
    }
}

/// All lines of one read get one time: they arrived together.
fn write_lines(log: &Mutex<LogFile>, format: impl FnOnce(&str, &mut Lines<'_>)) {
    LINES.with_borrow_mut(|lines| {
        let mut out = Lines { lines, log };
        format(&format!("{:.9}", Timestamp::now()), &mut out);
        out.flush();
    });
}

/// The CRI format of one stream.
#[derive(Debug)]
struct Framing {
    stream: &'static str,
    /// The line so far; at most [`CRI_LOG_LINE_MAX`] bytes.
    line: Vec<u8>,
}

impl Framing {
    fn feed(&mut self, bytes: &[u8], now: &str, out: &mut Lines<'_>) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let last = self.emit_full_pieces(&rest[..end], now, out);
            self.emit('F', last, now, out);
            rest = &rest[end + 1..];
        }
        let last = self.emit_full_pieces(rest, now, out);
        self.line.extend_from_slice(last);
    }

    /// Writes as many pieces of full length as there are in the line so far and `text`; gives what is left of `text`. The
    /// last piece stays, as the line's end may follow it.
    fn emit_full_pieces<'a>(&mut self, mut text: &'a [u8], now: &str, out: &mut Lines<'_>) -> &'a [u8] {
        while self.line.len() + text.len() > CRI_LOG_LINE_MAX {
            let (piece, rest) = text.split_at(CRI_LOG_LINE_MAX - self.line.len());
            self.emit('P', piece, now, out);
            text = rest;
        }
        text
    }

    fn emit(&mut self, tag: char, text: &[u8], now: &str, out: &mut Lines<'_>) {
        let mut put = |bytes: &[u8]| out.lines.extend_from_slice(bytes);
        put(now.as_bytes());
        put(b" ");
        put(self.stream.as_bytes());
        put(if tag == 'P' { b" P " } else { b" F " });
        put(&self.line);
        put(text);
        put(b"\n");
        // Most streams write whole lines and need no memory between them.
        self.line = Vec::new();
        if out.lines.len() >= BATCH {
            out.flush();
        }
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
