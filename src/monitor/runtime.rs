//! What a creator does: one function of the embedded runtime, on plans that it reads itself.
//!
//! Nothing here runs in the monitor but [`Work::fds`]. A further runtime (runc, crun) becomes a further arm of
//! [`Work::run`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::cgroup::{Cgroup, Hierarchy};
use crate::errchain::{Kind, Remote, links};
use crate::oci;
use crate::oci::create::{PodFds, Stdio};
use crate::plan::{ContainerPlan, ExecPlan, ResolvedUser, SandboxPlan};
use crate::sys::fd;
use crate::wire::{self, Wire};
use crate::{wire_enum, wire_struct};

/// Bytes of a plan.
pub const MAX_PLAN: u64 = 4 * 1024 * 1024;

/// How long a creator watches what it has killed; the monitor sends another one as long as init lives.
const KILL_WITHIN: Duration = Duration::from_secs(2);

/// One job for a creator.
pub enum Work<'a> {
    /// Makes the pod's namespaces.
    Sandbox {
        /// The [`SandboxPlan`].
        plan: OwnedFd,
    },
    /// Makes a container.
    Create {
        /// The [`ContainerPlan`].
        plan: BorrowedFd<'a>,
        /// The pod's namespaces.
        pod: PodFds<'a>,
        /// The container's ends.
        stdio: Stdio,
    },
    /// Runs a process in a container.
    Exec {
        /// The [`ExecPlan`].
        plan: OwnedFd,
        /// The container's plan.
        container: BorrowedFd<'a>,
        /// The container's init.
        init: BorrowedFd<'a>,
        /// The same, as the host sees it.
        pid: u32,
        /// The pod's user namespace.
        user: Option<BorrowedFd<'a>>,
        /// The process's ends.
        stdio: Stdio,
    },
    /// Kills everything in a control group.
    Kill {
        /// Its path from the root of each hierarchy.
        cgroup: String,
    },
    /// Kills everything in a control group and removes it.
    Delete {
        /// Its path from the root of each hierarchy.
        cgroup: String,
        /// Groups above it that go too, once they are empty.
        parents: Vec<String>,
    },
}

wire_enum! {
    /// What a creator made.
    pub enum Made {
        /// Never sent.
        0 None,
        /// It failed.
        1 Failed(Remote),
        /// There is nothing to tell.
        2 Done,
        /// A pod's namespaces. Descriptors: those that `has` names, in its order; then the pause process's pidfd.
        3 Sandbox(MadeSandbox),
        /// A container. Descriptors: pidfd, start socket, the terminal if it has one.
        4 Container(MadeContainer),
        /// An exec. Descriptors: the helper's pidfd, the control socket, the terminal if it has one.
        5 Exec(MadeExec),
        /// Not an answer yet: control groups that are about to be made above the container's own. Told before they are, since a
        /// creator can be killed.
        6 Parents(Vec<String>),
    }
}

wire_struct! {
    /// A pod's namespaces.
    pub struct MadeSandbox {
        /// Which are the pod's own: net, ipc, uts, pid, staging, user.
        1 has: Vec<bool>,
        /// The pause process; 0: there is none.
        2 pause_pid: u32,
    }

    /// A container.
    pub struct MadeContainer {
        /// Its init as the host sees it.
        1 pid: u32,
        /// Who it will run as.
        2 user: ResolvedUser,
    }

    /// An exec.
    pub struct MadeExec {
        /// The helper as the host sees it.
        1 helper: u32,
        /// The process as the host sees it; 0: not known.
        2 pid: u32,
    }
}

