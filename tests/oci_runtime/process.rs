//! What a container's process is: user, capabilities, seccomp, limits, environment, program.

use copepod::errchain::Kind;
use copepod::plan::*;
use copepod::wire::Bytes;

use super::driver::*;

pub const TESTS: &[super::Test] = &[
    ("users_by_number_and_name", users_by_number_and_name),
    ("capabilities_are_exactly_the_plans", capabilities_are_exactly_the_plans),
    ("capabilities_that_are_not_there_are_an_error", capabilities_that_are_not_there_are_an_error),
    ("seccomp_and_no_new_privileges", seccomp_and_no_new_privileges),
    ("limits_are_the_plans_or_the_kernels", limits_are_the_plans_or_the_kernels),
    ("what_a_program_inherits", what_a_program_inherits),
    ("programs_are_found_as_the_user_would", programs_are_found_as_the_user_would),
    ("the_working_directory", the_working_directory),
    ("streams_belong_to_the_user", streams_belong_to_the_user),
];

fn users_by_number_and_name(lab: &Lab) {
    let check = |user: User, want: (&str, &str, u32, u32, &[u32], &str)| {
        let mut plan = lab.plan("id -u; id -g; id -G; echo $HOME; stat -c %u /proc/self/stat; umask");
        plan.process.user = user;
        let mut container = lab.create(plan).unwrap();
        let resolved = container.init.user.clone();
        container.start().unwrap();
        let output = container.output();
        let (ids, groups, uid, gid, all, home) = want;
        let (shown_uid, shown_gid) = ids.split_once(':').unwrap();
        // The kernel keeps groups sorted; `id` puts the primary one first.
        assert_eq!(output.lines(), [shown_uid, shown_gid, groups, home, shown_uid, "0022"], "{}", output.stderr);
        assert_eq!((resolved.uid, resolved.gid, resolved.groups.as_slice(), resolved.home.to_str().unwrap()), (uid, gid, all, home));
        lab.delete(container);
    };
    let named = |name: &str| User { name: name.into(), ..User::default() };
    check(User::default(), ("0:0", "0 29", 0, 0, &[0, 29], "/root"));
    check(named("web"), ("1000:1001", "1001 29 50", 1000, 1001, &[1001, 50, 29], "/home/web"));
    check(
        User { uid: Some(1000), supplemental: vec![7], ..User::default() },
        ("1000:1001", "1001 7 29 50", 1000, 1001, &[1001, 50, 29, 7], "/home/web"),
    );
    let strict = User { policy: GroupsPolicy::Strict, group: "audio".into(), ..named("1000") };
    check(strict, ("1000:29", "29", 1000, 29, &[29], "/home/web"));
    check(User { uid: Some(4_000_000_000), ..User::default() }, ("4000000000:0", "0", 4_000_000_000, 0, &[0], "/"));

    let mut plan = lab.plan("echo $HOME");
    plan.process.env.push("HOME=/else/where".into());
    assert_eq!(lab.run(plan).unwrap().lines(), ["/else/where"]);
}

/// CapInh, CapPrm, CapEff, CapBnd, CapAmb of the program.
fn sets(lab: &Lab, change: impl FnOnce(&mut Process)) -> Vec<u64> {
    let mut plan = lab.plan("");
    plan.process.args = ["grep", "^Cap", "/proc/self/status"].map(Into::into).to_vec();
    change(&mut plan.process);
    let output = lab.run(plan).unwrap();
    output.lines().iter().map(|line| u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()).collect()
}

const NET_RAW: u64 = 1 << 13;
const KILL: u64 = 1 << 5;

fn capabilities_are_exactly_the_plans(lab: &Lab) {
    let set = DEFAULT_CAPABILITIES;
    let user = |uid| move |process: &mut Process| process.user.uid = Some(uid);
    let with = |uid: u32, capabilities: Capabilities| {
        move |process: &mut Process| {
            process.user.uid = Some(uid);
            process.capabilities = capabilities;
        }
    };
    assert_eq!(sets(lab, user(0)), [0, set, set, set, 0]);
    // Another user has none after execve, and could only get back what is in the bounding set.
    assert_eq!(sets(lab, user(1000)), [0, 0, 0, set, 0]);
    assert_eq!(sets(lab, with(0, Capabilities::default())), [0, 0, 0, 0, 0]);
    let ambient = Capabilities { bounding: NET_RAW | KILL, permitted: NET_RAW, effective: NET_RAW, inheritable: NET_RAW, ambient: NET_RAW };
    assert_eq!(sets(lab, with(1000, ambient)), [NET_RAW, NET_RAW, NET_RAW, NET_RAW | KILL, NET_RAW]);
    // A filter without no_new_privs takes CAP_SYS_ADMIN to load; none of it is left.
    for uid in [0, 1000] {
        let change = |process: &mut Process| {
            process.user.uid = Some(uid);
            process.seccomp = allow_all();
        };
        let left = if uid == 0 { set } else { 0 };
        assert_eq!(sets(lab, change), [0, left, left, set, 0]);
    }
}

