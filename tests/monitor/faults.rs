//! What may go wrong around a monitor: clients, disks, mounts, its own helpers.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use copepod::errchain::{Kind, Kinded};
use copepod::monitor_api::{Body, Call};
use copepod::sys::{fd, process};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::lab::{Lab, bind, container, read_log, until, written};
use crate::monitor_client::{Client, wait_readable};

/// A mount that is gone when the test is over.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(at: &'a Path, kind: &str, options: &str) -> Self {
        let options = CString::new(options).unwrap();
        rustix::mount::mount("copepod-test", at, kind, MountFlags::NOSUID | MountFlags::NODEV, Some(options.as_c_str())).unwrap();
        Mounted(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
    }
}

fn kill(pid: u32) {
    process::signal(process::pidfd_open(pid).unwrap().as_fd(), libc::SIGKILL as u32).unwrap();
}

pub fn a_client_that_is_gone_comes_back_to_everything() {
    let mut lab = Lab::new();
    let created = lab.run("runs", "echo one; sleep 1000");
    let plan = lab.plan("waits", "true");
    lab.create(&plan).unwrap();
    let ends = lab.run("ends", "while ! [ -e /flags/go ]; do sleep 0.01; done; exit 9");
    lab.ask_exec("runs", "e1", "sleep 1000", 0).unwrap();
    let pidfd = process::pidfd_open(ends.pid).unwrap();
    lab.flag("go");
    lab.client = Client::over(fd::seqpacket_pair().unwrap().0);
    assert!(wait_readable(pidfd.as_fd(), Duration::from_secs(60)));
    until("the record", || lab.exit_file("ends"));

    lab.client = Client::connect(&lab.pod_dir());
    let snapshot = lab.client.hello();
    let find = |id: &str| snapshot.containers.iter().find(|c| c.id == id).unwrap();
    assert_eq!((find("runs").pid, find("runs").exit.is_none()), (created.pid, true));
    assert!(find("runs").started_at > 0 && find("waits").started_at == 0 && find("waits").exit.is_none());
    assert_eq!(find("ends").exit.as_ref().map(|record| record.code), Some(9));
    // Whoever had asked for the exec is gone, and so is the exec.
    until("the exec to be killed", || lab.client.hello().execs.is_empty().then_some(()));
    // It serves the new one, and another newer one replaces it.
    lab.start("waits").unwrap();
    let mut newer = Client::connect(&lab.pod_dir());
    assert_eq!(newer.hello().containers.len(), 3);
    std::mem::swap(&mut lab.client, &mut newer);
    let mut older = newer;
    until("the older connection to be closed", || older.is_closed().then_some(()));
    lab.finish();
}

pub fn nonsense_closes_its_connection_and_nothing_else() {
    let mut lab = Lab::new();
    lab.run("c1", "sleep 1000");
    let closed = |bytes: &[u8]| {
        let mut stranger = Client::connect(&lab.pod_dir());
        fd::send(stranger.socket(), bytes, &[]).unwrap();
        assert!(stranger.is_closed(), "{:?}", &bytes[..bytes.len().min(8)]);
    };
    closed(b"nonsense");
    closed(&[0xff; 300]);
    closed(&vec![7; copepod::monitor_api::MAX_MESSAGE + 1]);
    // A call before Hello.
    closed(&copepod::monitor_api::encode(&copepod::monitor_api::Request { seq: 1, call: Call::StopSandbox }).unwrap());
    // Many that say nothing.
    let silent: Vec<Client> = (0..40).map(|_| Client::connect(&lab.pod_dir())).collect();
    assert_eq!(lab.client.hello().containers.len(), 1);
    drop(silent);
    // One that never reads is dropped, and holds nobody up.
    let mut greedy = Client::connect(&lab.pod_dir());
    greedy.hello();
    for _ in 0..20_000 {
        let call = copepod::monitor_api::Request { seq: 9, call: Call::StopContainer(Default::default()) };
        if fd::try_send(greedy.socket(), &copepod::monitor_api::encode(&call).unwrap(), &[]).is_err() {
            std::thread::yield_now();
        }
    }
    lab.client = Client::connect(&lab.pod_dir());
    assert_eq!(lab.client.hello().containers.len(), 1);
    lab.finish();
}

