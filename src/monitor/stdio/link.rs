//! The monitor's end of its stdio process: starts it, starts it again, and never waits for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::Pid;

use crate::errchain::{Kind, Remote};
use crate::monitor::log::file::Losses;
use crate::monitor::say;
use crate::monitor::stdio::orders::{Answer, Join, Key, Message, Open, Order};
use crate::monitor::stdio::process::run;
use crate::monitor_api::MAX_MESSAGE;
use crate::plan::LogPlan;
use crate::sys::fd;
use crate::sys::process::{self, CloneArgs, Keep};
use crate::wire;

/// A process that lived shorter than this is not started again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// What became of something that was asked for, with the log's number.
#[derive(Debug)]
pub enum Answered {
    /// The log is open, or why not.
    Opened(u32, Result<(), Remote>),
    /// The log was opened anew, or why not.
    Reopened(u32, Result<(), Remote>),
    /// What the streams held is written.
    Drained(u32),
    /// A client is attached, or why not.
    Joined(u32, Result<(), Remote>),
}

/// What a container reads.
#[derive(Debug, Default)]
pub struct Reads {
    /// The write end of its stdin; none where a terminal is that, or where it reads nothing.
    pub stdin: Option<OwnedFd>,
    /// Attached clients can say something.
    pub clients: bool,
    /// Until the first of them goes.
    pub once: bool,
}

/// The stdio process as the monitor has it.
#[derive(Debug, Default)]
pub struct Link {
    child: Option<Child>,
    losses: Option<Losses>,
    held: Vec<Held>,
    /// Orders in the order in which they were given; the first `sent` of them have been sent and not answered.
    orders: VecDeque<Given>,
    sent: usize,
    next_seq: u32,
    next_key: u32,
    restart_at: Option<Instant>,
    released: bool,
}

/// An order, with the descriptors of a client that comes with it: the others are those that are held.
#[derive(Debug)]
struct Given {
    seq: u32,
    order: Order,
    fds: Vec<OwnedFd>,
}

#[derive(Debug)]
struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
    since: Instant,
}

/// What the stdio process was given, once more.
#[derive(Debug)]
struct Held {
    key: u32,
    log: LogPlan,
    streams: Vec<OwnedFd>,
    reads: Reads,
    /// The client has come with which `reads.once` ends what it reads.
    used: bool,
    /// A stdio process has answered that it has it.
    open: bool,
}

impl Link {
    /// Opens a log for streams: stdout and stderr, or none where a terminal will be attached. Its number; answered by
    /// [`Answered::Opened`]. Starts the process where there is none yet.
    pub fn open(&mut self, log: LogPlan, streams: Vec<OwnedFd>, reads: Reads) -> io::Result<u32> {
        if self.child.is_none() && self.restart_at.is_none() {
            self.start()?;
        }
        self.next_key += 1;
        let key = self.next_key;
        self.held.push(Held { key, log, streams, reads, used: false, open: false });
        self.give(Order::Open(Open { key, ..Open::default() }));
        Ok(key)
    }

    /// Adds a container's terminal to its log.
    pub fn attach(&mut self, key: u32, terminal: OwnedFd) {
        if let Some(held) = self.held.iter_mut().find(|held| held.key == key) {
            held.streams.push(terminal);
            self.give(Order::Attach(Key { key }));
        }
    }

    /// Attaches a client, with its control socket and its ends of the streams; answered by [`Answered::Joined`].
    pub fn join(&mut self, join: Join, fds: Vec<OwnedFd>) {
        self.next_seq += 1;
        self.orders.push_back(Given { seq: self.next_seq, order: Order::Join(join), fds });
        self.flush();
    }

    /// Opens a log's file anew; answered by [`Answered::Reopened`].
    pub fn reopen(&mut self, key: u32) {
        self.give(Order::Reopen(Key { key }));
    }

