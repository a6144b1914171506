//! The daemon and monitors killed: nothing is lost, nothing is left. Runs the real programs in namespaces of its own.
//!
//! The points at which the daemon is killed come from the monitor protocol's own list of calls: a new call is tested
//! without anyone remembering it.

#[path = "common/harness.rs"]
mod harness;
#[path = "common/node.rs"]
mod node;
#[path = "common/root.rs"]
mod root;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use copepod::api;
use copepod::monitor_api::Call;
use copepod::service::fault;
use node::{BUSYBOX, Node, PATIENCE, shell};

fn main() -> ExitCode {
    if !root::root("tests/recovery.rs") {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 4 filtered out\n");
        return ExitCode::SUCCESS;
    }
    harness::enter_sandbox();
    let mut node = Node::new("recovery");
    node.start(None);
    node.pull(BUSYBOX);
    let code = harness::run(
        &mut node,
        &[
            ("daemon_killed_at_every_monitor_call", daemon_killed_at_every_monitor_call),
            ("daemon_killed_while_logs_stream", daemon_killed_while_logs_stream),
            ("exits_and_ooms_while_the_daemon_is_down", exits_and_ooms_while_the_daemon_is_down),
            ("monitor_killed", monitor_killed),
        ],
        |node| {
            if !node.ended() {
                node.kill();
            }
            node.start(None);
            node.remove_all_pods();
        },
    );
    if node.daemon.is_some() {
        node.kill();
    }
    code
}

/// What a user can see of a pod's life.
#[derive(Debug, PartialEq)]
struct Seen {
    pod_state: i32,
    states: Vec<(String, i32, i32, String)>,
    log: Vec<String>,
    exec: (i32, Vec<u8>),
}

/// Calls until the daemon answers: one that was killed is started again, and the call repeated as kubelet would.
fn retry<T>(node: &mut Node, call: impl Fn(&Node) -> Result<T, tonic::Status>) -> Result<T, tonic::Status> {
    for _ in 0..5 {
        if node.ended() {
            node.start(None);
        }
        match call(node) {
            // `Unknown` is what the client makes of a connection that broke.
            Err(status) if node.ended() || matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Unknown) => {
                // The connection may break a moment before the process is gone.
                let began = Instant::now();
                while !node.ended() && began.elapsed() < Duration::from_secs(5) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            answer => return answer,
        }
    }
    panic!("the daemon was killed five times at one point");
}

