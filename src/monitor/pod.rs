//! The pod: the monitor's whole state, and the loop that everything happens in.
//!
//! [`Pod::turn`] waits once, for the earliest deadline at most, and hands each thing that is ready to the file that knows
//! it: [`super::requests`] for what the daemon says, [`super::containers`], [`super::execs`] and [`super::sandbox`] for what
//! becomes of them. No handler waits for anything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::AtFlags;
use rustix::process::Pid;

use crate::cgroup::Hierarchy;
use crate::errchain::Remote;
use crate::monitor::children::{Container, Phase};
use crate::monitor::clients::{Caller, Clients};
use crate::monitor::creator::{self, Answer, Creator};
use crate::monitor::execs::{Exec, ExecPhase};
use crate::monitor::runtime::{Made, Work};
use crate::monitor::sandbox::Sandbox;
use crate::monitor::say;
use crate::monitor::stdio::link::{Answered, Link};
use crate::monitor_api::{Body, SOCKET};
use crate::sys::process::{self, Ended};

/// How long the monitor waits for its stdio process and for creators that have answered when it is told to exit.
const LEAVE: Duration = Duration::from_secs(1);

/// How long nothing has to happen before the monitor lets go of memory.
const QUIET: Duration = Duration::from_secs(1);

/// A pod and its monitor.
#[derive(Debug)]
pub struct Pod {
    /// The daemon's connections.
    pub clients: Clients,
    /// The stdio process.
    pub link: Link,
    /// Where control groups are.
    pub hierarchy: Hierarchy,
    /// The pod's namespaces.
    pub sandbox: Sandbox,
    /// Every container that has not been removed.
    pub containers: Vec<Container>,
    /// Every exec that has not ended.
    pub execs: Vec<Exec>,
    /// Control groups above the containers' that were made for them, outermost first.
    pub parents: Vec<String>,
    /// What the pod's own control group had counted of OOM kills before, and of those in containers that are gone. `None`: not
    /// known.
    pub ooms_before: Option<u64>,
    jobs: Vec<Job>,
    /// Children that ended before the creator that made them could say so.
    early: Vec<Ended>,
    serial: u32,
    place: Place,
    leaving: Option<(Caller, Instant)>,
    /// Nothing has happened since it let go of what it does not need at rest.
    rests: bool,
}

/// What the monitor has of its surroundings.
#[derive(Debug)]
pub struct Place {
    /// The pod's directory.
    pub dir: OwnedFd,
    /// Readable when a child has ended.
    pub children: OwnedFd,
}

/// A creator and what it is for.
#[derive(Debug)]
struct Job {
    serial: u32,
    creator: Creator,
    purpose: Purpose,
    /// Its answer was read, or it has none: only its end is awaited.
    answered: bool,
}

/// What a creator is for; the number is that of the container or the exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The pod's namespaces.
    Sandbox,
    /// A container.
    Create(u32),
    /// An exec.
    Exec(u32),
    /// Killing what is in a container's control group.
    Kill(u32),
    /// The same, and removing the group.
    Delete(u32),
}

/// What can be ready.
#[derive(Debug, Clone, Copy)]
enum Ready {
    Children,
    Listener,
    Client(u32),
    Link,
    Job(u32),
    Start(u32),
    Exec(u32),
}

impl Pod {
    /// A pod of which nothing has been made.
    pub fn new(clients: Clients, place: Place, hierarchy: Hierarchy) -> Self {
        Self {
            clients,
            link: Link::default(),
            hierarchy,
            sandbox: Sandbox::default(),
            containers: Vec::new(),
            execs: Vec::new(),
            parents: Vec::new(),
            ooms_before: None,
            jobs: Vec::new(),
            early: Vec::new(),
            serial: 0,
            place,
            leaving: None,
            rests: false,
        }
    }

    /// Serves until the daemon says that it is over.
    pub fn run(&mut self) {
        while self.turn() {}
    }

    /// A number that was never given before.
    pub fn next_serial(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }

    /// Starts a creator. An error: it could not be started.
    pub fn start_job(&mut self, purpose: Purpose, work: impl FnOnce(&Self) -> Result<Work<'_>, Remote>) -> Result<(), Remote> {
        let creator = Creator::start(work(self)?, &self.hierarchy).map_err(|error| creator::cannot_start(&error))?;
        let serial = self.next_serial();
        self.jobs.push(Job { serial, creator, purpose, answered: false });
        Ok(())
    }

