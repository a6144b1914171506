//! The CNI client over the real plugins of Debian's `containernetworking-plugins`, and over plugins that misbehave.
//!
//! Each test runs in a network, a mount and a PID namespace of its own, which it makes by running this program again under
//! unshare(1): "the host" of a test is that, and whatever a plugin does to it or leaves in it ends with the test.

/// Makes tests of functions.
macro_rules! tests {
    ($($name:ident)*) => {
        mod isolated {
            $(
                #[test]
                fn $name() {
                    crate::isolated(concat!(module_path!(), "::", stringify!($name)), super::$name);
                }
            )*
        }
    };
}

#[path = "cni/bad.rs"]
mod bad;
#[path = "cni/follow.rs"]
mod follow;
#[path = "cni/lifecycle.rs"]
mod lifecycle;
#[path = "common/root.rs"]
mod root;
#[path = "cni/world.rs"]
mod world;

use copepod::sys::process::command;

const INSIDE: &str = "COPEPOD_TEST_CNI_INSIDE";

/// Runs a test's body in namespaces of its own.
fn isolated(path: &str, body: fn()) {
    if !root::root(path) {
        return;
    }
    if std::env::var_os(INSIDE).is_some() {
        world::sh("ip link set lo up");
        // Where host-local and the cache keep things unless they are told otherwise; the mount is seen here alone.
        world::sh("mount -t tmpfs none /var/lib");
        return body();
    }
    let me = std::env::current_exe().unwrap();
    // The program's name is no part of a test's.
    let (_, name) = path.split_once("::").unwrap();
    let mut again = command("unshare");
    again
        .args(["--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(me)
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1");
    let output = again.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}{stderr}");
}
