//! Network namespaces, entered on threads that do nothing else and end.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Starts a thread that may enter namespaces, and does not wait for it: what it finds it sends. It must not be one of a pool.
pub fn scratch(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    // The frames here are small; a thread's default stack is 2 MiB of address space for nothing.
    std::thread::Builder::new().name(name.to_string()).stack_size(256 << 10).spawn(run).map(drop)
}

/// Moves the calling thread, and nothing else of the process, into a network namespace. Only for threads made by [`scratch`].
pub fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?)
}

/// A new network namespace of the calling process's user namespace, with nothing but a `lo` that is down. Waits for a scratch thread.
pub fn create() -> io::Result<OwnedFd> {
    let thread = std::thread::Builder::new().name("netns-create".to_string()).spawn(|| {
        // SAFETY: CLONE_NEWNET moves this thread alone, into a namespace that no other thread was in; the descriptor table, which
        // is what other flags would take from under safe code, stays shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    })?;
    thread.join().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
}
