//! Creates a container: everything up to an init that waits for [`super::handshake::release`].
//!
//! The order is what makes it safe. On the host: sources of mounts, the root, the control group. Then the pod's namespaces, a mount
//! namespace of the container's own, and the pivot into the root. Only then is init cloned: it never had the host's root, so
//! that there is nothing of the host at its /proc/PID/root or cwd for the pod's other processes to find.
//!
//! In a pod with a user namespace init does the last of that itself, since the mount namespace must belong to the user namespace: it
//! begins in the pod's staging mount namespace, which holds nothing of the host either.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::Mode;

use super::handshake::{self, FromInit};
use super::host::Host;
use super::init::{self, Init, Inside};
use super::mounts::{self, Prepared, Sources};
use super::process::{self, DefaultLimits};
use super::userns::Joined;
use super::{OciError, delete, devices, root, sandbox};
use crate::cgroup::{Cgroup, Hierarchy};
use crate::plan::{ContainerPlan, Namespace, ResolvedUser};
use crate::sys::process::{CloneArgs, Keep, spawn};
use crate::sys::{fd, mount, ns, process as sys_process};

/// The pod's namespaces as the monitor holds them.
#[derive(Debug, Default, Clone, Copy)]
pub struct PodFds<'a> {
    /// network_namespaces(7).
    pub net: Option<BorrowedFd<'a>>,
    /// ipc_namespaces(7).
    pub ipc: Option<BorrowedFd<'a>>,
    /// uts_namespaces(7).
    pub uts: Option<BorrowedFd<'a>>,
    /// pid_namespaces(7).
    pub pid: Option<BorrowedFd<'a>>,
    /// user_namespaces(7).
    pub user: Option<BorrowedFd<'a>>,
    /// The mount namespace that holds the pod's /dev/shm.
    pub staging: Option<BorrowedFd<'a>>,
    /// The pidfd of the init of the container that the plan names in `Namespace::Container`.
    pub target: Option<BorrowedFd<'a>>,
}

/// The container's ends of its standard streams; not used where the plan has a terminal.
#[derive(Debug)]
pub struct Stdio {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

/// A container's init that waits to be released. It is a child of the monitor.
#[derive(Debug)]
pub struct CreatedInit {
    /// Its pid as the host sees it.
    pub pid: u32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// Who it will run as.
    pub user: ResolvedUser,
    /// The socket for [`super::handshake`]. When it is closed before the release, init ends.
    pub start: OwnedFd,
    /// The master of its terminal.
    pub console: Option<OwnedFd>,
    /// Control groups above the container's own that had to be made, for [`super::delete::delete`].
    pub cgroup_parents_made: Vec<String>,
}

/// How long init may take to set itself up. Beyond that something it needs hangs: as long as kubelet waits for the whole call.
pub(super) const SETUP: Duration = Duration::from_secs(120);

/// Creates a container. Runs in a creator. If it fails, everything it made is gone; init, once killed, is the monitor's to
/// reap.
pub fn create(plan: &ContainerPlan, pod: &PodFds<'_>, stdio: Stdio, hierarchy: &Hierarchy) -> Result<CreatedInit, OciError> {
    process::check(&plan.process).map_err(OciError::Process)?;
    // Whatever is forked from here on is looked into by nobody; it keeps this until execve.
    sys_process::set_dumpable(false).map_err(|error| OciError::Host("process attributes", error))?;
    // Modes are given in full where something is made.
    rustix::process::umask(Mode::empty());
    let host = Host::open().map_err(|error| OciError::Host("namespaces", error))?;

    let user = Joined::of(plan.user_namespace.as_ref(), pod.user)?;

    let failed = |source| OciError::Cgroup { path: plan.cgroup.path.clone(), source };
    let cgroup = Cgroup::new(hierarchy, &plan.cgroup.path).map_err(failed)?;
    let parents_made = if plan.cgroup.made { cgroup.adopt().map(|()| Vec::new()) } else { cgroup.create() }.map_err(failed)?;
    let created = cgroup
        .set(&plan.cgroup.resources)
        .and_then(|()| cgroup.set_devices(&plan.cgroup.devices))
        .map_err(failed)
        .and_then(|()| with_cgroup(plan, pod, stdio, &host, Sources { host: &host, staging: pod.staging, cgroup: &cgroup, hierarchy, user }));
    match created {
        Ok(created) => Ok(CreatedInit { cgroup_parents_made: parents_made, ..created }),
        Err(error) => {
            // The first error is the one that counts; a group that stays behind is empty, and taken over by the next of its name.
            let _ = host.come_back();
            let _ = delete::delete(&plan.cgroup.path, &parents_made, hierarchy);
            Err(error)
        }
    }
}

fn with_cgroup(plan: &ContainerPlan, pod: &PodFds<'_>, stdio: Stdio, host: &Host, from: Sources<'_>) -> Result<CreatedInit, OciError> {
    let mounts =
        plan.mounts.iter().map(|mount| mounts::prepare(mount, plan, from).map_err(|source| OciError::Mount { target: mount.target.clone(), source }));
    let mounts = mounts.collect::<Result<Vec<Prepared<'_>>, OciError>>()?;
    let null = devices::null().map_err(OciError::Null)?;
    let limits = DefaultLimits::read(host.proc.as_fd());
    let of_cgroup = |source| OciError::Cgroup { path: from.cgroup.path().into(), source };
    let entrance = from.cgroup.entrance().map_err(of_cgroup)?;
    let cgroup_dir = entrance.clone_into().map(|dir| dir.try_clone_to_owned()).transpose().map_err(|error| OciError::Host("control group", error))?;
    let inside = match from.user {
        Some(user) => {
            let staging = pod.staging.ok_or_else(|| OciError::NoNamespace { kind: "mnt", of: "the pod".into() })?;
            let root = root::prepare_mapped(&plan.rootfs, user, staging, host).map_err(OciError::Root)?;
            let namespace = user.user.try_clone_to_owned().map_err(|error| OciError::Host("user namespace", error))?;
            join_namespaces(plan, pod)?;
            ns::enter(staging, ns::Kind::Mount).map_err(|source| OciError::Enter { kind: "mnt", of: "the pod", source })?;
            Some(Inside { namespace, root, owner: user.root })
        }
        None => {
            let root = root::prepare(&plan.rootfs).map_err(OciError::Root)?;
            join_namespaces(plan, pod)?;
            let pivot_dir = mount_namespace(plan, pod, &root)?;
            root::enter(root, pivot_dir).map_err(OciError::Root)?;
            None
        }
    };

    let (start, socket) = fd::seqpacket_pair().map_err(|error| OciError::Talk("init", error))?;
    let proc = host.proc.try_clone().map_err(|error| OciError::Host("/proc", error))?;
    let init = Init { plan, mounts, null, stdio, socket, proc, limits, entrance, inside };
    let args = CloneArgs { flags: libc::CLONE_PARENT as u64, cgroup: cgroup_dir.as_ref().map(|fd| fd.as_fd()) };
    let keep = Keep::only(&init.fds());
    let (pid, pidfd) = spawn(args, Some(keep), || init::run(init)).map_err(|error| OciError::Clone("init", error))?;
    let pid = pid.as_raw_nonzero().get() as u32;
    let ready = set_off(start.as_fd(), host);
    match ready {
        Ok((user, console)) => Ok(CreatedInit { pid, pidfd, user, start, console, cgroup_parents_made: Vec::new() }),
        Err(error) => {
            let _ = sys_process::signal(pidfd.as_fd(), libc::SIGKILL as u32);
            let _ = handshake::readable(pidfd.as_fd(), delete::WITHIN);
            Err(error)
        }
    }
}

/// Gives this process the container's mount namespace, and a directory in it for the root. Nothing that is mounted in it reaches any
/// other.
fn mount_namespace<'a>(plan: &'a ContainerPlan, pod: &PodFds<'_>, root: &root::Prepared<'_>) -> Result<&'a Path, OciError> {
    // A new mount namespace is a copy, and the host's mount table is long on a busy node. The staging one has two mounts.
    let pivot_dir = match (pod.staging, root) {
        (Some(staging), root::Prepared::Detached(_)) => {
            ns::enter(staging, ns::Kind::Mount).map_err(|source| OciError::Enter { kind: "mnt", of: "the pod", source })?;
            Path::new(sandbox::STAGED_ROOT)
        }
        _ => &plan.pivot_dir,
    };
    ns::unshare(&[ns::Kind::Mount]).map_err(|error| OciError::Unshare("mnt", error))?;
    mount::set_propagation_of_all(mount::Propagation::Slave).map_err(|error| OciError::Unshare("mnt", error))?;
    Ok(pivot_dir)
}

