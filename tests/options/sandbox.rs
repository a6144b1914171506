//! PodSandboxConfig and its parts for Linux: what a pod is called, what it shares, and what its own process is confined to.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::node::{Node, PATIENCE, shell};
use super::observe::{Running, number, output_of, pod_security, privileged_pod, refused, run, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("sandbox_metadata", metadata),
    ("sandbox_hostname", hostname),
    ("sandbox_log_directory", log_directory),
    ("sandbox_dns_config", dns_config),
    ("sandbox_port_mappings", port_mappings),
    ("sandbox_labels_and_annotations", labels_and_annotations),
    ("sandbox_cgroup_parent", cgroup_parent),
    ("sandbox_sysctls", sysctls),
    ("sandbox_user_and_groups", user_and_groups),
    ("sandbox_readonly_rootfs", readonly_rootfs),
    ("sandbox_privileged", privileged),
];

fn status(node: &Node, id: &str) -> api::PodSandboxStatus {
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
    node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap()
}

fn refused_pod(node: &Node, pod: impl Fn(&mut api::PodSandboxConfig), words: &[&str]) {
    refused(node, pod, same, Code::InvalidArgument, words);
}

fn metadata(node: &mut Node) {
    let running = Running::new(node, same, same);
    assert_eq!(status(node, &running.sandbox).metadata, running.config.metadata);
    let taken = node.run_pod(&running.config).unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken:?}");
    assert!(taken.message().contains(&running.config.metadata.as_ref().unwrap().uid), "{taken:?}");
    let mut next = running.config.clone();
    next.metadata.as_mut().unwrap().attempt = 1;
    let second = node.run_pod(&next).unwrap();
    assert_eq!(status(node, &second).metadata.unwrap().attempt, 1);
    node.remove_pod(&second);
    drop(running);
    refused_pod(node, |pod| pod.metadata = None, &["config.metadata"]);
    refused_pod(node, |pod| pod.metadata.as_mut().unwrap().name.clear(), &["config.metadata.name"]);
    refused_pod(node, |pod| pod.metadata.as_mut().unwrap().namespace = "a/b".into(), &["config.metadata.namespace", "a/b"]);
    refused_pod(node, |pod| pod.metadata.as_mut().unwrap().uid = "..".into(), &["config.metadata.uid", ".."]);
}

fn hostname(node: &mut Node) {
    let read = "hostname; cat /etc/hostname; echo $HOSTNAME; grep -c 'web-1$' /etc/hosts";
    assert_eq!(output_of(node, read, |pod| pod.hostname = "web-1".into(), same), "web-1\nweb-1\nweb-1\n1\n");
    refused_pod(node, |pod| pod.hostname = "a b".into(), &["config.hostname", "a b"]);
    refused_pod(node, |pod| pod.hostname = "x".repeat(65), &["config.hostname", "64"]);
    // With the node's network the pod has the node's name, whatever is asked for.
    let host = |pod: &mut api::PodSandboxConfig| {
        pod.hostname = "web-1".into();
        let options = api::NamespaceOption { network: api::NamespaceMode::Node.into(), ..Default::default() };
        pod_security(pod, |s| s.namespace_options = Some(options));
    };
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(output_of(node, "hostname; echo $HOSTNAME", host, same), format!("{own}{own}"));
}

fn log_directory(node: &mut Node) {
    let running = Running::new(node, same, |config| config.command = ["sh", "-c", "echo here; sleep 1000"].map(String::from).to_vec());
    node.wait_log(&format!("{}/main.log", running.config.log_directory), "here");
    drop(running);
    // Without one nothing is logged, and the container runs.
    let mut config = node.pod_config();
    let unused = std::mem::take(&mut config.log_directory);
    let pod = node.run_pod(&config).unwrap();
    let container = node.create(&pod, &config, shell("main", "echo here; exit 3")).unwrap();
    node.start_container(&container).unwrap();
    let ended = node.wait_exit(&container);
    assert_eq!((ended.exit_code, ended.log_path.as_str()), (3, ""));
    assert!(!Path::new(&unused).exists());
    node.remove_pod(&pod);
    refused_pod(node, |pod| pod.log_directory = "var/log".into(), &["config.log_directory", "var/log"]);
    refused_pod(node, |pod| pod.log_directory = "/var/../etc".into(), &["config.log_directory", "/var/../etc"]);
}

