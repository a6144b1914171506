//! ContainerStats, PodSandboxStats, their lists, metrics, and all of these as streams.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use copepod::api;
use copepod::cgroup::Hierarchy;
use tonic::Code;

use super::harness::Test;
use super::node::{Node, PATIENCE, shell};
use super::resources::{MIB, run_with, with};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("stats_of_a_container", of_a_container),
    ("stats_of_what_does_not_run", of_what_does_not_run),
    ("stats_of_a_pod", of_a_pod),
    ("stats_lists_filter", lists_filter),
    ("stats_metrics_are_complete", metrics_are_complete),
    ("stats_streams_say_what_lists_say", streams_say_what_lists_say),
];

fn stats(node: &Node, id: &str) -> api::ContainerStats {
    let request = api::ContainerStatsRequest { container_id: id.into() };
    node.wait(node.client().container_stats(request)).unwrap().into_inner().stats.unwrap()
}

fn pod_stats(node: &Node, id: &str) -> api::LinuxPodSandboxStats {
    let request = api::PodSandboxStatsRequest { pod_sandbox_id: id.into() };
    node.wait(node.client().pod_sandbox_stats(request)).unwrap().into_inner().stats.unwrap().linux.unwrap()
}

fn value(of: &Option<api::UInt64Value>) -> u64 {
    of.as_ref().expect("a value").value
}