/// Lets a clone begin, and waits until it is ready.
fn set_off(start: BorrowedFd<'_>, host: &Host) -> Result<(ResolvedUser, Option<OwnedFd>), OciError> {
    host.come_back().map_err(|error| OciError::Host("mount namespace", error))?;
    let talk = |error| OciError::Talk("init", error);
    handshake::go(start).map_err(talk)?;
    match handshake::hear(start, SETUP).map_err(talk)? {
        Some((FromInit::Ready(user), mut fds)) => Ok((user, fds.pop())),
        Some((FromInit::Failed(remote), _)) => Err(OciError::Remote("the container's init", remote)),
        Some((FromInit::None, _)) => Err(talk(std::io::ErrorKind::InvalidData.into())),
        None => Err(OciError::Died("the container's init")),
    }
}

/// Moves this process, or its children to be, into the namespaces of the plan; all but the mount and cgroup namespaces.
fn join_namespaces(plan: &ContainerPlan, pod: &PodFds<'_>) -> Result<(), OciError> {
    let wanted = &plan.namespaces;
    let of_pod = [
        (&wanted.net, pod.net, ns::Kind::Net),
        (&wanted.ipc, pod.ipc, ns::Kind::Ipc),
        (&wanted.uts, pod.uts, ns::Kind::Uts),
        (&wanted.pid, pod.pid, ns::Kind::Pid),
    ];
    for (namespace, held, kind) in of_pod {
        let none = |of: &str| OciError::NoNamespace { kind: kind.name(), of: of.to_string() };
        match namespace {
            Namespace::Host => {}
            Namespace::Private => ns::unshare(&[kind]).map_err(|error| OciError::Unshare(kind.name(), error))?,
            Namespace::Pod => {
                let held = held.ok_or_else(|| none("the pod"))?;
                ns::enter(held, kind).map_err(|source| OciError::Enter { kind: kind.name(), of: "the pod", source })?;
            }
            Namespace::Container(id) => {
                let target = pod.target.ok_or_else(|| none(&format!("container {id}")))?;
                ns::enter_process(target, &[kind]).map_err(|source| OciError::Enter { kind: kind.name(), of: "the target container", source })?;
            }
        }
    }
    Ok(())
}
