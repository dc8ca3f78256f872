//! What is known of every call, whatever its method: its trace, how long it took, how it ended, and which run now.
//!
//! Calls are seen from outside, as HTTP requests on their way to a service. So a stream counts until it begins; and a
//! method that does not exist counts as one, whatever a client makes up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stasis_metrics::{Histogram, Kind, Text};
use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};
use tracing::Span;

/// Methods that are told apart; far more than there are. What a client makes up beyond is one.
const METHODS_MAX: usize = 256;

/// Stands for the methods beyond [`METHODS_MAX`].
const OTHER: &str = "other";

/// The header of W3C Trace Context by which the kubelet says which of its operations a call belongs to.
const TRACE_HEADER: &str = "traceparent";

/// The calls of this daemon.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    methods: Mutex<BTreeMap<String, Arc<Method>>>,
    open: Mutex<BTreeMap<u64, Open>>,
    number: AtomicU64,
}

/// All calls of one method.
#[derive(Debug, Default)]
struct Method {
    latency: Histogram,
    codes: Mutex<BTreeMap<&'static str, u64>>,
}

/// A call that runs.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) method: String,
    pub(crate) since: Instant,
    pub(crate) trace: String,
}

/// A call until its end; one that is dropped before was given up by its caller.
#[derive(Debug)]
pub(crate) struct Call {
    telemetry: Arc<Telemetry>,
    method: Arc<Method>,
    number: u64,
    begin: Instant,
    ended: bool,
}

impl Telemetry {
    /// A call begins: `path` is `/package.Service/Method`.
    pub(crate) fn begin(self: &Arc<Self>, path: &str, headers: &HeaderMap) -> (Call, Span) {
        let name = path.rsplit('/').next().unwrap_or_default();
        let trace = headers.get(TRACE_HEADER).and_then(|value| value.to_str().ok()).and_then(parse_trace);
        let begin = Instant::now();
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let open = Open {
            method: name.chars().take(64).collect(),
            since: begin,
            trace: trace.map(|(trace, _)| trace.to_owned()).unwrap_or_default(),
        };
        lock(&self.open).insert(number, open);
        let call = Call { telemetry: Arc::clone(self), method: self.method(name), number, begin, ended: false };
        let span = match trace {
            Some((trace_id, parent_id)) => tracing::info_span!("request", trace_id, parent_id),
            None => Span::none(),
        };
        (call, span)
    }

    /// The calls that run, the oldest first.
    pub(crate) fn open(&self) -> Vec<Open> {
        lock(&self.open).values().cloned().collect()
    }

    /// Writes the metrics of all methods.
    pub(crate) fn write(&self, text: &mut Text) {
        let methods = lock(&self.methods).clone();
        text.family("stasis_rpc", Kind::Counter, "Calls by method and gRPC code.");
        for (name, method) in &methods {
            for (code, count) in lock(&method.codes).iter() {
                text.sample(&[("rpc", name), ("code", code)], *count);
            }
        }
        text.family("stasis_rpc_duration_seconds", Kind::Histogram, "Time to the answer, or to the begin of a stream.");
        for (name, method) in &methods {
            text.histogram(&[("rpc", name)], &method.latency);
        }
        text.family("stasis_rpc_open", Kind::Gauge, "Calls that run now.");
        text.sample(&[], lock(&self.open).len() as u64);
    }

    fn method(&self, name: &str) -> Arc<Method> {
        let mut methods = lock(&self.methods);
        let name = if methods.len() < METHODS_MAX || methods.contains_key(name) { name } else { OTHER };
        Arc::clone(methods.entry(name.to_owned()).or_default())
    }
}

impl Call {
    /// The call ends with an answer's headers, in which a refusal stands.
    pub(crate) fn end(mut self, headers: &HeaderMap) {
        let code = Status::from_header_map(headers).map_or(Code::Ok, |status| status.code());
        self.count(code);
    }

    fn count(&mut self, code: Code) {
        self.ended = true;
        lock(&self.telemetry.open).remove(&self.number);
        self.method.latency.observe(self.begin.elapsed());
        *lock(&self.method.codes).entry(code_name(code)).or_default() += 1;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.ended {
            self.count(Code::Cancelled);
        }
    }
}

impl Open {
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }
}

/// The IDs of the trace and of the caller's span in `00-<32 digits>-<16 digits>-<2 digits>`; all zeros are none.
fn parse_trace(header: &str) -> Option<(&str, &str)> {
    let is_id =
        |text: &str, length| text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let mut parts = header.split('-');
    let (version, trace, parent) = (parts.next()?, parts.next()?, parts.next()?);
    let known = is_id(version, 2) && version != "ff" && is_id(parts.next()?, 2);
    let real = is_id(trace, 32) && is_id(parent, 16) && [trace, parent].iter().all(|id| id.bytes().any(|b| b != b'0'));
    (known && real).then_some((trace, parent))
}

/// The name of a code in gRPC's specification.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(telemetry: &Telemetry) -> String {
        let mut text = Text::default();
        telemetry.write(&mut text);
        text.finish()
    }

    #[test]
    fn calls_are_counted_by_their_end() {
        let telemetry = Arc::new(Telemetry::default());
        let begin = |path: &str| telemetry.begin(path, &HeaderMap::new()).0;
        begin("/runtime.v1.RuntimeService/Version").end(&HeaderMap::new());
        let refusal = Status::not_found("x").into_http::<tonic::body::Body>();
        begin("/runtime.v1.RuntimeService/Version").end(refusal.headers());
        drop(begin("/runtime.v1.RuntimeService/Version"));
        let running = begin("/runtime.v1.RuntimeService/StopContainer");
        assert_eq!(telemetry.open().iter().map(|open| open.method.as_str()).collect::<Vec<_>>(), ["StopContainer"]);
        let text = written(&telemetry);
        for line in [
            "stasis_rpc_total{rpc=\"Version\",code=\"OK\"} 1",
            "stasis_rpc_total{rpc=\"Version\",code=\"NOT_FOUND\"} 1",
            "stasis_rpc_total{rpc=\"Version\",code=\"CANCELLED\"} 1",
            "stasis_rpc_duration_seconds_count{rpc=\"Version\"} 3",
            "stasis_rpc_open 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in {text}");
        }
        drop(running);
        assert!(telemetry.open().is_empty());
    }

    #[test]
    fn methods_that_a_client_makes_up_do_not_add_up() {
        let telemetry = Arc::new(Telemetry::default());
        for number in 0..2 * METHODS_MAX {
            telemetry.begin(&format!("/x/{number}"), &HeaderMap::new()).0.end(&HeaderMap::new());
        }
        assert_eq!(lock(&telemetry.methods).len(), METHODS_MAX + 1);
        assert!(written(&telemetry).contains("rpc=\"other\""));
    }

    #[test]
    fn only_a_whole_trace_header_is_believed() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let whole = format!("00-{trace}-b7ad6b7169203331-01");
        assert_eq!(parse_trace(&whole), Some((trace, "b7ad6b7169203331")));
        for wrong in [
            "",
            "00",
            &whole[..54],
            &whole.replace("0af7", "0AF7"),
            &whole.replace("00-", "ff-"),
            &format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
            &format!("00-{trace}-\n7ad6b7169203331-01"),
        ] {
            assert_eq!(parse_trace(wrong), None, "{wrong:?}");
        }
    }
}
