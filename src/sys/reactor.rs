//! Descriptors that tokio waits for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has tokio wait for a descriptor that is ours alone. Must be called within a runtime.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, keeps its number, and names one file description until it is dropped; `AsyncFd` owns it and
    // gives out only references to it.
    unsafe { Ok(AsyncFd::register_with_interest(fd, interest)?) }
}
