//! The pod's own namespaces: made once, held as descriptors, let go when everything in them has ended.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::process::Pid;

use crate::errchain::{Kind, Remote};
use crate::monitor::children::Phase;
use crate::monitor::clients::Caller;
use crate::monitor::creator::Answer;
use crate::monitor::pod::{Pod, Purpose};
use crate::monitor::requests::take;
use crate::monitor::runtime::{Made, MadeSandbox, Work};
use crate::monitor::say;
use crate::monitor_api::{Body, Call, SandboxState};
use crate::oci::create::PodFds;
use crate::sys::process;

/// The sandbox.
#[derive(Debug, Default)]
pub struct Sandbox {
    made: bool,
    held: Held,
    /// Who waits for it to be made.
    creating: Vec<Caller>,
    /// It was stopped: nothing is started any more.
    pub stopped: bool,
    /// Who waits for it to have stopped.
    stopping: Vec<Caller>,
}

#[derive(Debug, Default)]
struct Held {
    net: Option<OwnedFd>,
    ipc: Option<OwnedFd>,
    uts: Option<OwnedFd>,
    pid: Option<OwnedFd>,
    staging: Option<OwnedFd>,
    user: Option<OwnedFd>,
    pause: Option<(Pid, OwnedFd)>,
}

impl Sandbox {
    /// What the daemon is told of it.
    pub fn state(&self) -> Option<SandboxState> {
        let pause_pid = self.held.pause.as_ref().map_or(0, |(pid, _)| pid.as_raw_nonzero().get() as u32);
        self.made.then_some(SandboxState { pause_pid })
    }

    /// Something of it has not been let go.
    pub fn lives(&self) -> bool {
        self.held.pause.is_some()
    }

    /// The namespaces that containers join.
    pub fn fds(&self) -> PodFds<'_> {
        let held = &self.held;
        PodFds {
            net: held.net.as_ref().map(AsFd::as_fd),
            ipc: held.ipc.as_ref().map(AsFd::as_fd),
            uts: held.uts.as_ref().map(AsFd::as_fd),
            pid: held.pid.as_ref().map(AsFd::as_fd),
            staging: held.staging.as_ref().map(AsFd::as_fd),
            user: held.user.as_ref().map(AsFd::as_fd),
            target: None,
        }
    }
}

impl Pod {
    /// Makes the sandbox, joins its making, or answers what was made.
    pub fn create_sandbox(&mut self, caller: Caller, call: &Call, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let [plan] = take(call, fds)?;
        if self.sandbox.stopped {
            return Err(Remote::text(Kind::FailedPrecondition, "the sandbox is stopped"));
        }
        if self.sandbox.made {
            return self.answer_sandbox(caller);
        }
        self.sandbox.creating.push(caller);
        if self.sandbox.creating.len() == 1 {
            self.start_job(Purpose::Sandbox, |_| Ok(Work::Sandbox { plan })).inspect_err(|_| self.sandbox.creating.clear())?;
        }
        Ok(())
    }

    fn answer_sandbox(&mut self, caller: Caller) -> Result<(), Remote> {
        let net =
            self.sandbox.held.net.as_ref().map(OwnedFd::try_clone).transpose().map_err(|error| {
                Remote::from_links(Kind::ResourceExhausted, vec!["cannot duplicate the network namespace".into(), error.to_string()])
            })?;
        let state = self.sandbox.state().unwrap_or_default();
        self.clients.answer(caller, Body::Sandbox(state), net.into_iter().collect());
        Ok(())
    }

    /// The sandbox's creator has answered, or never will.
    pub fn sandbox_made(&mut self, answer: Option<Answer>) {
        let result = match answer {
            Some((Made::Sandbox(made), fds)) => hold(&made, fds),
            Some((Made::Failed(error), _)) => Err(error),
            Some(_) | None => Err(Remote::text(Kind::Aborted, "the sandbox's creator was lost")),
        };
        let callers = std::mem::take(&mut self.sandbox.creating);
        let result = result.map(|held| {
            self.sandbox.made = true;
            self.sandbox.held = held;
        });
        let early = self.sandbox.held.pause.as_ref().map(|(pid, _)| *pid).and_then(|pid| self.ended_early(pid));
        for caller in callers {
            if let Err(error) = result.clone().and_then(|()| self.answer_sandbox(caller)) {
                self.clients.answer(caller, Body::Failed(error), Vec::new());
            }
        }
        if let Some(ended) = early {
            self.pause_ended(ended.pid);
        }
        if self.sandbox.stopped {
            self.kill_pause();
            self.sandbox_advance();
        }
    }

    /// Whether a child that ended was the pause process. Everything in its PID namespace has died with it.
    pub fn pause_ended(&mut self, pid: Pid) -> bool {
        if self.sandbox.held.pause.as_ref().is_none_or(|(pause, _)| *pause != pid) {
            return false;
        }
        self.sandbox.held.pause = None;
        if !self.sandbox.stopped {
            say(format_args!("the pause process has ended: the sandbox is stopped"));
            self.stop_sandbox(None);
        }
        self.sandbox_advance();
        true
    }

    /// Kills everything in the pod. The caller is answered when it is dead and reaped; the records of exits stay.
    pub fn stop_sandbox(&mut self, caller: Option<Caller>) {
        self.sandbox.stopped = true;
        self.sandbox.stopping.extend(caller);
        self.kill_job(Purpose::Sandbox);
        // From the last to the first: one that is given up before it is made leaves the table.
        for at in (0..self.containers.len()).rev() {
            match &self.containers[at].phase {
                Phase::Opening(..) | Phase::Creating(_) => self.advance_removal(at),
                Phase::Created(_) | Phase::Starting(..) | Phase::Running(_) => self.begin_stop(at, 0, Duration::ZERO),
                Phase::Undoing(..) | Phase::Exited(_) => {}
            }
        }
        self.kill_pause();
        self.sandbox_advance();
    }

    fn kill_pause(&self) {
        if let Some((_, pidfd)) = &self.sandbox.held.pause {
            let _ = process::signal(pidfd.as_fd(), libc::SIGKILL as u32);
        }
    }

    /// Lets the namespaces go once nothing needs them any more, and answers who waits for that.
    pub fn sandbox_advance(&mut self) {
        let ended = self.containers.iter().all(|container| matches!(container.phase, Phase::Exited(_)));
        if !self.sandbox.stopped || !ended || self.sandbox.held.pause.is_some() || self.has_job(Purpose::Sandbox) {
            return;
        }
        self.sandbox.held = Held::default();
        for caller in std::mem::take(&mut self.sandbox.stopping) {
            self.clients.answer(caller, Body::Done, Vec::new());
        }
    }
}

/// The descriptors of a sandbox by their names.
fn hold(made: &MadeSandbox, fds: Vec<OwnedFd>) -> Result<Held, Remote> {
    let wrong = || Remote::text(Kind::Internal, "the sandbox's creator gave other descriptors than it names");
    let mut fds = fds.into_iter();
    let mut next = |index: usize| match made.has.get(index) {
        Some(true) => fds.next().map(Some).ok_or_else(wrong),
        _ => Ok(None),
    };
    let (net, ipc, uts, pid, staging, user) = (next(0)?, next(1)?, next(2)?, next(3)?, next(4)?, next(5)?);
    let pause = match i32::try_from(made.pause_pid).ok().and_then(Pid::from_raw) {
        Some(pid) => Some((pid, fds.next().ok_or_else(wrong)?)),
        None => None,
    };
    Ok(Held { net, ipc, uts, pid, staging, user, pause })
}
