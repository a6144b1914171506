//! How a container moves through its phases: created, released, ended, removed.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

use crate::errchain::{Kind, Remote};
use crate::ids::ContainerId;
use crate::monitor::children::{Container, Init, Phase, unknown, wall_clock};
use crate::monitor::clients::Caller;
use crate::monitor::creator::Answer;
use crate::monitor::execs::ExecPhase;
use crate::monitor::pod::{Pod, Purpose};
use crate::monitor::requests::take;
use crate::monitor::runtime::{self, Made, Work};
use crate::monitor::say;
use crate::monitor::stdio::link::{self, Reads};
use crate::monitor::stop::{Act, Stop};
use crate::monitor_api::{Body, Call, Created, ExitRecord, Started, exit_record};
use crate::oci::create::Stdio;
use crate::oci::handshake::{self, Outcome};
use crate::plan::{ContainerPlan, Namespace, ResolvedUser};
use crate::sys::process::{self, Ended};

/// How long an exit may wait to be told for the last output to reach the log. Long enough for a log that is well, and a
/// moment for one that is not: kubelet reads the log's end as soon as it knows of the exit.
const LAST_OUTPUT: Duration = Duration::from_millis(100);

/// How an init is reported whose program was never executed.
const START_FAILED: i32 = 128;

/// The monitor's ends of a container's streams, and the container's.
struct Streams {
    outputs: Vec<OwnedFd>,
    reads: Reads,
    theirs: Stdio,
}

impl Pod {
    /// The place of a container in the table.
    pub fn find(&self, id: &str) -> Option<usize> {
        self.containers.iter().position(|container| container.id == id)
    }

    fn of_serial(&self, serial: u32) -> Option<usize> {
        self.containers.iter().position(|container| container.serial == serial)
    }

    fn of_log(&self, log: u32) -> Option<usize> {
        self.containers.iter().position(|container| container.log == log)
    }

    /// Begins to make a container: first its log is opened.
    pub fn create_container(&mut self, caller: Caller, call: &Call, id: &str, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let [plan_fd, exit_file] = take(call, fds)?;
        ContainerId::parse(id).map_err(|error| Remote::text(Kind::InvalidArgument, error.to_string()))?;
        if let Some(at) = self.find(id) {
            return Err(match self.containers[at].state() {
                Some(_) => Remote::text(Kind::AlreadyExists, format!("container {id} exists")),
                None => self.containers[at].refusal(),
            });
        }
        if self.sandbox.stopped {
            return Err(Remote::text(Kind::FailedPrecondition, "the sandbox is stopped"));
        }
        let plan: ContainerPlan = runtime::read(plan_fd.as_fd())?;
        if plan.id != id {
            return Err(Remote::text(Kind::InvalidArgument, format!("the plan is of container {:?}, not {id:?}", plan.id)));
        }
        let streams = open_streams(&plan).map_err(|error| {
            Remote::from_links(Kind::ResourceExhausted, vec![format!("cannot open the streams of container {id}"), error.to_string()])
        })?;
        let log = self.link.open(plan.log.clone(), streams.outputs, streams.reads).map_err(|error| link::cannot_start(&error))?;
        let namespaces = &plan.namespaces;
        let joined = [&namespaces.pid, &namespaces.net, &namespaces.ipc, &namespaces.uts];
        let target = joined.into_iter().find_map(|from| if let Namespace::Container(id) = from { Some(id.clone()) } else { None });
        let serial = self.next_serial();
        self.containers.push(Container {
            serial,
            id: id.to_string(),
            plan: plan_fd,
            exit_file,
            cgroup: plan.cgroup.path,
            shares_pids: plan.namespaces.pid != Namespace::Private,
            target,
            log,
            user: ResolvedUser::default(),
            started_at: 0,
            start_error: None,
            phase: Phase::Opening(caller, streams.theirs),
            stop: None,
            stoppers: Vec::new(),
            removing: false,
            removers: Vec::new(),
            reopeners: Vec::new(),
            attachers: Vec::new(),
            report: None,
            ooms: 0,
        });
        Ok(())
    }

    /// A container's log is open, or can't be: the creator begins, or nothing was begun.
    pub fn log_opened(&mut self, log: u32, result: Result<(), Remote>) {
        let Some(at) = self.of_log(log) else { return };
        let Phase::Opening(caller, _) = &self.containers[at].phase else { return };
        let caller = *caller;
        if let Err(error) = result.and_then(|()| self.begin_creating(at, caller)) {
            self.forget(at, Some((caller, error)));
        }
    }

