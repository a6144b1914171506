//! Records of sandboxes and containers: facts, from which phases are derived.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{StoreError, make_dir, remove_all, replace};
use crate::ids::{ContainerId, SandboxId};
use crate::model::container::{ContainerSpec, Resources};
use crate::model::lifecycle::Phase;
use crate::model::sandbox::SandboxSpec;

/// A process by what never comes again: its id and its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id on the host.
    pub pid: u32,
    /// Field 22 of /proc/PID/stat.
    pub start_time: u64,
}

/// A sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its id.
    pub id: SandboxId,
    /// What was asked for.
    pub spec: SandboxSpec,
    /// Nanoseconds since the epoch.
    pub created_at: u64,
    /// Its monitor.
    pub monitor: ProcessId,
    /// Its pause process, if it shares a PID namespace.
    pub pause: Option<ProcessId>,
    /// Where its network namespace is pinned; `None` with the node's network.
    pub netns: Option<PathBuf>,
    /// Its addresses, the primary one first.
    pub ips: Vec<IpAddr>,
    /// The last CNI plugin's result, verbatim.
    pub cni_result: Option<serde_json::Value>,
    /// The control group under which its containers go.
    pub cgroup_parent: String,
    /// `cgroup_parent` is ours: made for this pod, removed with it.
    pub cgroup_parent_ours: bool,
    /// Everything of it was stopped, or its monitor died. Nanoseconds since the epoch.
    pub stopped_at: Option<u64>,
    /// Its network was given back.
    pub network_released: bool,
    /// The SELinux level of its processes and files; empty on a node without SELinux.
    #[serde(default)]
    pub selinux_level: String,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128 + n where a signal ended it.
    pub code: i32,
    /// Nanoseconds since the epoch.
    pub finished_at: u64,
    /// One word.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// An image among a container's mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeImage {
    /// Its id.
    pub id: String,
    /// The names of its layers, which the container holds.
    pub layers: Vec<String>,
}

/// A container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox: SandboxId,
    /// What was asked for.
    pub spec: ContainerSpec,
    /// The image's id.
    pub image_id: String,
    /// The names of its layers, which it holds.
    pub layers: Vec<String>,
    /// The images among its mounts, in their order.
    #[serde(default)]
    pub image_volumes: Vec<VolumeImage>,
    /// Nanoseconds since the epoch.
    pub created_at: u64,
    /// Its init on the host.
    pub pid: u32,
    /// Its control group.
    pub cgroup: String,
    /// Who it runs as: user, group, supplemental groups.
    pub user: (u32, u32, Vec<u32>),
    /// The signal that stops it.
    pub stop_signal: u32,
    /// Nanoseconds since the epoch.
    pub started_at: Option<u64>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// An update of its limits that isn't done yet.
    #[serde(default)]
    pub updating: Option<Resources>,
}

impl SandboxRecord {
    /// It can hold containers.
    pub fn ready(&self) -> bool {
        self.stopped_at.is_none()
    }
}

impl ContainerRecord {
    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        match (&self.exit, self.started_at) {
            (Some(_), _) => Phase::Exited,
            (None, Some(_)) => Phase::Running,
            (None, None) => Phase::Created,
        }
    }

    /// The key under which its name is reserved: the pod's and its own.
    pub fn key(pod_key: &str, name: &str, attempt: u32) -> String {
        format!("{pod_key}/{name}/{attempt}")
    }

    /// Where its log is on the host; `None`: it has none.
    pub fn log_path(&self, pod: &SandboxSpec) -> Option<PathBuf> {
        let none = pod.log_directory.as_os_str().is_empty() || self.spec.log_path.as_os_str().is_empty();
        (!none).then(|| pod.log_directory.join(&self.spec.log_path))
    }
}

/// The places of the state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Makes the directories below `root`.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let state = Self { root: root.into() };
        for dir in [state.root.clone(), state.sandboxes(), state.containers(), state.journal(), state.pivot()] {
            make_dir(&dir)?;
        }
        Ok(state)
    }

    /// All sandboxes.
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// All containers.
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// The journal.
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// The empty directory in which creators attach roots.
    pub fn pivot(&self) -> PathBuf {
        self.root.join("pivot")
    }

    /// One sandbox.
    pub fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// One container.
    pub fn container(&self, id: &ContainerId) -> PathBuf {
        self.containers().join(id.as_str())
    }

    /// A container's exit file.
    pub fn exit_file(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("exit")
    }

    /// Writes a sandbox's record.
    pub fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), StoreError> {
        put(&self.sandbox(&record.id).join(RECORD), record)
    }

    /// Writes a container's record.
    pub fn put_container(&self, record: &ContainerRecord) -> Result<(), StoreError> {
        put(&self.container(&record.id).join(RECORD), record)
    }

    /// Every sandbox's record, and the errors of those that can't be read: one bad file never hides the others.
    pub fn load_sandboxes(&self) -> Result<(Vec<SandboxRecord>, Vec<StoreError>), StoreError> {
        load_all(&self.sandboxes())
    }

    /// Every container's record, likewise.
    pub fn load_containers(&self) -> Result<(Vec<ContainerRecord>, Vec<StoreError>), StoreError> {
        load_all(&self.containers())
    }
}

const RECORD: &str = "record.json";

/// Writes a value as JSON.
pub fn put(path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(value).map_err(|source| StoreError::Damaged { path: path.into(), source })?;
    replace(path, &bytes, 0o600)
}

/// Reads a value from JSON.
pub fn get<T: DeserializeOwned>(path: &Path) -> Result<T, StoreError> {
    let bytes = fs::read(path).map_err(|source| StoreError::Read { path: path.into(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| StoreError::Damaged { path: path.into(), source })
}

fn load_all<T: DeserializeOwned>(dir: &Path) -> Result<(Vec<T>, Vec<StoreError>), StoreError> {
    let (mut records, mut errors) = (Vec::new(), Vec::new());
    let failed = |source| StoreError::Read { path: dir.into(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        match get(&entry.map_err(failed)?.path().join(RECORD)) {
            Ok(record) => records.push(record),
            // A directory without a record is an operation that was cut; the journal knows it.
            Err(StoreError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => errors.push(error),
        }
    }
    Ok((records, errors))
}

/// Removes an object's directory, the record first: what is left of a removal that is cut is never taken for an object.
pub fn forget(dir: &Path) -> Result<(), StoreError> {
    remove_all(&dir.join(RECORD))?;
    remove_all(dir)
}
