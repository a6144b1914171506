//! From creation to removal: phases, exits, stops, execs.

use copepod::errchain::{Kind, Kinded};
use copepod::monitor_api::{Body, Call, SignalContainer};
use copepod::plan::{Namespace, SandboxPlan};
use std::os::fd::AsFd;

use crate::lab::{Lab, container, until, written};
use crate::monitor_client::{Client, sealed, wait_readable};

pub fn a_container_runs_and_its_exit_and_log_are_kept() {
    let mut lab = Lab::new();
    let created = lab.run("c1", "echo out; echo err >&2; printf end; exit 7");
    assert_eq!((created.user.uid, created.user.gid), (0, 0));
    let record = lab.client.exited("c1");
    assert_eq!((record.code, record.signal, record.oom_killed, &record.start_error), (7, 0, false, &None));
    assert!(record.started_at > 0 && record.started_at <= record.finished_at);
    assert_eq!(lab.exit_file("c1"), Some(record.clone()));
    // The event comes when the last output is in the log.
    let lines = lab.log("c1");
    assert_eq!(written(&lines, "stdout"), b"out\nend");
    assert_eq!(written(&lines, "stderr"), b"err\n");
    assert_eq!(lines.iter().filter(|line| !line.full).count(), 1);
    let snapshot = lab.client.hello();
    assert_eq!(snapshot.containers[0].exit, Some(record));
    lab.remove("c1").unwrap();
    assert!(lab.client.hello().containers.is_empty());
    lab.remove("c1").unwrap();
    lab.finish();
}

pub fn calls_are_refused_where_they_do_not_fit() {
    let mut lab = Lab::new();
    let check = |result: Result<(), copepod::errchain::Remote>, kind: Kind, text: &str| {
        let error = result.expect_err(text);
        let chain = copepod::errchain::Chain(&error).to_string();
        assert_eq!(error.kind(), kind, "{chain}");
        assert!(chain.contains(text), "{chain:?} does not say {text:?}");
    };
    let created = |result: Result<copepod::monitor_api::Created, _>| result.map(drop);
    check(lab.start("c1"), Kind::NotFound, "no container c1");
    lab.stop("c1", libc::SIGTERM, 100).unwrap();
    let mut plan = lab.plan("c1", "sleep 1000");
    plan.log.path = "../out.log".into();
    check(created(lab.create(&plan)), Kind::InvalidArgument, "../out.log");
    plan.log = copepod::plan::LogPlan { dir: lab.path("absent"), path: "x.log".into(), max_line: 0 };
    check(created(lab.create(&plan)), Kind::Internal, "absent");
    let plan = lab.plan("c1", "sleep 1000");
    lab.create(&plan).unwrap();
    check(created(lab.create(&plan)), Kind::AlreadyExists, "c1 exists");
    check(lab.client.done(Call::ReopenLog(container("c1"))), Kind::FailedPrecondition, "has not been started");
    check(lab.exec("c1", "e1", "true", 0).map(drop), Kind::FailedPrecondition, "has not been started");
    check(lab.client.done(Call::Exit), Kind::FailedPrecondition, "container");
    lab.start("c1").unwrap();
    check(lab.start("c1"), Kind::FailedPrecondition, "is running");
    let bad = SignalContainer { id: "c1".into(), signal: 900 };
    check(lab.client.done(Call::SignalContainer(bad)), Kind::InvalidArgument, "900");
    lab.client.done(Call::SignalContainer(SignalContainer { id: "c1".into(), signal: libc::SIGKILL as u32 })).unwrap();
    assert_eq!(lab.client.exited("c1").code, 137);
    check(lab.client.done(Call::ReopenLog(container("c1"))), Kind::FailedPrecondition, "has exited");
    check(lab.client.done(Call::Upgrade), Kind::Unimplemented, "Upgrade");
    // A plan of another container.
    let other = sealed(&lab.plan("c2", "true"));
    let file = std::fs::File::create(lab.path("exit-c3")).unwrap();
    let call = Call::CreateContainer(copepod::monitor_api::CreateContainer { id: "c3".into() });
    check(lab.client.call(call.clone(), &[other.as_fd(), file.as_fd()]).map(drop), Kind::InvalidArgument, "c2");
    check(lab.client.call(call, &[other.as_fd()]).map(drop), Kind::InvalidArgument, "descriptors");
    lab.finish();
}

