//! Sessions: commands and attachments whose streams a client has in its hand, and connections to ports of pods.
//!
//! What `stream` serves to clients. A session's bytes go between its pipes, or its terminal, and whoever reads and writes
//! [`Streams`]; no monitor is on their way. A session lives as long as its [`Control`]: dropped before its end it kills a command
//! and detaches from a container, which goes on.

mod streams;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use streams::{Input, Output};

use super::exec::{Command, Running, output_pipe};
use super::{Service, ServiceError, monitors};
use crate::errchain::{Kind, Remote};
use crate::monitor_api::{self as api, Call, FromClient, ToClient};
use crate::net::dial;
use crate::{sys, wire};

/// Bytes of a pipe between a container's output and an attached client: what it may be behind without holding the output back.
const ATTACH_PIPE: usize = 256 << 10;

/// A command to run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecAsk {
    /// The container's id.
    pub container: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The client will write to it.
    pub stdin: bool,
    /// The client will read its stdout.
    pub stdout: bool,
    /// The client will read its stderr. Not with a terminal, which has one stream.
    pub stderr: bool,
    /// It gets a terminal.
    pub tty: bool,
}

/// A container to attach to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachAsk {
    /// The container's id.
    pub container: String,
    /// The client will write to it.
    pub stdin: bool,
    /// The client will read its stdout.
    pub stdout: bool,
    /// The client will read its stderr.
    pub stderr: bool,
    /// The container has a terminal.
    pub tty: bool,
}

/// A session.
#[derive(Debug)]
pub struct Streams {
    /// Where the client's input goes, if it was asked for.
    pub stdin: Option<Input>,
    /// Where stdout comes from, if it was asked for; with a terminal, all output.
    pub stdout: Option<Output>,
    /// Where stderr comes from, if it was asked for.
    pub stderr: Option<Output>,
    /// The session itself.
    pub control: Control,
}

/// How many sessions of each sort a container may have at once.
#[derive(Debug)]
pub(super) struct Limits {
    execs: Arc<Semaphore>,
    attaches: Arc<Semaphore>,
}

impl Limits {
    pub(super) fn new(runtime: &crate::config::Runtime) -> Self {
        Self { execs: Arc::new(Semaphore::new(runtime.max_exec_sessions)), attaches: Arc::new(Semaphore::new(runtime.max_attach_sessions)) }
    }
}

/// A session's life. Dropped before [`Control::ended`] has answered, it kills a command with all it has started, and detaches from
/// a container.
pub struct Control(Session);

enum Session {
    Exec { running: Running, terminal: Option<Arc<streams::Terminal>> },
    Attach { socket: AsyncFd<OwnedFd>, end: Option<Option<Remote>>, _permit: OwnedSemaphorePermit },
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Control")
    }
}

impl Control {
    /// Gives the terminal another size, if there is one. Never waits; one that can't be told now keeps its size.
    pub fn resize(&self, columns: u16, rows: u16) {
        match &self.0 {
            Session::Exec { terminal: Some(terminal), .. } => {
                if let Err(error) = terminal.resize(columns, rows) {
                    tracing::debug!(%error, "a terminal keeps its size");
                }
            }
            Session::Exec { terminal: None, .. } => {}
            Session::Attach { socket, .. } => {
                let said = wire::encode(&FromClient::Resize(api::Resize { columns, rows }));
                if let Err(error) = sys::fd::try_send(socket.get_ref().as_fd(), &said, &[]) {
                    tracing::debug!(%error, "a container's terminal keeps its size");
                }
            }
        }
    }

