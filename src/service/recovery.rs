//! The start: what an earlier daemon left is read, greeted, reconciled, and what was cut is undone.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::{broadcast, mpsc};

use super::cgroups::Cgroups;
use super::container::rlimits;
use super::sandbox::blocking;
use super::{Container, EVENT_QUEUE, Sandbox, Service, ServiceError, apparmor, features, layer_usage, monitors, now, seccomp, selinux};
use crate::cgroup::Hierarchy;
use crate::config::Config;
use crate::errchain::Chain;
use crate::image::Images;
use crate::model::lifecycle::Phase;
use crate::monitor_api::Snapshot;
use crate::net::cni::Networks;
use crate::plan::capability;
use crate::store::journal::{self, Journal};
use crate::store::record::{ContainerRecord, SandboxRecord, StateDir};
use crate::store::{self, remove_all, replace};

/// Where the id of the boot is kept in which the root directory was last used.
const BOOT_ID: &str = "boot-id";
/// The pods' interface, as CNI_IFNAME.
const INTERFACE: &str = "eth0";

impl Service {
    /// Opens the state directory, takes back every pod that lives, buries what died, undoes what was cut.
    pub async fn start(config: Config, images: Arc<Images>, networks: Arc<Networks>) -> Result<Arc<Self>, ServiceError> {
        let state = StateDir::open(&config.state).map_err(ServiceError::Store)?;
        let lock = store::lock(&config.state).map_err(ServiceError::Store)?;
        let hierarchy = Hierarchy::detect().map_err(|source| ServiceError::Cgroup { what: "cannot find the control groups", source })?;
        let program = monitors::Program { path: monitor_path(&config)?, deadline: config.monitor.timeout.0 };
        let cgroups = Cgroups::new(&config, &hierarchy, &program.path).await?;
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let (from_monitors, to_follow) = mpsc::unbounded_channel();
        // Nothing beyond the daemon's own can be given to a container.
        let available_capabilities = crate::sys::creds::bounding();
        let may_raise = available_capabilities & capability::parse("SYS_RESOURCE").unwrap_or(0) != 0;
        let walker = layer_usage::Walker::start(config.root.clone());
        let selinux = selinux::SeLinux::detect(&config.runtime.selinux, selinux::Places::default());
        let service = Arc::new(Self {
            walker: walker.map_err(|source| ServiceError::Host { what: "start a thread for", path: config.root.clone(), source })?,
            features: features::probe(&program.path, &config.root).await,
            program,
            default_capabilities: config.runtime.default_capabilities.iter().filter_map(|name| capability::parse(name)).fold(0, |a, b| a | b),
            restrict_oom_score_adj: config.runtime.restrict_oom_score_adj && !may_raise,
            available_capabilities,
            rlimits: rlimits(&config, may_raise),
            config,
            images,
            networks,
            hierarchy,
            cgroups,
            state,
            sandboxes: RwLock::default(),
            containers: RwLock::default(),
            names: Mutex::default(),
            events,
            lost: Default::default(),
            from_monitors,
            execs: Mutex::default(),
            filters: Arc::new(seccomp::Filters::new()),
            apparmor: apparmor::AppArmor::start(apparmor::Places::default()).await,
            selinux,
            _lock: lock,
        });
        service.recover().await?;
        tokio::spawn(service.clone().follow_monitors(to_follow));
        Ok(service)
    }

