//! One client's session, from the upgraded connection to its end.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::ask::Sessions;
use super::server::Ask;
use super::socket::Socket;
use super::upgrade::Agreed;

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

/// Serves the client until the session is over. `early`: what it sent after its request.
pub async fn run(_socket: Socket, _early: Bytes, _ask: Ask, _agreed: Agreed, _sessions: &dyn Sessions, _limits: Limits) {}
