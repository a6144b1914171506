//! Processes exec'd in a container that runs, and their end.

use std::os::fd::AsFd;

use copepod::errchain::Kind;
use copepod::oci::exec::ExecEvent;
use copepod::plan::*;

use super::driver::*;
use super::files::all_capabilities;
use super::pod;

pub const TESTS: &[super::Test] = &[
    ("an_exec_has_output_and_code", an_exec_has_output_and_code),
    ("an_exec_is_in_the_container", an_exec_is_in_the_container),
    ("an_exec_is_who_its_plan_says", an_exec_is_who_its_plan_says),
    ("what_cannot_be_executed_is_an_error", what_cannot_be_executed_is_an_error),
    ("a_killed_exec_takes_all_it_started_along", a_killed_exec_takes_all_it_started_along),
    ("an_exec_ends_with_its_control_socket", an_exec_ends_with_its_control_socket),
    ("an_exec_that_ends_leaves_its_children_to_init", an_exec_that_ends_leaves_its_children_to_init),
    ("an_exec_ends_with_its_container", an_exec_ends_with_its_container),
    ("orphans_of_an_exec_are_reaped", orphans_of_an_exec_are_reaped),
    ("an_exec_with_a_terminal", an_exec_with_a_terminal),
    ("an_exec_follows_init_into_a_group_below", an_exec_follows_init_into_a_group_below),
    ("an_exec_in_a_pod_with_one_pid_namespace", an_exec_in_a_pod_with_one_pid_namespace),
];

/// A container that waits to be stopped.
pub fn waiting(lab: &Lab, plan: impl FnOnce(&mut ContainerPlan)) -> Container {
    let mut container_plan = lab.plan("echo up; exec sleep 1000");
    plan(&mut container_plan);
    let mut container = lab.create(container_plan).unwrap();
    container.start().unwrap();
    assert_eq!(container.line(), "up");
    container
}

fn of(process: Process) -> ExecPlan {
    ExecPlan { process, timeout_ms: 0 }
}

fn an_exec_has_output_and_code(lab: &Lab) {
    let container = waiting(lab, |_| {});
    let output = lab.exec_sh(&container, "echo in; echo err >&2; exit 3");
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("in\n", "err\n", 3));
    let exec = lab.exec(&container, of(shell("kill -9 $$"))).unwrap();
    assert_eq!(exec.wait(), ExecEvent::Exited { code: 137, signal: 9 });
    lab.delete(container);
}

fn an_exec_is_in_the_container(lab: &Lab) {
    let mut container = lab.create(lab.plan("for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done; cat /proc/self/cgroup; echo x >/here; echo end; exec sleep 1000")).unwrap();
    container.start().unwrap();
    let mut lines = Vec::new();
    while lines.last().is_none_or(|last| last != "end") {
        lines.push(container.line());
    }
    lines.pop();
    let output = lab.exec_sh(
        &container,
        "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done; cat /proc/self/cgroup; cat /here; cat /proc/1/comm",
    );
    let (shown, rest) = output.lines().into_iter().map(str::to_string).collect::<Vec<_>>().split_at(lines.len()).into_owned();
    assert_eq!((shown, rest), (lines, vec!["x".to_string(), "sleep".to_string()]), "{}", output.stderr);

    // The pid that the creator gave is the process's own, as the host sees it.
    let mut exec = lab.exec(&container, of(shell("echo $$; exec sleep 1000"))).unwrap();
    let inside = exec.line();
    let status = std::fs::read_to_string(format!("/proc/{}/status", exec.started.pid)).unwrap();
    let pids = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    assert_eq!(pids.split_whitespace().last(), Some(inside.as_str()), "{pids}");
    exec.kill();
    assert_eq!(exec.wait(), ExecEvent::Exited { code: 137, signal: 9 });
    lab.delete(container);
}

trait IntoOwned {
    fn into_owned(self) -> (Vec<String>, Vec<String>);
}

impl IntoOwned for (&[String], &[String]) {
    fn into_owned(self) -> (Vec<String>, Vec<String>) {
        (self.0.to_vec(), self.1.to_vec())
    }
}

