//! ContainerConfig: what runs, where and with what.

use std::collections::HashMap;
use std::fs;

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::node::{BUSYBOX, Node, image_spec, shell};
use super::observe::{Running, output_of, refused, run, same};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("process_metadata", metadata),
    ("process_image", image),
    ("process_command_arguments_directory_environment", command_arguments_directory_environment),
    ("process_labels_and_annotations", labels_and_annotations),
    ("process_log_path", log_path),
    ("process_stdin", stdin),
    ("process_tty", tty),
    ("process_stop_signal", stop_signal),
    ("process_other_systems_parts", other_systems_parts),
];

fn metadata(node: &mut Node) {
    let name = |name: &'static str, attempt| {
        move |config: &mut api::ContainerConfig| config.metadata = Some(api::ContainerMetadata { name: name.into(), attempt })
    };
    let running = Running::new(node, same, name("web", 7));
    let status = node.status(&running.container).unwrap();
    assert_eq!(status.metadata, Some(api::ContainerMetadata { name: "web".into(), attempt: 7 }));
    // One of the name is there; another attempt is another name.
    let again = |attempt| {
        let mut config = shell("web", "true");
        name("web", attempt)(&mut config);
        node.create(&running.sandbox, &running.config, config)
    };
    let taken = again(7).unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken:?}");
    assert!(taken.message().contains("web/7"), "{taken:?}");
    again(8).unwrap();
    drop(running);
    refused(node, same, |config| config.metadata = None, Code::InvalidArgument, &["config.metadata"]);
    refused(node, same, name("", 0), Code::InvalidArgument, &["config.metadata.name"]);
    refused(node, same, name("../up", 0), Code::InvalidArgument, &["config.metadata.name", "../up"]);
}

fn image(node: &mut Node) {
    let image = |image: &'static str, as_written: &'static str| {
        move |config: &mut api::ContainerConfig| {
            config.image = Some(api::ImageSpec { image: image.into(), user_specified_image: as_written.into(), ..Default::default() });
        }
    };
    let running = Running::new(node, same, image(BUSYBOX, "busybox"));
    let status = node.status(&running.container).unwrap();
    let spec = status.image.unwrap();
    assert_eq!((spec.image.as_str(), spec.user_specified_image.as_str()), (BUSYBOX, "busybox"));
    drop(running);
    refused(node, same, |config| config.image = None, Code::InvalidArgument, &["config.image"]);
    refused(node, same, image("", ""), Code::InvalidArgument, &["config.image.image"]);
    refused(node, same, image("registry.k8s.io/no-such-image:1", ""), Code::NotFound, &["no-such-image"]);
    refused(node, same, image("not a reference", ""), Code::InvalidArgument, &["not a reference"]);
}

fn command_arguments_directory_environment(node: &mut Node) {
    let output = output_of(node, "", same, |config| {
        config.command = vec!["sh".into(), "-c".into(), "pwd; echo \"$A|$0|$1\"".into()];
        config.args = vec!["zero".into(), "one".into()];
        config.working_dir = "/made/here".into();
        config.envs = vec![api::KeyValue { key: "A".into(), value: b"x y".to_vec() }];
    });
    assert_eq!(output, "/made/here\nx y|zero|one\n");
    refused(node, same, |config| config.working_dir = "relative".into(), Code::InvalidArgument, &["working_dir", "relative"]);
    refused(
        node,
        same,
        |config| config.envs = vec![api::KeyValue { key: "A=B".into(), value: Vec::new() }],
        Code::InvalidArgument,
        &["config.envs.key", "A=B"],
    );
    let nul = || vec!["a\0b".to_string()];
    refused(node, same, |config| config.command = nul(), Code::InvalidArgument, &["config.command", "NUL"]);
    refused(node, same, |config| config.args = nul(), Code::InvalidArgument, &["config.args", "NUL"]);
}

fn labels_and_annotations(node: &mut Node) {
    let map = |prefix: &str| HashMap::from([(format!("{prefix}.example/key"), "value".to_string()), (format!("{prefix}-empty"), String::new())]);
    let running = Running::new(node, same, |config| {
        config.labels = map("label");
        config.annotations = map("annotation");
    });
    let status = node.status(&running.container).unwrap();
    assert_eq!((status.labels, status.annotations), (map("label"), map("annotation")));
    let list = |selector: HashMap<String, String>| {
        let filter = Some(api::ContainerFilter { label_selector: selector, ..Default::default() });
        node.wait(node.client().list_containers(api::ListContainersRequest { filter })).unwrap().into_inner().containers
    };
    let found = list(map("label"));
    assert_eq!((found.len(), found[0].annotations.clone()), (1, map("annotation")));
    assert!(list(map("annotation")).is_empty(), "annotations are no labels");
    drop(running);
    let large = || HashMap::from([("key".to_string(), "x".repeat(1 << 20))]);
    refused(node, same, |config| config.labels = large(), Code::InvalidArgument, &["config.labels", "1 MiB"]);
    refused(node, same, |config| config.annotations = large(), Code::InvalidArgument, &["config.annotations", "1 MiB"]);
}

