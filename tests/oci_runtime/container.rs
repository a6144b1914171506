//! What a container's process finds: namespaces, filesystems, limits.

use copepod::errchain::Kind;
use copepod::plan::*;

use super::driver::*;

pub const TESTS: &[super::Test] = &[
    ("a_process_runs_and_ends", a_process_runs_and_ends),
    ("a_container_that_is_not_started_ends_with_its_socket", a_container_that_is_not_started_ends_with_its_socket),
    ("namespaces_are_its_own", namespaces_are_its_own),
    ("host_namespaces_are_the_hosts", host_namespaces_are_the_hosts),
    ("kernel_filesystems_are_mounted", kernel_filesystems_are_mounted),
    ("dev_has_what_the_spec_names", dev_has_what_the_spec_names),
    ("paths_are_masked_and_read_only", paths_are_masked_and_read_only),
    ("limits_hold_and_are_seen", limits_hold_and_are_seen),
    ("a_failed_create_leaves_nothing", a_failed_create_leaves_nothing),
    ("a_terminal_is_there", a_terminal_is_there),
];

fn a_process_runs_and_ends(lab: &Lab) {
    let output = lab.sh("echo out; echo err >&2; exit 7");
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("out\n", "err\n", 7));
    assert_eq!(lab.sh("kill -9 $$; sleep 1").code, 0, "PID 1 is out of reach of its own signals");
    let mut container = lab.create(lab.plan("trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done")).unwrap();
    container.start().unwrap();
    assert_eq!(container.line(), "up");
    copepod::sys::process::signal(std::os::fd::AsFd::as_fd(&container.init.pidfd), 15).unwrap();
    assert_eq!(container.wait(), Ended { code: 5, signal: 0 });
    lab.delete(container);
}

fn a_container_that_is_not_started_ends_with_its_socket(lab: &Lab) {
    let mut container = lab.create(lab.plan("echo never")).unwrap();
    let (other, _end) = copepod::sys::fd::seqpacket_pair().unwrap();
    container.init.start = other;
    assert_ne!(container.wait().code, 0);
    assert_eq!(container.output().stdout, "");
    lab.delete(container);
}

const KINDS: [&str; 5] = ["net", "ipc", "uts", "pid", "mnt"];

fn namespaces_of(lab: &Lab, plan: ContainerPlan) -> Vec<String> {
    let output = lab.run(plan).unwrap();
    output.lines().iter().map(|line| line.to_string()).collect()
}

const SHOW: &str = "for kind in net ipc uts pid mnt; do readlink /proc/self/ns/$kind; done";

fn host_namespaces() -> Vec<String> {
    KINDS.map(|kind| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_str().unwrap().to_string()).to_vec()
}

fn namespaces_are_its_own(lab: &Lab) {
    let own = namespaces_of(lab, lab.plan(SHOW));
    for (own, host) in own.iter().zip(host_namespaces()) {
        assert_ne!(*own, host);
    }
    let mut plan = lab.plan("readlink /proc/self/ns/cgroup; cat /proc/self/cgroup; echo $$");
    plan.namespaces.cgroup = Namespace::Private;
    let output = lab.run(plan).unwrap();
    assert_ne!(output.lines()[0], std::fs::read_link("/proc/self/ns/cgroup").unwrap().to_str().unwrap());
    // Every group is the root of its namespace.
    assert!(output.lines()[1..output.lines().len() - 1].iter().all(|line| line.ends_with(":/")), "{}", output.stdout);
    assert_eq!(output.lines().last(), Some(&"1"));
}

fn host_namespaces_are_the_hosts(lab: &Lab) {
    let mut plan = lab.plan(SHOW);
    plan.namespaces = Namespaces::default();
    let own = namespaces_of(lab, plan);
    let host = host_namespaces();
    assert_eq!(own[..4], host[..4]);
    assert_ne!(own[4], host[4]);
}