fn an_exec_is_who_its_plan_says(lab: &Lab) {
    let container = waiting(lab, |_| {});
    let mut process =
        shell("id -u; id -G; pwd; echo $HOME; grep -E '^(Cap|NoNew)' /proc/self/status | tr -d '\\t'; cat /proc/self/oom_score_adj; ulimit -n");
    process.user.name = "web".into();
    process.cwd = "/tmp".into();
    process.no_new_privileges = true;
    process.oom_score_adj = Some(300);
    process.rlimits = vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 77, hard: 88 }];
    let output = lab.exec(&container, of(process)).unwrap().output();
    let none = "0000000000000000";
    let want = [
        "1000".into(),
        "1001 29 50".into(),
        "/tmp".into(),
        "/home/web".into(),
        // Empty, as CVE-2022-29162 was about.
        format!("CapInh:{none}"),
        format!("CapPrm:{none}"),
        format!("CapEff:{none}"),
        format!("CapBnd:{DEFAULT_CAPABILITIES:016x}"),
        format!("CapAmb:{none}"),
        "NoNewPrivs:1".into(),
        "300".into(),
        "77".into(),
    ];
    assert_eq!(output.lines(), want, "{}", output.stderr);
    lab.delete(container);
}

fn what_cannot_be_executed_is_an_error(lab: &Lab) {
    let mut container = waiting(lab, |_| {});
    let refused = |process: Process, text: &str| fails(lab.exec(&container, of(process)), Kind::InvalidArgument, text);
    refused(program(&["nothing"]), "the exec'd process failed: cannot start the process: exec: \"nothing\": executable file not found in $PATH");
    refused(program(&["/etc/passwd"]), "exec: \"/etc/passwd\": Permission denied");
    refused(program(&[]), "no program");
    refused(Process { user: User { name: "nobody-here".into(), ..User::default() }, ..shell("true") }, "no user \"nobody-here\"");
    refused(Process { user: User { name: "4294967295".into(), ..User::default() }, ..shell("true") }, "out of range");
    refused(Process { cwd: "/not/there".into(), ..shell("true") }, "cannot open /not/there in the container");
    container.kill();
    fails(lab.exec(&container, of(shell("true"))), Kind::FailedPrecondition, "the container has ended");
    lab.delete(container);
}

/// How many processes live in a container's control group.
fn count(lab: &Lab, container: &Container) -> usize {
    copepod::cgroup::Cgroup::new(&lab.hierarchy, &container.plan.cgroup.path).unwrap().procs(true).unwrap().len()
}

fn a_killed_exec_takes_all_it_started_along(lab: &Lab) {
    let container = waiting(lab, |_| {});
    // A child, a grandchild, sessions of their own, an orphan whose parents have ended, one that ignores signals, one that forks on.
    let script = "sleep 500 & (sleep 500 & sleep 500) & setsid sleep 500 & (setsid sh -c 'sleep 500 & exec sleep 500' &) ; \
                  sh -c 'trap \"\" TERM INT HUP; sleep 500' & sh -c 'while :; do sleep 0.001; done' & echo ready; wait";
    let mut exec = lab.exec(&container, of(shell(script))).unwrap();
    assert_eq!(exec.line(), "ready");
    exec.kill();
    assert_eq!(exec.wait(), ExecEvent::Exited { code: 137, signal: 9 });
    assert_eq!(count(lab, &container), 1, "what the container itself runs is left");
    lab.delete(container);
}

fn an_exec_ends_with_its_control_socket(lab: &Lab) {
    let container = waiting(lab, |_| {});
    let mut exec = lab.exec(&container, of(shell("(setsid sleep 500 &); echo ready; exec sleep 500"))).unwrap();
    assert_eq!(exec.line(), "ready");
    let (other, _end) = copepod::sys::fd::seqpacket_pair().unwrap();
    exec.started.control = other;
    wait_readable(exec.started.helper_pidfd.as_fd(), "the helper's end");
    assert_eq!(count(lab, &container), 1);
    assert_eq!(reap(rustix::process::Pid::from_raw(exec.started.helper_pid as i32).unwrap()).code, 0);
    lab.delete(container);
}

fn an_exec_that_ends_leaves_its_children_to_init(lab: &Lab) {
    let container = waiting(lab, |_| {});
    let exec = lab.exec(&container, of(shell("sleep 500 >/dev/null 2>&1 & exit 4"))).unwrap();
    assert_eq!(exec.output().code, 4);
    assert_eq!(count(lab, &container), 2);
    lab.delete(container);
}

