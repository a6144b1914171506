//! The CRI as its clients use it: the real daemon, monitor, registry and CNI plugins, in namespaces of the test's own.

#[path = "common/harness.rs"]
mod harness;
#[path = "common/node.rs"]
mod node;
#[path = "common/root.rs"]
mod root;

use std::collections::HashMap;
use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use copepod::api;
use node::{BUSYBOX, Node, image_spec, shell};
use tonic::Code;

fn main() -> ExitCode {
    if !root::root("tests/cri.rs") {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 11 filtered out\n");
        return ExitCode::SUCCESS;
    }
    harness::enter_sandbox();
    let mut node = Node::new("cri");
    node.start(None);
    node.pull(BUSYBOX);
    let code = harness::run(
        &mut node,
        &[
            ("every_rpc_is_answered", every_rpc_is_answered),
            ("missing_objects_have_the_right_code", missing_objects_have_the_right_code),
            ("bad_requests_leave_nothing", bad_requests_leave_nothing),
            ("lists_filter", lists_filter),
            ("a_pod_has_its_files_and_namespaces", a_pod_has_its_files_and_namespaces),
            ("pods_reach_each_other", pods_reach_each_other),
            ("exec_sync_collects_limits_and_kills", exec_sync_collects_limits_and_kills),
            ("stop_uses_signal_and_grace", stop_uses_signal_and_grace),
            ("a_failed_start_is_reported", a_failed_start_is_reported),
            ("stats_are_complete", stats_are_complete),
            ("events_tell_a_containers_life", events_tell_a_containers_life),
        ],
        |node| node.remove_all_pods(),
    );
    node.remove_all_pods();
    node.kill();
    code
}

fn every_rpc_is_answered(node: &mut Node) {
    // An RPC that is not built names itself; none is unknown to the server.
    macro_rules! answered {
        ($client:ident: $($call:ident($request:ident)),* $(,)?) => {$(
            let answer = node.wait(node.$client().$call(api::$request::default()));
            if let Err(status) = answer.map(drop) {
                let named = stringify!($call).replace('_', "");
                let names_itself = status.message().to_lowercase().contains(&named);
                assert!(status.code() != Code::Unimplemented || names_itself, "{}: {status:?}", stringify!($call));
            }
        )*};
    }
    answered!(client: version(VersionRequest), run_pod_sandbox(RunPodSandboxRequest), stop_pod_sandbox(StopPodSandboxRequest),
        remove_pod_sandbox(RemovePodSandboxRequest), pod_sandbox_status(PodSandboxStatusRequest), list_pod_sandbox(ListPodSandboxRequest),
        stream_pod_sandboxes(StreamPodSandboxesRequest), create_container(CreateContainerRequest), start_container(StartContainerRequest),
        stop_container(StopContainerRequest), remove_container(RemoveContainerRequest), list_containers(ListContainersRequest),
        stream_containers(StreamContainersRequest), container_status(ContainerStatusRequest),
        update_container_resources(UpdateContainerResourcesRequest), reopen_container_log(ReopenContainerLogRequest), exec_sync(ExecSyncRequest),
        exec(ExecRequest), attach(AttachRequest), port_forward(PortForwardRequest), container_stats(ContainerStatsRequest),
        list_container_stats(ListContainerStatsRequest), stream_container_stats(StreamContainerStatsRequest),
        pod_sandbox_stats(PodSandboxStatsRequest), list_pod_sandbox_stats(ListPodSandboxStatsRequest),
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest), update_runtime_config(UpdateRuntimeConfigRequest), status(StatusRequest),
        checkpoint_container(CheckpointContainerRequest), list_metric_descriptors(ListMetricDescriptorsRequest),
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest), stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest),
        runtime_config(RuntimeConfigRequest), update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest));
    answered!(images: list_images(ListImagesRequest), stream_images(StreamImagesRequest), image_status(ImageStatusRequest),
        pull_image(PullImageRequest), remove_image(RemoveImageRequest), image_fs_info(ImageFsInfoRequest));
    let version = node.wait(node.client().version(api::VersionRequest::default())).unwrap().into_inner();
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("copepod", "v1"));
    let config = node.wait(node.client().runtime_config(api::RuntimeConfigRequest::default())).unwrap().into_inner();
    assert_eq!(config.linux.unwrap().cgroup_driver(), api::CgroupDriver::Cgroupfs);
}

