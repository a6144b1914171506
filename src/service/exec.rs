//! Commands in running containers: how one is started, waited for and killed; and ExecSync, which collects its output.
//!
//! An exec lives as long as somebody wants it: a [`Running`] that is dropped before its end has the command killed, with
//! everything it has started. So does the pod's monitor when the daemon's connection ends, since nobody is left then.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use super::{Service, ServiceError, monitors, random_id};
use crate::errchain::Chain;
use crate::ids::SandboxId;
use crate::model::lifecycle::{Op, admit};
use crate::monitor_api::{self, Body, Call, ExecExited};
use crate::plan::{ExecPlan, Process};
use crate::store::record::ContainerRecord;

/// What waits for an exec's end.
pub struct Waiter {
    sandbox: SandboxId,
    ended: watch::Sender<Option<ExecExited>>,
}

/// How long output may still come after the command has ended: a child in the background may hold the pipe for ever.
pub(super) const DRAIN: Duration = Duration::from_millis(200);
/// What fails when an exec does.
const WHAT: &str = "cannot run the command";
/// How long the monitor may take to kill everything beyond the command's own deadline.
const KILLING: Duration = Duration::from_secs(30);

/// What a command said and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its stdout, cut at the bound.
    pub stdout: Vec<u8>,
    /// Its stderr, cut at the bound.
    pub stderr: Vec<u8>,
    /// Exit code; 128 + n where signal n ended it.
    pub code: i32,
}

/// One stream, read until its end; what is beyond the bound is dropped.
struct Collected {
    bytes: Vec<u8>,
    left: Arc<std::sync::atomic::AtomicU64>,
}

impl Collected {
    async fn read(&mut self, pipe: &mut pipe::Receiver) {
        use std::sync::atomic::Ordering;
        let mut chunk = vec![0; 32 << 10];
        loop {
            match pipe.read(&mut chunk).await {
                Ok(0) | Err(_) => return,
                Ok(n) => {
                    let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(n as u64)));
                    let room = taken.unwrap_or(0).min(n as u64) as usize;
                    self.bytes.extend_from_slice(&chunk[..room]);
                }
            }
        }
    }
}

/// An exec that was asked for. Dropped before its end, it is killed.
pub(super) struct Running {
    service: Arc<Service>,
    monitor: monitors::Monitor,
    name: String,
    /// The end, once it is known. Closed without one: the pod's monitor is gone.
    pub(super) end: watch::Receiver<Option<ExecExited>>,
    /// Kept until the command is dead.
    permit: Option<tokio::sync::OwnedSemaphorePermit>,
}

/// What is to run, and its ends of the streams.
pub(super) struct Command {
    /// The process.
    pub process: Process,
    /// Milliseconds; 0: for ever.
    pub timeout_ms: u64,
    /// Its stdin; `None`: /dev/null, or the terminal.
    pub stdin: Option<OwnedFd>,
    /// Its stdout and stderr; not used with a terminal.
    pub outputs: [OwnedFd; 2],
    /// Held until it is dead.
    pub permit: Option<tokio::sync::OwnedSemaphorePermit>,
}

impl Running {
    /// Waits for the end.
    pub(super) async fn ended(&mut self) -> Result<ExecExited, ServiceError> {
        let gone = |_| ServiceError::monitor(WHAT)(monitors::MonitorError::Gone);
        let ended = self.end.wait_for(Option::is_some).await.map_err(gone)?;
        ended.clone().ok_or_else(|| ServiceError::monitor(WHAT)(monitors::MonitorError::Gone))
    }

    fn kill(&self) -> Call {
        Call::KillExec(monitor_api::ExecId { id: self.name.clone() })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.service.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
        if self.end.borrow().is_some() {
            return;
        }
        let (monitor, call, permit) = (self.monitor.clone(), self.kill(), self.permit.take());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                match monitor.done_within(call, KILLING).await {
                    // A monitor that is gone has taken the container with it, or kills what its lost connection had started.
                    Ok(()) | Err(monitors::MonitorError::Gone) => {}
                    Err(error) => tracing::warn!(error = %Chain(&error), "a command whose client is gone can't be killed"),
                }
                drop(permit);
            });
        }
    }
}

