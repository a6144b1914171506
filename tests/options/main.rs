//! Every option of the CRI's configurations: set, and its effect observed inside the container; set wrongly, and the error
//! read. One file for each part of the configuration.

#[path = "../common/harness.rs"]
mod harness;
#[path = "../common/node.rs"]
mod node;
#[path = "../common/root.rs"]
mod root;

mod devices;
mod events;
mod fields;
mod images;
mod inspect;
mod mounts;
mod namespaces;
mod network;
mod observe;
mod process;
mod profiles;
mod resources;
mod sandbox;
mod security;
mod stats;
mod update;
mod userns;
mod volumes;

use std::process::ExitCode;

use node::{BUSYBOX, Node};

/// The parts.
const PARTS: &[&[harness::Test<Node>]] = &[
    devices::TESTS,
    events::TESTS,
    fields::TESTS,
    images::TESTS,
    inspect::TESTS,
    mounts::TESTS,
    namespaces::TESTS,
    network::TESTS,
    process::TESTS,
    profiles::TESTS,
    resources::TESTS,
    sandbox::TESTS,
    security::TESTS,
    stats::TESTS,
    update::TESTS,
    userns::TESTS,
    volumes::TESTS,
];

fn main() -> ExitCode {
    let tests = PARTS.concat();
    if !root::root("tests/options") {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; {} filtered out\n", tests.len());
        return ExitCode::SUCCESS;
    }
    harness::enter_sandbox();
    let mut node = Node::new("options");
    node.start(None);
    node.pull(BUSYBOX);
    let code = harness::run(&mut node, &tests, |node| node.remove_all_pods());
    node.remove_all_pods();
    node.assert_nothing_left();
    node.kill();
    code
}
