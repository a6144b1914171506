//! PodSandboxConfig: port mappings and the annotations for bandwidth, through the network plugins that serve them.

use std::collections::HashMap;
use std::io::Read;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use copepod::api;
use copepod::sys::process::command;
use tonic::Code;

use super::harness::Test;
use super::node::{Node, PATIENCE, shell};
use super::observe::{refused, same};

/// The tests.
pub const TESTS: &[Test<Node>] = &[("network_ports_are_forwarded", ports_are_forwarded), ("network_bandwidth_is_limited", bandwidth_is_limited)];

/// The node's address on the pods' bridge.
const GATEWAY: &str = "10.86.0.1";

/// What a server says first, when there is one in time.
fn hear(address: impl ToSocketAddrs) -> Option<String> {
    let began = Instant::now();
    let address = address.to_socket_addrs().unwrap().next().unwrap();
    while began.elapsed() < PATIENCE {
        if let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            let mut text = String::new();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            if stream.read_to_string(&mut text).is_ok() && !text.is_empty() {
                return Some(text);
            }
        }
    }
    None
}

fn ports_are_forwarded(node: &mut Node) {
    let mut config = node.pod_config();
    config.port_mappings = vec![
        api::PortMapping { container_port: 8080, host_port: 18080, ..Default::default() },
        // Named without a port of the node: there is nothing to forward.
        api::PortMapping { container_port: 8081, ..Default::default() },
    ];
    let pod = node.run_pod(&config).unwrap();
    let script = "serve() { while :; do echo $2 | nc -l -p $1; done; }; serve 8080 first & serve 8081 second & wait";
    let container = node.create(&pod, &config, shell("main", script)).unwrap();
    node.start_container(&container).unwrap();
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
    let address = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap().network.unwrap().ip;
    assert_eq!(hear((address.as_str(), 8081)).as_deref(), Some("second\n"));
    assert_eq!(hear((GATEWAY, 18080)).as_deref(), Some("first\n"));
    assert!(TcpStream::connect((GATEWAY, 8081)).is_err(), "a port without a host port is forwarded");
    node.remove_pod(&pod);
    assert!(TcpStream::connect((GATEWAY, 18080)).is_err(), "a port is forwarded to a pod that is gone");
    node.assert_nothing_left();

    let port = |change: fn(&mut api::PortMapping)| {
        move |config: &mut api::PodSandboxConfig| {
            let mut mapping = api::PortMapping { container_port: 80, host_port: 18081, ..Default::default() };
            change(&mut mapping);
            config.port_mappings = vec![mapping];
        }
    };
    refused(node, port(|p| p.container_port = 70000), same, Code::InvalidArgument, &["container_port", "70000"]);
    refused(node, port(|p| p.host_port = -1), same, Code::InvalidArgument, &["host_port", "-1"]);
    refused(node, port(|p| p.host_ip = "here".into()), same, Code::InvalidArgument, &["host_ip", "here"]);
}

fn bandwidth_is_limited(node: &mut Node) {
    let with = |ingress: &str, egress: &str| {
        HashMap::from([
            ("kubernetes.io/ingress-bandwidth".to_string(), ingress.to_string()),
            ("kubernetes.io/egress-bandwidth".to_string(), egress.to_string()),
        ])
    };
    let mut config = node.pod_config();
    config.annotations = with("3M", "2M");
    let pod = node.run_pod(&config).unwrap();
    let shown = command("tc").args(["qdisc", "show"]).output().unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for rate in ["rate 3Mbit", "rate 2Mbit"] {
        assert!(shown.contains(rate), "no {rate}: {shown}");
    }
    node.remove_pod(&pod);
    node.assert_nothing_left();
    let annotated = move |config: &mut api::PodSandboxConfig| config.annotations = with("fast", "1M");
    refused(node, annotated, same, Code::InvalidArgument, &["ingress-bandwidth", "fast"]);
}
