//! Clients attached to containers, and terminals.

use std::os::fd::{AsFd, OwnedFd};

use copepod::errchain::{Kind, Kinded, Remote};
use copepod::monitor_api::{self as api, Body, Call, FromClient, ToClient};
use copepod::plan::ExecPlan;
use copepod::sys::fd;
use copepod::wire;

use crate::lab::{Lab, pipe, read_available, shell, until, written};
use crate::monitor_client::{Client, DEADLINE, sealed, wait_readable};

/// What an attached client has in its hands.
struct Session {
    control: OwnedFd,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Session {
    fn new(lab: &mut Lab, container: &str) -> Result<Self, Remote> {
        let (control, theirs) = fd::seqpacket_pair().unwrap();
        let ((stdin_theirs, stdin), (stdout, stdout_theirs), (stderr, stderr_theirs)) = (pipe(), pipe(), pipe());
        let call = Call::Attach(api::Attach { container: container.into(), stdin: true, stdout: true, stderr: true });
        let fds = [theirs.as_fd(), stdin_theirs.as_fd(), stdout_theirs.as_fd(), stderr_theirs.as_fd()];
        assert_eq!(lab.client.call(call, &fds)?.0, Body::Done);
        Ok(Self { control, stdin: Some(stdin), stdout, stderr })
    }

    fn say(&self, text: &str) {
        assert_eq!(rustix::io::write(self.stdin.as_ref().unwrap(), text.as_bytes()).unwrap(), text.len());
    }

    fn resize(&self, columns: u16, rows: u16) {
        fd::send(self.control.as_fd(), &wire::encode(&FromClient::Resize(api::Resize { columns, rows })), &[]).unwrap();
    }

    /// Its last word, or that there was none.
    fn end(&self) -> Option<Option<Remote>> {
        assert!(wait_readable(self.control.as_fd(), DEADLINE), "the session does not end");
        let (bytes, _) = fd::receive(self.control.as_fd(), api::MAX_MESSAGE).ok().flatten()?;
        match wire::decode(&bytes).unwrap() {
            ToClient::Ended(end) => Some(end.error),
            other => panic!("{other:?}"),
        }
    }
}

/// Reads until the bytes end with `end`.
fn read_until(fd: &OwnedFd, end: &str) -> String {
    let mut text = String::new();
    while !text.ends_with(end) {
        assert!(wait_readable(fd.as_fd(), DEADLINE), "{end:?} does not come after {text:?}");
        let mut buffer = [0; 4096];
        let n = rustix::io::read(fd, &mut buffer).unwrap();
        assert!(n > 0, "the end comes after {text:?} instead of {end:?}");
        text.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    text
}

/// Reads to the end; how many bytes.
fn read_all(fd: &OwnedFd) -> usize {
    let (mut all, mut buffer) = (0, vec![0; 65536]);
    loop {
        match rustix::io::read(fd, &mut buffer).unwrap() {
            0 => return all,
            n => all += n,
        }
    }
}

const ECHO: &str = "echo before; while read line; do echo \"out $line\"; echo \"err $line\" >&2; done; echo end; exit 3";

fn run_reading(lab: &mut Lab, id: &str, script: &str, once: bool) {
    let mut plan = lab.plan(id, script);
    (plan.stdin, plan.stdin_once) = (true, once);
    lab.run_plan(&plan);
}

pub fn clients_get_what_is_written_from_then_on() {
    let mut lab = Lab::new();
    run_reading(&mut lab, "c1", ECHO, false);
    lab.log_until("c1", |lines| written(lines, "stdout") == b"before\n");
    let (one, two) = (Session::new(&mut lab, "c1").unwrap(), Session::new(&mut lab, "c1").unwrap());
    for (speaker, word) in [(&one, "a"), (&two, "b")] {
        speaker.say(&format!("{word}\n"));
        for session in [&one, &two] {
            assert_eq!(read_until(&session.stdout, &format!("{word}\n")), format!("out {word}\n"));
            assert_eq!(read_until(&session.stderr, &format!("{word}\n")), format!("err {word}\n"));
        }
    }
    // One that goes takes nothing with it, nor does the end of what it says.
    drop(one);
    let mut two = two;
    two.say("c\n");
    assert_eq!(read_until(&two.stdout, "c\n"), "out c\n");
    two.stdin = None;
    let three = Session::new(&mut lab, "c1").unwrap();
    three.say("d\n");
    assert_eq!(read_until(&two.stdout, "d\n"), "out d\n");
    lab.stop("c1", libc::SIGKILL, 0).unwrap();
    for session in [two, three] {
        assert_eq!(session.end(), Some(None));
        read_all(&session.stdout);
        read_all(&session.stderr);
    }
    let lines = lab.log("c1");
    assert_eq!(written(&lines, "stdout"), b"before\nout a\nout b\nout c\nout d\n");
    assert_eq!(written(&lines, "stderr"), b"err a\nerr b\nerr c\nerr d\n");
    lab.finish();
}

pub fn clients_attach_to_running_containers_alone() {
    let mut lab = Lab::new();
    let check = |result: Result<Session, Remote>, kind: Kind, text: &str| {
        let error = result.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.to_string().contains(text)), (kind, true), "{error:?}");
    };
    check(Session::new(&mut lab, "c1"), Kind::NotFound, "no container c1");
    let plan = lab.plan("c1", "while ! [ -e /flags/go ]; do sleep 0.01; done");
    lab.create(&plan).unwrap();
    check(Session::new(&mut lab, "c1"), Kind::FailedPrecondition, "has not been started");
    lab.start("c1").unwrap();
    let call = Call::Attach(api::Attach { container: "c1".into(), stdin: true, ..api::Attach::default() });
    let (control, _theirs) = fd::seqpacket_pair().unwrap();
    assert_eq!(lab.client.call(call, &[control.as_fd()]).unwrap_err().kind(), Kind::InvalidArgument);
    // A container that reads nothing has clients all the same; what they say goes nowhere.
    let session = Session::new(&mut lab, "c1").unwrap();
    until("the pipe to be closed", || rustix::io::write(session.stdin.as_ref().unwrap(), b"x").is_err().then_some(()));
    lab.flag("go");
    lab.client.exited("c1");
    assert_eq!(session.end(), Some(None));
    check(Session::new(&mut lab, "c1"), Kind::FailedPrecondition, "has exited");
    lab.finish();
}