fn capabilities_that_are_not_there_are_an_error(lab: &Lab) {
    let bounding = copepod::sys::creds::bounding();
    let Some(missing) = (0..41).find(|bit| bounding & (1 << bit) == 0) else { return };
    let mut plan = lab.plan("true");
    plan.process.capabilities.bounding |= 1 << missing;
    fails(lab.create(plan), Kind::PermissionDenied, "CAP_");
    let mut plan = lab.plan("true");
    plan.process.capabilities.permitted |= 1 << 62;
    fails(lab.create(plan), Kind::PermissionDenied, "number 62");
}

fn instructions(list: &[(u16, u8, u8, u32)]) -> Bytes {
    Bytes(list.iter().flat_map(|(code, jt, jf, k)| [&code.to_ne_bytes()[..], &[*jt, *jf], &k.to_ne_bytes()].concat()).collect())
}

const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

fn allow_all() -> Bytes {
    instructions(&[(RETURN, 0, 0, ALLOW)])
}

/// Refuses one system call with an error number.
fn refuse(number: i64, errno: i32) -> Bytes {
    instructions(&[(LOAD, 0, 0, 0), (EQUAL, 0, 1, number as u32), (RETURN, 0, 0, ERRNO | errno as u32), (RETURN, 0, 0, ALLOW)])
}

fn seccomp_and_no_new_privileges(lab: &Lab) {
    let script = "grep -E '^(NoNewPrivs|Seccomp|Seccomp_filters):' /proc/self/status | tr -d '\\t'; hostname x || echo refused";
    for (uid, privileges) in [(0, true), (0, false), (1000, true), (1000, false)] {
        let mut plan = lab.plan(script);
        plan.process.user.uid = Some(uid);
        plan.process.no_new_privileges = privileges;
        plan.process.seccomp = refuse(libc::SYS_sethostname, libc::EBADE);
        let output = lab.run(plan).unwrap();
        let flag = if privileges { "NoNewPrivs:1" } else { "NoNewPrivs:0" };
        assert_eq!(output.lines(), [flag, "Seccomp:2", "Seccomp_filters:1", "refused"], "{uid} {privileges}");
        assert!(output.stderr.contains("Invalid exchange"), "{}", output.stderr);
    }
    let output = lab.sh(script);
    assert_eq!(output.lines()[..2], ["NoNewPrivs:0", "Seccomp:0"]);
    // A filter that forbids what is still to be done is an error, and never a container without it.
    let mut plan = lab.plan("true");
    plan.process.seccomp = refuse(libc::SYS_capset, libc::EPERM);
    fails(lab.run(plan), Kind::Internal, "cannot set the effective capabilities");
    let mut plan = lab.plan("true");
    plan.process.seccomp = Bytes(vec![0; 12]);
    fails(lab.run(plan), Kind::Internal, "cannot load the seccomp filter");
}

fn limits_are_the_plans_or_the_kernels(lab: &Lab) {
    let mut plan = lab.plan("cat /proc/self/limits");
    plan.process.rlimits.push(Rlimit { resource: libc::RLIMIT_CORE, soft: 11, hard: 4096 });
    plan.process.rlimits.push(Rlimit { resource: libc::RLIMIT_CPU, soft: 1000, hard: 2000 });
    let output = lab.run(plan).unwrap();
    let limits = |name: &str| -> Vec<String> {
        let line = output.lines().into_iter().find(|line| line.starts_with(name)).unwrap().to_string();
        line[name.len()..].split_whitespace().take(2).map(str::to_string).collect()
    };
    assert_eq!(limits("Max core file size"), ["11", "4096"]);
    assert_eq!(limits("Max cpu time"), ["1000", "2000"]);
    assert_eq!(limits("Max open files"), ["1024", "4096"]);
    assert_eq!(limits("Max stack size"), ["8388608", "unlimited"]);
    assert_eq!(limits("Max msgqueue size"), ["819200", "819200"]);
    assert_eq!(limits("Max nice priority"), ["0", "0"]);
    assert_eq!(limits("Max locked memory"), ["8388608", "8388608"]);

    // Beyond fs.nr_open nobody gets, whatever their capabilities.
    let mut plan = lab.plan("true");
    plan.process.rlimits = vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 1 << 31, hard: 1 << 31 }];
    fails(lab.create(plan), Kind::PermissionDenied, "cannot set limit RLIMIT_NOFILE to 2147483648:2147483648");
}

