//! Control groups on the kernel's own hierarchies, as root: in groups of the test's own at the top.
//!
//! Everything runs on what this node has; what needs no controller (enter, kill, freeze, devices, remove) runs on a hybrid's
//! v2 hierarchy as well.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use copepod::cgroup::{Cgroup, Hierarchy, Version, remove_parents};
use copepod::errchain::{Chain, Kind, Kinded};
use copepod::plan::{DeviceRule, Resources};

#[path = "common/root.rs"]
mod common;

/// Generous: no test waits for it to pass.
const TIME: Duration = Duration::from_secs(20);

/// The node's hierarchy, and a hybrid's v2.
fn hierarchies() -> Vec<Hierarchy> {
    let node = Hierarchy::detect().unwrap();
    let unified = node.mounts().into_iter().find(|(label, _)| *label == "unified").map(|(_, root)| root.to_path_buf());
    let unified = unified.map(|root| Hierarchy::at(&root, Version::V2).unwrap());
    std::iter::once(node).chain(unified).collect()
}

/// A group that exists for as long as this does.
struct Group {
    hierarchy: Hierarchy,
    cgroup: Cgroup,
    parents: Vec<String>,
}

impl Group {
    /// `/copepod-test-PID-NAME/leaf`.
    fn new(hierarchy: &Hierarchy, name: &str) -> Self {
        let version = if hierarchy.is_v2() { 2 } else { 1 };
        let path = format!("/copepod-test-{}-{name}-{version}/leaf", std::process::id());
        let cgroup = Cgroup::new(hierarchy, &path).unwrap();
        let parents = cgroup.create().unwrap_or_else(|error| panic!("{}", Chain(&error)));
        Self { hierarchy: hierarchy.clone(), cgroup, parents }
    }

    /// What one of its files holds; `file` begins with the controller's name.
    fn read(&self, file: &str) -> String {
        let controller = file.split('.').next().unwrap();
        let dirs = self.cgroup.dirs();
        let (_, dir) = dirs.iter().find(|(label, _)| label.is_empty() || label.split(',').any(|name| name == controller)).unwrap();
        std::fs::read_to_string(dir.join(file)).unwrap().trim().to_string()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let done = self.cgroup.kill(TIME).and_then(|()| self.cgroup.remove(TIME)).and_then(|()| remove_parents(&self.hierarchy, &self.parents));
        if !std::thread::panicking() {
            done.unwrap_or_else(|error| panic!("{}", Chain(&error)));
            let parent = self.cgroup.path().rsplit_once('/').unwrap().0.trim_start_matches('/').to_string();
            for (_, root) in self.hierarchy.mounts() {
                assert!(!root.join(&parent).exists(), "{}", root.display());
            }
        }
    }
}

/// A shell that does nothing until it is let go.
struct Shell {
    child: Child,
    go: Option<ChildStdin>,
    out: BufReader<ChildStdout>,
}

