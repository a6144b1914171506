//! NamespaceOption: network, IPC and PID namespaces, and the cgroup namespace that goes with them.

use copepod::api::{self, NamespaceMode};
use tonic::Code;

use super::harness::Test;
use super::node::{Node, shell};
use super::observe::{output_of, refused, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("namespaces_of_the_pod_and_of_the_node", of_the_pod_and_of_the_node),
    ("namespaces_pid_of_pod_container_and_node", pid_of_pod_container_and_node),
    ("namespaces_pid_of_a_target", pid_of_a_target),
    ("namespaces_cgroup", cgroup),
    ("namespaces_wrong_modes", wrong_modes),
];

fn set(options: &mut api::NamespaceOption, network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) {
    (options.network, options.pid, options.ipc) = (network.into(), pid.into(), ipc.into());
}

fn pod_options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> impl Fn(&mut api::PodSandboxConfig) {
    move |pod| {
        let security = pod.linux.get_or_insert_default().security_context.get_or_insert_default();
        set(security.namespace_options.get_or_insert_default(), network, pid_for_pod(pid), ipc);
        if network == NamespaceMode::Node {
            pod.hostname.clear();
        }
    }
}

/// What kubelet gives the pod whose container has its own.
fn pid_for_pod(pid: NamespaceMode) -> NamespaceMode {
    if pid == NamespaceMode::Target { NamespaceMode::Container } else { pid }
}

fn container_options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> impl Fn(&mut api::ContainerConfig) {
    move |config| security(config, |s| set(s.namespace_options.get_or_insert_default(), network, pid, ipc))
}

fn own(kind: &str) -> String {
    std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_str().unwrap().to_string()
}

fn of_the_pod_and_of_the_node(node: &mut Node) {
    use NamespaceMode::{Container, Node as Host, Pod};
    let script = "for kind in net ipc uts; do readlink /proc/self/ns/$kind; done; test -e /dev/shm/copepod-of-the-node && echo shm; hostname; cat /etc/hostname";
    let mark = "/dev/shm/copepod-of-the-node";
    std::fs::write(mark, "").unwrap();
    let pods = output_of(node, script, pod_options(Pod, Container, Pod), container_options(Pod, Container, Pod));
    let hosts = output_of(node, script, pod_options(Host, Container, Host), container_options(Host, Container, Host));
    std::fs::remove_file(mark).unwrap();
    let pods: Vec<&str> = pods.lines().collect();
    assert!(pods.len() == 5 && pods[0] != own("net") && pods[1] != own("ipc") && pods[2] != own("uts"), "{pods:?}");
    assert!(pods[3].starts_with("pod-") && pods[3] == pods[4], "{pods:?}");
    let name = rustix::system::uname().nodename().to_str().unwrap().to_string();
    assert_eq!(hosts, format!("{}\n{}\n{}\nshm\n{name}\n{name}\n", own("net"), own("ipc"), own("uts")));
}

fn pid_of_pod_container_and_node(node: &mut Node) {
    use NamespaceMode::{Container, Node as Host, Pod};
    let script = "readlink /proc/self/ns/pid; cat /proc/1/comm; test $$ = 1 && echo init";
    let run = |pod, own| output_of(node, &format!("{script}; true"), pod_options(Pod, pod, Pod), container_options(Pod, own, Pod));
    let shared = run(Pod, Pod);
    assert!(shared.ends_with("\npause\n") && !shared.starts_with(&own("pid")), "{shared}");
    for (pod, own_mode) in [(Container, Container), (Pod, Container)] {
        let private = run(pod, own_mode);
        assert!(private.ends_with("\nsh\ninit\n") && !private.starts_with(&own("pid")), "{private}");
    }
    let first = std::fs::read_to_string("/proc/1/comm").unwrap();
    assert_eq!(run(Host, Host), format!("{}\n{first}", own("pid")));

    // Two containers of one pod see each other exactly if it is shared, and one that ends takes no other with it.
    for (mode, seen) in [(Pod, "1\n"), (Container, "0\n")] {
        let mut config = node.pod_config();
        pod_options(Pod, mode, Pod)(&mut config);
        let pod = node.run_pod(&config).unwrap();
        let start = |name: &str, script: &str| {
            let mut container = shell(name, script);
            container_options(Pod, mode, Pod)(&mut container);
            let id = node.create(&pod, &config, container).unwrap();
            node.start_container(&id).unwrap();
            id
        };
        let (first, second) = (start("first", "exec sleep 1001"), start("second", "exec sleep 1002"));
        let count = node.exec(&second, &["sh", "-c", "ps -o args | grep -c '^sleep 1001'"], 10).unwrap();
        assert_eq!(String::from_utf8(count.stdout).unwrap(), seen, "{mode:?}");
        let request = api::StopContainerRequest { container_id: first, timeout: 0 };
        node.wait(node.client().stop_container(request)).unwrap();
        assert_eq!(node.status(&second).unwrap().state(), api::ContainerState::ContainerRunning);
        node.remove_pod(&pod);
    }
}

