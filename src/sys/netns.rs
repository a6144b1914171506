//! Network namespaces, entered on threads that do nothing else and end.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::thread::LinkNameSpaceType;

/// Starts a thread that may enter namespaces, and does not wait for it: what it finds it sends. It must not be one of a pool.
pub fn scratch(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    // The frames here are small; a thread's default stack is 2 MiB of address space for nothing.
    std::thread::Builder::new().name(name.to_string()).stack_size(256 << 10).spawn(run).map(drop)
}

/// Moves the calling thread, and nothing else of the process, into a network namespace. Only for threads made by [`scratch`].
pub fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?)
}
