//! UpdateContainerResources and UpdatePodSandboxResources.

use std::time::Duration;

use copepod::api;
use copepod::api::LinuxContainerResources as Limits;
use copepod::cgroup::{Cgroup, Hierarchy};
use tonic::{Code, Status};

use super::harness::Test;
use super::node::{Node, shell};
use super::resources::{MIB, file_of, group_of, run_with};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("update_changes_what_it_names", changes_what_it_names),
    ("update_before_the_start", before_the_start),
    ("update_is_refused_whole", is_refused_whole),
    ("update_below_usage_is_refused", below_usage_is_refused),
    ("update_needs_a_living_container", needs_a_living_container),
    ("update_survives_the_daemons_death", survives_the_daemons_death),
    ("update_of_a_pod_is_kept", of_a_pod_is_kept),
];

fn update(node: &Node, id: &str, limits: Limits) -> Result<(), Status> {
    let request = api::UpdateContainerResourcesRequest { container_id: id.into(), linux: Some(limits), ..Default::default() };
    node.wait(node.client().update_container_resources(request)).map(drop)
}

fn reported(node: &Node, id: &str) -> Limits {
    node.status(id).unwrap().resources.unwrap().linux.unwrap()
}

/// Memory's limit, in bytes.
fn memory(group: &Cgroup) -> String {
    ["memory.limit_in_bytes", "memory.max"].iter().find_map(|file| file_of(group, file)).unwrap()
}

/// The quota and the period.
fn quota(group: &Cgroup) -> String {
    let v1 = || Some(format!("{} {}", file_of(group, "cpu.cfs_quota_us")?, file_of(group, "cpu.cfs_period_us")?));
    file_of(group, "cpu.max").or_else(v1).unwrap()
}

fn shares(group: &Cgroup) -> String {
    file_of(group, "cpu.shares").or_else(|| file_of(group, "cpu.weight")).unwrap()
}

fn changes_what_it_names(node: &mut Node) {
    let (pod, id) = run_with(node, |r| {
        (r.cpu_quota, r.cpu_period, r.cpu_shares) = (50_000, 100_000, 1024);
        (r.memory_limit_in_bytes, r.oom_score_adj) = (64 * MIB, 500);
    });
    let group = group_of(node, &id);
    update(node, &id, Limits { cpu_quota: 20_000, ..Limits::default() }).unwrap();
    assert_eq!(quota(&group), "20000 100000");
    let now = reported(node, &id);
    assert_eq!((now.cpu_quota, now.cpu_period, now.cpu_shares, now.memory_limit_in_bytes), (20_000, 100_000, 1024, 64 * MIB));
    // Up and down; without a swap limit of its own there is none.
    for limit in [256, 32, 128] {
        update(node, &id, Limits { memory_limit_in_bytes: limit * MIB, ..Limits::default() }).unwrap();
        assert_eq!(memory(&group), (limit * MIB).to_string());
        if let Some(together) = file_of(&group, "memory.memsw.limit_in_bytes") {
            assert_eq!(together, (limit * MIB).to_string());
        }
        assert_eq!(reported(node, &id).memory_limit_in_bytes, limit * MIB);
    }
    update(node, &id, Limits { memory_limit_in_bytes: -1, cpu_quota: -1, ..Limits::default() }).unwrap();
    assert!(["max", "9223372036854771712"].contains(&memory(&group).as_str()), "{}", memory(&group));
    assert!(["max 100000", "-1 100000"].contains(&quota(&group).as_str()), "{}", quota(&group));
    // Processes that live, and those that are executed later.
    update(node, &id, Limits { oom_score_adj: 900, cpuset_cpus: "0".into(), ..Limits::default() }).unwrap();
    for pid in group.procs(true).unwrap() {
        assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap(), "900\n");
    }
    let out = node.exec(&id, &["cat", "/proc/self/oom_score_adj"], 10).unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "900\n");
    assert_eq!(file_of(&group, "cpuset.cpus").as_deref(), Some("0"));
    let now = reported(node, &id);
    assert_eq!((now.oom_score_adj, now.cpuset_cpus.as_str(), now.memory_limit_in_bytes, now.cpu_quota), (900, "0", -1, -1));
    // Nothing to do.
    let nothing = api::UpdateContainerResourcesRequest { container_id: id.clone(), ..Default::default() };
    node.wait(node.client().update_container_resources(nothing)).unwrap();
    assert_eq!(reported(node, &id), now);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn before_the_start(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let id = node.create(&pod, &config, shell("main", "exit 0")).unwrap();
    update(node, &id, Limits { cpu_shares: 512, ..Limits::default() }).unwrap();
    assert!(["512", "59"].contains(&shares(&group_of(node, &id)).as_str()));
    node.start_container(&id).unwrap();
    assert_eq!(node.wait_exit(&id).exit_code, 0);
    node.remove_pod(&pod);
}

