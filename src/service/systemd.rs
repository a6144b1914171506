//! systemd over D-Bus: transient scopes made, limited and stopped, over one connection that is kept.
//!
//! Knows units, jobs and properties, and nothing of pods. A call that queues a job returns when the job is over. A connection
//! that broke (the bus was restarted) is made anew by the next call.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, broadcast};

use super::dbus::{Bus, BusError, Method, Reader, Writer};
use crate::cgroup::systemd::{Property, Value};
use crate::errchain::{Kind, Kinded};

const DESTINATION: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// How long systemd may take for a call, and for the job that it queues. A stop kills after 90 s by default.
const ANSWER: Duration = Duration::from_secs(30);
const JOB: Duration = Duration::from_secs(100);

/// Why systemd did not do it.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// The bus, or systemd on it, can't be reached.
    #[error("cannot reach systemd over D-Bus")]
    Connect(#[source] BusError),
    /// A call failed.
    #[error("systemd cannot do {method} of {unit}")]
    Call {
        /// The method.
        method: &'static str,
        /// The unit.
        unit: String,
        /// What it said.
        source: BusError,
    },
    /// The job was not done.
    #[error("systemd's job of {unit} ended with {result:?}")]
    Job {
        /// The unit.
        unit: String,
        /// As systemd names it: `failed`, `canceled`, `timeout`, `dependency`, ….
        result: String,
    },
    /// No answer in time.
    #[error("systemd has not done {method} of {unit} within {} s", after.as_secs())]
    Deadline {
        /// The method.
        method: &'static str,
        /// The unit.
        unit: String,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended while a job ran.
    #[error("lost the connection to systemd before the job of {unit} was over")]
    Lost {
        /// The unit.
        unit: String,
    },
}

impl Kinded for SystemdError {
    fn kind(&self) -> Kind {
        match self {
            SystemdError::Connect(_) | SystemdError::Lost { .. } => Kind::Unavailable,
            SystemdError::Deadline { .. } => Kind::DeadlineExceeded,
            SystemdError::Call { source: BusError::Answer { name, .. }, .. } if name == UNIT_EXISTS => Kind::AlreadyExists,
            SystemdError::Call { source: BusError::Answer { name, .. }, .. } if name == NO_SUCH_UNIT => Kind::NotFound,
            SystemdError::Call { source: BusError::Connection(_) | BusError::Closed, .. } => Kind::Unavailable,
            SystemdError::Call { .. } | SystemdError::Job { .. } => Kind::Internal,
        }
    }
}

const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

/// A scope to be.
#[derive(Debug)]
pub struct Scope<'a> {
    /// Its name, with `.scope`.
    pub name: &'a str,
    /// The slice it goes into; made where it is absent.
    pub slice: &'a str,
    /// For people.
    pub description: &'a str,
    /// The process that it begins with, as this PID namespace has it, which must be systemd's own.
    pub pid: u32,
    /// At a shutdown this unit is stopped before it; empty: none.
    pub stops_after: &'a str,
    /// Its limits.
    pub properties: &'a [Property],
}

/// A unit that systemd knows, as `ListUnitsByPatterns` has it.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// Its description.
    pub description: String,
}

/// systemd.
pub struct Systemd {
    bus: Mutex<Option<Arc<Bus>>>,
}

impl Systemd {
    /// Connects.
    pub async fn connect() -> Result<Self, SystemdError> {
        let systemd = Self { bus: Mutex::new(None) };
        systemd.bus().await?;
        Ok(systemd)
    }

    /// The connection; a new one where there is none that lives.
    async fn bus(&self) -> Result<Arc<Bus>, SystemdError> {
        let mut held = self.bus.lock().await;
        if let Some(bus) = held.as_ref().filter(|bus| !bus.is_closed()) {
            return Ok(bus.clone());
        }
        let late = |_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        let bus = tokio::time::timeout(ANSWER, open()).await.unwrap_or_else(late).map_err(SystemdError::Connect)?;
        Ok(held.insert(Arc::new(bus)).clone())
    }

    /// Makes a scope and waits until its process is in it.
    pub async fn start_scope(&self, scope: &Scope<'_>) -> Result<(), SystemdError> {
        self.job("StartTransientUnit", scope.name, "ssa(sv)a(sa(sv))", &start_arguments(scope)).await
    }

