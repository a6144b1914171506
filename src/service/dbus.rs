//! A D-Bus client, as small as what systemd is asked for: method calls and their answers, and signals, on the system bus.
//!
//! The wire format is D-Bus 0.43's (the D-Bus specification, "Message Protocol"): little-endian, version 1, no descriptors.
//! Bodies are written and read by who knows their signature. Not here: objects of our own, properties, other buses.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};

pub use marshal::{Reader, Writer};

mod marshal;

/// Where the system bus listens by convention.
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
/// Bytes of a message that is taken; the bus itself allows 128 MiB.
const MAX_MESSAGE: usize = 4 << 20;
/// Signals between two looks of the slowest listener.
const SIGNALS: usize = 1024;

/// Why a call has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BusError {
    /// The socket, or what came from it.
    #[error("cannot use the system bus: {0}")]
    Connection(Arc<io::Error>),
    /// The answer is an error.
    #[error("{name}: {text}")]
    Answer {
        /// Its name, such as `org.freedesktop.systemd1.NoSuchUnit`.
        name: String,
        /// For people.
        text: String,
    },
    /// The answer is not what was asked for.
    #[error("the answer has no such body")]
    Body,
    /// The connection ended.
    #[error("the connection to the system bus ended")]
    Closed,
}

impl From<io::Error> for BusError {
    fn from(error: io::Error) -> Self {
        BusError::Connection(Arc::new(error))
    }
}

/// Whom a call is for, and what it is.
#[derive(Debug, Clone, Copy)]
pub struct Method<'a> {
    /// The bus name.
    pub destination: &'a str,
    /// The object.
    pub path: &'a str,
    /// The interface.
    pub interface: &'a str,
    /// The method.
    pub name: &'a str,
}

/// A signal, with its body.
#[derive(Debug, Clone)]
pub struct Signal {
    /// Its name.
    pub name: String,
    /// Its arguments.
    pub body: Vec<u8>,
}

type Answer = Result<Vec<u8>, BusError>;
type Waiting = Arc<Mutex<Option<HashMap<u32, oneshot::Sender<Answer>>>>>;

/// A connection; ends when the last of it is dropped.
pub struct Bus {
    write: tokio::sync::Mutex<(OwnedWriteHalf, u32)>,
    /// `None`: the connection has ended.
    waiting: Waiting,
    signals: broadcast::Sender<Signal>,
    /// Its other end is dropped with the connection.
    ended: watch::Receiver<()>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Bus {
    /// Connects to the system bus as the user that this process is.
    pub async fn system() -> Result<Self, BusError> {
        Self::connect(Path::new(SYSTEM_BUS)).await
    }

    async fn connect(path: &Path) -> Result<Self, BusError> {
        let mut stream = UnixStream::connect(path).await?;
        authenticate(&mut stream).await?;
        let (read, write) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let (signals, _) = broadcast::channel(SIGNALS);
        let (alive, ended) = watch::channel(());
        let (waiting_there, signals_there) = (waiting.clone(), signals.clone());
        let reader = tokio::spawn(async move {
            follow(read, waiting_there, signals_there).await;
            drop(alive);
        });
        let bus = Self { write: tokio::sync::Mutex::new((write, 0)), waiting, signals, ended, reader };
        let bus_itself =
            |name| Method { destination: "org.freedesktop.DBus", path: "/org/freedesktop/DBus", interface: "org.freedesktop.DBus", name };
        bus.call(bus_itself("Hello"), "", &Writer::default()).await?;
        Ok(bus)
    }

    /// It has ended, and every further call fails.
    pub fn is_closed(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Waits for its end.
    pub async fn closed(&self) {
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
    }

    /// Signals that come from now on.
    pub fn signals(&self) -> broadcast::Receiver<Signal> {
        self.signals.subscribe()
    }

    /// Has the bus send on what matches a rule (`AddMatch`).
    pub async fn listen(&self, rule: &str) -> Result<(), BusError> {
        let mut body = Writer::default();
        body.string(rule);
        let method =
            Method { destination: "org.freedesktop.DBus", path: "/org/freedesktop/DBus", interface: "org.freedesktop.DBus", name: "AddMatch" };
        self.call(method, "s", &body).await.map(drop)
    }

    /// Calls a method whose arguments have a signature, and waits for its answer's body.
    pub async fn call(&self, method: Method<'_>, signature: &str, body: &Writer) -> Result<Vec<u8>, BusError> {
        let (reply, answer) = oneshot::channel();
        {
            let mut write = self.write.lock().await;
            write.1 = write.1.wrapping_add(1).max(1);
            let serial = write.1;
            match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                Some(waiting) => waiting.insert(serial, reply),
                None => return Err(BusError::Closed),
            };
            // Cut in the middle, a message would spoil those behind it: whoever stops waiting here ends the connection.
            let mut whole = EndUnlessWhole { waiting: &self.waiting, done: false };
            let sent = write.0.write_all(&marshal::call(serial, method, signature, body)).await;
            whole.done = sent.is_ok();
            drop(whole);
            sent?;
        }
        answer.await.map_err(|_| BusError::Closed)?
    }
}

struct EndUnlessWhole<'a> {
    waiting: &'a Waiting,
    done: bool,
}

impl Drop for EndUnlessWhole<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }
}

/// SASL's EXTERNAL mechanism: the bus asks the kernel who this is.
async fn authenticate(stream: &mut UnixStream) -> io::Result<()> {
    let uid: String = rustix::process::geteuid().as_raw().to_string().bytes().map(|byte| format!("{byte:02x}")).collect();
    stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).await?;
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        if line.len() > 512 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its greeting has no end"));
        }
        line.push(stream.read_u8().await?);
    }
    if !line.starts_with(b"OK ") {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, String::from_utf8_lossy(&line).trim().to_string()));
    }
    stream.write_all(b"BEGIN\r\n").await
}

/// Hands out what comes, until the connection ends.
async fn follow(mut read: OwnedReadHalf, waiting: Waiting, signals: broadcast::Sender<Signal>) {
    loop {
        let incoming = match next(&mut read).await {
            Ok(incoming) => incoming,
            Err(error) => {
                let left = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
                let error = if error.kind() == io::ErrorKind::UnexpectedEof { BusError::Closed } else { error.into() };
                left.into_iter().flatten().for_each(|(_, reply)| drop(reply.send(Err(error.clone()))));
                return;
            }
        };
        let answer = match incoming.kind {
            marshal::Kind::Return => Ok(incoming.body),
            marshal::Kind::Error => {
                let text = Reader::new(&incoming.body).string().unwrap_or_default().to_string();
                Err(BusError::Answer { name: incoming.error, text })
            }
            marshal::Kind::Signal => {
                // Nobody listening is no error.
                let _ = signals.send(Signal { name: incoming.member, body: incoming.body });
                continue;
            }
            marshal::Kind::Other => continue,
        };
        let waiter = waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|waiting| waiting.remove(&incoming.reply_to));
        if let Some(waiter) = waiter {
            let _ = waiter.send(answer);
        }
    }
}

async fn next(read: &mut OwnedReadHalf) -> io::Result<marshal::Incoming> {
    let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut head = [0; 16];
    read.read_exact(&mut head).await?;
    let length = marshal::length(&head).filter(|length| *length <= MAX_MESSAGE).ok_or_else(|| bad("a message is too long or no message"))?;
    let mut message = head.to_vec();
    message.resize(length, 0);
    read.read_exact(&mut message[16..]).await?;
    marshal::incoming(&message).ok_or_else(|| bad("a message can't be read"))
}