    /// Waits for the session's end: a command's exit code (128 + n where signal n ended it); 0 when the container ended that was
    /// attached to. Outputs have their end shortly after it; what is left in them is read then. Can be asked again, and given up.
    ///
    /// # Errors
    /// Unavailable: the pod's monitor, or its stdio process, is gone, and nobody knows the code. ResourceExhausted: the client was
    /// detached, since it did not keep up with the container's output.
    pub async fn ended(&mut self) -> Result<i32, ServiceError> {
        match &mut self.0 {
            Session::Exec { running, .. } => running.ended().await.map(|exited| exited.code),
            Session::Attach { socket, end, .. } => {
                if end.is_none() {
                    *end = Some(last_word(socket).await);
                }
                match end.as_ref().and_then(Option::as_ref) {
                    None => Ok(0),
                    Some(error) => Err(ServiceError::Detached(error.clone())),
                }
            }
        }
    }
}

/// How an attachment ended; `None`: with the container.
async fn last_word(socket: &AsyncFd<OwnedFd>) -> Option<Remote> {
    let lost = || Some(Remote::text(Kind::Unavailable, "the pod's stdio process is gone"));
    loop {
        let Ok(mut ready) = socket.readable().await else { return lost() };
        match ready.try_io(|socket| sys::fd::receive(socket.as_fd(), api::MAX_MESSAGE)) {
            Ok(Ok(Some((bytes, _)))) => match wire::decode(&bytes) {
                Ok(ToClient::Ended(end)) => return end.error,
                // A newer monitor's word, of which this daemon knows nothing.
                Ok(ToClient::None) | Err(_) => {}
            },
            Ok(Ok(None) | Err(_)) => return lost(),
            Err(_would_block) => {}
        }
    }
}

impl Service {
    /// Whether a command may be run now, so that a request is refused before a client is sent anywhere; the container's whole id.
    ///
    /// # Errors
    /// InvalidArgument: the request itself. NotFound, FailedPrecondition: the container is not there, or does not run.
    pub fn admit_exec(&self, ask: &ExecAsk) -> Result<String, ServiceError> {
        check_command(&ask.command)?;
        check_streams(ask.stdin, ask.stdout, ask.stderr, ask.tty)?;
        if ask.tty && !ask.stdout {
            return Err(field("stdout", "false", "is not possible with tty: a terminal whose output nobody reads stops"));
        }
        self.running_container(&ask.container).map(|(_, record, _)| record.id.to_string())
    }

    /// Whether a connection to a pod may be made now; the sandbox's whole id.
    pub fn admit_port_forward(&self, sandbox: &str) -> Result<String, ServiceError> {
        self.ready_netns(sandbox).map(|(id, _)| id)
    }

    /// Starts a command for a client. It runs when this returns, without a time limit; given up before that, it is killed too.
    ///
    /// # Errors
    /// Those of [`Service::admit_exec`]; ResourceExhausted: too many run in the container; NotFound or InvalidArgument: its program
    /// or its user is not in the container.
    pub async fn exec_session(self: &Arc<Self>, ask: &ExecAsk) -> Result<Streams, ServiceError> {
        self.admit_exec(ask)?;
        let (container, record, monitor) = self.running_container(&ask.container)?;
        let permit = take(&container.sessions.execs, "exec", record.id.as_str(), self.config.runtime.max_exec_sessions)?;
        let mut process = self.process_of(&record)?;
        process.args = ask.command.iter().map(OsString::from).collect();
        process.terminal = ask.tty;
        process.terminal_size = (0, 0);
        if ask.tty && process.env_var("TERM").is_none() {
            process.env.push("TERM=xterm".into());
        }
        let piped = |wanted: bool| if wanted && !ask.tty { output_pipe().map(|(ours, theirs)| (Some(ours), theirs)) } else { Ok((None, null()?)) };
        let (stdout, stdout_theirs) = piped(ask.stdout)?;
        let (stderr, stderr_theirs) = piped(ask.stderr)?;
        let (stdin, stdin_theirs) = if ask.stdin && !ask.tty { input_pipe().map(|(ours, theirs)| (Some(ours), Some(theirs)))? } else { (None, None) };
        let command = Command { process, timeout_ms: 0, stdin: stdin_theirs, outputs: [stdout_theirs, stderr_theirs], permit: Some(permit) };
        let (running, master) = self.start_exec(&record, monitor, command).await?;
        let end = &running.end;
        if !ask.tty {
            let (stdout, stderr) = [stdout, stderr].map(|pipe| pipe.map(|pipe| Output::of_exec(pipe, end.clone()))).into();
            return Ok(Streams { stdin: stdin.map(Input::pipe), stdout, stderr, control: Control(Session::Exec { running, terminal: None }) });
        }
        let failed = |source| ServiceError::Host { what: "use", path: "the command's terminal".into(), source };
        let master = master.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let terminal = streams::Terminal::new(master).map_err(failed)?;
        Ok(Streams {
            stdin: ask.stdin.then(|| Input::terminal(terminal.clone())),
            stdout: Some(Output::of_terminal(terminal.clone(), end.clone())),
            stderr: None,
            control: Control(Session::Exec { running, terminal: Some(terminal) }),
        })
    }

