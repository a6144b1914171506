//! Clients attached to a container: what it writes is copied to them, and what they say is what it reads.
//!
//! A client is a control socket and pipes that the daemon made; the pipe is the client's buffer. Where one is full, the container's
//! output waits for that client, but only as long as its patience lasts: a client that takes its bytes at [`PACE`] never runs out of
//! it, one that has stopped reading has used it up after [`PATIENCE`] and is dropped, and is told so. Nothing that was written
//! before a client came is shown to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::errchain::{Kind, Remote};
use crate::monitor::log::Stream;
use crate::monitor_api::{AttachEnd, FromClient, MAX_MESSAGE, Resize, ToClient};
use crate::sys::fd;
use crate::wire;

/// How long a client may hold back the output of its container, over all.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes a second that earn a client as much patience as it uses.
const PACE: u64 = 4 << 20;
/// Bytes that wait for a client beside those in its pipe. More than one read only when the container has ended.
const MAX_PENDING: usize = 512 << 10;
/// Clients of one container. The daemon's own limit is lower.
const MAX_CLIENTS: usize = 64;

/// The clients of one container.
#[derive(Debug, Default)]
pub struct Attached {
    clients: Vec<Client>,
    /// The container has ended: whoever has all of its output is told so.
    over: bool,
}

/// A client.
#[derive(Debug)]
pub struct Client {
    /// A number that is never used again.
    pub id: u32,
    control: OwnedFd,
    /// What it says; `None`: nothing, or nothing more.
    pub stdin: Option<OwnedFd>,
    outputs: Vec<Output>,
    patience: Duration,
    /// It holds the output back since then.
    since: Option<Instant>,
    /// The container's stdin closes when it goes.
    pub closes_stdin: bool,
}

#[derive(Debug)]
struct Output {
    stream: Stream,
    pipe: OwnedFd,
    pending: Vec<u8>,
}

/// What a client said on its control socket.
pub enum Said {
    /// Nothing that matters now.
    Nothing,
    /// The terminal's new size.
    Resize(Resize),
    /// It is gone.
    Gone,
}

impl Client {
    /// With its control socket, and the pipes for the streams it has.
    pub fn new(id: u32, control: OwnedFd, stdin: Option<OwnedFd>, outputs: Vec<(Stream, OwnedFd)>) -> io::Result<Self> {
        fd::set_nonblocking(&control)?;
        for pipe in stdin.iter().chain(outputs.iter().map(|(_, pipe)| pipe)) {
            fd::set_nonblocking(pipe)?;
        }
        let outputs = outputs.into_iter().map(|(stream, pipe)| Output { stream, pipe, pending: Vec::new() }).collect();
        Ok(Self { id, control, stdin, outputs, patience: PATIENCE, since: None, closes_stdin: false })
    }

    /// Where it speaks.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// The pipes that bytes wait for.
    pub fn full(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.outputs.iter().filter(|output| !output.pending.is_empty()).map(|output| output.pipe.as_fd())
    }

    /// What it has said.
    pub fn hear(&self) -> Said {
        match fd::receive(self.control.as_fd(), MAX_MESSAGE) {
            Ok(Some((bytes, _))) => match wire::decode(&bytes) {
                Ok(FromClient::Resize(size)) => Said::Resize(size),
                // A newer daemon's word; it was not promised that it is understood.
                Ok(FromClient::None) | Err(_) => Said::Nothing,
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Said::Nothing,
            Ok(None) | Err(_) => Said::Gone,
        }
    }

    /// Tells it how its session has ended.
    fn finish(self, error: Option<Remote>) {
        let end = wire::encode(&ToClient::Ended(AttachEnd { error }));
        // It is the only message on its way there, so that there is room; one that is gone misses nothing.
        let _ = fd::try_send(self.control.as_fd(), &end, &[]);
    }

    fn give(&mut self, stream: Stream, bytes: &[u8], now: Instant) {
        let Some(output) = self.outputs.iter_mut().find(|output| output.stream == stream) else { return };
        let taken = if output.pending.is_empty() { output.write(bytes) } else { Some(0) };
        match taken {
            Some(n) => {
                output.pending.extend_from_slice(&bytes[n..]);
                self.earn(n, now);
            }
            None => self.outputs.retain(|output| output.stream != stream),
        }
    }

    fn flush(&mut self, now: Instant) {
        let mut taken = 0;
        self.outputs.retain_mut(|output| {
            let pending = std::mem::take(&mut output.pending);
            let Some(n) = output.write(&pending) else { return false };
            taken += n;
            output.pending = pending;
            output.pending.drain(..n);
            if output.pending.is_empty() {
                output.pending = Vec::new();
            }
            true
        });
        self.earn(taken, now);
    }

    /// Takes the time that it has held the output back from its patience, and adds what it deserves for what it took.
    fn earn(&mut self, taken: usize, now: Instant) {
        if let Some(since) = self.since {
            self.patience = self.patience.saturating_sub(now.saturating_duration_since(since));
        }
        let earned = Duration::from_micros(taken as u64 * 1_000_000 / PACE);
        self.patience = (self.patience + earned).min(PATIENCE);
        self.since = self.outputs.iter().any(|output| !output.pending.is_empty()).then_some(now);
    }

    /// When its patience is used up.
    fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + self.patience)
    }

    fn is_too_slow(&self, now: Instant) -> bool {
        self.due().is_some_and(|due| due <= now) || self.outputs.iter().any(|output| output.pending.len() > MAX_PENDING)
    }
}

