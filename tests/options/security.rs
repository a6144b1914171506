//! LinuxContainerSecurityContext: users, capabilities, what is read-only or hidden. Its profiles and labels are in `profiles`.

use copepod::api;
use copepod::plan::capability;
use tonic::Code;

use super::harness::Test;
use super::node::{Node, image_spec};
use super::observe::{Running, number, output_of, privileged_pod, refused, run, run_whole, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("security_user_by_number", user_by_number),
    ("security_user_by_name", user_by_name),
    ("security_groups", groups),
    ("security_capabilities", capabilities),
    ("security_privileged", privileged),
    ("security_no_new_privs", no_new_privs),
    ("security_readonly_rootfs", readonly_rootfs),
    ("security_masked_paths", masked_paths),
    ("security_readonly_paths", readonly_paths),
];

type Change = Box<dyn Fn(&mut api::ContainerConfig)>;

fn change(with: impl Fn(&mut api::LinuxContainerSecurityContext) + 'static) -> Change {
    Box::new(move |config| security(config, &with))
}

fn user_by_number(node: &mut Node) {
    let set = |user: i64, group: Option<i64>| {
        move |config: &mut api::ContainerConfig| {
            security(config, |s| {
                s.run_as_user = number(user);
                s.run_as_group = group.and_then(number);
            });
        }
    };
    assert_eq!(output_of(node, "id -u; id -g", same, set(1234, Some(4321))), "1234\n4321\n");
    assert_eq!(output_of(node, "id -u; id -g; echo $HOME", same, set(33, None)), "33\n33\n/var/www\n");
    refused(node, same, set(-1, None), Code::InvalidArgument, &["run_as_user", "-1"]);
    refused(node, same, set(1 << 32, None), Code::InvalidArgument, &["run_as_user", "4294967296"]);
    refused(node, same, set(1, Some(i64::from(u32::MAX))), Code::InvalidArgument, &["run_as_group", "4294967295"]);
    refused(node, same, change(|s| s.run_as_group = number(7)), Code::InvalidArgument, &["run_as_group", "7", "without run_as_user"]);
}

fn user_by_name(node: &mut Node) {
    let named = |name: &'static str, group: Option<i64>| {
        move |config: &mut api::ContainerConfig| {
            security(config, |s| {
                s.run_as_username = name.into();
                s.run_as_group = group.and_then(number);
            });
        }
    };
    assert_eq!(output_of(node, "id -u; id -g; echo $HOME", same, named("www-data", None)), "33\n33\n/var/www\n");
    assert_eq!(output_of(node, "id -u; id -g", same, named("www-data", Some(7))), "33\n7\n");
    // A number as text, as images have it, whether /etc/passwd knows it or not.
    assert_eq!(output_of(node, "id -u; id -g", same, named("33", None)), "33\n33\n");
    assert_eq!(output_of(node, "id -u; id -g", same, named("5000", None)), "5000\n0\n");
    // An exec'd process is who the container is, whatever its root has made of the names meanwhile.
    let running = Running::new(node, same, named("www-data", None));
    let root = format!("/proc/{}/root/etc/passwd", running.pid());
    std::fs::write(root, "www-data:x:0:0:root:/evil:/bin/sh\n").unwrap();
    assert_eq!(running.exec("id -u; id -g"), "33\n33\n");
    drop(running);
    refused(node, same, named("nobody-here", None), Code::InvalidArgument, &["nobody-here", "/etc/passwd"]);
    refused(node, same, named("4294967295", None), Code::InvalidArgument, &["4294967295", "out of range"]);
    refused(node, same, named("a\nb", None), Code::InvalidArgument, &["run_as_username"]);
    let both = change(|s| {
        s.run_as_user = number(1);
        s.run_as_username = "www-data".into();
    });
    refused(node, same, both, Code::InvalidArgument, &["run_as_username", "www-data", "run_as_user"]);
}

