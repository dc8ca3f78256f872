//! What happens to pods and containers, told to those who listen: CRI's GetContainerEvents.
//!
//! A change of state only puts its event into a ring and goes on; how fast anybody reads is no concern of it. A reader
//! that falls a whole ring behind has missed something, is told so, and must list anew.

use stasis_cri_api::runtime::{ContainerEventResponse, ContainerEventType};
use tokio::sync::broadcast::{Receiver, Sender, error::RecvError};

use crate::error::{Error, Kind, Result};
use crate::pods::Pods;
use crate::record::now;

/// How many events a reader may lag behind: a node's 250 pods, started and stopped at once. An event with the statuses
/// of its pod has some KiB, and is forgotten as soon as every reader has it.
const BACKLOG: usize = 1024;

/// The events of the engine. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Events(Sender<ContainerEventResponse>);

/// Reads the events from its making on.
#[derive(Debug)]
pub struct EventReader(Receiver<ContainerEventResponse>);

impl Default for Events {
    fn default() -> Self {
        Self(Sender::new(BACKLOG))
    }
}

impl Events {
    fn reader(&self) -> EventReader {
        EventReader(self.0.subscribe())
    }

    fn send(&self, event: ContainerEventResponse) {
        // Nobody may be listening any more.
        let _ = self.0.send(event);
    }
}

impl EventReader {
    /// The next event; none when the engine ends.
    ///
    /// # Errors
    /// `ResourceExhausted` for a reader that was too slow: events were lost, and reading on would hide that.
    pub async fn next(&mut self) -> Result<Option<ContainerEventResponse>> {
        match self.0.recv().await {
            Ok(event) => Ok(Some(event)),
            Err(RecvError::Closed) => Ok(None),
            Err(RecvError::Lagged(lost)) => Err(Error::new(
                Kind::ResourceExhausted,
                format!("the reader of events fell more than {BACKLOG} behind and lost {lost}: list, and read anew"),
            )),
        }
    }
}

impl Pods {
    /// The events from now on: CRI GetContainerEvents.
    pub fn events(&self) -> EventReader {
        self.events.reader()
    }

    /// Tells what happened to a container, or with the pod's own ID to a pod, along with the state of the whole pod.
    pub(crate) fn tell(&self, what: ContainerEventType, id: &str, pod_id: &str) {
        if self.events.0.receiver_count() == 0 {
            return;
        }
        let pod = self.pod_sandbox_status(pod_id, false).ok().and_then(|answer| answer.status);
        let containers = self.containers_of(pod_id);
        let statuses = containers.iter().map(|container| crate::container::status(&container.record()));
        self.events.send(ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: what.into(),
            created_at: now(),
            pod_sandbox_status: pod,
            containers_statuses: statuses.collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize) -> ContainerEventResponse {
        ContainerEventResponse { container_id: number.to_string(), ..ContainerEventResponse::default() }
    }

    #[tokio::test]
    async fn a_reader_that_lags_is_cut_off_and_holds_up_nobody() {
        let events = Events::default();
        let (mut slow, mut fast) = (events.reader(), events.reader());
        for number in 0..=BACKLOG {
            events.send(event(number));
            assert_eq!(fast.next().await.unwrap(), Some(event(number)));
        }
        let error = slow.next().await.unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceExhausted);
        assert!(error.to_string().contains("lost 1"), "{error}");
    }

    #[tokio::test]
    async fn events_end_with_the_engine() {
        let events = Events::default();
        let mut reader = events.reader();
        events.send(event(1));
        drop(events);
        assert_eq!(reader.next().await.unwrap(), Some(event(1)));
        assert_eq!(reader.next().await.unwrap(), None);
    }
}
