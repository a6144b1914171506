//! GetContainerEvents.

use copepod::api;
use copepod::api::ContainerEventType as Kind;

use super::harness::Test;
use super::node::Node;

/// The tests.
pub const TESTS: &[Test<Node>] = &[("events_are_complete", are_complete)];

/// Each event has the pod's status and those of its containers as they were: kubelet passes over one without.
fn are_complete(node: &mut Node) {
    let mut events = node.wait(node.client().get_container_events(api::GetEventsRequest {})).unwrap().into_inner();
    let (pod, id) = node.run_script("exit 3");
    node.wait_exit(&id);
    node.remove_pod(&pod);
    let mut last = 0;
    loop {
        let event = node.wait(events.message()).unwrap().unwrap();
        let kind = event.container_event_type();
        assert!(event.created_at >= last, "{event:?}");
        last = event.created_at;
        let status = event.pod_sandbox_status.as_ref().unwrap_or_else(|| panic!("{event:?}"));
        let name = status.metadata.as_ref().unwrap();
        assert!(status.id == pod && name.namespace == "test" && !name.name.is_empty() && !name.uid.is_empty(), "{event:?}");
        let state = event.containers_statuses.iter().find(|status| status.id == id).map(api::ContainerStatus::state);
        match kind {
            _ if event.container_id == pod => assert!(state.is_none() || kind == Kind::ContainerStoppedEvent, "{event:?}"),
            Kind::ContainerCreatedEvent => assert_eq!(state, Some(api::ContainerState::ContainerCreated)),
            Kind::ContainerStartedEvent => assert!(state.is_some_and(|state| state != api::ContainerState::ContainerCreated), "{event:?}"),
            Kind::ContainerStoppedEvent => {
                let status = event.containers_statuses.iter().find(|status| status.id == id).unwrap();
                assert_eq!((status.state(), status.exit_code), (api::ContainerState::ContainerExited, 3));
                assert!(status.finished_at > 0 && status.reason == "Error", "{event:?}");
            }
            Kind::ContainerDeletedEvent => assert_eq!(state, None),
        }
        if event.container_id == pod && kind == Kind::ContainerDeletedEvent {
            assert_eq!(status.state(), api::PodSandboxState::SandboxNotready);
            break;
        }
    }
    let request = api::StatusRequest { verbose: true };
    let info = node.wait(node.client().status(request)).unwrap().into_inner().info;
    let counts: serde_json::Value = serde_json::from_str(&info["counts"]).unwrap();
    assert_eq!(counts["eventsLost"], 0);
}
