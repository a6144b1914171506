//! SPDY/3.1, the server's side: what of it Kubernetes' clients speak, and all that any client may send.
//!
//! Source: the SPDY/3.1 draft, and what Go's spdystream does with it, which every Kubernetes client is built on: it
//! neither keeps windows nor updates them, answers each stream in the order of its frames, and takes RST_STREAM for the end
//! of a stream in both directions. So here windows bind only who shows that they know them, and a stream's end is always
//! told by FIN first.

mod dictionary;
mod frame;
mod headers;
mod session;
#[cfg(test)]
mod session_tests;

#[cfg(test)]
pub use headers::tests as headers_tests;
pub use headers::{Headers, Inflater};
pub use session::{MAX_STREAMS, Session};

/// What a client did that ends its connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    /// A frame that can't be.
    #[error("the client sent {0}")]
    Frame(&'static str),
    /// Headers that can't be.
    #[error("the client sent headers that {0}")]
    Headers(&'static str),
}
