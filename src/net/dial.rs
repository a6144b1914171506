//! A connection to a port of a pod's own, as port-forward needs it: `localhost` inside the pod's network namespace.
//!
//! A socket belongs to the namespace in which it was made, whoever connects it: a scratch thread that has entered the namespace
//! makes the sockets and ends, and the connecting is tokio's. Nothing of the pod is resolved or read.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::net::{TcpSocket, TcpStream};

use super::netns;
use crate::errchain::{Kind, Kinded};
use crate::sys;

/// How long one address may take: it is the pod's own loopback, which answers at once unless a firewall of the pod's swallows it.
const LIMIT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The namespace can't be entered, or no socket made in it.
    #[error("cannot make a socket in the network namespace at {path}")]
    Socket {
        /// The namespace.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody answers on either address.
    #[error("cannot connect to port {port} on 127.0.0.1 ({v4}) or ::1")]
    Connect {
        /// The port.
        port: u16,
        /// What 127.0.0.1 said.
        v4: io::Error,
        /// What ::1 said.
        source: io::Error,
    },
}

impl Kinded for DialError {
    fn kind(&self) -> Kind {
        match self {
            DialError::Socket { .. } => Kind::Internal,
            DialError::Connect { .. } => Kind::Unavailable,
        }
    }
}

/// Connects to `localhost` in the namespace pinned at a path, in the daemon's own without one: first 127.0.0.1, then ::1.
pub async fn localhost(netns: Option<PathBuf>, port: u16) -> Result<TcpStream, DialError> {
    let path = netns.clone().unwrap_or_else(|| "/proc/self/ns/net".into());
    let failed = |source| DialError::Socket { path, source };
    let (v4, v6) = match netns {
        None => sockets(),
        Some(path) => sockets_in(path).await,
    }
    .map_err(failed)?;
    let refused = match connect(Ok(v4), (Ipv4Addr::LOCALHOST, port).into()).await {
        Ok(stream) => return Ok(stream),
        Err(error) => error,
    };
    connect(v6, (Ipv6Addr::LOCALHOST, port).into()).await.map_err(|source| DialError::Connect { port, v4: refused, source })
}

/// A socket for each family; a kernel without IPv6 has none for that.
type Sockets = (OwnedFd, io::Result<OwnedFd>);

fn sockets() -> io::Result<Sockets> {
    let make = |family| -> io::Result<OwnedFd> {
        Ok(rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
    };
    Ok((make(AddressFamily::INET)?, make(AddressFamily::INET6)))
}

async fn sockets_in(path: PathBuf) -> io::Result<Sockets> {
    let (send, made) = tokio::sync::oneshot::channel();
    sys::netns::scratch("netns-dial", move || {
        let make = |path: &Path| {
            sys::netns::enter(netns::open(path)?.as_fd())?;
            sockets()
        };
        let _ = send.send(make(&path));
    })?;
    made.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
}

async fn connect(socket: io::Result<OwnedFd>, address: SocketAddr) -> io::Result<TcpStream> {
    let connecting = TcpSocket::from_std_stream(StdStream::from(socket?)).connect(address);
    let stream = tokio::time::timeout(LIMIT, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    // Each keystroke is a segment of its own.
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errchain::Chain;

    fn wait<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn the_first_family_that_answers_is_taken() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let port = listener.local_addr().unwrap().port();
            let stream = wait(localhost(None, port)).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
        }
    }

    #[test]
    fn a_port_that_nobody_listens_on_is_named() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = wait(localhost(None, port)).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        let chain = Chain(&error).to_string();
        assert!(chain.contains(&port.to_string()) && chain.to_lowercase().contains("refused"), "{chain}");
        let error = wait(localhost(Some("/no/such/netns".into()), port)).unwrap_err();
        assert!(matches!(&error, DialError::Socket { path, .. } if path == Path::new("/no/such/netns")), "{error:?}");
    }
}
