//! NamespaceOption.userns_options and the mappings of mounts.

use std::os::unix::fs::MetadataExt;

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::node::{BUSYBOX, Node, shell};
use super::observe::{output_of, refused, run, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("userns_is_offered_because_it_works", is_offered_because_it_works),
    ("userns_ids_files_and_status", ids_files_and_status),
    ("userns_survives_the_daemon", survives_the_daemon),
    ("userns_volumes", volumes),
    ("userns_processes_and_privileges", processes_and_privileges),
    ("userns_on_the_nodes_network", on_the_nodes_network),
    ("userns_wrong_options", wrong_options),
];

const BASE: u32 = 2_000_000;
const LENGTH: u32 = 65536;

fn map(container_id: u32, host_id: u32, length: u32) -> api::IdMapping {
    api::IdMapping { host_id, container_id, length }
}

fn users() -> api::UserNamespace {
    let all = vec![map(0, BASE, LENGTH)];
    api::UserNamespace { mode: api::NamespaceMode::Pod.into(), uids: all.clone(), gids: all }
}

fn options(pod: &mut api::PodSandboxConfig) -> &mut api::NamespaceOption {
    pod.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options.get_or_insert_default()
}

fn pod_users(pod: &mut api::PodSandboxConfig) {
    options(pod).userns_options = Some(users());
}

fn container_users(container: &mut api::ContainerConfig) {
    security(container, |s| s.namespace_options.get_or_insert_default().userns_options = Some(users()));
}

fn is_offered_because_it_works(node: &mut Node) {
    let status = node.wait(node.client().status(api::StatusRequest::default())).unwrap().into_inner();
    let default = status.runtime_handlers.iter().find(|handler| handler.name.is_empty()).expect("the default handler");
    let features = default.features.as_ref().unwrap();
    let works = run(node, "true", pod_users, container_users).is_ok_and(|(code, _)| code == 0);
    assert_eq!((features.user_namespaces, status.features.unwrap().user_namespaces_host_network), (works, works));
    assert!(features.recursive_read_only_mounts);
    assert!(!node.dir.join("root/probe").exists());
}

fn ids_files_and_status(node: &mut Node) {
    let script = "id -u; tr -s ' ' </proc/self/uid_map; stat -c %u:%g / /bin /etc/resolv.conf /etc/hostname /etc/hosts /dev/shm /dev/null; touch /new && stat -c %u /new; \
                  cat /etc/hostname; echo to the log >/dev/stdout; ls /sys/class/net/eth0/address";
    let output = output_of(node, script, pod_users, container_users);
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[..2], ["0", &format!(" 0 {BASE} {LENGTH}")]);
    assert!(lines[2..10].iter().all(|line| *line == "0:0" || *line == "0"), "{output}");
    assert!(lines[10].starts_with("pod-"), "{output}");
    assert_eq!(lines[11..], ["to the log", "/sys/class/net/eth0/address"]);

    let mut config = node.pod_config();
    pod_users(&mut config);
    let pod = node.run_pod(&config).unwrap();
    let mut container = shell("main", "echo ready; exec sleep 1000");
    container_users(&mut container);
    security(&mut container, |s| s.run_as_user = Some(api::Int64Value { value: 1234 }));
    let id = node.create(&pod, &config, container).unwrap();
    node.start_container(&id).unwrap();
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
    let status = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap();
    assert_eq!(status.linux.unwrap().namespaces.unwrap().options.unwrap().userns_options, Some(users()));
    assert_eq!(node.status(&id).unwrap().user.unwrap().linux.unwrap().uid, 1234);
    let writable = std::fs::metadata(node.dir.join(format!("root/containers/{id}/upper"))).unwrap();
    assert_eq!((writable.uid(), writable.gid()), (BASE, BASE));
    let request = api::ContainerStatsRequest { container_id: id.clone() };
    let stats = node.wait(node.client().container_stats(request)).unwrap().into_inner().stats.unwrap();
    assert!(stats.memory.unwrap().usage_bytes.unwrap().value > 0);
    node.remove_pod(&pod);
    node.assert_nothing_left();

    // The node's own, by word or without one.
    for user in [None, Some(api::UserNamespace { mode: api::NamespaceMode::Node.into(), ..Default::default() })] {
        let pod = |pod: &mut api::PodSandboxConfig| options(pod).userns_options = user.clone();
        let same_users = |c: &mut api::ContainerConfig| security(c, |s| s.namespace_options.get_or_insert_default().userns_options = user.clone());
        assert_eq!(output_of(node, "readlink /proc/self/ns/user", pod, same_users), format!("{}\n", own("user")));
    }
}

