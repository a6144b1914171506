//! A registry in the test's own process that does what the test wants, also what no registry should.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The first byte of a Range header.
    pub fn from(&self) -> Option<usize> {
        self.header("range").strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What to answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Stop after so many bytes of the body.
    pub stop: Option<usize>,
    /// When stopped: keep the connection open and say nothing more.
    pub hang: bool,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn stop_after(mut self, bytes: usize) -> Self {
        self.stop = Some(bytes);
        self
    }

    pub fn hang_after(mut self, bytes: usize) -> Self {
        self.hang = true;
        self.stop_after(bytes)
    }
}

/// A running server. Dropped, it stops.
pub struct Server {
    /// `127.0.0.1:PORT`.
    pub host: String,
    requests: Arc<Mutex<Vec<Request>>>,
    /// Connections that ended while an answer hung.
    pub given_up: Arc<tokio::sync::Semaphore>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", answer).await
    }

    pub async fn start_at(address: &str, answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let given_up = Arc::new(tokio::sync::Semaphore::new(0));
        let answer = Arc::new(answer);
        let (log, ended) = (Arc::clone(&requests), Arc::clone(&given_up));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(connection(stream, Arc::clone(&answer), Arc::clone(&log), Arc::clone(&ended)));
            }
        });
        Self { host, requests, given_up, task }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many requests have a path that holds `part`.
    pub fn count(&self, part: &str) -> usize {
        self.requests().iter().filter(|request| request.path.contains(part)).count()
    }

    pub fn forget(&self) {
        self.requests.lock().unwrap().clear();
    }
}

async fn connection(
    stream: TcpStream,
    answer: Arc<impl Fn(&Request) -> Answer>,
    log: Arc<Mutex<Vec<Request>>>,
    given_up: Arc<tokio::sync::Semaphore>,
) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream).await {
        log.lock().unwrap().push(request.clone());
        let answer = answer(&request);
        let mut head = format!("HTTP/1.1 {} X\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let end = answer.stop.unwrap_or(answer.body.len()).min(answer.body.len());
        if stream.write_all(head.as_bytes()).await.is_err() || stream.write_all(&answer.body[..end]).await.is_err() {
            return;
        }
        let _ = stream.flush().await;
        if answer.hang {
            // Ends when the client does.
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            given_up.add_permits(1);
            return;
        }
        if answer.stop.is_some() {
            return;
        }
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    if stream.read_line(&mut line).await.ok()? == 0 {
        return None;
    }
    let mut words = line.split_whitespace();
    let path = words.nth(1)?.to_string();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_string()),
            None => break,
        };
    }
    let mut body = vec![0; headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request { path, headers, body: String::from_utf8_lossy(&body).into_owned() })
}