    /// Stops a unit and waits until it has ended. One that systemd doesn't know has.
    pub async fn stop(&self, unit: &str) -> Result<(), SystemdError> {
        let mut body = Writer::default();
        body.string(unit);
        body.string("replace");
        match self.job("StopUnit", unit, "ss", &body).await {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Changes a unit's limits, until it ends.
    pub async fn set_properties(&self, unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
        let mut body = Writer::default();
        body.string(unit);
        body.bool(true);
        body.array(8, properties, limit);
        self.call("SetUnitProperties", unit, "sba(sv)", &body).await.map(drop)
    }

    /// The units that are loaded and match a pattern (glob(7)).
    pub async fn units(&self, pattern: &str) -> Result<Vec<Unit>, SystemdError> {
        const METHOD: &str = "ListUnitsByPatterns";
        let mut body = Writer::default();
        body.array(4, [""; 0], Writer::string);
        body.array(4, [pattern], Writer::string);
        let answer = self.call(METHOD, pattern, "asas", &body).await?;
        let units = Reader::new(&answer).array(8, |row| {
            row.structure();
            let unit = Unit { name: row.string()?.to_string(), description: row.string()?.to_string() };
            // Whether it is loaded, active, how exactly, what it follows, its object; its job's number, kind and object.
            (0..5).try_for_each(|_| row.string().map(drop))?;
            row.u32()?;
            (0..2).try_for_each(|_| row.string().map(drop))?;
            Some(unit)
        });
        units.ok_or_else(|| failed(METHOD, pattern)(BusError::Body))
    }

    async fn call(&self, method: &'static str, unit: &str, signature: &str, body: &Writer) -> Result<Vec<u8>, SystemdError> {
        call(&*self.bus().await?, method, unit, signature, body).await
    }

    /// A call that queues a job, and the end of that job.
    async fn job(&self, method: &'static str, unit: &str, signature: &str, body: &Writer) -> Result<(), SystemdError> {
        let bus = self.bus().await?;
        // Before the call: the job may be over before its answer is read.
        let mut signals = bus.signals();
        let answer = call(&bus, method, unit, signature, body).await?;
        let job = Reader::new(&answer).string().ok_or_else(|| failed(method, unit)(BusError::Body))?.to_string();
        let over = async {
            loop {
                match signals.recv().await {
                    Ok(signal) if signal.name == "JobRemoved" => {
                        if let Some(result) = result_of(&signal.body, &job) {
                            return Ok(result);
                        }
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(SystemdError::Lost { unit: unit.into() }),
                }
            }
        };
        let result = tokio::time::timeout(JOB, async {
            tokio::select! {
                result = over => result,
                () = bus.closed() => Err(SystemdError::Lost { unit: unit.into() }),
            }
        });
        match result.await.map_err(|_| SystemdError::Deadline { method, unit: unit.into(), after: JOB })??.as_str() {
            "done" => Ok(()),
            result => Err(SystemdError::Job { unit: unit.into(), result: result.into() }),
        }
    }
}

fn failed(method: &'static str, unit: &str) -> impl FnOnce(BusError) -> SystemdError {
    let unit = unit.to_string();
    move |source| SystemdError::Call { method, unit, source }
}

async fn call(bus: &Bus, method: &'static str, unit: &str, signature: &str, body: &Writer) -> Result<Vec<u8>, SystemdError> {
    let answer = bus.call(Method { destination: DESTINATION, path: PATH, interface: MANAGER, name: method }, signature, body);
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(answer) => answer.map_err(failed(method, unit)),
        Err(_) => Err(SystemdError::Deadline { method, unit: unit.into(), after: ANSWER }),
    }
}

async fn open() -> Result<Bus, BusError> {
    let bus = Bus::system().await?;
    bus.listen(&format!("type='signal',sender='{DESTINATION}',path='{PATH}',interface='{MANAGER}',member='JobRemoved'")).await?;
    // Without a subscriber systemd sends no signals.
    bus.call(Method { destination: DESTINATION, path: PATH, interface: MANAGER, name: "Subscribe" }, "", &Writer::default()).await?;
    Ok(bus)
}

/// The result of a job, if a signal is about it: the arguments are its number, its object, its unit, its result.
fn result_of(body: &[u8], job: &str) -> Option<String> {
    let mut reader = Reader::new(body);
    reader.u32()?;
    let object = reader.string()?;
    reader.string()?;
    let result = reader.string()?;
    (object == job).then(|| result.to_string())
}

/// Name, mode, properties, and the further units, of which there are none.
fn start_arguments(scope: &Scope<'_>) -> Writer {
    /// What a property's value is, beside a limit's.
    enum Of<'a> {
        Text(&'a str),
        Yes,
        Texts(&'a str),
        Pid(u32),
        Limit(&'a Property),
    }
    let mut properties = vec![
        ("Description", Of::Text(scope.description)),
        ("Slice", Of::Text(scope.slice)),
        ("Delegate", Of::Yes),
        ("DevicePolicy", Of::Text("auto")),
        // One that failed is forgotten like one that ended: its name is free again.
        ("CollectMode", Of::Text("inactive-or-failed")),
        ("PIDs", Of::Pid(scope.pid)),
    ];
    properties.extend(["CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting"].map(|name| (name, Of::Yes)));
    if !scope.stops_after.is_empty() {
        properties.push(("Before", Of::Texts(scope.stops_after)));
    }
    properties.extend(scope.properties.iter().map(|property| (property.name, Of::Limit(property))));
    let mut body = Writer::default();
    body.string(scope.name);
    body.string("fail");
    body.array(8, properties, |body, (name, value)| {
        if let Of::Limit(property) = value {
            return limit(body, property);
        }
        body.structure();
        body.string(name);
        match value {
            Of::Text(text) => {
                body.signature("s");
                body.string(text);
            }
            Of::Yes => {
                body.signature("b");
                body.bool(true);
            }
            Of::Texts(text) => {
                body.signature("as");
                body.array(4, [text], Writer::string);
            }
            Of::Pid(pid) => {
                body.signature("au");
                body.array(4, [pid], Writer::u32);
            }
            Of::Limit(_) => {}
        }
    });
    body.array(8, [(); 0], |_, ()| {});
    body
}

/// A limit as `(sv)`.
fn limit(body: &mut Writer, property: &Property) {
    body.structure();
    body.string(property.name);
    match &property.value {
        Value::Number(number) => {
            body.signature("t");
            body.u64(*number);
        }
        Value::Bits(bits) => {
            body.signature("ay");
            body.array(1, bits.iter().copied(), Writer::byte);
        }
    }
}
