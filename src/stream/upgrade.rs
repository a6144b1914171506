//! From a request's path and headers to an agreed protocol, or to the refusal. Pure: no socket, no token table.
//!
//! The rules are those of kubelet's and containerd's streaming servers, which the clients were written against: SPDY's
//! version stands in `X-Stream-Protocol-Version`, WebSocket's in `Sec-WebSocket-Protocol`; the client's order decides.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use sha1::{Digest, Sha1};

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
/// The connection's one protocol of this name.
const SPDY: &str = "SPDY/3.1";
/// Appended to a WebSocket key before it is hashed (RFC 6455, section 1.3).
const WEBSOCKET_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// What the path asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/exec/TOKEN`
    Exec,
    /// `/attach/TOKEN`
    Attach,
    /// `/portforward/TOKEN`
    PortForward,
}

impl Kind {
    /// The path's first part.
    pub fn path(self) -> &'static str {
        match self {
            Kind::Exec => "exec",
            Kind::Attach => "attach",
            Kind::PortForward => "portforward",
        }
    }
}

/// What carries the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// SPDY/3.1 on the connection itself.
    Spdy,
    /// SPDY/3.1 in the binary messages of a WebSocket.
    Tunnel,
    /// WebSocket messages, each beginning with its channel's number.
    Channels {
        /// Messages are text: the channel's digit, then base64.
        base64: bool,
    },
}

/// The version of the remote command protocol; of no meaning for port-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Errors as text; no resize stream over SPDY.
    V1,
    /// As 1, without its bug of closing the error stream at once.
    V2,
    /// As 2, with a resize stream.
    V3,
    /// The end as a metav1.Status in JSON.
    V4,
    /// As 4, with a half-close signal; WebSocket only.
    V5,
}

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The carrier.
    pub carrier: Carrier,
    /// The version.
    pub version: Version,
    /// Headers of the 101 response.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: StatusCode,
    /// What the body says.
    pub reason: String,
    /// Headers of the response.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), headers: Vec::new() }
    }

    fn with(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }

    /// What stands for every path that names nothing, whatever the cause.
    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "no such streaming request")
    }
}

/// The kind and token of a path. Nothing but `/KIND/TOKEN` is a path.
pub fn route(path: &str) -> Option<(Kind, &str)> {
    let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
    let kind = [Kind::Exec, Kind::Attach, Kind::PortForward].into_iter().find(|one| one.path() == kind)?;
    (!token.is_empty() && !token.contains('/')).then_some((kind, token))
}

/// The protocol for a request of this kind.
pub fn agree(kind: Kind, method: &Method, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    if *method != Method::GET && *method != Method::POST {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST").with(header::ALLOW, "GET, POST"));
    }
    let upgrades = listed(headers, &header::UPGRADE);
    let asked = |name: &str| upgrades.iter().any(|upgrade| upgrade.eq_ignore_ascii_case(name));
    if !listed(headers, &header::CONNECTION).iter().any(|option| option.eq_ignore_ascii_case("upgrade")) {
        Err(Refusal::new(StatusCode::BAD_REQUEST, "unable to upgrade: no Connection: Upgrade in the request"))
    } else if asked("websocket") {
        websocket(kind, method, headers)
    } else if asked(SPDY) {
        spdy(kind, headers)
    } else {
        Err(Refusal::new(StatusCode::BAD_REQUEST, "unable to upgrade: Upgrade must be SPDY/3.1 or websocket"))
    }
}

fn spdy(kind: Kind, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    let ours: &[(&'static str, Version)] = match kind {
        Kind::Exec | Kind::Attach => &[
            ("v4.channel.k8s.io", Version::V4),
            ("v3.channel.k8s.io", Version::V3),
            ("v2.channel.k8s.io", Version::V2),
            ("channel.k8s.io", Version::V1),
        ],
        Kind::PortForward => &[("portforward.k8s.io", Version::V1)],
    };
    let theirs = listed(headers, &STREAM_PROTOCOL);
    if theirs.is_empty() {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "unable to upgrade: X-Stream-Protocol-Version is required"));
    }
    let Some(&(name, version)) = theirs.iter().find_map(|theirs| ours.iter().find(|(name, _)| name == theirs)) else {
        let mut refusal = Refusal::new(StatusCode::FORBIDDEN, "unable to upgrade: no stream protocol version in common");
        for (name, _) in ours {
            refusal = refusal.with(ACCEPTED_PROTOCOLS, name);
        }
        return Err(refusal);
    };
    let headers = vec![upgrade(), (header::UPGRADE, HeaderValue::from_static(SPDY)), (STREAM_PROTOCOL, HeaderValue::from_static(name))];
    Ok(Agreed { carrier: Carrier::Spdy, version, headers })
}

