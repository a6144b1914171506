//! A monitor, a root filesystem, and what containers leave behind.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use copepod::cgroup::{Cgroup, Hierarchy};
use copepod::errchain::Remote;
use copepod::monitor_api::{self as api, Body, Call, Container, Created, ExitRecord, exit_record};
use copepod::plan::*;
use copepod::sys::{fd, process};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::monitor_client::{Client, DEADLINE, sealed, wait_readable};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A pod's directory with its monitor.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub client: Client,
    pub hierarchy: Hierarchy,
    pub cgroups: String,
    monitor: Option<Child>,
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub stream: String,
    pub full: bool,
    pub content: Vec<u8>,
}

/// What an exec'd process wrote and how it ended.
#[derive(Debug)]
pub struct Output {
    pub stdout: String,
    pub ended: api::ExecExited,
}

impl Lab {
    /// A monitor that was greeted, without a sandbox.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("copepod-monitor-").tempdir().unwrap();
        for name in ["layers", "pivot", "pod", "logs", "flags"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        unpack_busybox(&dir.path().join("layers/base"));
        let (ours, theirs) = fd::seqpacket_pair().unwrap();
        let monitor = process::command(monitor_program())
            .arg("--pod-dir")
            .arg(dir.path().join("pod"))
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut client = Client::over(ours);
        let snapshot = client.hello();
        assert_eq!((snapshot.hello.version, snapshot.containers.len(), snapshot.sandbox), (api::VERSION, 0, None));
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let cgroups = format!("/copepod-test-{}-{number}", std::process::id());
        Self { dir, client, hierarchy: Hierarchy::detect().unwrap(), cgroups, monitor: Some(monitor) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pod_dir(&self) -> PathBuf {
        self.path("pod")
    }

    pub fn monitor_pid(&self) -> u32 {
        self.monitor.as_ref().unwrap().id()
    }

    /// A plan for a plain container that runs a shell script.
    pub fn plan(&self, id: &str, script: &str) -> ContainerPlan {
        let writable = self.path("writable").join(id);
        let (upper, work) = (writable.join("upper"), writable.join("work"));
        std::fs::create_dir_all(&upper).unwrap();
        std::fs::create_dir_all(&work).unwrap();
        ContainerPlan {
            id: id.into(),
            rootfs: Rootfs::Overlay(Overlay { layers_dir: self.path("layers"), lower: vec!["base".into()], upper, work, ..Overlay::default() }),
            mounts: default_mounts().into_iter().chain([bind(&self.path("flags"), "/flags")]).collect(),
            namespaces: Namespaces {
                net: Namespace::Private,
                ipc: Namespace::Private,
                uts: Namespace::Private,
                pid: Namespace::Private,
                cgroup: Namespace::Host,
            },
            cgroup: CgroupPlan { path: format!("{}/{id}", self.cgroups), ..CgroupPlan::default() },
            process: shell(script),
            log: LogPlan { dir: self.path("logs"), path: format!("{id}/0.log").into(), max_line: 0 },
            pivot_dir: self.path("pivot"),
            ..ContainerPlan::default()
        }
    }

    /// Asks for a container; the request's number.
    pub fn ask_create(&mut self, plan: &ContainerPlan) -> u32 {
        let exit = std::fs::File::create(self.exit_path(&plan.id)).unwrap();
        exit.set_len(exit_record::SIZE).unwrap();
        let call = Call::CreateContainer(api::CreateContainer { id: plan.id.clone() });
        self.client.ask(call, &[sealed(plan).as_fd(), exit.as_fd()])
    }

    pub fn create(&mut self, plan: &ContainerPlan) -> Result<Created, Remote> {
        let seq = self.ask_create(plan);
        match self.client.answer(seq)? {
            (Body::Created(created), _) => Ok(created),
            (other, _) => panic!("CreateContainer is answered by {other:?}"),
        }
    }

    pub fn start(&mut self, id: &str) -> Result<(), Remote> {
        match self.client.call(Call::StartContainer(container(id)), &[])? {
            (Body::Started(started), _) => assert!(started.started_at > 0),
            (other, _) => panic!("StartContainer is answered by {other:?}"),
        }
        Ok(())
    }

    /// Creates and starts a container that runs a shell script.
    pub fn run(&mut self, id: &str, script: &str) -> Created {
        let plan = self.plan(id, script);
        self.run_plan(&plan)
    }

    pub fn run_plan(&mut self, plan: &ContainerPlan) -> Created {
        let created = self.create(plan).unwrap();
        self.start(&plan.id).unwrap();
        created
    }

    pub fn ask_stop(&mut self, id: &str, signal: i32, grace_ms: u64) -> u32 {
        self.client.ask(Call::StopContainer(api::StopContainer { id: id.into(), signal: signal as u32, grace_ms }), &[])
    }

    pub fn stop(&mut self, id: &str, signal: i32, grace_ms: u64) -> Result<(), Remote> {
        let seq = self.ask_stop(id, signal, grace_ms);
        self.client.answer(seq).map(|(body, _)| assert_eq!(body, Body::Done))
    }

    pub fn remove(&mut self, id: &str) -> Result<(), Remote> {
        self.client.done(Call::RemoveContainer(container(id)))
    }

    /// Runs a shell script in a container; answers when it runs.
    pub fn ask_exec(&mut self, container: &str, id: &str, script: &str, timeout_ms: u64) -> Result<OwnedFd, Remote> {
        let ((stdout, out), (_, err)) = (pipe(), pipe());
        let plan = sealed(&ExecPlan { process: shell(script), timeout_ms });
        let call = Call::Exec(api::Exec { container: container.into(), id: id.into(), stdin: false });
        match self.client.call(call, &[plan.as_fd(), out.as_fd(), err.as_fd()])? {
            (Body::ExecStarted(_), _) => Ok(stdout),
            (other, _) => panic!("Exec is answered by {other:?}"),
        }
    }

    pub fn exec(&mut self, container: &str, id: &str, script: &str, timeout_ms: u64) -> Result<Output, Remote> {
        let stdout = self.ask_exec(container, id, script, timeout_ms)?;
        let ended = self.client.exec_exited(id);
        Ok(Output { stdout: read_available(&stdout), ended })
    }

    /// The record in a container's exit file, when it is there.
    pub fn exit_file(&self, id: &str) -> Option<ExitRecord> {
        let bytes = std::fs::read(self.exit_path(id)).unwrap();
        assert_eq!(bytes.len() as u64, exit_record::SIZE);
        exit_record::decode(&bytes)
    }

    fn exit_path(&self, id: &str) -> PathBuf {
        self.path(&format!("exit-{id}"))
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.path("logs").join(id).join("0.log")
    }

    /// The lines in a log up to now. A reader may see a write before it is complete.
    pub fn log(&self, id: &str) -> Vec<Line> {
        let mut bytes = std::fs::read(self.log_path(id)).unwrap_or_default();
        bytes.truncate(bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1));
        parse_log(&bytes)
    }

    /// The lines of a log once `done` is content with them.
    pub fn log_until(&self, id: &str, done: impl Fn(&[Line]) -> bool) -> Vec<Line> {
        until(&format!("the log of {id}"), || Some(self.log(id)).filter(|lines| done(lines)))
    }

    /// Makes a file that every container sees as /flags/NAME: how a test tells one to go on, where an exec would be killed with
    /// a container that goes on to its end.
    pub fn flag(&self, name: &str) {
        std::fs::write(self.path("flags").join(name), "").unwrap();
    }

    /// The processes of this monitor's program: itself, its stdio process, its creators.
    pub fn processes(&self) -> BTreeMap<u32, String> {
        let dir = self.pod_dir();
        let mine = |pid: u32| {
            let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            cmdline.split(|&b| b == 0).any(|arg| arg == dir.as_os_str().as_encoded_bytes()).then(|| (pid, comm.trim().to_string()))
        };
        std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).filter_map(mine).collect()
    }

