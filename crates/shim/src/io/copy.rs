//! Copying between a process's ends and where its stdio goes. Bounded memory, whatever the process writes.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::attach::Taps;
use super::fifo::FifoWriter;
use super::log::LogWriter;
use super::pipe::Pipe;
use crate::journal;

/// Read at once. Half a pipe's default capacity: the writer can go on while we work.
const CHUNK: usize = 32 * 1024;

/// After the process itself has ended, others that it left behind may still hold its output. All that it wrote has
/// arrived when nothing comes for so long; a terminal hands over asynchronously, so that an empty one says nothing.
const QUIET: Duration = Duration::from_millis(100);

thread_local! {
    /// One buffer for all streams of the shim: it is never held across a wait.
    static BUFFER: RefCell<Box<[u8; CHUNK]>> = RefCell::new(Box::new([0; CHUNK]));
}

/// Where an output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// Read and dropped.
    Nowhere,
    /// A log file.
    Log(LogWriter),
    /// A FIFO.
    Fifo(FifoWriter),
}

/// What a read brought.
enum Read<T> {
    /// Nothing for now.
    Nothing,
    /// Bytes, and what was made of them.
    Some(T),
    /// No more will come.
    End,
}

/// Copies an output until its end, to its sink and to the clients that are attached to it. `drained` is told as soon as everything that the process wrote has arrived.
pub(super) async fn output(
    source: Arc<Pipe>,
    mut sink: Sink,
    taps: Taps,
    mut ended: watch::Receiver<bool>,
    drained: oneshot::Sender<()>,
) {
    let mut drained = Some(drained);
    loop {
        let over = *ended.borrow_and_update() || ended.has_changed().is_err();
        tokio::select! {
            biased;
            ready = source.readable() => if ready.is_err() { break },
            () = tokio::time::sleep(QUIET), if over && drained.is_some() => {
                sink.flush();
                drained.take();
                continue;
            }
            _ = ended.changed(), if !over => continue,
        }
        match sink.take(&source, &taps) {
            Read::Nothing | Read::Some(None) => {}
            Read::Some(Some(bytes)) => sink.pass_on(&bytes).await,
            Read::End => break,
        }
        // A process that writes without end must not keep the shim from its other work.
        tokio::task::yield_now().await;
    }
    sink.finish();
    taps.end();
    drop(drained);
}

/// Copies an input until its end, or until the process no longer takes it.
pub(super) async fn input(source: Pipe, target: Arc<Pipe>) {
    while let Some(bytes) = next(&source).await {
        if target.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// What comes next; none at the end.
pub(super) async fn next(source: &Pipe) -> Option<Vec<u8>> {
    while source.readable().await.is_ok() {
        match read(source, <[u8]>::to_vec) {
            Read::Nothing => {}
            Read::Some(bytes) => return Some(bytes),
            Read::End => break,
        }
    }
    None
}

fn read<T>(source: &Pipe, use_bytes: impl FnOnce(&[u8]) -> T) -> Read<T> {
    BUFFER.with_borrow_mut(|buffer| match source.read(&mut buffer[..]) {
        Ok(None) => Read::Nothing,
        Ok(Some(0)) => Read::End,
        Ok(Some(length)) => Read::Some(use_bytes(&buffer[..length])),
        Err(error) => {
            journal::line(format_args!("cannot read a stream: {error}"));
            Read::End
        }
    })
}

impl Sink {
    /// Takes what is there; bytes that may have to wait for a FIFO's reader are given back, for [`Sink::pass_on`].
    fn take(&mut self, source: &Pipe, taps: &Taps) -> Read<Option<Vec<u8>>> {
        read(source, |bytes| {
            let waiting = match self {
                Sink::Nowhere => None,
                Sink::Log(log) => {
                    log.write(bytes);
                    None
                }
                Sink::Fifo(_) => Some(bytes.to_vec()),
            };
            taps.write(bytes);
            waiting
        })
    }

    async fn pass_on(&mut self, bytes: &[u8]) {
        if let Sink::Fifo(fifo) = self {
            fifo.write(bytes).await;
        }
    }

    /// What is held back for want of a line's end goes out; more of that line may come.
    fn flush(&mut self) {
        if let Sink::Log(log) = self {
            log.flush();
        }
    }

    /// No more comes.
    fn finish(&mut self) {
        if let Sink::Log(log) = self {
            log.finish();
        }
    }
}
