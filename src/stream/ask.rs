//! What a client may ask for, and who serves it. The types know nothing of HTTP.

use std::future::Future;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::errchain::Remote;
pub use crate::service::session::{AttachAsk, ExecAsk};

/// A boxed future.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A pod whose ports are to be forwarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForwardAsk {
    /// The sandbox's whole id.
    pub sandbox: String,
    /// The ports that a WebSocket client gets channels for; SPDY clients name a port with each stream.
    pub ports: Vec<u16>,
}

/// The streams of an exec'd process or an attached container. Dropping `control` says that the client is gone.
pub struct Streams {
    /// Where stdin goes; shutting it down is its end.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Stdout, or the terminal's output.
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Stderr.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// The process itself.
    pub control: Box<dyn Control>,
}

/// A process that streams belong to.
pub trait Control: Send {
    /// Sets the terminal's size in characters. May be called at any time, and changes nothing without a terminal.
    fn resize(&mut self, width: u16, height: u16);
    /// Waits for the end: an exit code, 128 + n for signal n; or why there is none. Cancel-safe.
    fn ended(&mut self) -> BoxFuture<'_, Result<i32, Remote>>;
}

/// Who opens sessions: the service.
pub trait Sessions: Send + Sync + 'static {
    /// Starts the command.
    fn exec(&self, ask: ExecAsk) -> BoxFuture<'_, Result<Streams, Remote>>;
    /// Attaches to the container.
    fn attach(&self, ask: AttachAsk) -> BoxFuture<'_, Result<Streams, Remote>>;
    /// Connects to a port on the pod's loopback, IPv4 first.
    fn dial<'a>(&'a self, sandbox: &'a str, port: u16) -> BoxFuture<'a, Result<TcpStream, Remote>>;
}
