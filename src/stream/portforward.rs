//! Port-forward: pairs of a client's streams, and connections to ports of a pod.
//!
//! Each connection is two streams: data, and one for the text of an error. Half-closes pass both ways: a client that
//! finishes its data has the target read its end, and still gets what the target says. An error text makes clients give
//! up the whole session, so it is for a port that can't be reached; a connection that breaks later resets its stream.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::ask::Sessions;
use super::connection::{Connection, Incoming, Opened, Outgoing};
use super::exec::Halves;
use super::session::Stopping;
use super::spdy::{Headers, MAX_STREAMS};
use crate::errchain::Chain;

/// Bytes that are read of a target at once.
const CHUNK: usize = 32 << 10;
/// How long one stream of a pair waits for the other.
const PAIRING: Duration = Duration::from_secs(30);
/// Bytes of a request's id; clients count requests.
const MAX_REQUEST: usize = 128;
/// How long a client that can't finish its data may still send after the target has ended.
const GRACE: Duration = Duration::from_secs(1);

/// A pod.
#[derive(Clone)]
pub struct Pod {
    /// Who dials.
    pub sessions: Arc<dyn Sessions>,
    /// Its id.
    pub sandbox: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Data,
    Error,
}

/// One stream, whose pair is to come.
struct Waiting {
    half: Half,
    port: u16,
    halves: Halves,
    since: Instant,
}

/// Serves a SPDY client until it is gone: each pair of streams that it opens is a connection.
pub async fn serve(connection: &mut Connection, pod: Pod, mut stopping: Stopping) {
    let mut waiting: HashMap<String, Waiting> = HashMap::new();
    let mut forwarding = JoinSet::new();
    loop {
        let oldest = waiting.values().map(|half| half.since).min();
        tokio::select! {
            () = stopping.wait() => return,
            Some(_) = forwarding.join_next() => {}
            () = sleep_until(oldest.unwrap_or_else(Instant::now) + PAIRING), if oldest.is_some() => {
                waiting.retain(|_, half| half.since.elapsed() < PAIRING);
            }
            opened = connection.opened() => {
                let Some(opened) = opened else { return };
                // One for which there is no room, or that is not well formed, is refused as it is dropped.
                if !room(&mut waiting, &mut forwarding) {
                    continue;
                }
                if let Some((port, (data, error))) = pair(&mut waiting, opened) {
                    forwarding.spawn(forward(pod.clone(), port, data, error, true));
                }
            }
        }
    }
}

/// Whether one more stream may be taken on. The client's own count is not enough: a stream that it resets is none of its
/// streams any more, before what was made of it is gone.
fn room(waiting: &mut HashMap<String, Waiting>, forwarding: &mut JoinSet<()>) -> bool {
    while forwarding.try_join_next().is_some() {}
    if waiting.len() + 2 * forwarding.len() >= MAX_STREAMS {
        waiting.retain(|_, half| !half.halves.1.is_cut());
    }
    waiting.len() + 2 * forwarding.len() < MAX_STREAMS
}

/// What a stream says of itself: its half, port, and the request that both halves name.
fn describe(stream: u32, headers: &Headers) -> Option<(Half, u16, String)> {
    let half = match headers.get("streamtype")? {
        "data" => Half::Data,
        "error" => Half::Error,
        _ => return None,
    };
    let port = headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
    let request = match headers.get("requestid").filter(|request| !request.is_empty()) {
        Some(request) if request.len() > MAX_REQUEST => return None,
        Some(request) => request.to_owned(),
        // Clients from before requests had ids open the error stream, then the data stream.
        None if half == Half::Error => format!("#{stream}"),
        None => format!("#{}", stream.checked_sub(2)?),
    };
    Some((half, port, request))
}

/// Takes a stream on. With the second of a request the pair is whole: the port, data and error.
fn pair(waiting: &mut HashMap<String, Waiting>, opened: Opened) -> Option<(u16, (Halves, Halves))> {
    let (half, port, request) = describe(opened.stream, &opened.headers)?;
    match waiting.get(&request) {
        Some(other) if other.half == half || other.port != port => return None,
        _ => {}
    }
    let halves = opened.accept()?;
    match (half, waiting.remove(&request)) {
        (_, None) => {
            waiting.insert(request, Waiting { half, port, halves, since: Instant::now() });
            None
        }
        (Half::Data, Some(error)) => Some((port, (halves, error.halves))),
        (Half::Error, Some(data)) => Some((port, (data.halves, halves))),
    }
}

