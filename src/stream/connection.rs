//! The driver of a connection: feeds a protocol's machine with bytes, and moves what it says to and from streams.
//!
//! ```text
//! socket ─▶ Machine::receive ─▶ Event::Data ─▶ queue of the stream ─▶ Incoming::next
//!        ◀─ Machine::output  ◀─ Machine::send ◀─ Outgoing::send, with permits of the stream and the connection
//! ```
//!
//! One task, no lock. What a client sends faster than its session takes it fills the stream's queue, then the connection is
//! not read any more: memory is bounded, and a client that keeps windows never gets there. Meanwhile the driver looks
//! whether the client is still there. Ends are structured: when the handles are dropped it says goodbye, and when it ends
//! every handle learns it.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::output::{Output, Permit, SLICES};
use super::socket::Socket;
use super::spdy::{Headers, SpdyError};
use super::websocket::WebSocketError;

/// Bytes that are read at once.
const READ: usize = 64 << 10;
/// What a stream, and all of a connection's, may hold that its session has not taken; each chunk counts [`CHUNK_COST`] more.
const STREAM_QUEUE: usize = 256 << 10;
const CONNECTION_QUEUE: usize = 4 << 20;
const CHUNK_COST: usize = 64;
/// Chunks on their way to the client, of a stream and of all.
const STREAM_CHUNKS: usize = 2;
const CONNECTION_CHUNKS: usize = 64;
/// Answers that a client may leave unread before nothing more is read from it.
const MAX_ANSWERS: usize = 64 << 10;
/// Streams that the session has not looked at yet.
const UNSEEN: usize = 256;
/// A chunk below this is copied out of what was read, which it would keep in memory.
const WORTH_SHARING: usize = 16 << 10;
/// How long a goodbye may take: what is left to write, and the client's own end.
const GOODBYE: Duration = Duration::from_secs(5);
/// How often to look for the client while nothing is read from it.
const LOOK: Duration = Duration::from_secs(1);

/// What a client did that ends its connection.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// In SPDY.
    #[error("the client broke SPDY")]
    Spdy(#[source] SpdyError),
    /// In WebSocket.
    #[error("the client broke WebSocket")]
    WebSocket(#[source] WebSocketError),
}

/// What a machine makes of the client's bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A stream begins.
    Opened {
        /// Its number.
        stream: u32,
        /// What it says of itself.
        headers: Headers,
        /// The client sends nothing on it.
        finished: bool,
    },
    /// Bytes of a stream.
    Data {
        /// Which.
        stream: u32,
        /// Never none.
        bytes: Bytes,
    },
    /// The client sends no more on a stream.
    Finished {
        /// Which.
        stream: u32,
    },
    /// A stream is over, both ways.
    Reset {
        /// Which.
        stream: u32,
    },
    /// The client ends the connection in order; what it expects in return is in the output.
    Goodbye,
}

/// A protocol without its I/O.
pub trait Machine: Send {
    /// Takes what it can of the client's bytes, up to the next event. `None`: it needs more. After an error its output says so
    /// to the client, and nothing is received any more.
    fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Event>, ProtocolError>;
    /// Tells the client that a stream is taken on.
    fn accept(&mut self, stream: u32);
    /// Tells the client that a stream is not taken on.
    fn refuse(&mut self, stream: u32);
    /// Sends bytes on a stream.
    fn send(&mut self, stream: u32, bytes: Bytes, permit: Permit);
    /// Sends no more on a stream.
    fn finish(&mut self, stream: u32);
    /// Ends a stream both ways.
    fn reset(&mut self, stream: u32);
    /// So many bytes of a stream are out of the way: the client may send more.
    fn taken(&mut self, stream: u32, n: usize);
    /// Something waits for the client's permission to be sent.
    fn waits(&self) -> bool;
    /// Says goodbye.
    fn close(&mut self);
    /// What is to be written.
    fn output(&mut self) -> &mut Output;
}

/// The next `n` bytes as a chunk of their own.
pub fn chunk(input: &mut BytesMut, n: usize) -> Bytes {
    let part = input.split_to(n);
    if n < WORTH_SHARING { Bytes::copy_from_slice(&part) } else { part.freeze() }
}

/// What a connection is on.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin {
    /// Whether the peer is gone, though not all it sent is read.
    fn hung_up(&self) -> bool;
}

