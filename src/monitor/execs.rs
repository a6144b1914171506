//! Processes that run in containers beside their inits.
//!
//! Each is the child of a helper inside the container's PID namespace (see [`crate::oci::exec`]), which tells how it ended
//! and kills it with all it has started. An exec is answered when its program runs, and its end is an event. It lives no longer
//! than the connection that asked for it: the daemon's clients are gone with the daemon, and nobody would ever take what it says.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use crate::errchain::{Chain, Kind, Remote, links};
use crate::monitor::children::{Init, Phase, unknown};
use crate::monitor::clients::Caller;
use crate::monitor::creator::Answer;
use crate::monitor::pod::{Pod, Purpose};
use crate::monitor::requests::take;
use crate::monitor::runtime::{self, Made, Work};
use crate::monitor::say;
use crate::monitor_api::{self as api, Body, Call, ExecExited, ExecStarted};
use crate::oci::create::Stdio;
use crate::oci::exec::{self, ExecEvent};
use crate::plan::ExecPlan;
use crate::sys::process;

/// How an exec is reported whose helper was killed, as it is when the container ends: SIGKILL's 128 + 9.
const KILLED: i32 = 137;
/// How an exec is reported whose helper could not do its work.
const HELPER_FAILED: i32 = 128;
/// How often a kill is repeated that has not been followed by an end.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// An exec.
#[derive(Debug)]
pub struct Exec {
    /// A number that is never used again.
    pub serial: u32,
    /// Its name.
    pub id: String,
    /// Its container's number.
    pub container: u32,
    /// Where it stands.
    pub phase: ExecPhase,
    /// When its time is up; afterwards, when the kill is repeated.
    pub due: Option<Instant>,
    caller: Caller,
    /// Its caller's connection is gone, and it is being killed.
    orphaned: bool,
    timed_out: bool,
    killers: Vec<Caller>,
}

/// Where an exec stands.
#[derive(Debug)]
pub enum ExecPhase {
    /// A creator starts it.
    Creating(Caller),
    /// It runs.
    Running {
        /// Its helper as the host sees it.
        helper: Pid,
        /// The same, for good.
        helper_pidfd: OwnedFd,
        /// Where the helper tells of the end.
        control: OwnedFd,
    },
}

