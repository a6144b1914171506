//! The daemon's side of a monitor: starting it, connecting to it, calling it.
//!
//! One task per connection owns the socket. Callers send it requests and wait for the answer with a deadline; events go to
//! the service. When the connection ends every caller gets [`MonitorError::Gone`], and the service decides whether the
//! monitor died.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use super::fault;
use crate::errchain::{Kind, Kinded, Remote};
use crate::ids::SandboxId;
use crate::monitor_api::{self as api, Body, Call, Hello, Message, ProtocolError, Request, Snapshot};
use crate::store::record::ProcessId;
use crate::sys;

/// Requests that wait for the socket, per monitor.
const QUEUE: usize = 64;

/// Why a call to a monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The program can't be started.
    #[error("cannot start monitor {path}")]
    Spawn {
        /// The program.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Its socket can't be reached.
    #[error("cannot connect to monitor at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The message can't be sent.
    #[error("cannot send {call} to the monitor")]
    Send {
        /// The call.
        call: &'static str,
        /// The cause.
        source: ProtocolError,
    },
    /// The plan can't be put into a memfd.
    #[error("cannot seal the plan for {call}")]
    Seal {
        /// The call.
        call: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The monitor said no.
    #[error("monitor cannot do {call}")]
    Failed {
        /// The call.
        call: &'static str,
        /// What it said.
        source: Remote,
    },
    /// The monitor answered something else than what was asked.
    #[error("monitor answered {call} with something else")]
    Unexpected {
        /// The call.
        call: &'static str,
    },
    /// No answer in time.
    #[error("monitor has not answered {call} within {} s", after.as_secs())]
    Deadline {
        /// The call.
        call: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended.
    #[error("the pod's monitor is gone")]
    Gone,
}

impl Kinded for MonitorError {
    fn kind(&self) -> Kind {
        match self {
            MonitorError::Failed { source, .. } => source.kind(),
            MonitorError::Deadline { .. } => Kind::DeadlineExceeded,
            MonitorError::Gone => Kind::Unavailable,
            _ => Kind::Internal,
        }
    }
}

/// What a connection tells the service.
#[derive(Debug)]
pub struct Event {
    /// The sandbox whose monitor it is.
    pub sandbox: SandboxId,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Debug)]
pub enum What {
    /// The monitor sent an event.
    Message(Body),
    /// The connection ended.
    Lost,
}

struct Outgoing {
    call: Call,
    fds: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<(Body, Vec<OwnedFd>), MonitorError>>,
}

/// A connected monitor.
#[derive(Debug, Clone)]
pub struct Monitor {
    calls: mpsc::Sender<Outgoing>,
    deadline: Duration,
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.call.name())
    }
}

/// How a monitor is started.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Deadline of one call.
    pub deadline: Duration,
}

/// Starts a monitor for the sandbox whose directory is `dir`, in the control group `cgroup` (empty: this process's), and greets it.
pub async fn start(
    program: &Program,
    sandbox: &SandboxId,
    dir: &Path,
    cgroup: &str,
    events: mpsc::UnboundedSender<Event>,
    began: impl FnOnce(ProcessId) -> Result<(), MonitorError>,
) -> Result<(Monitor, ProcessId), MonitorError> {
    let failed = |source| MonitorError::Spawn { path: program.path.clone(), source };
    let (ours, theirs) = sys::fd::seqpacket_pair().map_err(failed)?;
    let mut command = sys::process::command(&program.path);
    command.arg("--pod-dir").arg(dir).env_clear().stdin(theirs).stdout(std::process::Stdio::null());
    if !cgroup.is_empty() {
        command.arg("--cgroup").arg(cgroup);
    }
    let mut child = tokio::process::Command::from(command).spawn().map_err(failed)?;
    let pid = child.id().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let process = ProcessId { pid, start_time: sys::process::start_time(pid).map_err(failed)? };
    // Reaped when it ends, whoever has forgotten it by then.
    tokio::spawn(async move {
        let _ = child.wait().await;
    });
    began(process)?;
    let monitor = attach(ours, sandbox.clone(), events, program.deadline).map_err(failed)?;
    monitor.hello().await?;
    Ok((monitor, process))
}