impl Work<'_> {
    /// The name of the creator's process, for people.
    pub fn name(&self) -> &'static std::ffi::CStr {
        match self {
            Work::Sandbox { .. } => c"copepod-sandbox",
            Work::Create { .. } => c"copepod-create",
            Work::Exec { .. } => c"copepod-exec",
            Work::Kill { .. } => c"copepod-kill",
            Work::Delete { .. } => c"copepod-delete",
        }
    }

    /// Every descriptor that it uses.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        fn three(stdio: &Stdio) -> [BorrowedFd<'_>; 3] {
            [stdio.stdin.as_fd(), stdio.stdout.as_fd(), stdio.stderr.as_fd()]
        }
        match self {
            Work::Sandbox { plan } => vec![plan.as_fd()],
            Work::Create { plan, pod, stdio } => {
                let held = [pod.net, pod.ipc, pod.uts, pod.pid, pod.user, pod.staging, pod.target];
                held.into_iter().flatten().chain([*plan]).chain(three(stdio)).collect()
            }
            Work::Exec { plan, container, init, user, stdio, .. } => {
                [plan.as_fd(), *container, *init].into_iter().chain(*user).chain(three(stdio)).collect()
            }
            Work::Kill { .. } | Work::Delete { .. } => Vec::new(),
        }
    }

    /// Does it. Runs in a creator. `tell` says something before the answer.
    pub fn run(self, hierarchy: &Hierarchy, tell: impl Fn(&Made)) -> Result<(Made, Vec<OwnedFd>), Remote> {
        let failed = |error: oci::OciError| Remote::new(&error);
        match self {
            Work::Sandbox { plan } => {
                let made = oci::sandbox::create(&read::<SandboxPlan>(plan.as_fd())?).map_err(failed)?;
                let held = [made.net, made.ipc, made.uts, made.pid, made.staging, made.user];
                let has = held.iter().map(Option::is_some).collect();
                let (pause_pid, pause) = made.pause.map_or((0, None), |(pid, pidfd)| (pid, Some(pidfd)));
                let fds = held.into_iter().flatten().chain(pause).collect();
                Ok((Made::Sandbox(MadeSandbox { has, pause_pid }), fds))
            }
            Work::Create { plan, pod, stdio } => {
                let plan = read::<ContainerPlan>(plan)?;
                let parents = missing_parents(hierarchy, &plan.cgroup.path);
                if !parents.is_empty() {
                    tell(&Made::Parents(parents));
                }
                let made = oci::create::create(&plan, &pod, stdio, hierarchy).map_err(failed)?;
                let fds = [made.pidfd, made.start].into_iter().chain(made.console).collect();
                Ok((Made::Container(MadeContainer { pid: made.pid, user: made.user }), fds))
            }
            Work::Exec { plan, container, init, pid, user, stdio } => {
                let container = read::<ContainerPlan>(container)?;
                let target = oci::exec::ExecTarget { pidfd: init, pid, plan: &container, user };
                let made = oci::exec::exec(&read::<ExecPlan>(plan.as_fd())?, &target, stdio, hierarchy).map_err(failed)?;
                let fds = [made.helper_pidfd, made.control].into_iter().chain(made.console).collect();
                Ok((Made::Exec(MadeExec { helper: made.helper_pid, pid: made.pid }), fds))
            }
            Work::Kill { cgroup } => {
                kill(&cgroup, hierarchy)?;
                Ok((Made::Done, Vec::new()))
            }
            Work::Delete { cgroup, parents } => {
                oci::delete::delete(&cgroup, &parents, hierarchy).map_err(failed)?;
                Ok((Made::Done, Vec::new()))
            }
        }
    }
}

/// Reads a plan from its sealed memfd.
pub fn read<T: Wire>(plan: BorrowedFd<'_>) -> Result<T, Remote> {
    let bytes = fd::read_sealed_again(plan, MAX_PLAN)
        .map_err(|error| Remote::from_links(Kind::InvalidArgument, vec!["cannot read the plan".into(), error.to_string()]))?;
    wire::decode(&bytes).map_err(|error| {
        let mut chain = vec!["cannot decode the plan".to_string()];
        chain.extend(links(&error));
        Remote::from_links(Kind::InvalidArgument, chain)
    })
}

/// Where this node's control groups are.
pub fn hierarchy() -> Result<Hierarchy, Remote> {
    Hierarchy::detect().map_err(|error| Remote::new(&error))
}

/// Puts this process into a control group of its own, made where it is absent.
pub fn enter(hierarchy: &Hierarchy, path: &str) -> Result<(), Remote> {
    let enter = || {
        let cgroup = Cgroup::new(hierarchy, path)?;
        if !cgroup.exists() {
            cgroup.create()?;
        }
        cgroup.enter(0)
    };
    enter().map_err(|error| Remote::new(&error))
}

/// The groups above a control group that don't exist, outermost first, named as [`crate::cgroup::remove_parents`] takes them.
fn missing_parents(hierarchy: &Hierarchy, path: &str) -> Vec<String> {
    let ends = path.char_indices().skip(1).filter(|(_, c)| *c == '/').map(|(at, _)| &path[..at]);
    let missing = |parent: &str| -> Vec<String> {
        let Ok(group) = Cgroup::new(hierarchy, parent) else { return Vec::new() };
        let absent = group.dirs().into_iter().filter(|(_, dir)| rustix::fs::stat(*dir).is_err());
        absent.map(|(label, _)| format!("{label}:{parent}")).collect()
    };
    ends.flat_map(missing).collect()
}

fn kill(path: &str, hierarchy: &Hierarchy) -> Result<(), Remote> {
    let killed = Cgroup::new(hierarchy, path).and_then(|cgroup| cgroup.kill(KILL_WITHIN));
    killed.map_err(|error| Remote::new(&error))
}