    /// Whether a creator for this is at work.
    pub fn has_job(&self, purpose: Purpose) -> bool {
        self.jobs.iter().any(|job| job.purpose == purpose)
    }

    /// Whether a container is being made.
    pub fn is_creating(&self) -> bool {
        self.jobs.iter().any(|job| matches!(job.purpose, Purpose::Create(_)) && !job.answered)
    }

    /// Kills the creator for this. It ends without an answer as soon as it can be killed.
    pub fn kill_job(&self, purpose: Purpose) {
        for job in self.jobs.iter().filter(|job| job.purpose == purpose) {
            job.creator.kill();
        }
    }

    /// How a process that a creator has just told of has ended, if it has.
    pub fn ended_early(&mut self, pid: Pid) -> Option<Ended> {
        let at = self.early.iter().position(|ended| ended.pid == pid)?;
        Some(self.early.swap_remove(at))
    }

    /// The daemon wants the monitor to go. What could keep it was checked.
    pub fn leave(&mut self, caller: Caller) {
        self.leaving = Some((caller, Instant::now() + LEAVE));
        self.link.release();
    }

    /// One wait and what came of it. False: it is over.
    fn turn(&mut self) -> bool {
        for ready in self.wait() {
            match ready {
                Ready::Children => self.reap(),
                Ready::Listener => self.clients.accept(),
                Ready::Client(id) => self.requests(id),
                Ready::Link => self.link_ready(),
                Ready::Job(serial) => self.job_ready(serial),
                Ready::Start(serial) => self.start_ready(serial),
                Ready::Exec(serial) => self.exec_ready(serial),
            }
        }
        let now = Instant::now();
        self.containers_due(now);
        self.execs_orphaned(now);
        self.execs_due(now);
        self.link.start_again(now);
        self.link.flush();
        !self.may_leave(now) && !self.is_forgotten()
    }

    /// Nothing was made yet and nobody is there to ask for it: the daemon died before it could even note that it had started
    /// this monitor, and no later one will look for it.
    fn is_forgotten(&self) -> bool {
        let forgotten =
            self.sandbox.state().is_none() && self.containers.is_empty() && self.jobs.is_empty() && self.clients.sockets().next().is_none();
        if forgotten {
            let _ = rustix::fs::unlinkat(&self.place.dir, SOCKET, AtFlags::empty());
        }
        forgotten
    }

    /// Waits until something is ready or due.
    fn wait(&mut self) -> Vec<Ready> {
        let mut watched = vec![watch(Ready::Children, self.place.children.as_fd(), false)];
        watched.extend(self.jobs.iter().filter(|job| !job.answered).map(|job| watch(Ready::Job(job.serial), job.creator.socket(), false)));
        for container in &self.containers {
            if let Phase::Starting(init, _) = &container.phase
                && let Some(start) = &init.start
            {
                watched.push(watch(Ready::Start(container.serial), start.as_fd(), false));
            }
        }
        for exec in &self.execs {
            if let ExecPhase::Running { control, .. } = &exec.phase {
                watched.push(watch(Ready::Exec(exec.serial), control.as_fd(), false));
            }
        }
        watched.extend(self.link.socket().map(|(socket, write)| watch(Ready::Link, socket, write)));
        watched.extend(self.clients.listener().map(|listener| watch(Ready::Listener, listener, false)));
        watched.extend(self.clients.sockets().map(|(id, socket, write)| watch(Ready::Client(id), socket, write)));
        let (names, mut fds): (Vec<Ready>, Vec<PollFd<'_>>) = watched.into_iter().unzip();
        let due = self.due();
        let ended = match due.is_some_and(|at| at <= Instant::now() + QUIET) || self.rests {
            true => poll_until(&mut fds, due),
            // The second poll comes at once after the rest: what lies between would be brought back into memory.
            false => match poll_until(&mut fds, Some(Instant::now() + QUIET)) {
                Ok(0) => {
                    process::rest();
                    self.rests = true;
                    poll_until(&mut fds, due)
                }
                ended => ended,
            },
        };
        match ended {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => self.rests = false,
            // Only ENOMEM is left, and that passes.
            Err(error) => say(format_args!("cannot poll: {error}")),
        }
        names.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty()).map(|(name, _)| name).collect()
    }

