//! LinuxContainerResources.

use copepod::api::LinuxContainerResources as Limits;
use copepod::cgroup::{Cgroup, Hierarchy};
use copepod::{api, errchain};
use tonic::Code;

use super::harness::Test;
use super::node::{Node, shell};
use super::observe::{output_of, refused, same};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("resources_cpu", cpu),
    ("resources_memory_and_swap", memory_and_swap),
    ("resources_cpuset", cpuset),
    ("resources_hugepages", hugepages),
    ("resources_unified", unified),
    ("resources_oom_score_adj", oom_score_adj),
];

/// 1 MiB.
pub const MIB: i64 = 1 << 20;

/// A container that has these limits.
pub fn with(change: impl Fn(&mut Limits)) -> impl Fn(&mut api::ContainerConfig) {
    move |config| change(config.linux.get_or_insert_default().resources.get_or_insert_default())
}

/// The control group of a container.
pub fn group_of(node: &Node, container: &str) -> Cgroup {
    let request = api::ContainerStatusRequest { container_id: container.into(), verbose: true };
    let info = node.wait(node.client().container_status(request)).unwrap().into_inner().info;
    let record: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    let path = record["cgroupPath"].as_str().unwrap_or_else(|| panic!("{record}"));
    Cgroup::new(&Hierarchy::detect().unwrap(), path).unwrap_or_else(|error| panic!("{}", errchain::Chain(&error)))
}

/// The text of a file of a control group, on the first hierarchy that has it.
pub fn file_of(group: &Cgroup, file: &str) -> Option<String> {
    group.dirs().iter().find_map(|(_, dir)| std::fs::read_to_string(dir.join(file)).ok()).map(|text| text.trim().to_string())
}

/// A pod with one container that runs, with these limits; gives both.
pub fn run_with(node: &Node, change: impl Fn(&mut Limits)) -> (String, String) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).expect("run");
    let mut container = shell("main", "while :; do sleep 1000; done");
    with(change)(&mut container);
    let id = node.create(&pod, &config, container).expect("create");
    node.start_container(&id).expect("start");
    (pod, id)
}

/// With these limits, the first file that this node's version has holds that: `(v1's file, text, v2's file, text)`.
fn holds(node: &Node, change: impl Fn(&mut Limits), files: &[(&str, &str, &str, &str)]) {
    let v2 = Hierarchy::detect().unwrap().is_v2();
    let (pod, id) = run_with(node, change);
    let group = group_of(node, &id);
    for (v1_file, v1_text, v2_file, v2_text) in files {
        let (file, text) = if v2 { (v2_file, v2_text) } else { (v1_file, v1_text) };
        if !file.is_empty() {
            assert_eq!(file_of(&group, file).as_deref(), Some(*text), "{file}");
        }
    }
    node.remove_pod(&pod);
}

/// The limits are refused, with an error that names the field and the value.
fn bad(node: &Node, change: impl Fn(&mut Limits), words: &[&str]) {
    refused(node, same, with(change), Code::InvalidArgument, words);
}

fn cpu(node: &mut Node) {
    holds(node, |r| r.cpu_shares = 512, &[("cpu.shares", "512", "cpu.weight", "59")]);
    holds(
        node,
        |r| (r.cpu_quota, r.cpu_period) = (20_000, 50_000),
        &[("cpu.cfs_quota_us", "20000", "cpu.max", "20000 50000"), ("cpu.cfs_period_us", "50000", "", "")],
    );
    holds(node, |r| r.cpu_quota = -1, &[("cpu.cfs_quota_us", "-1", "cpu.max", "max 100000")]);
    bad(node, |r| r.cpu_shares = -1, &["config.linux.resources.cpu_shares", "-1"]);
    bad(node, |r| r.cpu_shares = 1, &["cpu_shares", "\"1\"", "2 to 262144"]);
    bad(node, |r| r.cpu_quota = 10, &["cpu_quota", "\"10\""]);
    bad(node, |r| r.cpu_period = 5_000_000, &["cpu_period", "5000000"]);
}