impl Wire for Socket {
    fn hung_up(&self) -> bool {
        Socket::hung_up(self)
    }
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The session was over.
    #[error("the session is over")]
    Session,
    /// The client closed it.
    #[error("the client closed the connection")]
    Client,
    /// Nothing moved for too long.
    #[error("nothing moved for {0:?}")]
    Idle(Duration),
    /// The client broke the protocol.
    #[error("the connection was closed")]
    Protocol(#[source] ProtocolError),
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
}

/// The peer, or the whole connection, ended a stream before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream was cut")]
pub struct Cut;

enum Command {
    Accept(u32),
    Refuse(u32),
    Send(u32, Bytes, Permit),
    Finish(u32),
    Reset(u32),
    Taken(u32, usize),
    /// Nobody takes what comes any more.
    Ignore(u32),
}

type Commands = mpsc::UnboundedSender<Command>;

/// What the client sends on a stream. Dropped, the rest is thrown away.
pub struct Incoming {
    stream: u32,
    /// `None` is the end.
    queue: mpsc::UnboundedReceiver<Option<Bytes>>,
    commands: Commands,
    /// What `next` gave last.
    held: usize,
    ended: bool,
}

impl Incoming {
    /// The next bytes; `None` at the end. What it gave before counts as done with. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Cut> {
        if self.held > 0 {
            let _ = self.commands.send(Command::Taken(self.stream, std::mem::take(&mut self.held)));
        }
        if self.ended {
            return Ok(None);
        }
        match self.queue.recv().await {
            Some(Some(bytes)) => {
                self.held = bytes.len();
                Ok(Some(bytes))
            }
            Some(None) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(Cut),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Ignore(self.stream));
    }
}

/// What we send on a stream. Dropped, that is its end.
pub struct Outgoing {
    stream: u32,
    share: Arc<Semaphore>,
    connection: Arc<Semaphore>,
    commands: Commands,
    /// Closed when the stream is cut; nothing is ever sent.
    cut: watch::Receiver<()>,
}

impl Outgoing {
    /// Sends bytes, when there is room for them on their way.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), Cut> {
        let stream = Arc::clone(&self.share).acquire_owned().await.map_err(|_| Cut)?;
        let connection = Arc::clone(&self.connection).acquire_owned().await.map_err(|_| Cut)?;
        self.commands.send(Command::Send(self.stream, bytes, Permit::new(stream, connection))).map_err(|_| Cut)
    }

    /// Waits until the stream is cut, which it may be after either end of it too.
    pub fn cut(&self) -> impl Future<Output = ()> + use<> {
        let mut cut = self.cut.clone();
        async move { while cut.changed().await.is_ok() {} }
    }

    /// Whether the stream is cut.
    pub fn is_cut(&self) -> bool {
        self.cut.has_changed().is_err()
    }

    /// Ends the stream both ways, as a connection that broke.
    pub fn reset(self) {
        let _ = self.commands.send(Command::Reset(self.stream));
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Finish(self.stream));
    }
}

/// A stream that the client opened. Dropped, it is refused.
pub struct Opened {
    /// What it says of itself.
    pub headers: Headers,
    /// Its number.
    pub stream: u32,
    halves: Option<(Incoming, Outgoing)>,
}

impl Opened {
    /// Takes it on.
    pub fn accept(mut self) -> Option<(Incoming, Outgoing)> {
        let halves = self.halves.take();
        if let Some((incoming, _)) = &halves {
            let _ = incoming.commands.send(Command::Accept(self.stream));
        }
        halves
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some((incoming, _)) = &self.halves {
            let _ = incoming.commands.send(Command::Refuse(self.stream));
        }
    }
}

/// A session's end of a connection. When it and every stream is dropped, the connection says goodbye.
pub struct Connection {
    opened: mpsc::Receiver<Opened>,
    commands: Commands,
}

impl Connection {
    /// The next stream that the client opens; `None` when it is gone. Cancel-safe.
    pub async fn opened(&mut self) -> Option<Opened> {
        self.opened.recv().await
    }

    /// Returns when the connection has ended.
    pub async fn gone(&self) {
        self.commands.closed().await;
    }
}

/// A stream, as the driver knows it.
struct Queue {
    /// `None`: the client sends no more, or nobody takes it.
    to: Option<mpsc::UnboundedSender<Option<Bytes>>>,
    /// What the session has not taken: bytes, and chunks.
    held: (usize, usize),
    share: Arc<Semaphore>,
    /// Dropped with the queue, which tells [`Outgoing::cut`].
    _alive: watch::Sender<()>,
    /// The session has dropped what it had of each direction.
    dropped: (bool, bool),
}

impl Queue {
    fn cost(&self) -> usize {
        self.held.0 + self.held.1 * CHUNK_COST
    }

    fn full(&self) -> bool {
        self.cost() >= STREAM_QUEUE
    }
}

