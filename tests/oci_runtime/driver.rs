//! Does what a monitor does, and no more: forks creators, passes descriptors, releases, reaps.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use copepod::cgroup::Cgroup;
use copepod::errchain::{Chain, Kind, Kinded, Remote};
use copepod::oci::create::{CreatedInit, PodFds, Stdio};
use copepod::oci::exec::{ExecEvent, ExecStarted, ExecTarget};
use copepod::oci::handshake::{self, Outcome};
use copepod::oci::sandbox::SandboxNamespaces;
use copepod::oci::{Hierarchy, OciError, create, delete, exec, sandbox};
use copepod::plan::*;
use copepod::sys::process::{CloneArgs, spawn};
use copepod::sys::{fd, process};
use copepod::wire;
use copepod::wire_struct;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, WaitOptions};

/// Beyond this something hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A root filesystem, a directory for writable layers, and a place in the control groups.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub hierarchy: Hierarchy,
    pub cgroups: String,
    count: std::cell::Cell<u32>,
    parents: RefCell<Vec<String>>,
}

/// A pod's namespaces, held as the monitor holds them.
pub struct Pod {
    pub namespaces: SandboxNamespaces,
}

/// A container that was created.
pub struct Container {
    pub plan: ContainerPlan,
    pub init: CreatedInit,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    pub ended: Option<Ended>,
}

/// A process that runs in a container.
pub struct Exec {
    pub started: ExecStarted,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub code: i32,
    pub signal: u32,
}

/// What a process wrote, and how it ended.
#[derive(Debug)]
pub struct Output {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

impl Output {
    pub fn lines(&self) -> Vec<&str> {
        self.stdout.lines().collect()
    }
}

wire_struct! {
    struct Reply {
        1 ok: bool,
        2 error: Option<Remote>,
        3 user: ResolvedUser,
        4 parents: Vec<String>,
        5 numbers: Vec<u32>,
        6 has: Vec<bool>,
    }
}

/// Runs `work` in a fork, as a creator, and gives its answer and descriptors.
fn creator(work: impl FnOnce() -> Result<(Reply, Vec<OwnedFd>), OciError>) -> Result<(Reply, std::vec::IntoIter<OwnedFd>), Remote> {
    let (ours, theirs) = fd::seqpacket_pair().unwrap();
    let (pid, _pidfd) = spawn(CloneArgs::default(), None, || {
        let (reply, fds) = match work() {
            Ok((reply, fds)) => (Reply { ok: true, ..reply }, fds),
            Err(error) => (Reply { error: Some(Remote::new(&error)), ..Reply::default() }, Vec::new()),
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
        fd::send(theirs.as_fd(), &wire::encode(&reply), &fds).map_or(1, |()| 0)
    })
    .unwrap();
    drop(theirs);
    wait_readable(ours.as_fd(), "a creator");
    let (bytes, fds) = fd::receive(ours.as_fd(), 1 << 16).unwrap().expect("the creator answers");
    assert_eq!(reap(pid).code, 0, "creator");
    let reply: Reply = wire::decode(&bytes).unwrap();
    match reply.error {
        Some(error) => Err(error),
        None => Ok((reply, fds.into_iter())),
    }
}

pub fn wait_readable(fd: BorrowedFd<'_>, what: &str) {
    let time = Timespec::try_from(DEADLINE).unwrap();
    let n = rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&time)).unwrap();
    assert!(n > 0, "{what} is late");
}

thread_local! {
    /// Children that were reaped before anybody asked for them, by pid.
    static REAPED: RefCell<HashMap<i32, Ended>> = RefCell::default();
    /// Readable when a child has ended.
    static CHILDREN: OwnedFd = process::signalfd(&[libc::SIGCHLD]).unwrap();
}

/// To be called before anything is forked, and before descriptors are counted.
pub fn watch_children() {
    CHILDREN.with(|_| {});
}

