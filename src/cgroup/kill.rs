//! Killing a group of cgroup v1, which has no `cgroup.kill`: by process, until none is left.
//!
//! The first round is a plain one, since most groups hold one process that dies at once. From the second on the group is
//! frozen while it is listed and signalled, so that nothing forks meanwhile, and thawed to die: a frozen process of v1 does not
//! act on SIGKILL.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::CgroupError;
use super::v1::Group;
use crate::sys::process;

/// Processes handled at a time, so that a crowd doesn't use up our descriptors.
const BATCH: usize = 256;
/// How long a round waits for its victims before the next one looks for others.
const ROUND: Duration = Duration::from_millis(100);
/// How long a round waits for the freezer: it may not come at all while a process sits in the kernel.
const FREEZE: Duration = Duration::from_millis(20);

/// `false`: something lives when the time is up.
pub(super) fn kill_v1(group: &Group, path: &str, within: Duration) -> Result<bool, CgroupError> {
    let deadline = Instant::now() + within;
    for round in 0u32.. {
        if group.procs(true)?.is_empty() {
            return Ok(true);
        }
        if round > 0 {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            // What is dead to its pidfd can be listed a moment longer.
            std::thread::sleep(Duration::from_millis(1));
            // A help, not a condition: without a freezer this is a race that each round makes less likely to be lost.
            let _ = group.freeze(FREEZE.min(deadline.saturating_duration_since(Instant::now())));
        }
        let victims = signal_all(group, path);
        // Also where it was frozen by somebody else, and before any error is returned.
        match group.thaw(true) {
            Err(error) if !is_gone(&error) => return Err(error),
            _ => {}
        }
        wait(&victims?, deadline.min(Instant::now() + ROUND));
    }
    Ok(false)
}

fn is_gone(error: &CgroupError) -> bool {
    crate::errchain::Kinded::kind(error) == crate::errchain::Kind::NotFound
}

/// Sends SIGKILL to every process there is. Gives some of them to wait for.
fn signal_all(group: &Group, path: &str) -> Result<Vec<OwnedFd>, CgroupError> {
    let mut kept = Vec::new();
    for batch in group.procs(true)?.chunks(BATCH) {
        let opened: Vec<(u32, OwnedFd)> = batch.iter().filter_map(|&pid| Some((pid, process::pidfd_open(pid).ok()?))).collect();
        // A pid may have passed to another process between the list and the pidfd. Who is still listed was not that.
        let now = group.procs(true)?;
        for (pid, fd) in opened {
            if now.binary_search(&pid).is_err() {
                continue;
            }
            match process::signal(fd.as_fd(), libc::SIGKILL as u32) {
                Ok(()) => kept.push(fd),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(CgroupError::Kill { pid, path: path.to_string(), source }),
            }
        }
        kept.truncate(BATCH);
    }
    Ok(kept)
}

/// Waits until all of them are dead or the time is up.
fn wait(victims: &[OwnedFd], deadline: Instant) {
    let mut left: Vec<PollFd<'_>> = victims.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    while !left.is_empty() {
        let time = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec::try_from(time).ok();
        match rustix::event::poll(&mut left, timeout.as_ref()) {
            Ok(0) => return,
            Ok(_) => left.retain(|fd| fd.revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