    pub fn stdio_pid(&self) -> u32 {
        let find = || self.processes().into_iter().find(|(_, name)| name == "copepod-stdio").map(|(pid, _)| pid);
        until("the stdio process", find)
    }

    /// Takes everything down and proves that nothing is left.
    pub fn finish(mut self) {
        self.client.done(Call::StopSandbox).unwrap();
        let snapshot = self.client.hello();
        assert!(snapshot.stopped);
        for state in snapshot.containers {
            assert!(state.exit.is_some(), "{state:?}");
            self.remove(&state.id).unwrap();
        }
        self.client.done(Call::Exit).unwrap();
        let status = self.monitor.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}");
        assert_eq!(self.processes(), BTreeMap::new());
        for container in std::fs::read_dir(self.path("logs")).unwrap() {
            let files = std::fs::read_dir(container.unwrap().path()).unwrap();
            files.for_each(|file| drop(read_log(&file.unwrap().path())));
        }
        assert!(!Cgroup::new(&self.hierarchy, &self.cgroups).unwrap().dirs().iter().any(|(_, dir)| dir.exists()), "control groups are left");
        let dir = self.dir.path().to_str().unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir), "mounts are left: {mounts}");
        assert!(!self.pod_dir().join(api::SOCKET).exists());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // After a test that failed: what the monitor was not asked to do is done here.
        if let Some(mut monitor) = self.monitor.take() {
            let _ = monitor.kill();
            let _ = monitor.wait();
        }
        if let Ok(group) = Cgroup::new(&self.hierarchy, &self.cgroups) {
            let _ = group.kill(DEADLINE);
            let _ = group.remove(DEADLINE);
        }
        for pid in self.processes().into_keys() {
            if let Ok(pidfd) = process::pidfd_open(pid) {
                let _ = process::signal(pidfd.as_fd(), libc::SIGKILL as u32);
            }
        }
    }
}