impl Shell {
    fn new(script: &str) -> Self {
        let mut child = copepod::sys::process::command("sh")
            .args(["-c", &format!("read go; {script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (go, out) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, go, out }
    }

    /// One that is in a group.
    fn within(group: &Group, script: &str) -> Self {
        let shell = Self::new(script);
        group.cgroup.enter(shell.child.id()).unwrap_or_else(|error| panic!("{}", Chain(&error)));
        shell
    }

    fn go(&mut self) {
        self.go.take().unwrap().write_all(b"go\n").unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().to_string()
    }

    /// Lets it go and gives all that it prints.
    fn run(mut self) -> String {
        self.go();
        let mut out = String::new();
        std::io::Read::read_to_string(&mut self.out, &mut out).unwrap();
        self.child.wait().unwrap();
        out.trim().to_string()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn limits_are_taken_by_the_kernel() {
    if !common::root("limits_are_taken_by_the_kernel") {
        return;
    }
    let hierarchy = Hierarchy::detect().unwrap();
    let group = Group::new(&hierarchy, "limits");
    let mib = 1i64 << 20;
    let none = Resources::default;
    // (limits, file and text on v1, file and text on v2); one group throughout, so each is an update of the one before.
    let check = |limits: Resources, v1: &[(&str, &str)], v2: &[(&str, &str)]| {
        group.cgroup.set(&limits).unwrap_or_else(|error| panic!("{limits:?}: {}", Chain(&error)));
        for (file, text) in if hierarchy.is_v2() { v2 } else { v1 } {
            assert_eq!(group.read(file), *text, "{file} after {limits:?}");
        }
    };
    check(Resources { cpu_shares: Some(512), ..none() }, &[("cpu.shares", "512")], &[("cpu.weight", "59")]);
    check(
        Resources { cpu_quota: Some(50_000), cpu_period: Some(100_000), ..none() },
        &[("cpu.cfs_quota_us", "50000"), ("cpu.cfs_period_us", "100000")],
        &[("cpu.max", "50000 100000")],
    );
    check(Resources { cpu_quota: Some(20_000), ..none() }, &[("cpu.cfs_quota_us", "20000")], &[("cpu.max", "20000 100000")]);
    check(
        Resources { cpu_quota: Some(-1), cpu_period: Some(50_000), ..none() },
        &[("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", "50000")],
        &[("cpu.max", "max 50000")],
    );
    // Up, up, down, down by much, to unlimited and back.
    for (memory, swap) in [(64, 64), (128, 256), (32, 64), (16, 16), (512, 512), (-1, -1), (64, 64)] {
        let (limit, together) = if memory < 0 { (-1, -1) } else { (memory * mib, swap * mib) };
        group.cgroup.set(&Resources { memory_limit: Some(limit), memory_swap: Some(together), ..none() }).unwrap();
        let stats = group.cgroup.stats().unwrap();
        assert_eq!(stats.memory.unwrap().limit, u64::try_from(limit).ok(), "{memory} {swap}");
        if let Some(stats) = stats.swap {
            assert_eq!(stats.limit, u64::try_from(together).ok().map(|n| n - limit as u64), "{memory} {swap}");
        }
    }
    check(Resources { pids_limit: Some(17), ..none() }, &[("pids.max", "17")], &[("pids.max", "17")]);
    check(Resources { pids_limit: Some(-1), ..none() }, &[("pids.max", "max")], &[("pids.max", "max")]);
    check(
        Resources { cpuset_cpus: "0".into(), cpuset_mems: "0".into(), ..none() },
        &[("cpuset.cpus", "0"), ("cpuset.mems", "0")],
        &[("cpuset.cpus", "0"), ("cpuset.mems", "0")],
    );
    // Where there is no hugetlb controller this is passed over.
    check(Resources { hugepages: vec![("2MB".into(), 0)], ..none() }, &[], &[]);

    let refused = |limits: Resources, name: &str| {
        let error = group.cgroup.set(&limits).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{}", Chain(&error));
        assert!(error.to_string().contains(name), "{error}");
    };
    refused(Resources { cpu_quota: Some(1), ..none() }, "cpu");
    refused(Resources { cpuset_cpus: "9999".into(), ..none() }, "9999");
    refused(Resources { cpuset_cpus: "x".into(), ..none() }, "cpuset.cpus");
    refused(Resources { memory_limit: Some(64 * mib), memory_swap: Some(32 * mib), ..none() }, "33554432");
    let high = Resources { unified: vec![("memory.high".into(), "33554432".into())], ..none() };
    if hierarchy.is_v2() { check(high, &[], &[("memory.high", "33554432")]) } else { refused(high, "memory.high") }
}

#[test]
fn a_process_lives_and_dies_in_a_group() {
    if !common::root("a_process_lives_and_dies_in_a_group") {
        return;
    }
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "life");
        assert!(group.cgroup.is_empty().unwrap());
        let mut shell = Shell::within(&group, "echo here; exec sleep 1000");
        let pid = shell.child.id();
        shell.go();
        assert_eq!(shell.line(), "here");
        assert_eq!(group.cgroup.procs(false).unwrap(), [pid]);
        assert_eq!(Cgroup::of_process(&hierarchy, pid).unwrap().path(), group.cgroup.path());
        assert_eq!(group.cgroup.stats().unwrap().processes, [pid]);
        let error = group.cgroup.remove(Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), Kind::FailedPrecondition, "{}", Chain(&error));
        assert_eq!(group.cgroup.create().unwrap_err().kind(), Kind::AlreadyExists);

        // The shell is not reaped: a zombie doesn't count.
        group.cgroup.kill(TIME).unwrap();
        assert!(group.cgroup.is_empty().unwrap());
        group.cgroup.remove(TIME).unwrap();
        assert!(!group.cgroup.exists());
        group.cgroup.kill(Duration::ZERO).unwrap();
        group.cgroup.remove(Duration::ZERO).unwrap();
        assert_eq!(group.cgroup.enter(0).unwrap_err().kind(), Kind::NotFound);
    }
}

#[test]
fn what_a_crash_left_is_replaced() {
    if !common::root("what_a_crash_left_is_replaced") {
        return;
    }
    let hierarchy = Hierarchy::detect().unwrap();
    let group = Group::new(&hierarchy, "crash");
    group.cgroup.set(&Resources { pids_limit: Some(5), ..Resources::default() }).unwrap();
    let below = Cgroup::new(&hierarchy, &format!("{}/sub/sub", group.cgroup.path())).unwrap();
    // Not on v2, where the group's own controllers would be handed down; here it is only a directory.
    for (_, dir) in below.dirs() {
        std::fs::create_dir_all(dir).unwrap();
    }
    assert_eq!(group.cgroup.create().unwrap(), [] as [String; 0]);
    assert_eq!(group.read("pids.max"), "max");
    assert!(!below.exists());
    // Ready to be used: on v1 the cpuset is filled again.
    assert_eq!(Shell::within(&group, "echo here").run(), "here");
}

#[test]
fn more_processes_than_the_limit_cannot_be() {
    if !common::root("more_processes_than_the_limit_cannot_be") {
        return;
    }
    let group = Group::new(&Hierarchy::detect().unwrap(), "pids");
    for (limit, out) in [(1, ""), (2, "forked"), (-1, "forked")] {
        group.cgroup.set(&Resources { pids_limit: Some(limit), ..Resources::default() }).unwrap();
        assert_eq!(Shell::within(&group, "/bin/true && echo forked").run(), out, "{limit}");
    }
}

#[test]
fn an_oom_kill_is_counted_though_init_lives() {
    if !common::root("an_oom_kill_is_counted_though_init_lives") {
        return;
    }
    let hierarchy = Hierarchy::detect().unwrap();
    let group = Group::new(&hierarchy, "oom");
    let limit = Some(16 << 20);
    group.cgroup.set(&Resources { memory_limit: limit, memory_swap: limit, ..Resources::default() }).unwrap();
    assert_eq!(Shell::within(&group, "head -c 1000000 /dev/zero | tail -c 1 | wc -c").run(), "1");
    assert_eq!(group.cgroup.oom_kills().unwrap(), 0);
    assert_eq!(Shell::within(&group, "tail /dev/zero; echo $?").run(), "137");
    assert_eq!(group.cgroup.oom_kills().unwrap(), 1);
    // As init.
    assert_eq!(Shell::within(&group, "exec tail /dev/zero").run(), "");
    assert_eq!(group.cgroup.oom_kills().unwrap(), 2);
    let memory = group.cgroup.stats().unwrap().memory.unwrap();
    assert!(memory.page_faults > 0 && memory.usage <= 16 << 20 && memory.available.is_some(), "{memory:?}");
    // v1's count stays 0 on some kernels (6.18).
    assert!(memory.limit_hits > 0 || !hierarchy.is_v2());
}

#[test]
fn a_limit_below_what_is_in_use_is_refused() {
    if !common::root("a_limit_below_what_is_in_use_is_refused") {
        return;
    }
    let group = Group::new(&Hierarchy::detect().unwrap(), "shrink");
    let limit = |bytes| Resources { memory_limit: Some(bytes), memory_swap: Some(bytes), ..Resources::default() };
    group.cgroup.set(&limit(256 << 20)).unwrap();
    let script =
        r#"exec awk 'BEGIN { s = "x"; while (length(s) < 33554432) s = s s; print "full"; fflush(); system("sleep 1000"); print length(s) }'"#;
    let mut shell = Shell::within(&group, script);
    shell.go();
    assert_eq!(shell.line(), "full");
    let error = group.cgroup.set(&limit(8 << 20)).unwrap_err();
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{}", Chain(&error));
    assert_eq!(group.cgroup.oom_kills().unwrap(), 0);
    assert_eq!(group.cgroup.procs(true).unwrap().first(), Some(&shell.child.id()));
}

fn rule(allow: bool, kind: char, numbers: Option<(u32, u32)>, access: &str) -> DeviceRule {
    DeviceRule { allow, kind: kind as u32, major: numbers.map(|n| n.0), minor: numbers.map(|n| n.1), access: access.into() }
}

#[test]
fn only_allowed_devices_open() {
    if !common::root("only_allowed_devices_open") {
        return;
    }
    let node = std::env::temp_dir().join(format!("copepod-test-{}-node", std::process::id()));
    let tries = format!(
        "try() {{ if ( \"$@\" ); then echo -n '1'; else echo -n '0'; fi; }}
         null() {{ : > /dev/null; }}; zero() {{ : < /dev/zero; }}; wzero() {{ : > /dev/zero; }}; rwzero() {{ : <> /dev/zero; }}
         random() {{ : < /dev/urandom; }}; make() {{ mknod {0} c 1 3 && rm {0}; }}
         for t in null zero wzero rwzero random make; do try $t; done",
        node.display()
    );
    let (null, zero) = (Some((1, 3)), Some((1, 5)));
    let deny = || rule(false, 'a', None, "rwm");
    let lists: [(&str, Vec<DeviceRule>, &str); 6] = [
        ("none", vec![], "111111"),
        ("deny all", vec![deny()], "000000"),
        ("some", vec![deny(), rule(true, 'c', null, "rw"), rule(true, 'c', zero, "r")], "110000"),
        ("mknod and both ways", vec![deny(), rule(true, 'c', None, "m"), rule(true, 'c', zero, "rw")], "011101"),
        ("all but some", vec![rule(true, 'a', None, "rwm"), rule(false, 'c', zero, "w")], "110011"),
        ("all", vec![rule(true, 'a', None, "rwm")], "111111"),
    ];
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "devices");
        for (name, rules, want) in &lists {
            group.cgroup.set_devices(rules).unwrap_or_else(|error| panic!("{name}: {}", Chain(&error)));
            assert_eq!(Shell::within(&group, &tries).run(), *want, "{name}, v2: {}", hierarchy.is_v2());
        }
        let Some(dir) = group.cgroup.open_dir() else { continue };
        let filters = || copepod::sys::bpf::device_filters(std::os::fd::AsFd::as_fd(&dir)).unwrap().len();
        assert_eq!(filters(), 1);
        group.cgroup.set_devices(&[]).unwrap();
        assert_eq!(filters(), 0);
        // The longest program that the emitter makes is one that the verifier takes.
        let mut long = vec![deny()];
        long.extend(
            (0..2047).map(|n| rule(n % 2 == 0, if n % 3 == 0 { 'b' } else { 'c' }, Some((n, u32::MAX - n)), ["r", "rw", "m"][n as usize % 3])),
        );
        group.cgroup.set_devices(&long).unwrap_or_else(|error| panic!("{}", Chain(&error)));
        assert_eq!(filters(), 1);
    }
}