fn kernel_filesystems_are_mounted(lab: &Lab) {
    let output = lab.sh("cat /proc/mounts; hostname; cat /proc/1/comm; ls /sys/class/net");
    let has = |text: &str| assert!(output.stdout.contains(text), "{text}: {}", output.stdout);
    for line in [
        "overlay / overlay rw,",
        "proc /proc proc rw,nosuid,nodev,noexec,",
        "tmpfs /dev tmpfs rw,nosuid,",
        "devpts /dev/pts devpts rw,nosuid,noexec,relatime,gid=5,mode=620,ptmxmode=666",
        "mqueue /dev/mqueue mqueue rw,nosuid,nodev,noexec,",
        "sysfs /sys sysfs ro,nosuid,nodev,noexec,",
        "tmpfs /dev/shm tmpfs rw,nosuid,nodev,noexec,",
    ] {
        has(line);
    }
    // Nothing of the host's mounts is left below the root.
    assert!(!output.stdout.contains(lab.dir.path().to_str().unwrap()) || output.stdout.matches("lowerdir").count() == 1, "{}", output.stdout);
    let mounts = output.lines().iter().filter(|line| line.contains(" /")).count();
    assert!(mounts < 40, "{}", output.stdout);
    has("\nsh\n");
    assert_eq!(output.lines().last(), Some(&"lo"), "sysfs is of its own network namespace");

    let script = "cat /proc/mounts; ls /sys/fs/cgroup; echo $$ >/sys/fs/cgroup/cgroup.procs || echo $$ >/sys/fs/cgroup/memory/cgroup.procs";
    let output = lab.sh(script);
    if lab.hierarchy.is_v2() {
        assert!(output.stdout.contains("cgroup /sys/fs/cgroup cgroup2 ro,"), "{}", output.stdout);
        assert!(output.stdout.contains("cgroup.procs"), "{}", output.stdout);
    } else {
        assert!(output.stdout.contains("tmpfs /sys/fs/cgroup tmpfs ro,"), "{}", output.stdout);
        assert!(output.stdout.contains(" /sys/fs/cgroup/memory cgroup ro,"), "{}", output.stdout);
    }
    assert!(output.stderr.contains("Read-only file system") && output.code != 0, "{}", output.stderr);
}

fn dev_has_what_the_spec_names(lab: &Lab) {
    let mut plan = lab.plan(
        "cd /dev; for f in null zero full random urandom tty own/loop9; do stat -c '%n %F %t:%T %a %u:%g' $f; done; \
         for l in fd stdin stdout stderr ptmx core; do readlink $l; done; echo x >null; head -c 3 zero | wc -c; ls -d shm mqueue pts",
    );
    let device = DeviceNode { path: "/dev/own/loop9".into(), kind: 'b' as u32, major: 7, minor: 9, mode: 0o640, uid: 3, gid: 4 };
    plan.devices = vec![device];
    let output = lab.run(plan).unwrap();
    let want = [
        "null character special file 1:3 666 0:0",
        "zero character special file 1:5 666 0:0",
        "full character special file 1:7 666 0:0",
        "random character special file 1:8 666 0:0",
        "urandom character special file 1:9 666 0:0",
        "tty character special file 5:0 666 0:0",
        "own/loop9 block special file 7:9 640 3:4",
        "/proc/self/fd",
        "/proc/self/fd/0",
        "/proc/self/fd/1",
        "/proc/self/fd/2",
        "pts/ptmx",
        "/proc/kcore",
        "3",
        "mqueue",
        "pts",
        "shm",
    ];
    assert_eq!(output.lines(), want, "{}", output.stderr);

    // Elsewhere in the root, behind a link of the image; in place of one of ours; twice at a place is the same device.
    let layer = lab.layer(|root| std::os::unix::fs::symlink("/srv/../opt", root.join("link")).unwrap());
    let zero = |path: &str| DeviceNode { path: path.into(), kind: 'c' as u32, major: 1, minor: 5, mode: 0o600, uid: 3, gid: 4 };
    let mut plan = lab.plan("stat -c '%n %F %t:%T %a %u:%g' /opt/sub/x /dev/core /dev/full; head -c 2 /opt/sub/x | wc -c");
    lab.on_top(&mut plan, &[layer]);
    plan.devices = ["/link/sub/x", "/opt/sub/x", "/dev/core", "/dev/full"].map(zero).into();
    let output = lab.run(plan).unwrap();
    let device = |path: &str| format!("{path} character special file 1:5 600 3:4");
    assert_eq!(output.lines(), [device("/opt/sub/x"), device("/dev/core"), device("/dev/full"), "2".into()], "{}", output.stderr);

    let mut plan = lab.plan("true");
    plan.devices = vec![zero("/etc/passwd")];
    fails(lab.run(plan), Kind::Internal, "cannot make /etc/passwd in the container");
    let mut plan = lab.plan("true");
    plan.devices = vec![zero("/dev")];
    fails(lab.run(plan), Kind::InvalidArgument, "device /dev has no name");
    let mut plan = lab.plan("true");
    plan.devices = vec![DeviceNode { kind: 'x' as u32, ..zero("/opt/x") }];
    fails(lab.run(plan), Kind::InvalidArgument, "device /opt/x is of unknown type");
}

