//! The stdio process itself: one poll loop over the containers' streams and the monitor's orders.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::errchain::Remote;
use crate::monitor::log::split::Splitter;
use crate::monitor::log::{Log, Stream, file::Losses, line};
use crate::monitor::say;
use crate::monitor::stdio::orders::{Answer, Message, Open, Order};
use crate::monitor_api::MAX_MESSAGE;
use crate::sys::{fd, process};
use crate::wire;

/// Bytes of one read. Half a pipe: a writer goes on while the first half is written.
const INPUT: usize = 32 * 1024;
/// Bytes of lines in one write.
const OUTPUT: usize = 64 * 1024;
/// Reads of one stream for a drain: twice what a pipe holds, so that one who writes without end can't keep us.
const DRAIN_READS: usize = 4;

/// How long nothing has to happen before buffers are given back.
const QUIET: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Runs until the monitor is gone and every stream has ended.
pub fn run(control: OwnedFd, losses: &Losses) -> i32 {
    process::set_name(c"copepod-stdio");
    let mut stdio = Stdio { control: Some(control), followed: Vec::new(), copier: Copier { losses, input: Vec::new(), output: Vec::new() } };
    while stdio.turn() {}
    0
}

/// The containers and the monitor.
struct Stdio<'a> {
    control: Option<OwnedFd>,
    followed: Vec<Followed>,
    copier: Copier<'a>,
}

/// One container's streams and log.
struct Followed {
    key: u32,
    log: Log,
    ends: Vec<End>,
    /// Held so that the container doesn't read an end of its stdin.
    _stdin: Option<OwnedFd>,
}

/// A stream that has not ended.
struct End {
    fd: OwnedFd,
    stream: Stream,
    splitter: Splitter,
}

