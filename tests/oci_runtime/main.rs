//! The embedded runtime, on the kernel: what a container finds when it starts, and what it can't do.
//!
//! Not cargo's harness: creators are forks, and only a process of one thread forks. This one acts as the monitor would. Arguments
//! are parts of names of tests to run.

mod container;
mod driver;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use driver::Lab;

#[path = "../common/root.rs"]
mod root;

type Test = (&'static str, fn(&Lab));

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let all: Vec<Test> = [container::TESTS].concat();
    let chosen = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let tests: Vec<&Test> = all.iter().filter(|(name, _)| chosen(name)).collect();
    println!("\nrunning {} tests", tests.len());
    if !root::root("the embedded runtime") {
        println!("\ntest result: ok. 0 passed; 0 failed; {} ignored; 0 measured; {} filtered out\n", tests.len(), all.len() - tests.len());
        return ExitCode::SUCCESS;
    }
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let passed = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let lab = Lab::new();
            test(&lab);
        }));
        println!("test {name} ... {}", if passed.is_ok() { "ok" } else { "FAILED" });
        if passed.is_err() {
            failed.push(name);
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    let passed = tests.len() - failed.len();
    println!("\ntest result: {verdict}. {passed} passed; {} failed; 0 ignored; 0 measured; {} filtered out\n", failed.len(), all.len() - tests.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
