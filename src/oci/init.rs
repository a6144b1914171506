//! What a container's init does from its clone to execve.
//!
//! It begins with the container's root as its own, in namespaces that its creator has prepared, with the few descriptors it needs;
//! it has never seen a path of the host. It is not dumpable until it executes the container's program, so that
//! no process of a shared PID namespace can look into it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use super::create::Stdio;
use super::devices::{self, DeviceError};
use super::handshake::{self, FromInit};
use super::hide::{self, HideError};
use super::mounts::{self, Attached, MountError, Prepared};
use super::paths::Root;
use super::process::{self, DefaultLimits, ProcessError, Ready};
use super::root::{self, RootError};
use super::sandbox::STAGED_ROOT;
use super::terminal::{self, TerminalError};
use super::user::{self, UserError};
use super::userns;
use crate::cgroup::{CgroupError, Entrance};
use crate::errchain::{Kind, Kinded, Remote};
use crate::plan::{ContainerPlan, Namespace, ResolvedUser};
use crate::sys::{mount, ns, process as sys_process};

/// An init that can't become the container's process.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The socket.
    #[error("cannot talk to the monitor")]
    Socket(#[source] io::Error),
    /// setsid(2).
    #[error("cannot start a session")]
    Session(#[source] io::Error),
    /// The control groups.
    #[error("cannot enter the container's control groups")]
    Cgroup(#[source] CgroupError),
    /// cgroup_namespaces(7).
    #[error("cannot make a cgroup namespace")]
    CgroupNamespace(#[source] io::Error),
    /// The pod's user namespace.
    #[error("cannot enter the pod's user namespace")]
    UserNamespace(#[source] io::Error),
    /// A mount namespace in it.
    #[error("cannot make a mount namespace in the pod's user namespace")]
    MountNamespace(#[source] io::Error),
    /// The root directory, where init itself makes it the root.
    #[error("cannot enter the container's root")]
    Enter(#[source] RootError),
    /// The root directory.
    #[error("cannot open the container's root")]
    Root(#[source] io::Error),
    /// A mount.
    #[error("cannot mount {target}")]
    Mount {
        /// Where.
        target: PathBuf,
        /// Why.
        source: MountError,
    },
    /// Mounts that become read-only at last.
    #[error("cannot make {0} read-only")]
    Readonly(&'static str, #[source] io::Error),
    /// Devices that are not in /dev.
    #[error("cannot make the container's devices")]
    Devices(#[source] DeviceError),
    /// Masked and read-only paths.
    #[error("cannot protect paths of the container")]
    Hide(#[source] HideError),
    /// The terminal.
    #[error("cannot set up the terminal")]
    Terminal(#[source] TerminalError),
    /// The user.
    #[error("cannot resolve the container's user")]
    User(#[source] UserError),
    /// The process.
    #[error("cannot start the container's process")]
    Process(#[source] ProcessError),
}

impl Kinded for InitError {
    fn kind(&self) -> Kind {
        match self {
            InitError::Cgroup(error) => error.kind(),
            InitError::Enter(error) => error.kind(),
            InitError::Mount { source, .. } => source.kind(),
            InitError::Devices(error) => error.kind(),
            InitError::Hide(error) => error.kind(),
            InitError::Terminal(error) => error.kind(),
            InitError::User(error) => error.kind(),
            InitError::Process(error) => error.kind(),
            _ => Kind::Internal,
        }
    }
}

/// What init is given.
pub struct Init<'a> {
    /// What to be.
    pub plan: &'a ContainerPlan,
    /// Its mounts, in order.
    pub mounts: Vec<Prepared<'a>>,
    /// A detached mount of the null device.
    pub null: OwnedFd,
    /// The standard streams.
    pub stdio: Stdio,
    /// Its end of the handshake.
    pub socket: OwnedFd,
    /// The host's /proc.
    pub proc: OwnedFd,
    /// Limits that the plan doesn't name.
    pub limits: DefaultLimits,
    /// The way into its control groups, where it was not cloned into them.
    pub entrance: Entrance,
    /// What is left to do in the pod's user namespace, if it has one.
    pub inside: Option<Inside<'a>>,
}

/// What init enters by itself where the pod has a user namespace.
pub struct Inside<'a> {
    /// The user namespace.
    pub namespace: OwnedFd,
    /// The container's root, which is nowhere yet.
    pub root: root::Prepared<'a>,
    /// User and group of the container's root on the host.
    pub owner: (u32, u32),
}

impl Inside<'_> {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        std::iter::once(self.namespace.as_fd()).chain(self.root.fd()).collect()
    }
}

impl Init<'_> {
    /// Every descriptor it needs.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let own = [self.null.as_fd(), self.socket.as_fd(), self.proc.as_fd()];
        let streams = process::streams(&self.stdio);
        let mounts = self.mounts.iter().flat_map(Prepared::fds);
        own.into_iter().chain(streams).chain(mounts).chain(self.entrance.fds()).chain(self.inside.iter().flat_map(Inside::fds)).collect()
    }
}

/// Runs init: in the clone, to its end. The code is that of a process that could not start.
pub fn run(init: Init<'_>) -> i32 {
    let Ok(socket) = init.socket.try_clone() else { return sys_process::CHILD_FAILED };
    let entered = init.entrance.enter_after_clone().map_err(InitError::Cgroup);
    let failed = match entered.and_then(|()| set_up(init)) {
        Ok(None) => return sys_process::CHILD_FAILED,
        Ok(Some(set_up)) => match wait_for_release(set_up, socket.as_fd()) {
            Ok(Some(ready)) => InitError::Process(ready.execute()),
            // The monitor is gone, or it will not start this container.
            Ok(None) => return sys_process::CHILD_FAILED,
            Err(error) => InitError::Socket(error),
        },
        Err(error) => error,
    };
    // Where nobody hears it, nobody waits for it.
    let _ = handshake::say(socket.as_fd(), &FromInit::Failed(Remote::new(&failed)), &[]);
    sys_process::CHILD_FAILED
}

/// An init that has nothing left to do before its release, and no descriptor but its streams and its socket.
struct SetUp<'a> {
    ready: Ready<'a>,
    user: ResolvedUser,
    console: Option<OwnedFd>,
}

/// Says "ready" and waits. `None`: nobody will release it.
fn wait_for_release<'a>(set_up: SetUp<'a>, socket: BorrowedFd<'_>) -> io::Result<Option<Ready<'a>>> {
    let SetUp { ready, user, console } = set_up;
    let fds: Vec<BorrowedFd<'_>> = console.iter().map(|fd| fd.as_fd()).collect();
    handshake::say(socket, &FromInit::Ready(user), &fds)?;
    drop(console);
    Ok(handshake::wait(socket)?.then_some(ready))
}

/// Everything up to "ready". `None`: the creator is gone.
fn set_up(init: Init<'_>) -> Result<Option<SetUp<'_>>, InitError> {
    let Init { plan, mut mounts, null, stdio, socket, proc, limits, entrance, inside } = init;
    drop(entrance);
    sys_process::set_name(c"copepod:init");
    if !handshake::wait(socket.as_fd()).map_err(InitError::Socket)? {
        return Ok(None);
    }
    rustix::process::setsid().map_err(|error| InitError::Session(error.into()))?;
    process::set_oom_score(&plan.process, proc.as_fd()).map_err(InitError::Process)?;
    process::set_labels(&plan.process, proc.as_fd()).map_err(InitError::Process)?;
    drop(proc);
    let mapped = inside.is_some();
    if let Some(inside) = inside {
        mounts::make_outside(&mut mounts).map_err(|(target, source)| InitError::Mount { target: target.into(), source })?;
        go_inside(inside, plan, &limits, &stdio)?;
    }
    // It belongs to the user namespace in which it is made.
    if plan.namespaces.cgroup == Namespace::Private {
        ns::unshare(&[ns::Kind::Cgroup]).map_err(InitError::CgroupNamespace)?;
    }

    let root_fd = rustix::fs::openat(CWD, c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| InitError::Root(error.into()))?;
    let root = Root(root_fd.as_fd());
    let mut attached = Attached::default();
    for prepared in &mounts {
        mounts::fill(prepared, root).map_err(|source| InitError::Mount { target: prepared.target().into(), source })?;
    }
    for prepared in mounts {
        let target = prepared.target().to_path_buf();
        mounts::attach(prepared, root, &mut attached).map_err(|source| InitError::Mount { target, source })?;
    }
    if !mapped {
        devices::outside(&plan.devices, root).map_err(InitError::Devices)?;
    }
    let terminal = if plan.process.terminal {
        // A bind of the host's /dev brings a devpts along.
        let devpts = attached.devpts.take().map_or_else(|| terminal::devpts(root), Ok).map_err(InitError::Terminal)?;
        let terminal = terminal::open(devpts.as_fd(), plan.process.terminal_size).map_err(InitError::Terminal)?;
        terminal::bind_console(terminal.peer.as_fd(), root).map_err(InitError::Terminal)?;
        Some(terminal)
    } else {
        None
    };
    // Before anything is hidden: what is masked is for the container's process, not for who it is.
    let user = user::resolve(&plan.process.user, root).map_err(InitError::User)?;
    process::check_mapped(&user, plan.user_namespace.as_ref()).map_err(InitError::Process)?;
    hide::mask(&plan.masked_paths, null, root).map_err(InitError::Hide)?;
    hide::protect(&plan.readonly_paths, root).map_err(InitError::Hide)?;
    attached.finish().map_err(|error| InitError::Readonly("a tmpfs", error))?;
    drop(attached);

    let ready = become_process(plan, &user, root, &limits, stdio, terminal.as_ref())?;
    Ok(Some(SetUp { ready, user, console: terminal.map(|terminal| terminal.master) }))
}

/// Into the pod's user namespace: what takes the host's root comes first, and the container's mount namespace and root afterwards,
/// so that they belong to the user namespace.
fn go_inside(inside: Inside<'_>, plan: &ContainerPlan, limits: &DefaultLimits, stdio: &Stdio) -> Result<(), InitError> {
    process::raise_limits(&plan.process.rlimits, limits).map_err(InitError::Process)?;
    process::give_streams(process::streams(stdio), inside.owner).map_err(InitError::Process)?;
    // No device can be made in a user namespace. So these stand in the root itself, beneath whatever is mounted there.
    if let Some(root) = inside.root.fd() {
        devices::outside(&plan.devices, Root(root)).map_err(InitError::Devices)?;
    }
    userns::enter(inside.namespace.as_fd()).map_err(InitError::UserNamespace)?;
    ns::unshare(&[ns::Kind::Mount]).map_err(InitError::MountNamespace)?;
    mount::set_propagation_of_all(mount::Propagation::Slave).map_err(InitError::MountNamespace)?;
    root::enter(inside.root, Path::new(STAGED_ROOT)).map_err(InitError::Enter)
}

fn become_process<'a>(
    plan: &'a ContainerPlan,
    user: &ResolvedUser,
    root: Root<'_>,
    limits: &DefaultLimits,
    stdio: Stdio,
    terminal: Option<&terminal::Terminal>,
) -> Result<Ready<'a>, InitError> {
    match terminal {
        Some(terminal) => {
            terminal::take(terminal.peer.as_fd()).map_err(InitError::Terminal)?;
            process::take_stdio([terminal.peer.as_fd(); 3], user.uid).map_err(InitError::Process)?;
        }
        None => process::take_stdio(process::streams(&stdio), user.uid).map_err(InitError::Process)?,
    }
    drop(stdio);
    // The working directory may have to be made, so that a read-only root comes after it.
    process::make_cwd(&plan.process, root).map_err(InitError::Process)?;
    if plan.rootfs_readonly {
        let readonly = mount::Attributes { readonly: true, ..mount::Attributes::default() };
        mount::set_attributes(root.0, readonly, false).map_err(|error| InitError::Readonly("the root", error))?;
    }
    process::prepare(&plan.process, user, root, limits).map_err(InitError::Process)
}
