//! What a container reads: the end of its stdin that clients' words are written to, without ever waiting for the container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::sys::{fd, terminal};

/// The write end of a container's stdin, or the master of its terminal.
#[derive(Debug)]
pub struct Input {
    to: OwnedFd,
    /// What the container has not taken yet: at most one read of one client.
    pending: Vec<u8>,
    /// It is closed when all was taken.
    closing: bool,
}

impl Input {
    /// None where it can't be made non-blocking: nobody must wait for a container.
    pub fn new(to: OwnedFd) -> Option<Self> {
        fd::set_nonblocking(&to).ok()?;
        Some(Self { to, pending: Vec::new(), closing: false })
    }

    /// Where to wait for room, while something waits for it.
    pub fn full(&self) -> Option<BorrowedFd<'_>> {
        (!self.pending.is_empty()).then(|| self.to.as_fd())
    }

    /// Whether more can be said.
    pub fn takes(&self) -> bool {
        self.pending.is_empty() && !self.closing
    }

    /// Says something to the container. False: it is closed, or the container does not read any more.
    pub fn give(&mut self, bytes: &[u8]) -> bool {
        self.pending.extend_from_slice(bytes);
        self.flush()
    }

    /// Writes what waits, as far as there is room. False: it is closed, or the container does not read any more.
    pub fn flush(&mut self) -> bool {
        let mut done = 0;
        while done < self.pending.len() {
            match rustix::io::write(&self.to, &self.pending[done..]) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        self.pending.drain(..done);
        if self.pending.is_empty() {
            self.pending = Vec::new();
        }
        !(self.closing && self.pending.is_empty())
    }

    /// Nothing more is said: a terminal that takes lines gets its end-of-input character, a pipe is closed once it has taken
    /// everything. False: it is closed.
    pub fn close(&mut self) -> bool {
        self.closing = true;
        // A pipe has no such character: it is no terminal.
        self.pending.extend(terminal::end_of_input(self.to.as_fd()));
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    #[test]
    fn what_does_not_fit_waits_and_the_end_comes_last() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut input = Input::new(write).unwrap();
        let mut said = 0;
        while input.takes() {
            assert!(input.give(&[7; 10_000]));
            said += 10_000;
        }
        assert!(input.full().is_some());
        assert!(input.close());
        let mut buffer = vec![0; 1 << 20];
        let mut read_bytes = rustix::io::read(&read, &mut buffer).unwrap();
        assert!(!input.flush());
        drop(input);
        read_bytes += rustix::io::read(&read, &mut buffer).unwrap();
        assert_eq!(read_bytes, said);
        assert_eq!(rustix::io::read(&read, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn one_that_does_not_read_any_more_is_noticed() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut input = Input::new(write).unwrap();
        assert!(input.give(b"x"));
        drop(read);
        assert!(!input.give(b"x"));
    }
}
