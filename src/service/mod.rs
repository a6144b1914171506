//! What the CRI asks for, done: sandboxes, containers, execs, stats, events, and recovery after the daemon was killed.
//!
//! Speaks the domain's types, never a proto. Objects live in maps of immutable records: a read takes a snapshot and never
//! waits for an operation. A mutating operation holds its object's own lock, writes its journal before each step with a
//! side effect, and publishes its result last.

mod apparmor;
mod cgroups;
mod confinement;
mod container;
mod dbus;
mod devices;
mod error;
mod events;
mod exec;
pub mod fault;
mod features;
mod files;
pub mod inspect;
mod layer_usage;
pub mod metrics;
pub mod monitors;
mod recovery;
mod remove;
mod resources;
mod sandbox;
mod seccomp;
mod selinux;
pub mod session;
pub mod stats;
mod systemd;
mod undo;
mod volumes;

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{Semaphore, broadcast, mpsc, watch};

pub use error::ServiceError;
pub use events::{ContainerEvent, EventKind};
pub use exec::ExecOutput;
pub use features::Features;

use crate::cgroup::Hierarchy;
use crate::config::Config;
use crate::ids::{ContainerId, SandboxId};
use crate::image::{Images, LayerLease};
use crate::net::cni::Networks;
use crate::plan::Rlimit;
use crate::store::record::{ContainerRecord, SandboxRecord, StateDir};
use crate::store::{self, StoreError};

/// Events that a slow subscriber may lag behind before it loses the oldest.
const EVENT_QUEUE: usize = 1024;

/// A sandbox in memory.
pub struct Sandbox {
    record: ArcSwap<SandboxRecord>,
    /// `None`: its monitor is dead.
    monitor: ArcSwapOption<monitors::Monitor>,
    /// Held by the operation that changes it: stop, remove.
    op: tokio::sync::Mutex<()>,
    /// Serialises writes of the record.
    write: Mutex<()>,
    /// What stats remember of its control group between two calls.
    samples: Mutex<stats::Samples>,
    /// Held while its control group is read.
    reading: Arc<Semaphore>,
}

/// A container in memory.
pub struct Container {
    record: ArcSwap<ContainerRecord>,
    /// Held by the operation that changes it: start, remove.
    op: tokio::sync::Mutex<()>,
    write: Mutex<()>,
    /// True once it has exited.
    exited: watch::Sender<bool>,
    /// Its clients.
    sessions: session::Limits,
    /// Keep the layers of its image and of the images among its mounts on disk.
    _leases: Vec<LayerLease>,
    /// What stats remember between two calls.
    samples: Mutex<stats::Samples>,
    /// Held while its control group is read.
    reading: Arc<Semaphore>,
    /// What its writable layer uses.
    layer: Arc<layer_usage::Layer>,
}

/// The service. One per daemon, shared.
pub struct Service {
    /// The configuration.
    pub config: Config,
    /// Images.
    pub images: Arc<Images>,
    /// Networks.
    pub networks: Arc<Networks>,
    /// What control groups this node has.
    pub hierarchy: Hierarchy,
    /// What else it can do.
    pub features: Features,
    cgroups: cgroups::Cgroups,
    state: StateDir,
    program: monitors::Program,
    sandboxes: RwLock<HashMap<SandboxId, Arc<Sandbox>>>,
    containers: RwLock<HashMap<ContainerId, Arc<Container>>>,
    /// Name to the id of who has it.
    names: Mutex<HashMap<String, String>>,
    events: broadcast::Sender<ContainerEvent>,
    /// Events that subscribers were too slow for.
    lost: AtomicU64,
    from_monitors: mpsc::UnboundedSender<monitors::Event>,
    execs: Mutex<HashMap<String, exec::Waiter>>,
    filters: Arc<seccomp::Filters>,
    apparmor: apparmor::AppArmor,
    selinux: Arc<selinux::SeLinux>,
    rlimits: Vec<Rlimit>,
    default_capabilities: u64,
    available_capabilities: u64,
    restrict_oom_score_adj: bool,
    walker: layer_usage::Walker,
    _lock: store::Lock,
}

impl Sandbox {
    fn new(record: SandboxRecord, monitor: Option<monitors::Monitor>) -> Arc<Self> {
        Arc::new(Self {
            record: ArcSwap::from_pointee(record),
            monitor: ArcSwapOption::from_pointee(monitor),
            op: tokio::sync::Mutex::new(()),
            write: Mutex::new(()),
            samples: Mutex::default(),
            reading: Arc::new(Semaphore::new(1)),
        })
    }