impl Stdio<'_> {
    /// One wait and what came of it. False: nothing is left to do.
    fn turn(&mut self) -> bool {
        let mut fds: Vec<PollFd<'_>> = self.followed.iter().flat_map(|f| &f.ends).map(|end| PollFd::new(&end.fd, PollFlags::IN)).collect();
        if let Some(control) = &self.control {
            fds.push(PollFd::new(control, PollFlags::IN));
        }
        if fds.is_empty() {
            return false;
        }
        let ended = match poll(&mut fds, Some(&QUIET)) {
            // The second poll comes at once after the rest: what lies between would be brought back into memory.
            Ok(0) => {
                self.copier.rest();
                poll(&mut fds, None)
            }
            ended => ended,
        };
        match ended {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                say(format_args!("stdio: cannot poll: {error}"));
                return false;
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<bool>>().into_iter();
        for followed in &mut self.followed {
            let Followed { log, ends, .. } = followed;
            ends.retain_mut(|end| !ready.next().unwrap_or(false) || self.copier.copy(end, log));
        }
        if ready.next().unwrap_or(false) {
            self.order();
        }
        true
    }

    fn order(&mut self) {
        let Some(control) = &self.control else { return };
        let received = fd::receive(control.as_fd(), MAX_MESSAGE);
        let (bytes, fds) = match received {
            Ok(Some(packet)) => packet,
            Ok(None) => {
                // The monitor is gone. What still writes is followed to its end; nobody can order anything any more.
                self.control = None;
                return;
            }
            Err(error) => {
                say(format_args!("stdio: cannot read an order: {error}"));
                self.control = None;
                return;
            }
        };
        let Ok(Message { seq, order }) = wire::decode(&bytes) else {
            say(format_args!("stdio: cannot read an order of {} bytes", bytes.len()));
            return;
        };
        let error = self.obey(order, fds).err();
        let answer = wire::encode(&Answer { seq, error });
        if let Some(control) = &self.control
            && let Err(error) = fd::send(control.as_fd(), &answer, &[])
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            say(format_args!("stdio: cannot answer: {error}"));
        }
    }

    fn obey(&mut self, order: Order, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let found = |key: u32, all: &[Followed]| all.iter().position(|f| f.key == key);
        match order {
            Order::None => {}
            Order::Open(open) => {
                let followed = Followed::open(open, fds)?;
                self.followed.push(followed);
            }
            Order::Attach(which) => {
                if let Some(at) = found(which.key, &self.followed) {
                    let followed = &mut self.followed[at];
                    let max = followed.log.max_line();
                    followed.ends.extend(fds.into_iter().map(|fd| End { fd, stream: Stream::Stdout, splitter: Splitter::new(max) }));
                }
            }
            Order::Reopen(which) => {
                if let Some(at) = found(which.key, &self.followed) {
                    self.followed[at].log.reopen().map_err(|error| Remote::new(&error))?;
                }
            }
            Order::Drain(which) => {
                if let Some(at) = found(which.key, &self.followed) {
                    self.copier.drain(&mut self.followed[at]);
                }
            }
            Order::Close(which) => {
                if let Some(at) = found(which.key, &self.followed) {
                    let mut followed = self.followed.swap_remove(at);
                    self.copier.drain(&mut followed);
                    for mut end in followed.ends {
                        self.copier.finish(&mut end, &mut followed.log);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Followed {
    fn open(open: Open, mut fds: Vec<OwnedFd>) -> Result<Self, Remote> {
        let stdin = if open.stdin { fds.pop() } else { None };
        let max = open.log.max_line;
        let log = if open.again { Log::later(open.log) } else { Log::open(open.log).map_err(|error| Remote::new(&error))? };
        let ends =
            fds.into_iter().zip([Stream::Stdout, Stream::Stderr]).map(|(fd, stream)| End { fd, stream, splitter: Splitter::new(max) }).collect();
        Ok(Followed { key: open.key, log, ends, _stdin: stdin })
    }
}

/// Moves bytes, with the one pair of buffers that all streams share.
struct Copier<'a> {
    losses: &'a Losses,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Copier<'_> {
    /// Reads once and writes what was read. False: the stream has ended.
    fn copy(&mut self, end: &mut End, log: &mut Log) -> bool {
        self.input.clear();
        self.input.reserve_exact(INPUT);
        let read = loop {
            match rustix::io::read(&end.fd, rustix::buffer::spare_capacity(&mut self.input)) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                // EIO is a terminal's way to say that nobody has it open any more.
                Err(_) => break 0,
                Ok(n) => break n,
            }
        };
        if read == 0 {
            self.finish(end, log);
            return false;
        }
        if log.is_discarded() {
            return true;
        }
        let Self { losses, input, output } = self;
        let stamp = line::now();
        output.reserve_exact(OUTPUT.saturating_sub(output.capacity()));
        end.splitter.feed(input, |full, head, tail| {
            if !output.is_empty() && output.len() + line::HEADER + head.len() + tail.len() >= OUTPUT {
                log.append(output, losses);
                output.clear();
            }
            line::push(output, &stamp, end.stream, full, head, tail);
        });
        log.append(output, losses);
        output.clear();
        true
    }

    /// Writes a line that will not end any more.
    fn finish(&mut self, end: &mut End, log: &mut Log) {
        let Self { losses, output, .. } = self;
        end.splitter.finish(|full, head, tail| line::push(output, &line::now(), end.stream, full, head, tail));
        log.append(output, losses);
        output.clear();
    }

    /// Reads what is there now, without waiting for more.
    fn drain(&mut self, followed: &mut Followed) {
        let Followed { ends, log, .. } = followed;
        ends.retain_mut(|end| {
            for _ in 0..DRAIN_READS {
                let mut fds = [PollFd::new(&end.fd, PollFlags::IN)];
                if !matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1)) {
                    return true;
                }
                if !self.copy(end, log) {
                    return false;
                }
            }
            true
        });
    }

    /// Gives the buffers back, and what else a process at rest does not need.
    fn rest(&mut self) {
        self.input = Vec::new();
        self.output = Vec::new();
        process::rest();
    }
}