/// What one limit of an update is refused for is refused for all, whether we or the kernel refuse it.
fn is_refused_whole(node: &mut Node) {
    let (pod, id) = run_with(node, |r| (r.cpu_shares, r.memory_limit_in_bytes) = (1024, 64 * MIB));
    let group = group_of(node, &id);
    let before = (shares(&group), quota(&group), memory(&group), reported(node, &id));
    let refused = |limits: Limits, words: &[&str]| {
        let status = update(node, &id, Limits { cpu_shares: 2, ..limits }).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        for word in words {
            assert!(status.message().contains(word), "{status:?} lacks {word:?}");
        }
        assert_eq!((shares(&group), quota(&group), memory(&group), reported(node, &id)), before);
    };
    refused(Limits { cpu_quota: 5, ..Limits::default() }, &["linux.cpu_quota", "5"]);
    refused(Limits { memory_swap_limit_in_bytes: 32 * MIB, ..Limits::default() }, &["memory_swap_limit_in_bytes", "33554432"]);
    refused(Limits { cpuset_cpus: "0,9999".into(), ..Limits::default() }, &["cpuset_cpus", "0,9999"]);
    refused(Limits { oom_score_adj: 1001, ..Limits::default() }, &["linux.oom_score_adj", "1001"]);
    let unified = [("memory.high".to_string(), "x".to_string())].into();
    refused(Limits { unified, memory_limit_in_bytes: 128 * MIB, cpu_quota: 10_000, ..Limits::default() }, &["memory.high"]);
    let pages = vec![api::HugepageLimit { page_size: "3MB".into(), limit: 1 }];
    refused(Limits { hugepage_limits: pages, ..Limits::default() }, &["3MB"]);
    let windows = api::UpdateContainerResourcesRequest { container_id: id.clone(), windows: Some(Default::default()), ..Default::default() };
    let status = node.wait(node.client().update_container_resources(windows)).unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("windows"), "{status:?}");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn below_usage_is_refused(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    // 24 MiB in a shell's variable.
    let script = "x=$(dd if=/dev/zero bs=1M count=24 2>/dev/null | tr '\\0' x); echo ready; while :; do sleep 1000; done";
    let mut container = shell("main", script);
    super::resources::with(|r| (r.cpu_shares, r.memory_limit_in_bytes) = (1024, 256 * MIB))(&mut container);
    let id = node.create(&pod, &config, container).unwrap();
    node.start_container(&id).unwrap();
    node.wait_log(&format!("{}/main.log", config.log_directory), "ready");
    let group = group_of(node, &id);
    let before = (shares(&group), memory(&group));
    let limits = Limits { cpu_shares: 2, memory_limit_in_bytes: 8 * MIB, ..Limits::default() };
    let status = update(node, &id, limits).unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("8388608") && status.message().contains("in use"), "{status:?}");
    assert_eq!((shares(&group), memory(&group)), before);
    assert_eq!(reported(node, &id).memory_limit_in_bytes, 256 * MIB);
    assert_eq!(node.status(&id).unwrap().state(), api::ContainerState::ContainerRunning);
    update(node, &id, Limits { memory_limit_in_bytes: 128 * MIB, ..Limits::default() }).unwrap();
    assert_eq!(memory(&group), (128 * MIB).to_string());
    node.remove_pod(&pod);
}