/// Waits for a child of this process to end. Reaps every other one too, as a monitor does: a PID namespace isn't gone, nor its init
/// reaped, while a process that belongs to it is a zombie.
pub fn reap(pid: Pid) -> Ended {
    let pid = pid.as_raw_nonzero().get();
    CHILDREN.with(|children| {
        loop {
            while let Some(ended) = process::reap().unwrap() {
                let how = Ended { code: ended.code, signal: ended.signal };
                REAPED.with(|reaped| reaped.borrow_mut().insert(ended.pid.as_raw_nonzero().get(), how));
            }
            if let Some(ended) = REAPED.with(|reaped| reaped.borrow_mut().remove(&pid)) {
                return ended;
            }
            wait_readable(children.as_fd(), "the end of a process");
            process::drain_signalfd(children.as_fd());
        }
    })
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).unwrap()
}

pub fn read_all(fd: OwnedFd, what: &str) -> String {
    let mut bytes = Vec::new();
    let deadline = Instant::now() + DEADLINE;
    let mut file = std::fs::File::from(fd);
    let mut buffer = [0; 65536];
    loop {
        assert!(Instant::now() < deadline, "{what} does not end");
        wait_readable(file.as_fd(), what);
        match file.read(&mut buffer) {
            Ok(0) => return String::from_utf8_lossy(&bytes).into_owned(),
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            // A terminal whose last user is gone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

pub fn dev_null() -> OwnedFd {
    rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap()
}

/// Programs that every test root has.
fn unpack_busybox(root: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "var", "home/web"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    let busybox = std::env::var_os("COPEPOD_TEST_BUSYBOX").map_or_else(|| PathBuf::from("/bin/busybox"), PathBuf::from);
    let busybox = if busybox.exists() { busybox } else { PathBuf::from("/usr/bin/busybox") };
    std::fs::copy(&busybox, root.join("bin/busybox")).unwrap_or_else(|error| panic!("a static busybox is needed at {}: {error}", busybox.display()));
    let list = process::command(&busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        std::fs::hard_link(root.join("bin/busybox"), root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/home/web:/bin/sh\n").unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\nwww:x:1001:\nstaff:x:50:web\naudio:x:29:web,root\n").unwrap();
}

impl Lab {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("layers")).unwrap();
        std::fs::create_dir(dir.path().join("pivot")).unwrap();
        unpack_busybox(&dir.path().join("layers/base"));
        Lab { dir, hierarchy: Hierarchy::detect().unwrap(), cgroups: cgroups(), count: std::cell::Cell::new(0), parents: RefCell::default() }
    }

    /// The end of a test: no process is left.
    pub fn close(self) {
        // Inits and helpers that failed are ours to reap, and are dead by now.
        while process::reap().unwrap().is_some() {}
        REAPED.with(|reaped| reaped.borrow_mut().clear());
        let children = rustix::process::wait(WaitOptions::NOHANG);
        assert_eq!(children.unwrap_err(), rustix::io::Errno::CHILD, "a child lives");
        self.dir.close().unwrap();
    }

    /// A path in the lab's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A layer that `fill` fills.
    pub fn layer(&self, fill: impl FnOnce(&Path)) -> String {
        let name = format!("l{}", self.next());
        let path = self.path("layers").join(&name);
        std::fs::create_dir(&path).unwrap();
        fill(&path);
        name
    }

    fn next(&self) -> u32 {
        self.count.set(self.count.get() + 1);
        self.count.get()
    }

    /// A plan as the daemon writes it for a plain container that runs a shell script.
    pub fn plan(&self, script: &str) -> ContainerPlan {
        let id = format!("c{}", self.next());
        let writable = self.path(&id);
        std::fs::create_dir_all(writable.join("upper")).unwrap();
        std::fs::create_dir_all(writable.join("work")).unwrap();
        let overlay = Overlay {
            layers_dir: self.path("layers"),
            lower: vec!["base".into()],
            upper: writable.join("upper"),
            work: writable.join("work"),
            ..Overlay::default()
        };
        ContainerPlan {
            rootfs: Rootfs::Overlay(overlay),
            mounts: default_mounts(),
            namespaces: Namespaces {
                net: Namespace::Private,
                ipc: Namespace::Private,
                uts: Namespace::Private,
                pid: Namespace::Private,
                cgroup: if self.hierarchy.is_v2() { Namespace::Private } else { Namespace::Host },
            },
            cgroup: CgroupPlan { path: format!("{}/{id}", self.cgroups), ..CgroupPlan::default() },
            process: shell(script),
            masked_paths: ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware", "/missing"].map(PathBuf::from).to_vec(),
            readonly_paths: ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"].map(PathBuf::from).to_vec(),
            pivot_dir: self.path("pivot"),
            id,
            ..ContainerPlan::default()
        }
    }

    /// Puts layers on top of the base one.
    pub fn on_top(&self, plan: &mut ContainerPlan, layers: &[String]) {
        let Rootfs::Overlay(overlay) = &mut plan.rootfs else { panic!("not an overlay") };
        overlay.lower.splice(0..0, layers.iter().cloned());
    }

    pub fn create_in(&self, pod: &PodFds<'_>, plan: ContainerPlan) -> Result<Container, Remote> {
        self.create_with(pod, plan, None)
    }

    pub fn create_with(&self, pod: &PodFds<'_>, plan: ContainerPlan, stdin: Option<OwnedFd>) -> Result<Container, Remote> {
        let ((stdout, out), (stderr, err)) = (pipe(), pipe());
        let stdin = stdin.unwrap_or_else(dev_null);
        let stdio = Stdio { stdin, stdout: out, stderr: err };
        let (reply, mut fds) = creator(|| {
            let made = create::create(&plan, pod, stdio, &self.hierarchy)?;
            let has = vec![made.console.is_some()];
            let reply = Reply { user: made.user, parents: made.cgroup_parents_made, numbers: vec![made.pid], has, ..Reply::default() };
            Ok((reply, [Some(made.pidfd), Some(made.start), made.console].into_iter().flatten().collect()))
        })?;
        let mut next = || fds.next().unwrap();
        let (pidfd, start) = (next(), next());
        let console = reply.has[0].then(next);
        let terminal = plan.process.terminal;
        let init = CreatedInit { pid: reply.numbers[0], pidfd, user: reply.user, start, console, cgroup_parents_made: reply.parents };
        Ok(Container { plan, init, stdout: Some(stdout).filter(|_| !terminal), stderr: Some(stderr).filter(|_| !terminal), ended: None })
    }

    pub fn create(&self, plan: ContainerPlan) -> Result<Container, Remote> {
        self.create_in(&PodFds::default(), plan)
    }

    /// Creates, starts, waits and deletes.
    pub fn run_in(&self, pod: &PodFds<'_>, plan: ContainerPlan) -> Result<Output, Remote> {
        let mut container = self.create_in(pod, plan)?;
        let started = container.start();
        let output = started.is_ok().then(|| container.output());
        self.delete(container);
        started?;
        Ok(output.unwrap())
    }

    pub fn run(&self, plan: ContainerPlan) -> Result<Output, Remote> {
        self.run_in(&PodFds::default(), plan)
    }

    /// Runs a script in a plain container.
    pub fn sh(&self, script: &str) -> Output {
        self.run(self.plan(script)).unwrap()
    }

    /// Kills what is left, reaps, removes the control group.
    pub fn delete(&self, mut container: Container) {
        container.kill();
        // The container that had them made may be gone before others below them: so all are offered each time.
        self.parents.borrow_mut().append(&mut container.init.cgroup_parents_made);
        let (path, parents) = (container.plan.cgroup.path.clone(), self.parents.borrow().clone());
        for _ in 0..2 {
            creator(|| delete::delete(&path, &parents, &self.hierarchy).map(|()| (Reply::default(), Vec::new()))).unwrap();
        }
    }

    pub fn exec(&self, container: &Container, plan: ExecPlan) -> Result<Exec, Remote> {
        self.exec_in(&PodFds::default(), container, plan)
    }

    pub fn exec_in(&self, pod: &PodFds<'_>, container: &Container, plan: ExecPlan) -> Result<Exec, Remote> {
        let ((stdout, out), (stderr, err)) = (pipe(), pipe());
        let stdio = Stdio { stdin: dev_null(), stdout: out, stderr: err };
        let terminal = plan.process.terminal;
        let target = ExecTarget { pidfd: container.init.pidfd.as_fd(), pid: container.init.pid, plan: &container.plan, user: pod.user };
        let (reply, mut fds) = creator(|| {
            let made = exec::exec(&plan, &target, stdio, &self.hierarchy)?;
            let reply = Reply { numbers: vec![made.helper_pid, made.pid], has: vec![made.console.is_some()], ..Reply::default() };
            Ok((reply, [Some(made.helper_pidfd), Some(made.control), made.console].into_iter().flatten().collect()))
        })?;
        let mut next = || fds.next().unwrap();
        let (helper_pidfd, control) = (next(), next());
        let console = reply.has[0].then(next);
        let started = ExecStarted { helper_pid: reply.numbers[0], helper_pidfd, pid: reply.numbers[1], control, console };
        Ok(Exec { started, stdout: Some(stdout).filter(|_| !terminal), stderr: Some(stderr).filter(|_| !terminal) })
    }

    /// Runs a script in a container and waits for it.
    pub fn exec_sh(&self, container: &Container, script: &str) -> Output {
        self.exec(container, ExecPlan { process: shell(script), timeout_ms: 0 }).unwrap().output()
    }

    pub fn pod(&self, plan: &SandboxPlan) -> Result<Pod, Remote> {
        let (reply, fds) = creator(|| {
            let made = sandbox::create(plan)?;
            let (pid, pidfd) = made.pause.map_or((0, None), |(pid, fd)| (pid, Some(fd)));
            let all = [made.net, made.ipc, made.uts, made.pid, made.staging, made.user, pidfd];
            let has = all.iter().map(Option::is_some).collect();
            Ok((Reply { numbers: vec![pid], has, ..Reply::default() }, all.into_iter().flatten().collect()))
        })?;
        let mut fds = fds;
        let mut next = |index: usize| reply.has[index].then(|| fds.next().unwrap());
        let (net, ipc, uts, pid, staging, user, pause) = (next(0), next(1), next(2), next(3), next(4), next(5), next(6));
        let pause = pause.map(|fd| (reply.numbers[0], fd));
        Ok(Pod { namespaces: SandboxNamespaces { net, ipc, uts, pid, user, staging, pause } })
    }
}

/// What a test might leave behind: mounts, descriptors of this process, control groups.
pub fn traces() -> (usize, usize, bool) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let groups = Cgroup::new(&Hierarchy::detect().unwrap(), &cgroups()).unwrap().dirs().iter().any(|(_, dir)| dir.exists());
    (mounts, descriptors, groups)
}

/// Ends what a failed test has left running. By parenthood: these are all this process's own.
pub fn end_children() {
    loop {
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
            if let (Some(parent), Ok(pid)) = (parent, entry.file_name().to_str().unwrap_or_default().parse())
                && parent == std::process::id()
            {
                process::kill_child(pid).unwrap();
            }
        }
        if process::reap_wait().unwrap().is_none() {
            return;
        }
    }
}