pub fn a_stdio_process_that_dies_is_replaced() {
    let mut lab = Lab::new();
    lab.run("c1", "i=0; while ! [ -e /flags/go ]; do echo line $i; i=$((i+1)); sleep 0.001; done; echo last");
    lab.log_until("c1", |lines| lines.len() > 5);
    for _ in 0..2 {
        let pid = lab.stdio_pid();
        kill(pid);
        until("another stdio process", || Some(lab.stdio_pid()).filter(|new| *new != pid));
        let have = lab.log("c1").len();
        lab.log_until("c1", |lines| lines.len() > have + 5);
    }
    // Containers are made, and logs opened anew, as before.
    lab.run("c2", "echo two");
    lab.client.exited("c2");
    lab.log_until("c2", |lines| written(lines, "stdout") == b"two\n");
    lab.client.done(Call::ReopenLog(container("c1"))).unwrap();
    lab.flag("go");
    lab.client.exited("c1");
    let lines = lab.log_until("c1", |lines| lines.last().is_some_and(|line| line.content == b"last"));
    // Lines may be missing, none is damaged or out of order.
    let numbers = lines[..lines.len() - 1].iter().map(|line| {
        let text = std::str::from_utf8(&line.content).unwrap();
        text.strip_prefix("line ").unwrap_or_else(|| panic!("{text:?}")).parse::<u32>().unwrap()
    });
    let numbers: Vec<u32> = numbers.collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    lab.finish();
}

pub fn a_full_disk_loses_whole_lines_and_counts_them() {
    let mut lab = Lab::new();
    let logs = lab.path("logs");
    let mounted = Mounted::new(&logs, "tmpfs", "size=256k,mode=755");
    const LINES: usize = 20_000;
    lab.run("c1", &format!("seq 1 {LINES}; touch /tmp/done; while ! [ -e /flags/go ]; do sleep 0.01; done; echo after"));
    // It is not held up by the disk.
    let output = lab.exec("c1", "e1", "while ! [ -e /tmp/done ]; do sleep 0.01; done; echo done", 0).unwrap();
    assert_eq!(output.stdout, "done\n");
    let bytes: usize = (1..=LINES).map(|n| n.to_string().len() + 1).sum();
    let have = |lab: &Lab| written(&lab.log("c1"), "stdout").len() as u64;
    until("every byte to be written or counted", || {
        let lost = lab.client.hello().log_bytes_dropped;
        (lost > 0 && have(&lab) + lost == bytes as u64).then_some(())
    });
    // Whole lines, in order.
    let numbers: Vec<u32> = lab.log("c1").iter().map(|line| String::from_utf8(line.content.clone()).unwrap().parse().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b) && numbers[0] == 1);
    // With space, it is written again.
    rustix::mount::mount_remount(&logs, MountFlags::empty(), c"size=4m").unwrap();
    lab.flag("go");
    lab.client.exited("c1");
    assert!(written(&lab.log("c1"), "stdout").ends_with(b"after\n"));
    lab.remove("c1").unwrap();
    drop(mounted);
    lab.finish();
}

pub fn a_creator_on_a_hung_mount_holds_up_nobody() {
    let mut lab = Lab::new();
    let hung = lab.path("hung");
    std::fs::create_dir(&hung).unwrap();
    // A filesystem whose server never answers, not even the first question.
    let device: OwnedFd = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let mounted = Mounted::new(&hung, "fuse", &options);
    lab.run("well", "echo one; sleep 1000");
    let mut plan = lab.plan("stuck", "true");
    plan.mounts.push(bind(&hung.join("volume"), "/data"));
    let stuck = lab.ask_create(&plan);
    until("the creator", || lab.processes().into_values().any(|name| name == "copepod-create").then_some(()));

    let output = lab.exec("well", "e1", "echo served", 0).unwrap();
    assert_eq!(output.stdout, "served\n");
    lab.run("also", "exit 2");
    assert_eq!(lab.client.exited("also").code, 2);
    lab.stop("well", libc::SIGKILL, 0).unwrap();
    lab.remove("also").unwrap();
    let error = lab.stop("stuck", libc::SIGTERM, 0).unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("is being created")), (Kind::FailedPrecondition, true));
    assert!(!lab.client.has_answer(stuck));
    assert_eq!(lab.client.hello().containers.iter().filter(|c| c.id == "stuck").count(), 0);

    // A removal ends it.
    lab.remove("stuck").unwrap();
    let error = lab.client.answer(stuck).unwrap_err();
    assert_eq!(error.kind(), Kind::Aborted, "{error:?}");
    // And so does the sandbox's stop.
    let again = lab.plan("stuck2", "true");
    let mut again = again;
    again.mounts.push(bind(&hung.join("volume"), "/data"));
    let stuck = lab.ask_create(&again);
    until("the creator", || lab.processes().into_values().any(|name| name == "copepod-create").then_some(()));
    lab.client.done(Call::StopSandbox).unwrap();
    assert_eq!(lab.client.answer(stuck).unwrap_err().kind(), Kind::Aborted);
    drop(device);
    drop(mounted);
    lab.finish();
}

