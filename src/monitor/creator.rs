//! Creators: short-lived forks of the monitor that do what may block, and answer on a socket.
//!
//! A creator that hangs is one job that has no answer yet; the monitor never waits for one. What it makes (an init, a
//! helper, a pause process) is made with CLONE_PARENT and is the monitor's child, which may even have ended before the
//! answer is read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::Pid;

use crate::cgroup::Hierarchy;
use crate::errchain::Remote;
use crate::monitor::runtime::{Made, Work};
use crate::monitor_api::MAX_MESSAGE;
use crate::sys::fd;
use crate::sys::process::{self, CloneArgs, Keep};
use crate::wire;

/// A creator at work.
#[derive(Debug)]
pub struct Creator {
    /// Its process.
    pub pid: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
}

/// What a creator says, with the descriptors it made.
pub type Answer = (Made, Vec<OwnedFd>);

impl Creator {
    /// Forks a creator for a job.
    pub fn start(work: Work<'_>, hierarchy: &Hierarchy) -> io::Result<Self> {
        let (ours, theirs) = fd::seqpacket_pair()?;
        fd::set_nonblocking(&ours)?;
        let mut kept = work.fds();
        kept.push(theirs.as_fd());
        let keep = Keep::only(&kept);
        let (pid, pidfd) = process::spawn(CloneArgs::default(), Some(keep), || {
            process::set_name(work.name());
            let tell = |made: &Made| drop(fd::send(theirs.as_fd(), &wire::encode(made), &[]));
            let (made, fds) = work.run(hierarchy, tell).unwrap_or_else(|error| (Made::Failed(error), Vec::new()));
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            i32::from(fd::send(theirs.as_fd(), &wire::encode(&made), &fds).is_err())
        })?;
        Ok(Self { pid, pidfd, socket: ours })
    }

    /// The socket to poll.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Its answer, or what it says before that ([`Made::Parents`]). `Ok(None)`: it has none yet. An error: it has ended, or will end, without one.
    pub fn answer(&self) -> io::Result<Option<Answer>> {
        match fd::receive(self.socket.as_fd(), MAX_MESSAGE) {
            Ok(Some((bytes, fds))) => {
                let made = wire::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                Ok(Some((made, fds)))
            }
            Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ends it, as soon as what it hangs in lets it go.
    pub fn kill(&self) {
        let _ = process::signal(self.pidfd.as_fd(), libc::SIGKILL as u32);
    }
}

/// That a creator could not be started.
pub fn cannot_start(error: &io::Error) -> Remote {
    let kind = crate::errchain::Kind::ResourceExhausted;
    Remote::from_links(kind, vec!["cannot start a creator".into(), error.to_string()])
}