fn own(kind: &str) -> String {
    std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_str().unwrap().to_string()
}

fn survives_the_daemon(node: &mut Node) {
    let mut config = node.pod_config();
    pod_users(&mut config);
    options(&mut config).pid = api::NamespaceMode::Pod.into();
    let pod = node.run_pod(&config).unwrap();
    let mut container = shell("main", "echo ready; exec sleep 1000");
    container_users(&mut container);
    let id = node.create(&pod, &config, container.clone()).unwrap();
    node.start_container(&id).unwrap();
    node.kill();
    node.start(None);
    let ran = node.exec(&id, &["sh", "-c", "id -u; tr -s ' ' </proc/self/gid_map; echo x >/made; stat -c %u /made; cat /proc/1/comm"], 10).unwrap();
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), format!("0\n 0 {BASE} {LENGTH}\n0\npause\n"), "{:?}", String::from_utf8(ran.stderr));
    // And one more container in the namespaces that the monitor has held.
    container.metadata.as_mut().unwrap().name = "second".into();
    container.log_path = "second.log".into();
    let second = node.create(&pod, &config, container).unwrap();
    node.start_container(&second).unwrap();
    let ran = node.exec(&second, &["readlink", "/proc/self/ns/user"], 10).unwrap();
    assert_eq!(node.exec(&id, &["readlink", "/proc/self/ns/user"], 10).unwrap().stdout, ran.stdout);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn volumes(node: &mut Node) {
    let dir = node.dir.join("userns-volume");
    std::fs::create_dir_all(&dir).unwrap();
    for (name, owner) in [("root", 0), ("web", 1000)] {
        std::fs::write(dir.join(name), name).unwrap();
        std::os::unix::fs::chown(dir.join(name), Some(owner), Some(owner)).unwrap();
    }
    let mount = |mapped: Option<api::IdMapping>| api::Mount {
        container_path: "/volume".into(),
        host_path: dir.to_str().unwrap().into(),
        uid_mappings: mapped.iter().copied().collect(),
        gid_mappings: mapped.iter().copied().collect(),
        ..Default::default()
    };
    let script = "stat -c %u:%g /volume/root /volume/web; touch /volume/new && stat -c %u /volume/new; rm -f /volume/new";
    let with = |mount: api::Mount| {
        move |config: &mut api::ContainerConfig| {
            container_users(config);
            config.mounts = vec![mount.clone()];
        }
    };
    assert_eq!(output_of(node, script, pod_users, with(mount(Some(map(0, BASE, LENGTH))))), "0:0\n1000:1000\n0\n");
    let (_, output) = run(node, script, pod_users, with(mount(None))).unwrap();
    assert!(output.starts_with("65534:65534\n65534:65534\n"), "{output}");
    assert_eq!(std::fs::metadata(dir.join("web")).unwrap().uid(), 1000);
    // An image, whose files belong to its root there too.
    let image = api::Mount {
        container_path: "/image".into(),
        image: Some(api::ImageSpec { image: BUSYBOX.into(), ..Default::default() }),
        readonly: true,
        ..Default::default()
    };
    assert_eq!(output_of(node, "stat -c %u:%g /image/bin/busybox /image", pod_users, with(image)), "0:0\n0:0\n");

    let wrong = |uids: &[api::IdMapping], gids: &[api::IdMapping], words: &[&str]| {
        let mount = api::Mount { uid_mappings: uids.to_vec(), gid_mappings: gids.to_vec(), ..mount(None) };
        refused(node, pod_users, with(mount), Code::InvalidArgument, words);
    };
    let good = [map(0, BASE, LENGTH)];
    wrong(&good, &[], &["config.mounts.gidMappings", "exactly one"]);
    wrong(&[], &good, &["config.mounts.uidMappings", "exactly one"]);
    wrong(&[map(0, BASE, 5), map(5, BASE + 5, 5)], &good, &["config.mounts.uidMappings", &format!("0:{BASE}:5, 5:{}:5", BASE + 5)]);
    wrong(&good, &[map(0, BASE, 0)], &["config.mounts.gidMappings", "length 0"]);
    let both = api::Mount { propagation: api::MountPropagation::PropagationBidirectional.into(), ..mount(None) };
    refused(node, pod_users, with(both), Code::InvalidArgument, &["mounts.propagation", "BIDIRECTIONAL", "/volume"]);
    // A filesystem that knows no mapped mounts.
    let proc = api::Mount { host_path: "/proc/sys".into(), readonly: true, ..mount(Some(map(0, BASE, LENGTH))) };
    refused(node, pod_users, with(proc), Code::FailedPrecondition, &["/proc/sys", "filesystem is proc"]);
}