    /// Its facts now.
    pub fn record(&self) -> Arc<SandboxRecord> {
        self.record.load_full()
    }

    fn monitor(&self) -> Option<monitors::Monitor> {
        self.monitor.load().as_deref().cloned()
    }

    /// Changes the record: on disk first, then for readers.
    fn update(&self, state: &StateDir, change: impl FnOnce(&mut SandboxRecord)) -> Result<(), StoreError> {
        let _writing = self.write.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = SandboxRecord::clone(&self.record.load());
        change(&mut record);
        state.put_sandbox(&record)?;
        self.record.store(Arc::new(record));
        Ok(())
    }
}

impl Container {
    fn new(record: ContainerRecord, leases: Vec<LayerLease>, config: &Config) -> Arc<Self> {
        let exited = record.exit.is_some();
        Arc::new(Self {
            record: ArcSwap::from_pointee(record),
            op: tokio::sync::Mutex::new(()),
            write: Mutex::new(()),
            exited: watch::Sender::new(exited),
            sessions: session::Limits::new(&config.runtime),
            _leases: leases,
            samples: Mutex::default(),
            reading: Arc::new(Semaphore::new(1)),
            layer: Arc::default(),
        })
    }

    /// Its facts now.
    pub fn record(&self) -> Arc<ContainerRecord> {
        self.record.load_full()
    }

    fn update(&self, state: &StateDir, change: impl FnOnce(&mut ContainerRecord)) -> Result<(), StoreError> {
        let _writing = self.write.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = ContainerRecord::clone(&self.record.load());
        change(&mut record);
        state.put_container(&record)?;
        let exited = record.exit.is_some();
        self.record.store(Arc::new(record));
        if exited {
            self.exited.send_replace(true);
        }
        Ok(())
    }
}

impl Service {
    /// Every sandbox that is whole.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Every container that is whole.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The sandbox with this id, or the only one whose id starts so.
    pub fn find_sandbox(&self, id: &str) -> Result<Arc<Sandbox>, ServiceError> {
        let found = SandboxId::parse(id).ok().and_then(|id| find(&self.sandboxes, &id, id.as_str()));
        found.ok_or_else(|| ServiceError::NoSandbox { id: id.into() })
    }

    /// The container with this id, or the only one whose id starts so.
    pub fn find_container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        let found = ContainerId::parse(id).ok().and_then(|id| find(&self.containers, &id, id.as_str()));
        found.ok_or_else(|| ServiceError::NoContainer { id: id.into() })
    }

    /// The containers of a sandbox.
    pub fn containers_of(&self, sandbox: &SandboxId) -> Vec<Arc<Container>> {
        self.containers().into_iter().filter(|container| container.record.load().sandbox == *sandbox).collect()
    }

    fn sandbox_of(&self, container: &ContainerRecord) -> Result<Arc<Sandbox>, ServiceError> {
        self.find_sandbox(container.sandbox.as_str())
    }

    fn insert_sandbox(&self, sandbox: Arc<Sandbox>) {
        let id = sandbox.record.load().id.clone();
        self.sandboxes.write().unwrap_or_else(PoisonError::into_inner).insert(id, sandbox);
    }

    fn insert_container(&self, container: Arc<Container>) {
        let id = container.record.load().id.clone();
        self.containers.write().unwrap_or_else(PoisonError::into_inner).insert(id, container);
    }

    /// Takes a name for an object that is being made.
    fn reserve(&self, key: &str, id: &str) -> Result<(), ServiceError> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = names.get(key) {
            return Err(ServiceError::NameTaken { key: key.into(), holder: holder.clone() });
        }
        names.insert(key.into(), id.into());
        Ok(())
    }

    fn release(&self, key: &str) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// Nanoseconds since the epoch.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn random_id() -> Result<[u8; 32], ServiceError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|source| ServiceError::Random { source })?;
    Ok(bytes)
}

/// An exact match, else the only key with this prefix. crictl sends whole ids; people type short ones.
fn find<K: std::hash::Hash + Eq + AsRef<str>, V: Clone>(map: &RwLock<HashMap<K, V>>, key: &K, prefix: &str) -> Option<V> {
    let map = map.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(value) = map.get(key) {
        return Some(value.clone());
    }
    let mut matches = map.iter().filter(|(id, _)| id.as_ref().starts_with(prefix));
    match (matches.next(), matches.next()) {
        (Some((_, value)), None) => Some(value.clone()),
        _ => None,
    }
}