    fn begin_creating(&mut self, at: usize, caller: Caller) -> Result<(), Remote> {
        let container = &mut self.containers[at];
        let serial = container.serial;
        let Phase::Opening(_, stdio) = std::mem::replace(&mut container.phase, Phase::Creating(caller)) else { return Ok(()) };
        self.start_job(Purpose::Create(serial), |pod| {
            let container = &pod.containers[at];
            let mut held = pod.sandbox.fds();
            if let Some(id) = &container.target {
                let target = pod.containers.iter().find(|other| other.id == *id).ok_or_else(|| unknown(id))?;
                held.target = Some(target.init().ok_or_else(|| target.refusal())?.pidfd.as_fd());
            }
            Ok(Work::Create { plan: container.plan.as_fd(), pod: held, stdio })
        })
    }

    /// A container's creator has answered, or never will.
    pub fn container_made(&mut self, serial: u32, answer: Option<Answer>) {
        let Some(at) = self.of_serial(serial) else { return };
        let container = &mut self.containers[at];
        let Phase::Creating(caller) = container.phase else { return };
        let (made, fds) = match answer {
            Some((Made::Container(made), fds)) => (made, fds),
            // The creator has removed what it had made.
            Some((Made::Failed(error), _)) => return self.forget(at, Some((caller, error))),
            Some(_) | None => {
                let why = if container.removing || self.sandbox.stopped { "was removed while it was being created" } else { "lost its creator" };
                container.phase = Phase::Undoing(caller, Remote::text(Kind::Aborted, format!("container {} {why}", container.id)));
                return self.begin_delete(at);
            }
        };
        let mut fds = fds.into_iter();
        let (pidfd, start, console) = (fds.next(), fds.next(), fds.next());
        let (Some(pid), Some(pidfd)) = (i32::try_from(made.pid).ok().and_then(Pid::from_raw), pidfd) else {
            let error = Remote::text(Kind::Internal, format!("the creator of container {} gave no process", container.id));
            container.phase = Phase::Undoing(caller, error);
            return self.begin_delete(at);
        };
        container.user = made.user.clone();
        container.phase = Phase::Created(Init { pid, pidfd, start });
        self.begin_counting_ooms(at);
        let container = &self.containers[at];
        if let Some(console) = console {
            self.link.attach(container.log, console);
        }
        // The plan that was decoded for a moment is the largest thing a monitor ever holds.
        process::trim_heap();
        if container.removing || self.sandbox.stopped {
            let error = Remote::text(Kind::Aborted, format!("container {} was removed while it was being created", container.id));
            self.clients.answer(caller, Body::Failed(error), Vec::new());
            self.begin_stop(at, 0, Duration::ZERO);
        } else {
            self.clients.answer(caller, Body::Created(Created { pid: made.pid, user: made.user }), Vec::new());
        }
        if let Some(ended) = self.ended_early(pid) {
            self.init_ended(at, ended);
        }
    }

    /// Lets a created container's init go on.
    pub fn release(&mut self, at: usize, caller: Caller) -> Result<(), Remote> {
        let container = &mut self.containers[at];
        let Some(start) = container.init().and_then(|init| init.start.as_ref()) else { return Err(container.refusal()) };
        handshake::release(start.as_fd())
            .map_err(|error| Remote::from_links(Kind::Internal, vec![format!("cannot release container {}", container.id), error.to_string()]))?;
        let serial = container.serial;
        if let Phase::Created(init) = std::mem::replace(&mut container.phase, Phase::Creating(caller)) {
            container.phase = Phase::Starting(init, caller);
        }
        self.start_ready(serial);
        Ok(())
    }

    /// A released init may have said how it went.
    pub fn start_ready(&mut self, serial: u32) {
        let Some(at) = self.of_serial(serial) else { return };
        let container = &mut self.containers[at];
        let Phase::Starting(init, caller) = &mut container.phase else { return };
        let Some(start) = &init.start else { return };
        match handshake::outcome(start.as_fd()) {
            Ok(None) => {}
            Ok(Some(Outcome::Executed)) => {
                let caller = *caller;
                container.started_at = wall_clock();
                init.start = None;
                if let Phase::Starting(init, _) = std::mem::replace(&mut container.phase, Phase::Creating(caller)) {
                    container.phase = Phase::Running(init);
                }
                self.clients.answer(caller, Body::Started(Started { started_at: self.containers[at].started_at }), Vec::new());
            }
            // Kept for the record: init is ending, and its end is answered.
            Ok(Some(Outcome::Failed(error))) => {
                init.start = None;
                container.start_error = Some(error);
            }
            Err(error) => {
                init.start = None;
                let chain = vec![format!("cannot learn how the start of container {} went", container.id), error.to_string()];
                container.start_error = Some(Remote::from_links(Kind::Internal, chain));
                self.begin_stop(at, 0, Duration::ZERO);
            }
        }
    }