/// Where the containers' groups are.
fn cgroups() -> String {
    format!("/copepod-test-oci-{}", std::process::id())
}

impl Pod {
    pub fn fds(&self) -> PodFds<'_> {
        let ns = &self.namespaces;
        PodFds {
            net: ns.net.as_ref().map(AsFd::as_fd),
            ipc: ns.ipc.as_ref().map(AsFd::as_fd),
            uts: ns.uts.as_ref().map(AsFd::as_fd),
            pid: ns.pid.as_ref().map(AsFd::as_fd),
            staging: ns.staging.as_ref().map(AsFd::as_fd),
            user: ns.user.as_ref().map(AsFd::as_fd),
            target: None,
        }
    }

    /// Ends the pause process.
    pub fn stop(self, signal: i32) -> Option<Ended> {
        let (pid, pidfd) = self.namespaces.pause?;
        process::signal(pidfd.as_fd(), signal as u32).unwrap();
        Some(reap(pid_of(pid)))
    }
}

impl Container {
    /// Releases init and waits for the execve.
    pub fn start(&mut self) -> Result<(), Remote> {
        handshake::release(self.init.start.as_fd()).unwrap();
        loop {
            wait_readable(self.init.start.as_fd(), "execve");
            match handshake::outcome(self.init.start.as_fd()).unwrap() {
                None => {}
                Some(Outcome::Executed) => return Ok(()),
                Some(Outcome::Failed(remote)) => return Err(remote),
            }
        }
    }

