//! One run of one plugin: a process group of its own, a deadline, bounded output.
//!
//! A plugin that fails in any way takes its whole process group with it. One that succeeds may leave a daemon behind, if that
//! has let go of the plugin's output as daemons do; one that still holds it after a short grace is a failure. A process that
//! leaves the group (setsid(2)) and then hangs is out of reach here; its plugin's deadline holds all the same.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde::Deserialize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::conf::find;
use super::error::{CallError, PluginError};

/// Bytes of stdout that are taken; a result is a few hundred.
const MAX_STDOUT: usize = 1 << 20;
/// Bytes of stderr that are kept; the rest is read and dropped.
const MAX_STDERR: usize = 64 << 10;
/// Bytes of rubbish on stdout that an error shows.
const SHOWN: usize = 512;
/// How long the output of a plugin that has ended may stay open: what is in the pipe is read in much less.
const GRACE: Duration = Duration::from_secs(1);
/// How long a killed plugin may take to end: its last system call has to come back.
const REAP: Duration = Duration::from_secs(5);
/// How often, and after how long, a plugin's file that is being written (ETXTBSY) is tried again.
const BUSY_TRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// What is started.
#[derive(Debug)]
pub(super) struct Start {
    /// The plugin's type.
    pub(super) plugin: String,
    pub(super) bin_dirs: Vec<PathBuf>,
    /// CNI_* and nothing else: PATH is added here.
    pub(super) env: Vec<(&'static str, OsString)>,
}

/// A plugin that succeeded.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

/// A running plugin. Dropped before it has ended, it is killed with its group; tokio reaps it then.
struct Plugin {
    child: Child,
    group: Option<Pid>,
    /// Readable once the process has ended; it is a zombie until `child` is waited for, so that its number stays taken.
    ended: AsyncFd<OwnedFd>,
}

impl Plugin {
    /// Must be called before the leader is reaped: the group's number is the leader's.
    fn kill_group(&self) {
        if let Some(group) = self.group {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }

    /// Whether the process has ended well. It is not reaped.
    fn succeeded(&self) -> bool {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let status = rustix::process::waitid(WaitId::PidFd(self.ended.get_ref().as_fd()), look);
        matches!(status, Ok(Some(status)) if status.exit_status() == Some(0))
    }

    /// Waits for the process, which has ended or was killed. One that even SIGKILL doesn't end is left to tokio to reap.
    async fn reap(mut self) -> io::Result<ExitStatus> {
        let status = timeout(REAP, self.child.wait()).await??;
        self.group = None;
        Ok(status)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.kill_group();
    }
}

/// Runs a plugin to its end, `stdin` being its configuration.
pub(super) async fn run(start: Start, stdin: Vec<u8>, limit: Duration) -> Result<Output, CallError> {
    let deadline = Instant::now() + limit;
    let mut plugin =
        timeout_at(deadline, start_whole(Arc::new(start))).await.unwrap_or_else(|_| Err(CallError::Deadline { limit, stderr: String::new() }))?;
    let pipe = plugin.child.stdin.take();
    let (stdout, stderr) = (plugin.child.stdout.take(), plugin.child.stderr.take());
    let mut out = Capture::new(MAX_STDOUT);
    let mut err = Capture::new(MAX_STDERR);

    let outcome = timeout_at(deadline, async {
        // A plugin that doesn't read its configuration is judged by what it says, not by our broken pipe.
        let write = async {
            if let Some(mut pipe) = pipe {
                let _ = pipe.write_all(&stdin).await;
            }
            std::future::pending::<()>().await;
        };
        let end = async {
            let ended = plugin.ended.ready(Interest::READABLE).await.map(|_| ());
            // Success or not, what it wrote is in the pipes by now.
            sleep(GRACE).await;
            ended
        };
        let read = async { tokio::try_join!(out.fill(stdout, true), err.fill(stderr, false)) };
        tokio::select! {
            biased;
            read = read => read.map(|_| ()),
            ended = end => Err(ended.map_or_else(Stop::Follow, |()| Stop::LeftBehind)),
            () = write => Ok(()),
        }?;
        // Both pipes are closed; it may still run.
        plugin.ended.ready(Interest::READABLE).await.map(|_| ()).map_err(Stop::Follow)
    })
    .await
    .unwrap_or(Err(Stop::Deadline));

    if outcome.is_err() || !plugin.succeeded() {
        plugin.kill_group();
    }
    let status = plugin.reap().await;
    let stderr = err.text(MAX_STDERR);
    match outcome {
        Err(Stop::Deadline) => Err(CallError::Deadline { limit, stderr }),
        Err(Stop::TooMuch) => Err(CallError::TooMuch { limit: MAX_STDOUT, stderr }),
        Err(Stop::LeftBehind) => Err(CallError::LeftBehind { stderr }),
        Err(Stop::Follow(source)) => Err(CallError::Follow { source }),
        Ok(()) => judge(status.map_err(|source| CallError::Follow { source })?, out, stderr),
    }
}

/// Why a run is broken off.
enum Stop {
    Deadline,
    TooMuch,
    LeftBehind,
    Follow(io::Error),
}

/// Starts a plugin, again if its file is just being written.
async fn start_whole(start: Arc<Start>) -> Result<Plugin, CallError> {
    let mut tries = 0;
    loop {
        // Looking for a file and executing it wait for its disk: not on a worker.
        let starting = start.clone();
        let started = tokio::task::spawn_blocking(move || starting.now()).await;
        match started.unwrap_or_else(|error| Err(CallError::Follow { source: io::Error::other(error) })) {
            Err(CallError::Start { source, .. }) if source.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                tries += 1;
                sleep(BUSY_PAUSE).await;
            }
            started => return started,
        }
    }
}

impl Start {
    fn now(&self) -> Result<Plugin, CallError> {
        let path = find(&self.plugin, &self.bin_dirs).ok_or_else(|| CallError::NoPlugin { dirs: self.bin_dirs.clone() })?;
        let mut command = crate::sys::process::command(&path);
        command.env_clear().envs(self.env.iter().map(|(key, value)| (key, value))).env("PATH", path_variable());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/").process_group(0);
        let mut command = Command::from(command);
        command.kill_on_drop(true);
        let child = command.spawn().map_err(|source| CallError::Start { path, source })?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        // If this fails, dropping the child kills it; it has had no time to make others.
        let pidfd = crate::sys::process::pidfd_open(child.id().unwrap_or_default());
        let ended = pidfd.and_then(|pidfd| crate::sys::reactor::register(pidfd, Interest::READABLE));
        ended.map(|ended| Plugin { child, group, ended }).map_err(|source| CallError::Follow { source })
    }
}

/// The daemon's own PATH: plugins call iptables and the like.
fn path_variable() -> OsString {
    std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into())
}

