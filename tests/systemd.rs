//! The daemon as a unit of a real systemd, with the systemd cgroup driver: for the virtual machine (`hack/vm.sh --tests`),
//! where systemd is the first process and there is cgroup v2 alone.
//!
//! No namespaces of its own: D-Bus carries process ids of systemd's namespace, and the machine is thrown away.

#[path = "common/harness.rs"]
mod harness;
#[path = "common/node.rs"]
mod node;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use copepod::api;
use copepod::sys::process::command;
use node::{BUSYBOX, Node, PATIENCE, shell};

const UNIT: &str = "copepod-test.service";

fn main() -> ExitCode {
    assert!(Path::new("/run/systemd/system").is_dir(), "these tests need systemd as the machine's first process: hack/vm.sh --tests systemd");
    let mut node = Node::new("systemd");
    let config = node.dir.join("copepod.yaml");
    let parent = format!("/{}/pods", node.dir.file_name().unwrap().to_string_lossy());
    fs::write(&config, fs::read_to_string(&config).unwrap().replace(&parent, "/systemdtest")).unwrap();
    write_unit(&node, "");
    start(&node);
    node.pull(BUSYBOX);
    let code = harness::run(
        &mut node,
        &[
            ("limits_are_the_units_and_the_kernels", limits_are_the_units_and_the_kernels),
            ("a_restart_and_a_kill_keep_every_container", a_restart_and_a_kill_keep_every_container),
            ("daemon_reload_keeps_devices_and_limits", daemon_reload_keeps_devices_and_limits),
            ("slices_stopped_from_outside_are_exits", slices_stopped_from_outside_are_exits),
            ("parents_are_slices", parents_are_slices),
            ("ooms_are_told_apart", ooms_are_told_apart),
            ("a_crash_after_the_scope_was_made_leaves_none", a_crash_after_the_scope_was_made_leaves_none),
            ("a_daemon_that_hangs_is_started_again", a_daemon_that_hangs_is_started_again),
            ("monitors_have_a_scope_and_a_cap", monitors_have_a_scope_and_a_cap),
        ],
        |node| {
            write_unit(node, "");
            systemctl(&["restart", UNIT]);
            wait_ready(node);
            node.remove_all_pods();
        },
    );
    node.remove_all_pods();
    systemctl(&["stop", UNIT]);
    let units = output("systemctl", &["list-units", "--all", "--plain", "--no-legend", "copepod-*.scope", "systemdtest-*.slice"]);
    assert_eq!(units, "", "units are left");
    code
}

/// The unit that the project ships, for the node's daemon.
fn write_unit(node: &Node, environment: &str) {
    let shipped = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/copepod.service")).unwrap();
    let start = format!("ExecStart={} serve --config {}\n{environment}", env!("CARGO_BIN_EXE_copepod"), node.dir.join("copepod.yaml").display());
    let unit = shipped.replace("ExecStart=/usr/local/bin/copepod serve\n", &start).replace("WatchdogSec=60", "WatchdogSec=12");
    assert_ne!(unit, shipped, "the unit has changed: this test must, too");
    let log = format!("[Service]\nStandardError=append:{}\n", node.dir.join("daemon.log").display());
    fs::write(Path::new("/run/systemd/system").join(UNIT), unit.replace("[Service]\n", &log)).unwrap();
    systemctl(&["daemon-reload"]);
}

fn start(node: &Node) {
    systemctl(&["start", UNIT]);
    wait_ready(node);
}

/// The unit is active: the daemon has said that it serves.
fn wait_ready(node: &Node) {
    until("the daemon serves", || node.wait(node.client().version(api::VersionRequest::default())).is_ok(), node);
}

fn until(what: &str, mut done: impl FnMut() -> bool, node: &Node) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}\n{}", node.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn systemctl(args: &[&str]) {
    let out = command("systemctl").args(args).output().unwrap();
    assert!(out.status.success(), "systemctl {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn output(program: &str, args: &[&str]) -> String {
    String::from_utf8(command(program).args(args).output().unwrap().stdout).unwrap().trim().to_string()
}