fn websocket(kind: Kind, method: &Method, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    const BINARY: Carrier = Carrier::Channels { base64: false };
    const BASE64: Carrier = Carrier::Channels { base64: true };
    let ours: &[(&'static str, Carrier, Version)] = match kind {
        Kind::Exec | Kind::Attach => &[
            ("v5.channel.k8s.io", BINARY, Version::V5),
            ("v4.channel.k8s.io", BINARY, Version::V4),
            ("v4.base64.channel.k8s.io", BASE64, Version::V4),
            ("channel.k8s.io", BINARY, Version::V1),
            ("base64.channel.k8s.io", BASE64, Version::V1),
        ],
        Kind::PortForward => &[
            ("SPDY/3.1+portforward.k8s.io", Carrier::Tunnel, Version::V1),
            ("v4.channel.k8s.io", BINARY, Version::V4),
            ("v4.base64.channel.k8s.io", BASE64, Version::V4),
        ],
    };
    if *method != Method::GET {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "a WebSocket begins with GET").with(header::ALLOW, "GET"));
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let refusal = Refusal::new(StatusCode::UPGRADE_REQUIRED, "unable to upgrade: Sec-WebSocket-Version must be 13");
        return Err(refusal.with(header::SEC_WEBSOCKET_VERSION, "13"));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok()).map(str::trim);
    let Some(key) = key.filter(|key| STANDARD.decode(key).is_ok_and(|key| key.len() == 16)) else {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "unable to upgrade: Sec-WebSocket-Key must be 16 bytes in base64"));
    };
    let mut answer = vec![upgrade(), (header::UPGRADE, HeaderValue::from_static("websocket")), accept(key)];
    let theirs = listed(headers, &header::SEC_WEBSOCKET_PROTOCOL);
    if theirs.is_empty() {
        // Clients from before subprotocols had names: binary channels, errors as text.
        return Ok(Agreed { carrier: BINARY, version: Version::V1, headers: answer });
    }
    let Some(&(name, carrier, version)) = theirs.iter().find_map(|theirs| ours.iter().find(|(name, ..)| name == theirs)) else {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "unable to upgrade: no WebSocket subprotocol in common"));
    };
    answer.push((header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name)));
    Ok(Agreed { carrier, version, headers: answer })
}

fn upgrade() -> (HeaderName, HeaderValue) {
    (header::CONNECTION, HeaderValue::from_static("Upgrade"))
}

fn accept(key: &str) -> (HeaderName, HeaderValue) {
    let digest = Sha1::new().chain_update(key).chain_update(WEBSOCKET_GUID).finalize();
    let value = HeaderValue::from_str(&STANDARD.encode(digest)).unwrap_or_else(|_| HeaderValue::from_static(""));
    (header::SEC_WEBSOCKET_ACCEPT, value)
}

