//! Exec, attach and port-forward: the streaming server and its protocols.
//!
//! The CRI answers Exec, Attach and PortForward with a URL of this server; whoever has it (kubelet, crictl) connects,
//! upgrades to SPDY/3.1 or WebSocket, and gets the streams of one session:
//!
//! ```text
//! client ══TCP, TLS══▶ server ─▶ upgrade ─▶ connection ─┬─▶ exec         ⇄ pipes or pty of a process
//!                        tokens    negotiates   machines: │                 (`sessions`, given by the service)
//!                                               spdy,     └─▶ portforward ⇄ sockets in the pod's namespace
//!                                               websocket
//! ```
//!
//! The protocols are machines without I/O ([`connection::Machine`]): bytes in, events and bytes out; one driver feeds
//! them. **A client is hostile: everything it can make grow has a bound, and what it sends wrong ends its own connection.**
//! Everything of a session ends with it: the driver, the copying, the process that was exec'd for it.
//!
//! Deliberately not here: what an exec is and which process it becomes (`service`), and any RPC (`cri`).

mod ask;
mod connection;
mod exec;
pub mod hostile;
mod output;
mod portforward;
mod server;
mod session;
mod socket;
mod spdy;
mod status;
mod tls;
mod tokens;
mod upgrade;
mod websocket;

pub use ask::{AttachAsk, BoxFuture, Control, ExecAsk, PortForwardAsk, Sessions, Streams};
pub use server::{Config, Server, StreamError};
pub use tls::{TlsConfig, TlsError, TlsVersion};