fn pid_of_a_target(node: &mut Node) {
    use NamespaceMode::{Container, Pod, Target};
    let mut config = node.pod_config();
    pod_options(Pod, Container, Pod)(&mut config);
    let pod = node.run_pod(&config).unwrap();
    let create = |name: &str, script: &str, target: &str| {
        let mut container = shell(name, script);
        let mode = if target.is_empty() { Container } else { Target };
        container_options(Pod, mode, Pod)(&mut container);
        security(&mut container, |s| s.namespace_options.as_mut().unwrap().target_id = target.into());
        node.create(&pod, &config, container)
    };
    let target = create("target", "exec sleep 1003", "").unwrap();
    let debug = "readlink /proc/self/ns/pid; tr '\\0' ' ' </proc/1/cmdline; echo; kill -0 1 && echo reached";
    // One that does not run yet is no target.
    let field = "linux.security_context.namespace_options.target_id";
    let wrong = |id: &str, code: Code, words: &[&str]| {
        let status = create("debug", debug, id).expect_err("it is refused");
        assert_eq!(status.code(), code, "{status:?}");
        words.iter().chain([&field, &id]).for_each(|word| assert!(status.message().contains(word), "{status:?} lacks {word}"));
    };
    wrong(&target, Code::FailedPrecondition, &["does not run"]);
    node.start_container(&target).unwrap();
    let id = create("debug", debug, &target).unwrap();
    node.start_container(&id).unwrap();
    assert_eq!(node.wait_exit(&id).exit_code, 0);
    let log = std::fs::read_to_string(format!("{}/debug.log", config.log_directory)).unwrap();
    let pid = std::fs::read_link(format!("/proc/{}/ns/pid", pid_of("sleep\x001003\x00"))).unwrap();
    for text in [pid.to_str().unwrap(), " sleep 1003 ", " reached"] {
        assert!(log.contains(text), "{log} lacks {text:?}");
    }
    // The end of a debug container is not that of its target, but the other way round.
    assert_eq!(node.status(&target).unwrap().state(), api::ContainerState::ContainerRunning);
    let stays = create("stays", "exec sleep 1004", &target).unwrap();
    node.start_container(&stays).unwrap();
    node.wait(node.client().stop_container(api::StopContainerRequest { container_id: target.clone(), timeout: 0 })).unwrap();
    assert_eq!(node.wait_exit(&stays).exit_code, 137);
    wrong(&target, Code::FailedPrecondition, &["does not run"]);
    wrong("nobody", Code::NotFound, &["no container of this pod"]);
    let (other, foreign) = node.run_script("exec sleep 1005");
    wrong(&foreign, Code::NotFound, &["no container of this pod"]);
    node.remove_pod(&other);
    node.remove_pod(&pod);
    let none = |c: &mut api::ContainerConfig| container_options(Pod, Target, Pod)(c);
    refused(node, same, none, Code::InvalidArgument, &["namespace_options.target_id", "missing"]);
}

/// The process with this command line.
fn pid_of(command: &str) -> u32 {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let found = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found = found.filter(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == command.as_bytes()));
    found.next().expect("the process")
}

fn cgroup(node: &mut Node) {
    let v2 = copepod::cgroup::Hierarchy::detect().unwrap().is_v2();
    let script = "readlink /proc/self/ns/cgroup; cat /proc/self/cgroup";
    let output = output_of(node, script, same, same);
    let namespace = output.lines().next().unwrap();
    // On version 1 the container's own directories are bound in place of that.
    assert_eq!(namespace != own("cgroup"), v2, "{output}");
    if v2 {
        assert!(output.ends_with("\n0::/\n"), "{output}");
    }
    let privileged = output_of(
        node,
        script,
        |pod| pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true,
        |config| security(config, |s| s.privileged = true),
    );
    assert_eq!(privileged.lines().next().unwrap(), own("cgroup"));
}

fn wrong_modes(node: &mut Node) {
    use NamespaceMode::{Container, Pod, Target};
    let wrong = |network, pid, ipc, words: &[&str]| {
        let pod = move |config: &mut api::PodSandboxConfig| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            set(security.namespace_options.get_or_insert_default(), network, pid, ipc);
        };
        refused(node, pod, same, Code::InvalidArgument, words);
    };
    wrong(Container, Pod, Pod, &["namespace_options.network", "Container"]);
    wrong(Target, Pod, Pod, &["namespace_options.network", "Target"]);
    wrong(Pod, Pod, Container, &["namespace_options.ipc", "Container"]);
    wrong(Pod, Target, Pod, &["namespace_options.pid", "TARGET"]);
    let unknown = |config: &mut api::PodSandboxConfig| {
        let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options.get_or_insert_default().pid = 9;
    };
    refused(node, unknown, same, Code::InvalidArgument, &["namespace_options.pid", "9", "no namespace mode"]);
}