fn missing_objects_have_the_right_code(node: &mut Node) {
    let id = "0".repeat(64);
    let gone = |status: tonic::Status| {
        assert_eq!(status.code(), Code::NotFound, "{status:?}");
        assert!(status.message().contains(&id), "{status:?}");
    };
    gone(node.status(&id).unwrap_err());
    gone(node.start_container(&id).unwrap_err());
    gone(node.exec(&id, &["true"], 1).unwrap_err());
    gone(node.wait(node.client().pod_sandbox_status(api::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false })).unwrap_err());
    gone(node.wait(node.client().container_stats(api::ContainerStatsRequest { container_id: id.clone() })).unwrap_err());
    // What is gone is stopped and removed.
    node.wait(node.client().stop_container(api::StopContainerRequest { container_id: id.clone(), timeout: 1 })).unwrap();
    node.wait(node.client().remove_container(api::RemoveContainerRequest { container_id: id.clone() })).unwrap();
    node.remove_pod(&id);
    let missing = api::ImageStatusRequest { image: Some(image_spec("nothing/here:1")), verbose: false };
    assert!(node.wait(node.images().image_status(missing)).unwrap().into_inner().image.is_none());
    node.wait(node.images().remove_image(api::RemoveImageRequest { image: Some(image_spec("nothing/here:1")) })).unwrap();
}

fn bad_requests_leave_nothing(node: &mut Node) {
    let mut config = node.pod_config();
    config.linux = Some(api::LinuxPodSandboxConfig { sysctls: HashMap::from([("kernel.core_pattern".into(), "x".into())]), ..Default::default() });
    let status = node.run_pod(&config).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("kernel.core_pattern"), "{status:?}");
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let status = node.run_pod(&config).unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(status.message().contains(&pod), "{status:?}");
    let refused = |container: api::ContainerConfig, code: Code, words: &[&str]| {
        let status = node.create(&pod, &config, container).unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        words.iter().for_each(|word| assert!(status.message().contains(word), "{status:?} lacks {word}"));
    };
    let with_user = |user: &str| {
        let mut container = shell("c", "true");
        let context = api::LinuxContainerSecurityContext { run_as_username: user.into(), ..Default::default() };
        container.linux.as_mut().unwrap().security_context = Some(context);
        container
    };
    refused(with_user("nobody-at-all"), Code::InvalidArgument, &["nobody-at-all"]);
    refused(api::ContainerConfig { image: Some(image_spec("nothing/here:1")), ..shell("c", "true") }, Code::NotFound, &["nothing/here:1"]);
    refused(api::ContainerConfig { log_path: "../../x".into(), ..shell("c", "true") }, Code::InvalidArgument, &["log_path", "../../x"]);
    let listed = node.wait(node.client().list_containers(api::ListContainersRequest::default())).unwrap().into_inner().containers;
    assert!(listed.is_empty(), "{listed:?}");
    // The name is free: what failed left nothing.
    let container = node.create(&pod, &config, shell("c", "true")).unwrap();
    let status = node.create(&pod, &config, shell("c", "true")).unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    node.start_container(&container).unwrap();
    node.wait_exit(&container);
    let status = node.start_container(&container).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    node.wait(node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() })).unwrap();
    let status = node.create(&pod, &config, shell("d", "true")).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn lists_filter(node: &mut Node) {
    let mut config = node.pod_config();
    config.labels = HashMap::from([("app".into(), "a".into())]);
    config.annotations = HashMap::from([("note".into(), "x".into())]);
    let pod = node.run_pod(&config).unwrap();
    let other = node.pod_config();
    let other_pod = node.run_pod(&other).unwrap();
    let list = |filter: api::PodSandboxFilter| {
        let items = node.wait(node.client().list_pod_sandbox(api::ListPodSandboxRequest { filter: Some(filter) })).unwrap().into_inner().items;
        items.into_iter().map(|pod| pod.id).collect::<Vec<_>>()
    };
    let labels = |value: &str| HashMap::from([("app".to_string(), value.to_string())]);
    assert_eq!(list(api::PodSandboxFilter { label_selector: labels("a"), ..Default::default() }), std::slice::from_ref(&pod));
    assert!(list(api::PodSandboxFilter { label_selector: labels("b"), ..Default::default() }).is_empty());
    assert_eq!(list(api::PodSandboxFilter { id: other_pod.clone(), ..Default::default() }), std::slice::from_ref(&other_pod));
    assert_eq!(list(api::PodSandboxFilter::default()).len(), 2);
    node.wait(node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: other_pod.clone() })).unwrap();
    let state =
        |state: api::PodSandboxState| api::PodSandboxFilter { state: Some(api::PodSandboxStateValue { state: state.into() }), ..Default::default() };
    assert_eq!(list(state(api::PodSandboxState::SandboxReady)), std::slice::from_ref(&pod));
    assert_eq!(list(state(api::PodSandboxState::SandboxNotready)), std::slice::from_ref(&other_pod));
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
    let status = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap();
    assert_eq!(status.annotations, config.annotations);
    assert!(status.network.unwrap().ip.starts_with("10.86."));
    node.remove_pod(&pod);
    node.remove_pod(&other_pod);
    node.assert_nothing_left();
}

