//! A client of a monitor's socket: one request after another, each with a deadline, and events kept until somebody asks.
#![allow(dead_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use copepod::errchain::Remote;
use copepod::monitor_api::{self as api, Body, Call, ExecExited, ExitRecord, Message, Request};
use copepod::sys::fd;
use copepod::wire::{self, Wire};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Beyond this something hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A connection to a monitor.
pub struct Client {
    socket: OwnedFd,
    seq: u32,
    kept: VecDeque<(Message, Vec<OwnedFd>)>,
}

impl Client {
    /// Over a connected socket.
    pub fn over(socket: OwnedFd) -> Self {
        Self { socket, seq: 0, kept: VecDeque::new() }
    }

    /// To the socket in a pod's directory.
    pub fn connect(pod_dir: &Path) -> Self {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let dir = rustix::fs::open(pod_dir, flags, rustix::fs::Mode::empty()).unwrap();
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let path = format!("{}/{}", fd::proc_path(dir.as_fd()), api::SOCKET);
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Self::over(socket)
    }

    /// The socket itself.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Greets.
    pub fn hello(&mut self) -> api::Snapshot {
        let hello = api::Hello { version: api::VERSION, release: "test".into() };
        match self.call(Call::Hello(hello), &[]).unwrap() {
            (Body::Snapshot(snapshot), _) => snapshot,
            (other, _) => panic!("Hello is answered by {other:?}"),
        }
    }

    /// Sends a request; its number.
    pub fn ask(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> u32 {
        self.seq += 1;
        let bytes = api::encode(&Request { seq: self.seq, call }).unwrap();
        fd::send(self.socket.as_fd(), &bytes, fds).unwrap();
        self.seq
    }

    /// The answer to a request.
    pub fn answer(&mut self, seq: u32) -> Result<(Body, Vec<OwnedFd>), Remote> {
        match self.wait_for(&format!("the answer to request {seq}"), |message| message.seq == seq) {
            (Message { body: Body::Failed(error), .. }, _) => Err(error),
            (Message { body, .. }, fds) => Ok((body, fds)),
        }
    }

    /// Whether the answer to a request has come, without waiting for it.
    pub fn has_answer(&mut self, seq: u32) -> bool {
        while let Some(packet) = self.receive(Duration::ZERO) {
            self.kept.push_back(packet);
        }
        self.kept.iter().any(|(message, _)| message.seq == seq)
    }

    /// Asks and waits for the answer.
    pub fn call(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<(Body, Vec<OwnedFd>), Remote> {
        let seq = self.ask(call, fds);
        self.answer(seq)
    }

    /// Asks for something that is answered by Done.
    pub fn done(&mut self, call: Call) -> Result<(), Remote> {
        let name = call.name();
        match self.call(call, &[])? {
            (Body::Done, _) => Ok(()),
            (other, _) => panic!("{name} is answered by {other:?}"),
        }
    }

    /// The event of a container's end.
    pub fn exited(&mut self, container: &str) -> ExitRecord {
        let is = |message: &Message| matches!(&message.body, Body::Exited(record) if record.container == container);
        match self.wait_for(&format!("the end of container {container}"), is).0.body {
            Body::Exited(record) => record,
            other => panic!("{other:?}"),
        }
    }

    /// The event of an exec's end.
    pub fn exec_exited(&mut self, exec: &str) -> ExecExited {
        let is = |message: &Message| matches!(&message.body, Body::ExecExited(ended) if ended.id == exec);
        match self.wait_for(&format!("the end of exec {exec}"), is).0.body {
            Body::ExecExited(ended) => ended,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the monitor has closed the connection, within the deadline.
    pub fn is_closed(&mut self) -> bool {
        wait_readable(self.socket.as_fd(), DEADLINE) && matches!(fd::receive(self.socket.as_fd(), api::MAX_MESSAGE), Ok(None) | Err(_))
    }

    fn wait_for(&mut self, what: &str, is: impl Fn(&Message) -> bool) -> (Message, Vec<OwnedFd>) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.kept.iter().position(|(message, _)| is(message)) {
                return self.kept.remove(at).unwrap();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} is late; there are {:?}", self.kept.iter().map(|(m, _)| m).collect::<Vec<_>>());
            if let Some(packet) = self.receive(left) {
                self.kept.push_back(packet);
            }
        }
    }

    fn receive(&mut self, within: Duration) -> Option<(Message, Vec<OwnedFd>)> {
        if !wait_readable(self.socket.as_fd(), within) {
            return None;
        }
        let (bytes, fds) = fd::receive(self.socket.as_fd(), api::MAX_MESSAGE).unwrap().expect("the monitor has closed the connection");
        Some((api::decode(&bytes).unwrap(), fds))
    }
}

/// A plan as it travels.
pub fn sealed<T: Wire>(plan: &T) -> OwnedFd {
    fd::sealed_memfd("plan", &wire::encode(plan)).unwrap()
}

/// Waits until a descriptor is readable or its other end is closed. False: it isn't in time.
pub fn wait_readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let time = Timespec::try_from(within).unwrap();
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&time)).unwrap() > 0
}
