//! ExecSync: a command in a running container, its output collected within a bound.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::{Service, ServiceError, monitors, random_id};
use crate::model::lifecycle::{Op, admit};
use crate::monitor_api::{self, Body, Call, ExecExited};
use crate::plan::ExecPlan;

/// What waits for an exec's end.
pub type Waiter = oneshot::Sender<ExecExited>;

/// How long output may still come after the command has ended: a child in the background may hold the pipe for ever.
const DRAIN: Duration = Duration::from_millis(200);
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

impl Service {
    /// Runs `command` in a running container. `timeout` zero: without a limit. When `cancelled` resolves, or at the
    /// deadline, the command and everything it has started are killed.
    pub async fn exec_sync(
        self: &Arc<Self>,
        id: &str,
        command: Vec<String>,
        timeout: Duration,
        cancelled: oneshot::Receiver<()>,
    ) -> Result<ExecOutput, ServiceError> {
        let container = self.find_container(id)?;
        let record = container.record();
        admit(record.phase(), Op::Exec).map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })?;
        let monitor = self.sandbox_of(&record)?.monitor().ok_or_else(|| ServiceError::NotReady { id: record.sandbox.to_string() })?;
        let mut process = self.plan_of(&record.id)?.process;
        process.args = command.iter().map(OsString::from).collect();
        process.terminal = false;
        let plan = ExecPlan { process, timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) };

        let name: String = random_id()?[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let (ended, end) = oneshot::channel();
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), ended);
        let _forget = Forget { service: self, name: &name };

        let what = "cannot run the command";
        let (mut out, out_theirs) = output_pipe()?;
        let (mut err, err_theirs) = output_pipe()?;
        let sealed = monitors::seal("Exec", &plan).map_err(ServiceError::monitor(what))?;
        let call = Call::Exec(monitor_api::Exec { container: record.id.to_string(), id: name.clone(), stdin: false });
        match monitor.call(call, vec![sealed, out_theirs, err_theirs]).await.map_err(ServiceError::monitor(what))? {
            (Body::ExecStarted(_), _) => {}
            _ => return Err(ServiceError::monitor(what)(monitors::MonitorError::Unexpected { call: "Exec" })),
        }

        let left = Arc::new(std::sync::atomic::AtomicU64::new(self.config.runtime.exec_sync_max_output));
        let mut stdout = Collected { bytes: Vec::new(), left: left.clone() };
        let mut stderr = Collected { bytes: Vec::new(), left };
        let exited = {
            let reading = async { tokio::join!(stdout.read(&mut out), stderr.read(&mut err)) };
            tokio::pin!(reading);
            let waiting = wait(&monitor, &name, end, cancelled, timeout);
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
            let _ = waiter.send(exited);
        }
    }
}

/// Waits for the end of an exec; kills it when its caller is gone.
async fn wait(
    monitor: &monitors::Monitor,
    name: &str,
    mut end: oneshot::Receiver<ExecExited>,
    cancelled: oneshot::Receiver<()>,
    timeout: Duration,
) -> Result<ExecExited, ServiceError> {
    let what = "cannot run the command";
    let gone = |_| ServiceError::monitor(what)(monitors::MonitorError::Gone);
    // The monitor keeps the command's deadline; ours is for a monitor that doesn't answer.
    let limit = if timeout.is_zero() { Duration::from_secs(u64::from(u32::MAX)) } else { timeout.saturating_add(KILLING) };
    tokio::select! {
        ended = &mut end => ended.map_err(gone),
        _ = cancelled => {
            monitor.done(Call::KillExec(monitor_api::ExecId { id: name.into() })).await.map_err(ServiceError::monitor("cannot kill the command"))?;
            tokio::time::timeout(KILLING, end).await.map_err(|_| deadline(KILLING))?.map_err(gone)
        }
        () = tokio::time::sleep(limit) => Err(deadline(limit)),
    }
}

fn deadline(after: Duration) -> ServiceError {
    ServiceError::monitor("cannot run the command")(monitors::MonitorError::Deadline { call: "Exec", after })
}

fn output_pipe() -> Result<(pipe::Receiver, OwnedFd), ServiceError> {
    let failed = |source| ServiceError::Host { what: "make", path: "a pipe".into(), source };
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    crate::sys::fd::set_nonblocking(&ours).map_err(failed)?;
    Ok((pipe::Receiver::from_owned_fd(ours).map_err(failed)?, theirs))
}

/// Takes a waiter out of the table however the exec ends.
struct Forget<'a> {
    service: &'a Service,
    name: &'a str,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.service.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(self.name);
    }
}
