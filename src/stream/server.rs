//! The HTTP/1.1 server behind the URLs that Exec, Attach and PortForward answer.
//!
//! It serves one request per connection, and that one becomes a session or is refused; a task per connection owns all of
//! it, and the server owns the tasks. Nobody is authenticated but by the token in the path and, where configured, by a
//! certificate, so nothing is told about tokens: a path that names none is not found, whatever the cause.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::ask::{AttachAsk, ExecAsk, PortForwardAsk, Sessions};
use super::session::{self, Limits, Stopping};
use super::socket::{self, Socket};
use super::tls::{Certificates, TlsConfig, TlsError};
use super::tokens::{TokenError, Tokens};
use super::upgrade::{self, Agreed, Kind, Refusal};
use crate::errchain::{Chain, Kind as ErrorKind, Kinded, Remote};

/// How long a client may take for the TLS handshake, and for its request.
const REQUEST: Duration = Duration::from_secs(10);
/// Bytes of a request's head, and headers in it.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// How long sessions may take to say goodbye when the server ends.
const GOODBYE: Duration = Duration::from_secs(3);
/// How long to wait where no connection can be taken: for lack of descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// How to serve.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address; with an unspecified one, URLs name the loopback.
    pub address: IpAddr,
    /// The port; 0: any that is free.
    pub port: u16,
    /// With TLS.
    pub tls: Option<TlsConfig>,
    /// A session in which nothing moves for so long is ended.
    pub idle_timeout: Duration,
    /// Connections at once; further ones are turned away.
    pub max_connections: usize,
}

/// Why there is no server, or no URL.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The address can't be listened on.
    #[error("cannot listen for streaming clients on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// TLS can't be set up.
    #[error("cannot serve streaming clients with TLS")]
    Tls(#[source] TlsError),
    /// No token can be given out.
    #[error("cannot offer a streaming session")]
    Token(#[source] TokenError),
}

impl Kinded for StreamError {
    fn kind(&self) -> ErrorKind {
        match self {
            StreamError::Token(TokenError::Full) => ErrorKind::ResourceExhausted,
            StreamError::Token(TokenError::Random(_)) | StreamError::Tls(_) | StreamError::Listen { .. } => ErrorKind::Internal,
        }
    }
}

impl From<StreamError> for Remote {
    fn from(error: StreamError) -> Self {
        Remote::new(&error)
    }
}

/// What a token stands for.
#[derive(Debug)]
pub enum Ask {
    /// A command.
    Exec(ExecAsk),
    /// A running container.
    Attach(AttachAsk),
    /// A pod's ports.
    PortForward(PortForwardAsk),
}

impl Ask {
    fn kind(&self) -> Kind {
        match self {
            Ask::Exec(_) => Kind::Exec,
            Ask::Attach(_) => Kind::Attach,
            Ask::PortForward(_) => Kind::PortForward,
        }
    }
}

/// What every connection needs.
struct Shared {
    tokens: Tokens<Ask>,
    sessions: Arc<dyn Sessions>,
    certificates: Option<Certificates>,
    idle_timeout: Duration,
    stopping: watch::Sender<bool>,
}

/// The server. Dropping it cuts every session; [`Server::stop`] ends them.
pub struct Server {
    shared: Arc<Shared>,
    base: String,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Listens. Sessions are opened with `sessions`.
    pub async fn start(config: Config, sessions: Arc<dyn Sessions>) -> Result<Self, StreamError> {
        let wanted = SocketAddr::new(config.address, config.port);
        let fail = |source| StreamError::Listen { address: wanted, source };
        let certificates = config.tls.map(Certificates::load).transpose().map_err(StreamError::Tls)?;
        let listener = TcpListener::bind(wanted).await.map_err(fail)?;
        let bound = listener.local_addr().map_err(fail)?;
        let base = base_url(certificates.is_some(), bound);
        let stopping = watch::Sender::new(false);
        let shared = Arc::new(Shared { tokens: Tokens::default(), sessions, certificates, idle_timeout: config.idle_timeout, stopping });
        tracing::info!(url = base, "streaming");
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared), config.max_connections));
        Ok(Self { shared, base, accepting: Mutex::new(Some(accepting)) })
    }

    /// A URL that runs the command for whoever connects first, within a minute.
    pub fn exec_url(&self, ask: ExecAsk) -> Result<String, StreamError> {
        self.offer(Ask::Exec(ask))
    }

    /// A URL that attaches whoever connects first, within a minute.
    pub fn attach_url(&self, ask: AttachAsk) -> Result<String, StreamError> {
        self.offer(Ask::Attach(ask))
    }

    /// A URL that forwards ports for whoever connects first, within a minute.
    pub fn port_forward_url(&self, ask: PortForwardAsk) -> Result<String, StreamError> {
        self.offer(Ask::PortForward(ask))
    }

    fn offer(&self, ask: Ask) -> Result<String, StreamError> {
        let kind = ask.kind().path();
        let token = self.shared.tokens.issue(ask, Instant::now()).map_err(StreamError::Token)?;
        Ok(format!("{}/{kind}/{token}", self.base))
    }

    /// Takes no more clients, tells those that are there, and returns when all are gone, a few seconds later at most.
    pub async fn stop(&self) {
        self.shared.stopping.send_replace(true);
        let accepting = self.accepting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(accepting) = accepting {
            let _ = accepting.await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.lock().unwrap_or_else(PoisonError::into_inner).take() {
            accepting.abort();
        }
    }
}