/// The whole life of a pod with a container, as far as a user sees it, whatever happens to the daemon meanwhile.
fn life(node: &mut Node) -> Seen {
    let config = node.pod_config();
    let name = config.metadata.clone().unwrap().name;
    let by_name = move |node: &Node| {
        let pods = node.wait(node.client().list_pod_sandbox(api::ListPodSandboxRequest::default()))?.into_inner().items;
        Ok::<_, tonic::Status>(pods.into_iter().find(|pod| pod.metadata.as_ref().unwrap().name == name).map(|pod| pod.id))
    };
    // A pod whose answer was lost is there, as kubelet's next list shows; one that is not is asked for again.
    let pod = retry(node, |node| match by_name(node)? {
        Some(id) => Ok(id),
        None => node.run_pod(&config),
    })
    .expect("run");
    let container = retry(node, |node| {
        let request = api::ListContainersRequest::default();
        let all = node.wait(node.client().list_containers(request))?.into_inner().containers;
        match all.into_iter().find(|container| container.pod_sandbox_id == pod) {
            Some(container) => Ok(container.id),
            None => node.create(&pod, &config, shell("main", "echo one; trap 'echo two; exit 7' TERM; while :; do sleep 0.01; done")),
        }
    })
    .expect("create");
    retry(node, |node| match node.status(&container)?.state() {
        api::ContainerState::ContainerCreated => node.start_container(&container),
        _ => Ok(()),
    })
    .expect("start");
    let log = format!("{}/main.log", config.log_directory);
    node.wait_log(&log, "one");
    retry(node, |node| node.wait(node.client().reopen_container_log(api::ReopenContainerLogRequest { container_id: container.clone() })).map(drop))
        .expect("reopen");
    let exec = retry(node, |node| node.exec(&container, &["sh", "-c", "echo out; exit 3"], 10)).expect("exec");
    retry(node, |node| node.wait(node.client().stop_container(api::StopContainerRequest { container_id: container.clone(), timeout: 20 })).map(drop))
        .expect("stop");
    let status = retry(node, |node| node.status(&container)).expect("status");
    let listed = retry(node, |node| node.wait(node.client().list_containers(api::ListContainersRequest::default()))).unwrap().into_inner();
    let mut states: Vec<_> = listed
        .containers
        .iter()
        .filter(|container| container.pod_sandbox_id == pod)
        .map(|container| (container.metadata.as_ref().unwrap().name.clone(), container.state, status.exit_code, status.reason.clone()))
        .collect();
    states.sort();
    assert!(status.started_at > 0 && status.finished_at >= status.started_at, "{status:?}");
    let pods = retry(node, |node| node.wait(node.client().list_pod_sandbox(api::ListPodSandboxRequest::default()))).unwrap().into_inner().items;
    let pod_state = pods.iter().find(|listed| listed.id == pod).expect("the pod is listed").state;
    let lines = fs::read_to_string(&log).unwrap().lines().map(|line| line.split_once(' ').unwrap().1.to_string()).collect();
    let request = |id: &str| api::RemoveContainerRequest { container_id: id.into() };
    retry(node, |node| node.wait(node.client().remove_container(request(&container))).map(drop)).expect("remove");
    retry(node, |node| node.wait(node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() })).map(drop))
        .expect("stop");
    retry(node, |node| node.wait(node.client().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() })).map(drop))
        .expect("remove");
    if node.ended() {
        node.start(None);
    }
    node.assert_nothing_left();
    Seen { pod_state, states, log: lines, exec: (exec.exit_code, exec.stdout) }
}

fn daemon_killed_at_every_monitor_call(node: &mut Node) {
    let undisturbed = life(node);
    assert_eq!(undisturbed.states, [("main".to_string(), api::ContainerState::ContainerExited.into(), 7, "Error".to_string())]);
    assert_eq!(undisturbed.log, ["stdout F one", "stdout F two"]);
    assert_eq!(undisturbed.exec, (3, b"out\n".to_vec()));
    for call in Call::NAMES {
        for moment in fault::MOMENTS {
            let point = format!("{moment}:{call}");
            if !node.ended() {
                node.kill();
            }
            node.start(Some(&point));
            if node.daemon.is_none() {
                node.start(None);
            }
            let seen = life(node);
            assert_eq!(seen, undisturbed, "killed at {point}\n{}", node.log_tail());
            println!("  killed at {point}: the same");
        }
    }
    if !node.ended() {
        node.kill();
    }
    node.start(None);
}