    /// Writes what a log's streams hold; answered by [`Answered::Drained`].
    pub fn drain(&mut self, key: u32) {
        self.give(Order::Drain(Key { key }));
    }

    /// Writes what a log's streams hold and lets them go. Not answered.
    pub fn close(&mut self, key: u32) {
        self.held.retain(|held| held.key != key);
        self.give(Order::Close(Key { key }));
    }

    /// Bytes of output that reached no file.
    pub fn bytes_lost(&self) -> u64 {
        self.losses.as_ref().map_or(0, |losses| losses.read().0)
    }

    /// The socket to poll, and whether something waits to be sent.
    pub fn socket(&self) -> Option<(BorrowedFd<'_>, bool)> {
        self.child.as_ref().filter(|_| !self.released).map(|child| (child.socket.as_fd(), self.sent < self.orders.len()))
    }

    /// Whether a child of the monitor is this process.
    pub fn is(&self, pid: Pid) -> bool {
        self.child.as_ref().is_some_and(|child| child.pid == pid)
    }

    /// Whether there is a process that has not been reaped.
    pub fn lives(&self) -> bool {
        self.child.is_some()
    }

    /// When [`Link::start_again`] is due.
    pub fn due(&self) -> Option<Instant> {
        self.restart_at
    }

    /// Starts the process again where that is due.
    pub fn start_again(&mut self, now: Instant) {
        if self.restart_at.is_some_and(|at| at <= now) {
            self.restart_at = None;
            if let Err(error) = self.start() {
                say(format_args!("cannot start the stdio process again: {error}"));
                self.restart_at = Some(now + SHORT_LIFE);
            }
        }
    }

    /// The process has ended and was reaped.
    pub fn ended(&mut self, now: Instant) {
        let Some(child) = self.child.take() else { return };
        // Everything it had is given to the next one; what it was asked and had not answered is asked again.
        let asked = std::mem::take(&mut self.orders);
        self.sent = 0;
        // Its clients have ended with it. The first of them may be the one with which a container's stdin does.
        for held in self.held.iter_mut().filter(|held| held.used) {
            held.reads = Reads::default();
        }
        for key in self.held.iter().filter(|held| held.open).map(|held| held.key).collect::<Vec<_>>() {
            self.give(Order::Open(Open { key, again: true, ..Open::default() }));
        }
        for given in asked {
            match &given.order {
                Order::Open(open) if open.again => {}
                Order::Open(open) if self.held.iter().any(|held| held.key == open.key) => self.orders.push_back(given),
                Order::Reopen(_) | Order::Drain(_) | Order::Join(_) => self.orders.push_back(given),
                // Attached streams are among those it opens with; a log that was closed is not opened at all.
                Order::None | Order::Open(_) | Order::Attach(_) | Order::Close(_) => {}
            }
        }
        if self.released || self.held.is_empty() && self.orders.is_empty() {
            return;
        }
        say(format_args!("the stdio process has ended: another one takes over"));
        let short = now.duration_since(child.since) < SHORT_LIFE;
        self.restart_at = Some(if short { now + SHORT_LIFE } else { now });
        self.start_again(now);
    }

    /// Lets the process go: it ends when its streams have.
    pub fn release(&mut self) {
        self.restart_at = None;
        self.released = true;
        self.held.clear();
        if let Some(child) = &self.child {
            let _ = rustix::net::shutdown(&child.socket, rustix::net::Shutdown::Both);
        }
    }

    /// Ends the process at once.
    pub fn kill(&self) {
        if let Some(child) = &self.child {
            let _ = process::signal(child.pidfd.as_fd(), libc::SIGKILL as u32);
        }
    }