/// The driver.
pub struct Driver<M> {
    machine: M,
    streams: HashMap<u32, Queue>,
    held: usize,
    /// Streams whose queue is full.
    full: usize,
    connection: Arc<Semaphore>,
    /// To make handles with, while the session has one: ours would keep the queue open.
    commands: mpsc::WeakUnboundedSender<Command>,
    queue: mpsc::UnboundedReceiver<Command>,
    opened: mpsc::Sender<Opened>,
}

impl<M: Machine> Driver<M> {
    /// A driver for a machine, and its session's end.
    pub fn new(machine: M) -> (Self, Connection) {
        let (commands, queue) = mpsc::unbounded_channel();
        let (opened, receiver) = mpsc::channel(UNSEEN);
        let connection = Arc::new(Semaphore::new(CONNECTION_CHUNKS));
        let weak = commands.downgrade();
        let driver = Self { machine, streams: HashMap::new(), held: 0, full: 0, connection, commands: weak, queue, opened };
        (driver, Connection { opened: receiver, commands })
    }

    /// A stream that is there from the beginning.
    pub fn stream(&mut self, stream: u32) -> Option<(Incoming, Outgoing)> {
        let commands = self.commands.upgrade()?;
        let (to, queue) = mpsc::unbounded_channel();
        let share = Arc::new(Semaphore::new(STREAM_CHUNKS));
        let (alive, cut) = watch::channel(());
        self.streams.insert(stream, Queue { to: Some(to), held: (0, 0), share: Arc::clone(&share), _alive: alive, dropped: (false, false) });
        let incoming = Incoming { stream, queue, commands: commands.clone(), held: 0, ended: false };
        Some((incoming, Outgoing { stream, share, connection: Arc::clone(&self.connection), commands, cut }))
    }

    /// Moves bytes until the connection has ended. `early`: what was read before.
    pub async fn run<W: Wire>(mut self, mut wire: W, early: Bytes, idle: Duration) -> Ended {
        let mut input = BytesMut::from(&early[..]);
        let ended = self.serve(&mut wire, &mut input, idle).await;
        // Handles learn it before the goodbye, which may take its time.
        self.queue.close();
        self.cut_all();
        drop(self.opened);
        if !matches!(ended, Ended::Io(_)) {
            goodbye(&mut wire, self.machine.output(), matches!(ended, Ended::Session)).await;
        }
        ended
    }

    async fn serve<W: Wire>(&mut self, wire: &mut W, input: &mut BytesMut, idle: Duration) -> Ended {
        let mut moved = Instant::now();
        let mut unflushed = false;
        let mut over = false;
        loop {
            while !self.stalled() {
                match self.machine.receive(input) {
                    Ok(None) => break,
                    Ok(Some(Event::Goodbye)) => return Ended::Client,
                    Ok(Some(event)) => self.on_event(event),
                    Err(error) => return Ended::Protocol(error),
                }
            }
            if over && !self.machine.waits() {
                self.machine.close();
                return Ended::Session;
            }
            let stalled = self.stalled();
            tokio::select! {
                command = self.queue.recv(), if !over => match command {
                    Some(command) => {
                        self.on_command(command);
                        while let Ok(command) = self.queue.try_recv() {
                            self.on_command(command);
                        }
                    }
                    None => over = true,
                },
                done = transfer(wire, self.machine.output(), input, !stalled, &mut unflushed) => match done {
                    Ok(true) => moved = Instant::now(),
                    Ok(false) => return Ended::Client,
                    Err(error) => return Ended::Io(error),
                },
                () = sleep(LOOK), if stalled => if wire.hung_up() {
                    return Ended::Client;
                },
                () = sleep_until(moved + idle) => {
                    self.machine.close();
                    return Ended::Idle(idle);
                }
            }
        }
    }