fn what_a_program_inherits(lab: &Lab) {
    let mut plan = lab.plan(
        "grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status | tr -d '\\t'; cat /proc/self/oom_score_adj; cat /proc/self/sessionid >/dev/null; \
         ps -o pid,sid | tail -1 | tr -s ' '; env | sort",
    );
    plan.process.args = [&plan.process.args[..2], &plan.process.args[2..]].concat();
    plan.process.oom_score_adj = Some(500);
    plan.process.env.push("EMPTY=".into());
    plan.process.env.push("TWO=a=b".into());
    let output = lab.run(plan).unwrap();
    let lines = output.lines();
    assert_eq!(lines[..2], ["SigBlk:0000000000000000", "SigIgn:0000000000000000"], "{}", output.stderr);
    assert_eq!(lines[3], "500");
    for variable in ["EMPTY=", "HOME=/root", "PATH=/bin", "TWO=a=b"] {
        assert!(lines.contains(&variable), "{variable}: {}", output.stdout);
    }
    let mut plan = lab.plan("true");
    plan.process.env.push("BAD=a\0b".into());
    fails(lab.create(plan), Kind::InvalidArgument, "environment variable \"BAD=a\\0b\" has a NUL byte");
    let mut plan = lab.plan("cat /proc/self/oom_score_adj");
    plan.process.oom_score_adj = None;
    let current: i32 = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap();
    assert_eq!(lab.run(plan).unwrap().lines(), [current.max(0).to_string()]);
}

fn programs_are_found_as_the_user_would(lab: &Lab) {
    let layer = lab.layer(|root| {
        use std::os::unix::fs::PermissionsExt;
        let write = |name: &str, text: &str, mode| {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        write("first/tool", "#!/bin/sh\necho first\n", 0o644);
        write("second/tool", "#!/bin/sh\necho second $0\n", 0o755);
        write("second/plain", "no script\n", 0o755);
        write("second/orphan", "#!/missing/sh\n", 0o755);
        write("second/private", "#!/bin/sh\necho private\n", 0o700);
        std::fs::create_dir_all(root.join("first/dir")).unwrap();
    });
    let run = |args: &[&str], path: &str, uid: u32| {
        let mut plan = lab.plan("");
        lab.on_top(&mut plan, std::slice::from_ref(&layer));
        plan.process = program(args);
        plan.process.env = vec![path.into()];
        plan.process.user.uid = Some(uid);
        lab.run(plan)
    };
    let path = "PATH=/first:/second:/bin";
    assert_eq!(run(&["tool"], path, 0).unwrap().stdout, "second /second/tool\n");
    assert_eq!(run(&["private"], path, 0).unwrap().stdout, "private\n");
    assert_eq!(run(&["echo", "default"], "X=", 0).unwrap().stdout, "default\n");
    assert_eq!(run(&["/bin/echo", "a b"], path, 0).unwrap().stdout, "a b\n");
    assert_eq!(run(&["bin/echo", "relative"], path, 0).unwrap().stdout, "relative\n");
    let refused = |args: &[&str], uid: u32, text: &str| fails(run(args, path, uid), Kind::InvalidArgument, text);
    refused(&["nothing"], 0, "exec: \"nothing\": executable file not found in $PATH");
    refused(&["dir"], 0, "exec: \"dir\": executable file not found in $PATH");
    refused(&["private"], 1000, "exec: \"/second/private\": Permission denied");
    refused(&["plain"], 0, "exec: \"/second/plain\": Exec format error");
    refused(&["orphan"], 0, "exec: \"/second/orphan\": No such file");
    refused(&["/no/thing"], 0, "exec: \"/no/thing\": No such file");
    refused(&["/second"], 0, "exec: \"/second\": Permission denied");
    refused(&[""], 0, "names no program");
}

fn the_working_directory(lab: &Lab) {
    let at = |cwd: &str, uid: u32| {
        let mut plan = lab.plan("pwd; stat -c '%a %u' .");
        plan.process.cwd = cwd.into();
        plan.process.user.uid = Some(uid);
        lab.run(plan)
    };
    assert_eq!(at("", 0).unwrap().lines()[0], "/");
    assert_eq!(at("/a/b", 1000).unwrap().lines(), ["/a/b", "755 0"]);
    assert_eq!(at("/tmp/../home/web", 1000).unwrap().lines()[0], "/home/web");
    fails(at("/etc/passwd", 0), Kind::InvalidArgument, "not a directory");
    fails(at("relative", 0), Kind::InvalidArgument, "no absolute path");
}

fn streams_belong_to_the_user(lab: &Lab) {
    let mut plan = lab.plan("echo out >/dev/stdout; echo err >/dev/stderr; stat -L -c %u /dev/stdout /dev/null");
    plan.process.user.uid = Some(1000);
    let output = lab.run(plan).unwrap();
    assert_eq!((output.lines(), output.stderr.as_str()), (vec!["out", "1000", "0"], "err\n"));
    let (stdin, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut container = lab.create_with(&Default::default(), lab.plan("cat; echo end"), Some(stdin)).unwrap();
    container.start().unwrap();
    rustix::io::write(&write, b"typed\n").unwrap();
    drop(write);
    assert_eq!(container.output().lines(), ["typed", "end"]);
    lab.delete(container);
}