    /// Sends what can be sent without waiting.
    pub fn flush(&mut self) {
        let Some(child) = &self.child else { return };
        while let Some(Given { seq, order, fds: own }) = self.orders.get(self.sent) {
            let mut order = order.clone();
            let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
            match &mut order {
                Order::Open(open) => {
                    let Some(held) = self.held.iter().find(|held| held.key == open.key) else {
                        self.orders.remove(self.sent);
                        continue;
                    };
                    open.log = held.log.clone();
                    (open.stdin, open.reads, open.once) = (held.reads.stdin.is_some(), held.reads.clients, held.reads.once);
                    fds.extend(held.streams.iter().chain(&held.reads.stdin).map(AsFd::as_fd));
                }
                Order::Attach(which) => {
                    let terminal = self.held.iter().find(|held| held.key == which.key).and_then(|held| held.streams.last());
                    fds.extend(terminal.map(AsFd::as_fd));
                }
                Order::Join(_) => fds.extend(own.iter().map(AsFd::as_fd)),
                Order::None | Order::Reopen(_) | Order::Drain(_) | Order::Close(_) => {}
            }
            match fd::try_send(child.socket.as_fd(), &wire::encode(&Message { seq: *seq, order }), &fds) {
                Ok(()) => self.sent += 1,
                // Full: poll says when. Anything else: it is ending, and will be reaped.
                Err(_) => return,
            }
        }
    }

    /// One answer that has come. `None`: there is none, or nobody waits for it.
    pub fn receive(&mut self) -> Option<Answered> {
        loop {
            let child = self.child.as_ref()?;
            let (bytes, _) = fd::receive(child.socket.as_fd(), MAX_MESSAGE).ok().flatten()?;
            let Ok(Answer { seq, error, stdin_closed }) = wire::decode(&bytes) else { continue };
            for held in self.held.iter_mut().filter(|held| held.key == stdin_closed) {
                held.reads = Reads::default();
            }
            let Some(at) = self.orders.iter().take(self.sent).position(|given| given.seq == seq) else { continue };
            let Some(Given { order, .. }) = self.orders.remove(at) else { continue };
            self.sent -= 1;
            let result = error.map_or(Ok(()), Err);
            match order {
                Order::Open(open) if open.again => {}
                Order::Open(open) => {
                    match self.held.iter_mut().find(|held| held.key == open.key) {
                        Some(held) if result.is_ok() => held.open = true,
                        _ => self.held.retain(|held| held.key != open.key),
                    }
                    return Some(Answered::Opened(open.key, result));
                }
                Order::Reopen(which) => return Some(Answered::Reopened(which.key, result)),
                Order::Drain(which) => return Some(Answered::Drained(which.key)),
                Order::Join(join) => {
                    for held in self.held.iter_mut().filter(|held| held.key == join.key && join.stdin && result.is_ok()) {
                        held.used |= held.reads.once;
                    }
                    return Some(Answered::Joined(join.key, result));
                }
                Order::None | Order::Attach(_) | Order::Close(_) => {}
            }
        }
    }

    fn give(&mut self, order: Order) {
        self.next_seq += 1;
        self.orders.push_back(Given { seq: self.next_seq, order, fds: Vec::new() });
        self.flush();
    }

    fn start(&mut self) -> io::Result<()> {
        let losses = match self.losses.take() {
            Some(losses) => losses,
            None => Losses(rustix::fs::memfd_create("losses", rustix::fs::MemfdFlags::CLOEXEC)?),
        };
        let (ours, theirs) = fd::seqpacket_pair()?;
        fd::set_nonblocking(&ours)?;
        let keep = Keep::only(&[theirs.as_fd(), losses.0.as_fd()]);
        let forked = process::spawn(CloneArgs::default(), Some(keep), || run(theirs, &losses));
        self.losses = Some(losses);
        let (pid, pidfd) = forked?;
        self.child = Some(Child { pid, pidfd, socket: ours, since: Instant::now() });
        self.flush();
        Ok(())
    }
}

/// That no stdio process can be started.
pub fn cannot_start(error: &io::Error) -> Remote {
    Remote::from_links(Kind::ResourceExhausted, vec!["cannot start the stdio process".into(), error.to_string()])
}