/// Asks until the answer is what is waited for.
fn until<T>(ask: impl Fn() -> T, fits: impl Fn(&T) -> bool) -> T {
    let began = Instant::now();
    loop {
        let answer = ask();
        if fits(&answer) {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "what is waited for does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn psi(of: Option<&api::PsiStats>, kernel_has_it: bool) {
    assert_eq!(of.is_some(), kernel_has_it);
    for data in of.into_iter().flat_map(|psi| [psi.some.as_ref().unwrap(), psi.full.as_ref().unwrap()]) {
        assert!((0.0..=100.0).contains(&data.avg10) && data.avg300 >= 0.0, "{data:?}");
    }
}

fn of_a_container(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let mut container = shell("main", "echo ready; while :; do :; done");
    with(|r| (r.memory_limit_in_bytes, r.cpu_quota) = (64 * MIB, 20_000))(&mut container);
    let id = node.create(&pod, &config, container).unwrap();
    node.start_container(&id).unwrap();
    let first = stats(node, &id);
    let of = first.attributes.as_ref().unwrap();
    assert_eq!((of.id.as_str(), of.metadata.as_ref().unwrap().name.as_str()), (id.as_str(), "main"));
    let used = |stats: &api::ContainerStats| value(&stats.cpu.as_ref().unwrap().usage_core_nano_seconds);
    // A fifth of a CPU, and what the kernel lets through; the first window has what the start took, too.
    let steady = |cpu: &api::CpuUsage| cpu.usage_nano_cores.as_ref().is_some_and(|load| (1..900_000_000).contains(&load.value));
    let now = until(|| stats(node, &id), |now| used(now) > used(&first) && steady(now.cpu.as_ref().unwrap()));
    let cpu = now.cpu.unwrap();
    assert!(cpu.timestamp > first.cpu.unwrap().timestamp);
    let memory = now.memory.unwrap();
    assert!(value(&memory.usage_bytes) >= value(&memory.working_set_bytes) && value(&memory.working_set_bytes) > 0, "{memory:?}");
    assert_eq!(value(&memory.available_bytes) + value(&memory.working_set_bytes), 64 * MIB as u64);
    assert!(value(&memory.rss_bytes) > 0 && value(&memory.page_faults) > 0 && memory.major_page_faults.is_some());
    let swap = now.swap.unwrap();
    assert_eq!((value(&swap.swap_usage_bytes), swap.timestamp > 0), (0, true));
    let has_psi = std::path::Path::new("/proc/pressure/cpu").exists();
    let hybrid = Hierarchy::detect().unwrap().mounts().iter().any(|(label, _)| *label == "unified" || label.is_empty());
    psi(cpu.psi.as_ref(), has_psi && hybrid);
    psi(memory.psi.as_ref(), has_psi && hybrid);
    psi(now.io.and_then(|io| io.psi).as_ref(), has_psi && hybrid);
    // The writable layer is measured in the background, and not by each call.
    let info = node.wait(node.images().image_fs_info(api::ImageFsInfoRequest {})).unwrap().into_inner();
    let layer = until(|| stats(node, &id).writable_layer, Option::is_some).unwrap();
    assert_eq!(layer.fs_id, info.container_filesystems[0].fs_id);
    assert!(layer.timestamp > 0 && value(&layer.inodes_used) >= 1);
    assert_eq!(stats(node, &id).writable_layer.unwrap(), layer, "a young figure stands");
    assert_eq!(node.exec(&id, &["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=5"], 30).unwrap().exit_code, 0);
    let grown = until(|| stats(node, &id).writable_layer.unwrap(), |now| now.timestamp > layer.timestamp);
    assert!(value(&grown.used_bytes) >= value(&layer.used_bytes) + (5 << 20), "{layer:?} {grown:?}");
    assert_eq!(value(&grown.inodes_used), value(&layer.inodes_used) + 1);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn of_what_does_not_run(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let created = node.create(&pod, &config, shell("created", "sleep 1000")).unwrap();
    let exited = node.create(&pod, &config, shell("exited", "exit 0")).unwrap();
    node.start_container(&exited).unwrap();
    node.wait_exit(&exited);
    for id in [&created, &exited] {
        let stats = stats(node, id);
        assert_eq!(stats.attributes.unwrap().id, *id);
        assert!(stats.cpu.is_none() && stats.memory.is_none() && stats.swap.is_none() && stats.io.is_none());
    }
    assert!(pod_stats(node, &pod).containers.is_empty());
    node.remove_pod(&pod);
    let request = api::ContainerStatsRequest { container_id: exited };
    assert_eq!(node.wait(node.client().container_stats(request)).unwrap_err().code(), Code::NotFound);
    let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod };
    assert_eq!(node.wait(node.client().pod_sandbox_stats(request)).unwrap_err().code(), Code::NotFound);
}

fn of_a_pod(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let empty = pod_stats(node, &pod);
    assert_eq!((empty.network.unwrap().default_interface.unwrap().name.as_str(), empty.containers.len()), ("eth0", 0));
    let id = node.create(&pod, &config, shell("main", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo ready; sleep 1000")).unwrap();
    node.start_container(&id).unwrap();
    node.wait_log(&format!("{}/main.log", config.log_directory), "ready");
    let gateway = "wget -q -T 1 -O /dev/null http://10.86.0.1:1/ ; true";
    node.exec(&id, &["sh", "-c", gateway], 10).unwrap();
    let now = pod_stats(node, &pod);
    let network = now.network.unwrap();
    let eth0 = network.default_interface.unwrap();
    assert!(network.timestamp > 0 && eth0.name == "eth0" && value(&eth0.tx_bytes) > 0 && eth0.rx_errors.is_some(), "{eth0:?}");
    assert!(network.interfaces.iter().all(|interface| interface.name != "lo" && interface.name != "eth0"));
    assert_eq!(now.containers.len(), 1);
    assert!(value(&now.process.unwrap().process_count) >= 1);
    let used = value(&now.cpu.unwrap().usage_core_nano_seconds);
    assert!(used >= value(&now.containers[0].cpu.as_ref().unwrap().usage_core_nano_seconds));
    assert!(value(&now.memory.unwrap().working_set_bytes) > 0);
    // What an ended container used was used by the pod.
    node.wait(node.client().remove_container(api::RemoveContainerRequest { container_id: id })).unwrap();
    let later = pod_stats(node, &pod);
    assert!(later.containers.is_empty() && value(&later.cpu.unwrap().usage_core_nano_seconds) >= used);
    // Two pods beneath one control group: each has its containers' sum.
    let parent = format!("/{}/pods/shared", node.dir.file_name().unwrap().to_string_lossy());
    let shared = [0, 1].map(|_| {
        let mut config = node.pod_config();
        config.linux.get_or_insert_default().cgroup_parent = parent.clone();
        (node.run_pod(&config).unwrap(), config)
    });
    let (busy, config) = &shared[0];
    let id = node.create(busy, config, shell("main", "while :; do :; done")).unwrap();
    node.start_container(&id).unwrap();
    until(|| pod_stats(node, busy).cpu.unwrap(), |cpu| value(&cpu.usage_core_nano_seconds) > 0);
    assert_eq!(value(&pod_stats(node, &shared[1].0).cpu.unwrap().usage_core_nano_seconds), 0);
    node.remove_all_pods();
    for (_, root) in Hierarchy::detect().unwrap().mounts() {
        let _ = std::fs::remove_dir(root.join(parent.trim_start_matches('/')));
    }
    node.assert_nothing_left();
}

fn lists_filter(node: &mut Node) {
    let labels = |text: &str| HashMap::from([("app".to_string(), text.to_string())]);
    let made: Vec<(String, String)> = ["one", "two"]
        .map(|name| {
            let mut config = node.pod_config();
            config.labels = labels(name);
            let pod = node.run_pod(&config).unwrap();
            let mut container = shell("main", "sleep 1000");
            container.labels = labels(name);
            let id = node.create(&pod, &config, container).unwrap();
            node.start_container(&id).unwrap();
            (pod, id)
        })
        .to_vec();
    let containers = |filter: Option<api::ContainerStatsFilter>| -> BTreeSet<String> {
        let listed =
            node.wait(node.client().list_container_stats(api::ListContainerStatsRequest { filter: filter.clone() })).unwrap().into_inner().stats;
        let mut streamed = Vec::new();
        let mut stream = node.wait(node.client().stream_container_stats(api::StreamContainerStatsRequest { filter })).unwrap().into_inner();
        while let Some(message) = node.wait(stream.message()).unwrap() {
            streamed.extend(message.container_stats);
        }
        let ids = |of: Vec<api::ContainerStats>| of.into_iter().map(|stats| stats.attributes.unwrap().id).collect::<BTreeSet<_>>();
        let listed = ids(listed);
        assert_eq!(ids(streamed), listed);
        listed
    };
    let pods = |filter: Option<api::PodSandboxStatsFilter>| -> BTreeSet<String> {
        let listed =
            node.wait(node.client().list_pod_sandbox_stats(api::ListPodSandboxStatsRequest { filter: filter.clone() })).unwrap().into_inner().stats;
        let mut streamed = Vec::new();
        let mut stream = node.wait(node.client().stream_pod_sandbox_stats(api::StreamPodSandboxStatsRequest { filter })).unwrap().into_inner();
        while let Some(message) = node.wait(stream.message()).unwrap() {
            streamed.extend(message.pod_sandbox_stats);
        }
        let ids = |of: Vec<api::PodSandboxStats>| of.into_iter().map(|stats| stats.attributes.unwrap().id).collect::<BTreeSet<_>>();
        let listed = ids(listed);
        assert_eq!(ids(streamed), listed);
        listed
    };
    let set = |ids: &[&String]| ids.iter().map(|id| id.to_string()).collect::<BTreeSet<_>>();
    let ((pod1, id1), (pod2, id2)) = (&made[0], &made[1]);
    assert_eq!(containers(None), set(&[id1, id2]));
    assert_eq!(containers(Some(api::ContainerStatsFilter { id: id1.clone(), ..Default::default() })), set(&[id1]));
    assert_eq!(containers(Some(api::ContainerStatsFilter { pod_sandbox_id: pod2.clone(), ..Default::default() })), set(&[id2]));
    assert_eq!(containers(Some(api::ContainerStatsFilter { label_selector: labels("one"), ..Default::default() })), set(&[id1]));
    assert_eq!(containers(Some(api::ContainerStatsFilter { label_selector: labels("three"), ..Default::default() })), set(&[]));
    assert_eq!(pods(None), set(&[pod1, pod2]));
    assert_eq!(pods(Some(api::PodSandboxStatsFilter { id: pod2.clone(), ..Default::default() })), set(&[pod2]));
    assert_eq!(pods(Some(api::PodSandboxStatsFilter { label_selector: labels("one"), ..Default::default() })), set(&[pod1]));
    node.remove_all_pods();
}

/// What critest checks, and that what this node can count is there too.
fn metrics_are_complete(node: &mut Node) {
    let (pod, id) = run_with(node, |r| {
        (r.cpu_period, r.cpu_quota, r.cpu_shares) = (100_000, 20_000, 1024);
        (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (64 * MIB, 64 * MIB);
    });
    node.exec(&id, &["sh", "-c", "mkdir /made && for i in 1 2 3; do echo hi >/made/$i; done; sync"], 30).unwrap();
    let descriptors = node.wait(node.client().list_metric_descriptors(api::ListMetricDescriptorsRequest {})).unwrap().into_inner().descriptors;
    assert_eq!(descriptors.len(), 56);
    let keys: BTreeMap<&str, &[String]> = descriptors.iter().map(|of| (of.name.as_str(), of.label_keys.as_slice())).collect();
    assert!(descriptors.iter().all(|of| !of.help.is_empty() && !of.label_keys.is_empty()));
    let metrics = node.wait(node.client().list_pod_sandbox_metrics(api::ListPodSandboxMetricsRequest {})).unwrap().into_inner().pod_metrics;
    let of_pod = metrics.iter().find(|of| of.pod_sandbox_id == pod).expect("the pod's metrics");
    assert_eq!(of_pod.container_metrics.iter().map(|of| of.container_id.as_str()).collect::<Vec<_>>(), [id.as_str()]);
    let all: Vec<&api::Metric> = of_pod.metrics.iter().chain(&of_pod.container_metrics[0].metrics).collect();
    for metric in &all {
        assert_eq!(metric.label_values.len(), keys[metric.name.as_str()].len(), "{metric:?}");
        assert!(metric.value.is_some() && metric.timestamp == 0);
    }
    let found: BTreeSet<&str> = all.iter().map(|metric| metric.name.as_str()).collect();
    // Only what a node may not count: block devices behind a virtual disk, pressure, huge pages.
    let may_lack = |name: &str| {
        let block = ["container_blkio", "container_fs_read", "container_fs_write"].iter().any(|start| name.starts_with(start));
        block
            || name.starts_with("container_hugetlb")
            || (name.starts_with("container_pressure") && !std::path::Path::new("/proc/pressure/cpu").exists())
    };
    let missing: Vec<_> = keys.keys().filter(|name| !found.contains(*name) && !may_lack(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let label = |metric: &api::Metric, key: &str| {
        let at = keys[metric.name.as_str()].iter().position(|known| known == key).unwrap_or_else(|| panic!("{key}"));
        metric.label_values[at].clone()
    };
    let one = |name: &str| *all.iter().find(|metric| metric.name == name).unwrap();
    let threads = one("container_threads");
    assert_eq!((label(threads, "container").as_str(), label(threads, "namespace").as_str()), ("main", "test"));
    assert!(label(threads, "id").ends_with(&id) && label(threads, "name") == id && label(threads, "image").contains("busybox"), "{threads:?}");
    assert!(value(&threads.value) >= 1);
    let received = one("container_network_receive_bytes_total");
    assert_eq!((label(received, "container").as_str(), label(received, "interface").as_str()), ("POD", "eth0"));
    assert_eq!(label(one("container_cpu_usage_seconds_total"), "cpu"), "total");
    assert_eq!(label(one("container_ulimits_soft"), "ulimit"), "max_open_files");
    assert_eq!(value(&one("container_spec_memory_limit_bytes").value), 64 * MIB as u64);
    assert_eq!(value(&one("container_spec_cpu_quota").value), 20_000);
    assert!(value(&one("container_file_descriptors").value) >= 3);
    assert!(value(&one("container_fs_usage_bytes").value) > 0 && value(&one("container_fs_limit_bytes").value) > 0);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn streams_say_what_lists_say(node: &mut Node) {
    let made = [0, 1, 2].map(|_| node.run_script("sleep 1000"));
    macro_rules! streamed {
        ($client:ident, $call:ident, $request:expr, $field:ident) => {{
            let mut items = Vec::new();
            let mut stream = node.wait(node.$client().$call($request)).unwrap().into_inner();
            while let Some(message) = node.wait(stream.message()).unwrap() {
                assert!(!message.$field.is_empty());
                items.extend(message.$field);
            }
            items
        }};
    }
    let listed = node.wait(node.client().list_pod_sandbox(api::ListPodSandboxRequest::default())).unwrap().into_inner().items;
    assert_eq!(listed.len(), 3);
    assert_eq!(streamed!(client, stream_pod_sandboxes, api::StreamPodSandboxesRequest::default(), pod_sandboxes), listed);
    let one = Some(api::PodSandboxFilter { id: made[1].0.clone(), ..Default::default() });
    assert_eq!(streamed!(client, stream_pod_sandboxes, api::StreamPodSandboxesRequest { filter: one }, pod_sandboxes).len(), 1);
    let none = Some(api::PodSandboxFilter { id: "nothing".into(), ..Default::default() });
    assert!(streamed!(client, stream_pod_sandboxes, api::StreamPodSandboxesRequest { filter: none }, pod_sandboxes).is_empty());
    let listed = node.wait(node.client().list_containers(api::ListContainersRequest::default())).unwrap().into_inner().containers;
    assert_eq!(streamed!(client, stream_containers, api::StreamContainersRequest::default(), containers), listed);
    let state = Some(api::ContainerStateValue { state: api::ContainerState::ContainerExited.into() });
    let filter = Some(api::ContainerFilter { state, ..Default::default() });
    assert!(streamed!(client, stream_containers, api::StreamContainersRequest { filter }, containers).is_empty());
    let metrics = streamed!(client, stream_pod_sandbox_metrics, api::StreamPodSandboxMetricsRequest {}, pod_sandbox_metrics);
    let pods = |of: &[api::PodSandboxMetrics]| of.iter().map(|of| of.pod_sandbox_id.clone()).collect::<BTreeSet<_>>();
    assert_eq!(pods(&metrics), made.iter().map(|(pod, _)| pod.clone()).collect());
    let listed = node.wait(node.images().list_images(api::ListImagesRequest::default())).unwrap().into_inner().images;
    assert_eq!(streamed!(images, stream_images, api::StreamImagesRequest::default(), images), listed);
    let image = Some(api::ImageSpec { image: super::node::BUSYBOX.into(), ..Default::default() });
    let named = streamed!(images, stream_images, api::StreamImagesRequest { filter: Some(api::ImageFilter { image }) }, images);
    assert_eq!(named.len(), 1);
    node.remove_all_pods();
}