fn groups(node: &mut Node) {
    const IMAGE: &str = "registry.k8s.io/k8s-staging-cri-tools/test-image-predefined-group:latest";
    node.pull(IMAGE);
    // User 1000 of the image is in its group 50000.
    let check = |policy: api::SupplementalGroupsPolicy, listed: &[i64], primary: Option<i64>, want: &[i64]| {
        let (status, output) = run_whole(node, "sed -n 's/^Groups:[[:space:]]*//p' /proc/self/status", same, |config| {
            config.image = Some(image_spec(IMAGE));
            security(config, |s| {
                s.run_as_user = primary.and_then(|_| number(1000));
                s.run_as_group = primary.and_then(number);
                s.supplemental_groups = listed.to_vec();
                s.supplemental_groups_policy = policy.into();
            });
        })
        .unwrap();
        let seen: Vec<i64> = output.split_whitespace().map(|group| group.parse().unwrap()).collect();
        let user = status.user.unwrap().linux.unwrap();
        let sorted = |mut groups: Vec<i64>| {
            groups.sort_unstable();
            groups
        };
        assert_eq!((status.exit_code, sorted(seen)), (0, want.to_vec()), "{policy:?} {listed:?}");
        assert_eq!((user.uid, user.gid, sorted(user.supplemental_groups)), (1000, primary.unwrap_or(1000), want.to_vec()), "{policy:?} {listed:?}");
    };
    use api::SupplementalGroupsPolicy::{Merge, Strict};
    check(Merge, &[], None, &[1000, 50000]);
    check(Merge, &[60000], None, &[1000, 50000, 60000]);
    check(Merge, &[60000], Some(7), &[7, 50000, 60000]);
    check(Strict, &[], None, &[1000]);
    check(Strict, &[60000, 60000], None, &[1000, 60000]);
    check(Strict, &[60000], Some(7), &[7, 60000]);
    refused(node, same, change(|s| s.supplemental_groups = vec![-1]), Code::InvalidArgument, &["supplemental_groups", "-1"]);
    refused(node, same, change(|s| s.supplemental_groups = vec![u32::MAX.into()]), Code::InvalidArgument, &["supplemental_groups", "4294967295"]);
    refused(node, same, change(|s| s.supplemental_groups_policy = 9), Code::InvalidArgument, &["supplemental_groups_policy", "9"]);
}

/// The sets of a process, from its status: inheritable, permitted, effective, bounding, ambient.
fn sets(output: &str) -> [u64; 5] {
    let set = |name: &str| {
        let line = output.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} in {output}"));
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].map(set)
}

fn capabilities(node: &mut Node) {
    const DEFAULTS: [&str; 14] = [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ];
    // Nobody has more than this node's own.
    let own = copepod::sys::creds::bounding();
    let mask = |names: &[&str]| names.iter().fold(0, |mask, name| mask | capability::parse(name).unwrap()) & own;
    let list = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let wanted = |add: &[&str], drop: &[&str], ambient: &[&str]| api::Capability {
        add_capabilities: list(add),
        drop_capabilities: list(drop),
        add_ambient_capabilities: list(ambient),
    };
    let check = |user: i64, asked: api::Capability, bounding: u64, ambient: u64| {
        let set = |config: &mut api::ContainerConfig| {
            security(config, |s| {
                s.run_as_user = number(user);
                s.capabilities = Some(asked.clone());
            });
        };
        // Another user than root has of execve only what is ambient.
        let effective = if user == 0 { bounding } else { ambient };
        let want = [ambient, effective, effective, bounding, ambient];
        let status = "grep ^Cap /proc/self/status";
        assert_eq!(sets(&output_of(node, status, same, set)), want, "{user} {asked:?}");
        // An exec'd process has the same.
        assert_eq!(sets(&Running::new(node, same, set).exec(status)), want, "exec: {user} {asked:?}");
    };
    let defaults = mask(&DEFAULTS);
    check(0, wanted(&[], &[], &[]), defaults, 0);
    check(0, wanted(&["NET_ADMIN"], &["CAP_CHOWN"], &[]), (defaults | mask(&["NET_ADMIN"])) & !mask(&["CHOWN"]), 0);
    check(0, wanted(&["ALL"], &[], &[]), own, 0);
    check(0, wanted(&["ALL"], &["SYS_ADMIN"], &[]), own & !mask(&["SYS_ADMIN"]), 0);
    check(0, wanted(&["KILL"], &["ALL"], &[]), mask(&["KILL"]), 0);
    check(1000, wanted(&[], &[], &[]), defaults, 0);
    check(
        1000,
        wanted(&["NET_ADMIN"], &[], &["NET_BIND_SERVICE", "SYS_TIME"]),
        defaults | mask(&["NET_ADMIN", "SYS_TIME"]),
        mask(&["NET_BIND_SERVICE", "SYS_TIME"]),
    );
    check(1000, wanted(&[], &["ALL"], &["KILL"]), mask(&["KILL"]), mask(&["KILL"]));
    for bad in [wanted(&["FLY"], &[], &[]), wanted(&[], &["FLY"], &[]), wanted(&[], &[], &["FLY"])] {
        refused(node, same, change(move |s| s.capabilities = Some(bad.clone())), Code::InvalidArgument, &["capabilities", "FLY"]);
    }
    let both = wanted(&[], &["KILL"], &["KILL"]);
    refused(node, same, change(move |s| s.capabilities = Some(both.clone())), Code::InvalidArgument, &["KILL", "drop_capabilities"]);
}