#[test]
fn a_tree_that_keeps_forking_is_killed() {
    if !common::root("a_tree_that_keeps_forking_is_killed") {
        return;
    }
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "forks");
        // Orphans of orphans, some of them deaf to signals; an end to it should the test fail.
        let script = "trap '' TERM INT HUP
            for i in 1 2 3 4; do
                ( n=0; while [ $n -lt 300 ]; do ( sleep 300 & ); n=$((n+1)); [ $n = 5 ] && echo forking; done; sleep 300 ) &
            done
            wait";
        let mut shell = Shell::within(&group, script);
        shell.go();
        assert_eq!(shell.line(), "forking");
        // One in a group below.
        let below = Cgroup::new(&hierarchy, &format!("{}/below", group.cgroup.path())).unwrap();
        let deep = Shell::new("exec sleep 300");
        // v2 takes no process into a group that hands controllers down, so it hands none down here: a plain directory.
        for (label, dir) in below.dirs() {
            std::fs::create_dir(dir).unwrap();
            if label == "cpuset" {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    std::fs::copy(dir.parent().unwrap().join(file), dir.join(file)).unwrap();
                }
            }
        }
        below.enter(deep.child.id()).unwrap();
        assert!(group.cgroup.procs(true).unwrap().contains(&deep.child.id()));
        assert!(!group.cgroup.procs(false).unwrap().contains(&deep.child.id()));

        group.cgroup.kill(TIME).unwrap_or_else(|error| panic!("{}", Chain(&error)));
        assert_eq!(group.cgroup.procs(true).unwrap(), [] as [u32; 0]);
        group.cgroup.remove(TIME).unwrap_or_else(|error| panic!("{}", Chain(&error)));
        assert!(!below.exists() && !group.cgroup.exists());
    }
}