impl Output {
    /// Bytes that the pipe took. `None`: the client does not read it any more.
    fn write(&self, bytes: &[u8]) -> Option<usize> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::write(&self.pipe, &bytes[done..]) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return None,
            }
        }
        Some(done)
    }
}

impl Attached {
    /// Takes a client.
    pub fn add(&mut self, client: Client) -> Result<(), Remote> {
        if self.over {
            return Err(Remote::text(Kind::FailedPrecondition, "the container has exited"));
        }
        if self.clients.len() >= MAX_CLIENTS {
            return Err(Remote::text(Kind::ResourceExhausted, format!("{MAX_CLIENTS} clients are attached to the container")));
        }
        self.clients.push(client);
        Ok(())
    }

    /// Every client.
    pub fn all(&self) -> &[Client] {
        &self.clients
    }

    /// A client by its number.
    pub fn find(&mut self, id: u32) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.id == id)
    }

    /// Whether nobody is attached.
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// Copies what a container has written.
    pub fn give(&mut self, stream: Stream, bytes: &[u8]) {
        if !self.clients.is_empty() {
            let now = Instant::now();
            self.clients.iter_mut().for_each(|client| client.give(stream, bytes, now));
        }
    }

    /// Writes what waits for a client, as far as its pipes take it.
    pub fn flush(&mut self, id: u32, now: Instant) {
        if let Some(client) = self.find(id) {
            client.flush(now);
        }
    }

    /// Somebody has not taken all that was written: nothing more is read before that.
    pub fn holds(&self) -> bool {
        self.clients.iter().any(|client| client.since.is_some())
    }

    /// When somebody's patience is used up.
    pub fn due(&self) -> Option<Instant> {
        self.clients.iter().filter_map(Client::due).min()
    }

    /// The container has ended, and all that it wrote was read.
    pub fn end(&mut self) {
        self.over = true;
    }

    /// What the container reads is closed: what clients say goes nowhere, and they are told so by their pipes.
    pub fn silence(&mut self) {
        self.clients.iter_mut().for_each(|client| client.stdin = None);
    }

    /// Takes the clients of a container that is forgotten.
    pub fn adopt(&mut self, from: Attached) {
        self.clients.extend(from.clients);
    }

    /// A client is gone. True: the container's stdin is to be closed.
    pub fn remove(&mut self, id: u32) -> bool {
        let closes = self.find(id).is_some_and(|client| client.closes_stdin);
        self.clients.retain(|client| client.id != id);
        closes
    }

    /// Ends the sessions of those that are too slow, of those that neither speak nor listen any more, and when the container has
    /// ended of those that have everything. True: the container's stdin is to be closed.
    pub fn settle(&mut self, now: Instant) -> bool {
        let mut closes = false;
        for at in (0..self.clients.len()).rev() {
            let client = &self.clients[at];
            let slow = client.is_too_slow(now);
            let has_nothing = client.outputs.is_empty() && client.stdin.is_none();
            if slow || has_nothing || self.over && client.since.is_none() {
                let client = self.clients.swap_remove(at);
                closes |= client.closes_stdin;
                let why = "the client was detached: it did not keep up with the container's output";
                client.finish(slow.then(|| Remote::text(Kind::ResourceExhausted, why)));
            }
        }
        closes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    struct Peer {
        control: OwnedFd,
        stdout: OwnedFd,
    }

    fn client(attached: &mut Attached, id: u32) -> Peer {
        let (control, ours) = fd::seqpacket_pair().unwrap();
        let (stdout, theirs) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        attached.add(Client::new(id, ours, None, vec![(Stream::Stdout, theirs)]).unwrap()).unwrap();
        Peer { control, stdout }
    }

    impl Peer {
        fn read(&self, limit: usize) -> Vec<u8> {
            let mut bytes = vec![0; limit];
            let n = rustix::io::read(&self.stdout, &mut bytes).unwrap();
            bytes.truncate(n);
            bytes
        }

        fn end(&self) -> Option<Remote> {
            let (bytes, _) = fd::receive(self.control.as_fd(), MAX_MESSAGE).unwrap().unwrap();
            match wire::decode(&bytes).unwrap() {
                ToClient::Ended(end) => end.error,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn every_client_gets_what_is_written_to_its_streams() {
        let mut attached = Attached::default();
        let (one, two) = (client(&mut attached, 1), client(&mut attached, 2));
        attached.give(Stream::Stdout, b"out");
        attached.give(Stream::Stderr, b"err");
        assert_eq!((one.read(100), two.read(100)), (b"out".to_vec(), b"out".to_vec()));
        drop(one.stdout);
        attached.give(Stream::Stdout, b"more");
        assert_eq!(two.read(100), b"more");
        attached.end();
        attached.settle(Instant::now());
        assert_eq!(two.end(), None);
        assert_eq!(two.read(100), b"");
        assert!(attached.is_empty());
    }

    #[test]
    fn one_that_has_stopped_reading_is_dropped_when_its_patience_is_used_up() {
        let mut attached = Attached::default();
        let peer = client(&mut attached, 1);
        while !attached.holds() {
            attached.give(Stream::Stdout, &[7; 16384]);
        }
        let now = Instant::now();
        assert!(attached.due().unwrap() <= now + PATIENCE);
        attached.settle(now);
        assert!(attached.holds());
        attached.settle(now + PATIENCE);
        assert!(!attached.holds() && attached.is_empty());
        assert!(peer.end().unwrap().to_string().contains("did not keep up"));
    }

    #[test]
    fn one_that_goes_on_reading_earns_patience() {
        let mut attached = Attached::default();
        let peer = client(&mut attached, 1);
        let mut now = Instant::now();
        // Ten seconds at the pace that is asked for, and the pipe full nearly all the time.
        for _ in 0..640 {
            while !attached.holds() {
                attached.give(Stream::Stdout, &[7; 16384]);
            }
            assert_eq!(peer.read(65536).len(), 65536);
            now += Duration::from_micros(65536 * 1_000_000 / PACE);
            attached.flush(1, now);
            attached.settle(now);
            assert!(!attached.is_empty());
        }
    }

    #[test]
    fn one_that_is_behind_gets_all_before_it_is_told_of_the_end() {
        let mut attached = Attached::default();
        let peer = client(&mut attached, 1);
        let mut written = 0;
        while !attached.holds() {
            attached.give(Stream::Stdout, &[7; 16384]);
            written += 16384;
        }
        attached.end();
        let now = Instant::now();
        attached.settle(now);
        assert!(!attached.is_empty());
        let mut read = peer.read(1 << 20).len();
        attached.flush(1, now);
        attached.settle(now);
        read += peer.read(1 << 20).len();
        assert_eq!((read, peer.end()), (written, None));
    }

    #[test]
    fn there_is_a_limit() {
        let mut attached = Attached::default();
        let peers: Vec<_> = (0..MAX_CLIENTS as u32).map(|id| client(&mut attached, id)).collect();
        let (_control, ours) = fd::seqpacket_pair().unwrap();
        let error = attached.add(Client::new(999, ours, None, Vec::new()).unwrap()).unwrap_err();
        assert_eq!(crate::errchain::Kinded::kind(&error), Kind::ResourceExhausted);
        drop(peers);
    }
}
