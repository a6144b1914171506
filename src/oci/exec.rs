//! Runs a further process in a container.
//!
//! The process is the child of a *helper*, a fork of ours that lives in the container's PID namespace as a subreaper: it
//! reports how the process ended, and it can kill everything the process started.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::create::Stdio;
use super::{Hierarchy, OciError};
use crate::errchain::Remote;
use crate::plan::{ContainerPlan, ExecPlan};

/// The container in which to run.
#[derive(Debug, Clone, Copy)]
pub struct ExecTarget<'a> {
    /// Its init's pidfd.
    pub pidfd: BorrowedFd<'a>,
    /// Its init as the host sees it.
    pub pid: u32,
    /// Its plan.
    pub plan: &'a ContainerPlan,
}

/// A process that runs.
#[derive(Debug)]
pub struct ExecStarted {
    /// The helper as the host sees it; a child of the monitor.
    pub helper_pid: u32,
    /// The helper's pidfd. A helper that ends without an [`ExecEvent`] was killed, and the process with it or soon after: 137.
    pub helper_pidfd: OwnedFd,
    /// The process as the host sees it; 0: not known.
    pub pid: u32,
    /// The socket for [`event`] and [`kill`].
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

/// Runs a process; returns when its program has been executed. Runs in a creator.
pub fn exec(_plan: &ExecPlan, _target: &ExecTarget<'_>, _stdio: Stdio, _hierarchy: &Hierarchy) -> Result<ExecStarted, OciError> {
    Err(OciError::Unbuilt("exec::exec"))
}

/// The helper's next report; `None`: there is none yet. Never blocks. A helper that is gone is `UnexpectedEof`.
pub fn event(_control: BorrowedFd<'_>) -> io::Result<Option<ExecEvent>> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Has the helper kill the process and all that it started; [`ExecEvent::Exited`] follows when all are dead.
pub fn kill(_control: BorrowedFd<'_>) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