/// Connects to the monitor of a sandbox that an earlier daemon started.
pub async fn connect(
    sandbox: &SandboxId,
    dir: &Path,
    deadline: Duration,
    events: mpsc::UnboundedSender<Event>,
) -> Result<(Monitor, Snapshot), MonitorError> {
    let path = dir.join(api::SOCKET);
    let failed = |source: io::Error| MonitorError::Connect { path: path.clone(), source };
    let socket = dial(dir).map_err(failed)?;
    let monitor = attach(socket, sandbox.clone(), events, deadline).map_err(failed)?;
    let snapshot = monitor.hello().await?;
    Ok((monitor, snapshot))
}

fn dial(dir: &Path) -> io::Result<OwnedFd> {
    // Through /proc/self/fd: the path of a state directory may be longer than a socket's address.
    let dir =
        rustix::fs::open(dir, rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    let address = SocketAddrUnix::new(format!("{}/{}", sys::fd::proc_path(dir.as_fd()), api::SOCKET))?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

fn attach(socket: OwnedFd, sandbox: SandboxId, events: mpsc::UnboundedSender<Event>, deadline: Duration) -> io::Result<Monitor> {
    sys::fd::set_nonblocking(&socket)?;
    let socket = sys::reactor::register(socket, Interest::READABLE | Interest::WRITABLE)?;
    let (calls, queue) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        serve(socket, queue, &sandbox, &events).await;
        let _ = events.send(Event { sandbox, what: What::Lost });
    });
    Ok(Monitor { calls, deadline })
}

async fn serve(socket: AsyncFd<OwnedFd>, mut queue: mpsc::Receiver<Outgoing>, sandbox: &SandboxId, events: &mpsc::UnboundedSender<Event>) {
    let mut waiting: HashMap<u32, Outgoing> = HashMap::new();
    let mut seq = 0u32;
    loop {
        tokio::select! {
            outgoing = queue.recv() => {
                // The last handle was dropped: the sandbox is gone.
                let Some(mut outgoing) = outgoing else { return };
                seq = seq.wrapping_add(1).max(1);
                let call = outgoing.call.name();
                let request = Request { seq, call: std::mem::take(&mut outgoing.call) };
                fault::point("before", call);
                let fds = std::mem::take(&mut outgoing.fds);
                match send(&socket, &request, &fds).await {
                    Ok(()) => {
                        fault::point("sent", call);
                        outgoing.call = request.call;
                        waiting.insert(seq, outgoing);
                    }
                    Err(source) => {
                        let broken = matches!(source, ProtocolError::Socket(_));
                        let _ = outgoing.reply.send(Err(MonitorError::Send { call, source }));
                        if broken { return }
                    }
                }
            }
            ready = socket.readable() => {
                let Ok(mut guard) = ready else { return };
                let Ok(received) = guard.try_io(|fd| sys::fd::receive(fd.as_fd(), api::MAX_MESSAGE)) else { continue };
                let (bytes, fds) = match received {
                    Ok(Some(packet)) => packet,
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(sandbox = %sandbox, %error, "monitor's socket failed");
                        return;
                    }
                };
                let message: Message = match api::decode(&bytes) {
                    Ok(message) => message,
                    Err(error) => {
                        tracing::error!(sandbox = %sandbox, error = %crate::errchain::Chain(&error), "monitor's message can't be read");
                        return;
                    }
                };
                if message.seq == 0 {
                    let _ = events.send(Event { sandbox: sandbox.clone(), what: What::Message(message.body) });
                } else if let Some(waiter) = waiting.remove(&message.seq) {
                    let call = waiter.call.name();
                    fault::point("answered", call);
                    let answer = match message.body {
                        Body::Failed(source) => Err(MonitorError::Failed { call, source }),
                        body => Ok((body, fds)),
                    };
                    let _ = waiter.reply.send(answer);
                }
            }
        }
    }
}