fn daemon_killed_while_logs_stream(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo done; exit 5";
    let container = node.create(&pod, &config, shell("main", script)).unwrap();
    node.start_container(&container).unwrap();
    for _ in 0..3 {
        node.kill();
        node.start(None);
    }
    let status = node.wait_exit(&container);
    assert_eq!(status.exit_code, 5);
    let log = node.wait_log(&format!("{}/main.log", config.log_directory), "done");
    let lines: Vec<_> = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap()).collect();
    let expected: Vec<_> = (0..3000).map(|i| format!("line {i}")).chain(["done".to_string()]).collect();
    assert_eq!(lines, expected);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn exits_and_ooms_while_the_daemon_is_down(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    // Each waits for a file that appears only while nobody serves.
    let gate = node.dir.join("gate");
    fs::create_dir(&gate).unwrap();
    let gated = |name: &str, then: &str| {
        let mut container = shell(name, &format!("while [ ! -e /gate/open ]; do sleep 0.01; done; {then}"));
        container.mounts = vec![api::Mount { container_path: "/gate".into(), host_path: gate.to_string_lossy().into_owned(), ..Default::default() }];
        container
    };
    let exits = node.create(&pod, &config, gated("exits", "exit 9")).unwrap();
    let limit = |mut container: api::ContainerConfig| {
        let resources = api::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() };
        container.linux.as_mut().unwrap().resources = Some(resources);
        container
    };
    let ooms = node.create(&pod, &config, limit(gated("ooms", "dd if=/dev/zero of=/dev/null bs=64M"))).unwrap();
    let running = node.create(&pod, &config, shell("runs", "while :; do sleep 0.05; done")).unwrap();
    for id in [&exits, &ooms, &running] {
        node.start_container(id).unwrap();
    }
    let pids = pids_of(node, &[&exits, &ooms]);
    node.kill();
    fs::write(gate.join("open"), "").unwrap();
    let began = Instant::now();
    while pids.iter().any(|pid| fs::metadata(format!("/proc/{pid}")).is_ok()) {
        assert!(began.elapsed() < PATIENCE, "containers do not end without the daemon");
        std::thread::sleep(Duration::from_millis(5));
    }
    node.start(None);
    let status = node.status(&exits).unwrap();
    assert_eq!((status.state(), status.exit_code, status.reason.as_str()), (api::ContainerState::ContainerExited, 9, "Error"));
    let status = node.status(&ooms).unwrap();
    assert_eq!((status.state(), status.exit_code, status.reason.as_str()), (api::ContainerState::ContainerExited, 137, "OOMKilled"));
    assert_eq!(node.status(&running).unwrap().state(), api::ContainerState::ContainerRunning);
    fs::remove_dir_all(&gate).unwrap();
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn monitor_killed(node: &mut Node) {
    let (victim, in_victim) = node.run_script("while :; do sleep 0.05; done");
    let (other, in_other) = node.run_script("while :; do sleep 0.05; done");
    let pid = pids_of(node, &[&in_victim])[0];
    let monitor = parent_of(pid);
    rustix::process::kill_process(rustix::process::Pid::from_raw(monitor as i32).unwrap(), rustix::process::Signal::KILL).unwrap();
    let began = Instant::now();
    loop {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: victim.clone(), verbose: false };
        let status = node.wait(node.client().pod_sandbox_status(request)).unwrap().into_inner().status.unwrap();
        if status.state() == api::PodSandboxState::SandboxNotready {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the sandbox stays ready");
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = node.status(&in_victim).unwrap();
    assert_eq!((status.state(), status.exit_code), (api::ContainerState::ContainerExited, 137));
    assert_eq!(status.reason, "MonitorDied");
    assert!(fs::metadata(format!("/proc/{pid}")).is_err(), "its container still runs");
    assert_eq!(node.status(&in_other).unwrap().state(), api::ContainerState::ContainerRunning);
    assert_eq!(node.exec(&in_other, &["true"], 10).unwrap().exit_code, 0);
    node.remove_pod(&victim);

    // And while the daemon is down.
    let monitor = parent_of(pids_of(node, &[&in_other])[0]);
    node.kill();
    rustix::process::kill_process(rustix::process::Pid::from_raw(monitor as i32).unwrap(), rustix::process::Signal::KILL).unwrap();
    node.start(None);
    let status = node.status(&in_other).unwrap();
    assert_eq!((status.state(), status.exit_code), (api::ContainerState::ContainerExited, 137));
    node.remove_pod(&other);
    node.assert_nothing_left();
}

fn pids_of(node: &Node, ids: &[&String]) -> Vec<u32> {
    let pid = |id: &&String| {
        let request = api::ContainerStatusRequest { container_id: (*id).clone(), verbose: true };
        let info = node.wait(node.client().container_status(request)).unwrap().into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        info["pid"].as_u64().unwrap() as u32
    };
    ids.iter().map(pid).collect()
}

fn parent_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}
