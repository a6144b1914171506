//! Containers in the pod's own user namespace: ids, owners, namespaces, and what its root can't do.

use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use copepod::errchain::Kind;
use copepod::plan::*;

use super::driver::*;
use super::pod::{in_pod, sandbox};
use super::volumes::{image, volume};

pub const TESTS: &[super::Test] = &[
    ("userns_root_is_somebody_else_on_the_host", root_is_somebody_else_on_the_host),
    ("userns_owns_the_pods_namespaces", owns_the_pods_namespaces),
    ("userns_layers_keep_their_owners", layers_keep_their_owners),
    ("userns_filesystems_and_streams_belong_to_root", filesystems_and_streams_belong_to_root),
    ("userns_root_can_do_nothing_to_the_host", root_can_do_nothing_to_the_host),
    ("userns_pause_and_exec", pause_and_exec),
    ("userns_binds_are_mapped", binds_are_mapped),
    ("userns_images_and_volumes", images_and_volumes),
    ("userns_users_beyond_the_mapping", users_beyond_the_mapping),
    ("userns_limits_and_sysctls", limits_and_sysctls),
    ("userns_terminal", terminal),
    ("userns_on_the_hosts_network", on_the_hosts_network),
];

const BASE: u32 = 1_000_000;

fn mappings() -> UserNamespace {
    let range = IdRange { container: 0, host: BASE, length: 65536 };
    UserNamespace { uids: range.clone(), gids: range }
}

fn sandbox_with_users() -> SandboxPlan {
    SandboxPlan { user_namespace: Some(mappings()), ..sandbox() }
}

/// A container of such a pod, its writable layer as the daemon makes it.
fn inside(lab: &Lab, script: &str, pid: Namespace) -> ContainerPlan {
    let mut plan = in_pod(lab, script, pid);
    plan.user_namespace = Some(mappings());
    let Rootfs::Overlay(overlay) = &plan.rootfs else { panic!("not an overlay") };
    std::os::unix::fs::chown(&overlay.upper, Some(BASE), Some(BASE)).unwrap();
    std::fs::set_permissions(&overlay.upper, std::fs::Permissions::from_mode(0o755)).unwrap();
    plan
}

fn sh(lab: &Lab, script: &str) -> Output {
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    lab.run_in(&pod.fds(), inside(lab, script, Namespace::Private)).unwrap()
}