    /// Whether a client may attach now; the container's whole id.
    ///
    /// # Errors
    /// InvalidArgument: the request itself. NotFound, FailedPrecondition: the container is not there, or does not run.
    pub fn admit_attach(&self, ask: &AttachAsk) -> Result<String, ServiceError> {
        check_streams(ask.stdin, ask.stdout, ask.stderr, ask.tty)?;
        let (_, record, _) = self.running_container(&ask.container)?;
        if ask.tty && !record.spec.tty {
            return Err(field("tty", "true", "is not what the container has: it was made without a terminal"));
        }
        Ok(record.id.to_string())
    }

    /// Attaches a client to a container. It gets the output from now on, and says what the container reads.
    ///
    /// # Errors
    /// Those of [`Service::admit_attach`]; ResourceExhausted: too many clients are attached.
    pub async fn attach_session(self: &Arc<Self>, ask: &AttachAsk) -> Result<Streams, ServiceError> {
        self.admit_attach(ask)?;
        let (container, record, monitor) = self.running_container(&ask.container)?;
        let permit = take(&container.sessions.attaches, "attach", record.id.as_str(), self.config.runtime.max_attach_sessions)?;
        let failed = |source| ServiceError::Host { what: "make", path: "a socket pair".into(), source };
        let (ours, theirs) = sys::fd::seqpacket_pair().map_err(failed)?;
        sys::fd::set_nonblocking(&ours).map_err(failed)?;
        let socket = sys::reactor::register(ours, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        let mut fds = vec![theirs];
        let stdin = ask.stdin.then(input_pipe).transpose()?.map(|(ours, theirs)| {
            fds.push(theirs);
            Input::pipe(ours)
        });
        let mut output = |wanted: bool| -> Result<Option<Output>, ServiceError> {
            if !wanted {
                return Ok(None);
            }
            let (ours, theirs) = output_pipe()?;
            // A system that allows no more than the default is content with that.
            let _ = rustix::pipe::fcntl_setpipe_size(&theirs, ATTACH_PIPE);
            fds.push(theirs);
            Ok(Some(Output::of_container(ours)))
        };
        let (stdout, stderr) = (output(ask.stdout)?, output(ask.stderr)?);
        let call = Call::Attach(api::Attach { container: record.id.to_string(), stdin: ask.stdin, stdout: ask.stdout, stderr: ask.stderr });
        match monitor.call(call, fds).await.map_err(ServiceError::monitor("cannot attach to the container"))? {
            (api::Body::Done, _) => {}
            _ => return Err(ServiceError::monitor("cannot attach to the container")(monitors::MonitorError::Unexpected { call: "Attach" })),
        }
        Ok(Streams { stdin, stdout, stderr, control: Control(Session::Attach { socket, end: None, _permit: permit }) })
    }

    /// Connects to a port on `localhost` in a pod: 127.0.0.1, then ::1. A pod on the host's network has the host's ports.
    ///
    /// # Errors
    /// NotFound, FailedPrecondition: the sandbox is not there, or not ready. Unavailable: nobody listens there.
    pub async fn dial(self: &Arc<Self>, sandbox: &str, port: u16) -> Result<TcpStream, ServiceError> {
        if port == 0 {
            return Err(field("port", "0", "is no port"));
        }
        let (_, netns) = self.ready_netns(sandbox)?;
        dial::localhost(netns, port).await.map_err(|source| ServiceError::Dial { sandbox: sandbox.into(), source })
    }

    /// A sandbox's whole id, and its network namespace if it has one of its own.
    fn ready_netns(&self, sandbox: &str) -> Result<(String, Option<PathBuf>), ServiceError> {
        let record = self.find_sandbox(sandbox)?.record();
        if record.ready() { Ok((record.id.to_string(), record.netns.clone())) } else { Err(ServiceError::NotReady { id: record.id.to_string() }) }
    }
}

fn field(field: &'static str, value: &str, reason: &'static str) -> ServiceError {
    ServiceError::Field { field, value: value.into(), reason, kind: Kind::InvalidArgument }
}

/// A command that can be executed, wherever it is.
pub(super) fn check_command(command: &[String]) -> Result<(), ServiceError> {
    if command.first().is_none_or(String::is_empty) {
        return Err(field("cmd", "", "names no program"));
    }
    match command.iter().find(|part| part.contains('\0')) {
        Some(part) => Err(field("cmd", part, "has a NUL byte")),
        None => Ok(()),
    }
}

/// As the CRI's ExecRequest and AttachRequest demand.
fn check_streams(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<(), ServiceError> {
    if tty && stderr {
        return Err(field("stderr", "true", "is not possible with tty: a terminal has one stream"));
    }
    if !(stdin || stdout || stderr) {
        return Err(field("stdin, stdout, stderr", "false", "must not all be false"));
    }
    Ok(())
}

fn take(semaphore: &Arc<Semaphore>, what: &'static str, id: &str, limit: usize) -> Result<OwnedSemaphorePermit, ServiceError> {
    semaphore.clone().try_acquire_owned().map_err(|_| ServiceError::TooMany { what, id: id.into(), limit })
}

fn null() -> Result<OwnedFd, ServiceError> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
    file.map(OwnedFd::from).map_err(|source| ServiceError::Host { what: "open", path: "/dev/null".into(), source })
}

/// A pipe: our end, for tokio, and the process's.
fn input_pipe() -> Result<(pipe::Sender, OwnedFd), ServiceError> {
    let failed = |source| ServiceError::Host { what: "make", path: "a pipe".into(), source };
    let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    crate::sys::fd::set_nonblocking(&ours).map_err(failed)?;
    Ok((pipe::Sender::from_owned_fd(ours).map_err(failed)?, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errchain::Kinded;

    #[test]
    fn streams_are_those_that_the_api_allows() {
        let check = |stdin, stdout, stderr, tty, refused: Option<&str>| {
            let got = check_streams(stdin, stdout, stderr, tty).err();
            assert_eq!(got.as_ref().map(Kinded::kind), refused.map(|_| Kind::InvalidArgument));
            assert!(got.is_none_or(|error| error.to_string().contains(refused.unwrap_or_default())));
        };
        check(true, true, true, false, None);
        check(true, true, false, true, None);
        check(false, false, true, false, None);
        check(false, true, true, true, Some("stderr"));
        check(false, false, false, false, Some("stdin, stdout, stderr"));
        check(false, false, false, true, Some("stdin, stdout, stderr"));
    }

    #[test]
    fn a_command_is_a_program_and_its_arguments() {
        let check = |command: &[&str], good: bool| {
            let command: Vec<String> = command.iter().map(|part| part.to_string()).collect();
            assert_eq!(check_command(&command).is_ok(), good, "{command:?}");
        };
        check(&["sh"], true);
        check(&["sh", "", "-c"], true);
        check(&[], false);
        check(&[""], false);
        check(&["sh", "a\0b"], false);
    }
}
