//! Mounts: paths of the host, and what every container has without asking.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use copepod::api;
use copepod::sys::process::command;
use tonic::Code;

use super::harness::Test;
use super::node::{Node, shell};
use super::observe::{output_of, refused, run, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("mounts_host_paths", host_paths),
    ("mounts_missing_host_paths", missing_host_paths),
    ("mounts_targets", targets),
    ("mounts_that_are_refused", that_are_refused),
    ("mounts_readonly", readonly),
    ("mounts_propagation", propagation),
    ("mounts_in_status", in_status),
    ("mounts_shared_memory", shared_memory),
    ("mounts_of_every_container", of_every_container),
    ("mounts_host_dev", host_dev),
];

/// An empty directory of this test's.
pub fn scratch(node: &Node, name: &str) -> PathBuf {
    let dir = node.dir.join("scratch").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A mount of a path of the host's.
pub fn mount(host: impl Into<PathBuf>, container: &str) -> api::Mount {
    api::Mount { host_path: host.into().to_string_lossy().into_owned(), container_path: container.into(), ..Default::default() }
}

/// A container with these mounts.
pub fn with(mounts: &[api::Mount]) -> impl Fn(&mut api::ContainerConfig) {
    move |config| config.mounts = mounts.to_vec()
}

fn privileged(pod: &mut api::PodSandboxConfig) {
    pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
}

/// A tmpfs on a directory of the host's, taken off at the end.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(path: PathBuf, propagation: &str) -> Tmpfs {
        fs::create_dir_all(&path).unwrap();
        assert!(command("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&path).status().unwrap().success());
        assert!(command("mount").arg(propagation).arg(&path).status().unwrap().success());
        Tmpfs(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = command("umount").args(["-R", "-l"]).arg(&self.0).status();
    }
}

fn host_paths(node: &mut Node) {
    let dir = scratch(node, "host-paths");
    fs::create_dir(dir.join("data")).unwrap();
    fs::write(dir.join("data/file"), "content\n").unwrap();
    symlink("data", dir.join("to-directory")).unwrap();
    symlink(dir.join("data/file"), dir.join("to-file")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
    let mounts = [
        mount(dir.join("data"), "/directory"),
        mount(dir.join("to-directory"), "/linked"),
        mount(dir.join("data/file"), "/etc/file"),
        mount(dir.join("to-file"), "/deep/er/file"),
        mount(dir.join("socket"), "/run/socket"),
        // Over a file that the image has.
        mount(dir.join("data/file"), "/etc/nsswitch.conf"),
    ];
    let script = "cat /directory/file /linked/file /etc/file /deep/er/file /etc/nsswitch.conf; test -S /run/socket && echo socket; \
                  echo written >/linked/new; stat -c %a /deep /deep/er";
    assert_eq!(output_of(node, script, same, with(&mounts)), format!("{}socket\n755\n755\n", "content\n".repeat(5)));
    assert_eq!(fs::read_to_string(dir.join("data/new")).unwrap(), "written\n");
}

fn missing_host_paths(node: &mut Node) {
    let dir = scratch(node, "missing");
    let output = output_of(node, "echo x >/a/file; ls -d /a", same, with(&[mount(dir.join("made/by/us"), "/a")]));
    assert_eq!(output, "/a\n");
    assert_eq!(fs::metadata(dir.join("made/by/us")).unwrap().permissions().mode() & 0o7777, 0o755);
    assert!(dir.join("made/by/us/file").exists());
    symlink("nowhere", dir.join("dangling")).unwrap();
    refused(node, same, with(&[mount(dir.join("dangling"), "/a")]), Code::NotFound, &["/a", "dangling"]);
    assert!(!dir.join("nowhere").exists());
    fs::write(dir.join("file"), "").unwrap();
    refused(node, same, with(&[mount(dir.join("file/below"), "/a")]), Code::Internal, &["/a", "file/below"]);
}

fn targets(node: &mut Node) {
    let dir = scratch(node, "targets");
    for name in ["a", "b", "c"] {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("name"), format!("{name}\n")).unwrap();
    }
    // Inside another mount, whatever the order; behind a link in a volume, which stays in the root; the last of two at one place.
    symlink("/srv/../../../inside", dir.join("a/link")).unwrap();
    let mounts = [
        mount(dir.join("b"), "/volume/below"),
        mount(dir.join("c"), "/volume/link/target"),
        mount(dir.join("a"), "/volume"),
        mount(dir.join("a"), "/twice"),
        mount(dir.join("b"), "//twice/./"),
    ];
    let script = "cat /volume/name /volume/below/name /inside/target/name /twice/name; grep -c ' /twice ' /proc/self/mountinfo";
    assert_eq!(output_of(node, script, same, with(&mounts)), "a\nb\nc\nb\n1\n");
    assert!(dir.join("a/below").is_dir(), "mountpoints in a volume are made there");
    assert!(!dir.join("inside").exists() && !dir.join("a/inside").exists());
}

fn that_are_refused(node: &mut Node) {
    let dir = scratch(node, "refused");
    fs::write(dir.join("file"), "").unwrap();
    let check = |mount: api::Mount, words: &[&str]| refused(node, same, with(&[mount]), Code::InvalidArgument, words);
    check(mount(&dir, ""), &["config.mounts.container_path"]);
    check(mount(&dir, "relative"), &["config.mounts.container_path", "relative"]);
    check(mount(&dir, "/"), &["config.mounts.container_path", "root"]);
    check(mount(&dir, "/a/../.."), &["config.mounts.container_path", "/a/../.."]);
    check(mount("", "/a"), &["config.mounts.host_path"]);
    check(mount("relative", "/a"), &["config.mounts.host_path", "relative"]);
    check(api::Mount { propagation: 3, ..mount(&dir, "/a") }, &["config.mounts.propagation", "3"]);
    check(mount(&dir, "/etc/passwd"), &["/etc/passwd", "is not a directory"]);
    check(mount(dir.join("file"), "/etc"), &["/etc", "is not a file"]);
    check(mount(&dir, "/etc/passwd/below"), &["/etc/passwd/below"]);
}

fn readonly(node: &mut Node) {
    let dir = scratch(node, "readonly");
    let _below = Tmpfs::new(dir.join("below"), "--make-private");
    let script = "touch /a/x 2>/dev/null && echo top; touch /a/below/x 2>/dev/null && echo below; true";
    let mount = |readonly, recursive_read_only| api::Mount { readonly, recursive_read_only, ..mount(&dir, "/a") };
    assert_eq!(output_of(node, script, same, with(&[mount(false, false)])), "top\nbelow\n");
    assert_eq!(output_of(node, script, same, with(&[mount(true, false)])), "below\n");
    assert_eq!(output_of(node, script, same, with(&[mount(true, true)])), "");
    let wrong = |mount| refused(node, same, with(&[mount]), Code::InvalidArgument, &["config.mounts.recursive_read_only"]);
    wrong(mount(false, true));
    for propagation in [1, 2] {
        wrong(api::Mount { propagation, ..mount(true, true) });
    }
}

fn propagation(node: &mut Node) {
    use api::MountPropagation::{PropagationBidirectional, PropagationHostToContainer, PropagationPrivate};
    let dir = scratch(node, "propagation");
    let of = |propagation: api::MountPropagation| api::Mount { propagation: propagation.into(), ..mount(&dir, "/a") };
    let shared = Tmpfs::new(dir.clone(), "--make-shared");
    fs::create_dir(dir.join("host")).unwrap();
    fs::create_dir(dir.join("inside")).unwrap();
    // Propagation, does the container see the host's mount, does the host see the container's.
    for (propagation, container_sees, host_sees) in
        [(PropagationPrivate, false, false), (PropagationHostToContainer, true, false), (PropagationBidirectional, true, true)]
    {
        let mut pod_config = node.pod_config();
        privileged(&mut pod_config);
        let mut config = shell("main", "sleep 1000");
        config.mounts = vec![of(propagation)];
        security(&mut config, |security| security.privileged = true);
        let pod = node.run_pod(&pod_config).unwrap();
        let id = node.create(&pod, &pod_config, config).unwrap();
        node.start_container(&id).unwrap();
        let later = Tmpfs::new(dir.join("host"), "--make-private");
        fs::write(dir.join("host/mark"), "").unwrap();
        let seen = node.exec(&id, &["test", "-e", "/a/host/mark"], 30).unwrap();
        assert_eq!(seen.exit_code == 0, container_sees, "{propagation:?}");
        let mounted = node.exec(&id, &["sh", "-c", "mount -t tmpfs x /a/inside && touch /a/inside/mark"], 30).unwrap();
        assert_eq!(mounted.exit_code, 0, "{}", String::from_utf8_lossy(&mounted.stderr));
        assert_eq!(dir.join("inside/mark").exists(), host_sees, "{propagation:?}");
        if host_sees {
            assert_eq!(node.exec(&id, &["umount", "/a/inside"], 30).unwrap().exit_code, 0);
            assert!(!dir.join("inside/mark").exists());
        }
        drop(later);
        node.remove_pod(&pod);
    }
    drop(shared);
    let _private = Tmpfs::new(dir.clone(), "--make-private");
    let wrong = |propagation, want: &str| refused(node, same, with(&[of(propagation)]), Code::InvalidArgument, &["/a", dir.to_str().unwrap(), want]);
    wrong(PropagationHostToContainer, "is not on a shared or slave mount");
    wrong(PropagationBidirectional, "is not on a shared mount");
    // What comes from elsewhere but goes nowhere is enough for one of them.
    let slave = Tmpfs::new(dir.join("group"), "--make-shared");
    let copy = dir.join("copy");
    fs::create_dir(&copy).unwrap();
    assert!(command("mount").arg("--bind").args([&slave.0, &copy]).status().unwrap().success());
    assert!(command("mount").arg("--make-slave").arg(&copy).status().unwrap().success());
    let of_slave = |propagation: api::MountPropagation| api::Mount { propagation: propagation.into(), ..mount(&copy, "/a") };
    assert_eq!(output_of(node, "ls /a", same, with(&[of_slave(PropagationHostToContainer)])), "");
    refused(node, same, with(&[of_slave(PropagationBidirectional)]), Code::InvalidArgument, &["/a", "is not on a shared mount"]);
}

fn in_status(node: &mut Node) {
    let dir = scratch(node, "status");
    let shared = Tmpfs::new(dir.join("shared"), "--make-shared");
    let asked = [
        api::Mount { readonly: true, recursive_read_only: true, ..mount(&dir, "/a") },
        api::Mount { propagation: 2, selinux_relabel: true, ..mount(&shared.0, "/b") },
        api::Mount { propagation: 1, readonly: true, ..mount(&shared.0, "/c") },
    ];
    let pod_config = node.pod_config();
    let pod = node.run_pod(&pod_config).unwrap();
    let mut config = shell("main", "true");
    config.mounts = asked.to_vec();
    let id = node.create(&pod, &pod_config, config).unwrap();
    assert_eq!(node.status(&id).unwrap().mounts, asked);
    node.remove_pod(&pod);
    // Without SELinux a label is nothing to set.
    if !PathBuf::from("/sys/fs/selinux/enforce").exists() {
        let label = rustix::fs::getxattr(&shared.0, "security.selinux", &mut [0u8; 64][..]);
        assert!(label.is_err(), "{label:?}");
    }
}

fn shared_memory(node: &mut Node) {
    // One for all containers of the pod, of the configuration's size.
    let pod_config = node.pod_config();
    let pod = node.run_pod(&pod_config).unwrap();
    let first = node.create(&pod, &pod_config, shell("first", "echo shared >/dev/shm/x; stat -f -c %T:%b:%s /dev/shm")).unwrap();
    let second = node.create(&pod, &pod_config, shell("second", "cat /dev/shm/x; grep -o ' /dev/shm rw,[a-z,]*' /proc/self/mountinfo")).unwrap();
    for id in [&first, &second] {
        node.start_container(id).unwrap();
        assert_eq!(node.wait_exit(id).exit_code, 0);
    }
    let log = |name: &str| fs::read_to_string(format!("{}/{name}.log", pod_config.log_directory)).unwrap();
    assert!(log("first").contains(&format!("tmpfs:{}:4096", (64 << 20) / 4096)), "{}", log("first"));
    assert!(log("second").contains("F shared\n") && log("second").contains("nosuid,nodev,noexec"), "{}", log("second"));
    node.remove_pod(&pod);

    // kubelet's own, of an emptyDir with medium Memory.
    let memory = Tmpfs::new(scratch(node, "memory"), "--make-private");
    let script = "echo x >/dev/shm/from-container; grep -c ' /dev/shm ' /proc/self/mountinfo";
    assert_eq!(output_of(node, script, same, with(&[mount(&memory.0, "/dev/shm")])), "1\n");
    assert!(memory.0.join("from-container").exists());

    // The host's, with its IPC namespace.
    let name = format!("/dev/shm/{}", node.dir.file_name().unwrap().to_string_lossy());
    fs::write(&name, "of the host\n").unwrap();
    let host_ipc = |pod: &mut api::PodSandboxConfig| {
        let security = pod.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options.get_or_insert_default().ipc = api::NamespaceMode::Node.into();
    };
    let output = run(node, &format!("cat {name}"), host_ipc, same);
    fs::remove_file(&name).unwrap();
    assert_eq!(output.unwrap(), (0, "of the host\n".into()));
}

fn of_every_container(node: &mut Node) {
    let writable = "for p in /x /etc/hosts /etc/hostname /etc/resolv.conf /dev/x /dev/shm/x /sys/x; do \
                    (: >>$p) 2>/dev/null && echo $p; done; true";
    let read_only = |config: &mut api::ContainerConfig| security(config, |security| security.readonly_rootfs = true);
    assert_eq!(output_of(node, writable, same, same), "/x\n/etc/hosts\n/etc/hostname\n/etc/resolv.conf\n/dev/x\n/dev/shm/x\n");
    assert_eq!(output_of(node, writable, same, read_only), "/dev/x\n/dev/shm/x\n");
    // kubelet's own hosts file stays as kubelet has it.
    let dir = scratch(node, "hosts");
    fs::write(dir.join("hosts"), "# kubelet's\n").unwrap();
    let kubelets = |config: &mut api::ContainerConfig| {
        read_only(config);
        config.mounts = vec![mount(dir.join("hosts"), "/etc/hosts")];
    };
    assert_eq!(output_of(node, "echo more >>/etc/hosts; cat /etc/hosts; cat /etc/hostname | wc -l", same, kubelets), "# kubelet's\nmore\n1\n");
    // /sys: as the host has it for a privileged container only.
    let sys = "grep -o ' /sys r[ow]' /proc/self/mountinfo; grep -o ' /sys/fs/cgroup r[ow]' /proc/self/mountinfo";
    assert_eq!(output_of(node, sys, same, same), " /sys ro\n /sys/fs/cgroup ro\n");
    let all = |config: &mut api::ContainerConfig| security(config, |security| security.privileged = true);
    assert_eq!(output_of(node, sys, privileged, all), " /sys rw\n /sys/fs/cgroup rw\n");
}

/// As drivers of storage and devices have it: everything of the host's /dev, and terminals all the same.
fn host_dev(node: &mut Node) {
    let all = |config: &mut api::ContainerConfig| {
        security(config, |security| security.privileged = true);
        config.mounts = vec![mount("/dev", "/dev")];
        config.tty = true;
    };
    let output =
        output_of(node, "test -c /dev/null && test -d /dev/pts && tty >/dev/null && echo fine; ls /dev/shm | wc -l >/dev/null", privileged, all);
    assert_eq!(output.replace('\r', ""), "fine\n");
}
