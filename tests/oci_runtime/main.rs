//! The embedded runtime, on the kernel: what a container finds when it starts, and what it can't do.
//!
//! Not cargo's harness: creators are forks, and only a process of one thread forks. This one acts as the monitor would, in a mount
//! namespace of its own. After each test nothing may be left: processes, mounts, control groups, descriptors (and with them
//! namespaces). Arguments are parts of names of tests to run.

mod attacks;
mod container;
mod driver;
mod exec;
mod files;
mod pod;
mod process;
mod userns;
mod volumes;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use copepod::sys::{mount, ns};
use driver::Lab;

#[path = "../common/root.rs"]
mod root;

/// A test and its name.
type Test = (&'static str, fn(&Lab));

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == attacks::SIT_STILL) {
        attacks::sit_still();
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let all: Vec<Test> =
        [container::TESTS, process::TESTS, files::TESTS, volumes::TESTS, pod::TESTS, exec::TESTS, attacks::TESTS, userns::TESTS].concat();
    let tests: Vec<&Test> =
        all.iter().filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))).collect();
    if rustix::process::geteuid().is_root() {
        copepod::oci::own_program::shield().expect("this program runs from a read-only mount");
    }
    println!("\nrunning {} tests", tests.len());
    if !root::root("the embedded runtime") {
        println!("\ntest result: ok. 0 passed; 0 failed; {} ignored; 0 measured; {} filtered out\n", tests.len(), all.len() - tests.len());
        return ExitCode::SUCCESS;
    }
    ns::unshare(&[ns::Kind::Mount]).expect("a mount namespace of its own");
    mount::set_propagation_of_all(mount::Propagation::Private).expect("mounts that reach no other");

    driver::watch_children();
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let passed = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let before = driver::traces();
            let lab = Lab::new();
            test(&lab);
            lab.close();
            assert_eq!(driver::traces(), before, "what is there after the test and before it");
        }));
        println!("test {name} ... {}", if passed.is_ok() { "ok" } else { "FAILED" });
        if passed.is_err() {
            failed.push(name);
            driver::end_children();
        }
    }
    if !failed.is_empty() {
        println!("\nfailures:");
        failed.iter().for_each(|name| println!("    {name}"));
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    let passed = tests.len() - failed.len();
    println!("\ntest result: {verdict}. {passed} passed; {} failed; 0 ignored; 0 measured; {} filtered out\n", failed.len(), all.len() - tests.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
