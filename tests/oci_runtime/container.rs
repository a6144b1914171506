//! What a container's process finds.

use super::driver::*;

pub const TESTS: &[(&str, fn(&Lab))] =
    &[("a_process_runs_and_ends", a_process_runs_and_ends), ("an_exec_has_output_and_code", an_exec_has_output_and_code)];

fn a_process_runs_and_ends(lab: &Lab) {
    let output = lab.sh("echo out; echo err >&2; exit 7");
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("out\n", "err\n", 7));
}

fn an_exec_has_output_and_code(lab: &Lab) {
    let mut container = lab.create(lab.plan("echo up; exec sleep 1000")).unwrap();
    container.start().unwrap();
    assert_eq!(container.line(), "up");
    let output = lab.exec_sh(&container, "echo in; echo err >&2; exit 3");
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("in\n", "err\n", 3));
    lab.delete(container);
}