/// The program under test: cargo's build, or the one that `COPEPOD_TEST_MONITOR` names, such as the static one that is shipped.
fn monitor_program() -> OsString {
    std::env::var_os(SHIPPED).unwrap_or_else(|| env!("CARGO_BIN_EXE_copepod-monitor").into())
}

/// Names the program that is shipped.
pub const SHIPPED: &str = "COPEPOD_TEST_MONITOR";

pub fn container(id: &str) -> Container {
    Container { id: id.into() }
}

/// Asks again and again until there is an answer.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

/// What a pipe holds now.
pub fn read_available(fd: &OwnedFd) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while wait_readable(fd.as_fd(), std::time::Duration::ZERO) {
        match rustix::io::read(fd, &mut buffer).unwrap() {
            0 => break,
            n => bytes.extend_from_slice(&buffer[..n]),
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// The lines of a log that nobody writes any more.
pub fn read_log(path: &Path) -> Vec<Line> {
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "{} ends in mid-line", path.display());
    parse_log(&bytes)
}

/// Lines, each checked to be well formed.
fn parse_log(bytes: &[u8]) -> Vec<Line> {
    let parse = |line: &[u8]| {
        let text = String::from_utf8_lossy(line);
        let mut parts = line.splitn(4, |&b| b == b' ');
        let mut next = || parts.next().unwrap_or_else(|| panic!("malformed line {text:?}"));
        let (time, stream, tag, content) = (next(), next(), next(), next());
        assert!(time.len() == 30 && time.ends_with(b"Z") && time[10] == b'T', "{text:?}");
        assert!(matches!(stream, b"stdout" | b"stderr") && matches!(tag, b"F" | b"P"), "{text:?}");
        Line { stream: String::from_utf8(stream.to_vec()).unwrap(), full: tag == b"F", content: content.to_vec() }
    };
    bytes.split_inclusive(|&b| b == b'\n').map(|line| parse(&line[..line.len() - 1])).collect()
}

/// What a container had written to one stream, from its lines.
pub fn written(lines: &[Line], stream: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in lines.iter().filter(|line| line.stream == stream) {
        bytes.extend_from_slice(&line.content);
        if line.full {
            bytes.push(b'\n');
        }
    }
    bytes
}

pub fn shell(script: &str) -> Process {
    const DEFAULT: u64 = 0xa804_25fb;
    Process {
        args: ["sh", "-c", script].map(OsString::from).to_vec(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        capabilities: Capabilities { bounding: DEFAULT, permitted: DEFAULT, effective: DEFAULT, ..Capabilities::default() },
        restrict_oom_score_adj: true,
        ..Process::default()
    }
}

pub fn mount(target: &str, kind: MountKind) -> Mount {
    Mount { target: target.into(), kind, nosuid: true, nodev: true, noexec: true, ..Mount::default() }
}

pub fn bind(source: &Path, target: &str) -> Mount {
    let bind = Bind { source: source.into(), recursive: true, ..Bind::default() };
    Mount { target: target.into(), kind: MountKind::Bind(bind), ..Mount::default() }
}

fn default_mounts() -> Vec<Mount> {
    vec![
        mount("/proc", MountKind::Proc),
        Mount { nodev: false, noexec: false, options: "mode=755,size=65536k".into(), ..mount("/dev", MountKind::Tmpfs) },
        Mount { nodev: false, options: "newinstance,ptmxmode=0666,mode=0620,gid=5".into(), ..mount("/dev/pts", MountKind::Devpts) },
        Mount { readonly: true, ..mount("/sys", MountKind::Sysfs) },
    ]
}

/// A root with busybox, from where Debian's busybox-static has it or `COPEPOD_TEST_BUSYBOX` says.
fn unpack_busybox(root: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "data", "flags"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    let named = std::env::var_os("COPEPOD_TEST_BUSYBOX").map(PathBuf::from);
    let busybox = named.into_iter().chain(["/bin/busybox".into(), "/usr/bin/busybox".into()]).find(|path| path.exists());
    let busybox = busybox.expect("a static busybox is needed: apt-get install busybox-static, or name one in COPEPOD_TEST_BUSYBOX");
    std::fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    let list = process::command(&busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
}
