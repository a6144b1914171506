//! A Copepod of a test's own: real daemon, real monitor, a real registry and CNI network, in the sandbox's namespaces.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use copepod::api;
use copepod::api::image_service_client::ImageServiceClient;
use copepod::api::runtime_service_client::RuntimeServiceClient;
use copepod::sys::process::command;
use tonic::transport::Channel;

/// An image that the test registry serves.
pub const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// No wait in a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The node.
pub struct Node {
    /// Everything of it.
    pub dir: PathBuf,
    /// The daemon, if it runs.
    pub daemon: Option<Child>,
    runtime: tokio::runtime::Runtime,
    next: std::cell::Cell<u32>,
    registry: String,
}

impl Node {
    /// Makes the node's directories, network and registry; starts no daemon.
    pub fn new(name: &str) -> Node {
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = |name: &str, args: &[&str]| {
            let out = command(project.join("hack").join(name)).args(args).stderr(Stdio::inherit()).output().expect(name);
            assert!(out.status.success(), "hack/{name} {args:?} failed");
            String::from_utf8(out.stdout).unwrap().trim().to_string()
        };
        // Two runs at once have the same number, each in a process namespace of its own.
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap().to_string_lossy().replace(|c: char| !c.is_ascii_digit(), "");
        let dir = PathBuf::from(format!("/var/tmp/copepod-test-{name}-{namespace}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for sub in ["root", "state", "netns", "registries.d", "cni/conf", "cni/cache", "cni/ipam", "logs"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        mount(&["-t", "tmpfs", "-o", "mode=700", "tmpfs"], &dir.join("state"));
        let storage = script("test-images", &["--path"]);
        script("test-images", &[&storage]);
        let registry = script("registry.sh", &["start", dir.join("registry").to_str().unwrap(), "--storage", &storage]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let node = Node { dir, daemon: None, runtime, next: 0.into(), registry };
        node.write_config();
        node
    }

    fn write_config(&self) {
        let dir = self.dir.display();
        let name = self.dir.file_name().unwrap().to_string_lossy();
        let monitor = env!("CARGO_BIN_EXE_copepod-monitor");
        let config = format!(
            "apiVersion: copepod.dev/v1alpha1\nkind: RuntimeConfiguration\nroot: {dir}/root\nstate: {dir}/state\nlisten: {dir}/copepod.sock\n\
             monitor: {{path: {monitor}, cgroup: /{name}/monitors, timeout: 30s}}\ncgroup: {{defaultParent: /{name}/pods}}\n\
             network: {{cniConfDir: {dir}/cni/conf, cniCacheDir: {dir}/cni/cache, netnsDir: {dir}/netns, addTimeout: 30s, delTimeout: 30s}}\n\
             image: {{registriesConf: {dir}/registries.conf, registriesConfDir: {dir}/registries.d}}\nlog: {{level: \"info,copepod=debug\"}}\n"
        );
        fs::write(self.dir.join("copepod.yaml"), config).unwrap();
        let mirrors: String = ["registry.k8s.io", "docker.io"]
            .iter()
            .map(|host| format!("[[registry]]\nlocation = \"{host}\"\n[[registry.mirror]]\nlocation = \"{}\"\ninsecure = true\n", self.registry))
            .collect();
        fs::write(self.dir.join("registries.conf"), mirrors).unwrap();
        let conflist = format!(
            r#"{{"cniVersion": "1.0.0", "name": "test", "plugins": [{{"type": "bridge", "bridge": "cptest0", "isGateway": true,
            "ipam": {{"type": "host-local", "dataDir": "{dir}/cni/ipam", "ranges": [[{{"subnet": "10.86.0.0/16"}}]]}}}},
            {{"type": "portmap", "capabilities": {{"portMappings": true}}}}, {{"type": "bandwidth", "capabilities": {{"bandwidth": true}}}}]}}"#
        );
        fs::write(self.dir.join("cni/conf/10-test.conflist"), conflist).unwrap();
    }

    /// Starts the daemon, to be killed at `fault` if there is one, and waits until it serves.
    pub fn start(&mut self, fault: Option<&str>) {
        assert!(self.daemon.is_none(), "the daemon runs");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("daemon.log")).unwrap();
        let mut daemon = command(env!("CARGO_BIN_EXE_copepod"));
        daemon.arg("serve").arg("--config").arg(self.dir.join("copepod.yaml")).stdout(Stdio::null()).stderr(log);
        if let Some(point) = fault {
            daemon.env("COPEPOD_FAULT", point);
        }
        self.daemon = Some(daemon.spawn().expect("copepod"));
        let began = Instant::now();
        loop {
            if let Ok(status) = self.runtime.block_on(self.client().status(api::StatusRequest::default()))
                && status.get_ref().status.as_ref().unwrap().conditions.iter().all(|condition| condition.status)
            {
                return;
            }
            let daemon = self.daemon.as_mut().unwrap();
            if let Some(status) = daemon.try_wait().unwrap() {
                if fault.is_some() {
                    // It was killed while it took over the node, as asked for.
                    self.daemon = None;
                    return;
                }
                panic!("the daemon ended: {status}\n{}", self.log_tail());
            }
            assert!(began.elapsed() < PATIENCE, "the daemon does not serve\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The end of the daemon's log.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.dir.join("daemon.log")).unwrap_or_default();
        log.lines().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Whether the daemon has ended by itself (a fault point); reaps it.
    pub fn ended(&mut self) -> bool {
        let Some(daemon) = self.daemon.as_mut() else { return true };
        if daemon.try_wait().unwrap().is_some() {
            self.daemon = None;
            return true;
        }
        false
    }

    fn channel(&self) -> Channel {
        let _within = self.runtime.enter();
        copepod::client::lazy(&self.dir.join("copepod.sock"))
    }

    /// A client of the RuntimeService. Without a daemon its calls answer Unavailable.
    pub fn client(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel()).max_decoding_message_size(16 << 20)
    }

    /// A client of the ImageService.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel())
    }

    /// Waits for a future.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("an answer in time") })
    }

    /// Pulls an image and gives back its id.
    pub fn pull(&self, image: &str) -> String {
        let request = api::PullImageRequest { image: Some(image_spec(image)), ..Default::default() };
        self.wait(self.images().pull_image(request)).expect("pull").into_inner().image_ref
    }

    /// A pod's configuration with a name of its own.
    pub fn pod_config(&self) -> api::PodSandboxConfig {
        let n = self.next.get() + 1;
        self.next.set(n);
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata { name: format!("pod-{n}"), uid: format!("uid-{n}"), namespace: "test".into(), attempt: 0 }),
            hostname: format!("pod-{n}"),
            log_directory: self.dir.join(format!("logs/pod-{n}")).to_string_lossy().into_owned(),
            ..Default::default()
        }
    }

    /// Runs a pod.
    pub fn run_pod(&self, config: &api::PodSandboxConfig) -> Result<String, tonic::Status> {
        let request = api::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        self.wait(self.client().run_pod_sandbox(request)).map(|answer| answer.into_inner().pod_sandbox_id)
    }

    /// Creates a container that runs `script` in a shell.
    pub fn create(&self, pod: &str, config: &api::PodSandboxConfig, container: api::ContainerConfig) -> Result<String, tonic::Status> {
        let request = api::CreateContainerRequest { pod_sandbox_id: pod.into(), config: Some(container), sandbox_config: Some(config.clone()) };
        self.wait(self.client().create_container(request)).map(|answer| answer.into_inner().container_id)
    }

    /// Starts a container.
    pub fn start_container(&self, id: &str) -> Result<(), tonic::Status> {
        self.wait(self.client().start_container(api::StartContainerRequest { container_id: id.into() })).map(drop)
    }

    /// A pod with one container that runs `script`.
    pub fn run_script(&self, script: &str) -> (String, String) {
        let config = self.pod_config();
        let pod = self.run_pod(&config).expect("run");
        let container = self.create(&pod, &config, shell("main", script)).expect("create");
        self.start_container(&container).expect("start");
        (pod, container)
    }

    /// Likewise, and waits until the script has said that it is ready.
    pub fn run_ready(&self, script: &str) -> (String, String) {
        let ids = self.run_script(script);
        let log = self.dir.join(format!("logs/pod-{}/main.log", self.next.get()));
        self.wait_log(&log.to_string_lossy(), "ready");
        ids
    }

    /// A container's status.
    pub fn status(&self, id: &str) -> Result<api::ContainerStatus, tonic::Status> {
        let request = api::ContainerStatusRequest { container_id: id.into(), verbose: false };
        self.wait(self.client().container_status(request)).map(|answer| answer.into_inner().status.unwrap())
    }

    /// Waits until a container has exited.
    pub fn wait_exit(&self, id: &str) -> api::ContainerStatus {
        let began = Instant::now();
        loop {
            let status = self.status(id).expect("status");
            if status.state() == api::ContainerState::ContainerExited {
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "container {id} does not exit");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a container's log has `text`.
    pub fn wait_log(&self, path: &str, text: &str) -> String {
        let began = Instant::now();
        loop {
            let log = fs::read_to_string(path).unwrap_or_default();
            if log.contains(text) {
                return log;
            }
            assert!(began.elapsed() < PATIENCE, "{path} has no {text:?}: {log:?}\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a command in a container.
    pub fn exec(&self, id: &str, command: &[&str], timeout: i64) -> Result<api::ExecSyncResponse, tonic::Status> {
        let request = api::ExecSyncRequest { container_id: id.into(), cmd: command.iter().map(|s| s.to_string()).collect(), timeout };
        self.wait(self.client().exec_sync(request)).map(tonic::Response::into_inner)
    }

    /// Stops and removes a pod.
    pub fn remove_pod(&self, id: &str) {
        self.wait(self.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.into() })).expect("stop");
        self.wait(self.client().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id.into() })).expect("remove");
    }

    /// Removes every pod.
    pub fn remove_all_pods(&self) {
        let pods = self.wait(self.client().list_pod_sandbox(api::ListPodSandboxRequest::default())).unwrap().into_inner().items;
        pods.iter().for_each(|pod| self.remove_pod(&pod.id));
    }

    /// What pods left on the host; empty when nothing did. Call it when all pods are removed.
    pub fn left_behind(&self) -> Vec<String> {
        let name = self.dir.file_name().unwrap().to_string_lossy().into_owned();
        let mut left = Vec::new();
        let mut look = |what: &str, dir: &Path| {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let file = entry.file_name().to_string_lossy().into_owned();
                if file != "lock" && !file.starts_with("last_reserved_ip") {
                    left.push(format!("{what}: {}", entry.path().display()));
                }
            }
        };
        look("network namespace", &self.dir.join("netns"));
        look("lease", &self.dir.join("cni/ipam/test"));
        look("CNI result", &self.dir.join("cni/cache/results"));
        look("pod", &self.dir.join("state/pods"));
        look("container", &self.dir.join("state/containers"));
        look("journal", &self.dir.join("state/journal"));
        look("writable layer", &self.dir.join("root/containers"));
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]) {
            for entry in fs::read_dir(hierarchy.join(&name).join("pods")).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    left.push(format!("control group: {}", entry.path().display()));
                }
            }
        }
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let command = fs::read(process.path().join("comm")).unwrap_or_default();
            let state = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            if (command.starts_with(b"copepod-monitor") || command.starts_with(b"copepod-stdio")) && !state.contains(") Z ") {
                left.push(format!("process: {}", process.path().display()));
            }
        }
        let links = command("ip").args(["-o", "link", "show", "type", "veth"]).output().unwrap();
        left.extend(String::from_utf8_lossy(&links.stdout).lines().map(|line| format!("veth: {line}")));
        left
    }

    /// Waits until nothing is left behind: writable layers and monitors go in the background.
    pub fn assert_nothing_left(&self) {
        let began = Instant::now();
        loop {
            let left = self.left_behind();
            if left.is_empty() {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(10), "left behind: {left:#?}\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        let _ = command(project.join("hack/registry.sh")).arg("stop").arg(self.dir.join("registry")).status();
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        let name = self.dir.file_name().unwrap().to_string_lossy().into_owned();
        // What still runs, as after a test that failed, ends here: its groups could not go otherwise, and outlive the sandbox.
        let began = Instant::now();
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        for group in hierarchies.chain(["/sys/fs/cgroup".into()]).map(|hierarchy| hierarchy.join(&name)) {
            while group.exists() && began.elapsed() < Duration::from_secs(10) {
                remove_group(&group);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = command("umount").arg(self.dir.join("state")).status();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Kills what is in a control group and below it, and removes what is empty by then.
fn remove_group(group: &Path) {
    fs::read_dir(group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).for_each(|entry| remove_group(&entry.path()));
    for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines().filter(|pid| *pid != "0") {
        let _ = command("kill").args(["-KILL", pid]).status();
    }
    let _ = fs::remove_dir(group);
}

fn mount(args: &[&str], at: &Path) {
    assert!(command("mount").args(args).arg(at).status().expect("mount").success());
}

/// An image's reference as the API has it.
pub fn image_spec(image: &str) -> api::ImageSpec {
    api::ImageSpec { image: image.into(), ..Default::default() }
}

/// A container of busybox that runs a shell script and logs.
pub fn shell(name: &str, script: &str) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(image_spec(BUSYBOX)),
        command: vec!["sh".into(), "-c".into(), script.into()],
        log_path: format!("{name}.log"),
        linux: Some(api::LinuxContainerConfig::default()),
        ..Default::default()
    }
}