pub fn stdin_ends_with_the_first_client_if_asked_for() {
    let mut lab = Lab::new();
    // The first client's input ends; or the client itself is gone.
    for (id, gone) in [("c1", false), ("c2", true)] {
        run_reading(&mut lab, id, ECHO, true);
        let mut first = Session::new(&mut lab, id).unwrap();
        let second = Session::new(&mut lab, id).unwrap();
        first.say("a\n");
        assert_eq!(read_until(&second.stdout, "out a\n").lines().last(), Some("out a"));
        second.say("b\n");
        assert!(read_until(&second.stdout, "out b\n").ends_with("out b\n"));
        first.stdin = None;
        if gone {
            drop(first);
        } else {
            assert!(read_until(&first.stdout, "end\n").ends_with("out b\nend\n"));
            assert_eq!(first.end(), Some(None));
        }
        assert_eq!(read_until(&second.stdout, "end\n"), "end\n");
        assert_eq!(second.end(), Some(None));
        assert_eq!(lab.client.exited(id).code, 3);
    }
    lab.finish();
}

pub fn a_client_that_stops_reading_holds_up_nobody() {
    let mut lab = Lab::new();
    const BYTES: usize = 16 << 20;
    let script = format!("while ! [ -e /flags/go ]; do sleep 0.01; done; head -c {BYTES} /dev/zero | tr '\\0' x; exit 5");
    lab.run("c1", &script);
    let (stuck, reader) = (Session::new(&mut lab, "c1").unwrap(), Session::new(&mut lab, "c1").unwrap());
    let reading = std::thread::spawn(move || (read_all(&reader.stdout), reader.end()));
    // Another container of the pod is not touched by any of it.
    lab.run("c2", "while ! [ -e /flags/go ]; do sleep 0.01; done; echo well");
    lab.flag("go");
    assert_eq!(lab.client.exited("c2").code, 0);
    assert_eq!(lab.client.exited("c1").code, 5);
    let error = stuck.end().flatten().expect("a reason");
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{error:?}");
    // What its pipe holds can be read up to its end.
    assert!(read_all(&stuck.stdout) > 0);
    assert_eq!(reading.join().unwrap(), (BYTES, Some(None)));
    let lines = lab.log_until("c1", |lines| written(lines, "stdout").len() >= BYTES);
    assert_eq!(written(&lines, "stdout").len(), BYTES);
    lab.finish();
}

pub fn a_container_that_does_not_read_holds_up_nobody() {
    let mut lab = Lab::new();
    run_reading(&mut lab, "c1", "echo up; while ! [ -e /flags/go ]; do sleep 0.01; done; echo down; wc -c", true);
    let mut session = Session::new(&mut lab, "c1").unwrap();
    let stdin = session.stdin.take().unwrap();
    const BYTES: usize = 1 << 20;
    let saying = std::thread::spawn(move || {
        let mut said = 0;
        while said < BYTES {
            said += rustix::io::write(&stdin, &vec![b'x'; BYTES - said]).unwrap();
        }
    });
    lab.run("c2", "echo well");
    lab.client.exited("c2");
    lab.log_until("c2", |lines| written(lines, "stdout") == b"well\n");
    lab.flag("go");
    saying.join().unwrap();
    assert!(read_until(&session.stdout, &format!("{BYTES}\n")).ends_with(&format!("down\n{BYTES}\n")));
    assert_eq!(session.end(), Some(None));
    lab.finish();
}