fn log_path(node: &mut Node) {
    let running = Running::new(node, same, |config| {
        config.command = ["sh", "-c", "echo here; sleep 1000"].map(String::from).to_vec();
        config.log_path = "below/this/0.log".into();
    });
    let path = format!("{}/below/this/0.log", running.config.log_directory);
    assert!(node.wait_log(&path, "here").contains(" stdout F here"));
    assert_eq!(node.status(&running.container).unwrap().log_path, path);
    let directory = running.config.log_directory.clone();
    drop(running);
    // Without one there is no log, and the container runs all the same.
    let (code, _) = run(node, "echo nothing; exit 7", same, |config| config.log_path = String::new()).unwrap();
    assert_eq!(code, 7);
    assert!(fs::read_dir(&directory).unwrap().count() == 1);
    refused(node, same, |config| config.log_path = "../up.log".into(), Code::InvalidArgument, &["config.log_path", "../up.log"]);
    refused(node, same, |config| config.log_path = "/abs.log".into(), Code::InvalidArgument, &["config.log_path", "/abs.log"]);
}

fn stdin(node: &mut Node) {
    let target = "readlink /proc/self/fd/0 | sed 's/:.*//'";
    assert_eq!(output_of(node, target, same, same), "/dev/null\n");
    // A pipe that waits for a client, whether it is to close after the first one or not; nothing is read and nothing ends.
    for once in [false, true] {
        let running = Running::new(node, same, |config| {
            config.stdin = true;
            config.stdin_once = once;
            config.command = ["sh", "-c", "read line; sleep 1000"].map(String::from).to_vec();
        });
        assert_eq!(running.exec("readlink /proc/$(pgrep -f 'read line' | head -n 1)/fd/0 | sed 's/:.*//'"), "pipe\n");
        assert_eq!(node.status(&running.container).unwrap().state(), api::ContainerState::ContainerRunning);
    }
    // Without stdin there is nothing that could be closed.
    assert_eq!(output_of(node, target, same, |config| config.stdin_once = true), "/dev/null\n");
}

fn tty(node: &mut Node) {
    let output = output_of(node, "test -t 0 && test -t 1 && test -t 2 && tty && echo $TERM && ls -l /dev/console | cut -c1", same, |config| {
        config.tty = true;
    });
    assert_eq!(output.replace('\r', ""), "/dev/pts/0\nxterm\nc\n");
    assert_eq!(output_of(node, "test -t 1 || echo \"pipe$TERM\"", same, same), "pipe\n");
}

fn stop_signal(node: &mut Node) {
    let script = "trap 'exit 21' USR2; trap 'exit 22' TERM; echo ready; while :; do sleep 0.1; done";
    let stopped = |signal: api::Signal| {
        let running = Running::new(node, same, |config| {
            config.command = ["sh", "-c", script].map(String::from).to_vec();
            config.stop_signal = signal.into();
        });
        node.wait_log(&format!("{}/main.log", running.config.log_directory), "ready");
        assert_eq!(
            node.status(&running.container).unwrap().stop_signal(),
            if signal == api::Signal::RuntimeDefault { api::Signal::Sigterm } else { signal }
        );
        node.wait(node.client().stop_container(api::StopContainerRequest { container_id: running.container.clone(), timeout: 30 })).unwrap();
        node.status(&running.container).unwrap().exit_code
    };
    assert_eq!(stopped(api::Signal::Sigusr2), 21);
    assert_eq!(stopped(api::Signal::RuntimeDefault), 22);
    refused(node, same, |config| config.stop_signal = 99, Code::InvalidArgument, &["config.stop_signal", "99"]);
}

/// A configuration without a part for Linux is a whole one, and a part for Windows means nothing here.
fn other_systems_parts(node: &mut Node) {
    let output = output_of(
        node,
        "id -u; pwd",
        |pod| pod.windows = Some(api::WindowsPodSandboxConfig::default()),
        |config| {
            config.linux = None;
            let security = api::WindowsContainerSecurityContext { run_as_username: "ContainerUser".into(), ..Default::default() };
            config.windows = Some(api::WindowsContainerConfig { security_context: Some(security), ..Default::default() });
            config.image = Some(image_spec(BUSYBOX));
        },
    );
    assert_eq!(output, "0\n/\n");
}
