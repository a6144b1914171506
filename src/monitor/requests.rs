//! What the daemon asks for, one function for each call: may it be now, and what begins.
//!
//! An error that a function returns is the answer. A function that returns without one has answered, or has kept the caller
//! where the end of what it began will find it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::errchain::{Kind, Remote};
use crate::monitor::children::{Phase, unknown};
use crate::monitor::clients::{Asked, Caller};
use crate::monitor::execs::ExecPhase;
use crate::monitor::pod::{Pod, Purpose};
use crate::monitor::say;
use crate::monitor::stop::Stop;
use crate::monitor_api::{self as api, Body, Call, descriptors};
use crate::sys::process;

/// Exactly as many descriptors as the call takes.
pub fn take<const N: usize>(call: &Call, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], Remote> {
    descriptors(call, fds).map_err(|error| Remote::new(&error))
}

/// A signal's number as a message has it.
fn signal_number(number: u32) -> Result<u32, Remote> {
    if (1..=64).contains(&number) { Ok(number) } else { Err(Remote::text(Kind::InvalidArgument, format!("{number} is no signal"))) }
}

impl Pod {
    /// Serves what has come on a connection, and sends what waits for it.
    pub fn requests(&mut self, connection: u32) {
        for asked in self.clients.receive(connection) {
            self.request(asked);
        }
        self.clients.flush(connection);
    }

    fn request(&mut self, asked: Asked) {
        let Asked { caller, request, fds, greeted } = asked;
        let greets = matches!(request.call, Call::Hello(_));
        // What was read in the same turn as a greeting is behind it.
        if !greets && !greeted && !self.clients.is_client(caller) {
            say(format_args!("a connection is closed: {} before Hello", request.call.name()));
            self.clients.close(caller);
            return;
        }
        if let Err(error) = self.serve(caller, request.call, fds) {
            self.clients.answer(caller, Body::Failed(error), Vec::new());
        }
    }

    fn serve(&mut self, caller: Caller, call: Call, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        match &call {
            Call::None => Err(Remote::text(Kind::InvalidArgument, "a request without a call")),
            Call::Hello(hello) => self.hello(caller, hello),
            Call::CreateSandbox => self.create_sandbox(caller, &call, fds),
            Call::CreateContainer(of) => self.create_container(caller, &call, &of.id, fds),
            Call::StartContainer(of) => self.start_container(caller, &of.id),
            Call::StopContainer(of) => self.stop_container(caller, of),
            Call::SignalContainer(of) => self.signal_container(caller, of),
            Call::RemoveContainer(of) => self.remove_container(caller, &of.id),
            Call::Exec(of) => self.exec(caller, &call, of, fds),
            Call::Attach(of) => self.attach(caller, &call, of, fds),
            Call::KillExec(of) => self.kill_exec(caller, &of.id),
            Call::ReopenLog(of) => self.reopen_log(caller, &of.id),
            Call::StopSandbox => {
                self.stop_sandbox(Some(caller));
                Ok(())
            }
            Call::Exit => self.exit(caller),
            Call::Upgrade => Err(Remote::text(Kind::Unimplemented, "Upgrade is not built yet: a monitor runs until its pod is removed")),
        }
    }

    fn hello(&mut self, caller: Caller, hello: &api::Hello) -> Result<(), Remote> {
        if hello.version == 0 {
            return Err(Remote::text(Kind::InvalidArgument, "Hello without a version"));
        }
        self.clients.greet(caller);
        let snapshot = api::Snapshot {
            hello: api::Hello { version: api::VERSION.min(hello.version), release: env!("CARGO_PKG_VERSION").to_string() },
            sandbox: self.sandbox.state(),
            containers: self.containers.iter().filter_map(|container| container.state()).collect(),
            execs: self.execs.iter().filter(|exec| matches!(exec.phase, ExecPhase::Running { .. })).map(|exec| exec.id.clone()).collect(),
            log_bytes_dropped: self.link.bytes_lost(),
            stopped: self.sandbox.stopped,
        };
        self.clients.answer(caller, Body::Snapshot(snapshot), Vec::new());
        Ok(())
    }