#[test]
fn a_frozen_group_thaws_or_dies() {
    if !common::root("a_frozen_group_thaws_or_dies") {
        return;
    }
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "freeze");
        let mut shell = Shell::within(&group, "echo awake; exec sleep 1000");
        group.cgroup.freeze(TIME).unwrap();
        let state = if hierarchy.is_v2() { ("cgroup.events", "frozen 1") } else { ("freezer.state", "FROZEN") };
        assert!(group.read(state.0).contains(state.1));
        shell.go();
        group.cgroup.thaw().unwrap();
        assert_eq!(shell.line(), "awake");
        group.cgroup.freeze(TIME).unwrap();
        group.cgroup.kill(TIME).unwrap();
        assert!(group.cgroup.is_empty().unwrap());
    }
}

#[test]
fn statistics_are_the_kernels() {
    if !common::root("statistics_are_the_kernels") {
        return;
    }
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "stats");
        let mut shell = Shell::within(&group, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; exec sleep 1000");
        shell.go();
        assert_eq!(shell.line(), "done");
        let stats = group.cgroup.stats().unwrap();
        assert_eq!(stats.processes.len(), 1);
        let cpu = stats.cpu.unwrap();
        assert!(cpu.usage_ns > 0 && cpu.user_ns > 0, "{cpu:?}");
        if hierarchy.controllers().contains(&"memory") {
            let memory = stats.memory.unwrap();
            assert!(memory.usage > 0 && memory.working_set <= memory.usage && memory.rss <= memory.usage && memory.limit.is_none(), "{memory:?}");
            assert_eq!(stats.pids.unwrap().current, 1);
        }
        if Path::new("/proc/pressure/cpu").exists() && hierarchy.mounts().iter().any(|(label, _)| matches!(*label, "" | "unified")) {
            assert!(stats.cpu_pressure.is_some() && stats.io_pressure.is_some());
        }
    }
}

