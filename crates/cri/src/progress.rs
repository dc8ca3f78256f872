//! Streams of the administration interface: reports while the work goes on, thinned out, and one last message.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Response, Status};

use crate::{Answer, call};

/// Reports on one blob in one phase come no closer than this: ten a second is what an eye can follow.
const INTERVAL: Duration = Duration::from_millis(100);

/// Reports that a slow reader may lag behind; further ones are dropped, the last message never is.
const BUFFER: usize = 64;

/// Where the work's reports go. Cheap to clone.
pub(crate) struct Reports<T> {
    channel: mpsc::Sender<Result<T, Status>>,
    throttle: Arc<Throttle>,
}

impl<T> Clone for Reports<T> {
    fn clone(&self) -> Self {
        Self { channel: self.channel.clone(), throttle: Arc::clone(&self.throttle) }
    }
}

impl<T> Reports<T> {
    /// Sends a report on `subject`, unless one like it was sent just before or the reader lags behind.
    pub(crate) fn send(&self, subject: &str, phase: &str, complete: bool, report: impl FnOnce() -> T) {
        if self.throttle.passes(subject, phase, complete, Instant::now()) {
            let _ = self.channel.try_send(Ok(report()));
        }
    }
}

/// Runs `work` and answers with the stream of its reports; its result is the last message. A caller that goes away
/// ends the work, with which `operation` is dropped.
pub(crate) fn stream<T, W>(
    operation: impl Send + 'static,
    method: &'static str,
    object: String,
    work: impl FnOnce(Reports<T>) -> W,
) -> Answer<BoxStream<T>>
where
    T: Send + 'static,
    W: Future<Output = Result<T, Status>> + Send + 'static,
{
    let (channel, stream) = mpsc::channel(BUFFER);
    let work = work(Reports { channel: channel.clone(), throttle: Arc::default() });
    tokio::spawn(async move {
        let _operation = operation;
        let last = tokio::select! {
            last = call::change(method, &object, work) => last.map(Response::into_inner),
            () = channel.closed() => return,
        };
        // The reader may have left in the meantime; nobody else wants the result.
        let _ = channel.send(last).await;
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
}

/// Remembers when something was last reported.
#[derive(Debug, Default)]
struct Throttle(Mutex<HashMap<String, (String, Instant)>>);

impl Throttle {
    /// A new phase and the end of one always pass.
    fn passes(&self, subject: &str, phase: &str, complete: bool, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = last.get(subject).filter(|(last_phase, _)| last_phase == phase);
        let too_soon = known.is_some_and(|(_, at)| now.duration_since(*at) < INTERVAL);
        if too_soon && !complete {
            return false;
        }
        last.insert(subject.to_owned(), (phase.to_owned(), now));
        true
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;

    #[test]
    fn reports_are_thinned_out_but_for_changes() {
        let throttle = Throttle::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert!(throttle.passes("a", "downloading", false, at(0)));
        assert!(!throttle.passes("a", "downloading", false, at(99)));
        assert!(throttle.passes("b", "downloading", false, at(99)), "another blob");
        assert!(throttle.passes("a", "downloading", false, at(100)));
        assert!(throttle.passes("a", "downloading", true, at(101)), "the end");
        assert!(throttle.passes("a", "unpacking", false, at(102)), "another phase");
    }

    #[tokio::test]
    async fn the_result_is_the_last_message_however_many_reports_were_dropped() {
        let stream = stream((), "Test", String::new(), |reports| async move {
            for number in 0..1000 {
                reports.send("x", &number.to_string(), false, || number);
            }
            Ok(1000)
        });
        let messages: Vec<_> = stream.unwrap().into_inner().collect().await;
        assert!(messages.len() > 1 && messages.len() <= BUFFER + 1, "{}", messages.len());
        assert_eq!(messages.last().unwrap().as_ref().unwrap(), &1000);
    }

    #[tokio::test]
    async fn a_failure_is_the_last_message() {
        let stream = stream::<(), _>((), "Test", String::new(), |_| async { Err(Status::not_found("x")) });
        let messages: Vec<_> = stream.unwrap().into_inner().collect().await;
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].as_ref().unwrap_err().code(), tonic::Code::NotFound);
    }

    #[tokio::test]
    async fn a_caller_that_leaves_ends_the_work() {
        struct Ended(Option<tokio::sync::oneshot::Sender<()>>);
        impl Drop for Ended {
            fn drop(&mut self) {
                let _ = self.0.take().unwrap().send(());
            }
        }
        let (sender, ended) = tokio::sync::oneshot::channel();
        let stream = stream::<(), _>((), "Test", String::new(), |_| async move {
            let _ended = Ended(Some(sender));
            std::future::pending().await
        });
        tokio::task::yield_now().await;
        drop(stream);
        ended.await.unwrap();
    }
}
