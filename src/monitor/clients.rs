//! The daemon's connections: who may speak, and answers that wait until they can be sent.
//!
//! The connection that greeted last is *the* client: it gets the events. Others are doors that somebody is standing in, a
//! few at a time. Nothing here waits: a client that doesn't read is dropped once [`MAX_QUEUED`] messages wait for it, and
//! learns everything from the snapshot when it comes back.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SocketFlags, accept_with};

use crate::errchain::{Chain, Kind, Remote, links};
use crate::monitor::say;
use crate::monitor_api::{self, Body, MAX_MESSAGE, Message, Request};
use crate::sys::fd;

/// Messages that may wait for a client.
const MAX_QUEUED: usize = 1024;
/// Connections that have not greeted. The oldest makes room for the next.
const MAX_DOORS: usize = 8;
/// Requests read from one connection before others have their turn.
const MAX_AT_ONCE: usize = 16;

/// Who asked, so that an answer goes there and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    connection: u32,
    seq: u32,
}

/// A request and who it is from.
#[derive(Debug)]
pub struct Asked {
    /// Who asked.
    pub caller: Caller,
    /// What.
    pub request: Request,
    /// The descriptors that came along.
    pub fds: Vec<OwnedFd>,
    /// It has greeted before.
    pub greeted: bool,
}

/// All connections.
#[derive(Debug, Default)]
pub struct Clients {
    listener: Option<OwnedFd>,
    connections: Vec<Connection>,
    next: u32,
}

#[derive(Debug)]
struct Connection {
    id: u32,
    socket: OwnedFd,
    greeted: bool,
    queued: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Clients {
    /// With a socket that listens, non-blocking.
    pub fn new(listener: Option<OwnedFd>) -> Self {
        Self { listener, ..Self::default() }
    }

    /// Takes a connected socket.
    pub fn add(&mut self, socket: OwnedFd) -> io::Result<()> {
        if !fd::peer_is_root(socket.as_fd())? {
            say(format_args!("a connection that is not root's was refused"));
            return Ok(());
        }
        fd::set_nonblocking(&socket)?;
        if self.connections.iter().filter(|c| !c.greeted).count() >= MAX_DOORS
            && let Some(oldest) = self.connections.iter().position(|c| !c.greeted)
        {
            self.connections.remove(oldest);
        }
        self.next += 1;
        self.connections.push(Connection { id: self.next, socket, greeted: false, queued: VecDeque::new() });
        Ok(())
    }

    /// The listening socket.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// Accepts whoever waits.
    pub fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                if let Err(error) = self.add(socket) {
                    say(format_args!("cannot take a connection: {error}"));
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(error) => say(format_args!("cannot accept a connection: {error}")),
        }
    }

    /// Every connection to poll: its number, its socket, and whether something waits to be sent.
    pub fn sockets(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>, bool)> {
        self.connections.iter().map(|c| (c.id, c.socket.as_fd(), !c.queued.is_empty()))
    }

    /// Requests that have come on a connection. One that says something unreadable is closed.
    pub fn receive(&mut self, id: u32) -> Vec<Asked> {
        let Some(at) = self.connections.iter().position(|c| c.id == id) else { return Vec::new() };
        let mut asked = Vec::new();
        while asked.len() < MAX_AT_ONCE {
            let connection = &self.connections[at];
            let (bytes, fds) = match fd::receive(connection.socket.as_fd(), MAX_MESSAGE) {
                Ok(Some(packet)) => packet,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(None) => {
                    self.connections.remove(at);
                    break;
                }
                Err(error) => {
                    say(format_args!("a connection is closed: {error}"));
                    self.connections.remove(at);
                    break;
                }
            };
            match monitor_api::decode::<Request>(&bytes) {
                Ok(request) => {
                    let caller = Caller { connection: id, seq: request.seq };
                    asked.push(Asked { caller, request, fds, greeted: connection.greeted });
                }
                Err(error) => match monitor_api::unknown_call(&bytes, &error).filter(|_| connection.greeted) {
                    Some(seq) => {
                        let why = Remote::from_links(Kind::Unimplemented, links(&error));
                        self.answer(Caller { connection: id, seq }, Body::Failed(why), Vec::new());
                        // Its answer may have been one too many.
                        if self.connections.get(at).is_none_or(|c| c.id != id) {
                            break;
                        }
                    }
                    None => {
                        say(format_args!("a connection is closed: {}", Chain(&error)));
                        self.connections.remove(at);
                        break;
                    }
                },
            }
        }
        asked
    }

    /// A connection has greeted: it replaces the one before it.
    pub fn greet(&mut self, caller: Caller) {
        self.connections.retain(|c| c.id == caller.connection || !c.greeted);
        if let Some(connection) = self.connections.iter_mut().find(|c| c.id == caller.connection) {
            connection.greeted = true;
        }
    }