/// What came out of one pipe, up to a limit.
struct Capture {
    bytes: Vec<u8>,
    limit: usize,
    cut: bool,
}

impl Capture {
    fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), limit, cut: false }
    }

    /// Reads to the end. With `stop`, breaks off at the limit; without, drops the rest.
    async fn fill(&mut self, pipe: Option<impl AsyncRead + Unpin>, stop: bool) -> Result<(), Stop> {
        let Some(mut pipe) = pipe else { return Ok(()) };
        let mut buffer = vec![0; 8 << 10];
        loop {
            let n = pipe.read(&mut buffer).await.map_err(Stop::Follow)?;
            if n == 0 {
                return Ok(());
            }
            let room = self.limit - self.bytes.len();
            self.bytes.extend_from_slice(&buffer[..n.min(room)]);
            if n > room {
                self.cut = true;
                if stop {
                    return Err(Stop::TooMuch);
                }
            }
        }
    }

    /// As text on one line, at most `limit` bytes of it.
    fn text(&self, limit: usize) -> String {
        let shown = &self.bytes[..self.bytes.len().min(limit)];
        let cut = self.cut || shown.len() < self.bytes.len();
        let text = String::from_utf8_lossy(shown);
        let text = text.trim().replace(|c: char| c.is_control() && c != '\n', " ").replace('\n', " | ");
        if cut { format!("{text}…") } else { text }
    }
}

/// What a plugin's end and its output mean.
fn judge(status: ExitStatus, out: Capture, stderr: String) -> Result<Output, CallError> {
    if status.success() {
        return Ok(Output { stdout: out.bytes, stderr });
    }
    match parse_error(&out.bytes) {
        Some((code, msg, details)) => Err(CallError::Refused(PluginError { code, msg, details, stderr })),
        None => {
            let status = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => status.to_string(),
            };
            Err(CallError::NoReason { status, stdout: out.text(SHOWN), stderr })
        }
    }
}

fn parse_error(printed: &[u8]) -> Option<(u64, String, String)> {
    #[derive(Deserialize)]
    struct Raw {
        code: u64,
        #[serde(default)]
        msg: String,
        #[serde(default)]
        details: String,
    }
    let raw: Raw = serde_json::from_slice(printed).ok()?;
    let cut = |text: String| text.chars().take(4096).collect();
    Some((raw.code, cut(raw.msg), cut(raw.details)))
}

/// The start of what a plugin printed, for an error.
pub(super) fn shown(stdout: &[u8]) -> String {
    Capture { bytes: stdout.to_vec(), limit: SHOWN, cut: false }.text(SHOWN)
}

/// The value of CNI_PATH.
pub(super) fn cni_path(bin_dirs: &[PathBuf]) -> OsString {
    std::env::join_paths(bin_dirs).unwrap_or_default()
}