fn dns_config(node: &mut Node) {
    let list = |values: &[&str]| values.iter().map(|value| value.to_string()).collect::<Vec<_>>();
    let dns = |servers: &[&str], searches: &[&str], options: &[&str]| {
        let config = api::DnsConfig { servers: list(servers), searches: list(searches), options: list(options) };
        move |pod: &mut api::PodSandboxConfig| pod.dns_config = Some(config.clone())
    };
    let read = "cat /etc/resolv.conf";
    let all = dns(&["10.96.0.10", "2001:db8::1"], &["ns.svc.cluster.local", "local"], &["ndots:5", "edns0"]);
    let text = "search ns.svc.cluster.local local\nnameserver 10.96.0.10\nnameserver 2001:db8::1\noptions ndots:5 edns0\n";
    assert_eq!(output_of(node, read, &all, same), text);
    assert_eq!(output_of(node, read, dns(&[], &["only.search"], &[]), same), "search only.search\n");
    // Nothing asked for: the node's own.
    let own = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(output_of(node, read, dns(&[], &[], &[]), same).trim_end(), own.trim_end());
    refused_pod(node, dns(&["1.1.1.1\nnameserver 6.6.6.6"], &[], &[]), &["config.dns_config.servers", "6.6.6.6"]);
    refused_pod(node, dns(&[], &["a b"], &[]), &["config.dns_config.searches", "a b"]);
    refused_pod(node, dns(&[], &[], &[""]), &["config.dns_config.options"]);
}

