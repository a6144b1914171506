//! The way into a group for a process that goes in by itself.
//!
//! To move somebody else, or a whole process, the kernel stops every fork and exit of the node, and waits for an RCU grace
//! period first: about 10 ms, each time a while has passed since the last. It waits for nothing where a process is cloned into
//! a group of v2 (CLONE_INTO_CGROUP), and where a thread writes `0` for itself to the `tasks` of a v1 group (Linux 5.5). That
//! is the way for a container's init and for an exec: opened by the creator, so that the clone needs no path to it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use super::CgroupError;

/// The open files of a group that take processes.
#[derive(Debug)]
pub struct Entrance {
    /// v1's.
    pub(super) doors: Vec<Door>,
    /// v2's, and its directory.
    pub(super) unified: Option<(Door, OwnedFd)>,
}

/// A file that takes a process, and the directory it is in.
#[derive(Debug)]
pub(super) struct Door {
    pub(super) file: OwnedFd,
    pub(super) path: PathBuf,
}

impl Entrance {
    /// What to clone with: v2's directory. `None` on v1 without the hybrid's v2.
    pub fn clone_into(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(|(_, dir)| dir.as_fd())
    }

    /// Every descriptor of it: a clone that [enters](Self::enter_after_clone) and drops it must have kept them open until then.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let unified = self.unified.iter().flat_map(|(door, dir)| [door.file.as_fd(), dir.as_fd()]);
        self.doors.iter().map(|door| door.file.as_fd()).chain(unified).collect()
    }

    /// What is left to do for a process that was cloned into [`clone_into`](Self::clone_into): it enters v1's hierarchies. Called
    /// by itself, before it has a second thread; nothing on v2.
    pub fn enter_after_clone(&self) -> Result<(), CgroupError> {
        self.doors.iter().try_for_each(enter)
    }

    /// Enters everywhere: for a process that was not cloned into it. Slow where there is v2.
    pub fn enter_self(&self) -> Result<(), CgroupError> {
        self.enter_after_clone()?;
        self.unified.as_ref().map_or(Ok(()), |(door, _)| enter(door))
    }
}

fn enter(door: &Door) -> Result<(), CgroupError> {
    match rustix::io::retry_on_intr(|| rustix::io::write(&door.file, b"0")) {
        Ok(_) => Ok(()),
        Err(errno) => Err(CgroupError::Enter { pid: 0, path: door.path.clone(), source: errno.into() }),
    }
}
