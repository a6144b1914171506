//! A server in this process, whose sessions are played by tasks.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use copepod::errchain::{Kind, Remote};
use copepod::stream::{AttachAsk, BoxFuture, Config, Control, ExecAsk, PortForwardAsk, Server, Sessions, Streams};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// What the sessions have done.
#[derive(Default)]
pub struct Seen {
    /// Controls that are there.
    pub live: AtomicUsize,
    /// Bytes that `flood` has got rid of.
    pub flooded: AtomicU64,
    /// Changes with each control that is dropped.
    pub changed: watch::Sender<()>,
}

/// Plays the sessions.
pub struct Actor(pub Arc<Seen>);

/// A world with a server in it.
pub struct World {
    pub server: Server,
    pub seen: Arc<Seen>,
}

pub fn config() -> Config {
    Config { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 0, tls: None, idle_timeout: Duration::from_secs(600), max_connections: 100 }
}

impl World {
    pub async fn new() -> Self {
        Self::with(config()).await
    }

    pub async fn with(config: Config) -> Self {
        let seen = Arc::new(Seen::default());
        let server = Server::start(config, Arc::new(Actor(Arc::clone(&seen)))).await.unwrap();
        Self { server, seen }
    }

    pub fn exec(&self, command: &[&str]) -> String {
        let command = command.iter().map(|part| part.to_string()).collect();
        self.server.exec_url(ExecAsk { container: "c".into(), command, stdin: true, stdout: true, stderr: true, tty: false }).unwrap()
    }

    pub fn terminal(&self, command: &str) -> String {
        let ask = ExecAsk { container: "c".into(), command: vec![command.into()], stdin: true, stdout: true, stderr: false, tty: true };
        self.server.exec_url(ask).unwrap()
    }

    pub fn attach(&self, container: &str) -> String {
        self.server.attach_url(AttachAsk { container: container.into(), stdin: true, stdout: true, stderr: true, tty: false }).unwrap()
    }

    pub fn forward(&self, ports: &[u16]) -> String {
        self.server.port_forward_url(PortForwardAsk { sandbox: "p".into(), ports: ports.to_vec() }).unwrap()
    }

    /// Returns when every control is dropped.
    pub async fn all_gone(&self) {
        let mut changed = self.seen.changed.subscribe();
        while self.seen.live.load(Ordering::SeqCst) > 0 {
            changed.changed().await.unwrap();
        }
    }
}

/// A process: a task, its exit code, and what it hears.
struct Process {
    task: JoinHandle<()>,
    exit: watch::Receiver<Option<i32>>,
    sizes: mpsc::UnboundedSender<(u16, u16)>,
    seen: Arc<Seen>,
}

impl Control for Process {
    fn resize(&mut self, width: u16, height: u16) {
        let _ = self.sizes.send((width, height));
    }

    fn ended(&mut self) -> BoxFuture<'_, Result<i32, Remote>> {
        Box::pin(async {
            let exit = self.exit.wait_for(Option::is_some).await.map_err(|_| Remote::text(Kind::Unavailable, "the monitor is gone"))?;
            Ok(exit.unwrap_or_default())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.task.abort();
        self.seen.live.fetch_sub(1, Ordering::SeqCst);
        self.seen.changed.send_replace(());
    }
}

/// The process's ends.
struct Ends {
    stdin: DuplexStream,
    stdout: DuplexStream,
    stderr: DuplexStream,
    sizes: mpsc::UnboundedReceiver<(u16, u16)>,
    seen: Arc<Seen>,
}

async fn play(command: Vec<String>, mut ends: Ends) -> i32 {
    match command[0].as_str() {
        "cat" => {
            let _ = tokio::io::copy(&mut ends.stdin, &mut ends.stdout).await;
            0
        }
        "both" => {
            let _ = ends.stdout.write_all(b"to stdout").await;
            let _ = ends.stderr.write_all(b"to stderr").await;
            command[1].parse().unwrap()
        }
        "flood" => loop {
            if ends.stdout.write_all(&[7; 4096]).await.is_err() {
                return 141;
            }
            ends.seen.flooded.fetch_add(4096, Ordering::Relaxed);
        },
        "size" => {
            while let Some((width, height)) = ends.sizes.recv().await {
                let _ = ends.stdout.write_all(format!("{width}x{height}\n").as_bytes()).await;
            }
            0
        }
        "deaf" => std::future::pending().await,
        other => panic!("{other}"),
    }
}

impl Actor {
    fn streams(&self, command: Vec<String>, stderr: bool) -> Streams {
        let (stdin, their_stdin) = duplex(4096);
        let (stdout, their_stdout) = duplex(4096);
        let (their_stderr, stderr_end) = duplex(4096);
        let (sizes, their_sizes) = mpsc::unbounded_channel();
        let (code, exit) = watch::channel(None);
        let ends = Ends { stdin: their_stdin, stdout: their_stdout, stderr: their_stderr, sizes: their_sizes, seen: Arc::clone(&self.0) };
        let task = tokio::spawn(async move {
            let exit = play(command, ends).await;
            code.send_replace(Some(exit));
        });
        self.0.live.fetch_add(1, Ordering::SeqCst);
        let control = Box::new(Process { task, exit, sizes, seen: Arc::clone(&self.0) });
        let stderr: Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>> = if stderr { Some(Box::new(stderr_end)) } else { None };
        Streams { stdin: Some(Box::new(stdin)), stdout: Some(Box::new(stdout)), stderr, control }
    }
}

impl Sessions for Actor {
    fn exec(&self, ask: ExecAsk) -> BoxFuture<'_, Result<Streams, Remote>> {
        Box::pin(async move {
            if ask.command[0] == "refused" {
                return Err(Remote::from_links(Kind::NotFound, vec!["cannot run the command".into(), "no such program".into()]));
            }
            Ok(self.streams(ask.command, !ask.tty))
        })
    }

    fn attach(&self, ask: AttachAsk) -> BoxFuture<'_, Result<Streams, Remote>> {
        Box::pin(async move { Ok(self.streams(ask.container.split(' ').map(String::from).collect(), true)) })
    }

    fn dial<'a>(&'a self, sandbox: &'a str, port: u16) -> BoxFuture<'a, Result<TcpStream, Remote>> {
        Box::pin(async move {
            assert_eq!(sandbox, "p");
            TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| Remote::text(Kind::Unavailable, error.to_string()))
        })
    }
}

/// All of a stream.
pub async fn rest(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    all
}