#[test]
fn a_thread_enters_v1_by_itself() {
    if !common::root("a_thread_enters_v1_by_itself") {
        return;
    }
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "entrance");
        let entrance = group.cgroup.entrance().unwrap();
        let unified = hierarchy.mounts().iter().any(|(label, _)| matches!(*label, "" | "unified"));
        assert_eq!(entrance.clone_into().is_some(), unified);
        assert!(!entrance.fds().is_empty());
        // In v1 a thread can be elsewhere than its process.
        let entered = move || {
            entrance.enter_after_clone().unwrap();
            std::fs::read_to_string("/proc/thread-self/cgroup").unwrap()
        };
        let text = std::thread::spawn(entered).join().unwrap();
        for (label, _) in hierarchy.mounts().into_iter().filter(|(label, _)| !matches!(*label, "" | "unified")) {
            let line = text.lines().find(|line| line.split(':').nth(1).is_some_and(|names| names.trim_start_matches("name=") == label)).unwrap();
            assert!(line.ends_with(group.cgroup.path()), "{line}");
        }
    }
}

#[test]
fn the_directory_is_for_clone_on_v2() {
    if !common::root("the_directory_is_for_clone_on_v2") {
        return;
    }
    for hierarchy in hierarchies() {
        let group = Group::new(&hierarchy, "dir");
        let dir = group.cgroup.open_dir();
        assert_eq!(dir.is_some(), hierarchy.is_v2());
        if let Some(dir) = dir {
            let path = rustix::fs::readlink(copepod::sys::fd::proc_path(std::os::fd::AsFd::as_fd(&dir)), Vec::new()).unwrap();
            assert_eq!(PathBuf::from(path.into_string().unwrap()), group.cgroup.dirs()[0].1);
        }
    }
}
