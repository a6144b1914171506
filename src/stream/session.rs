//! One client's session, from the upgraded connection to its end.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::ask::{BoxFuture, PortForwardAsk, Sessions, Streams};
use super::connection::{Driver, Ended, Machine, Wire};
use super::exec::{self, Wanted};
use super::portforward::{self, Pod};
use super::server::Ask;
use super::spdy;
use super::upgrade::{Agreed, Carrier, Version};
use super::websocket::{self, Codec};
use crate::errchain::Remote;

/// When a session ends though neither side has ended it.
pub struct Limits {
    /// After so long without a byte in either direction.
    pub idle: Duration,
    /// When the server ends.
    pub stopping: Stopping,
}

/// Waits for the server's end.
#[derive(Clone)]
pub struct Stopping(pub watch::Receiver<bool>);

impl Stopping {
    /// Returns when the server ends. Cancel-safe.
    pub async fn wait(&mut self) {
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }
}

/// A process's session, exec'd or attached.
struct Remoted<'a> {
    wanted: Wanted,
    opening: BoxFuture<'a, Result<Streams, Remote>>,
    attached: bool,
    version: Version,
}

/// Serves the client until the session is over. `early`: what it sent after its request.
pub async fn run<W: Wire>(wire: W, early: Bytes, ask: Ask, agreed: Agreed, sessions: Arc<dyn Sessions>, limits: Limits) -> Ended {
    let version = agreed.version;
    match ask {
        Ask::Exec(ask) => {
            let wanted = Wanted { stdin: ask.stdin, stdout: ask.stdout, stderr: ask.stderr, resize: ask.tty };
            let remoted = Remoted { wanted, opening: sessions.exec(ask), attached: false, version };
            remote(wire, early, agreed.carrier, remoted, limits).await
        }
        Ask::Attach(ask) => {
            let wanted = Wanted { stdin: ask.stdin, stdout: ask.stdout, stderr: ask.stderr, resize: ask.tty };
            let remoted = Remoted { wanted, opening: sessions.attach(ask), attached: true, version };
            remote(wire, early, agreed.carrier, remoted, limits).await
        }
        Ask::PortForward(ask) => forward(wire, early, agreed.carrier, ask, sessions, limits).await,
    }
}

async fn remote<W: Wire>(wire: W, early: Bytes, carrier: Carrier, remoted: Remoted<'_>, limits: Limits) -> Ended {
    let Remoted { mut wanted, opening, attached, version } = remoted;
    let Limits { idle, stopping } = limits;
    match carrier {
        Carrier::Spdy | Carrier::Tunnel => {
            wanted.resize &= version >= Version::V3;
            let (driver, mut connection) = Driver::new(spdy::Session::new());
            let session = async move {
                if let Some(channels) = wanted.collect(&mut connection).await {
                    exec::serve(&connection, channels, opening, attached, version, stopping).await;
                }
            };
            tokio::join!(driver.run(wire, early, idle), session).0
        }
        Carrier::Channels { base64 } => {
            let machine = websocket::Channels::new(codec(base64), 5, version == Version::V5);
            let (mut driver, connection) = Driver::new(machine);
            let mut take = |number, wanted: bool| driver.stream(number).filter(|_| wanted);
            let mut channels = exec::Channels {
                stdin: take(0, wanted.stdin),
                stdout: take(1, wanted.stdout),
                stderr: take(2, wanted.stderr),
                error: take(3, true),
                resize: take(4, wanted.resize),
            };
            let session = async move {
                // An empty message tells the client that it is connected.
                let first = [&mut channels.stdout, &mut channels.stderr, &mut channels.error].into_iter().flatten().next();
                if let Some((_, outgoing)) = first {
                    let _ = outgoing.send(Bytes::new()).await;
                }
                exec::serve(&connection, channels, opening, attached, version, stopping).await;
            };
            tokio::join!(driver.run(wire, early, idle), session).0
        }
    }
}

async fn forward<W: Wire>(wire: W, early: Bytes, carrier: Carrier, ask: PortForwardAsk, sessions: Arc<dyn Sessions>, limits: Limits) -> Ended {
    let pod = Pod { sessions, sandbox: ask.sandbox };
    let Limits { idle, stopping } = limits;
    match carrier {
        Carrier::Spdy => forward_pairs(wire, early, spdy::Session::new(), pod, Limits { idle, stopping }).await,
        Carrier::Tunnel => forward_pairs(wire, early, websocket::Tunnel::new(), pod, Limits { idle, stopping }).await,
        Carrier::Channels { base64 } => {
            // A message's channel is a byte, or a digit.
            let ports: Vec<_> = ask.ports.into_iter().take(if base64 { 5 } else { 127 }).collect();
            let machine = websocket::Channels::new(codec(base64), 2 * ports.len() as u8, false);
            let (mut driver, connection) = Driver::new(machine);
            let mut streams = (0..).map_while(|number| driver.stream(number));
            let ports = ports.into_iter().filter_map(|port| Some((port, streams.next()?, streams.next()?))).collect();
            let session = async move { portforward::serve_channels(&connection, pod, ports, stopping).await };
            tokio::join!(driver.run(wire, early, idle), session).0
        }
    }
}

async fn forward_pairs<W: Wire, M: Machine>(wire: W, early: Bytes, machine: M, pod: Pod, limits: Limits) -> Ended {
    let (driver, mut connection) = Driver::new(machine);
    let session = async move { portforward::serve(&mut connection, pod, limits.stopping).await };
    tokio::join!(driver.run(wire, early, limits.idle), session).0
}

fn codec(base64: bool) -> Codec {
    if base64 { Codec::Base64 } else { Codec::Binary }
}