/// Starts the daemon anew with a plugin that forwards ports, and again without.
fn port_mappings(node: &mut Node) {
    let conflist = node.dir.join("cni/conf/10-test.conflist");
    let plain = fs::read_to_string(&conflist).unwrap();
    let with_portmap = plain.trim_end().strip_suffix("]}").expect("a list of plugins").to_string()
        + r#", {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;
    let restart = |node: &mut Node, text: &str| {
        node.kill();
        fs::write(&conflist, text).unwrap();
        node.start(None);
    };
    restart(node, &with_portmap);
    let mapping = |container_port, host_port, host_ip: &str, protocol: i32| {
        vec![api::PortMapping { protocol, container_port, host_port, host_ip: host_ip.into() }]
    };
    let running = Running::new(
        node,
        |pod| {
            // One that has no port on the node asks for nothing.
            pod.port_mappings = [mapping(8080, 18080, "", 0), mapping(9999, 0, "", 0)].concat();
        },
        |config| config.command = ["sh", "-c", "while :; do echo forwarded | nc -l -p 8080; done"].map(String::from).to_vec(),
    );
    let began = Instant::now();
    let mut said = String::new();
    // The server may not listen yet.
    while said != "forwarded\n" {
        assert!(began.elapsed() < PATIENCE, "port 18080 of the node leads nowhere");
        said.clear();
        if let Ok(mut stream) = TcpStream::connect_timeout(&"10.86.0.1:18080".parse().unwrap(), Duration::from_secs(5)) {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let _ = stream.read_to_string(&mut said);
        } else {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    drop(running);
    restart(node, &plain);

    let set = |mappings: Vec<api::PortMapping>| move |pod: &mut api::PodSandboxConfig| pod.port_mappings = mappings.clone();
    refused_pod(node, set(mapping(70000, 1, "", 0)), &["port_mappings.container_port", "70000"]);
    refused_pod(node, set(mapping(1, -1, "", 0)), &["port_mappings.host_port", "-1"]);
    refused_pod(node, set(mapping(1, 1, "here", 0)), &["port_mappings.host_ip", "here"]);
    refused_pod(node, set(mapping(1, 1, "", 9)), &["port_mappings.protocol", "9"]);
}

fn labels_and_annotations(node: &mut Node) {
    let map = |prefix: &str| HashMap::from([(format!("{prefix}.example/key"), "value".to_string()), (format!("{prefix}-empty"), String::new())]);
    let set = |pod: &mut api::PodSandboxConfig| {
        pod.labels = map("label");
        pod.annotations = map("annotation");
    };
    let running = Running::new(node, set, same);
    let found = status(node, &running.sandbox);
    assert_eq!((found.labels, found.annotations), (map("label"), map("annotation")));
    let list = |selector: HashMap<String, String>| {
        let filter = Some(api::PodSandboxFilter { label_selector: selector, ..Default::default() });
        node.wait(node.client().list_pod_sandbox(api::ListPodSandboxRequest { filter })).unwrap().into_inner().items
    };
    let found = list(map("label"));
    assert_eq!((found.len(), found[0].annotations.clone()), (1, map("annotation")));
    assert!(list(map("annotation")).is_empty(), "annotations are no labels");
    drop(running);
    let large = || HashMap::from([("key".to_string(), "x".repeat(1 << 20))]);
    refused_pod(node, |pod| pod.labels = large(), &["config.labels", "1 MiB"]);
    refused_pod(node, |pod| pod.annotations = large(), &["config.annotations", "1 MiB"]);
    let bandwidth = || HashMap::from([("kubernetes.io/ingress-bandwidth".to_string(), "lots".to_string())]);
    refused_pod(node, |pod| pod.annotations = bandwidth(), &["config.annotations", "lots"]);
}

fn cgroup_parent(node: &mut Node) {
    let parent = format!("/{}/pods/kubepods/burstable/podx", node.dir.file_name().unwrap().to_string_lossy());
    let set = |parent: &str| {
        let parent = parent.to_string();
        move |pod: &mut api::PodSandboxConfig| pod.linux = Some(api::LinuxPodSandboxConfig { cgroup_parent: parent.clone(), ..Default::default() })
    };
    let running = Running::new(node, set(&parent), same);
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", running.pid())).unwrap();
    let want = format!("{parent}/{}", running.container);
    // Version 1 has a line for each hierarchy; those that are not there for us are left alone.
    assert!(groups.lines().any(|line| line.ends_with(&want)), "{groups} lacks {want}");
    drop(running);
    // It was absent, so that it was ours to make, and to remove; one that is there already stays (tests/cgroup.rs).
    node.assert_nothing_left();
    refused_pod(node, set("/a/../../b"), &["cgroup_parent", "/a/../../b"]);
    refused_pod(node, set("/a\nb"), &["cgroup_parent"]);
}

fn sysctls(node: &mut Node) {
    let set = |pairs: &[(&str, &str)], network: api::NamespaceMode, ipc: api::NamespaceMode| {
        let sysctls: HashMap<String, String> = pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        move |pod: &mut api::PodSandboxConfig| {
            let options = api::NamespaceOption { network: network.into(), ipc: ipc.into(), ..Default::default() };
            pod_security(pod, |s| s.namespace_options = Some(options));
            pod.linux.as_mut().unwrap().sysctls = sysctls.clone();
        }
    };
    use api::NamespaceMode::{Node as Host, Pod};
    let pairs = [
        ("kernel.shm_rmid_forced", "1"),
        ("fs.mqueue.msg_max", "42"),
        ("net/ipv4/ip_local_port_range", "1024 1050"),
        ("kernel.domainname", "example"),
    ];
    let read = "cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max net/ipv4/ip_local_port_range kernel/domainname net/ipv4/ip_unprivileged_port_start";
    assert_eq!(output_of(node, read, set(&pairs, Pod, Pod), same), "1\n42\n1024\t1050\nexample\n0\n");
    let unset = set(&[("net.ipv4.ip_unprivileged_port_start", "1024")], Pod, Pod);
    assert_eq!(output_of(node, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", unset, same), "1024\n", "a pod's own wins over the default");

    let bad = |name: &str, value: &str, words: &[&str]| refused_pod(node, set(&[(name, value)], Pod, Pod), words);
    bad("vm.swappiness", "1", &["linux.sysctls", "vm.swappiness", "not namespaced"]);
    bad("kernel.core_pattern", "|/x", &["kernel.core_pattern", "not namespaced"]);
    bad("net.ipv4.x+kernel.core_pattern=|/x", "1", &["linux.sysctls", "net.ipv4.x+kernel.core_pattern"]);
    bad("net.ipv4/../../kernel.core_pattern", "1", &["linux.sysctls"]);
    bad("net.ipv4.ip_forward", "1\n2", &["net.ipv4.ip_forward", "characters"]);
    refused_pod(node, set(&[("net.ipv4.ip_forward", "1")], Host, Pod), &["net.ipv4.ip_forward", "network", "shares with the node"]);
    refused_pod(node, set(&[("kernel.domainname", "x")], Host, Pod), &["kernel.domainname", "UTS", "shares with the node"]);
    refused_pod(node, set(&[("kernel.sem", "1 2 3 4")], Pod, Host), &["kernel.sem", "IPC", "shares with the node"]);
    // The name is a pod's, and the kernel knows no such thing, or takes no such value.
    let status = run(node, "true", set(&[("net.ipv4.no_such_thing", "1")], Pod, Pod), same).unwrap_err();
    assert!(status.message().contains("net.ipv4.no_such_thing"), "{status:?}");
    let status = run(node, "true", set(&[("kernel.shm_rmid_forced", "many")], Pod, Pod), same).unwrap_err();
    assert!(status.message().contains("kernel.shm_rmid_forced") && status.message().contains("many"), "{status:?}");
    node.assert_nothing_left();
}

/// Who the pod's own process runs as, which is the first of a shared PID namespace. Containers have their own.
fn user_and_groups(node: &mut Node) {
    let read = "sed -n 's/^\\(Uid\\|Gid\\|Groups\\|CapEff\\):[[:space:]]*//p' /proc/1/status | tr '\\t' ' ' | sed 's/ *$//'; id -u";
    let set = |user: Option<i64>, group: Option<i64>, groups: &[i64]| {
        let groups = groups.to_vec();
        move |pod: &mut api::PodSandboxConfig| {
            pod_security(pod, |s| {
                s.run_as_user = user.and_then(number);
                s.run_as_group = group.and_then(number);
                s.supplemental_groups = groups.clone();
                s.supplemental_groups_policy = api::SupplementalGroupsPolicy::Strict.into();
            });
        }
    };
    let none = "0000000000000000";
    assert_eq!(
        output_of(node, read, set(Some(1234), Some(4321), &[7, 4321]), same),
        format!("1234 1234 1234 1234\n4321 4321 4321 4321\n7 4321\n{none}\n0\n")
    );
    assert_eq!(output_of(node, read, set(Some(1234), None, &[]), same), format!("1234 1234 1234 1234\n0 0 0 0\n0\n{none}\n0\n"));
    let root = output_of(node, read, set(None, None, &[]), same);
    assert!(root.starts_with("0 0 0 0\n0 0 0 0\n") && root.ends_with(&format!("{none}\n0\n")), "{root}");
    refused_pod(node, set(Some(-1), None, &[]), &["run_as_user", "-1"]);
    refused_pod(node, set(None, Some(5), &[]), &["run_as_group", "5", "without run_as_user"]);
    refused_pod(node, set(Some(1), Some(u32::MAX.into()), &[]), &["run_as_group", "4294967295"]);
    refused_pod(node, set(Some(1), None, &[1 << 32]), &["supplemental_groups", "4294967296"]);
    refused_pod(node, |pod| pod_security(pod, |s| s.supplemental_groups_policy = 9), &["supplemental_groups_policy", "9"]);
}

/// The root of the pod's own process is read-only whatever is asked for; containers are as they themselves ask.
fn readonly_rootfs(node: &mut Node) {
    for set in [false, true] {
        let running = Running::new(node, |pod| pod_security(pod, |s| s.readonly_rootfs = set), same);
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", running.pid_of_pause())).unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).unwrap();
        assert!(root.starts_with("tmpfs / tmpfs ro,"), "{root}");
        running.exec("touch /written");
    }
}

fn privileged(node: &mut Node) {
    let container = |config: &mut api::ContainerConfig| security(config, |s| s.privileged = true);
    let writable = "awk '$2 == \"/sys\" { print substr($4, 1, 2) }' /proc/mounts";
    assert_eq!(output_of(node, writable, privileged_pod, container), "rw\n");
    // It allows privileged containers and makes none.
    assert_eq!(output_of(node, writable, privileged_pod, same), "ro\n");
    refused(node, same, container, Code::InvalidArgument, &["privileged", "sandbox that is not privileged"]);
}
