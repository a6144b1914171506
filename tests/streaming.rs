//! Exec, attach and port-forward as their clients use them: the real crictl against the real daemon, in namespaces of the test's own.

#[path = "common/harness.rs"]
mod harness;
#[path = "common/node.rs"]
mod node;
#[path = "common/root.rs"]
mod root;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use copepod::api;
use copepod::sys::process::command;
use node::{BUSYBOX, Node, PATIENCE, shell};
use tonic::Code;

/// Bytes that go each way.
const MUCH: usize = 64 << 20;

fn main() -> ExitCode {
    if !root::root("tests/streaming.rs") {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 11 filtered out\n");
        return ExitCode::SUCCESS;
    }
    if !crictl_program().exists() {
        root::cannot_run("tests/streaming.rs", &format!("{} is missing: run hack/tools.sh", crictl_program().display()));
        return ExitCode::SUCCESS;
    }
    harness::enter_sandbox();
    let mut node = Node::new("streaming");
    fs::create_dir(node.dir.join("config.d")).unwrap();
    fs::write(node.dir.join("config.d/10-limits.yaml"), "runtime: {maxExecSessions: 100, maxAttachSessions: 3}\n").unwrap();
    node.start(None);
    node.pull(BUSYBOX);
    let code = harness::run(
        &mut node,
        &[
            ("bad_requests_get_no_url", bad_requests_get_no_url),
            ("exec_tells_streams_and_exit_code", exec_tells_streams_and_exit_code),
            ("exec_moves_much_each_way", exec_moves_much_each_way),
            ("exec_has_a_terminal", exec_has_a_terminal),
            ("attach_shares_a_container", attach_shares_a_container),
            ("ports_are_forwarded", ports_are_forwarded),
            ("fifty_connections_through_one_port", fifty_connections_through_one_port),
            ("a_hundred_execs_at_once", a_hundred_execs_at_once),
            ("a_container_has_as_many_clients_as_it_may", a_container_has_as_many_clients_as_it_may),
            ("clients_that_vanish_leave_nothing", clients_that_vanish_leave_nothing),
            ("a_daemon_that_is_killed_ends_sessions_and_no_container", a_daemon_that_is_killed_ends_sessions_and_no_container),
        ],
        |node| {
            if node.ended() {
                node.start(None);
            }
            node.remove_all_pods();
        },
    );
    node.remove_all_pods();
    node.kill();
    code
}

/// From the cache that hack/lib.sh names.
fn crictl_program() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("XDG_CACHE_HOME").unwrap_or_else(|| "/root/.cache".into())).join("copepod");
    std::env::var_os("COPEPOD_CACHE").map_or_else(home, PathBuf::from).join("tools/crictl")
}

fn crictl(node: &Node, args: &[&str]) -> std::process::Command {
    let socket = format!("unix://{}/copepod.sock", node.dir.display());
    let mut crictl = command(crictl_program());
    crictl.args(["--timeout", "60s", "--runtime-endpoint", &socket, "--image-endpoint", &socket]).args(args);
    crictl
}

/// Runs crictl with an input, to its end.
fn run(node: &Node, args: &[&str], input: &[u8]) -> Output {
    let mut child = crictl(node, args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("crictl");
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A command that ends early reads no further.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A client that somebody types into.
struct Talk {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Talk {
    fn new(mut client: std::process::Command) -> Self {
        let mut child = client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().expect("crictl");
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, stdin, stdout }
    }

    fn say(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).unwrap();
    }

    /// Reads lines up to one that has `word`.
    fn hear(&mut self, word: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the end comes instead of {word:?}, after {all:?}");
            all.push_str(&line);
            if line.contains(word) {
                return all;
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn end(mut self) -> (bool, String) {
        drop(self.stdin);
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().success(), rest)
    }
}

/// Asks again and again until there is an answer.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(state) => assert!(began.elapsed() < PATIENCE, "{what} does not come: {state}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes that are the same in every run and compress badly.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::from_fn(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.to_le_bytes())
    });
    words.take(bytes / 8).flatten().collect()
}

