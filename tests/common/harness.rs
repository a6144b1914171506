//! A test harness for tests that share one node or must be the only thread: runs them in order, in namespaces of their own,
//! and prints what cargo's own harness prints.

use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use copepod::sys::process::command;

/// Runs this test program again in new mount, network and process namespaces, once. What a test forgets ends there.
#[allow(dead_code)]
pub fn enter_sandbox() {
    if std::env::var_os("COPEPOD_TEST_SANDBOX").is_some() {
        let shared = command("mount").args(["--make-rshared", "/"]).status().expect("mount");
        let up = command("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
        assert!(shared.success() && up.success(), "the sandbox can't be prepared");
        return;
    }
    let error = command("unshare")
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "slave"])
        // A shell as the namespace's init: it reaps what a dead monitor leaves, as a node's init does.
        .args(["sh", "-c", "\"$@\"; exit $?", "sh"])
        .arg(std::env::current_exe().expect("own path"))
        .args(std::env::args_os().skip(1))
        .env("COPEPOD_TEST_SANDBOX", "1")
        .exec();
    panic!("cannot run unshare: {error}");
}

/// A test and its name.
pub type Test<N> = (&'static str, fn(&mut N));

/// Runs the tests whose name has one of the words on the command line, all without any; `finish` at the end, whatever failed.
#[allow(dead_code)]
pub fn run<N>(node: &mut N, tests: &[Test<N>], recover: fn(&mut N)) -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if std::env::args().any(|word| word == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let chosen: Vec<_> = tests.iter().filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))).collect();
    println!("\nrunning {} tests", chosen.len());
    let mut failed = Vec::new();
    for (name, test) in &chosen {
        let result = catch_unwind(AssertUnwindSafe(|| test(node)));
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        if result.is_err() {
            failed.push(*name);
            // What a failed test left must not fail the next.
            let _ = catch_unwind(AssertUnwindSafe(|| recover(node)));
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    println!(
        "\ntest result: {verdict}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out\n",
        chosen.len() - failed.len(),
        failed.len(),
        tests.len() - chosen.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