pub fn a_terminal_is_shared_and_resized() {
    let mut lab = Lab::new();
    let mut plan = lab.plan("c1", "echo up; while read line; do stty size; echo \"got $line\"; done; echo end; exit 4");
    (plan.stdin, plan.stdin_once, plan.process.terminal) = (true, true, true);
    lab.run_plan(&plan);
    lab.log_until("c1", |lines| written(lines, "stdout").ends_with(b"up\r\n"));
    let (one, two) = (Session::new(&mut lab, "c1").unwrap(), Session::new(&mut lab, "c1").unwrap());
    one.resize(132, 43);
    one.say("a\n");
    for session in [&one, &two] {
        assert_eq!(read_until(&session.stdout, "got a\r\n"), "a\r\n43 132\r\ngot a\r\n");
    }
    two.resize(80, 24);
    two.say("b\n");
    assert!(read_until(&two.stdout, "got b\r\n").contains("24 80\r\n"));
    // The first client goes, and the shell's input has an end.
    drop(one);
    assert!(read_until(&two.stdout, "end\r\n").ends_with("end\r\n"));
    assert_eq!(two.end(), Some(None));
    assert_eq!(lab.client.exited("c1").code, 4);
    lab.finish();
}

pub fn clients_end_with_the_stdio_process_and_come_back() {
    let mut lab = Lab::new();
    run_reading(&mut lab, "c1", ECHO, false);
    run_reading(&mut lab, "once", ECHO, true);
    let (one, first) = (Session::new(&mut lab, "c1").unwrap(), Session::new(&mut lab, "once").unwrap());
    let pid = lab.stdio_pid();
    let pidfd = copepod::sys::process::pidfd_open(pid).unwrap();
    copepod::sys::process::signal(pidfd.as_fd(), libc::SIGKILL as u32).unwrap();
    assert_eq!(one.end(), None);
    assert_eq!(first.end(), None);
    until("another stdio process", || Some(lab.stdio_pid()).filter(|new| *new != pid));
    let two = Session::new(&mut lab, "c1").unwrap();
    two.say("a\n");
    assert_eq!(read_until(&two.stdout, "a\n"), "out a\n");
    // The client has gone with which this one's input ends.
    assert_eq!(lab.client.exited("once").code, 3);
    lab.stop("c1", libc::SIGKILL, 0).unwrap();
    assert_eq!(two.end(), Some(None));
    lab.finish();
}

pub fn an_exec_has_a_terminal() {
    let mut lab = Lab::new();
    lab.run("c1", "sleep 1000");
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut process = shell("read line; stty size; echo \"got $line\"; exit 6");
    process.terminal = true;
    let plan = sealed(&ExecPlan { process, timeout_ms: 0 });
    let call = Call::Exec(api::Exec { container: "c1".into(), id: "e1".into(), stdin: false });
    let (body, mut fds) = lab.client.call(call, &[plan.as_fd(), null.as_fd(), null.as_fd()]).unwrap();
    assert!(matches!(body, Body::ExecStarted(_)), "{body:?}");
    let master = fds.pop().expect("the terminal's master");
    copepod::sys::terminal::resize(master.as_fd(), 99, 33).unwrap();
    rustix::io::write(&master, b"a\n").unwrap();
    assert_eq!(read_until(&master, "got a\r\n"), "a\r\n33 99\r\ngot a\r\n");
    assert_eq!(lab.client.exec_exited("e1").code, 6);
    lab.finish();
}

pub fn execs_end_with_the_connection_that_asked_for_them() {
    let mut lab = Lab::new();
    lab.run("c1", "sleep 1000");
    let stdout = lab.ask_exec("c1", "e1", "setsid sleep 778 & echo up; sleep 778", 0).unwrap();
    assert_eq!(read_until(&stdout, "up\n"), "up\n");
    lab.client = Client::connect(&lab.pod_dir());
    until("the exec to be killed", || lab.client.hello().execs.is_empty().then_some(()));
    assert_eq!(lab.exec("c1", "e2", "pgrep -f '[s]leep 778'; true", 0).unwrap().stdout, "");
    // The container was not touched.
    assert_eq!(lab.exec("c1", "e3", "echo well", 0).unwrap().stdout, "well\n");
    assert_eq!(read_available(&stdout), "");
    lab.finish();
}

pub fn a_newer_daemons_call_is_refused() {
    let mut lab = Lab::new();
    let mut bytes = api::encode(&api::Request { seq: 9_999, call: Call::StopSandbox }).unwrap();
    let tag = bytes.iter().rposition(|&byte| byte == 11).unwrap();
    bytes[tag] = 120;
    fd::send(lab.client.socket(), &bytes, &[]).unwrap();
    let error = lab.client.answer(9_999).unwrap_err();
    assert_eq!(error.kind(), Kind::Unimplemented, "{error:?}");
    assert_eq!(lab.client.hello().containers.len(), 0);
    lab.run("c1", "exit 2");
    assert_eq!(lab.client.exited("c1").code, 2);
    lab.finish();
}