    /// A container's init was reaped: record first, then everybody who waits.
    pub fn init_ended(&mut self, at: usize, ended: Ended) {
        // At once: the group may be about to go.
        let oom_killed = self.ran_out_of_memory(at);
        let serial = self.containers[at].serial;
        self.start_ready(serial);
        let container = &mut self.containers[at];
        let mut start_error = container.start_error.take();
        let mut waiting = None;
        if let Phase::Starting(_, caller) = container.phase {
            let error = start_error
                .get_or_insert_with(|| Remote::text(Kind::Aborted, format!("container {} was ended before its program was executed", container.id)));
            waiting = Some((caller, error.clone()));
        }
        let failed = start_error.is_some() && ended.signal == 0;
        let record = ExitRecord {
            container: container.id.clone(),
            started_at: container.started_at,
            finished_at: wall_clock(),
            code: if failed { START_FAILED } else { ended.code },
            signal: ended.signal,
            oom_killed,
            start_error,
        };
        let bytes = exit_record::encode(&record);
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(&container.exit_file, &bytes, 0)) {
            Ok(n) if n == bytes.len() => {}
            Ok(n) => say(format_args!("container {}: {n} of {} bytes of its exit were written", container.id, bytes.len())),
            Err(error) => say(format_args!("container {}: cannot write its exit: {error}", container.id)),
        }
        let stopped = container.stop.take().is_some();
        container.phase = Phase::Exited(record);
        container.report = Some(Instant::now() + LAST_OUTPUT);
        let (log, shares_pids) = (container.log, container.shares_pids);
        if let Some((caller, error)) = waiting {
            self.clients.answer(caller, Body::Failed(error), Vec::new());
        }
        if stopped && shares_pids {
            self.kill_group(at);
        }
        self.end_execs_of(serial);
        self.link.drain(log);
        if self.containers[at].removing {
            self.advance_removal(at);
        }
        self.sandbox_advance();
    }

    /// A container's last output is in its log.
    pub fn log_drained(&mut self, log: u32) {
        if let Some(at) = self.of_log(log) {
            self.report(at);
        }
    }

    /// A container's log file was opened anew, or not.
    pub fn log_reopened(&mut self, log: u32, result: Result<(), Remote>) {
        let Some(at) = self.of_log(log) else { return };
        let container = &mut self.containers[at];
        if container.reopeners.is_empty() {
            return;
        }
        let caller = container.reopeners.remove(0);
        let body = match result {
            Ok(()) => Body::Done,
            Err(error) => Body::Failed(error),
        };
        self.clients.answer(caller, body, Vec::new());
    }

    /// Tells of an exit, once.
    fn report(&mut self, at: usize) {
        let container = &mut self.containers[at];
        if let Phase::Exited(record) = &container.phase
            && container.report.take().is_some()
        {
            self.clients.tell(Body::Exited(record.clone()));
            for caller in std::mem::take(&mut container.stoppers) {
                self.clients.answer(caller, Body::Done, Vec::new());
            }
        }
    }

    /// What a stop makes necessary.
    pub fn act(&mut self, at: usize, act: Act, signal: u32) {
        let container = &self.containers[at];
        let Some(init) = container.init() else { return };
        let number = match act {
            Act::Wait => return,
            Act::Signal => signal,
            Act::Kill => libc::SIGKILL as u32,
        };
        match process::signal(init.pidfd.as_fd(), number) {
            Ok(()) => {}
            // It has ended and will be reaped.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => say(format_args!("container {}: cannot send signal {number}: {error}", container.id)),
        }
        // A first kill of a container with a PID namespace of its own needs no creator: all die with init.
        let again = container.stop.as_ref().is_some_and(Stop::kills_again);
        if act == Act::Kill && (container.shares_pids || again) {
            self.kill_group(at);
        }
    }

    /// Has a creator kill everything in a container's control group, if none is at it.
    fn kill_group(&mut self, at: usize) {
        let (serial, cgroup) = (self.containers[at].serial, self.containers[at].cgroup.clone());
        if !self.has_job(Purpose::Kill(serial))
            && let Err(error) = self.start_job(Purpose::Kill(serial), |_| Ok(Work::Kill { cgroup }))
        {
            say(format_args!("container {}: {error}", self.containers[at].id));
        }
    }

    /// Takes the next step of a removal.
    pub fn advance_removal(&mut self, at: usize) {
        let serial = self.containers[at].serial;
        match &self.containers[at].phase {
            Phase::Undoing(..) => {}
            // Nothing was made yet, and the disk that the log is on may be stuck.
            Phase::Opening(caller, _) => {
                let error = Remote::text(Kind::Aborted, format!("container {} was removed while it was being created", self.containers[at].id));
                self.forget(at, Some((*caller, error)));
            }
            Phase::Creating(_) => self.kill_job(Purpose::Create(serial)),
            Phase::Created(_) | Phase::Starting(..) | Phase::Running(_) => self.begin_stop(at, 0, Duration::ZERO),
            Phase::Exited(_) => self.begin_delete(at),
        }
    }

    fn begin_delete(&mut self, at: usize) {
        let container = &self.containers[at];
        let (serial, cgroup) = (container.serial, container.cgroup.clone());
        if self.has_job(Purpose::Delete(serial)) {
            return;
        }
        // A container that is being made needs them to stay; its own removal takes them away.
        let parents = if self.is_creating() { Vec::new() } else { self.parents.clone() };
        if let Err(error) = self.start_job(Purpose::Delete(serial), |_| Ok(Work::Delete { cgroup, parents })) {
            self.container_deleted(serial, Some((Made::Failed(error), Vec::new())));
        }
    }

    /// A container's control group is gone, or not.
    pub fn container_deleted(&mut self, serial: u32, answer: Option<Answer>) {
        let Some(at) = self.of_serial(serial) else { return };
        let container = &mut self.containers[at];
        let failed = match answer {
            Some((Made::Done, _)) => None,
            Some((Made::Failed(error), _)) => Some(error),
            Some(_) | None => Some(Remote::text(Kind::Aborted, format!("what removed container {} was lost", container.id))),
        };
        match (&container.phase, failed) {
            (Phase::Undoing(caller, error), failed) => {
                if let Some(failed) = failed {
                    say(format_args!("container {}: {}", container.id, crate::errchain::Chain(&failed)));
                }
                let answer = (*caller, error.clone());
                self.forget(at, Some(answer));
            }
            (_, None) => self.forget(at, None),
            (_, Some(error)) => {
                container.removing = false;
                for caller in std::mem::take(&mut container.removers) {
                    self.clients.answer(caller, Body::Failed(error.clone()), Vec::new());
                }
            }
        }
    }

    /// Drops a container from the table and answers everybody who waits for it.
    fn forget(&mut self, at: usize, creating: Option<(Caller, Remote)>) {
        self.report(at);
        let container = self.containers.remove(at);
        self.link.close(container.log);
        self.forget_ooms(container.ooms);
        if let Some((caller, error)) = creating {
            self.clients.answer(caller, Body::Failed(error), Vec::new());
        }
        for caller in container.reopeners.into_iter().chain(container.attachers) {
            let error = Remote::text(Kind::Aborted, format!("container {} was removed", container.id));
            self.clients.answer(caller, Body::Failed(error), Vec::new());
        }
        for caller in container.removers.into_iter().chain(container.stoppers) {
            self.clients.answer(caller, Body::Done, Vec::new());
        }
        process::trim_heap();
        self.sandbox_advance();
    }

    /// Does what time makes necessary.
    pub fn containers_due(&mut self, now: Instant) {
        for at in 0..self.containers.len() {
            if let Some(act) = self.containers[at].stop.as_mut().map(|stop| stop.due(now)) {
                self.act(at, act, 0);
            }
            if self.containers[at].report.is_some_and(|latest| latest <= now) {
                self.report(at);
            }
        }
    }

    /// Ends what was exec'd in a container that has ended.
    fn end_execs_of(&mut self, serial: u32) {
        for at in 0..self.execs.len() {
            if self.execs[at].container == serial {
                match &self.execs[at].phase {
                    ExecPhase::Creating(_) => self.kill_job(Purpose::Exec(self.execs[at].serial)),
                    ExecPhase::Running { .. } => self.hurry_exec(at, Instant::now()),
                }
            }
        }
    }
}

fn open_streams(plan: &ContainerPlan) -> std::io::Result<Streams> {
    let null = || rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    if plan.process.terminal {
        let theirs = Stdio { stdin: null()?, stdout: null()?, stderr: null()? };
        let reads = Reads { stdin: None, clients: plan.stdin, once: plan.stdin_once };
        return Ok(Streams { outputs: Vec::new(), reads, theirs });
    }
    let (stdin, input) = if plan.stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        (read, Some(write))
    } else {
        (null()?, None)
    };
    let (out_read, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err_read, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let reads = Reads { stdin: input, clients: plan.stdin, once: plan.stdin_once };
    Ok(Streams { outputs: vec![out_read, err_read], reads, theirs: Stdio { stdin, stdout, stderr } })
}
