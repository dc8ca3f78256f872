//! What every call leaves in the log: a span with method and object, one line at its end with code and latency.

use std::future::Future;
use std::time::Instant;

use tonic::{Code, Response, Status};
use tracing::{Instrument as _, Span};

use crate::Answer;

/// Whether a call changes something: such calls are logged at info, the others at debug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Change,
    Read,
}

/// Runs a call that changes something.
pub(crate) async fn change<T>(
    method: &'static str,
    object: &str,
    work: impl Future<Output = Result<T, Status>>,
) -> Answer<T> {
    run(Kind::Change, method, object, work).await
}

/// Runs a call that only looks.
pub(crate) async fn read<T>(
    method: &'static str,
    object: &str,
    work: impl Future<Output = Result<T, Status>>,
) -> Answer<T> {
    run(Kind::Read, method, object, work).await
}

async fn run<T>(
    kind: Kind,
    method: &'static str,
    object: &str,
    work: impl Future<Output = Result<T, Status>>,
) -> Answer<T> {
    // A subscriber that drops debug must still show this span around the lines inside it.
    let span = tracing::info_span!("call", method, object);
    let end = End { kind, span: span.clone(), started: Instant::now(), told: false };
    let result = work.instrument(span).await;
    end.tell(result.as_ref().err());
    result.map(Response::new)
}

/// Writes the line at the end of a call, also of one that its caller abandoned.
struct End {
    kind: Kind,
    span: Span,
    started: Instant,
    told: bool,
}

impl End {
    fn tell(mut self, failure: Option<&Status>) {
        self.told = true;
        let _inside = self.span.enter();
        let latency_ms = self.latency_ms();
        match failure {
            None if self.kind == Kind::Change => tracing::info!(latency_ms, "done"),
            None => tracing::debug!(latency_ms, "done"),
            Some(status) => {
                let (code, error) = (status.code(), status.message());
                match code {
                    Code::Internal | Code::Unknown | Code::DataLoss => {
                        tracing::error!(latency_ms, ?code, error, "failed");
                    }
                    // The kubelet asks for objects that it has just removed, all day long.
                    Code::NotFound if self.kind == Kind::Read => {
                        tracing::debug!(latency_ms, ?code, error, "refused");
                    }
                    _ => tracing::warn!(latency_ms, ?code, error, "refused"),
                }
            }
        }
    }

    fn latency_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.told {
            let _inside = self.span.enter();
            tracing::warn!(latency_ms = self.latency_ms(), "the caller did not wait for the end");
        }
    }
}
