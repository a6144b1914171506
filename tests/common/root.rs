//! What a test that needs root does without it: it says so loudly, and fails where `COPEPOD_TEST_ROOT=1`.

/// Whether the process is root on a machine where it may make namespaces, mounts and control groups. Call it first:
/// `if !root("name of the test") { return; }`.
#[allow(dead_code)]
pub fn root(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    cannot_run(test, "it needs root");
    false
}

/// Says that a test can't run here, and fails where everything must.
#[allow(dead_code)]
pub fn cannot_run(test: &str, why: &str) {
    let message = format!("NOT RUN: {test}: {why}");
    assert!(std::env::var_os("COPEPOD_TEST_ROOT").is_none_or(|v| v != "1"), "{message}");
    eprintln!("{message}");
}