fn privileged(node: &mut Node) {
    let set = change(|s| {
        s.privileged = true;
        // What a privileged container has nothing of.
        s.capabilities = Some(api::Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
        s.seccomp = Some(api::SecurityProfile::default());
        s.masked_paths = vec!["/etc/passwd".into()];
        s.readonly_paths = vec!["/tmp".into()];
    });
    let script = "grep ^Cap /proc/self/status; grep ^Seccomp: /proc/self/status; grep -c root /etc/passwd; mkdir -p /tmp; touch /tmp/x && echo written; \
                  test -c /dev/kmsg && echo kmsg; awk '$2 == \"/sys\" { print substr($4, 1, 2) }' /proc/mounts";
    let output = output_of(node, script, privileged_pod, &set);
    let own = copepod::sys::creds::bounding();
    assert_eq!(sets(&output), [0, own, own, own, 0]);
    let rest: Vec<&str> = output.lines().filter(|line| !line.starts_with("Cap")).collect();
    assert_eq!(rest, ["Seccomp:\t0", "1", "written", "kmsg", "rw"]);
    refused(node, same, set, Code::InvalidArgument, &["privileged", "sandbox that is not privileged"]);
}

fn no_new_privs(node: &mut Node) {
    let read = "sed -n 's/^NoNewPrivs:[[:space:]]*//p' /proc/self/status";
    for set in [true, false] {
        let with = change(move |s| s.no_new_privs = set);
        let want = format!("{}\n", u8::from(set));
        assert_eq!(output_of(node, read, same, &with), want);
        assert_eq!(Running::new(node, same, &with).exec(read), want);
    }
}

fn readonly_rootfs(node: &mut Node) {
    let write = "touch /etc/x 2>&1 | grep -o 'Read-only file system'; touch /dev/shm/x && echo shm; test ! -e /made || echo made";
    assert_eq!(output_of(node, write, same, change(|s| s.readonly_rootfs = true)), "Read-only file system\nshm\n");
    assert_eq!(run(node, "touch /etc/x", same, change(|s| s.readonly_rootfs = false)).unwrap().0, 0);
    // The working directory is made before.
    let both = |config: &mut api::ContainerConfig| {
        config.working_dir = "/made".into();
        security(config, |s| s.readonly_rootfs = true);
    };
    assert_eq!(output_of(node, "pwd", same, both), "/made\n");
}

fn masked_paths(node: &mut Node) {
    let masked = |paths: &'static [&'static str]| change(move |s| s.masked_paths = paths.iter().map(|path| path.to_string()).collect());
    let script = "wc -c </etc/passwd; ls /proc/irq /var/www | grep -c .; test -e /not/there || echo absent";
    assert_eq!(output_of(node, "grep -c root /etc/passwd", same, masked(&[])), "1\n");
    let all = masked(&["/etc/passwd", "/proc/irq", "/not/there"]);
    let output = output_of(node, script, same, all);
    assert_eq!(output.lines().next(), Some("0"), "{output}");
    assert!(output.ends_with("absent\n"), "{output}");
    assert_eq!(output_of(node, "ls /proc/irq | wc -l; touch /proc/irq/x 2>/dev/null || echo refused", same, masked(&["/proc/irq"])), "0\nrefused\n");
    assert_eq!(Running::new(node, same, masked(&["/etc/passwd", "/etc/group"])).exec("id -u; wc -c </etc/passwd"), "0\n0\n");
    refused(node, same, masked(&["etc/passwd"]), Code::InvalidArgument, &["masked_paths", "etc/passwd"]);
}

fn readonly_paths(node: &mut Node) {
    let readonly = |paths: &'static [&'static str]| change(move |s| s.readonly_paths = paths.iter().map(|path| path.to_string()).collect());
    let script = "touch /etc/x 2>&1 | grep -o 'Read-only file system'; touch /x && echo root; echo 1 2>/dev/null >/etc/passwd || echo file";
    assert_eq!(output_of(node, script, same, readonly(&["/etc", "/not/there"])), "Read-only file system\nroot\nfile\n");
    assert_eq!(run(node, "touch /etc/x", same, readonly(&[])).unwrap().0, 0);
    refused(node, same, readonly(&["../etc"]), Code::InvalidArgument, &["readonly_paths", "../etc"]);
}
