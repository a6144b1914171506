//! WebSocket, the server's side, with Kubernetes' subprotocols.
//!
//! Framing is our own: a channel's message may be longer than what is kept of it, so messages are passed on in parts as
//! they come, which no library of the field does, and the machine needs no I/O. Extensions are never agreed on.

mod channels;
mod frame;
mod tunnel;

pub use channels::{Channels, Codec};
#[cfg(test)]
pub use frame::tests as frame_tests;
pub use tunnel::Tunnel;

/// What a client did that ends its connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WebSocketError {
    /// A frame that RFC 6455 forbids.
    #[error("the client sent {0}")]
    Frame(&'static str),
    /// A message that the subprotocol doesn't have.
    #[error("the client sent a message {0}")]
    Message(&'static str),
    /// Something is wrong inside a tunnel.
    #[error("the client broke SPDY in the tunnel")]
    Tunnelled(#[source] crate::stream::spdy::SpdyError),
}