fn memory_and_swap(node: &mut Node) {
    let same_v1 = (64 * MIB).to_string();
    holds(
        node,
        |r| r.memory_limit_in_bytes = 64 * MIB,
        // No swap unless it is asked for.
        &[("memory.limit_in_bytes", &same_v1, "memory.max", &same_v1), ("memory.memsw.limit_in_bytes", &same_v1, "", "")],
    );
    // A kernel without swap accounting says so; one with it sets both.
    let limited = with(|r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (64 * MIB, 96 * MIB));
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let mut container = shell("main", "sleep 1000");
    limited(&mut container);
    match node.create(&pod, &config, container) {
        Ok(id) => {
            let group = group_of(node, &id);
            let found = [file_of(&group, "memory.memsw.limit_in_bytes"), file_of(&group, "memory.swap.max")].into_iter().flatten().next();
            let want = if Hierarchy::detect().unwrap().is_v2() { 32 * MIB } else { 96 * MIB };
            assert_eq!(found, Some(want.to_string()));
        }
        Err(status) => assert!(status.code() == Code::Unimplemented && status.message().contains("swap"), "{status:?}"),
    }
    node.remove_pod(&pod);
    bad(node, |r| r.memory_limit_in_bytes = 4096, &["memory_limit_in_bytes", "4096", "524288"]);
    bad(node, |r| r.memory_limit_in_bytes = -7, &["memory_limit_in_bytes", "-7"]);
    bad(node, |r| r.memory_swap_limit_in_bytes = 64 * MIB, &["memory_swap_limit_in_bytes", "67108864", "no limit of its own"]);
    bad(
        node,
        |r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (64 * MIB, 32 * MIB),
        &["memory_swap_limit_in_bytes", "33554432", "less than"],
    );
}

fn cpuset(node: &mut Node) {
    let allowed = "grep _list /proc/self/status | tr -d '\\t '";
    let output = output_of(node, allowed, same, with(|r| (r.cpuset_cpus, r.cpuset_mems) = ("0".into(), "0".into())));
    assert_eq!(output, "Cpus_allowed_list:0\nMems_allowed_list:0\n");
    bad(node, |r| r.cpuset_cpus = "zero".into(), &["cpuset_cpus", "zero"]);
    bad(node, |r| r.cpuset_cpus = "0,9999".into(), &["cpuset_cpus", "0,9999", "this node lacks"]);
    bad(node, |r| r.cpuset_mems = "0-".into(), &["cpuset_mems", "0-"]);
    bad(node, |r| r.cpuset_mems = "999".into(), &["cpuset_mems", "999"]);
}

fn hugepages(node: &mut Node) {
    let limit = |size: &str, limit| vec![api::HugepageLimit { page_size: size.into(), limit }];
    let (pod, id) = run_with(node, |r| r.hugepage_limits = limit("2MB", 4 << 20));
    let group = group_of(node, &id);
    // A node without the controller takes a limit that it can't set: kubelet sets one for each size.
    let found = ["hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"].iter().find_map(|file| file_of(&group, file));
    let has = std::fs::read_to_string("/proc/cgroups").unwrap().lines().any(|line| line.starts_with("hugetlb"));
    assert_eq!(found, has.then(|| (4i64 << 20).to_string()));
    assert_eq!(node.status(&id).unwrap().resources.unwrap().linux.unwrap().hugepage_limits, limit("2MB", 4 << 20));
    node.remove_pod(&pod);
    bad(node, |r| r.hugepage_limits = limit("2M", 1), &["hugepage_limits.page_size", "2M"]);
    bad(node, |r| r.hugepage_limits = limit("3MB", 1), &["huge page size", "3MB"]);
}

fn unified(node: &mut Node) {
    let set = |key: &'static str, value: &'static str| move |r: &mut Limits| drop(r.unified.insert(key.into(), value.into()));
    if Hierarchy::detect().unwrap().is_v2() {
        holds(node, set("memory.high", "33554432"), &[("", "", "memory.high", "33554432")]);
        bad(node, set("memory.high", "much"), &["memory.high", "much"]);
        bad(node, set("cgroup.procs", "1"), &["cgroup.procs"]);
        bad(node, set("nonsense.max", "1"), &["nonsense.max"]);
    } else {
        bad(node, set("memory.high", "33554432"), &["linux.resources.unified", "memory.high", "cgroup v1"]);
    }
    bad(node, set("../memory.max", "1"), &["config.linux.resources.unified", "../memory.max"]);
    bad(node, set("memory.high", "1\0"), &["unified[memory.high]"]);
}

fn oom_score_adj(node: &mut Node) {
    assert_eq!(output_of(node, "cat /proc/self/oom_score_adj", same, with(|r| r.oom_score_adj = 777)), "777\n");
    bad(node, |r| r.oom_score_adj = 1001, &["oom_score_adj", "1001"]);
    bad(node, |r| r.oom_score_adj = -1001, &["oom_score_adj", "-1001"]);
}
