//! Setting an option and looking at what became of it.
#![allow(dead_code)]

use copepod::api;
use tonic::{Code, Status};

use super::node::{Node, shell};

/// What `script` prints on stdout, run as the only container of a pod whose configuration and whose container's are changed.
/// Fails unless it exits with 0.
pub fn output_of(node: &Node, script: &str, pod: impl Fn(&mut api::PodSandboxConfig), container: impl Fn(&mut api::ContainerConfig)) -> String {
    let (code, output) = run(node, script, pod, container).expect("the pod and its container");
    assert_eq!(code, 0, "{script}: {output}");
    output
}

/// Runs `script` to its end and gives its exit code and its output, both streams as they came.
pub fn run(
    node: &Node,
    script: &str,
    pod: impl Fn(&mut api::PodSandboxConfig),
    container: impl Fn(&mut api::ContainerConfig),
) -> Result<(i32, String), Status> {
    run_whole(node, script, pod, container).map(|(status, output)| (status.exit_code, output))
}

/// Likewise, with the container's whole status after its end.
pub fn run_whole(
    node: &Node,
    script: &str,
    pod: impl Fn(&mut api::PodSandboxConfig),
    container: impl Fn(&mut api::ContainerConfig),
) -> Result<(api::ContainerStatus, String), Status> {
    let mut pod_config = node.pod_config();
    pod(&mut pod_config);
    let mut config = shell("main", script);
    container(&mut config);
    let log = format!("{}/{}", pod_config.log_directory, config.log_path);
    let sandbox = node.run_pod(&pod_config)?;
    let ended = node.create(&sandbox, &pod_config, config).and_then(|id| {
        node.start_container(&id)?;
        Ok(node.wait_exit(&id))
    });
    node.remove_pod(&sandbox);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
    Ok((ended?, lines.map(|line| format!("{line}\n")).collect()))
}

/// A pod and its container, running.
pub struct Running<'a> {
    node: &'a Node,
    /// The pod's configuration.
    pub config: api::PodSandboxConfig,
    /// The pod.
    pub sandbox: String,
    /// The container.
    pub container: String,
}

impl<'a> Running<'a> {
    /// Starts a pod whose configuration and whose container's are changed; by default it sleeps.
    pub fn new(node: &'a Node, pod: impl Fn(&mut api::PodSandboxConfig), container: impl Fn(&mut api::ContainerConfig)) -> Self {
        let mut config = node.pod_config();
        pod(&mut config);
        let mut main = shell("main", "sleep 1000");
        container(&mut main);
        let sandbox = node.run_pod(&config).expect("run the pod");
        let container = node.create(&sandbox, &config, main).expect("create the container");
        node.start_container(&container).expect("start the container");
        Self { node, config, sandbox, container }
    }

    /// What a shell script prints in the container; fails unless it exits with 0.
    pub fn exec(&self, script: &str) -> String {
        let done = self.node.exec(&self.container, &["sh", "-c", script], 20).expect("exec");
        assert_eq!(done.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("UTF-8")
    }

    /// The container's init as the host sees it.
    pub fn pid(&self) -> u32 {
        let request = api::ContainerStatusRequest { container_id: self.container.clone(), verbose: true };
        let info = self.node.wait(self.node.client().container_status(request)).expect("status").into_inner().info;
        let all: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
        u32::try_from(all["pid"].as_u64().expect("a pid")).expect("a pid")
    }

    /// The pod's own process, likewise.
    pub fn pid_of_pause(&self) -> u32 {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: self.sandbox.clone(), verbose: true };
        let info = self.node.wait(self.node.client().pod_sandbox_status(request)).expect("status").into_inner().info;
        let all: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
        u32::try_from(all["pid"].as_u64().expect("a pid")).expect("a pid")
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.node.remove_pod(&self.sandbox);
        }
    }
}

/// The pod or its container is refused with this code and an error that has these words, and nothing is left of it.
pub fn refused(node: &Node, pod: impl Fn(&mut api::PodSandboxConfig), container: impl Fn(&mut api::ContainerConfig), code: Code, words: &[&str]) {
    let status = run(node, "true", pod, container).expect_err("it is refused");
    assert_eq!(status.code(), code, "{status:?}");
    for word in words {
        assert!(status.message().contains(word), "{status:?} lacks {word:?}");
    }
    node.assert_nothing_left();
}

/// A container's security context, changed.
pub fn security(container: &mut api::ContainerConfig, change: impl FnOnce(&mut api::LinuxContainerSecurityContext)) {
    change(container.linux.get_or_insert_default().security_context.get_or_insert_default());
}

/// A pod's security context, changed.
pub fn pod_security(pod: &mut api::PodSandboxConfig, change: impl FnOnce(&mut api::LinuxSandboxSecurityContext)) {
    change(pod.linux.get_or_insert_default().security_context.get_or_insert_default());
}

/// For a configuration that stays as it is.
pub fn same<T>(_: &mut T) {}

/// A number as the API has optional ones.
pub fn number(value: i64) -> Option<api::Int64Value> {
    Some(api::Int64Value { value })
}

/// Everything privileged, the pod and its container.
pub fn privileged_pod(pod: &mut api::PodSandboxConfig) {
    pod_security(pod, |s| s.privileged = true);
}