/// The members of a header that is a comma-separated list, over all its lines.
fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|member| !member.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is agreed on for headers written as `name: value` lines, or the refusal's status.
    fn agreed(kind: Kind, method: &str, lines: &str) -> Result<Agreed, Refusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines.lines().filter_map(|line| line.trim().split_once(": ")) {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        agree(kind, &method.parse().unwrap(), &headers)
    }

    #[test]
    fn paths() {
        let check = |path, expected| assert_eq!(route(path), expected, "{path}");
        check("/exec/abc", Some((Kind::Exec, "abc")));
        check("/attach/abc", Some((Kind::Attach, "abc")));
        check("/portforward/abc", Some((Kind::PortForward, "abc")));
        for path in ["", "/", "/exec", "/exec/", "/exec/a/b", "/execs/a", "exec/a", "/Exec/a", "//exec/a", "*"] {
            check(path, None);
        }
    }

    #[test]
    fn spdy_takes_the_clients_first_choice() {
        let check = |kind, versions: &str, expected: Result<(Version, &str), u16>| {
            let lines = format!("Connection: Upgrade\nUpgrade: SPDY/3.1\n{versions}");
            for method in ["GET", "POST"] {
                let got = agreed(kind, method, &lines);
                let got =
                    got.as_ref().map(|agreed| (agreed.version, agreed.headers[2].1.to_str().unwrap())).map_err(|refusal| refusal.status.as_u16());
                assert_eq!(got, expected, "{versions}");
            }
        };
        let version = "X-Stream-Protocol-Version";
        check(Kind::Exec, &format!("{version}: v5.channel.k8s.io\n{version}: v4.channel.k8s.io"), Ok((Version::V4, "v4.channel.k8s.io")));
        check(Kind::Attach, &format!("{version}: v2.channel.k8s.io, v4.channel.k8s.io"), Ok((Version::V2, "v2.channel.k8s.io")));
        check(Kind::Exec, &format!("{version}: v3.channel.k8s.io"), Ok((Version::V3, "v3.channel.k8s.io")));
        check(Kind::Exec, &format!("{version}: channel.k8s.io"), Ok((Version::V1, "channel.k8s.io")));
        check(Kind::PortForward, &format!("{version}: portforward.k8s.io"), Ok((Version::V1, "portforward.k8s.io")));
        check(Kind::PortForward, &format!("{version}: v4.channel.k8s.io"), Err(403));
        check(Kind::Exec, &format!("{version}: v9.channel.k8s.io"), Err(403));
        check(Kind::Exec, &format!("{version}: ,"), Err(400));
        check(Kind::Exec, "", Err(400));
    }

    #[test]
    fn websocket_takes_the_clients_first_choice() {
        let check = |kind, offered: Option<&str>, expected: Result<(Carrier, Version), u16>| {
            let offer = offered.map_or(String::new(), |offered| format!("Sec-WebSocket-Protocol: {offered}"));
            let lines = format!(
                "Connection: keep-alive, upgrade\nUpgrade: WebSocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n{offer}"
            );
            let got = agreed(kind, "GET", &lines);
            if let Ok(agreed) = &got {
                // The example of RFC 6455, section 1.3.
                assert_eq!(agreed.headers[2].1, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
                assert_eq!(agreed.headers.len(), if offered.is_some() { 4 } else { 3 });
            }
            let got = got.map(|agreed| (agreed.carrier, agreed.version)).map_err(|refusal| refusal.status.as_u16());
            assert_eq!(got, expected, "{offered:?}");
        };
        let (binary, base64) = (Carrier::Channels { base64: false }, Carrier::Channels { base64: true });
        check(Kind::Exec, None, Ok((binary, Version::V1)));
        check(Kind::Exec, Some("v5.channel.k8s.io, v4.channel.k8s.io"), Ok((binary, Version::V5)));
        check(Kind::Exec, Some("v9.channel.k8s.io, v4.base64.channel.k8s.io"), Ok((base64, Version::V4)));
        check(Kind::Attach, Some("base64.channel.k8s.io"), Ok((base64, Version::V1)));
        check(Kind::Attach, Some("SPDY/3.1+portforward.k8s.io"), Err(403));
        check(Kind::PortForward, Some("SPDY/3.1+portforward.k8s.io"), Ok((Carrier::Tunnel, Version::V1)));
        check(Kind::PortForward, Some("v4.channel.k8s.io"), Ok((binary, Version::V4)));
        check(Kind::PortForward, Some("v5.channel.k8s.io"), Err(403));
    }

    #[test]
    fn what_is_no_upgrade_is_refused() {
        let check = |method: &str, lines: &str, status| {
            assert_eq!(agreed(Kind::Exec, method, lines).unwrap_err().status.as_u16(), status, "{method} {lines}")
        };
        let websocket = "Connection: Upgrade\nUpgrade: websocket\n";
        check("DELETE", "Connection: Upgrade\nUpgrade: SPDY/3.1\nX-Stream-Protocol-Version: v4.channel.k8s.io", 405);
        check("HEAD", "", 405);
        check("GET", "", 400);
        check("POST", "Connection: Upgrade", 400);
        check("GET", "Upgrade: SPDY/3.1", 400);
        check("GET", "Connection: Upgrade\nUpgrade: SPDY/2", 400);
        check("GET", "Connection: Upgrade\nUpgrade: h2c", 400);
        check("POST", websocket, 405);
        check("GET", websocket, 426);
        check("GET", &format!("{websocket}Sec-WebSocket-Version: 8\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 426);
        check("GET", &format!("{websocket}Sec-WebSocket-Version: 13"), 400);
        check("GET", &format!("{websocket}Sec-WebSocket-Version: 13\nSec-WebSocket-Key: short"), 400);
    }
}