    async fn recover(self: &Arc<Self>) -> Result<(), ServiceError> {
        let (sandboxes, unread) = self.state.load_sandboxes().map_err(ServiceError::Store)?;
        let (containers, unread_containers) = self.state.load_containers().map_err(ServiceError::Store)?;
        for error in unread.iter().chain(&unread_containers) {
            tracing::error!(error = %Chain(error), "a record can't be read and is left alone");
        }
        let mut by_sandbox: HashMap<_, Vec<ContainerRecord>> = HashMap::new();
        for record in containers {
            by_sandbox.entry(record.sandbox.clone()).or_default().push(record);
        }
        // Every sandbox on a task of its own: one monitor that doesn't answer holds nobody else up.
        let mut tasks = tokio::task::JoinSet::new();
        for record in sandboxes {
            self.selinux.reserve(&record.selinux_level);
            let containers = by_sandbox.remove(&record.id).unwrap_or_default();
            let service = self.clone();
            tasks.spawn(async move { service.take_back(record, containers).await });
        }
        while let Some(taken) = tasks.join_next().await {
            if let Ok(Err(error)) = taken {
                tracing::error!(error = %Chain(&error), "a sandbox can't be taken back whole");
            }
        }
        for orphan in by_sandbox.into_values().flatten() {
            tracing::warn!(container = %orphan.id, sandbox = %orphan.sandbox, "container without a sandbox, removing what is left");
            self.remove_cgroup(&orphan.cgroup, true).await?;
            remove_all(&self.layer_dir(&orphan.id)).map_err(ServiceError::Store)?;
            store::record::forget(&self.state.container(&orphan.id)).map_err(ServiceError::Store)?;
        }
        self.undo_cut_operations().await?;
        self.sweep().await
    }

    /// One sandbox and its containers as their records say, brought up to what their monitor knows.
    async fn take_back(self: &Arc<Self>, record: SandboxRecord, containers: Vec<ContainerRecord>) -> Result<(), ServiceError> {
        let id = record.id.clone();
        let was_ready = record.ready();
        self.reserve(&record.spec.name.key(), id.as_str())?;
        let pod_key = record.spec.name.key();
        let sandbox = Sandbox::new(record, None);
        for record in containers {
            self.reserve(&ContainerRecord::key(&pod_key, &record.spec.name, record.spec.attempt), record.id.as_str())?;
            let layers = std::iter::once(&record.layers).chain(record.image_volumes.iter().map(|volume| &volume.layers));
            let held = layers.filter_map(|layers| {
                let lease = self.images.lease_layers(layers);
                lease.inspect_err(|error| tracing::warn!(container = %record.id, error = %Chain(error), "layers can't be held")).ok()
            });
            let leases = held.collect();
            self.insert_container(Container::new(record, leases, &self.config));
        }
        self.insert_sandbox(sandbox.clone());
        let record = sandbox.record();
        if monitors::alive(record.monitor) {
            match monitors::connect(&id, &self.state.sandbox(&id), self.program.deadline, self.from_monitors.clone()).await {
                Ok((monitor, snapshot)) => {
                    sandbox.monitor.store(Some(Arc::new(monitor)));
                    self.reconcile(&sandbox, &snapshot);
                    for container in self.containers_of(&id) {
                        self.resume_update(&container).await;
                    }
                    return Ok(());
                }
                Err(error) => tracing::error!(sandbox = %id, error = %Chain(&error), "monitor can't be reached"),
            }
        }
        if was_ready {
            return self.bury(&sandbox).await;
        }
        for container in self.containers_of(&id) {
            self.take_exit_file(&container, "the pod's monitor died");
        }
        Ok(())
    }

    /// Brings records up to what a monitor knows.
    pub(super) fn reconcile(self: &Arc<Self>, sandbox: &Arc<Sandbox>, snapshot: &Snapshot) {
        let id = sandbox.record().id.clone();
        for container in self.containers_of(&id) {
            let record = container.record();
            let Some(known) = snapshot.containers.iter().find(|known| known.id == record.id.as_str()) else {
                self.take_exit_file(&container, "the monitor does not know the container");
                continue;
            };
            if let Some(exit) = &known.exit {
                self.on_exit(exit);
            } else if known.started_at != 0 && record.phase() == Phase::Created {
                let updated = container.update(&self.state, |record| record.started_at = Some(known.started_at));
                if let Err(error) = updated {
                    tracing::error!(container = %record.id, error = %Chain(&error), "start can't be recorded");
                }
            }
        }
        if snapshot.stopped && sandbox.record().ready() {
            let updated = sandbox.update(&self.state, |record| record.stopped_at = Some(now()));
            if let Err(error) = updated {
                tracing::error!(sandbox = %id, error = %Chain(&error), "stop can't be recorded");
            }
        }
        if snapshot.log_bytes_dropped > 0 {
            tracing::warn!(sandbox = %id, bytes = snapshot.log_bytes_dropped, "log output was dropped");
        }
    }