fn a_pod_has_its_files_and_namespaces(node: &mut Node) {
    let mut config = node.pod_config();
    config.dns_config =
        Some(api::DnsConfig { servers: vec!["10.1.1.1".into()], searches: vec!["a.example".into()], options: vec!["ndots:3".into()] });
    config.linux = Some(api::LinuxPodSandboxConfig {
        sysctls: HashMap::from([("kernel.shm_rmid_forced".into(), "1".into()), ("net.ipv4.ip_forward".into(), "1".into())]),
        security_context: Some(api::LinuxSandboxSecurityContext {
            namespace_options: Some(api::NamespaceOption { pid: api::NamespaceMode::Pod.into(), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let pod = node.run_pod(&config).unwrap();
    let mut one = shell(
        "one",
        "hostname; cat /etc/resolv.conf; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_forward; echo x > /dev/shm/mark; ip -o addr; while :; do sleep 0.05; done",
    );
    one.linux.as_mut().unwrap().security_context =
        Some(api::LinuxContainerSecurityContext { namespace_options: Some(api::NamespaceOption::default()), ..Default::default() });
    let one_id = node.create(&pod, &config, one).unwrap();
    node.start_container(&one_id).unwrap();
    let log = node.wait_log(&format!("{}/one.log", config.log_directory), "eth0");
    for want in [&config.hostname, "search a.example", "nameserver 10.1.1.1", "options ndots:3", "stdout F 1", "10.86.", "127.0.0.1"] {
        assert!(log.contains(want), "no {want:?} in {log}");
    }
    // Another container of the pod shares /dev/shm and, as asked for, processes; its pid 1 is the pause.
    let mut two = shell("two", "cat /dev/shm/mark; ps; cat /proc/1/comm; echo end; while :; do sleep 0.05; done");
    two.linux.as_mut().unwrap().security_context =
        Some(api::LinuxContainerSecurityContext { namespace_options: Some(api::NamespaceOption::default()), ..Default::default() });
    let two_id = node.create(&pod, &config, two).unwrap();
    node.start_container(&two_id).unwrap();
    let log = node.wait_log(&format!("{}/two.log", config.log_directory), "end");
    for want in ["stdout F x", "hostname; cat", "pause"] {
        assert!(log.contains(want), "no {want:?} in {log}");
    }
    node.remove_pod(&pod);
    // The node's own network: the node's name, no address of its own.
    let mut config = node.pod_config();
    config.linux = Some(api::LinuxPodSandboxConfig {
        security_context: Some(api::LinuxSandboxSecurityContext {
            namespace_options: Some(api::NamespaceOption { network: api::NamespaceMode::Node.into(), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let pod = node.run_pod(&config).unwrap();
    let id = node.create(&pod, &config, shell("host", "ip -o link; hostname; echo end")).unwrap();
    node.start_container(&id).unwrap();
    let log = node.wait_log(&format!("{}/host.log", config.log_directory), "end");
    assert!(log.contains(fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim()), "{log}");
    assert!(!log.contains("eth0@"), "{log}");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn pods_reach_each_other(node: &mut Node) {
    let (server_pod, server) = node.run_script("mkdir -p /www; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www");
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: server_pod.clone(), verbose: false };
    let ip = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap().network.unwrap().ip;
    let (client_pod, client) = node.run_script("while :; do sleep 0.05; done");
    let fetch = |id: &str, url: String| {
        let script = format!("i=0; until wget -q -O - {url}; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done");
        node.exec(id, &["sh", "-c", &script], 30).unwrap()
    };
    assert_eq!(fetch(&client, format!("http://{ip}:8080/")).stdout, b"hello\n");
    assert_eq!(fetch(&server, "http://127.0.0.1:8080/".into()).stdout, b"hello\n");
    node.remove_pod(&client_pod);
    node.remove_pod(&server_pod);
    node.assert_nothing_left();
}

fn exec_sync_collects_limits_and_kills(node: &mut Node) {
    let (pod, id) = node.run_script("while :; do sleep 0.05; done");
    let answer = node.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 4"], 10).unwrap();
    assert_eq!((answer.exit_code, answer.stdout.as_slice(), answer.stderr.as_slice()), (4, &b"out\n"[..], &b"err\n"[..]));
    // More than a message holds: cut, not refused, not kept.
    let answer = node.exec(&id, &["sh", "-c", "dd if=/dev/zero bs=1M count=40 2>/dev/null"], 60).unwrap();
    assert_eq!(answer.stdout.len(), 15 << 20);
    // A child in the background holds the pipe; the command's end is the answer.
    let answer = node.exec(&id, &["sh", "-c", "sleep 1000 & echo now"], 0).unwrap();
    assert_eq!(answer.stdout, b"now\n");
    let status = node.exec(&id, &["sh", "-c", "setsid sleep 1234 & sleep 1235"], 1).unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let left = node.exec(&id, &["sh", "-c", "ps | grep -c 'sleep 123[45]' || true"], 10).unwrap();
    // The grep's own shell has the words too.
    let processes = node.exec(&id, &["ps"], 10).unwrap();
    let text = String::from_utf8_lossy(&processes.stdout).into_owned();
    assert!(!text.contains("sleep 1234") && !text.contains("sleep 1235"), "{text} {left:?}");
    let status = node.exec(&id, &["no-such-program"], 10);
    match status {
        Err(status) => assert!(status.message().contains("no-such-program"), "{status:?}"),
        Ok(answer) => assert_ne!(answer.exit_code, 0),
    }
    node.remove_pod(&pod);
    let status = node.exec(&id, &["true"], 1).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    node.assert_nothing_left();
}

fn stop_uses_signal_and_grace(node: &mut Node) {
    // A signal that comes before the trap is set ends the shell: it says when it is ready.
    let (pod, id) = node.run_ready("trap 'exit 11' TERM; echo ready; while :; do sleep 0.01; done");
    let stop = |id: &str, timeout: i64| {
        node.wait(node.client().stop_container(api::StopContainerRequest { container_id: id.into(), timeout })).unwrap();
        node.status(id).unwrap()
    };
    assert_eq!(stop(&id, 30).exit_code, 11);
    assert_eq!(stop(&id, 0).exit_code, 11);
    node.remove_pod(&pod);
    let (pod, id) = node.run_ready("trap '' TERM; echo ready; while :; do sleep 0.01; done");
    let status = stop(&id, 1);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    node.remove_pod(&pod);
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let quits = api::ContainerConfig {
        stop_signal: api::Signal::Sigusr1.into(),
        ..shell("main", "trap 'exit 12' USR1; echo ready; while :; do sleep 0.01; done")
    };
    let id = node.create(&pod, &config, quits).unwrap();
    node.start_container(&id).unwrap();
    node.wait_log(&format!("{}/main.log", config.log_directory), "ready");
    assert_eq!(stop(&id, 30).exit_code, 12);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn a_failed_start_is_reported(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let id = node.create(&pod, &config, api::ContainerConfig { command: vec!["/no/such/program".into()], ..shell("main", "") }).unwrap();
    let status = node.start_container(&id).unwrap_err();
    assert!(status.message().contains("/no/such/program"), "{status:?}");
    let status = node.status(&id).unwrap();
    assert_eq!((status.state(), status.exit_code, status.reason.as_str()), (api::ContainerState::ContainerExited, 128, "StartError"));
    assert!(status.message.contains("/no/such/program"), "{status:?}");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn stats_are_complete(node: &mut Node) {
    let (pod, id) = node.run_script("dd if=/dev/zero of=/big bs=1M count=3 2>/dev/null; echo ready; while :; do :; done");
    let log = format!("{}/logs/pod-{}/main.log", node.dir.display(), node_number(node, &pod));
    node.wait_log(&log, "ready");
    let stats = |id: &str| {
        let request = api::ContainerStatsRequest { container_id: id.into() };
        node.wait(node.client().container_stats(request)).unwrap().into_inner().stats.unwrap()
    };
    let first = stats(&id);
    assert_eq!(first.attributes.as_ref().unwrap().id, id);
    let mut now = first.clone();
    for _ in 0..200 {
        std::thread::sleep(Duration::from_millis(10));
        now = stats(&id);
        let used = |stats: &api::ContainerStats| stats.cpu.as_ref().unwrap().usage_core_nano_seconds.unwrap().value;
        if used(&now) > used(&first) && now.cpu.as_ref().unwrap().usage_nano_cores.is_some() {
            break;
        }
    }
    let cpu = now.cpu.unwrap();
    assert!(cpu.timestamp > 0 && cpu.usage_core_nano_seconds.unwrap().value > 0 && cpu.usage_nano_cores.unwrap().value > 0);
    assert!(now.memory.unwrap().working_set_bytes.unwrap().value > 0);
    let layer = now.writable_layer.unwrap();
    assert!(layer.used_bytes.unwrap().value >= 3 << 20 && layer.inodes_used.unwrap().value >= 1);
    let info = node.wait(node.images().image_fs_info(api::ImageFsInfoRequest {})).unwrap().into_inner();
    assert_eq!(info.image_filesystems[0].fs_id, layer.fs_id);
    assert_eq!(info.container_filesystems[0].fs_id, layer.fs_id);
    let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() };
    let pod_stats = node.wait(node.client().pod_sandbox_stats(request)).unwrap().into_inner().stats.unwrap().linux.unwrap();
    assert_eq!(pod_stats.network.unwrap().default_interface.unwrap().name, "eth0");
    assert!(pod_stats.process.unwrap().process_count.unwrap().value >= 1);
    assert_eq!(pod_stats.containers.len(), 1);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn node_number(node: &Node, pod: &str) -> String {
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: false };
    let status = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap();
    status.metadata.unwrap().name.trim_start_matches("pod-").to_string()
}

fn events_tell_a_containers_life(node: &mut Node) {
    let mut events = node.wait(node.client().get_container_events(api::GetEventsRequest {})).unwrap().into_inner();
    let (pod, id) = node.run_script("exit 0");
    node.wait_exit(&id);
    node.remove_pod(&pod);
    let mut seen = Vec::new();
    while !seen.iter().any(|(of, kind)| *of == pod && *kind == api::ContainerEventType::ContainerDeletedEvent) {
        let event = node.wait(events.message()).unwrap().unwrap();
        assert!(event.created_at > 0);
        seen.push((event.container_id.clone(), event.container_event_type()));
    }
    use api::ContainerEventType::{ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent};
    for of in [&pod, &id] {
        for kind in [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent, ContainerDeletedEvent] {
            assert_eq!(seen.iter().filter(|event| **event == (of.clone(), kind)).count(), 1, "{kind:?} of {of} in {seen:?}");
        }
    }
    node.assert_nothing_left();
}
