//! Clients that are small enough to send anything: HTTP, SPDY and WebSocket.

use std::collections::HashMap;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// What a client is on.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// The address and path of a URL.
pub fn parts(url: &str) -> (&str, &str) {
    let rest = url.split_once("://").unwrap().1;
    rest.split_at(rest.find('/').unwrap())
}

pub async fn connect(url: &str) -> TcpStream {
    TcpStream::connect(parts(url).0).await.unwrap()
}

/// Sends a request and reads the head of the response, without a byte of what follows.
pub async fn request(io: &mut impl Io, method: &str, path: &str, headers: &str) -> String {
    let headers: String = headers.lines().map(|line| format!("{}\r\n", line.trim())).collect();
    // A server that has had enough may close before it has read all.
    let _ = io.write_all(format!("{method} {path} HTTP/1.1\r\nHost: here\r\n{headers}\r\n").as_bytes()).await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match io.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

/// A SPDY client. Header blocks are stored, not compressed, which needs no dictionary.
pub struct Spdy<I> {
    pub io: I,
    begun: bool,
    /// What came on each stream, and whether it ended, by FIN (true) or RST_STREAM (false).
    pub received: HashMap<u32, Vec<u8>>,
    pub ended: HashMap<u32, bool>,
    pub goaway: Option<u32>,
}

impl Spdy<TcpStream> {
    /// Upgrades.
    pub async fn open(url: &str, version: &str) -> Self {
        let mut io = connect(url).await;
        let headers = format!("Connection: Upgrade\nUpgrade: SPDY/3.1\nX-Stream-Protocol-Version: {version}");
        let head = request(&mut io, "POST", parts(url).1, &headers).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.to_lowercase().contains(&format!("x-stream-protocol-version: {version}\r\n")), "{head}");
        Self::over(io)
    }
}

impl<I: Io> Spdy<I> {
    pub fn over(io: I) -> Self {
        Self { io, begun: false, received: HashMap::new(), ended: HashMap::new(), goaway: None }
    }

    pub async fn control(&mut self, kind: u16, payload: &[u8]) {
        let mut frame = [0x8003u16.to_be_bytes(), kind.to_be_bytes()].concat();
        frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        frame.extend_from_slice(payload);
        self.io.write_all(&frame).await.unwrap();
    }

    /// SYN_STREAM.
    pub async fn syn(&mut self, stream: u32, headers: &[(&str, &str)]) {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut payload = [stream.to_be_bytes(), [0; 4]].concat();
        payload.extend_from_slice(&[0, 0]);
        if !std::mem::replace(&mut self.begun, true) {
            payload.extend_from_slice(&[0x78, 0x01]);
        }
        payload.push(0);
        payload.extend_from_slice(&(plain.len() as u16).to_le_bytes());
        payload.extend_from_slice(&(!(plain.len() as u16)).to_le_bytes());
        payload.extend_from_slice(&plain);
        self.control(1, &payload).await;
    }

    pub async fn send(&mut self, stream: u32, bytes: &[u8], fin: bool) -> std::io::Result<()> {
        let length = u32::from(fin) << 24 | bytes.len() as u32;
        self.io.write_all(&[stream.to_be_bytes(), length.to_be_bytes()].concat()).await?;
        self.io.write_all(bytes).await
    }

    /// Reads one frame; false at the connection's end.
    pub async fn step(&mut self) -> bool {
        let mut head = [0; 8];
        if self.io.read_exact(&mut head).await.is_err() {
            return false;
        }
        let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let mut payload = vec![0; u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize];
        self.io.read_exact(&mut payload).await.unwrap();
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        match first {
            0x8003_0003 => _ = self.ended.entry(number(0)).or_insert(false),
            0x8003_0007 => self.goaway = Some(number(4)),
            _ if first >> 31 == 1 => {}
            stream => {
                self.received.entry(stream).or_default().extend_from_slice(&payload);
                if head[4] & 1 != 0 {
                    self.ended.insert(stream, true);
                }
            }
        }
        true
    }

    /// Reads until the connection's end.
    pub async fn finish(&mut self) {
        while self.goaway.is_none() && self.step().await {}
    }

    /// Opens a command's streams: error 1, stdin 3, stdout 5, and 7: stderr or resize.
    pub async fn streams(&mut self, last: &str) {
        for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, last)] {
            self.syn(stream, &[("streamtype", kind)]).await;
        }
    }

    /// Opens a forwarded connection: the error stream, then the data stream.
    pub async fn pair(&mut self, error: u32, port: u16) {
        let (port, request) = (port.to_string(), error.to_string());
        self.syn(error, &[("streamtype", "error"), ("port", &port), ("requestid", &request)]).await;
        self.syn(error + 2, &[("streamtype", "data"), ("port", &port), ("requestid", &request)]).await;
    }

    pub fn text(&self, stream: u32) -> String {
        String::from_utf8(self.received.get(&stream).cloned().unwrap_or_default()).unwrap()
    }
}

/// A WebSocket client.
pub struct WebSocket<I> {
    pub io: I,
}

impl WebSocket<TcpStream> {
    /// Upgrades.
    pub async fn open(url: &str, protocol: &str) -> Self {
        let mut io = connect(url).await;
        let mut headers =
            "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==".to_owned();
        if !protocol.is_empty() {
            headers += &format!("\nSec-WebSocket-Protocol: {protocol}");
        }
        let head = request(&mut io, "GET", parts(url).1, &headers).await;
        assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        assert_eq!(head.to_lowercase().contains("sec-websocket-protocol"), !protocol.is_empty(), "{head}");
        Self { io }
    }
}

impl<I: Io> WebSocket<I> {
    pub async fn frame(&mut self, first: u8, payload: &[u8]) {
        let mut frame = vec![first];
        match payload.len() {
            n @ 0..126 => frame.push(0x80 | n as u8),
            n @ 126..=0xffff => frame.extend([&[0xfe][..], &(n as u16).to_be_bytes()].concat()),
            n => frame.extend([&[0xff][..], &(n as u64).to_be_bytes()].concat()),
        }
        let mask = [1, 2, 3, 4];
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        self.io.write_all(&frame).await.unwrap();
    }

    pub async fn send(&mut self, payload: &[u8]) {
        self.frame(0x82, payload).await;
    }

    /// The next frame: its first byte and payload.
    pub async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = self.io.read_u8().await.ok()?;
        let length = match self.io.read_u8().await.ok()? {
            126 => u64::from(self.io.read_u16().await.ok()?),
            127 => self.io.read_u64().await.ok()?,
            short => u64::from(short),
        };
        let mut payload = vec![0; length as usize];
        self.io.read_exact(&mut payload).await.ok()?;
        Some((first, payload))
    }

    /// Everything until the Close: what came on each channel.
    pub async fn finish(&mut self) -> HashMap<u8, Vec<u8>> {
        let mut received: HashMap<u8, Vec<u8>> = HashMap::new();
        while let Some((first, payload)) = self.next().await {
            match first {
                0x88 => {
                    assert_eq!(payload, 1000u16.to_be_bytes());
                    break;
                }
                0x81 | 0x82 => received.entry(payload[0]).or_default().extend_from_slice(&payload[1..]),
                other => panic!("{other:x}"),
            }
        }
        received
    }
}