    async fn undo_cut_operations(self: &Arc<Self>) -> Result<(), ServiceError> {
        let (entries, unread) = journal::load(&self.state).map_err(ServiceError::Store)?;
        for error in unread {
            tracing::error!(error = %Chain(&error), "a journal entry can't be read and is left alone");
        }
        for entry in entries {
            let (op, key, stage) = (entry.entry().op.clone(), entry.entry().key.clone(), entry.entry().stage.clone());
            if self.published(&entry) {
                entry.end().map_err(ServiceError::Store)?;
                continue;
            }
            tracing::info!(op, key, stage, "an operation was cut, undoing it");
            if let Err(errors) = self.undo(entry).await {
                tracing::error!(op, key, errors = errors.join("; "), "it could not be undone; it is tried again at the next start");
            }
        }
        Ok(())
    }

    /// The operation had written its result: what it made is an object, and stays.
    fn published(&self, entry: &Journal) -> bool {
        match entry.entry().op.as_str() {
            "RunPodSandbox" => self.find_sandbox(&entry.entry().id).is_ok(),
            "CreateContainer" => self.find_container(&entry.entry().id).is_ok(),
            _ => false,
        }
    }

    /// Removes what belongs to nobody: directories without a record, writable layers of containers that are gone, network
    /// attachments and pins of the last boot, layers without an image.
    async fn sweep(self: &Arc<Self>) -> Result<(), ServiceError> {
        for dir in [self.state.sandboxes(), self.state.containers(), self.config.root.join("containers")] {
            for path in entries(&dir)? {
                let id = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if self.find_sandbox(id).is_err() && self.find_container(id).is_err() && !has_record(&path) {
                    blocking(move || remove_all(&path)).await?.map_err(ServiceError::Store)?;
                }
            }
        }
        let trash = self.trash();
        tokio::task::spawn_blocking(move || {
            for path in entries(&trash).unwrap_or_default() {
                if let Err(error) = remove_all(&path) {
                    tracing::warn!(error = %Chain(&error), "writable layer can't be deleted");
                }
            }
        });
        self.cgroups.sweep(|id| self.find_container(id).is_ok()).await;
        self.release_stale_networks().await;
        note_boot(&self.config.root)?;
        self.images.collect().await;
        Ok(())
    }

    /// CNI DEL for attachments of ours that belong to no sandbox: leases survive a reboot, pods don't.
    async fn release_stale_networks(&self) {
        let valid: Vec<_> = self.sandboxes().iter().map(|sandbox| (sandbox.record().id.to_string(), INTERFACE.to_string())).collect();
        match self.networks.gc(&valid).await {
            Ok(collected) => {
                for (sandbox, interface) in collected.detached {
                    tracing::info!(sandbox, interface, "network of a pod that is gone was given back");
                }
            }
            Err(error) => tracing::warn!(error = %Chain(&error), "networks of pods that are gone can't be given back"),
        }
    }
}

/// Every entry of a directory; none where it is missing.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, ServiceError> {
    match fs::read_dir(dir) {
        Ok(all) => Ok(all.filter_map(|entry| Some(entry.ok()?.path())).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(ServiceError::Host { what: "read", path: dir.into(), source }),
    }
}

fn has_record(dir: &Path) -> bool {
    dir.join("record.json").exists()
}

fn note_boot(root: &Path) -> Result<(), ServiceError> {
    let id = fs::read("/proc/sys/kernel/random/boot_id").map_err(|source| ServiceError::Host {
        what: "read",
        path: "/proc/sys/kernel/random/boot_id".into(),
        source,
    })?;
    replace(&root.join(BOOT_ID), &id, 0o600).map_err(ServiceError::Store)
}

fn monitor_path(config: &Config) -> Result<PathBuf, ServiceError> {
    if !config.monitor.path.as_os_str().is_empty() {
        return Ok(config.monitor.path.clone());
    }
    let own = std::env::current_exe().map_err(|source| ServiceError::Host { what: "find", path: "/proc/self/exe".into(), source })?;
    Ok(own.with_file_name("copepod-monitor"))
}