fn root_is_somebody_else_on_the_host(lab: &Lab) {
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let script = "id -u; id -g; id -G; tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; cat /proc/self/setgroups; \
                  grep ^CapEff /proc/self/status | cut -f2; hostname; echo up; exec sleep 1000";
    let mut container = lab.create_in(&pod.fds(), inside(lab, script, Namespace::Private)).unwrap();
    container.start().unwrap();
    let map = format!(" 0 {BASE} 65536");
    let capabilities = format!("{DEFAULT_CAPABILITIES:016x}");
    for want in ["0", "0", "0 29", &map, &map, "allow", &capabilities, "pod-1", "up"] {
        assert_eq!(container.line(), want);
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", container.init.pid)).unwrap();
    let ids = format!("\t{BASE}").repeat(4);
    assert!(status.contains(&format!("Uid:{ids}\n")) && status.contains(&format!("Gid:{ids}\n")), "{status}");
    assert!(status.contains(&format!("Groups:\t{BASE} {} \n", BASE + 29)), "{status}");
    lab.delete(container);
}

fn owns_the_pods_namespaces(lab: &Lab) {
    // What only the owner of a namespace may do, with the capability for it.
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let mut plan = inside(
        lab,
        "ip link set lo down && cat /sys/class/net/lo/flags; hostname other && hostname; echo 7 >/proc/sys/net/ipv4/ip_default_ttl; cat /proc/sys/net/ipv4/ip_default_ttl; \
         mount -t tmpfs x /tmp && grep -c ' /tmp ' /proc/self/mountinfo",
        Namespace::Private,
    );
    let all = DEFAULT_CAPABILITIES | 1 << 12 | 1 << 21;
    plan.process.capabilities = Capabilities { bounding: all, permitted: all, effective: all, ..Capabilities::default() };
    plan.readonly_paths.clear();
    let output = lab.run_in(&pod.fds(), plan).unwrap();
    assert_eq!(output.lines(), ["0x8", "other", "7", "1"], "{}", output.stderr);
}

fn layers_keep_their_owners(lab: &Lab) {
    let layer = lab.layer(|layer| {
        for (name, owner) in [("mine", 0), ("web", 1000), ("last", 65535), ("nobody-here", 70000)] {
            std::fs::write(layer.join(name), name).unwrap();
            std::os::unix::fs::chown(layer.join(name), Some(owner), Some(owner)).unwrap();
            std::fs::set_permissions(layer.join(name), std::fs::Permissions::from_mode(0o644)).unwrap();
        }
    });
    let path = lab.path("layers").join(&layer);
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let script = "stat -c '%u:%g' / /bin /mine /web /last /nobody-here; echo x >>/mine; chown 7:8 /web; echo new >/new; mkdir /dir; rm /last; stat -c '%u:%g' /mine /web /new /dir";
    let mut plan = inside(lab, script, Namespace::Private);
    lab.on_top(&mut plan, std::slice::from_ref(&layer));
    let Rootfs::Overlay(overlay) = &plan.rootfs else { panic!("not an overlay") };
    let upper = overlay.upper.clone();
    let output = lab.run_in(&pod.fds(), plan).unwrap();
    let want = ["0:0", "0:0", "0:0", "1000:1000", "65535:65535", "65534:65534", "0:0", "7:8", "0:0", "0:0"];
    assert_eq!(output.lines(), want, "{}", output.stderr);
    let owner = |path: std::path::PathBuf| std::fs::symlink_metadata(&path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!(owner(path.join("mine")), (0, 0));
    assert_eq!(owner(path.join("web")), (1000, 1000));
    assert_eq!(std::fs::read_to_string(path.join("mine")).unwrap(), "mine");
    for (name, id, group) in [("mine", 0, 0), ("web", 7, 8), ("new", 0, 0), ("dir", 0, 0)] {
        assert_eq!(owner(upper.join(name)), (BASE + id, BASE + group), "{name}");
    }
    // Many layers, whose names don't fit into one option of fsconfig(2).
    let layers: Vec<String> = (0..60).map(|n| lab.layer(|layer| std::fs::write(layer.join(format!("f{n}")), "x").unwrap())).collect();
    let mut plan = inside(lab, "ls / | grep -c '^f[0-9]'", Namespace::Private);
    lab.on_top(&mut plan, &layers);
    assert_eq!(lab.run_in(&pod.fds(), plan).unwrap().lines(), ["60"]);
}

fn filesystems_and_streams_belong_to_root(lab: &Lab) {
    let script = "stat -c '%n %u:%g %a' /dev /dev/null /dev/pts/ptmx /dev/shm /dev/mqueue /sys/class/net/lo/ /proc/self/fd/1; echo a >/dev/null && echo null; \
                  head -c 4 /dev/zero | wc -c; echo again >/dev/stdout; touch /dev/shm/x /dev/x /dev/mqueue/q && echo wrote; \
                  echo y >/sys/fs/cgroup/x 2>&1; awk '$2 == \"/sys/fs/cgroup\" || $2 == \"/sys\" { print $2, substr($4, 1, 2) }' /proc/mounts; \
                  cat /proc/timer_list | wc -c; echo 1 >/proc/sys/kernel/sysrq";
    let output = sh(lab, script);
    let lines = output.lines();
    let want =
        ["/dev 0:0 755", "/dev/null 0:0 666", "/dev/pts/ptmx 0:0 666", "/dev/shm 0:0 1777", "/dev/mqueue 0:0 1777", "/sys/class/net/lo/ 0:0 755"];
    assert_eq!(lines[..6], want, "{}", output.stderr);
    assert!(lines[6].starts_with("/proc/self/fd/1 0:0"), "{}", lines[6]);
    assert_eq!(lines[7..11], ["null", "4", "again", "wrote"], "{}", output.stderr);
    assert!(lines[11..].contains(&"/sys ro") && lines[11..].contains(&"/sys/fs/cgroup ro"), "{lines:?}");
    assert_eq!(lines.last(), Some(&"0"), "masked");
    assert!(output.stderr.contains("/proc/sys/kernel/sysrq"), "{}", output.stderr);
}

fn root_can_do_nothing_to_the_host(lab: &Lab) {
    std::fs::write(lab.path("secret"), "secret").unwrap();
    std::fs::set_permissions(lab.path("secret"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let script = "cat /secret; chown 0 /secret; mknod /tmp/null c 1 3; mount -o remount,rw /sys/fs/cgroup && cd /sys/fs/cgroup && for f in $(find . -name cgroup.procs); do echo 1 >$f; done; \
                  echo 1 >/proc/sys/vm/drop_caches; echo -900 >/proc/self/oom_score_adj; cat /dev/disk0 | head -c 1; head -c 3 /opt/zero | wc -c; echo end";
    let mut plan = inside(lab, script, Namespace::Private);
    plan.mounts.push(bind(&lab.path("secret"), "/secret"));
    plan.process.capabilities =
        Capabilities { bounding: capability::ALL, permitted: capability::ALL, effective: capability::ALL, ..Capabilities::default() };
    plan.readonly_paths.clear();
    // A device that the host keeps for its root.
    let device = |path: &str, mode| DeviceNode { path: path.into(), kind: 'c'.into(), major: 1, minor: 5, mode, uid: 0, gid: 0 };
    plan.devices = vec![device("/dev/disk0", 0o600), device("/opt/zero", 0o666)];
    let output = lab.run_in(&pod.fds(), plan).unwrap();
    assert_eq!(output.lines(), ["3", "end"], "{}", output.stderr);
    for refused in ["'/secret': Permission", "/secret: ", "/tmp/null: ", "drop_caches", "write error", "/dev/disk0"] {
        assert!(output.stderr.contains(refused), "{refused}: {}", output.stderr);
    }
}

fn pause_and_exec(lab: &Lab) {
    let pod = lab.pod(&SandboxPlan { shared_pid: true, ..sandbox_with_users() }).unwrap();
    let (pause, _) = pod.namespaces.pause.as_ref().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pause}/status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{BASE}\t")) && status.contains("CapBnd:\t0000000000000000"), "{status}");
    assert_eq!(std::fs::read_dir(format!("/proc/{pause}/root/")).unwrap().count(), 0, "pause has a root");

    let mut plan = inside(lab, "cat /proc/1/comm; echo up; exec sleep 1000", Namespace::Pod);
    plan.process.user = User { uid: Some(1000), gid: Some(1001), supplemental: vec![50], ..User::default() };
    let mut container = lab.create_in(&pod.fds(), plan).unwrap();
    container.start().unwrap();
    assert_eq!((container.line(), container.line()), ("pause".into(), "up".into()));
    let namespaces = "for kind in user mnt net ipc uts pid cgroup; do readlink /proc/self/ns/$kind; done";
    let init: Vec<String> = ["user", "mnt", "net", "ipc", "uts", "pid", "cgroup"]
        .iter()
        .map(|kind| std::fs::read_link(format!("/proc/{}/ns/{kind}", container.init.pid)).unwrap().to_str().unwrap().into())
        .collect();
    let exec = |process: Process| lab.exec_in(&pod.fds(), &container, ExecPlan { process, timeout_ms: 0 });
    let script = format!("{namespaces}; id -u; echo again >/dev/stdout; touch /made; stat -c %u /made; ulimit -n");
    let output = exec(shell(&script)).unwrap().output();
    assert_eq!(output.lines()[..7], init, "{}", output.stderr);
    assert_eq!(output.lines()[7..], ["0", "again", "0", "1024"], "{}", output.stderr);
    let user = User { uid: Some(1000), gid: Some(1001), supplemental: vec![50], ..User::default() };
    let output = exec(Process { user, ..shell("id -u; id -G; echo again >/dev/stderr; cat /proc/1/environ 2>/dev/null; kill -9 1; echo $?") })
        .unwrap()
        .output();
    assert_eq!((output.lines(), output.stderr.lines().next()), (vec!["1000", "1001 29 50", "1"], Some("again")), "{}", output.stderr);
    // One that goes on is killed with all it has started.
    let mut running = exec(shell("(setsid sleep 1002 &); trap '' TERM; echo up; sleep 1003")).unwrap();
    assert_eq!(running.line(), "up");
    running.kill();
    assert_eq!(running.output().code, 137);
    let output = exec(shell("ps -o args | grep -c 'sleep 100[23]$'")).unwrap().output();
    assert_eq!(output.lines(), ["0"]);
    // The pod's namespace is the one to join, and it must be held.
    fails(
        lab.exec(&container, ExecPlan { process: shell("true"), timeout_ms: 0 }).map(|_| ()),
        Kind::FailedPrecondition,
        "user namespace of the pod",
    );
    let beyond = User { uid: Some(70000), ..User::default() };
    fails(exec(Process { user: beyond, ..shell("true") }).map(|_| ()), Kind::InvalidArgument, "user 70000 is outside of the mapping");
    lab.delete(container);
    pod.stop(libc::SIGKILL).unwrap();
}

fn binds_are_mapped(lab: &Lab) {
    std::fs::create_dir(lab.path("volume")).unwrap();
    std::fs::write(lab.path("volume/root"), "").unwrap();
    std::fs::write(lab.path("volume/web"), "").unwrap();
    std::os::unix::fs::chown(lab.path("volume/web"), Some(1000), Some(1001)).unwrap();
    let run = |idmap: Option<UserNamespace>, pod: Option<UserNamespace>| {
        let script = "stat -c '%u:%g' /volume/root /volume/web; touch /volume/new && stat -c '%u:%g' /volume/new; rm -f /volume/new";
        let held = lab.pod(&SandboxPlan { user_namespace: pod.clone(), ..sandbox() }).unwrap();
        let mut plan = if pod.is_some() { inside(lab, script, Namespace::Private) } else { in_pod(lab, script, Namespace::Private) };
        let mut mount = bind(&lab.path("volume"), "/volume");
        if let MountKind::Bind(bind) = &mut mount.kind {
            bind.idmap = idmap;
        }
        plan.mounts.push(mount);
        lab.run_in(&held.fds(), plan)
    };
    let lines = |idmap, pod| run(idmap, pod).unwrap().stdout;
    assert_eq!(lines(Some(mappings()), Some(mappings())), "0:0\n1000:1001\n0:0\n");
    // Not mapped: the files of others.
    assert_eq!(lines(None, Some(mappings())), "65534:65534\n65534:65534\n");
    // Other mappings than the pod's: 1000 on disk is the container's 0.
    let one = |host| IdRange { container: 1000, host, length: 2 };
    assert_eq!(lines(Some(UserNamespace { uids: one(BASE), gids: one(BASE) }), Some(mappings())), "65534:65534\n0:1\n");
    // And without a user namespace.
    assert_eq!(lines(Some(UserNamespace { uids: one(50), gids: one(60) }), None), "65534:65534\n50:61\n");
    assert_eq!(std::fs::metadata(lab.path("volume/web")).unwrap().uid(), 1000);
    // A filesystem that can't: its type and its path are in the error.
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let mut plan = inside(lab, "true", Namespace::Private);
    let idmap = Some(mappings());
    plan.mounts.push(Mount {
        target: "/p".into(),
        kind: MountKind::Bind(Bind { source: "/proc/sys".into(), idmap, ..Bind::default() }),
        ..Mount::default()
    });
    fails(lab.run_in(&pod.fds(), plan), Kind::FailedPrecondition, "cannot map the ids of /proc/sys, whose filesystem is proc");
    let none = UserNamespace { uids: IdRange { container: 1, host: BASE, length: 5 }, gids: IdRange { container: 0, host: BASE, length: 5 } };
    fails(lab.pod(&SandboxPlan { user_namespace: Some(none), ..sandbox() }).map(|_| ()), Kind::InvalidArgument, "mapped to nothing");
}

fn images_and_volumes(lab: &Lab) {
    let layer = lab.layer(|layer| {
        std::fs::create_dir_all(layer.join("data/below")).unwrap();
        for (name, owner) in [("data", 1000), ("data/below", 7), ("data/file", 0)] {
            if name == "data/file" {
                std::fs::write(layer.join(name), "content\n").unwrap();
            }
            std::os::unix::fs::chown(layer.join(name), Some(owner), Some(owner)).unwrap();
        }
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, layer.join("data/zero"), rustix::fs::FileType::CharacterDevice, mode, rustix::fs::makedev(1, 5))
            .unwrap();
    });
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let script = "stat -c '%u:%g' /data /data/below /data/file /image/data /image/data/file /part /part/file; cat /data/file /image/data/file /part/file; \
                  echo x >/data/new && stat -c '%u:%g' /data/new; touch /image/x || touch /part/x || echo read-only; test -e /data/zero || echo no device; \
                  stat -c '%u:%g' /empty; touch /empty/x && echo writable";
    let mut plan = inside(lab, script, Namespace::Private);
    lab.on_top(&mut plan, std::slice::from_ref(&layer));
    plan.mounts.push(volume(lab, "volume", "/data"));
    plan.mounts.push(volume(lab, "empty", "/empty"));
    plan.mounts.push(image(lab, std::slice::from_ref(&layer), "", "/image"));
    plan.mounts.push(image(lab, std::slice::from_ref(&layer), "data", "/part"));
    let output = lab.run_in(&pod.fds(), plan).unwrap();
    let owners = ["1000:1000", "7:7", "0:0", "1000:1000", "0:0", "1000:1000", "0:0"];
    let rest = ["content", "content", "content", "0:0", "read-only", "no device", "0:0", "writable"];
    assert_eq!(output.lines(), [owners.as_slice(), &rest].concat(), "{}", output.stderr);
    // On disk a volume has the ids that the container sees, as layers have.
    let owner = |name: &str| std::fs::symlink_metadata(lab.path("volume").join(name)).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!([owner(""), owner("below"), owner("file"), owner("new")], [(1000, 1000), (7, 7), (0, 0), (0, 0)]);
}

fn users_beyond_the_mapping(lab: &Lab) {
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let run = |user: User| {
        let mut plan = inside(lab, "id -u; id -G", Namespace::Private);
        plan.process.user = user;
        lab.run_in(&pod.fds(), plan)
    };
    assert_eq!(run(User { uid: Some(65535), gid: Some(65535), ..User::default() }).unwrap().lines(), ["65535", "65535"]);
    assert_eq!(run(User { name: "web".into(), ..User::default() }).unwrap().lines(), ["1000", "1001 29 50"]);
    fails(run(User { uid: Some(65536), ..User::default() }), Kind::InvalidArgument, "user 65536 is outside of the mapping");
    fails(run(User { uid: Some(1), gid: Some(99999), ..User::default() }), Kind::InvalidArgument, "group 99999 is outside");
    fails(run(User { uid: Some(1), supplemental: vec![70000], ..User::default() }), Kind::InvalidArgument, "group 70000 is outside");
    fails(lab.run(inside(lab, "true", Namespace::Private)), Kind::FailedPrecondition, "user namespace of the pod");
}

fn limits_and_sysctls(lab: &Lab) {
    let sysctls = [("kernel.shm_rmid_forced", "1"), ("fs.mqueue.msg_max", "12"), ("net.ipv4.ping_group_range", "0 2147483647")];
    let sysctls = sysctls.map(|(name, value)| (name.to_string(), value.to_string())).to_vec();
    let pod = lab.pod(&SandboxPlan { sysctls, ..sandbox_with_users() }).unwrap();
    let mut plan =
        inside(lab, "ulimit -n; cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max; cat /proc/self/oom_score_adj", Namespace::Private);
    plan.process.rlimits = vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 12, hard: 12 }];
    plan.process.oom_score_adj = Some(321);
    let output = lab.run_in(&pod.fds(), plan).unwrap();
    assert_eq!(output.lines(), ["12", "1", "12", "321"], "{}", output.stderr);
}

