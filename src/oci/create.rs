//! Creates a container: everything up to an init that waits for [`super::handshake::release`].

use std::os::fd::{BorrowedFd, OwnedFd};

use super::{Hierarchy, OciError};
use crate::plan::{ContainerPlan, ResolvedUser};

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

/// Creates a container. Runs in a creator. If it fails, everything it made is gone; init, once killed, is the monitor's to
/// reap.
pub fn create(_plan: &ContainerPlan, _pod: &PodFds<'_>, _stdio: Stdio, _hierarchy: &Hierarchy) -> Result<CreatedInit, OciError> {
    Err(OciError::Unbuilt("create::create"))
}
