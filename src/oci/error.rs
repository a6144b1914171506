//! What can go wrong in the embedded runtime, one level above the modules' own errors.

use std::io;
use std::path::PathBuf;

use super::devices::DeviceError;
use super::mounts::MountError;
use super::process::ProcessError;
use super::root::RootError;
use super::userns::UserNsError;
use crate::cgroup::CgroupError;
use crate::errchain::{Kind, Kinded, Remote};

/// An operation of the embedded runtime that failed.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The creator can't get hold of the host, or come back to it.
    #[error("cannot reach the host's {0}")]
    Host(&'static str, #[source] io::Error),
    /// A new namespace.
    #[error("cannot make a {0} namespace")]
    Unshare(&'static str, #[source] io::Error),
    /// A namespace that exists.
    #[error("cannot enter the {kind} namespace of {of}")]
    Enter {
        /// Its name in /proc/PID/ns.
        kind: &'static str,
        /// Whose it is.
        of: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The plan asks for a namespace of the pod or of a container that the monitor did not pass.
    #[error("the plan needs the {kind} namespace of {of}, which there is none of")]
    NoNamespace {
        /// Its name in /proc/PID/ns.
        kind: &'static str,
        /// Whose it would be.
        of: String,
    },
    /// The pod's user namespace.
    #[error("cannot make the pod's user namespace")]
    UserNs(#[source] UserNsError),
    /// The pod's user namespace, by a process that does the pod's last work in it.
    #[error("cannot enter the pod's user namespace")]
    EnterUserNs(#[source] io::Error),
    /// Something of the pod's own namespaces.
    #[error("cannot set {what}")]
    Set {
        /// What: the host name, `lo`, a sysctl.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A sysctl whose name is no path below /proc/sys.
    #[error("{0:?} is no name of a sysctl")]
    SysctlName(String),
    /// The pod's staging mounts.
    #[error("cannot make the pod's {what}")]
    Staging {
        /// What.
        what: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The pause process.
    #[error("cannot start the pause process")]
    Pause(#[source] io::Error),
    /// The pause process reported an error.
    #[error("the pause process failed")]
    PauseFailed,
    /// The control group.
    #[error("cannot set up control group {path}")]
    Cgroup {
        /// Its path.
        path: String,
        /// Why.
        source: CgroupError,
    },
    /// The root filesystem.
    #[error("cannot prepare the container's root")]
    Root(#[source] RootError),
    /// A mount.
    #[error("cannot prepare the mount of {target}")]
    Mount {
        /// Where in the container.
        target: PathBuf,
        /// Why.
        source: MountError,
    },
    /// The null device.
    #[error("cannot prepare masked paths")]
    Null(#[source] DeviceError),
    /// The process in the plan.
    #[error("cannot run the plan's process")]
    Process(#[source] ProcessError),
    /// The container that was to be entered has ended.
    #[error("the container has ended")]
    Ended,
    /// clone3(2).
    #[error("cannot clone {0}")]
    Clone(&'static str, #[source] io::Error),
    /// The conversation with a forked process.
    #[error("cannot talk to {0}")]
    Talk(&'static str, #[source] io::Error),
    /// A forked process reported an error; its own chain follows.
    #[error("{0} failed")]
    Remote(&'static str, #[source] Remote),
    /// A forked process ended without a word.
    #[error("{0} was killed while it was set up")]
    Died(&'static str),
}

impl Kinded for OciError {
    fn kind(&self) -> Kind {
        match self {
            OciError::Cgroup { source, .. } => source.kind(),
            OciError::Root(error) => error.kind(),
            OciError::Mount { source, .. } => source.kind(),
            OciError::Null(error) => error.kind(),
            OciError::UserNs(error) => error.kind(),
            OciError::Process(error) => error.kind(),
            OciError::Remote(_, remote) => remote.kind(),
            OciError::SysctlName(_) => Kind::InvalidArgument,
            OciError::NoNamespace { .. } | OciError::Ended => Kind::FailedPrecondition,
            OciError::Talk(_, source) if source.kind() == io::ErrorKind::TimedOut => Kind::DeadlineExceeded,
            // The kernel killed it, most often for memory.
            OciError::Died(_) => Kind::ResourceExhausted,
            _ => Kind::Internal,
        }
    }
}