fn show(unit: &str, property: &str) -> String {
    output("systemctl", &["show", "--value", "--property", property, unit])
}

/// What a container's record says, as JSON.
fn info(node: &Node, id: &str) -> String {
    let request = api::ContainerStatusRequest { container_id: id.into(), verbose: true };
    let info: HashMap<String, String> = node.wait(node.client().container_status(request)).unwrap().into_inner().info;
    info["info"].clone()
}

fn field<'a>(json: &'a str, name: &str) -> &'a str {
    let rest = &json[json.find(&format!("\"{name}\":")).expect(name) + name.len() + 3..];
    rest.trim_start_matches('"').split(['"', ',', '}']).next().unwrap()
}

/// A container's path below /sys/fs/cgroup.
fn cgroup(node: &Node, id: &str) -> String {
    field(&info(node, id), "cgroupsPath").replace("\\\\", "\\")
}

fn value(cgroup: &str, file: &str) -> String {
    fs::read_to_string(format!("/sys/fs/cgroup{cgroup}/{file}")).unwrap_or_else(|error| panic!("{cgroup}/{file}: {error}")).trim().to_string()
}

fn scope(id: &str) -> String {
    format!("copepod-{id}.scope")
}

fn limited(script: &str) -> api::ContainerConfig {
    let resources = api::LinuxContainerResources {
        cpu_shares: 512,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 64 << 20,
        cpuset_cpus: "0".into(),
        unified: HashMap::from([("memory.high".to_string(), "50331648".to_string()), ("memory.oom.group".to_string(), "1".to_string())]),
        ..Default::default()
    };
    api::ContainerConfig { linux: Some(api::LinuxContainerConfig { resources: Some(resources), ..Default::default() }), ..shell("main", script) }
}

/// What the kernel has of `limited`.
const LIMITS: &[(&str, &str)] = &[
    ("cpu.weight", "59"),
    ("cpu.max", "50000 100000"),
    ("memory.max", "67108864"),
    ("memory.high", "50331648"),
    ("memory.swap.max", "0"),
    ("memory.oom.group", "1"),
    ("cpuset.cpus", "0"),
    ("pids.max", "max"),
];

fn run(node: &Node, config: api::ContainerConfig, parent: &str) -> (String, String) {
    let mut pod = node.pod_config();
    pod.linux = Some(api::LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() });
    let sandbox = node.run_pod(&pod).expect("run");
    let container = node.create(&sandbox, &pod, config).expect("create");
    node.start_container(&container).expect("start");
    (sandbox, container)
}

fn check_limits(cgroup: &str, when: &str) {
    for (file, want) in LIMITS {
        assert_eq!(value(cgroup, file), *want, "{file} {when}");
    }
}

fn limits_are_the_units_and_the_kernels(node: &mut Node) {
    let answer = node.wait(node.client().runtime_config(api::RuntimeConfigRequest {})).unwrap().into_inner();
    assert_eq!(answer.linux.unwrap().cgroup_driver(), api::CgroupDriver::Systemd);
    let (pod, id) = run(node, limited("sleep 1000"), "");
    let path = cgroup(node, &id);
    assert_eq!(path, format!("/systemdtest.slice/systemdtest-{pod}.slice/{}", scope(&id)));
    let pid = field(&info(node, &id), "pid").to_string();
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap().trim(), format!("0::{path}"));
    check_limits(&path, "at first");
    // The holder is gone.
    until("init is alone", || value(&path, "cgroup.procs") == pid, node);
    for (property, want) in [
        ("CPUWeight", "59"),
        ("CPUQuotaPerSecUSec", "500ms"),
        ("MemoryMax", "67108864"),
        ("MemoryHigh", "50331648"),
        ("MemorySwapMax", "0"),
        ("TasksMax", "infinity"),
        ("AllowedCPUs", "0"),
        ("Delegate", "yes"),
        ("DevicePolicy", "auto"),
    ] {
        assert_eq!(show(&scope(&id), property), want, "{property}");
    }
    node.remove_pod(&pod);
    assert_eq!(show(&scope(&id), "LoadState"), "not-found");
    assert!(!Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')).parent().unwrap().exists(), "the pod's slice stays");
}