/// Serves a WebSocket client: each port has a channel for data and one for an error, which begin with the port.
pub async fn serve_channels(connection: &Connection, pod: Pod, ports: Vec<(u16, Halves, Halves)>, mut stopping: Stopping) {
    let mut forwarding = JoinSet::new();
    for (port, mut data, mut error) in ports {
        let pod = pod.clone();
        forwarding.spawn(async move {
            let begin = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.1.send(begin.clone()).await.is_ok() && error.1.send(begin).await.is_ok() {
                forward(pod, port, data, error, false).await;
            }
        });
    }
    let all = async { while forwarding.join_next().await.is_some() {} };
    tokio::select! {
        () = connection.gone() => {}
        () = stopping.wait() => {}
        () = all => {}
    }
}

/// One connection. `finishes`: the client can say that it sends no more.
async fn forward(pod: Pod, port: u16, data: Halves, (unused, mut error): Halves, finishes: bool) {
    // The client has nothing to say here.
    drop(unused);
    let cut = data.1.cut();
    let connecting = async {
        match pod.sessions.dial(&pod.sandbox, port).await {
            Ok(target) => {
                // Older clients wait for its end before they close their own connection.
                drop(error);
                copy(target, data, finishes).await;
            }
            Err(why) => {
                let text = format!("error forwarding port {port} to pod {}: {}", pod.sandbox, Chain(&why));
                let _ = error.send(Bytes::from(text)).await;
            }
        }
    };
    tokio::select! {
        () = connecting => {}
        // Nobody waits for it any more, whichever of its ends has been reached.
        () = cut => {}
    }
}

/// Moves bytes both ways until both are over, or one breaks.
async fn copy(mut target: TcpStream, (incoming, outgoing): Halves, finishes: bool) {
    let _ = target.set_nodelay(true);
    let (mut from, mut to) = target.split();
    let sending = async {
        let mut incoming: Incoming = incoming;
        loop {
            match incoming.next().await {
                Ok(Some(bytes)) if to.write_all(&bytes).await.is_ok() => {}
                // The target reads no more; what it still says is heard.
                Ok(Some(_)) => return true,
                Ok(None) => {
                    let _ = to.shutdown().await;
                    return true;
                }
                Err(_) => return false,
            }
        }
    };
    let receiving = async {
        let mut outgoing: Outgoing = outgoing;
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            match from.read_buf(&mut buffer).await {
                Ok(0) => return true,
                Ok(_) => {}
                Err(_) => {
                    outgoing.reset();
                    return false;
                }
            }
            if outgoing.send(buffer.split().freeze()).await.is_err() {
                return false;
            }
        }
    };
    tokio::pin!(sending, receiving);
    tokio::select! {
        whole = &mut sending => if whole {
            receiving.await;
        },
        whole = &mut receiving => if whole && finishes {
            sending.await;
        } else if whole {
            let _ = timeout(GRACE, sending).await;
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_say_which_connection_they_are_of() {
        let check = |stream, headers: &[(&str, &str)], expected: Option<(Half, u16, &str)>| {
            let got = describe(stream, &Headers::new(headers));
            assert_eq!(got.as_ref().map(|(half, port, request)| (*half, *port, request.as_str())), expected, "{headers:?}");
        };
        check(1, &[("streamType", "data"), ("port", "80"), ("requestID", "7")], Some((Half::Data, 80, "7")));
        check(1, &[("streamType", "error"), ("port", "65535"), ("requestID", "x")], Some((Half::Error, 65535, "x")));
        check(5, &[("streamType", "error"), ("port", "80")], Some((Half::Error, 80, "#5")));
        check(7, &[("streamType", "data"), ("port", "80")], Some((Half::Data, 80, "#5")));
        check(1, &[("streamType", "data"), ("port", "80")], None);
        check(1, &[("streamType", "stdin"), ("port", "80"), ("requestID", "7")], None);
        check(1, &[("port", "80"), ("requestID", "7")], None);
        for port in ["", "0", "65536", "-1", "http", "80 "] {
            check(1, &[("streamType", "data"), ("port", port), ("requestID", "7")], None);
        }
        check(1, &[("streamType", "data"), ("requestID", "7")], None);
        check(1, &[("streamType", "data"), ("port", "80"), ("requestID", &"7".repeat(MAX_REQUEST + 1))], None);
    }
}