fn digest(bytes: &[u8]) -> String {
    let mut child = command("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    text(&child.wait_with_output().unwrap().stdout).split(' ').next().unwrap().to_string()
}

/// How many descriptors the daemon, the monitors and the stdio processes have open.
fn descriptors(node: &Node) -> BTreeMap<String, usize> {
    let daemon = node.daemon.as_ref().unwrap().id();
    let mut open = BTreeMap::new();
    for process in fs::read_dir("/proc").unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok()) {
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default().trim().to_string();
        if process.file_name().to_string_lossy() == daemon.to_string() || name.starts_with("copepod-monitor") || name.starts_with("copepod-stdio") {
            let count = fs::read_dir(process.path().join("fd")).map_or(0, |fds| fds.count());
            open.insert(format!("{name} {}", process.file_name().to_string_lossy()), count);
        }
    }
    open
}

fn bad_requests_get_no_url(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let id = node.create(&pod, &config, shell("main", "while :; do sleep 0.05; done")).unwrap();
    let exec = |request: api::ExecRequest| node.wait(node.client().exec(request)).map(|answer| answer.into_inner().url);
    let attach = |request: api::AttachRequest| node.wait(node.client().attach(request)).map(|answer| answer.into_inner().url);
    let forward = |id: &str, port: Vec<i32>| {
        let request = api::PortForwardRequest { pod_sandbox_id: id.into(), port };
        node.wait(node.client().port_forward(request)).map(|answer| answer.into_inner().url)
    };
    let good = api::ExecRequest { container_id: id.clone(), cmd: vec!["true".into()], stdout: true, ..Default::default() };
    let listens = api::AttachRequest { container_id: id.clone(), stdout: true, ..Default::default() };
    assert_eq!(exec(good.clone()).unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(attach(listens.clone()).unwrap_err().code(), Code::FailedPrecondition);
    node.start_container(&id).unwrap();
    for url in [exec(good.clone()).unwrap(), attach(listens.clone()).unwrap(), forward(&pod, vec![80]).unwrap(), forward(&pod, vec![]).unwrap()] {
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    }
    let refused = |answer: Result<String, tonic::Status>, word: &str| {
        let status = answer.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(word), "{status:?} is not about {word}");
    };
    refused(exec(api::ExecRequest { cmd: vec![], ..good.clone() }), "cmd");
    refused(exec(api::ExecRequest { cmd: vec!["a\0b".into()], ..good.clone() }), "NUL");
    refused(exec(api::ExecRequest { stdout: false, ..good.clone() }), "stdout");
    refused(exec(api::ExecRequest { tty: true, stderr: true, ..good.clone() }), "stderr");
    refused(attach(api::AttachRequest { stdout: false, ..listens.clone() }), "stdout");
    refused(attach(api::AttachRequest { tty: true, ..listens.clone() }), "tty");
    for port in [0, -1, 65536] {
        refused(forward(&pod, vec![80, port]), &port.to_string());
    }
    assert_eq!(exec(api::ExecRequest { container_id: "nothing".into(), ..good.clone() }).unwrap_err().code(), Code::NotFound);
    assert_eq!(attach(api::AttachRequest { container_id: "nothing".into(), ..listens.clone() }).unwrap_err().code(), Code::NotFound);
    assert_eq!(forward("nothing", vec![]).unwrap_err().code(), Code::NotFound);
    node.wait(node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() })).unwrap();
    assert_eq!(exec(good).unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(attach(listens).unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(forward(&pod, vec![80]).unwrap_err().code(), Code::FailedPrecondition);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn exec_tells_streams_and_exit_code(node: &mut Node) {
    let (pod, id) = node.run_script("while :; do sleep 0.05; done");
    let output = run(node, &["exec", &id, "sh", "-c", "echo out; echo err >&2"], b"");
    // crictl says something of its own on stderr.
    assert!(output.stdout == b"out\n" && text(&output.stderr).ends_with("err\n") && output.status.success(), "{output:?}");
    let output = run(node, &["exec", &id, "sh", "-c", "echo out; exit 7"], b"");
    assert!(!output.status.success() && text(&output.stderr).contains('7'), "{output:?}");
    assert_eq!(text(&output.stdout), "out\n");
    let output = run(node, &["exec", "-i", &id, "sh", "-c", "cat; echo end"], b"some words\n");
    assert_eq!(text(&output.stdout), "some words\nend\n");
    // A program that is not there.
    let output = run(node, &["exec", &id, "no-such-program"], b"");
    assert!(!output.status.success() && text(&output.stderr).contains("no-such-program"), "{output:?}");
    // A child in the background holds the streams; the command's end is the session's.
    let output = run(node, &["exec", &id, "sh", "-c", "sleep 1000 & echo now"], b"");
    assert_eq!(text(&output.stdout), "now\n");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn exec_moves_much_each_way(node: &mut Node) {
    let (pod, id) = node.run_script("while :; do sleep 0.05; done");
    let bytes = noise(MUCH);
    let want = digest(&bytes);
    let output = run(node, &["exec", "-i", &id, "sh", "-c", "cat > /tmp/data; sha256sum /tmp/data"], &bytes);
    assert_eq!(text(&output.stdout), format!("{want}  /tmp/data\n"), "{}", text(&output.stderr));
    let output = run(node, &["exec", &id, "cat", "/tmp/data"], b"");
    assert_eq!((output.stdout.len(), digest(&output.stdout)), (MUCH, want.clone()));
    let output = run(node, &["exec", "-i", &id, "cat"], &bytes);
    assert_eq!((output.stdout.len(), digest(&output.stdout)), (MUCH, want));
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn exec_has_a_terminal(node: &mut Node) {
    let (pod, id) = node.run_script("while :; do sleep 0.05; done");
    let typed = |what: &str| {
        let client = crictl(node, &["exec", "-it", &id, "sh"]);
        let words = std::iter::once(client.get_program()).chain(client.get_args()).map(|word| word.to_str().unwrap().to_string());
        let line = format!("{what}; exec {}", words.collect::<Vec<_>>().join(" "));
        let mut script = command("script");
        script.args(["-qefc", &line, "/dev/null"]);
        script
    };
    let mut talk = Talk::new(typed("stty cols 120 rows 40"));
    talk.say("tty && stty size && echo $TERM\n");
    let heard = talk.hear("xterm");
    assert!(heard.contains("/dev/pts/") && heard.contains("40 120"), "{heard:?}");
    talk.say("exit 5\n");
    let (well, rest) = talk.end();
    assert!(!well && rest.contains('5'), "{rest:?}");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn attach_shares_a_container(node: &mut Node) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let script = "echo ready; while read line; do echo \"out $line\"; done; exit 3";
    let container = api::ContainerConfig { stdin: true, stdin_once: false, ..shell("main", script) };
    let id = node.create(&pod, &config, container).unwrap();
    node.start_container(&id).unwrap();
    let log = format!("{}/main.log", config.log_directory);
    node.wait_log(&log, "ready");
    let mut one = Talk::new(crictl(node, &["attach", "-i", &id]));
    one.say("a\n");
    // History is not shown.
    assert_eq!(one.hear("out a"), "out a\n");
    let mut two = Talk::new(crictl(node, &["attach", "-i", &id]));
    two.say("b\n");
    assert_eq!(two.hear("out b"), "out b\n");
    assert_eq!(one.hear("out b"), "out b\n");
    one.kill();
    two.say("c\n");
    assert_eq!(two.hear("out c"), "out c\n");
    assert_eq!(node.status(&id).unwrap().state(), api::ContainerState::ContainerRunning);
    node.wait(node.client().stop_container(api::StopContainerRequest { container_id: id.clone(), timeout: 0 })).unwrap();
    assert!(two.end().0);
    let log = node.wait_log(&log, "out c");
    assert_eq!(log.lines().count(), 4, "{log}");
    node.remove_pod(&pod);

    // With stdin_once a client's end is the container's; and much passes, both ways.
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let container = api::ContainerConfig { stdin: true, stdin_once: true, log_path: String::new(), ..shell("main", "exec cat") };
    let id = node.create(&pod, &config, container).unwrap();
    node.start_container(&id).unwrap();
    let bytes = noise(MUCH);
    let output = run(node, &["attach", "-i", &id], &bytes);
    assert_eq!((output.stdout.len(), digest(&output.stdout)), (MUCH, digest(&bytes)), "{}", text(&output.stderr));
    assert_eq!(node.wait_exit(&id).exit_code, 0);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

/// A crictl that forwards a free local port, and that port.
fn forward(node: &Node, pod: &str, port: u16) -> (Talk, u16) {
    let mut talk = Talk::new(crictl(node, &["port-forward", pod, &format!(":{port}")]));
    let line = talk.hear("127.0.0.1:");
    let local = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()).unwrap();
    let local = local.parse().unwrap_or_else(|_| panic!("{line:?}"));
    (talk, local)
}

/// Sends all, ends its half, and reads to the end.
fn through(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut writing = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writing.write_all(bytes).unwrap();
            writing.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back
    })
}

/// Answers what it gets, each connection for itself; ready when it listens: crictl gives up after a connection that was refused.
const SERVER: &str = "nc -ll -p 9000 -e cat & until cat /proc/net/tcp /proc/net/tcp6 | grep -q ':2328 '; do sleep 0.01; done; \
                      echo ready; while :; do sleep 0.05; done";

fn ports_are_forwarded(node: &mut Node) {
    let (pod, _) = node.run_ready(SERVER);
    let (talk, port) = forward(node, &pod, 9000);
    let bytes = noise(MUCH);
    let back = through(port, &bytes);
    assert!(back == bytes, "{} bytes came back, and not those that were sent", back.len());
    talk.kill();
    node.remove_pod(&pod);
    // A pod on the host's network, and a port that nobody listens on.
    let pod = run_host_pod(node);
    let listener = std::net::TcpListener::bind("[::1]:0").unwrap();
    let served = listener.local_addr().unwrap().port();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        stream.write_all(b"answer").unwrap();
        heard
    });
    let (talk, port) = forward(node, &pod, served);
    assert_eq!(through(port, b"question"), b"answer");
    assert_eq!(serving.join().unwrap(), b"question");
    talk.kill();
    let (talk, port) = forward(node, &pod, served);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    assert!(!talk.end().0);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

/// A pod on the host's network, which is that of this test.
fn run_host_pod(node: &Node) -> String {
    let options = api::NamespaceOption { network: api::NamespaceMode::Node.into(), ..Default::default() };
    let context = api::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = api::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    node.run_pod(&api::PodSandboxConfig { linux: Some(linux), ..node.pod_config() }).unwrap()
}

fn fifty_connections_through_one_port(node: &mut Node) {
    let pod = run_host_pod(node);
    // Not busybox's nc, which resets some of so many.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (talk, port) = forward(node, &pod, listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for stream in listener.incoming().take(50).flatten() {
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream).and_then(|_| stream.shutdown(Shutdown::Write)));
        }
    });
    let clients: Vec<_> = (0..50_usize)
        .map(|n| {
            std::thread::spawn(move || {
                let bytes = noise((200 << 10) + n * 8);
                through(port, &bytes) == bytes
            })
        })
        .collect();
    assert!(clients.into_iter().all(|client| client.join().unwrap()));
    talk.kill();
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn a_hundred_execs_at_once(node: &mut Node) {
    let (pod, id) = node.run_script("while :; do sleep 0.05; done");
    let talks: Vec<_> = (0..100)
        .map(|n| {
            let mut talk = Talk::new(crictl(node, &["exec", "-i", &id, "sh", "-c", "echo up; read line; echo \"got $line\""]));
            talk.say(&format!("{n}\n"));
            talk
        })
        .collect();
    for (n, mut talk) in talks.into_iter().enumerate() {
        talk.hear("up");
        assert_eq!(talk.end(), (true, format!("got {n}\n")));
    }
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn a_container_has_as_many_clients_as_it_may(node: &mut Node) {
    let (pod, id) = node.run_ready("echo ready; while :; do echo more; sleep 0.05; done");
    let attach = || {
        let mut talk = Talk::new(crictl(node, &["attach", &id]));
        talk.hear("more");
        talk
    };
    let talks: Vec<_> = (0..3).map(|_| attach()).collect();
    let output = run(node, &["attach", &id], b"");
    assert!(!output.status.success() && text(&output.stderr).contains("3 attach sessions"), "{output:?}");
    talks.into_iter().for_each(Talk::kill);
    // One that has gone makes room.
    until("room", || {
        let mut talk = Talk::new(crictl(node, &["attach", &id]));
        let mut line = String::new();
        talk.stdout.read_line(&mut line).unwrap();
        talk.kill();
        if line.contains("more") { Ok(()) } else { Err(line) }
    });
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

/// The processes of a container whose command line has `word`.
fn count(node: &Node, id: &str, word: &str) -> usize {
    let processes = node.exec(id, &["ps"], 10).unwrap();
    text(&processes.stdout).lines().filter(|line| line.contains(word)).count()
}

fn clients_that_vanish_leave_nothing(node: &mut Node) {
    let (pod, id) = node.run_ready(SERVER);
    // What is made once, on the first use, is not counted.
    run(node, &["exec", &id, "true"], b"");
    let (talk, port) = forward(node, &pod, 9000);
    assert_eq!(through(port, b"x"), b"x");
    talk.kill();
    let before = until("rest", || {
        let first = descriptors(node);
        std::thread::sleep(Duration::from_millis(300));
        if descriptors(node) == first { Ok(first) } else { Err("it changes".into()) }
    });
    let mut talks: Vec<_> = (0..5)
        .map(|_| {
            let mut talk = Talk::new(crictl(node, &["exec", "-i", &id, "sh", "-c", "echo up; setsid sleep 4321 & sleep 4321"]));
            talk.hear("up");
            talk
        })
        .collect();
    talks.extend((0..2).map(|_| Talk::new(crictl(node, &["attach", &id]))));
    let (talk, port) = forward(node, &pod, 9000);
    let mut open = TcpStream::connect(("127.0.0.1", port)).unwrap();
    open.write_all(b"y").unwrap();
    open.read_exact(&mut [0]).unwrap();
    talks.push(talk);
    assert!(count(node, &id, "sleep 4321") >= 10);
    talks.into_iter().for_each(Talk::kill);
    until("the end of what was exec'd", || match count(node, &id, "sleep 4321") {
        0 => Ok(()),
        n => Err(format!("{n} processes")),
    });
    until("the descriptors as before", || {
        let now = descriptors(node);
        if now == before { Ok(()) } else { Err(format!("{now:?} instead of {before:?}")) }
    });
    assert_eq!(node.status(&id).unwrap().state(), api::ContainerState::ContainerRunning);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

fn a_daemon_that_is_killed_ends_sessions_and_no_container(node: &mut Node) {
    let (pod, id) = node.run_ready("echo ready; while :; do sleep 0.05; done");
    let mut exec = Talk::new(crictl(node, &["exec", "-i", &id, "sh", "-c", "echo up; sleep 5432"]));
    exec.hear("up");
    let attached = Talk::new(crictl(node, &["attach", &id]));
    node.kill();
    exec.end();
    attached.end();
    node.start(None);
    until("the end of what was exec'd", || match count(node, &id, "sleep 5432") {
        0 => Ok(()),
        n => Err(format!("{n} processes")),
    });
    assert_eq!(node.status(&id).unwrap().state(), api::ContainerState::ContainerRunning);
    // New sessions work at once.
    assert_eq!(text(&run(node, &["exec", &id, "echo", "well"], b"").stdout), "well\n");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}
