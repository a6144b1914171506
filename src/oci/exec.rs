//! Runs a further process in a container.
//!
//! The process is the child of a *helper*, a fork of ours that lives in the container's PID namespace as a subreaper: it
//! reports how the process ended, and it can kill everything the process started.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::Mode;

use super::create::{SETUP, Stdio};
use super::handshake;
use super::helper::{self, FromHelper, Helper, Inside};
use super::host::Host;
use super::process::{self, DefaultLimits};
use super::userns::Joined;
use super::{OciError, delete};
use crate::cgroup::{Cgroup, CgroupError, Entrance, Hierarchy};
use crate::errchain::{Kind, Kinded, Remote};
use crate::plan::{ContainerPlan, ExecPlan};
use crate::sys::process::{CloneArgs, Keep, spawn};
use crate::sys::{fd, ns, process as sys_process};

/// The container in which to run.
#[derive(Debug, Clone, Copy)]
pub struct ExecTarget<'a> {
    /// Its init's pidfd.
    pub pidfd: BorrowedFd<'a>,
    /// Its init as the host sees it.
    pub pid: u32,
    /// Its plan.
    pub plan: &'a ContainerPlan,
    /// The pod's user namespace, where the plan has one.
    pub user: Option<BorrowedFd<'a>>,
}

/// A process that runs.
#[derive(Debug)]
pub struct ExecStarted {
    /// The helper as the host sees it; a child of the monitor.
    pub helper_pid: u32,
    /// The helper's pidfd. A helper that ends without an [`ExecEvent`] was killed, and the process with it or soon after: 137.
    pub helper_pidfd: OwnedFd,
    /// The process as the host sees it; 0: not known, since it has ended.
    pub pid: u32,
    /// The socket for [`event`] and [`kill`]. When it is closed, the helper kills the process and all that it started.
    pub control: OwnedFd,
    /// The master of the process's terminal.
    pub console: Option<OwnedFd>,
}

/// What a helper reports.
#[derive(Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// The process ended; after a [`kill`], everything it had started has too.
    Exited {
        /// Exit code; 128 + n where signal n ended it.
        code: i32,
        /// The signal that ended it; 0: none.
        signal: u32,
    },
    /// The helper could not do its work.
    Failed(Remote),
}

const HELPER: &str = "the exec's helper";

/// Runs a process; returns when its program has been executed. Runs in a creator.
///
/// # Errors
/// FailedPrecondition: the container has ended. InvalidArgument: the user or the program does not exist in it.
pub fn exec(plan: &ExecPlan, target: &ExecTarget<'_>, stdio: Stdio, hierarchy: &Hierarchy) -> Result<ExecStarted, OciError> {
    process::check(&plan.process).map_err(OciError::Process)?;
    sys_process::set_dumpable(false).map_err(|error| OciError::Host("process attributes", error))?;
    rustix::process::umask(Mode::empty());
    let host = Host::open().map_err(|error| OciError::Host("namespaces", error))?;
    let limits = DefaultLimits::read(host.proc.as_fd());
    let user = Joined::of(target.plan.user_namespace.as_ref(), target.user)?;
    let mut groups = Groups::find(target, hierarchy)?;

    let kinds = [ns::Kind::Pid, ns::Kind::Net, ns::Kind::Ipc, ns::Kind::Uts, ns::Kind::Mount];
    // In a mount namespace of the pod's user namespace the helper could make no procfs: there it enters that one by itself, later.
    let kinds = if user.is_some() { &kinds[..4] } else { &kinds };
    ns::enter_process(target.pidfd, kinds).map_err(|source| match source.raw_os_error() {
        Some(libc::ESRCH) => OciError::Ended,
        _ => OciError::Enter { kind: "pid, net, ipc, uts and mnt", of: "the container", source },
    })?;

    let talk = |error| OciError::Talk(HELPER, error);
    let (control, socket) = fd::seqpacket_pair().map_err(talk)?;
    let proc = host.proc.try_clone().map_err(|error| OciError::Host("/proc", error))?;
    let target_fd = target.pidfd.try_clone_to_owned().map_err(|error| OciError::Host("pidfd", error))?;
    let inside = |user: Joined<'_>| Ok(Inside { namespace: user.user.try_clone_to_owned()?, owner: user.root, mappings: user.mappings.clone() });
    let inside = user.map(inside).transpose().map_err(|error| OciError::Host("user namespace", error))?;
    let helper = Helper { plan, target: target_fd, stdio, socket, proc, limits, entrance: groups.entrance.take(), inside };
    let (helper_pid, helper_pidfd) = groups.clone_into(helper)?;
    let set_off = || -> Result<(u32, Option<OwnedFd>), OciError> {
        host.come_back().map_err(|error| OciError::Host("mount namespace", error))?;
        handshake::go(control.as_fd()).map_err(talk)?;
        match handshake::hear(control.as_fd(), SETUP).map_err(talk)? {
            Some((FromHelper::Started, fds)) => {
                let mut fds = fds.into_iter();
                let pidfd = fds.next().ok_or_else(|| talk(io::ErrorKind::InvalidData.into()))?;
                Ok((sys_process::pidfd_pid(host.proc.as_fd(), pidfd.as_fd()).unwrap_or(0), fds.next()))
            }
            Some((FromHelper::Failed(remote), _)) => Err(OciError::Remote("the exec'd process", remote)),
            Some((FromHelper::Exited(_) | FromHelper::None, _)) => Err(talk(io::ErrorKind::InvalidData.into())),
            None => Err(OciError::Died(HELPER)),
        }
    };
    match set_off() {
        Ok((pid, console)) => Ok(ExecStarted { helper_pid, helper_pidfd, pid, control, console }),
        Err(error) => {
            // The end of the control socket has it kill what it started; only a helper that hangs is killed itself.
            drop(control);
            if !handshake::readable(helper_pidfd.as_fd(), delete::WITHIN).unwrap_or(false) {
                let _ = sys_process::signal(helper_pidfd.as_fd(), libc::SIGKILL as u32);
            }
            Err(error)
        }
    }
}