    /// Whether a caller's connection has greeted and was not replaced.
    pub fn is_client(&self, caller: Caller) -> bool {
        self.connections.iter().any(|c| c.id == caller.connection && c.greeted)
    }

    /// Whether a caller's connection is there still.
    pub fn is_connected(&self, caller: Caller) -> bool {
        self.connections.iter().any(|c| c.id == caller.connection)
    }

    /// Closes a connection.
    pub fn close(&mut self, caller: Caller) {
        self.connections.retain(|c| c.id != caller.connection);
    }

    /// Sends an answer, now or when there is room. An asker that is gone gets nothing.
    pub fn answer(&mut self, caller: Caller, body: Body, fds: Vec<OwnedFd>) {
        self.send(|c| c.id == caller.connection, &Message { seq: caller.seq, body }, fds);
    }

    /// Sends an event to the client, if there is one.
    pub fn tell(&mut self, body: Body) {
        self.send(|c| c.greeted, &Message { seq: 0, body }, Vec::new());
    }

    /// Sends what waits for a connection.
    pub fn flush(&mut self, id: u32) {
        self.connections.retain_mut(|c| c.id != id || c.flush());
    }

    fn send(&mut self, to: impl Fn(&Connection) -> bool, message: &Message, fds: Vec<OwnedFd>) {
        let Some(at) = self.connections.iter().position(to) else { return };
        let bytes = match monitor_api::encode(message) {
            Ok(bytes) => bytes,
            Err(error) => {
                say(format_args!("a connection is closed: {}", Chain(&error)));
                self.connections.remove(at);
                return;
            }
        };
        let connection = &mut self.connections[at];
        connection.queued.push_back((bytes, fds));
        if !connection.flush() {
            self.connections.remove(at);
        }
    }
}

impl Connection {
    /// Sends what waits. False: it is gone, or too much waits.
    fn flush(&mut self) -> bool {
        while let Some((bytes, fds)) = self.queued.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match fd::try_send(self.socket.as_fd(), bytes, &fds) {
                Ok(()) => {
                    self.queued.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        if self.queued.len() > MAX_QUEUED {
            say(format_args!("a connection is closed: it does not read its messages"));
        }
        self.queued.len() <= MAX_QUEUED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor_api::{Call, Hello};

    fn request(call: Call) -> Vec<u8> {
        monitor_api::encode(&Request { seq: 7, call }).unwrap()
    }

    /// Clients with one connection, its number, and the other end.
    fn one() -> (Clients, OwnedFd) {
        let (a, b) = fd::seqpacket_pair().unwrap();
        let mut clients = Clients::new(None);
        clients.connections.push(Connection { id: 1, socket: a, greeted: true, queued: VecDeque::new() });
        clients.next = 1;
        fd::set_nonblocking(&clients.connections[0].socket).unwrap();
        (clients, b)
    }

    #[test]
    fn a_client_that_does_not_read_is_dropped_and_never_waited_for() {
        let (mut clients, peer) = one();
        for _ in 0..10 * MAX_QUEUED {
            clients.tell(Body::Done);
        }
        assert!(clients.connections.is_empty());
        // What was sent before is whole.
        assert!(fd::receive(peer.as_fd(), MAX_MESSAGE).unwrap().is_some());
    }

    #[test]
    fn an_unreadable_message_closes_its_connection_alone() {
        let check = |bytes: &[u8]| {
            let (mut clients, peer) = one();
            let (other, _theirs) = fd::seqpacket_pair().unwrap();
            clients.connections.push(Connection { id: 2, socket: other, greeted: false, queued: VecDeque::new() });
            fd::send(peer.as_fd(), &request(Call::CreateSandbox), &[]).unwrap();
            fd::send(peer.as_fd(), bytes, &[]).unwrap();
            let asked = clients.receive(1);
            assert_eq!(asked.len(), 1);
            assert_eq!(clients.connections.iter().map(|c| c.id).collect::<Vec<_>>(), [2]);
        };
        check(b"nonsense");
        check(&[0xff; 100]);
        check(&vec![0; MAX_MESSAGE + 1]);
    }

    #[test]
    fn the_last_to_greet_is_the_client() {
        let (mut clients, first) = one();
        let (socket, second) = fd::seqpacket_pair().unwrap();
        fd::set_nonblocking(&socket).unwrap();
        clients.connections.push(Connection { id: 2, socket, greeted: false, queued: VecDeque::new() });
        fd::send(second.as_fd(), &request(Call::Hello(Hello::default())), &[]).unwrap();
        clients.tell(Body::Done);
        assert!(fd::receive(first.as_fd(), MAX_MESSAGE).unwrap().is_some());
        let caller = clients.receive(2)[0].caller;
        clients.greet(caller);
        clients.tell(Body::Done);
        assert!(fd::receive(first.as_fd(), MAX_MESSAGE).unwrap().is_none());
        assert!(fd::receive(second.as_fd(), MAX_MESSAGE).unwrap().is_some());
    }
}