fn base_url(tls: bool, bound: SocketAddr) -> String {
    // An unspecified address can't be connected to; kubelet and crictl are on this node.
    let host = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("{}://{}", if tls { "https" } else { "http" }, SocketAddr::new(host, bound.port()))
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, max_connections: usize) {
    let mut stopping = Stopping(shared.stopping.subscribe());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stopping.wait() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((tcp, peer)) if connections.len() < max_connections => {
                    connections.spawn(connection(tcp, peer, Arc::clone(&shared)));
                }
                Ok((tcp, peer)) => {
                    tracing::warn!(%peer, max_connections, "too many streaming connections: turned away");
                    let _ = tcp.try_write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot take a streaming connection");
                    tokio::time::sleep(BREATH).await;
                }
            },
        }
    }
    drop(listener);
    let all_gone = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GOODBYE, all_gone).await.is_err() {
        tracing::info!("streaming clients did not let go");
        connections.shutdown().await;
    }
}

/// What a request that was answered with 101 goes on as.
struct Upgraded {
    on: OnUpgrade,
    ask: Ask,
    agreed: Agreed,
}

async fn connection(tcp: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    let _ = socket::prepare(&tcp);
    let Some(socket) = handshake(tcp, peer, &shared).await else { return };
    let upgraded = Arc::new(Mutex::new(None));
    let service = service_fn(|mut request: Request<Incoming>| {
        let response = match answer(&request, &shared) {
            Ok((ask, agreed)) => {
                let response = respond(StatusCode::SWITCHING_PROTOCOLS, &agreed.headers, String::new());
                let on = hyper::upgrade::on(&mut request);
                *upgraded.lock().unwrap_or_else(PoisonError::into_inner) = Some(Upgraded { on, ask, agreed });
                response
            }
            Err(refusal) => {
                tracing::debug!(%peer, status = refusal.status.as_u16(), reason = refusal.reason, "streaming request refused");
                let mut response = respond(refusal.status, &refusal.headers, refusal.reason + "\n");
                // Said here alone: hyper's own way to serve one request would also add `close` to an upgrade's answer, and Go's
                // clients then take that for no upgrade.
                response.headers_mut().insert(hyper::header::CONNECTION, hyper::header::HeaderValue::from_static("close"));
                response
            }
        };
        async { Ok::<_, Infallible>(response) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(REQUEST).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    // A body is never read, and one that is sent with a refused request must not hold the connection.
    let served = http.serve_connection(TokioIo::new(socket), service).with_upgrades();
    let mut stopping = Stopping(shared.stopping.subscribe());
    tokio::select! {
        () = stopping.wait() => return,
        served = tokio::time::timeout(2 * REQUEST, served) => match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return tracing::debug!(%peer, error = %Chain(&error), "streaming connection failed"),
            Err(_) => return tracing::debug!(%peer, "streaming client too slow"),
        },
    }
    let upgraded = upgraded.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(Upgraded { on, ask, agreed }) = upgraded else { return };
    let Ok(parts) = on.await.map(|upgraded| upgraded.downcast::<TokioIo<Socket>>()) else { return };
    let Ok(parts) = parts else { return tracing::error!(%peer, "the upgraded connection is not the one that was served") };
    let limits = Limits { idle: shared.idle_timeout, stopping };
    let kind = ask.kind().path();
    let ended = session::run(parts.io.into_inner(), parts.read_buf, ask, agreed, Arc::clone(&shared.sessions), limits).await;
    tracing::debug!(%peer, kind, ended = %Chain(&ended), "streaming session ended");
}

/// The connection behind TLS, where that is spoken.
async fn handshake(tcp: TcpStream, peer: SocketAddr, shared: &Arc<Shared>) -> Option<Socket> {
    if shared.certificates.is_none() {
        return Some(Socket::Plain(tcp));
    }
    let reading = Arc::clone(shared);
    let config = tokio::task::spawn_blocking(move || reading.certificates.as_ref().map(Certificates::current)).await.ok()??;
    match tokio::time::timeout(REQUEST, TlsAcceptor::from(config).accept(tcp)).await {
        Ok(Ok(tls)) => Some(Socket::Tls(Box::new(tls))),
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "TLS handshake failed");
            None
        }
        Err(_) => {
            tracing::debug!(%peer, "TLS handshake took too long");
            None
        }
    }
}

/// What the request asks for and gets. Only one that can be served redeems its token.
fn answer(request: &Request<Incoming>, shared: &Shared) -> Result<(Ask, Agreed), Refusal> {
    let (kind, token) = upgrade::route(request.uri().path()).ok_or_else(Refusal::not_found)?;
    let fit = |ask: &Ask| ask.kind() == kind;
    if !shared.tokens.stands(token, fit, Instant::now()) {
        return Err(Refusal::not_found());
    }
    let agreed = upgrade::agree(kind, request.method(), request.headers())?;
    let ask = shared.tokens.redeem(token, fit, Instant::now()).ok_or_else(Refusal::not_found)?;
    Ok((ask, agreed))
}

fn respond(status: StatusCode, headers: &[(hyper::header::HeaderName, hyper::header::HeaderValue)], body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    for (name, value) in headers {
        response.headers_mut().append(name, value.clone());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_can_be_connected_to() {
        let check = |tls, address: &str, expected| assert_eq!(base_url(tls, address.parse().unwrap()), expected);
        check(false, "127.0.0.1:8000", "http://127.0.0.1:8000");
        check(true, "192.0.2.1:8000", "https://192.0.2.1:8000");
        check(false, "0.0.0.0:8000", "http://127.0.0.1:8000");
        check(true, "[::]:8000", "https://[::1]:8000");
        check(false, "[2001:db8::1]:8000", "http://[2001:db8::1]:8000");
    }
}