fn a_restart_and_a_kill_keep_every_container(node: &mut Node) {
    let pods: Vec<(String, String)> = (0..3).map(|_| run(node, shell("main", "while :; do sleep 1; done"), "")).collect();
    let pids: Vec<String> = pods.iter().map(|(_, id)| field(&info(node, id), "pid").to_string()).collect();
    let check = |when: &str| {
        for ((_, id), pid) in pods.iter().zip(&pids) {
            assert_eq!(node.status(id).unwrap().state(), api::ContainerState::ContainerRunning, "{when}");
            assert_eq!(field(&info(node, id), "pid"), pid, "{when}");
            assert_eq!(node.exec(id, &["true"], 20).unwrap().exit_code, 0, "{when}");
        }
    };
    systemctl(&["restart", UNIT]);
    wait_ready(node);
    check("after a restart");
    let killed = show(UNIT, "MainPID");
    systemctl(&["kill", "--signal=KILL", "--kill-who=main", UNIT]);
    until("another daemon runs", || ![killed.as_str(), "0"].contains(&show(UNIT, "MainPID").as_str()), node);
    wait_ready(node);
    check("after a kill");
    pods.iter().for_each(|(pod, _)| node.remove_pod(pod));
}

fn daemon_reload_keeps_devices_and_limits(node: &mut Node) {
    let (pod, id) = run(node, limited("sleep 1000"), "");
    let path = cgroup(node, &id);
    assert_eq!(node.exec(&id, &["mknod", "/kmsg", "c", "1", "11"], 20).unwrap().exit_code, 0);
    for when in ["before", "after", "after another"] {
        for (command, allowed) in [("head -c 1 /dev/zero", true), ("echo > /dev/null", true), ("head -c 1 /kmsg", false)] {
            let answer = node.exec(&id, &["sh", "-c", command], 20).unwrap();
            assert_eq!(answer.exit_code == 0, allowed, "{command} {when}: {}", String::from_utf8_lossy(&answer.stderr));
        }
        check_limits(&path, when);
        systemctl(&["daemon-reload"]);
        // systemd writes a unit's limits again when it has to do with it.
        systemctl(&["set-property", "--runtime", &scope(&id), "IOWeight=200"]);
    }
    node.remove_pod(&pod);
}

