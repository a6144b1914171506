//! The conversation with an init that is ready: one release, and how its execve went.

use std::io;
use std::os::fd::BorrowedFd;

use crate::errchain::Remote;

/// How a release ended.
#[derive(Debug)]
pub enum Outcome {
    /// The container's program runs.
    Executed,
    /// It could not be executed; init is ending.
    Failed(Remote),
}

/// Lets init execute its program.
pub fn release(_start: BorrowedFd<'_>) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// How the release went; `None`: not known yet. Never blocks. To be asked after [`release`], when `start` is readable.
pub fn outcome(_start: BorrowedFd<'_>) -> io::Result<Option<Outcome>> {
    Err(io::ErrorKind::Unsupported.into())
}