fn processes_and_privileges(node: &mut Node) {
    let script =
        "grep CapEff /proc/self/status | cut -f2; mount -t tmpfs x /tmp && echo mounted; mknod /tmp/x b 8 0 || echo no device; cat /proc/1/comm";
    let output = output_of(
        node,
        script,
        |pod| {
            pod_users(pod);
            pod.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
        },
        |config| {
            container_users(config);
            security(config, |s| s.privileged = true);
        },
    );
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(u64::from_str_radix(lines[0], 16).unwrap(), copepod::plan::capability::ALL, "{output}");
    assert_eq!(lines[1], "mounted", "{output}");
    assert!(output.contains("no device\n"), "{output}");
    // The limits and the sysctls of the daemon reach the pod.
    let script = "cat /proc/sys/net/ipv4/ping_group_range | tr -s '\\t ' ' '; cat /proc/sys/kernel/shm_rmid_forced";
    let output = output_of(
        node,
        script,
        |pod| {
            pod_users(pod);
            pod.linux.as_mut().unwrap().sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        },
        container_users,
    );
    assert!(output.ends_with("\n1\n"), "{output}");
}

fn on_the_nodes_network(node: &mut Node) {
    let output = output_of(
        node,
        "readlink /proc/self/ns/net; id -u; ls /sys/class/net >/dev/null && echo sysfs",
        |pod| {
            pod_users(pod);
            options(pod).network = api::NamespaceMode::Node.into();
        },
        |config| {
            container_users(config);
            security(config, |s| s.namespace_options.as_mut().unwrap().network = api::NamespaceMode::Node.into());
        },
    );
    assert_eq!(output, format!("{}\n0\nsysfs\n", own("net")));
}

fn wrong_options(node: &mut Node) {
    let wrong = |user: api::UserNamespace, words: &[&str]| {
        let pod = |pod: &mut api::PodSandboxConfig| options(pod).userns_options = Some(user.clone());
        refused(node, pod, same, Code::InvalidArgument, words);
    };
    let with = |uids: &[api::IdMapping]| api::UserNamespace { uids: uids.to_vec(), gids: uids.to_vec(), ..users() };
    let field = "config.linux.security_context.namespace_options.userns_options";
    wrong(with(&[]), &[field, "uids", "exactly one"]);
    wrong(with(&[map(0, 1000, 10), map(10, 2000, 10)]), &[field, "0:1000:10, 10:2000:10"]);
    wrong(with(&[map(1, 1000, 10)]), &[field, "1:1000:10", "root"]);
    wrong(with(&[map(0, 1000, 0)]), &[field, "length 0"]);
    wrong(api::UserNamespace { gids: vec![map(0, 5, 10)], ..users() }, &[field, "gids", "0:5:10"]);
    wrong(api::UserNamespace { mode: api::NamespaceMode::Container.into(), ..users() }, &[field, "mode", "CONTAINER"]);
    wrong(api::UserNamespace { mode: api::NamespaceMode::Target.into(), ..users() }, &[field, "mode", "TARGET"]);
    for part in ["pid", "ipc"] {
        let pod = |pod: &mut api::PodSandboxConfig| {
            pod_users(pod);
            let node = api::NamespaceMode::Node.into();
            if part == "pid" { options(pod).pid = node } else { options(pod).ipc = node }
        };
        refused(node, pod, same, Code::InvalidArgument, &[part, "NODE", "user namespace"]);
    }
    // A container that says otherwise than its pod.
    refused(node, pod_users, same, Code::InvalidArgument, &["userns_options", "another user namespace than the pod's"]);
    refused(node, same, container_users, Code::InvalidArgument, &["userns_options", "another user namespace than the pod's"]);
    let user = |value| {
        move |config: &mut api::ContainerConfig| {
            container_users(config);
            security(config, |s| s.run_as_user = Some(api::Int64Value { value }));
        }
    };
    refused(node, pod_users, user(i64::from(LENGTH)), Code::InvalidArgument, &["run_as_user", "65536", "mapping"]);
}