    /// What it wrote up to now and to its end, and its exit code.
    pub fn output(&mut self) -> Output {
        let stdout = self.stdout.take().map_or(String::new(), |fd| read_all(fd, "stdout"));
        let stderr = self.stderr.take().map_or(String::new(), |fd| read_all(fd, "stderr"));
        Output { stdout, stderr, code: self.wait().code }
    }

    pub fn wait(&mut self) -> Ended {
        let ended = self.ended.unwrap_or_else(|| reap(pid_of(self.init.pid)));
        self.ended = Some(ended);
        ended
    }

    /// The next line of stdout.
    pub fn line(&mut self) -> String {
        line(self.stdout.as_ref().unwrap().as_fd())
    }

    pub fn kill(&mut self) {
        if self.ended.is_none() {
            process::signal(self.init.pidfd.as_fd(), libc::SIGKILL as u32).unwrap();
            self.wait();
        }
    }
}

/// One line, byte by byte, so that nothing after it is lost.
pub fn line(fd: BorrowedFd<'_>) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        wait_readable(fd, "a line");
        match rustix::io::read(fd, &mut byte).unwrap() {
            0 => panic!("end of output after {:?}", String::from_utf8_lossy(&line)),
            _ if byte[0] == b'\n' => return String::from_utf8(line).unwrap(),
            _ => line.push(byte[0]),
        }
    }
}