impl Pod {
    /// Begins to run a process in a container.
    pub fn exec(&mut self, caller: Caller, call: &Call, of: &api::Exec, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let (plan, stdin, stdout, stderr) = if of.stdin {
            let [plan, stdin, stdout, stderr] = take(call, fds)?;
            (plan, stdin, stdout, stderr)
        } else {
            let [plan, stdout, stderr] = take(call, fds)?;
            let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty());
            let null = null.map_err(|error| Remote::from_links(Kind::ResourceExhausted, vec!["cannot open /dev/null".into(), error.to_string()]))?;
            (plan, null, stdout, stderr)
        };
        let at = self.find(&of.container).ok_or_else(|| unknown(&of.container))?;
        let container = &self.containers[at];
        let Phase::Running(init) = &container.phase else { return Err(container.refusal()) };
        if container.stop.is_some() || container.removing {
            return Err(container.refusal());
        }
        if self.execs.iter().any(|exec| exec.id == of.id) {
            return Err(Remote::text(Kind::AlreadyExists, format!("exec {} exists", of.id)));
        }
        let decoded: ExecPlan = runtime::read(plan.as_fd())?;
        let due = (decoded.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(decoded.timeout_ms.min(u64::from(u32::MAX))));
        drop(decoded);
        let (container_serial, pid) = (container.serial, init.pid.as_raw_nonzero().get() as u32);
        let serial = self.next_serial();
        self.start_job(Purpose::Exec(serial), |pod| {
            let container = &pod.containers[at];
            let init = container.init().ok_or_else(|| container.refusal())?;
            let stdio = Stdio { stdin, stdout, stderr };
            let user = pod.sandbox.fds().user;
            Ok(Work::Exec { plan, container: container.plan.as_fd(), init: init.pidfd.as_fd(), pid, user, stdio })
        })?;
        let phase = ExecPhase::Creating(caller);
        self.execs.push(Exec {
            serial,
            id: of.id.clone(),
            container: container_serial,
            phase,
            due,
            caller,
            orphaned: false,
            timed_out: false,
            killers: Vec::new(),
        });
        Ok(())
    }

    /// Kills an exec; the caller is answered when it has ended.
    pub fn kill_exec(&mut self, caller: Caller, id: &str) -> Result<(), Remote> {
        match self.execs.iter().position(|exec| exec.id == id) {
            None => self.clients.answer(caller, Body::Done, Vec::new()),
            Some(at) => {
                self.execs[at].killers.push(caller);
                self.hurry_exec(at, Instant::now());
            }
        }
        Ok(())
    }

    /// An exec's creator has answered, or never will.
    pub fn exec_made(&mut self, serial: u32, answer: Option<Answer>) {
        process::trim_heap();
        let Some(at) = self.execs.iter().position(|exec| exec.serial == serial) else { return };
        let ExecPhase::Creating(caller) = self.execs[at].phase else { return };
        let result = match answer {
            Some((Made::Exec(made), fds)) => self.exec_runs(at, caller, &made, fds),
            Some((Made::Failed(error), _)) => Err(error),
            Some(_) | None if self.execs[at].timed_out => Err(Remote::text(Kind::DeadlineExceeded, "the exec's time was up before its program ran")),
            Some(_) | None => Err(Remote::text(Kind::Aborted, "the exec was ended before its program ran")),
        };
        if let Err(error) = result {
            let exec = self.execs.swap_remove(at);
            let error = self.blame_container(exec.container, error);
            self.clients.answer(caller, Body::Failed(error), Vec::new());
            for caller in exec.killers {
                self.clients.answer(caller, Body::Done, Vec::new());
            }
        }
    }

    /// An exec that failed in a container that has ended failed because of that, whatever its creator saw first.
    fn blame_container(&self, serial: u32, error: Remote) -> Remote {
        let lives = |init: &Init| {
            let mut ended = [PollFd::new(&init.pidfd, PollFlags::IN)];
            poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n == 0)
        };
        let container = self.containers.iter().find(|container| container.serial == serial);
        if container.and_then(|container| container.init()).is_some_and(lives) {
            return error;
        }
        let mut chain = links(&error);
        chain.insert(0, "the container has exited".into());
        Remote::from_links(Kind::FailedPrecondition, chain)
    }

    fn exec_runs(&mut self, at: usize, caller: Caller, made: &runtime::MadeExec, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let mut fds = fds.into_iter();
        let helper = i32::try_from(made.helper).ok().and_then(Pid::from_raw);
        let (Some(helper), Some(helper_pidfd), Some(control)) = (helper, fds.next(), fds.next()) else {
            return Err(Remote::text(Kind::Internal, "the exec's creator gave no process"));
        };
        // It may have ended already; the control socket tells.
        let _ = self.ended_early(helper);
        let exec = &mut self.execs[at];
        exec.phase = ExecPhase::Running { helper, helper_pidfd, control };
        self.clients.answer(caller, Body::ExecStarted(ExecStarted { pid: made.pid }), fds.collect());
        let container = exec.container;
        let over = !exec.killers.is_empty() || exec.orphaned || exec.timed_out;
        let lives = self.containers.iter().any(|c| c.serial == container && c.init().is_some());
        if over || !lives {
            self.hurry_exec(at, Instant::now());
        }
        Ok(())
    }

    /// An exec's helper may have said something.
    pub fn exec_ready(&mut self, serial: u32) {
        let Some(at) = self.execs.iter().position(|exec| exec.serial == serial) else { return };
        let ExecPhase::Running { control, .. } = &self.execs[at].phase else { return };
        match exec::event(control.as_fd()) {
            Ok(None) => {}
            Ok(Some(ExecEvent::Exited { code, .. })) => self.exec_ended(at, code),
            Ok(Some(ExecEvent::Failed(error))) => {
                say(format_args!("exec {}: {}", self.execs[at].id, Chain(&error)));
                self.exec_ended(at, HELPER_FAILED);
            }
            Err(_) => self.exec_ended(at, KILLED),
        }
    }

    /// Whether a child that ended was an exec's helper.
    pub fn helper_ended(&mut self, pid: Pid) -> bool {
        let is = |exec: &Exec| matches!(&exec.phase, ExecPhase::Running { helper, .. } if *helper == pid);
        let Some(serial) = self.execs.iter().find(|exec| is(exec)).map(|exec| exec.serial) else { return false };
        self.exec_ready(serial);
        if let Some(at) = self.execs.iter().position(|exec| exec.serial == serial) {
            self.exec_ended(at, KILLED);
        }
        true
    }

    fn exec_ended(&mut self, at: usize, code: i32) {
        let exec = self.execs.swap_remove(at);
        self.clients.tell(Body::ExecExited(ExecExited { id: exec.id, code, timed_out: exec.timed_out }));
        for caller in exec.killers {
            self.clients.answer(caller, Body::Done, Vec::new());
        }
    }

    /// Has an exec killed, with everything it started.
    pub fn hurry_exec(&mut self, at: usize, now: Instant) {
        let exec = &mut self.execs[at];
        exec.due = Some(now + KILL_AGAIN);
        match &exec.phase {
            ExecPhase::Creating(_) => {
                let serial = exec.serial;
                self.kill_job(Purpose::Exec(serial));
            }
            ExecPhase::Running { control, helper_pidfd, .. } => {
                if exec::kill(control.as_fd()).is_err() {
                    // It can't be told, so it is of no use any more; its end closes the control socket.
                    let _ = process::signal(helper_pidfd.as_fd(), libc::SIGKILL as u32);
                }
            }
        }
    }

    /// Kills the execs that nobody is there for any more.
    pub fn execs_orphaned(&mut self, now: Instant) {
        for at in 0..self.execs.len() {
            if !self.execs[at].orphaned && !self.clients.is_connected(self.execs[at].caller) {
                self.execs[at].orphaned = true;
                self.hurry_exec(at, now);
            }
        }
    }

    /// Kills the execs whose time is up, and again those that were killed and live.
    pub fn execs_due(&mut self, now: Instant) {
        for at in 0..self.execs.len() {
            let exec = &mut self.execs[at];
            if exec.due.is_some_and(|due| due <= now) {
                // Without a killer it is its own deadline that has passed, not that of a repeated kill.
                let container = exec.container;
                let killed = exec.orphaned || !exec.killers.is_empty();
                let lives = self.containers.iter().any(|c| c.serial == container && matches!(c.phase, Phase::Running(_)));
                self.execs[at].timed_out |= !killed && lives;
                self.hurry_exec(at, now);
            }
        }
    }
}