pub fn a_start_that_fails_is_an_exit_with_its_reason() {
    let mut lab = Lab::new();
    let mut plan = lab.plan("c1", "");
    plan.process.args = vec!["/bin/no-such-program".into()];
    // Where the program is looked up before init is ready, creation fails with the reason instead.
    match lab.create(&plan) {
        Err(error) => assert!(copepod::errchain::Chain(&error).to_string().contains("no-such-program"), "{error:?}"),
        Ok(_) => {
            let error = lab.start("c1").unwrap_err();
            let record = lab.client.exited("c1");
            assert_eq!((record.code, record.started_at), (128, 0));
            assert_eq!(record.start_error, Some(error));
            assert_eq!(lab.exit_file("c1"), Some(record));
        }
    }
    lab.finish();
}

pub fn a_stop_signals_then_kills() {
    let mut lab = Lab::new();
    lab.run("polite", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done");
    lab.run("deaf", "trap 'echo ignored' TERM; echo ready; while :; do sleep 0.01; done");
    for id in ["polite", "deaf"] {
        lab.log_until(id, |lines| written(lines, "stdout") == b"ready\n");
    }
    lab.stop("polite", libc::SIGTERM, 60_000).unwrap();
    assert_eq!(lab.client.exited("polite").code, 3);
    assert_eq!(written(&lab.log("polite"), "stdout"), b"ready\nbye\n");
    // Stopped again, it is stopped.
    lab.stop("polite", libc::SIGTERM, 60_000).unwrap();

    let first = lab.ask_stop("deaf", libc::SIGTERM, 600_000);
    lab.log_until("deaf", |lines| written(lines, "stdout").ends_with(b"ignored\n"));
    assert!(lab.exec("deaf", "e1", "true", 0).is_err_and(|e| e.kind() == Kind::FailedPrecondition));
    let longer = lab.ask_stop("deaf", libc::SIGTERM, 3_600_000);
    let shorter = lab.ask_stop("deaf", libc::SIGTERM, 10);
    for seq in [shorter, first, longer] {
        assert_eq!(lab.client.answer(seq).unwrap().0, Body::Done);
    }
    let record = lab.client.exited("deaf");
    assert_eq!((record.code, record.signal), (137, 9));
    assert_eq!(written(&lab.log("deaf"), "stdout"), b"ready\nignored\n");

    // One that was never started.
    let plan = lab.plan("idle", "echo never");
    lab.create(&plan).unwrap();
    lab.stop("idle", libc::SIGTERM, 600_000).unwrap();
    let record = lab.client.exited("idle");
    assert_eq!((record.code, record.started_at), (137, 0));
    assert!(lab.log("idle").is_empty());
    lab.finish();
}

pub fn a_running_container_is_removed_by_force() {
    let mut lab = Lab::new();
    lab.run("c1", "sleep 1000");
    lab.remove("c1").unwrap();
    // Its end was recorded and told all the same.
    assert_eq!(lab.client.exited("c1").code, 137);
    assert!(lab.exit_file("c1").is_some());
    lab.finish();
}

pub fn an_exit_is_told_though_a_grandchild_holds_the_pipe() {
    let mut lab = Lab::new();
    // In the pod's PID namespace the grandchild outlives init.
    let sandbox = sealed(&SandboxPlan { id: "s1".into(), shared_pid: true, ..SandboxPlan::default() });
    let (body, _) = lab.client.call(Call::CreateSandbox, &[sandbox.as_fd()]).unwrap();
    let Body::Sandbox(state) = body else { panic!("{body:?}") };
    assert!(state.pause_pid > 0);
    let mut plan = lab.plan("c1", "(while ! [ -e /flags/go ]; do sleep 0.01; done; echo later; sleep 1000) & echo first; exit 5");
    plan.namespaces.pid = Namespace::Pod;
    lab.run_plan(&plan);
    assert_eq!(lab.client.exited("c1").code, 5);
    assert_eq!(written(&lab.log("c1"), "stdout"), b"first\n");
    // It is followed until the container is removed.
    lab.flag("go");
    lab.log_until("c1", |lines| written(lines, "stdout") == b"first\nlater\n");
    lab.remove("c1").unwrap();
    lab.finish();
}

pub fn an_exec_runs_times_out_and_dies_with_its_container() {
    let mut lab = Lab::new();
    lab.run("c1", "sleep 1000");
    let output = lab.exec("c1", "e1", "echo hello; exit 4", 60_000).unwrap();
    assert_eq!((output.stdout.as_str(), output.ended.code, output.ended.timed_out), ("hello\n", 4, false));

    // Neither a grandchild nor one that has left its session outlives the timeout.
    let stdout = lab.ask_exec("c1", "e2", "setsid sleep 777 & (sleep 777 &) ; echo up; sleep 777", 300).unwrap();
    let ended = lab.client.exec_exited("e2");
    assert!(ended.timed_out);
    assert_eq!(crate::lab::read_available(&stdout), "up\n");
    let output = lab.exec("c1", "e3", "pgrep -f '[s]leep 777'; true", 0).unwrap();
    assert_eq!(output.stdout, "");

    lab.ask_exec("c1", "e4", "sleep 777", 0).unwrap();
    assert!(lab.exec("c1", "e4", "true", 0).is_err_and(|e| e.kind() == Kind::AlreadyExists));
    assert_eq!(lab.client.hello().execs, ["e4"]);
    lab.client.done(Call::KillExec(copepod::monitor_api::ExecId { id: "e4".into() })).unwrap();
    assert_eq!(lab.client.exec_exited("e4").code, 137);
    lab.client.done(Call::KillExec(copepod::monitor_api::ExecId { id: "e4".into() })).unwrap();

    lab.ask_exec("c1", "e5", "sleep 777", 0).unwrap();
    lab.stop("c1", libc::SIGTERM, 0).unwrap();
    assert_eq!(lab.client.exec_exited("e5").code, 137);
    lab.finish();
}

pub fn the_sandbox_is_made_once_and_shared() {
    let mut lab = Lab::new();
    let plan = SandboxPlan { id: "s1".into(), hostname: "pod-host".into(), new_net: true, new_ipc: true, new_uts: true, ..SandboxPlan::default() };
    let sandbox = sealed(&plan);
    let first = lab.client.ask(Call::CreateSandbox, &[sandbox.as_fd()]);
    let second = lab.client.ask(Call::CreateSandbox, &[sandbox.as_fd()]);
    let mut inodes = Vec::new();
    for seq in [first, second] {
        let (body, fds) = lab.client.answer(seq).unwrap();
        assert!(matches!(body, Body::Sandbox(_)), "{body:?}");
        inodes.push(rustix::fs::fstat(&fds[0]).unwrap().st_ino);
    }
    assert_eq!(inodes[0], inodes[1]);
    for id in ["c1", "c2"] {
        let mut plan = lab.plan(id, "hostname; readlink /proc/self/ns/net");
        plan.namespaces.net = Namespace::Pod;
        plan.namespaces.ipc = Namespace::Pod;
        plan.namespaces.uts = Namespace::Pod;
        lab.run_plan(&plan);
        lab.client.exited(id);
        assert_eq!(written(&lab.log(id), "stdout"), format!("pod-host\nnet:[{}]\n", inodes[0]).as_bytes());
    }
    lab.client.done(Call::StopSandbox).unwrap();
    let plan = lab.plan("c3", "true");
    assert!(lab.create(&plan).is_err_and(|e| e.kind() == Kind::FailedPrecondition));
    lab.finish();
}

pub fn a_pause_process_that_dies_stops_the_sandbox() {
    let mut lab = Lab::new();
    let sandbox = sealed(&SandboxPlan { id: "s1".into(), shared_pid: true, ..SandboxPlan::default() });
    let (Body::Sandbox(state), _) = lab.client.call(Call::CreateSandbox, &[sandbox.as_fd()]).unwrap() else { panic!() };
    let mut plan = lab.plan("c1", "sleep 1000");
    plan.namespaces.pid = Namespace::Pod;
    lab.run_plan(&plan);
    let pause = copepod::sys::process::pidfd_open(state.pause_pid).unwrap();
    copepod::sys::process::signal(pause.as_fd(), libc::SIGKILL as u32).unwrap();
    assert_eq!(lab.client.exited("c1").code, 137);
    let snapshot = until("the sandbox to stop", || Some(lab.client.hello()).filter(|s| s.stopped));
    assert_eq!(snapshot.sandbox.unwrap().pause_pid, 0);
    lab.finish();
}

pub fn memory_that_runs_out_is_told() {
    let mut lab = Lab::new();
    let limited = |lab: &Lab, id: &str, script: &str| {
        let mut plan = lab.plan(id, script);
        plan.cgroup.resources.memory_limit = Some(16 << 20);
        plan.cgroup.resources.memory_swap = Some(16 << 20);
        plan
    };
    let check = |lab: &mut Lab, id: &str, code: i32, oom: bool| {
        let record = lab.client.exited(id);
        assert_eq!((record.code, record.oom_killed), (code, oom), "{id}");
    };
    let plan = limited(&lab, "init", "exec dd if=/dev/zero of=/dev/null bs=64M");
    lab.run_plan(&plan);
    check(&mut lab, "init", 137, true);
    let plan = limited(&lab, "child", "dd if=/dev/zero of=/dev/null bs=64M; exit 6");
    lab.run_plan(&plan);
    check(&mut lab, "child", 6, true);
    let plan = limited(&lab, "well", "exit 6");
    lab.run_plan(&plan);
    check(&mut lab, "well", 6, false);

    // Nobody is there when it happens.
    let plan = limited(&lab, "alone", "while ! [ -e /flags/go ]; do sleep 0.01; done; exec dd if=/dev/zero of=/dev/null bs=64M");
    lab.run_plan(&plan);
    lab.client = Client::over(copepod::sys::fd::seqpacket_pair().unwrap().0);
    lab.flag("go");
    let record = until("the record", || lab.exit_file("alone"));
    assert_eq!((record.code, record.oom_killed), (137, true));
    lab.client = Client::connect(&lab.pod_dir());
    let snapshot = lab.client.hello();
    assert_eq!(snapshot.containers.iter().find(|c| c.id == "alone").unwrap().exit, Some(record));
    lab.finish();
}

pub fn twenty_containers_at_once() {
    let mut lab = Lab::new();
    let ids: Vec<String> = (0..20).map(|n| format!("c{n}")).collect();
    let plans: Vec<_> = ids.iter().map(|id| lab.plan(id, &format!("echo {id}; exit {}", id.len()))).collect();
    let asked: Vec<u32> = plans.iter().map(|plan| lab.ask_create(plan)).collect();
    let pids: Vec<u32> = asked
        .into_iter()
        .map(|seq| match lab.client.answer(seq).unwrap().0 {
            Body::Created(created) => created.pid,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lab.client.hello().containers.iter().map(|c| c.pid).collect::<std::collections::BTreeSet<_>>(), pids.into_iter().collect());
    let asked: Vec<u32> = ids.iter().map(|id| lab.client.ask(Call::StartContainer(container(id)), &[])).collect();
    for seq in asked {
        assert!(matches!(lab.client.answer(seq).unwrap().0, Body::Started(_)));
    }
    for id in &ids {
        assert_eq!(lab.client.exited(id).code, id.len() as i32);
        assert_eq!(written(&lab.log(id), "stdout"), format!("{id}\n").as_bytes());
    }
    let asked: Vec<u32> = ids.iter().map(|id| lab.client.ask(Call::RemoveContainer(container(id)), &[])).collect();
    for seq in asked {
        assert_eq!(lab.client.answer(seq).unwrap().0, Body::Done);
    }
    lab.finish();
}

pub fn a_terminal_is_logged() {
    let mut lab = Lab::new();
    let mut plan = lab.plan("c1", "[ -t 0 ] && [ -t 1 ] && echo tty; echo err >&2");
    plan.process.terminal = true;
    lab.run_plan(&plan);
    assert_eq!(lab.client.exited("c1").code, 0);
    let lines = lab.log_until("c1", |lines| lines.len() >= 2);
    assert_eq!(written(&lines, "stdout"), b"tty\r\nerr\r\n");
    lab.finish();
}

pub fn signals_for_the_group_do_not_end_the_monitor() {
    let mut lab = Lab::new();
    let monitor = copepod::sys::process::pidfd_open(lab.monitor_pid()).unwrap();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
        copepod::sys::process::signal(monitor.as_fd(), signal as u32).unwrap();
    }
    lab.run("c1", "exit 1");
    assert_eq!(lab.client.exited("c1").code, 1);
    assert!(!wait_readable(monitor.as_fd(), std::time::Duration::ZERO));
    lab.finish();
}

/// What the kernel counts as a process's own memory and its share of what it has in common with others, in KiB.
fn pss(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

pub fn a_pod_with_one_container_is_small() {
    let mut lab = Lab::new();
    let sandbox = SandboxPlan { id: "s1".into(), new_net: true, new_ipc: true, new_uts: true, shm_bytes: 1 << 20, ..SandboxPlan::default() };
    lab.client.call(Call::CreateSandbox, &[sealed(&sandbox).as_fd()]).unwrap();
    let mut plan = lab.plan("c1", "seq 1 20000; sleep 1000");
    plan.process.env.extend((0..100).map(|n| format!("VARIABLE_{n}=a value of some length, as services have them").into()));
    lab.run_plan(&plan);
    lab.log_until("c1", |lines| lines.len() == 20000);
    assert_eq!(lab.exec("c1", "e1", "true", 0).unwrap().ended.code, 0);
    until("the creators to end", || (lab.processes().len() == 2).then_some(()));
    // The budget is of the program that is shipped, once it rests; a debug build is larger.
    let budget = if std::env::var_os(crate::lab::SHIPPED).is_some() { 512 } else { 4096 };
    let mut sizes = Vec::new();
    until(&format!("a size of at most {budget} KiB"), || {
        sizes = lab.processes().into_iter().map(|(pid, name)| (name, pss(pid))).collect::<Vec<_>>();
        (sizes.iter().map(|(_, size)| size).sum::<u64>() <= budget).then_some(())
    });
    println!("{sizes:?} KiB");
    lab.finish();
}