fn terminal(lab: &Lab) {
    let pod = lab.pod(&sandbox_with_users()).unwrap();
    let mut plan = inside(lab, "tty; stat -c '%u:%g' $(tty) /dev/console; echo again >/dev/tty; exec sleep 1000", Namespace::Private);
    plan.process.terminal = true;
    plan.process.user = User { uid: Some(1000), gid: Some(1001), ..User::default() };
    let mut container = lab.create_in(&pod.fds(), plan).unwrap();
    let console = container.init.console.take().unwrap();
    container.start().unwrap();
    for want in ["/dev/pts/0\r", "1000:5\r", "1000:5\r", "again\r"] {
        assert_eq!(line(console.as_fd()), want);
    }
    let mut process = shell("tty; stat -c '%u:%g' $(tty); echo again >/dev/tty");
    process.terminal = true;
    let mut exec = lab.exec_in(&pod.fds(), &container, ExecPlan { process, timeout_ms: 0 }).unwrap();
    let console = exec.started.console.take().unwrap();
    assert_eq!(read_all(console, "a terminal"), "/dev/pts/1\r\n0:5\r\nagain\r\n");
    assert_eq!(exec.output().code, 0);
    lab.delete(container);
}

fn on_the_hosts_network(lab: &Lab) {
    let pod = lab.pod(&SandboxPlan { new_net: false, new_uts: false, hostname: String::new(), ..sandbox_with_users() }).unwrap();
    let mut plan = inside(
        lab,
        "readlink /proc/self/ns/net; readlink /proc/self/ns/uts; ls /sys/class/net | grep -c .; ip link set lo down; id -u",
        Namespace::Private,
    );
    (plan.namespaces.net, plan.namespaces.uts) = (Namespace::Host, Namespace::Host);
    plan.process.capabilities =
        Capabilities { bounding: capability::ALL, permitted: capability::ALL, effective: capability::ALL, ..Capabilities::default() };
    let output = lab.run_in(&pod.fds(), plan).unwrap();
    let own = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_str().unwrap().to_string();
    let interfaces = std::fs::read_dir("/sys/class/net").unwrap().count().to_string();
    assert_eq!(output.lines(), [&own("net"), &own("uts"), &interfaces, "0"], "{}", output.stderr);
    assert!(output.stderr.contains("Operation not permitted"), "{}", output.stderr);
}