    /// The earliest deadline.
    fn due(&self) -> Option<Instant> {
        let containers = self.containers.iter().flat_map(|c| [c.stop.as_ref().map(|stop| stop.next()), c.report]).flatten();
        let execs = self.execs.iter().filter_map(|exec| exec.due);
        containers.chain(execs).chain(self.link.due()).chain(self.leaving.as_ref().map(|(_, at)| *at)).min()
    }

    /// Reaps every child that has ended.
    fn reap(&mut self) {
        process::drain_signalfd(self.place.children.as_fd());
        loop {
            match process::reap() {
                Ok(Some(ended)) => self.child_ended(ended),
                Ok(None) => return,
                Err(error) => {
                    say(format_args!("cannot reap: {error}"));
                    return;
                }
            }
        }
    }

    fn child_ended(&mut self, ended: Ended) {
        if self.link.is(ended.pid) {
            self.link.ended(Instant::now());
        } else if let Some(serial) = self.jobs.iter().find(|job| job.creator.pid == ended.pid).map(|job| job.serial) {
            self.job_ready(serial);
            self.job_lost(serial);
            self.jobs.retain(|job| job.serial != serial);
            if !self.jobs.iter().any(|job| matches!(job.purpose, Purpose::Sandbox | Purpose::Create(_) | Purpose::Exec(_))) {
                self.early.clear();
            }
            self.sandbox_advance();
        } else if let Some(at) = self.containers.iter().position(|c| c.init().is_some_and(|init| init.pid == ended.pid)) {
            self.init_ended(at, ended);
        } else if !self.pause_ended(ended.pid) && !self.helper_ended(ended.pid) {
            self.early.push(ended);
        }
    }

    /// A creator's socket has something.
    fn job_ready(&mut self, serial: u32) {
        let Some(job) = self.jobs.iter_mut().find(|job| job.serial == serial && !job.answered) else { return };
        match job.creator.answer() {
            Ok(None) => {}
            Ok(Some((Made::Parents(parents), _))) => {
                self.parents.extend(parents);
                self.parents.sort_unstable_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
                self.parents.dedup();
                self.job_ready(serial);
            }
            Ok(Some(answer)) => {
                job.answered = true;
                let purpose = job.purpose;
                self.job_done(purpose, Some(answer));
            }
            Err(_) => self.job_lost(serial),
        }
    }

    /// A creator will never answer, unless it has.
    fn job_lost(&mut self, serial: u32) {
        let Some(job) = self.jobs.iter_mut().find(|job| job.serial == serial && !job.answered) else { return };
        job.answered = true;
        let purpose = job.purpose;
        self.job_done(purpose, None);
    }

    fn job_done(&mut self, purpose: Purpose, answer: Option<Answer>) {
        match purpose {
            Purpose::Sandbox => self.sandbox_made(answer),
            Purpose::Create(serial) => self.container_made(serial, answer),
            Purpose::Exec(serial) => self.exec_made(serial, answer),
            Purpose::Kill(_) => {}
            Purpose::Delete(serial) => self.container_deleted(serial, answer),
        }
    }

    fn link_ready(&mut self) {
        while let Some(answered) = self.link.receive() {
            match answered {
                Answered::Opened(log, result) => self.log_opened(log, result),
                Answered::Reopened(log, result) => self.log_reopened(log, result),
                Answered::Drained(log) => self.log_drained(log),
                Answered::Joined(log, result) => self.client_joined(log, result),
            }
        }
    }

    /// Whether the monitor was told to go and can.
    fn may_leave(&mut self, now: Instant) -> bool {
        let Some((caller, latest)) = self.leaving else { return false };
        if self.link.lives() || !self.jobs.is_empty() {
            if now < latest {
                return false;
            }
            self.link.kill();
        }
        let _ = rustix::fs::unlinkat(&self.place.dir, SOCKET, AtFlags::empty());
        self.clients.answer(caller, Body::Done, Vec::new());
        true
    }
}

/// Waits for one of the descriptors, until a time at most.
fn poll_until(fds: &mut [PollFd<'_>], until: Option<Instant>) -> rustix::io::Result<usize> {
    let left = until.map(|at| at.saturating_duration_since(Instant::now()));
    let timeout = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
    poll(fds, timeout.as_ref())
}

fn watch(ready: Ready, fd: BorrowedFd<'_>, write: bool) -> (Ready, PollFd<'_>) {
    let events = if write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    (ready, PollFd::from_borrowed_fd(fd, events))
}