    /// Nothing more may be read.
    fn stalled(&mut self) -> bool {
        self.full > 0 || self.held >= CONNECTION_QUEUE || self.machine.output().control_len() >= MAX_ANSWERS
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Opened { stream, headers, finished } => {
                let Some(halves) = self.stream(stream) else { return };
                if finished {
                    self.end(stream);
                }
                // One that finds no place refuses itself as it is dropped.
                let _ = self.opened.try_send(Opened { headers, stream, halves: Some(halves) });
            }
            Event::Data { stream, bytes } => {
                let n = bytes.len();
                let Some(queue) = self.streams.get_mut(&stream) else { return self.machine.taken(stream, n) };
                match queue.to.as_ref().map(|to| to.send(Some(bytes))) {
                    Some(Ok(())) => self.hold(stream, (n, 1)),
                    _ => self.machine.taken(stream, n),
                }
            }
            Event::Finished { stream } => self.end(stream),
            Event::Reset { stream } => self.cut(stream),
            Event::Goodbye => {}
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Accept(stream) => self.machine.accept(stream),
            Command::Refuse(stream) => {
                self.machine.refuse(stream);
                self.cut(stream);
            }
            Command::Send(stream, bytes, permit) => self.machine.send(stream, bytes, permit),
            Command::Finish(stream) => {
                self.machine.finish(stream);
                self.dropped(stream, |dropped| dropped.1 = true);
            }
            Command::Reset(stream) => {
                self.machine.reset(stream);
                self.cut(stream);
            }
            Command::Taken(stream, n) => {
                self.release(stream, (n, 1));
                self.machine.taken(stream, n);
            }
            Command::Ignore(stream) => {
                self.let_go(stream);
                self.dropped(stream, |dropped| dropped.0 = true);
            }
        }
    }

    fn end(&mut self, stream: u32) {
        if let Some(to) = self.streams.get_mut(&stream).and_then(|queue| queue.to.take()) {
            let _ = to.send(None);
        }
    }

    /// A stream is over before its end.
    fn cut(&mut self, stream: u32) {
        self.let_go(stream);
        if let Some(queue) = self.streams.remove(&stream) {
            queue.share.close();
        }
    }

    fn cut_all(&mut self) {
        for (_, queue) in self.streams.drain() {
            queue.share.close();
        }
        self.connection.close();
    }

    /// Forgets a stream of which the session has nothing any more.
    fn dropped(&mut self, stream: u32, mark: impl FnOnce(&mut (bool, bool))) {
        if let Some(queue) = self.streams.get_mut(&stream) {
            mark(&mut queue.dropped);
            if queue.dropped == (true, true) {
                self.streams.remove(&stream);
            }
        }
    }

    /// What waits in a stream's queue will not be taken, nor will what comes.
    fn let_go(&mut self, stream: u32) {
        let Some(queue) = self.streams.get_mut(&stream) else { return };
        queue.to = None;
        let held = queue.held;
        self.release(stream, held);
        self.machine.taken(stream, held.0);
    }

    fn hold(&mut self, stream: u32, (bytes, chunks): (usize, usize)) {
        let Some(queue) = self.streams.get_mut(&stream) else { return };
        let (was, cost) = (queue.full(), queue.cost());
        queue.held = (queue.held.0 + bytes, queue.held.1 + chunks);
        self.held += queue.cost() - cost;
        self.full += usize::from(!was && queue.full());
    }

    fn release(&mut self, stream: u32, (bytes, chunks): (usize, usize)) {
        let Some(queue) = self.streams.get_mut(&stream) else { return };
        let (was, cost) = (queue.full(), queue.cost());
        queue.held = (queue.held.0 - bytes, queue.held.1 - chunks);
        self.held -= cost - queue.cost();
        self.full -= usize::from(was && !queue.full());
    }
}

/// Writes and reads what can be, at least one byte of either. False: the client sends no more.
async fn transfer<W: Wire>(wire: &mut W, output: &mut Output, input: &mut BytesMut, read: bool, unflushed: &mut bool) -> io::Result<bool> {
    if read {
        input.reserve(READ);
    }
    poll_fn(|cx| {
        let mut moved = false;
        if !output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let n = output.slices(&mut slices);
            match Pin::new(&mut *wire).poll_write_vectored(cx, &slices[..n]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    output.advance(written);
                    moved = true;
                    *unflushed = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        } else if *unflushed {
            // TLS may hold some of it.
            match Pin::new(&mut *wire).poll_flush(cx) {
                Poll::Ready(Ok(())) => *unflushed = false,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        if read {
            match pin!(wire.read_buf(input)).poll(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(false)),
                Poll::Ready(Ok(_)) => moved = true,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        if moved { Poll::Ready(Ok(true)) } else { Poll::Pending }
    })
    .await
}

/// Writes what is left, ends our side, and waits for the client to end its own: a connection that is closed with something
/// unread is reset, and what was written to it may be lost.
async fn goodbye<W: Wire>(wire: &mut W, output: &mut Output, wait: bool) {
    let deadline = Instant::now() + GOODBYE;
    let _ = timeout_at(deadline, async {
        while !output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let n = output.slices(&mut slices);
            let written = wire.write_vectored(&slices[..n]).await?;
            if written == 0 {
                return Ok(());
            }
            output.advance(written);
        }
        wire.flush().await?;
        wire.shutdown().await?;
        let mut rest = vec![0; 4096];
        while wait && wire.read(&mut rest).await? > 0 {}
        Ok::<_, io::Error>(())
    })
    .await;
}
