//! A container as the stdio process has it: its streams and its log, what it reads, and who is attached.

use std::os::fd::{AsFd, OwnedFd};

use crate::errchain::Remote;
use crate::monitor::log::split::Splitter;
use crate::monitor::log::{Log, Stream};
use crate::monitor::say;
use crate::monitor::stdio::attached::Attached;
use crate::monitor::stdio::input::Input;
use crate::monitor::stdio::orders::Open;
use crate::monitor_api::Resize;
use crate::sys::terminal;

/// One container.
#[derive(Debug)]
pub struct Followed {
    /// Its log's number.
    pub key: u32,
    /// Where its output goes.
    pub log: Log,
    /// The streams that have not ended.
    pub ends: Vec<End>,
    /// What it reads, as long as it may: held so that it doesn't read an end of it.
    pub input: Option<Input>,
    /// Who is attached.
    pub attached: Attached,
    terminal: Option<OwnedFd>,
    /// It reads what clients say.
    reads: bool,
    /// What it reads ends with the first client, unless that one has come already.
    once: bool,
}

/// A stream that has not ended.
#[derive(Debug)]
pub struct End {
    /// Where it is read.
    pub fd: OwnedFd,
    /// Which it is.
    pub stream: Stream,
    /// Makes lines of it.
    pub splitter: Splitter,
}

impl Followed {
    /// As an order says, with the order's descriptors.
    pub fn open(open: Open, mut fds: Vec<OwnedFd>) -> Result<Self, Remote> {
        let stdin = if open.stdin { fds.pop() } else { None };
        let max = open.log.max_line;
        let log = if open.again { Log::later(open.log) } else { Log::open(open.log).map_err(|error| Remote::new(&error))? };
        let input = stdin.and_then(Input::new);
        let attached = Attached::default();
        let mut followed = Followed { key: open.key, log, ends: Vec::new(), input, attached, terminal: None, reads: open.reads, once: open.once };
        for (fd, stream) in fds.into_iter().zip([Stream::Stdout, Stream::Stderr]) {
            if rustix::termios::isatty(&fd) {
                followed.add_terminal(fd);
            } else {
                followed.ends.push(End { fd, stream, splitter: Splitter::new(max) });
            }
        }
        Ok(followed)
    }

    /// Gives it its terminal: the stream that it writes, and what it reads.
    pub fn add_terminal(&mut self, master: OwnedFd) {
        let input = if self.reads { master.try_clone().map(Input::new) } else { Ok(None) };
        match (input, master.try_clone()) {
            (Ok(input), Ok(terminal)) => {
                self.input = input;
                self.terminal = Some(terminal);
            }
            (Err(error), _) | (_, Err(error)) => say(format_args!("stdio: a terminal can't be written to: {error}")),
        }
        let splitter = Splitter::new(self.log.max_line());
        self.ends.push(End { fd: master, stream: Stream::Stdout, splitter });
    }

    /// Gives its terminal another size.
    pub fn resize(&self, size: Resize) {
        if let Some(terminal) = &self.terminal {
            // One that has ended keeps its size.
            let _ = terminal::resize(terminal.as_fd(), size.columns, size.rows);
        }
    }

    /// Whether a client that says something or not is the one with which what the container reads ends.
    pub fn is_first(&mut self, speaks: bool) -> bool {
        speaks && std::mem::take(&mut self.once)
    }

    /// Ends what the container reads, once it has taken what was said.
    pub fn close_input(&mut self) {
        self.reads = false;
        if self.input.as_mut().is_some_and(|input| !input.close()) {
            self.input = None;
        }
        self.attached.silence();
    }

    /// The container does not read any more.
    pub fn drop_input(&mut self) {
        self.input = None;
        self.attached.silence();
    }
}
