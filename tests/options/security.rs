//! LinuxContainerSecurityContext.

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::node::Node;
use super::observe::{output_of, refused, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[("security_user_by_number", user_by_number)];

fn user_by_number(node: &mut Node) {
    let number = |value| Some(api::Int64Value { value });
    let set = |user: i64, group: Option<i64>| {
        move |config: &mut api::ContainerConfig| {
            security(config, |s| {
                s.run_as_user = number(user);
                s.run_as_group = group.and_then(number);
            });
        }
    };
    assert_eq!(output_of(node, "id -u; id -g", same, set(1234, Some(4321))), "1234\n4321\n");
    refused(node, same, set(-1, None), Code::InvalidArgument, &["run_as_user", "-1"]);
    refused(node, same, set(1 << 32, None), Code::InvalidArgument, &["run_as_user", "4294967296"]);
    refused(node, same, set(1, Some(i64::from(u32::MAX))), Code::InvalidArgument, &["run_as_group", "4294967295"]);
}