    fn start_container(&mut self, caller: Caller, id: &str) -> Result<(), Remote> {
        let at = self.find(id).ok_or_else(|| unknown(id))?;
        let container = &self.containers[at];
        if !matches!(container.phase, Phase::Created(_)) || container.stop.is_some() || container.removing {
            return Err(container.refusal());
        }
        self.release(at, caller)
    }

    fn stop_container(&mut self, caller: Caller, of: &api::StopContainer) -> Result<(), Remote> {
        let Some(at) = self.find(&of.id) else {
            self.clients.answer(caller, Body::Done, Vec::new());
            return Ok(());
        };
        let grace = Duration::from_millis(of.grace_ms);
        let signal = if grace.is_zero() { of.signal } else { signal_number(of.signal)? };
        match &self.containers[at].phase {
            Phase::Opening(..) | Phase::Creating(_) | Phase::Undoing(..) => return Err(self.containers[at].refusal()),
            Phase::Exited(_) if self.containers[at].report.is_none() => self.clients.answer(caller, Body::Done, Vec::new()),
            Phase::Exited(_) => self.containers[at].stoppers.push(caller),
            Phase::Created(_) | Phase::Starting(..) | Phase::Running(_) => {
                self.containers[at].stoppers.push(caller);
                self.begin_stop(at, signal, grace);
            }
        }
        Ok(())
    }

    /// Stops a container that has an init, or hurries a stop under way.
    pub fn begin_stop(&mut self, at: usize, signal: u32, grace: Duration) {
        let now = Instant::now();
        let container = &mut self.containers[at];
        // An init that has executed nothing has nothing to put in order.
        let grace = if matches!(container.phase, Phase::Created(_)) { Duration::ZERO } else { grace };
        let act = match &mut container.stop {
            Some(stop) => stop.again(grace, now),
            None => {
                let (stop, act) = Stop::begin(grace, now);
                container.stop = Some(stop);
                act
            }
        };
        self.act(at, act, signal);
    }

    fn signal_container(&mut self, caller: Caller, of: &api::SignalContainer) -> Result<(), Remote> {
        let number = signal_number(of.signal)?;
        let container = &self.containers[self.find(&of.id).ok_or_else(|| unknown(&of.id))?];
        let init = container.init().ok_or_else(|| container.refusal())?;
        process::signal(std::os::fd::AsFd::as_fd(&init.pidfd), number).map_err(|error| {
            let kind = if error.kind() == std::io::ErrorKind::NotFound { Kind::FailedPrecondition } else { Kind::Internal };
            Remote::from_links(kind, vec![format!("cannot send signal {number} to container {}", of.id), error.to_string()])
        })?;
        self.clients.answer(caller, Body::Done, Vec::new());
        Ok(())
    }

    fn remove_container(&mut self, caller: Caller, id: &str) -> Result<(), Remote> {
        let Some(at) = self.find(id) else {
            self.clients.answer(caller, Body::Done, Vec::new());
            return Ok(());
        };
        self.containers[at].removing = true;
        self.containers[at].removers.push(caller);
        self.advance_removal(at);
        Ok(())
    }

    fn reopen_log(&mut self, caller: Caller, id: &str) -> Result<(), Remote> {
        let at = self.find(id).ok_or_else(|| unknown(id))?;
        let container = &mut self.containers[at];
        if !matches!(container.phase, Phase::Running(_)) {
            return Err(container.refusal());
        }
        container.reopeners.push(caller);
        self.link.reopen(container.log);
        Ok(())
    }

    fn exit(&mut self, caller: Caller) -> Result<(), Remote> {
        let lives = |phase: &Phase| !matches!(phase, Phase::Exited(_));
        if let Some(container) = self.containers.iter().find(|container| lives(&container.phase)) {
            return Err(Remote::from_links(Kind::FailedPrecondition, vec!["the monitor holds a container".into(), container.refusal().to_string()]));
        }
        if self.sandbox.lives() || self.has_job(Purpose::Sandbox) {
            return Err(Remote::text(Kind::FailedPrecondition, "the sandbox is not stopped"));
        }
        self.leave(caller);
        Ok(())
    }
}