fn slices_stopped_from_outside_are_exits(node: &mut Node) {
    let slice = "kubepods-besteffort-pod0123_4567.slice";
    let (pod, id) = run(node, shell("main", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"), slice);
    assert_eq!(cgroup(node, &id), format!("/kubepods.slice/kubepods-besteffort.slice/{slice}/{}", scope(&id)));
    until("it is ready", || value(&cgroup(node, &id), "pids.current") != "0" && node.exec(&id, &["true"], 20).is_ok(), node);
    systemctl(&["stop", slice]);
    let status = node.wait_exit(&id);
    assert!([3, 143].contains(&status.exit_code), "{status:?}");
    assert_eq!(status.reason, "Error");
    node.remove_pod(&pod);
    // A pod of the same slice again, as kubelet would.
    let (pod, id) = run(node, shell("main", "exit 7"), slice);
    assert_eq!(node.wait_exit(&id).exit_code, 7);
    node.remove_pod(&pod);
    assert!(Path::new("/sys/fs/cgroup/kubepods.slice").exists(), "kubelet's slices are kubelet's");
    systemctl(&["stop", "kubepods.slice"]);
}

fn parents_are_slices(node: &mut Node) {
    for parent in ["/kubepods/podx", "kubepods--x.slice", "/kubepods-x.slice", "x.scope"] {
        let mut pod = node.pod_config();
        pod.linux = Some(api::LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() });
        let error = node.run_pod(&pod).unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{parent}");
        assert!(error.message().contains("cgroup_parent") && error.message().contains(parent), "{}", error.message());
    }
}

fn ooms_are_told_apart(node: &mut Node) {
    let memory = |bytes| api::LinuxContainerConfig {
        resources: Some(api::LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() }),
        ..Default::default()
    };
    let eater = |name: &str| api::ContainerConfig { linux: Some(memory(24 << 20)), ..shell(name, "exec tail /dev/zero") };
    let mut pod = node.pod_config();
    pod.linux = Some(api::LinuxPodSandboxConfig { cgroup_parent: "kubepods-pod_oom.slice".into(), ..Default::default() });
    let sandbox = node.run_pod(&pod).expect("run");
    // systemd removes a scope when it is empty, which races with whoever reaps init: often enough to lose.
    for n in 0..6 {
        let quiet = node.create(&sandbox, &pod, shell(&format!("quiet-{n}"), "kill -9 $$")).expect("create");
        let eats = node.create(&sandbox, &pod, eater(&format!("eats-{n}"))).expect("create");
        node.start_container(&eats).expect("start");
        node.start_container(&quiet).expect("start");
        let (eaten, killed) = (node.wait_exit(&eats), node.wait_exit(&quiet));
        assert_eq!((eaten.exit_code, eaten.reason.as_str()), (137, "OOMKilled"), "{n}");
        assert_eq!((killed.exit_code, killed.reason.as_str()), (137, "Error"), "{n}");
    }
    node.remove_pod(&sandbox);
    systemctl(&["stop", "kubepods.slice"]);
}

fn a_crash_after_the_scope_was_made_leaves_none(node: &mut Node) {
    let before = output("systemctl", &["list-units", "--all", "--plain", "--no-legend", "copepod-*.scope"]);
    write_unit(node, "Environment=COPEPOD_FAULT=before:CreateContainer\n");
    systemctl(&["restart", UNIT]);
    wait_ready(node);
    let mut pod = node.pod_config();
    pod.linux = Some(api::LinuxPodSandboxConfig::default());
    let sandbox = node.run_pod(&pod).expect("run");
    assert!(node.create(&sandbox, &pod, shell("main", "true")).is_err(), "the daemon was killed");
    write_unit(node, "");
    systemctl(&["restart", UNIT]);
    wait_ready(node);
    until("no scope is left", || output("systemctl", &["list-units", "--all", "--plain", "--no-legend", "copepod-*.scope"]) == before, node);
    node.remove_pod(&sandbox);
}

fn a_daemon_that_hangs_is_started_again(node: &mut Node) {
    let (pod, id) = run(node, shell("main", "sleep 1000"), "");
    let hangs = show(UNIT, "MainPID");
    systemctl(&["kill", "--signal=STOP", "--kill-who=main", UNIT]);
    until("the watchdog has the daemon started again", || ![hangs.as_str(), "0"].contains(&show(UNIT, "MainPID").as_str()), node);
    wait_ready(node);
    assert_eq!(node.status(&id).unwrap().state(), api::ContainerState::ContainerRunning);
    node.remove_pod(&pod);
}

fn monitors_have_a_scope_and_a_cap(node: &mut Node) {
    let (pod, _) = run(node, shell("main", "sleep 1000"), "");
    let monitors = fs::read_to_string(node.dir.join("copepod.yaml")).unwrap();
    assert!(monitors.contains("cgroup: /"), "{monitors}");
    let path = output("find", &["/sys/fs/cgroup/system.slice", "-type", "d", "-name", &pod]);
    assert_eq!(path.lines().count(), 1, "{path}");
    assert!(path.contains("monitors.scope/"), "{path}");
    assert_eq!(fs::read_to_string(format!("{path}/memory.max")).unwrap().trim(), (128u64 << 20).to_string());
    assert_ne!(fs::read_to_string(format!("{path}/cgroup.procs")).unwrap(), "");
    node.remove_pod(&pod);
    assert!(!Path::new(&path).exists(), "the monitor's group stays");
}
