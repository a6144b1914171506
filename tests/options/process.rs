//! ContainerConfig: what runs, where and with what.

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::node::Node;
use super::observe::{output_of, refused, same};

/// The tests.
pub const TESTS: &[Test<Node>] = &[("process_command_arguments_directory_environment", command_arguments_directory_environment)];

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
}
