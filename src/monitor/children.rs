//! The monitor's table: what a container is at any moment, and the record of its end.
//!
//! ```text
//!   Opening ─▶ Creating ─▶ Created ─▶ Starting ─▶ Running ─▶ Exited ─▶ (removed)
//!                 │           └──────────┴──────────────────▶│
//!                 └─▶ Undoing ─▶ (gone)
//! ```
//! Opening waits for the stdio process, Creating and Undoing for a creator, Starting for init's answer. Types and what can
//! be said of them; what moves a container along is in [`crate::monitor::containers`].

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};

use crate::errchain::{Kind, Remote};
use crate::monitor::clients::Caller;
use crate::monitor::stop::Stop;
use crate::monitor_api::{ContainerState, ExitRecord};
use crate::oci::create::Stdio;
use crate::plan::ResolvedUser;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// A number that is never used again; names it where its id would be copied.
    pub serial: u32,
    /// Its id.
    pub id: String,
    /// Its plan, sealed: kept as the kernel's memory, read by creators.
    pub plan: OwnedFd,
    /// Where its end is recorded.
    pub exit_file: OwnedFd,
    /// Its control group.
    pub cgroup: String,
    /// Its processes don't die with its init: it has no PID namespace of its own.
    pub shares_pids: bool,
    /// The container whose namespaces it joins.
    pub target: Option<String>,
    /// Its log's number.
    pub log: u32,
    /// Who init runs as.
    pub user: ResolvedUser,
    /// Nanoseconds since the epoch; 0: not started.
    pub started_at: u64,
    /// Why its program could not be executed, known before init is reaped.
    pub start_error: Option<Remote>,
    /// Where it stands.
    pub phase: Phase,
    /// The stop under way.
    pub stop: Option<Stop>,
    /// Who waits for its end.
    pub stoppers: Vec<Caller>,
    /// It is being removed.
    pub removing: bool,
    /// Who waits for that.
    pub removers: Vec<Caller>,
    /// Who waits for a new log file, in the order asked.
    pub reopeners: Vec<Caller>,
    /// Who waits for a client to be attached, in the order asked.
    pub attachers: Vec<Caller>,
    /// Its end is recorded and not told yet: its last output is on its way to the log. Told then at the latest.
    pub report: Option<Instant>,
    /// How many of its processes the kernel's OOM killer had ended when it was reaped.
    pub ooms: u64,
}

/// Where a container stands.
#[derive(Debug)]
pub enum Phase {
    /// Its log is being opened.
    Opening(Caller, Stdio),
    /// A creator makes it.
    Creating(Caller),
    /// What a creator that was lost had made is being removed.
    Undoing(Caller, Remote),
    /// Init waits to be released.
    Created(Init),
    /// Init was released and has not answered.
    Starting(Init, Caller),
    /// Its program runs.
    Running(Init),
    /// Init has ended.
    Exited(ExitRecord),
}

/// A container's first process.
#[derive(Debug)]
pub struct Init {
    /// As the host sees it.
    pub pid: Pid,
    /// The same, for good.
    pub pidfd: OwnedFd,
    /// The socket by which it is released.
    pub start: Option<OwnedFd>,
}

impl Container {
    /// Its first process, where it has one that lives.
    pub fn init(&self) -> Option<&Init> {
        match &self.phase {
            Phase::Created(init) | Phase::Starting(init, _) | Phase::Running(init) => Some(init),
            Phase::Opening(..) | Phase::Creating(_) | Phase::Undoing(..) | Phase::Exited(_) => None,
        }
    }

    /// It exists for the daemon: its creation was answered.
    pub fn state(&self) -> Option<ContainerState> {
        let exit = match &self.phase {
            Phase::Opening(..) | Phase::Creating(_) | Phase::Undoing(..) => return None,
            Phase::Created(_) | Phase::Starting(..) | Phase::Running(_) => None,
            Phase::Exited(record) => Some(record.clone()),
        };
        let pid = self.init().map_or(0, |init| init.pid.as_raw_nonzero().get() as u32);
        Some(ContainerState { id: self.id.clone(), pid, user: self.user.clone(), started_at: self.started_at, exit })
    }

    /// That it is not where a call needs it.
    pub fn refusal(&self) -> Remote {
        let what = match &self.phase {
            Phase::Opening(..) | Phase::Creating(_) => "is being created",
            Phase::Undoing(..) => "could not be created and is being removed",
            _ if self.removing => "is being removed",
            Phase::Created(_) if self.stop.is_none() => "has not been started",
            Phase::Starting(..) if self.stop.is_none() => "is being started",
            Phase::Running(_) if self.stop.is_none() => "is running",
            Phase::Created(_) | Phase::Starting(..) | Phase::Running(_) => "is being stopped",
            Phase::Exited(_) => "has exited",
        };
        Remote::text(Kind::FailedPrecondition, format!("container {} {what}", self.id))
    }
}

/// That there is no such container.
pub fn unknown(id: &str) -> Remote {
    Remote::text(Kind::NotFound, format!("there is no container {id}"))
}

/// Nanoseconds since the epoch.
pub fn wall_clock() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    (now.tv_sec.max(0) as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}