fn paths_are_masked_and_read_only(lab: &Lab) {
    let layer = lab.layer(|root| {
        std::fs::create_dir_all(root.join("secret/below")).unwrap();
        std::fs::write(root.join("secret/below/file"), "secret").unwrap();
        std::fs::write(root.join("file"), "secret").unwrap();
        std::os::unix::fs::symlink("/file", root.join("link")).unwrap();
        std::fs::create_dir_all(root.join("fixed/below")).unwrap();
    });
    let mut plan = lab.plan(
        "stat -c '%F %t:%T' /proc/keys /file; cat /file /link; ls -a /secret | wc -l; touch /secret/x; \
         touch /fixed/below/x; echo 1 >/proc/sys/kernel/randomize_va_space; touch /elsewhere && echo writable",
    );
    lab.on_top(&mut plan, &[layer]);
    plan.masked_paths.extend(["/secret", "/file", "/secret/missing", "/file/below"].map(Into::into));
    plan.readonly_paths.extend(["/fixed", "/missing"].map(Into::into));
    let output = lab.run(plan).unwrap();
    assert_eq!(output.lines(), ["character special file 1:3", "character special file 1:3", "2", "writable"], "{}", output.stderr);
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{}", output.stderr);

    let mut plan = lab.plan("touch /x; touch /dev/x; touch /dev/shm/x && echo shm; mkdir /made/by/cwd/x; pwd");
    plan.rootfs_readonly = true;
    plan.process.cwd = "/made/by/cwd".into();
    plan.mounts[1].readonly = true;
    let output = lab.run(plan).unwrap();
    assert_eq!(output.lines(), ["shm", "/made/by/cwd"], "{}", output.stderr);
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{}", output.stderr);
}

fn limits_hold_and_are_seen(lab: &Lab) {
    let (memory, pids) = if lab.hierarchy.is_v2() { ("memory.max", "pids.max") } else { ("memory/memory.limit_in_bytes", "pids/pids.max") };
    let mut plan = lab.plan(&format!("cd /sys/fs/cgroup; cat {memory} {pids}; for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; echo all"));
    plan.cgroup.resources = Resources { memory_limit: Some(64 << 20), pids_limit: Some(5), ..Resources::default() };
    let output = lab.run(plan).unwrap();
    assert_eq!(output.lines()[..2], ["67108864", "5"], "{}", output.stderr);
    assert!(output.stderr.contains("can't fork"), "{}", output.stderr);

    let deny = |access: &str, allow, major, minor| DeviceRule { allow, kind: 'c' as u32, major, minor, access: access.into() };
    let all = DeviceRule { allow: false, kind: 'a' as u32, access: "rwm".into(), ..DeviceRule::default() };
    let mut plan = lab.plan("head -c 1 /dev/zero | wc -c; head -c 1 /dev/urandom | wc -c");
    plan.cgroup.devices = vec![all, deny("m", true, None, None), deny("rw", true, Some(1), Some(5)), deny("rw", true, Some(1), Some(3))];
    let output = lab.run(plan).unwrap();
    assert_eq!(output.lines(), ["1", "0"]);
    assert!(output.stderr.contains("Operation not permitted"), "{}", output.stderr);
}

fn a_failed_create_leaves_nothing(lab: &Lab) {
    // Early, in the middle, in init: the driver's traces are compared after the test.
    let mut plan = lab.plan("true");
    plan.rootfs = Rootfs::None;
    fails(lab.create(plan), Kind::InvalidArgument, "no root filesystem");
    let mut plan = lab.plan("true");
    plan.rootfs = Rootfs::Directory(lab.path("missing"));
    fails(lab.create(plan), Kind::NotFound, "missing");
    let mut plan = lab.plan("true");
    plan.mounts.push(bind(&lab.path("missing/source"), "/data"));
    fails(lab.create(plan), Kind::NotFound, "cannot prepare the mount of /data: cannot open ");
    let mut plan = lab.plan("true");
    plan.process.user.name = "nobody-here".into();
    fails(lab.create(plan), Kind::InvalidArgument, "no user \"nobody-here\"");
    let mut plan = lab.plan("true");
    plan.namespaces.net = Namespace::Pod;
    fails(lab.create(plan), Kind::FailedPrecondition, "the plan needs the net namespace of the pod");
    let mut plan = lab.plan("true");
    plan.cgroup.path = "/a/../b".into();
    fails(lab.create(plan), Kind::InvalidArgument, "/a/../b");
}

fn a_terminal_is_there(lab: &Lab) {
    let mut plan = lab.plan("tty; stty size; stat -c %u /dev/pts/0; readlink /proc/self/fd/1; echo x >/dev/console; test -t 2 && echo two");
    plan.process.terminal = true;
    plan.process.terminal_size = (100, 40);
    plan.process.user.uid = Some(1000);
    let mut container = lab.create(plan).unwrap();
    let console = container.init.console.take().unwrap();
    container.start().unwrap();
    container.wait();
    let text = read_all(console, "the terminal").replace('\r', "");
    assert_eq!(text.lines().collect::<Vec<_>>(), ["/dev/pts/0", "40 100", "1000", "/dev/pts/0", "x", "two"]);
    lab.delete(container);

    let mut plan = lab.plan("true");
    plan.process.terminal = true;
    plan.mounts.retain(|mount| mount.kind != MountKind::Devpts);
    fails(lab.create(plan), Kind::FailedPrecondition, "no devpts");
}
