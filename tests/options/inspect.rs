//! What `crictl inspect`, `inspectp` and `info` show beside the CRI's own fields.

use std::collections::HashMap;

use copepod::api;
use serde_json::{Value, json};

use super::harness::Test;
use super::node::{Node, shell};
use super::observe::security;

/// The tests.
pub const TESTS: &[Test<Node>] = &[("inspect_shows_what_runs", shows_what_runs), ("inspect_shows_the_runtime", shows_the_runtime)];

fn parse(info: &HashMap<String, String>, key: &str) -> Value {
    serde_json::from_str(&info[key]).unwrap_or_else(|error| panic!("{key} is no JSON: {error}"))
}

fn shows_what_runs(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let mut container = shell("main", "while :; do sleep 0.1; done");
    security(&mut container, |s| s.run_as_user = Some(api::Int64Value { value: 77 }));
    let id = node.create(&pod, &config, container).unwrap();
    node.start_container(&id).unwrap();

    let request = api::ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = parse(&node.wait(node.client().container_status(request)).unwrap().into_inner().info, "info");
    let at = |pointer: &str| info.pointer(pointer).cloned().unwrap_or_else(|| panic!("no {pointer} in {info}"));
    assert_eq!(at("/sandboxID"), json!(pod));
    assert_eq!(at("/runtimeSpec/process/user/uid"), json!(77));
    assert_eq!(at("/runtimeSpec/process/args/0"), json!("sh"));
    assert_eq!(at("/runtimeSpec/hostname"), json!(config.hostname));
    assert_eq!(at("/runtimeSpec/linux/cgroupsPath"), at("/cgroupPath"));
    // The process named is the container's, in the control group named.
    let pid = at("/pid").as_u64().unwrap();
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command.starts_with("sh\0-c\0while"), "{command:?}");
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(groups.contains(at("/cgroupPath").as_str().unwrap()), "{groups}");
    let upper = at("/snapshot/upper");
    node.exec(&id, &["sh", "-c", "id -u"], 10).unwrap();
    assert!(std::path::Path::new(upper.as_str().unwrap()).is_dir(), "{upper}");

    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
    let info = parse(&node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().info, "info");
    let netns = info["netns"].as_str().unwrap();
    assert!(std::path::Path::new(netns).exists(), "{netns}");
    let address = info.pointer("/cniResult/ips/0/address").unwrap_or_else(|| panic!("no address in {info}"));
    assert!(address.as_str().unwrap().starts_with("10.86."), "{address}");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn shows_the_runtime(node: &mut Node) {
    let info = node.wait(node.client().status(api::StatusRequest { verbose: true })).unwrap().into_inner().info;
    assert_eq!(parse(&info, "config")["root"], json!(node.dir.join("root")));
    assert_eq!(parse(&info, "cni")["status"]["ready"], json!(true));
    assert!(parse(&info, "node")["capabilities"].as_array().is_some_and(|all| !all.is_empty()));
    let brief = node.wait(node.client().status(api::StatusRequest { verbose: false })).unwrap().into_inner().info;
    assert!(brief.is_empty());
}
