//! Setting an option and looking at what became of it.

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
    Ok((ended?.exit_code, lines.map(|line| format!("{line}\n")).collect()))
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

/// For a configuration that stays as it is.
pub fn same<T>(_: &mut T) {}
