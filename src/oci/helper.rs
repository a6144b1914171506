//! An exec's helper: the parent of an exec'd process, inside the container's PID namespace.
//!
//! A fork of a creator that has entered the container. It starts the process, adopts the orphans of what that starts, reports
//! how it ended, and on request kills everything below it until nothing is left. It trusts nothing that the container
//! shows: its /proc is one that it mounted itself, for itself alone. Not dumpable, and stripped of all capabilities but CAP_KILL once the
//! process runs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};

use super::create::Stdio;
use super::handshake::{self, FromInit};
use super::paths::Root;
use super::process::{self, DefaultLimits, ProcessError};
use super::terminal::{self, Terminal, TerminalError};
use super::user::{self, UserError};
use super::userns;
use crate::cgroup::{CgroupError, Entrance};
use crate::errchain::{Kind, Kinded, Remote};
use crate::plan::{ExecPlan, ResolvedUser, UserNamespace};
use crate::sys::mount::{Attributes, NewFs, NewFsError};
use crate::sys::process::{CloneArgs, Ended, Keep, spawn};
use crate::sys::{creds, fd, ns, process as sys_process};
use crate::{wire_enum, wire_struct};

/// A helper that can't run a process.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The socket.
    #[error("cannot talk to the monitor")]
    Socket(#[source] io::Error),
    /// The control groups.
    #[error("cannot enter the container's control groups")]
    Cgroup(#[source] CgroupError),
    /// The container's cgroup namespace.
    #[error("cannot enter the container's cgroup namespace")]
    CgroupNamespace(#[source] io::Error),
    /// The container's mount namespace.
    #[error("cannot enter the container's mount namespace")]
    MountNamespace(#[source] io::Error),
    /// The pod's user namespace.
    #[error("cannot enter the pod's user namespace")]
    UserNamespace(#[source] io::Error),
    /// prctl(2), signalfd(2).
    #[error("cannot set up the helper")]
    SetUp(#[source] io::Error),
    /// Its own procfs.
    #[error("cannot make a procfs")]
    Procfs(#[source] NewFsError),
    /// The container's root.
    #[error("cannot open the container's root")]
    Root(#[source] io::Error),
    /// The user.
    #[error("cannot resolve the user")]
    User(#[source] UserError),
    /// The terminal.
    #[error("cannot set up the terminal")]
    Terminal(#[source] TerminalError),
    /// clone3(2).
    #[error("cannot clone the process")]
    Clone(#[source] io::Error),
    /// The process, in the clone.
    #[error("cannot start the process")]
    Process(#[source] ProcessError),
    /// setsid(2).
    #[error("cannot start a session")]
    Session(#[source] io::Error),
    /// Dropping privileges.
    #[error("cannot drop the helper's privileges")]
    Privileges(#[source] io::Error),
    /// poll(2), waitpid(2), or its procfs.
    #[error("cannot wait for the process")]
    Wait(#[source] io::Error),
}

impl Kinded for HelperError {
    fn kind(&self) -> Kind {
        match self {
            HelperError::Cgroup(error) => error.kind(),
            HelperError::User(error) => error.kind(),
            HelperError::Terminal(error) => error.kind(),
            HelperError::Process(error) => error.kind(),
            _ => Kind::Internal,
        }
    }
}

wire_struct! {
    /// The end of a process.
    pub struct Exit {
        /// Exit code; 128 + n where signal n ended it.
        1 code: i32,
        /// The signal that ended it; 0: none.
        2 signal: u32,
    }
}

wire_enum! {
    /// What a helper says.
    pub enum FromHelper {
        /// Never sent.
        0 None,
        /// The program was executed. Descriptors: the process's pidfd, and the master of its terminal if it has one.
        1 Started,
        /// The process ended.
        2 Exited(Exit),
        /// The process was not started, or is out of control.
        3 Failed(Remote),
    }
}

/// What a helper is given.
pub struct Helper<'a> {
    /// What to run.
    pub plan: &'a ExecPlan,
    /// The container's init.
    pub target: OwnedFd,
    /// The standard streams.
    pub stdio: Stdio,
    /// Its end of the control socket.
    pub socket: OwnedFd,
    /// The host's /proc.
    pub proc: OwnedFd,
    /// Limits that the plan doesn't name.
    pub limits: DefaultLimits,
    /// The way into the container's control groups on cgroup v1.
    pub entrance: Option<Entrance>,
    /// The pod's user namespace, if it has one: then the helper is still outside of the container's mount namespace.
    pub inside: Option<Inside>,
}

/// The pod's user namespace.
pub struct Inside {
    /// The namespace.
    pub namespace: OwnedFd,
    /// User and group of its root on the host.
    pub owner: (u32, u32),
    /// Its mappings.
    pub mappings: UserNamespace,
}

impl Helper<'_> {
    /// Every descriptor it needs.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let own = [self.target.as_fd(), self.socket.as_fd(), self.proc.as_fd()];
        let inside = self.inside.iter().map(|inside| inside.namespace.as_fd());
        own.into_iter().chain(process::streams(&self.stdio)).chain(self.entrance.iter().flat_map(Entrance::fds)).chain(inside).collect()
    }
}

/// Runs the helper: in the clone, to its end.
pub fn run(helper: Helper<'_>) -> i32 {
    let Ok(socket) = helper.socket.try_clone() else { return sys_process::CHILD_FAILED };
    let entered = helper.entrance.as_ref().map_or(Ok(()), Entrance::enter_after_clone).map_err(|error| Failure::Own(HelperError::Cgroup(error)));
    let said = match entered.and_then(|()| start(helper)) {
        Ok(None) => return 0,
        Ok(Some(running)) => match running.watch() {
            Ok(Some(exit)) => FromHelper::Exited(exit),
            Ok(None) => return 0,
            Err(error) => FromHelper::Failed(Remote::new(&error)),
        },
        Err(Failure::Own(error)) => FromHelper::Failed(Remote::new(&error)),
        Err(Failure::Process(remote)) => FromHelper::Failed(remote),
    };
    let _ = handshake::say(socket.as_fd(), &said, &[]);
    0
}

enum Failure {
    Own(HelperError),
    /// The process's own words.
    Process(Remote),
}

impl From<HelperError> for Failure {
    fn from(error: HelperError) -> Self {
        Failure::Own(error)
    }
}

/// A process that runs.
struct Running {
    socket: OwnedFd,
    children: OwnedFd,
    procfs: OwnedFd,
    process: rustix::process::Pid,
}

/// Up to the execution of the program. `None`: the creator is gone.
fn start(helper: Helper<'_>) -> Result<Option<Running>, Failure> {
    let Helper { plan, target, stdio, socket, proc, limits, entrance, inside } = helper;
    drop(entrance);
    sys_process::set_name(c"copepod:exec");
    // Nothing that the container sends stops the helper but SIGKILL, least of all `kill -TERM -1`.
    sys_process::block_signals();
    if !handshake::wait(socket.as_fd()).map_err(HelperError::Socket)? {
        return Ok(None);
    }
    // Only now: before, the clone into the control group would have been refused from inside the namespace (nsdelegate).
    ns::enter_process(target.as_fd(), &[ns::Kind::Cgroup]).map_err(HelperError::CgroupNamespace)?;
    sys_process::set_subreaper(true).map_err(HelperError::SetUp)?;
    let children = sys_process::signalfd(&[libc::SIGCHLD]).map_err(HelperError::SetUp)?;
    sys_process::block_signals();
    let procfs = own_procfs().map_err(HelperError::Procfs)?;
    if inside.is_some() {
        ns::enter_process(target.as_fd(), &[ns::Kind::Mount]).map_err(HelperError::MountNamespace)?;
    }
    drop(target);

    let root_fd = rustix::fs::openat(CWD, c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| HelperError::Root(error.into()))?;
    let root = Root(root_fd.as_fd());
    let user = user::resolve(&plan.process.user, root).map_err(HelperError::User)?;
    process::check_mapped(&user, inside.as_ref().map(|inside| &inside.mappings)).map_err(HelperError::Process)?;
    let terminal = if plan.process.terminal {
        let devpts = terminal::devpts(root).map_err(HelperError::Terminal)?;
        Some(terminal::open(devpts.as_fd(), plan.process.terminal_size).map_err(HelperError::Terminal)?)
    } else {
        None
    };

    let (status, theirs) = fd::seqpacket_pair().map_err(HelperError::Socket)?;
    let mut keep = vec![theirs.as_fd(), root_fd.as_fd(), proc.as_fd()];
    keep.extend(inside.iter().map(|inside| inside.namespace.as_fd()));
    match &terminal {
        Some(terminal) => keep.push(terminal.peer.as_fd()),
        None => keep.extend(process::streams(&stdio)),
    }
    let keep = Keep::only(&keep);
    let child = || be_process(plan, &user, root, &proc, &limits, &stdio, terminal.as_ref(), inside.as_ref(), &theirs);
    let (process, pidfd) = spawn(CloneArgs::default(), Some(keep), child).map_err(HelperError::Clone)?;
    drop((theirs, stdio, proc));
    let master = terminal.map(|terminal| terminal.master);

    if let Some(failure) = executed(status.as_fd(), socket.as_fd())? {
        let running = Running { socket, children, procfs, process };
        running.kill_all().map_err(HelperError::Wait)?;
        return Err(Failure::Process(failure));
    }
    drop_privileges(inside.as_ref()).map_err(HelperError::Privileges)?;
    let fds: Vec<BorrowedFd<'_>> = std::iter::once(pidfd.as_fd()).chain(master.iter().map(|fd| fd.as_fd())).collect();
    handshake::say(socket.as_fd(), &FromHelper::Started, &fds).map_err(HelperError::Socket)?;
    Ok(Some(Running { socket, children, procfs, process }))
}

/// A procfs of the PID namespace that this process is in, attached nowhere.
fn own_procfs() -> Result<OwnedFd, NewFsError> {
    let fs = NewFs::open("proc")?;
    fs.mount(Attributes { readonly: true, nosuid: true, nodev: true, noexec: true, noatime: false })
}

/// Waits until the program was executed. `Some`: it was not, and why.
fn executed(status: BorrowedFd<'_>, control: BorrowedFd<'_>) -> Result<Option<Remote>, HelperError> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(status, PollFlags::IN), PollFd::from_borrowed_fd(control, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(|error| HelperError::Wait(error.into()))?,
        };
        let (status_ready, control_ready) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if status_ready {
            return match handshake::receive(status) {
                Ok(None) => Ok(None),
                Ok(Some((FromInit::Failed(remote), _))) => Ok(Some(remote)),
                Ok(Some(_)) => Err(HelperError::Wait(io::ErrorKind::InvalidData.into())),
                Err(error) => Err(HelperError::Wait(error)),
            };
        }
        if control_ready {
            // Whatever it is, a message or the end: it is to stop.
            return Ok(Some(Remote::text(Kind::Aborted, "exec was given up before the program was executed")));
        }
    }
}

/// Keeps what it takes to kill one's own children, whoever they are. In a user namespace they are all of it.
fn drop_privileges(inside: Option<&Inside>) -> io::Result<()> {
    inside.map_or(Ok(()), |inside| userns::enter(inside.namespace.as_fd()))?;
    creds::drop_bounding(creds::KILL)?;
    creds::set_ambient(0)?;
    creds::set_capabilities(creds::Sets { permitted: creds::KILL, effective: creds::KILL, inheritable: 0 })?;
    creds::set_no_new_privileges()?;
    sys_process::set_dumpable(false)
}

/// The process itself, in its clone.
#[allow(clippy::too_many_arguments)]
fn be_process(
    plan: &ExecPlan,
    user: &ResolvedUser,
    root: Root<'_>,
    proc: &OwnedFd,
    limits: &DefaultLimits,
    stdio: &Stdio,
    terminal: Option<&Terminal>,
    inside: Option<&Inside>,
    status: &OwnedFd,
) -> i32 {
    let become_it = || -> Result<ProcessError, HelperError> {
        rustix::process::setsid().map_err(|error| HelperError::Session(error.into()))?;
        process::set_oom_score(&plan.process, proc.as_fd()).map_err(HelperError::Process)?;
        process::set_labels(&plan.process, proc.as_fd()).map_err(HelperError::Process)?;
        if let Some(inside) = inside {
            process::raise_limits(&plan.process.rlimits, limits).map_err(HelperError::Process)?;
            let streams = terminal.map_or_else(|| process::streams(stdio), |terminal| [terminal.peer.as_fd(); 3]);
            process::give_streams(streams, inside.owner).map_err(HelperError::Process)?;
            userns::enter(inside.namespace.as_fd()).map_err(HelperError::UserNamespace)?;
        }
        match terminal {
            Some(terminal) => {
                terminal::take(terminal.peer.as_fd()).map_err(HelperError::Terminal)?;
                process::take_stdio([terminal.peer.as_fd(); 3], user.uid).map_err(HelperError::Process)?;
            }
            None => process::take_stdio(process::streams(stdio), user.uid).map_err(HelperError::Process)?,
        }
        Ok(process::prepare(&plan.process, user, root, limits).map_err(HelperError::Process)?.execute())
    };
    let error = become_it().map_or_else(|error| error, HelperError::Process);
    let _ = handshake::say(status.as_fd(), &FromInit::Failed(Remote::new(&error)), &[]);
    sys_process::CHILD_FAILED
}

impl Running {
    /// Waits for the end of the process, or for the word to kill it. `None`: nobody is left who would want to know.
    fn watch(self) -> Result<Option<Exit>, HelperError> {
        loop {
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.children, PollFlags::IN)];
            match rustix::event::poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(|error| HelperError::Wait(error.into()))?,
            };
            let (control, child) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            if child {
                sys_process::drain_signalfd(self.children.as_fd());
                while let Some(ended) = sys_process::reap().map_err(HelperError::Wait)? {
                    if ended.pid == self.process {
                        return Ok(Some(exit(ended)));
                    }
                }
            }
            if control {
                let asked = matches!(fd::receive(self.socket.as_fd(), 64), Ok(Some(_)));
                let ended = self.kill_all().map_err(HelperError::Wait)?;
                return Ok(ended.filter(|_| asked).map(exit));
            }
        }
    }

    /// Kills all descendants until there are none; gives how the process itself ended.
    ///
    /// Each round kills every child there is and then reaps: what a dead child leaves behind has become ours by then, and is in the
    /// next round's list.
    fn kill_all(&self) -> io::Result<Option<Ended>> {
        let mut process = None;
        loop {
            for pid in self.list_children()? {
                match sys_process::kill_child(pid) {
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                    _ => {}
                }
            }
            let Some(first) = sys_process::reap_wait()? else { return Ok(process) };
            let mut next = Some(first);
            while let Some(ended) = next {
                if ended.pid == self.process {
                    process = Some(ended);
                }
                next = sys_process::reap()?;
            }
        }
    }

    /// The pids of this process's children. From each process's own stat: the kernel's list of children (`children` of
    /// proc_pid_task(5)) may leave some out while others come and go.
    fn list_children(&self) -> io::Result<Vec<u32>> {
        let own = std::process::id();
        let listing = rustix::fs::openat(&self.procfs, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut children = Vec::new();
        for entry in rustix::fs::Dir::new(listing)? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().ok().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // One that ends meanwhile is none of ours: we have not reaped it.
            if self.parent(pid).is_ok_and(|parent| parent == own) {
                children.push(pid);
            }
        }
        Ok(children)
    }

    fn parent(&self, pid: u32) -> io::Result<u32> {
        let file = rustix::fs::openat(&self.procfs, format!("{pid}/stat"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut buffer = [0u8; 512];
        let n = rustix::io::read(&file, &mut buffer)?;
        parent_in(&buffer[..n]).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Field 4 of /proc/PID/stat; the name before it, in parentheses, may hold anything.
fn parent_in(stat: &[u8]) -> Option<u32> {
    let after = stat.iter().rposition(|&b| b == b')').map(|at| &stat[at + 1..])?;
    let field = after.split(|&b| b == b' ').filter(|field| !field.is_empty()).nth(1)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn exit(ended: Ended) -> Exit {
    Exit { code: ended.code, signal: ended.signal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_behind_any_name() {
        assert_eq!(parent_in(b"7 (sh) S 3 7 7 0"), Some(3));
        assert_eq!(parent_in(b"7 (a) S 9 (b) S 3 7 7 0"), Some(3));
        assert_eq!(parent_in(b"7 sh S 3"), None);
    }
}