async fn send(socket: &AsyncFd<OwnedFd>, request: &Request, fds: &[OwnedFd]) -> Result<(), ProtocolError> {
    let bytes = api::encode(request)?;
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    loop {
        let mut guard = socket.writable().await.map_err(ProtocolError::Socket)?;
        match guard.try_io(|fd| sys::fd::try_send(fd.as_fd(), &bytes, &borrowed)) {
            Ok(sent) => return sent.map_err(ProtocolError::Socket),
            Err(_would_block) => {}
        }
    }
}

impl Monitor {
    /// Calls and waits for the answer, at most for the configured deadline.
    pub async fn call(&self, call: Call, fds: Vec<OwnedFd>) -> Result<(Body, Vec<OwnedFd>), MonitorError> {
        self.call_within(call, fds, self.deadline).await
    }

    /// Calls and waits for the answer, at most `within`.
    pub async fn call_within(&self, call: Call, fds: Vec<OwnedFd>, within: Duration) -> Result<(Body, Vec<OwnedFd>), MonitorError> {
        let name = call.name();
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.calls.send(Outgoing { call, fds, reply }).await.map_err(|_| MonitorError::Gone)?;
            answer.await.map_err(|_| MonitorError::Gone)?
        };
        tokio::time::timeout(within, exchange).await.map_err(|_| MonitorError::Deadline { call: name, after: within })?
    }

    /// Calls where the answer is that it is done.
    pub async fn done(&self, call: Call) -> Result<(), MonitorError> {
        self.done_within(call, self.deadline).await
    }

    /// Likewise, with a deadline of its own.
    pub async fn done_within(&self, call: Call, within: Duration) -> Result<(), MonitorError> {
        let name = call.name();
        match self.call_within(call, Vec::new(), within).await? {
            (Body::Done, _) => Ok(()),
            _ => Err(MonitorError::Unexpected { call: name }),
        }
    }

    /// Deadline of one call.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn hello(&self) -> Result<Snapshot, MonitorError> {
        let hello = Hello { version: api::VERSION, release: env!("CARGO_PKG_VERSION").into() };
        match self.call(Call::Hello(hello), Vec::new()).await? {
            (Body::Snapshot(snapshot), _) => Ok(snapshot),
            _ => Err(MonitorError::Unexpected { call: "Hello" }),
        }
    }
}

/// A plan in a sealed memfd.
pub fn seal<T: crate::wire::Wire>(call: &'static str, plan: &T) -> Result<OwnedFd, MonitorError> {
    sys::fd::sealed_memfd("plan", &crate::wire::encode(plan)).map_err(|source| MonitorError::Seal { call, source })
}

/// The process still lives: the same process, not another with its number, and not a zombie.
pub fn alive(process: ProcessId) -> bool {
    let Ok(pidfd) = sys::process::pidfd_open(process.pid) else { return false };
    // A pidfd is readable once the process has ended, reaped or not (pidfd_open(2)).
    let mut poll = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let ended = rustix::event::poll(&mut poll, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0);
    !ended && sys::process::start_time(process.pid).is_ok_and(|start| start == process.start_time)
}

/// Kills a process and waits until it is gone, at most ten seconds. One that is gone already is no error.
pub async fn kill(process: ProcessId) -> io::Result<()> {
    let Ok(pidfd) = sys::process::pidfd_open(process.pid) else { return Ok(()) };
    if !alive(process) {
        return Ok(());
    }
    match sys::process::signal(pidfd.as_fd(), libc::SIGKILL as u32) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let pidfd = sys::reactor::register(pidfd, Interest::READABLE)?;
    let ended = tokio::time::timeout(Duration::from_secs(10), pidfd.readable()).await;
    match ended {
        Ok(ready) => ready.map(drop),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {} did not end within 10 s of SIGKILL", process.pid))),
    }
}
