//! Streams of CRI: lists that come item by item, and events.
//!
//! A list is taken whole before its first item is sent, so that what happens meanwhile is in it wholly or not at all; its
//! items then leave as fast as the reader takes them.

use futures_util::stream;
use stasis_pod::EventReader;
use tonic::codegen::BoxStream;

use crate::status::from_pod;

/// A list as a stream of one item a message: no list is too long for the limit of a message.
pub(crate) fn one_a_message<T, M>(list: Vec<T>, message: impl Fn(T) -> M + Send + 'static) -> BoxStream<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    Box::pin(stream::iter(list.into_iter().map(move |item| Ok(message(item)))))
}

/// The events from now on, until the reader leaves or is too slow.
pub(crate) fn events(reader: EventReader) -> BoxStream<stasis_cri_api::runtime::ContainerEventResponse> {
    Box::pin(stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(event)) => Some((Ok(event), Some(reader))),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "a reader of events is cut off");
                Some((Err(from_pod(error)), None))
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn each_item_of_a_list_has_a_message_of_its_own_and_its_place() {
        let messages: Vec<_> = one_a_message(vec![1, 2, 3], |item| vec![item]).map(Result::unwrap).collect().await;
        assert_eq!(messages, [[1], [2], [3]]);
        assert_eq!(one_a_message(Vec::<i32>::new(), |item| item).count().await, 0);
    }
}
