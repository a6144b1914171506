//! The conversation with an init: up to "ready" with its creator, then with the monitor about one release and how its execve went.
//!
//! In order: `go` from the creator, [`FromInit::Ready`] from init, [`release`] from the monitor, and then either the end of the
//! socket, which is close-on-exec, or [`FromInit::Failed`], which may also come in place of `Ready`. When the other side of the
//! socket is closed early, init ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::errchain::{Kind, Remote};
use crate::plan::ResolvedUser;
use crate::sys::fd;
use crate::wire::{self, Wire};
use crate::wire_enum;

/// How a release ended.
#[derive(Debug)]
pub enum Outcome {
    /// The container's program runs (or has run).
    Executed,
    /// It could not be executed; init is ending.
    Failed(Remote),
}

wire_enum! {
    /// What an init says.
    pub enum FromInit {
        /// Never sent.
        0 None,
        /// It waits to be released; the master of its terminal comes along, if it has one.
        1 Ready(ResolvedUser),
        /// It ends.
        2 Failed(Remote),
    }
}

/// A [`Remote`] is bounded by its sender; see [`Remote::from_links`].
const MAX_MESSAGE: usize = 64 * 1024;

/// Lets init execute its program.
pub fn release(start: BorrowedFd<'_>) -> io::Result<()> {
    fd::send(start, b"release", &[])
}

/// How the release went; `None`: not known yet. Never blocks. To be asked after [`release`], when `start` is readable.
pub fn outcome(start: BorrowedFd<'_>) -> io::Result<Option<Outcome>> {
    if !readable(start, Duration::ZERO)? {
        return Ok(None);
    }
    match receive(start) {
        Ok(None) => Ok(Some(Outcome::Executed)),
        Ok(Some((FromInit::Failed(remote), _))) => Ok(Some(Outcome::Failed(remote))),
        Ok(Some(_)) => Err(io::Error::new(io::ErrorKind::InvalidData, "init is ready twice")),
        // It was killed before it read the release.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
            Ok(Some(Outcome::Failed(Remote::text(Kind::Aborted, "init ended before it executed the container's program"))))
        }
        Err(error) => Err(error),
    }
}

/// Lets init begin: it is in its control groups.
pub(super) fn go(start: BorrowedFd<'_>) -> io::Result<()> {
    fd::send(start, b"go", &[])
}

/// Init's side of [`go`] and [`release`]. `false`: the other side is gone. Waits as long as that one lives, whose deadline it is.
pub(super) fn wait(socket: BorrowedFd<'_>) -> io::Result<bool> {
    match fd::receive(socket, 16) {
        Ok(message) => Ok(message.is_some()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
        Err(error) => Err(error),
    }
}

/// Init's side: says something. Nobody listening is no error: init is about to end then.
pub(super) fn say<T: Wire>(socket: BorrowedFd<'_>, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    fd::send(socket, &wire::encode(message), fds)
}

/// What the process at the other end says next, within `time`. `None`: it is gone.
pub(super) fn hear<T: Wire>(start: BorrowedFd<'_>, time: Duration) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    if !readable(start, time)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match receive(start) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        heard => heard,
    }
}

pub(super) fn receive<T: Wire>(start: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let received = match fd::receive(start, MAX_MESSAGE) {
        // The other end closed with something unread. That comes first, and what it had said before comes after.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Some(fd::receive(start, MAX_MESSAGE)?.ok_or(error)?),
        received => received?,
    };
    let Some((bytes, fds)) = received else { return Ok(None) };
    let message = wire::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, fds)))
}

/// Whether a descriptor becomes readable, or its other end closes, within `time`.
pub(super) fn readable(fd: BorrowedFd<'_>, time: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + time;
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).map_err(|_| io::ErrorKind::InvalidInput)?;
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcome_of_a_release() {
        let pair = || fd::seqpacket_pair().unwrap();
        let (start, init) = pair();
        assert!(outcome(start.as_fd()).unwrap().is_none());
        release(start.as_fd()).unwrap();
        assert!(wait(init.as_fd()).unwrap());
        assert!(outcome(start.as_fd()).unwrap().is_none());
        drop(init);
        assert!(matches!(outcome(start.as_fd()).unwrap(), Some(Outcome::Executed)));

        let (start, init) = pair();
        release(start.as_fd()).unwrap();
        wait(init.as_fd()).unwrap();
        say(init.as_fd(), &FromInit::Failed(Remote::text(Kind::NotFound, "no")), &[]).unwrap();
        drop(init);
        assert!(matches!(outcome(start.as_fd()).unwrap(), Some(Outcome::Failed(remote)) if remote.to_string() == "no"));

        let (start, init) = pair();
        release(start.as_fd()).unwrap();
        drop(init);
        assert!(matches!(outcome(start.as_fd()).unwrap(), Some(Outcome::Failed(_))));

        let (start, init) = pair();
        drop(start);
        assert!(!wait(init.as_fd()).unwrap());
    }
}