pub fn a_creator_that_is_killed_fails_its_call_and_leaves_nothing() {
    let mut lab = Lab::new();
    let hung = lab.path("hung");
    std::fs::create_dir(&hung).unwrap();
    let device: OwnedFd = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let mounted = Mounted::new(&hung, "fuse", &options);
    let mut plan = lab.plan("c1", "true");
    plan.mounts.push(bind(&hung.join("volume"), "/data"));
    let seq = lab.ask_create(&plan);
    let creator = |lab: &Lab| lab.processes().into_iter().find(|(_, name)| name == "copepod-create").map(|(pid, _)| pid);
    kill(until("the creator", || creator(&lab)));
    assert_eq!(lab.client.answer(seq).unwrap_err().kind(), Kind::Aborted);
    // The name is free.
    let plan = lab.plan("c1", "exit 3");
    lab.run_plan(&plan);
    assert_eq!(lab.client.exited("c1").code, 3);
    drop(device);
    drop(mounted);
    lab.finish();
}

pub fn a_log_is_renamed_and_opened_anew_in_mid_line() {
    let mut lab = Lab::new();
    // Lines that are written in two halves, so that most renames find one begun.
    lab.run("c1", "i=0; while ! [ -e /flags/go ]; do printf 'line '; printf '%s\\n' $i; i=$((i+1)); done; echo end");
    let mut files = Vec::new();
    for n in 0..20 {
        lab.log_until("c1", |lines| !lines.is_empty());
        let old = lab.path("logs").join(format!("c1/old.{n}"));
        std::fs::rename(lab.log_path("c1"), &old).unwrap();
        assert_eq!(lab.client.call(Call::ReopenLog(container("c1")), &[]).unwrap().0, Body::Done);
        assert!(lab.log_path("c1").exists());
        let size = std::fs::metadata(&old).unwrap().len();
        files.push((old, size));
    }
    lab.flag("go");
    lab.client.exited("c1");
    let mut lines = Vec::new();
    for (old, size) in &files {
        assert_eq!(std::fs::metadata(old).unwrap().len(), *size, "the old file grows");
        lines.extend(read_log(old));
    }
    lines.extend(lab.log("c1"));
    let text = String::from_utf8(written(&lines, "stdout")).unwrap();
    let count = text.lines().count();
    let want: String = (0..count - 1).map(|n| format!("line {n}\n")).chain(["end\n".to_string()]).collect();
    assert!(text == want, "{count} lines are not those that were written");
    lab.finish();
}

pub fn sixty_four_mebibytes_on_both_streams_arrive_whole() {
    let mut lab = Lab::new();
    let data = lab.path("data");
    std::fs::create_dir(&data).unwrap();
    let make = |name: &str, mut state: u64| {
        let mut bytes = Vec::with_capacity(64 << 20);
        while bytes.len() < 64 << 20 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Mostly short lines, some longer than a partial line, some empty.
            let length = match (state >> 60, state >> 33) {
                (0, n) => n as usize % 40_000,
                (1, _) => 0,
                (_, n) => n as usize % 400,
            };
            bytes.extend((0..length).map(|i| b' ' + ((state >> 20) as usize + i * 7) as u8 % 90));
            bytes.push(b'\n');
        }
        std::fs::write(data.join(name), &bytes).unwrap();
        bytes
    };
    let (out, err) = (make("out", 1), make("err", 2));
    let mut plan = lab.plan("c1", "cat /data/err >&2 & cat /data/out; wait");
    plan.mounts.push(bind(&data, "/data"));
    lab.run_plan(&plan);
    assert_eq!(lab.client.exited("c1").code, 0);
    let lines = lab.log_until("c1", |lines| written(lines, "stdout").len() + written(lines, "stderr").len() >= out.len() + err.len());
    assert!(written(&lines, "stdout") == out, "stdout differs");
    assert!(written(&lines, "stderr") == err, "stderr differs");
    assert!(lines.iter().all(|line| line.content.len() <= 16384));
    assert_eq!(lab.client.hello().log_bytes_dropped, 0);
    lab.finish();
}

pub fn a_line_of_a_mebibyte_arrives_whole() {
    let mut lab = Lab::new();
    lab.run("c1", "head -c 1048576 /dev/zero | tr '\\0' x; echo; echo next");
    lab.client.exited("c1");
    let lines = lab.log_until("c1", |lines| lines.last().is_some_and(|line| line.content == b"next"));
    let mut want = vec![b'x'; 1 << 20];
    want.extend_from_slice(b"\nnext\n");
    assert!(written(&lines, "stdout") == want);
    assert_eq!(lines.iter().filter(|line| line.full).count(), 2);
    assert_eq!(lines.len(), 64 + 1);
    lab.finish();
}

pub fn a_monitor_that_was_asked_for_nothing_ends_with_its_daemon() {
    let mut lab = Lab::new();
    let pidfd = process::pidfd_open(lab.monitor_pid()).unwrap();
    lab.client = Client::over(fd::seqpacket_pair().unwrap().0);
    assert!(wait_readable(pidfd.as_fd(), Duration::from_secs(60)), "it stays, and no later daemon knows of it");
    assert!(!lab.pod_dir().join(copepod::monitor_api::SOCKET).exists());
}