impl Service {
    /// The facts of a container in which a command may run, and its pod's monitor.
    pub(super) fn running_container(&self, id: &str) -> Result<(Arc<super::Container>, Arc<ContainerRecord>, monitors::Monitor), ServiceError> {
        let container = self.find_container(id)?;
        let record = container.record();
        admit(record.phase(), Op::Exec).map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })?;
        let monitor = self.sandbox_of(&record)?.monitor().ok_or_else(|| ServiceError::NotReady { id: record.sandbox.to_string() })?;
        Ok((container, record, monitor))
    }

    /// Starts a command; its program runs when this returns. Beside it the master of its terminal, if it has one.
    pub(super) async fn start_exec(
        self: &Arc<Self>,
        record: &ContainerRecord,
        monitor: monitors::Monitor,
        command: Command,
    ) -> Result<(Running, Option<OwnedFd>), ServiceError> {
        let name: String = random_id()?[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let plan = ExecPlan { process: command.process, timeout_ms: command.timeout_ms };
        let sealed = monitors::seal("Exec", &plan).map_err(ServiceError::monitor(WHAT))?;
        let (ended, end) = watch::channel(None);
        let waiter = Waiter { sandbox: record.sandbox.clone(), ended };
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), waiter);
        // From here on whoever gives up, in whatever way, has it killed: behind the call, in the order of the monitor's queue.
        let running = Running { service: self.clone(), monitor, name: name.clone(), end, permit: command.permit };
        let call = Call::Exec(monitor_api::Exec { container: record.id.to_string(), id: name, stdin: command.stdin.is_some() });
        let fds = std::iter::once(sealed).chain(command.stdin).chain(command.outputs).collect();
        match running.monitor.call(call, fds).await.map_err(ServiceError::monitor(WHAT))? {
            (Body::ExecStarted(_), mut fds) => Ok((running, fds.pop())),
            _ => Err(ServiceError::monitor(WHAT)(monitors::MonitorError::Unexpected { call: "Exec" })),
        }
    }

    /// Runs `command` in a running container. `timeout` zero: without a limit. When `cancelled` resolves, or at the
    /// deadline, the command and everything it has started are killed.
    pub async fn exec_sync(
        self: &Arc<Self>,
        id: &str,
        command: Vec<String>,
        timeout: Duration,
        cancelled: oneshot::Receiver<()>,
    ) -> Result<ExecOutput, ServiceError> {
        super::session::check_command(&command)?;
        let (_, record, monitor) = self.running_container(id)?;
        let mut process = self.process_of(&record)?;
        process.args = command.iter().map(OsString::from).collect();
        process.terminal = false;
        let (mut out, out_theirs) = output_pipe()?;
        let (mut err, err_theirs) = output_pipe()?;
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let asked = Command { process, timeout_ms, stdin: None, outputs: [out_theirs, err_theirs], permit: None };
        let (mut running, _) = self.start_exec(&record, monitor, asked).await?;

        let left = Arc::new(std::sync::atomic::AtomicU64::new(self.config.runtime.exec_sync_max_output));
        let mut stdout = Collected { bytes: Vec::new(), left: left.clone() };
        let mut stderr = Collected { bytes: Vec::new(), left };
        let exited = {
            let reading = async { tokio::join!(stdout.read(&mut out), stderr.read(&mut err)) };
            tokio::pin!(reading);
            let waiting = wait(&mut running, cancelled, timeout);
            tokio::pin!(waiting);
            let mut drained = false;
            let exited = loop {
                tokio::select! {
                    exited = &mut waiting => break exited,
                    _ = &mut reading, if !drained => drained = true,
                }
            };
            if !drained {
                let _ = tokio::time::timeout(DRAIN, reading).await;
            }
            exited?
        };
        if exited.timed_out {
            return Err(ServiceError::ExecTimeout { command: command.join(" "), seconds: timeout.as_secs() });
        }
        Ok(ExecOutput { stdout: stdout.bytes, stderr: stderr.bytes, code: exited.code })
    }

    /// An exec has ended.
    pub(super) fn on_exec_exit(&self, exited: ExecExited) {
        if let Some(waiter) = self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(&exited.id) {
            waiter.ended.send_replace(Some(exited));
        }
    }

    /// A monitor's connection has ended, and with it every exec that was asked for on it.
    pub(super) fn on_execs_lost(&self, sandbox: &SandboxId) {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, waiter| waiter.sandbox != *sandbox);
    }
}

/// Waits for the end of an exec; kills it when its caller is gone.
async fn wait(running: &mut Running, cancelled: oneshot::Receiver<()>, timeout: Duration) -> Result<ExecExited, ServiceError> {
    // The monitor keeps the command's deadline; ours is for a monitor that doesn't answer.
    let limit = if timeout.is_zero() { Duration::from_secs(u64::from(u32::MAX)) } else { timeout.saturating_add(KILLING) };
    tokio::select! {
        ended = running.ended() => return ended,
        _ = cancelled => {}
        () = tokio::time::sleep(limit) => return Err(deadline(limit)),
    }
    running.monitor.done(running.kill()).await.map_err(ServiceError::monitor("cannot kill the command"))?;
    tokio::time::timeout(KILLING, running.ended()).await.map_err(|_| deadline(KILLING))?
}

fn deadline(after: Duration) -> ServiceError {
    ServiceError::monitor(WHAT)(monitors::MonitorError::Deadline { call: "Exec", after })
}

/// A pipe: our end, for tokio, and the process's.
pub(super) fn output_pipe() -> Result<(pipe::Receiver, OwnedFd), ServiceError> {
    let failed = |source| ServiceError::Host { what: "make", path: "a pipe".into(), source };
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    crate::sys::fd::set_nonblocking(&ours).map_err(failed)?;
    Ok((pipe::Receiver::from_owned_fd(ours).map_err(failed)?, theirs))
}
