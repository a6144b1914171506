//! GetContainerEvents: what subscribers are told.

use tokio::sync::broadcast;
use tokio_stream::{StreamExt, wrappers::BroadcastStream, wrappers::errors::BroadcastStreamRecvError};

use super::chunks::Streaming;
use super::to_proto;
use crate::api;
use crate::service::ContainerEvent;

/// The events of one subscriber. Nobody waits for it: when it is too slow the oldest are lost, and `lost` is told how many;
/// the pod's whole state stands in each later one.
pub(super) fn follow(events: broadcast::Receiver<ContainerEvent>, lost: impl Fn(u64) + Send + 'static) -> Streaming<api::ContainerEventResponse> {
    Box::pin(BroadcastStream::new(events).filter_map(move |event| match event {
        Ok(event) => Some(Ok(to_proto::event(&event))),
        Err(BroadcastStreamRecvError::Lagged(n)) => {
            lost(n);
            None
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::service::EventKind;

    #[tokio::test]
    async fn a_slow_subscriber_loses_the_oldest_and_blocks_nobody() {
        let (send, events) = broadcast::channel(2);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = lost.clone();
        let stream = follow(events, move |n| {
            counter.fetch_add(n, Ordering::Relaxed);
        });
        for n in 0..5 {
            send.send(ContainerEvent { id: n.to_string(), kind: EventKind::Deleted, at: 1, sandbox: None, containers: Vec::new() }).unwrap();
        }
        drop(send);
        let seen: Vec<_> = stream.map(|event| event.unwrap().container_id).collect().await;
        assert_eq!(seen, ["3", "4"]);
        assert_eq!(lost.load(Ordering::Relaxed), 3);
    }
}