fn needs_a_living_container(node: &mut Node) {
    let limits = Limits { cpu_shares: 512, ..Limits::default() };
    assert_eq!(update(node, &"f".repeat(64), limits.clone()).unwrap_err().code(), Code::NotFound);
    let (pod, id) = node.run_script("exit 0");
    node.wait_exit(&id);
    let status = update(node, &id, limits).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("Exited"), "{status:?}");
    node.remove_pod(&pod);
}

/// Killed when the update is on record, and when it is applied: it is done when the daemon serves again.
fn survives_the_daemons_death(node: &mut Node) {
    let (pod, id) = run_with(node, |r| (r.memory_limit_in_bytes, r.cpu_shares) = (64 * MIB, 1024));
    for (moment, limit) in [("recorded", 128), ("applied", 96)] {
        node.kill();
        node.start(Some(&format!("{moment}:UpdateContainerResources")));
        update(node, &id, Limits { memory_limit_in_bytes: limit * MIB, ..Limits::default() }).unwrap_err();
        for _ in 0..1000 {
            if node.ended() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        node.start(None);
        assert_eq!(memory(&group_of(node, &id)), (limit * MIB).to_string(), "{moment}");
        assert_eq!(reported(node, &id).memory_limit_in_bytes, limit * MIB, "{moment}");
    }
    update(node, &id, Limits { cpu_shares: 512, ..Limits::default() }).unwrap();
    node.kill();
    node.start(None);
    let now = reported(node, &id);
    assert_eq!((now.cpu_shares, now.memory_limit_in_bytes), (512, 96 * MIB));
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn of_a_pod_is_kept(node: &mut Node) {
    let mut config = node.pod_config();
    let linux = config.linux.get_or_insert_default();
    linux.overhead = Some(Limits { memory_limit_in_bytes: 32 * MIB, cpu_shares: 10, ..Limits::default() });
    let pod = node.run_pod(&config).unwrap();
    let update = |overhead: Option<Limits>, resources: Option<Limits>| {
        let request = api::UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.clone(), overhead, resources };
        node.wait(node.client().update_pod_sandbox_resources(request)).map(drop)
    };
    update(Some(Limits { cpu_shares: 20, ..Limits::default() }), Some(Limits { memory_limit_in_bytes: 256 * MIB, ..Limits::default() })).unwrap();
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
    let info = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().info;
    let record: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    let number = |part: &str, name: &str| record["config"][part][name].as_i64();
    assert_eq!((number("overhead", "cpu_shares"), number("overhead", "memory_limit")), (Some(20), Some(32 * MIB)), "{record}");
    assert_eq!(number("resources", "memory_limit"), Some(256 * MIB), "{record}");
    // The pod's control group is not ours to limit.
    let group = Cgroup::new(&Hierarchy::detect().unwrap(), record["cgroupPath"].as_str().unwrap()).unwrap();
    let limit = ["memory.limit_in_bytes", "memory.max"].iter().find_map(|file| file_of(&group, file));
    assert!(limit.as_deref().is_none_or(|limit| ["max", "9223372036854771712"].contains(&limit)), "{limit:?}");
    let status = update(Some(Limits { cpu_shares: 1, ..Limits::default() }), None).unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("overhead.cpu_shares"), "{status:?}");
    node.wait(node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() })).unwrap();
    assert_eq!(update(None, None).unwrap_err().code(), Code::FailedPrecondition);
    node.remove_pod(&pod);
    assert_eq!(update(None, None).unwrap_err().code(), Code::NotFound);
}
