//! A pod's own namespaces, and the pause process of a pod that shares its PID namespace.

use std::os::fd::OwnedFd;

use super::OciError;
use crate::plan::SandboxPlan;

/// What holds a pod's namespaces open. `None`: the pod uses the host's.
#[derive(Debug, Default)]
pub struct SandboxNamespaces {
    /// network_namespaces(7).
    pub net: Option<OwnedFd>,
    /// ipc_namespaces(7).
    pub ipc: Option<OwnedFd>,
    /// uts_namespaces(7).
    pub uts: Option<OwnedFd>,
    /// pid_namespaces(7) of the pause process.
    pub pid: Option<OwnedFd>,
    /// A private mount namespace that holds the pod's /dev/shm.
    pub staging: Option<OwnedFd>,
    /// The pause process, a child of the monitor: its pid and pidfd.
    pub pause: Option<(u32, OwnedFd)>,
}

/// Makes the pod's namespaces. Runs in a creator.
pub fn create(_plan: &SandboxPlan) -> Result<SandboxNamespaces, OciError> {
    Err(OciError::Unbuilt("sandbox::create"))
}