/// The control groups that the helper, and with it the process, may go to: the container's own, or where its init is if that one has
/// become a parent or is gone.
struct Groups {
    /// Their directories on cgroup v2, opened while the host's paths are there.
    dirs: [Option<OwnedFd>; 2],
    /// The way in on cgroup v1.
    entrance: Option<Entrance>,
}

impl Groups {
    fn find(target: &ExecTarget<'_>, hierarchy: &Hierarchy) -> Result<Self, OciError> {
        let path = &target.plan.cgroup.path;
        let own = Cgroup::new(hierarchy, path).map_err(|source| OciError::Cgroup { path: path.clone(), source })?;
        let init = Cgroup::of_process(hierarchy, target.pid);
        // The pid was init's when its group was read, if init still lives now.
        if handshake::readable(target.pidfd, std::time::Duration::ZERO).map_err(|error| OciError::Host("pidfd", error))? {
            return Err(OciError::Ended);
        }
        // Never out of the container: where a host moved init elsewhere, exec is refused.
        let init = init.and_then(|group| {
            let within = group.path() == path || group.path().strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with('/'));
            if within { Ok(group) } else { Err(CgroupError::BadPath { path: group.path().into(), why: "it is not below the container's own" }) }
        });
        let dirs = [own.open_dir(), init.as_ref().ok().and_then(Cgroup::open_dir)];
        let v1 = dirs.iter().all(Option::is_none);
        let opened = if v1 { Some(own.entrance()) } else { None };
        let entrance = match (opened, &init) {
            (Some(Err(error)), Ok(init)) if error.kind() == Kind::NotFound => Some(init.entrance()),
            (opened, _) => opened,
        };
        let entrance = entrance.transpose().map_err(|source| OciError::Cgroup { path: path.clone(), source })?;
        // A directory of the hybrid's v2 is one to clone into.
        let unified = entrance.as_ref().and_then(Entrance::clone_into).map(|dir| dir.try_clone_to_owned()).transpose();
        let dirs = if v1 { [unified.map_err(|error| OciError::Host("control group", error))?, None] } else { dirs };
        Ok(Self { dirs, entrance })
    }

    /// Clones the helper, on cgroup v2 into one of the groups.
    fn clone_into(&self, helper: Helper<'_>) -> Result<(u32, OwnedFd), OciError> {
        let keep = Keep::only(&helper.fds());
        let mut helper = Some(helper);
        let mut attempt = |cgroup: Option<BorrowedFd<'_>>| {
            let args = CloneArgs { flags: libc::CLONE_PARENT as u64, cgroup };
            spawn(args, Some(keep.clone()), || helper.take().map_or(sys_process::CHILD_FAILED, helper::run))
        };
        let cloned = match (&self.dirs[0], &self.dirs[1]) {
            (Some(own), second) => match attempt(Some(own.as_fd())) {
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) && second.is_some() =>
                {
                    attempt(second.as_ref().map(|fd| fd.as_fd()))
                }
                done => done,
            },
            (None, Some(init)) => attempt(Some(init.as_fd())),
            (None, None) => attempt(None),
        };
        let (pid, pidfd) = cloned.map_err(|error| OciError::Clone(HELPER, error))?;
        Ok((pid.as_raw_nonzero().get() as u32, pidfd))
    }
}

/// The helper's next report; `None`: there is none yet. Never blocks. A helper that is gone is `UnexpectedEof`.
pub fn event(control: BorrowedFd<'_>) -> io::Result<Option<ExecEvent>> {
    if !handshake::readable(control, std::time::Duration::ZERO)? {
        return Ok(None);
    }
    match handshake::receive(control) {
        Ok(Some((FromHelper::Exited(exit), _))) => Ok(Some(ExecEvent::Exited { code: exit.code, signal: exit.signal })),
        Ok(Some((FromHelper::Failed(remote), _))) => Ok(Some(ExecEvent::Failed(remote))),
        Ok(Some((FromHelper::Started | FromHelper::None, _))) => Err(io::ErrorKind::InvalidData.into()),
        Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) => Err(error),
    }
}

/// Has the helper kill the process and all that it started; [`ExecEvent::Exited`] follows when all are dead. Of a helper that is
/// gone already, `BrokenPipe`.
pub fn kill(control: BorrowedFd<'_>) -> io::Result<()> {
    fd::try_send(control, b"kill", &[])
}