fn an_exec_ends_with_its_container(lab: &Lab) {
    let mut container = waiting(lab, |_| {});
    let mut exec = lab.exec(&container, of(shell("echo ready; exec sleep 500"))).unwrap();
    assert_eq!(exec.line(), "ready");
    container.kill();
    // Its PID namespace is gone, and the helper with it: no word of it, and that is the word.
    wait_readable(exec.started.helper_pidfd.as_fd(), "the helper's end");
    let gone = copepod::oci::exec::event(exec.started.control.as_fd()).unwrap_err();
    assert_eq!(gone.kind(), std::io::ErrorKind::UnexpectedEof);
    assert_eq!(reap(rustix::process::Pid::from_raw(exec.started.helper_pid as i32).unwrap()).signal, 9);
    lab.delete(container);
}

fn orphans_of_an_exec_are_reaped(lab: &Lab) {
    let container = waiting(lab, |_| {});
    // Each inner shell leaves a child that ends on its own; none may stay behind as a zombie while the exec runs.
    let script = "for i in 1 2 3 4 5 6 7 8; do (sleep 0.01 &); done; while ps -o stat,comm | grep -q '^Z\\|sleep 0.01'; do :; done; echo clean";
    assert_eq!(lab.exec_sh(&container, script).stdout, "clean\n");
    lab.delete(container);
}

fn an_exec_with_a_terminal(lab: &Lab) {
    let container = waiting(lab, |_| {});
    let mut process = shell("tty; stty size; test -t 0 && echo yes; echo typed: $(head -n 1)");
    process.terminal = true;
    process.terminal_size = (90, 30);
    process.user.uid = Some(1000);
    let mut exec = lab.exec(&container, of(process)).unwrap();
    let console = exec.started.console.take().unwrap();
    rustix::io::write(&console, b"hello\n").unwrap();
    assert_eq!(exec.wait(), ExecEvent::Exited { code: 0, signal: 0 });
    let text = read_all(console, "the terminal").replace('\r', "");
    let lines: Vec<&str> = text.lines().filter(|line| *line != "hello").collect();
    assert_eq!(lines, ["/dev/pts/0", "30 90", "yes", "typed: hello"], "{text:?}");
    lab.delete(container);
}

/// An init system in the container moves itself down and hands controllers on: the container's own group takes no process then.
fn an_exec_follows_init_into_a_group_below(lab: &Lab) {
    let at = if lab.hierarchy.is_v2() { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/pids" };
    let script = format!(
        "cd {at} && mkdir init && echo 1 >init/cgroup.procs; test -e cgroup.subtree_control && echo +pids >cgroup.subtree_control; echo up; exec sleep 1000"
    );
    let mut plan = lab.plan(&script);
    plan.namespaces.cgroup = Namespace::Private;
    plan.process.capabilities = all_capabilities();
    plan.mounts.iter_mut().filter(|mount| mount.kind == MountKind::Cgroup).for_each(|mount| mount.readonly = false);
    let mut container = lab.create(plan).unwrap();
    container.start().unwrap();
    assert_eq!(container.line(), "up");
    let output = lab.exec_sh(&container, "cat /proc/self/cgroup");
    let line = output.lines().into_iter().find(|line| line.contains(if lab.hierarchy.is_v2() { "0::" } else { ":pids:" })).unwrap().to_string();
    assert!(line.ends_with(if lab.hierarchy.is_v2() { ":/init" } else { ":/" }), "{line}");
    lab.delete(container);
}

fn an_exec_in_a_pod_with_one_pid_namespace(lab: &Lab) {
    let pod = lab.pod(&SandboxPlan { shared_pid: true, ..pod::sandbox() }).unwrap();
    let mut container = lab.create_in(&pod.fds(), pod::in_pod(lab, "echo up; exec sleep 1000", Namespace::Pod)).unwrap();
    container.start().unwrap();
    assert_eq!(container.line(), "up");
    let mut exec = lab.exec(&container, of(shell("cat /proc/1/comm; (setsid sleep 500 &); echo ready; exec sleep 500"))).unwrap();
    assert_eq!((exec.line().as_str(), exec.line().as_str()), ("pause", "ready"));
    exec.kill();
    assert_eq!(exec.wait(), ExecEvent::Exited { code: 137, signal: 9 });
    assert_eq!(count(lab, &container), 1);
    lab.delete(container);
    pod.stop(libc::SIGTERM);
}