impl Exec {
    pub fn line(&mut self) -> String {
        line(self.stdout.as_ref().unwrap().as_fd())
    }

    pub fn kill(&self) {
        exec::kill(self.started.control.as_fd()).unwrap();
    }

    /// Waits for the helper's word, and for the helper.
    pub fn wait(&self) -> ExecEvent {
        let event = loop {
            wait_readable(self.started.control.as_fd(), "an exec's end");
            if let Some(event) = exec::event(self.started.control.as_fd()).unwrap() {
                break event;
            }
        };
        assert_eq!(reap(pid_of(self.started.helper_pid)).code, 0, "helper");
        event
    }

    pub fn output(mut self) -> Output {
        let stdout = self.stdout.take().map_or(String::new(), |fd| read_all(fd, "stdout"));
        let stderr = self.stderr.take().map_or(String::new(), |fd| read_all(fd, "stderr"));
        match self.wait() {
            ExecEvent::Exited { code, .. } => Output { stdout, stderr, code },
            ExecEvent::Failed(remote) => panic!("{}", Chain(&remote)),
        }
    }
}

/// containerd's default capabilities.
pub const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

pub fn shell(script: &str) -> Process {
    program(&["sh", "-c", script])
}

pub fn program(args: &[&str]) -> Process {
    let set = DEFAULT_CAPABILITIES;
    Process {
        args: args.iter().map(OsString::from).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        capabilities: Capabilities { bounding: set, permitted: set, effective: set, ..Capabilities::default() },
        rlimits: vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 4096 }],
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
        mount("/dev/mqueue", MountKind::Mqueue),
        Mount { readonly: true, ..mount("/sys", MountKind::Sysfs) },
        Mount { readonly: true, ..mount("/sys/fs/cgroup", MountKind::Cgroup) },
        Mount { options: "mode=1777,size=64m".into(), ..mount("/dev/shm", MountKind::Tmpfs) },
    ]
}

/// The error of something that must not work: its kind and its text.
pub fn fails<T>(result: Result<T, Remote>, kind: Kind, text: &str) {
    match result {
        Ok(_) => panic!("it works, and should say {text:?}"),
        Err(error) => {
            let chain = Chain(&error).to_string();
            assert!(chain.contains(text), "{chain:?} does not say {text:?}");
            assert_eq!(error.kind(), kind, "{chain}");
        }
    }
}
