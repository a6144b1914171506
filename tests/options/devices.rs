//! Devices of the host: asked for one by one, by directory, and all of them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::mounts::scratch;
use super::node::Node;
use super::observe::{output_of, refused, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("devices_by_path", by_path),
    ("devices_permissions", permissions),
    ("devices_of_a_directory", of_a_directory),
    ("devices_of_a_privileged_container", of_a_privileged_container),
    ("devices_refused", devices_refused),
];

fn device(host: impl AsRef<std::path::Path>, container: &str, permissions: &str) -> api::Device {
    let host_path = host.as_ref().to_string_lossy().into_owned();
    api::Device { host_path, container_path: container.into(), permissions: permissions.into() }
}

fn with(devices: &[api::Device]) -> impl Fn(&mut api::ContainerConfig) {
    move |config| config.devices = devices.to_vec()
}

/// A device node of the test's own.
fn node_at(path: &std::path::Path, major: u32, minor: u32) {
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::CharacterDevice, mode, rustix::fs::makedev(major, minor)).unwrap();
    rustix::fs::chown(path, Some(rustix::fs::Uid::from_raw(7)), Some(rustix::fs::Gid::from_raw(8))).unwrap();
}

fn by_path(node: &mut Node) {
    let dir = scratch(node, "devices");
    node_at(&dir.join("zero"), 1, 5);
    symlink("zero", dir.join("link")).unwrap();
    let devices = [
        device(dir.join("zero"), "/dev/a", "rwm"),
        device(dir.join("link"), "/dev/deep/b", "r"),
        // In place of one that every container has, and outside of /dev.
        device(dir.join("zero"), "/dev/full", "rwm"),
        device(dir.join("zero"), "/srv/own/zero", "rw"),
        // The last of two at one place.
        device("/dev/null", "/dev/twice", "rwm"),
        device(dir.join("zero"), "/dev/twice", "rwm"),
    ];
    let script = "for d in /dev/a /dev/deep/b /dev/full /srv/own/zero /dev/twice; do stat -c '%n %F %t:%T %u:%g %a' $d; head -c 3 $d | wc -c; done";
    let lines = ["/dev/a", "/dev/deep/b", "/dev/full", "/srv/own/zero", "/dev/twice"];
    let want: String = lines.iter().map(|path| format!("{path} character special file 1:5 7:8 640\n3\n")).collect();
    assert_eq!(output_of(node, script, same, with(&devices)), want);
    // Without any: nothing of the host's.
    let output = output_of(node, "ls /dev | tr '\\n' ' '; head -c 1 /dev/zero | wc -c", same, same);
    assert_eq!(output, "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero 1\n");
}

/// The device rules, by a device that has no driver: the kernel asks the rules before it finds that out.
fn permissions(node: &mut Node) {
    let dir = scratch(node, "permissions");
    node_at(&dir.join("none"), 60, 7);
    let script = "mknod /tmp/made c 60 7; for f in /dev/x /tmp/made; do for how in '<' '>>'; do                   sh -c \"exec 3${how}$f\" 2>&1 | grep -q 'No such device' && printf %s \"$how\"; done; done; echo";
    let check = |permissions: &str, want: &str| {
        let devices = [device(dir.join("none"), "/dev/x", permissions)];
        assert_eq!(output_of(node, script, same, with(&devices)), format!("{want}{want}\n"), "{permissions}");
    };
    check("rwm", "<>>");
    check("rw", "<>>");
    check("r", "<");
    check("w", ">>");
    check("m", "");
}

fn of_a_directory(node: &mut Node) {
    let dir = scratch(node, "directory");
    fs::create_dir_all(dir.join("below/deep")).unwrap();
    node_at(&dir.join("one"), 1, 5);
    node_at(&dir.join("below/deep/two"), 1, 3);
    fs::write(dir.join("file"), "").unwrap();
    symlink("/dev/null", dir.join("link")).unwrap();
    let script = "cd /dev/all && find . | sort; head -c 1 one | wc -c; echo x >below/deep/two && echo written";
    let output = output_of(node, script, same, with(&[device(&dir, "/dev/all", "rw")]));
    assert_eq!(output, ".\n./below\n./below/deep\n./below/deep/two\n./one\n1\nwritten\n");
}

fn of_a_privileged_container(node: &mut Node) {
    let pod = |pod: &mut api::PodSandboxConfig| pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let all = |devices: Vec<api::Device>| {
        move |config: &mut api::ContainerConfig| {
            security(config, |security| security.privileged = true);
            config.devices = devices.clone();
        }
    };
    let is_device = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_char_device() || kind.is_block_device());
    let own = ["console", "ptmx", "core", "initctl"];
    let mut host: Vec<String> = fs::read_dir("/dev").unwrap().flatten().filter(is_device).map(|e| e.file_name().into_string().unwrap()).collect();
    host.retain(|name| !own.contains(&name.as_str()));
    host.sort();
    let names = |output: &str| {
        let mut names: Vec<String> = output.lines().map(str::to_string).collect();
        names.sort();
        names
    };
    let script = "cd /dev; for f in *; do if test -c $f || test -b $f; then test -L $f || echo $f; fi; done";
    assert_eq!(names(&output_of(node, script, pod, all(Vec::new()))), host);
    // One that is asked for beside all of them, under its own name and under another.
    let devices = vec![device("/dev/null", "/dev/null", "r"), device("/dev/zero", "/dev/copy", "r")];
    let output =
        output_of(node, "head -c 2 /dev/copy | wc -c; echo x >/dev/null && mknod /tmp/x c 1 11 && (: </tmp/x) && echo all", pod, all(devices));
    assert_eq!(output, "2\nall\n");
}

fn devices_refused(node: &mut Node) {
    let dir = scratch(node, "refused-devices");
    fs::write(dir.join("file"), "").unwrap();
    let check = |device: api::Device, code, words: &[&str]| refused(node, same, with(&[device]), code, words);
    let invalid = Code::InvalidArgument;
    check(device("/dev/null", "", "r"), invalid, &["config.devices.container_path"]);
    check(device("/dev/null", "x", "r"), invalid, &["config.devices.container_path", "\"x\""]);
    check(device("/dev/null", "/dev/../x", "r"), invalid, &["config.devices.container_path", "/dev/../x"]);
    check(device("/dev/null", "/dev", "r"), invalid, &["/dev", "has no name"]);
    check(device("", "/dev/x", "r"), invalid, &["config.devices.host_path"]);
    check(device("dev/null", "/dev/x", "r"), invalid, &["config.devices.host_path", "dev/null"]);
    check(device(dir.join("missing"), "/dev/x", "r"), Code::NotFound, &["device", "missing"]);
    check(device(dir.join("file"), "/dev/x", "r"), invalid, &["devices.host_path", "file", "no device"]);
    check(device(&dir, "/dev/x", "r"), invalid, &["devices.host_path", "refused-devices", "holds none"]);
    for permissions in ["", "x", "rwx", "rr"] {
        check(device("/dev/null", "/dev/x", permissions), invalid, &["devices.permissions", permissions]);
    }
    refused(
        node,
        same,
        |config| config.cdi_devices = vec![api::CdiDevice { name: "vendor.com/gpu=0".into() }],
        Code::Unimplemented,
        &["CDI_devices", "vendor.com/gpu=0"],
    );
}
