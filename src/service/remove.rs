//! RemoveContainer and RemovePodSandbox: by force, idempotent, the record last.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::sandbox::blocking;
use super::{Container, EventKind, Service, ServiceError, monitors, now};
use crate::errchain::Chain;
use crate::model::lifecycle::Phase;
use crate::monitor_api::{self, Call};
use crate::store::journal::{Journal, Undo};
use crate::store::record::{ContainerRecord, forget};
use crate::store::{make_dir, remove_all};

impl Service {
    /// Removes a container, killing it first if it runs. One that is gone is removed.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<(), ServiceError> {
        let Ok(container) = self.find_container(id) else { return Ok(()) };
        let _op = container.op.lock().await;
        self.remove_container_held(&container).await
    }

    async fn remove_container_held(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), ServiceError> {
        let record = container.record();
        let id = &record.id;
        if self.find_container(id.as_str()).is_err() {
            return Ok(());
        }
        if record.phase() != Phase::Exited {
            self.stop_container(id.as_str(), Duration::ZERO).await?;
        }
        let sandbox = self.sandbox_of(&record)?;
        let call = Call::RemoveContainer(monitor_api::Container { id: id.to_string() });
        let removed = match sandbox.monitor() {
            Some(monitor) => monitor.done(call).await,
            None => Err(monitors::MonitorError::Gone),
        };
        match removed {
            Err(monitors::MonitorError::Gone) => self.remove_cgroup(&record.cgroup, true).await?,
            done => {
                done.map_err(ServiceError::monitor("cannot remove the container"))?;
                self.cgroups.release(&record.cgroup).await?;
            }
        }
        self.discard_layer(self.layer_dir(id)).await?;
        let dir = self.state.container(id);
        blocking(move || forget(&dir)).await?.map_err(ServiceError::Store)?;
        self.containers.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        let pod = sandbox.record();
        self.release(&ContainerRecord::key(&pod.spec.name.key(), &record.spec.name, record.spec.attempt));
        self.publish(container, EventKind::Deleted);
        tracing::info!(container = %id, "container removed");
        Ok(())
    }

    /// Removes a sandbox with its containers, stopping it first. One that is gone is removed.
    pub async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<(), ServiceError> {
        let Ok(sandbox) = self.find_sandbox(id) else { return Ok(()) };
        let _op = sandbox.op.lock().await;
        let id = sandbox.record().id.clone();
        if self.find_sandbox(id.as_str()).is_err() {
            return Ok(());
        }
        let stopped = self.stop_sandbox_held(&sandbox).await;
        let record = sandbox.record();
        if record.ready() {
            // It could not even be stopped: nothing of it may be taken away.
            return stopped;
        }
        if !record.network_released {
            self.keep_network_for_later(&record)?;
        }
        let mut errors = Vec::new();
        for container in self.containers_of(&id) {
            let _op = container.op.lock().await;
            if let Err(error) = self.remove_container_held(&container).await {
                errors.push(Chain(&error).to_string());
            }
        }
        if !errors.is_empty() {
            return Err(ServiceError::Teardown { what: "cannot remove the pod's containers", errors });
        }
        if let Some(monitor) = sandbox.monitor() {
            // It ends by itself; what does not is killed below.
            let _ = monitor.done_within(Call::Exit, Duration::from_secs(2)).await;
        }
        sandbox.monitor.store(None);
        monitors::kill(record.monitor).await.map_err(|source| ServiceError::Host {
            what: "kill monitor",
            path: PathBuf::from(format!("/proc/{}", record.monitor.pid)),
            source,
        })?;
        if let (cgroup, true) = self.cgroups.monitor(&id) {
            self.remove_cgroup(&cgroup, true).await?;
        }
        if record.cgroup_parent_ours {
            self.remove_cgroup(&record.cgroup_parent, false).await?;
        }
        let dir = self.state.sandbox(&id);
        blocking(move || forget(&dir)).await?.map_err(ServiceError::Store)?;
        self.sandboxes.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        self.release(&record.spec.name.key());
        self.selinux.release(&record.selinux_level);
        self.publish_sandbox(&sandbox, EventKind::Deleted);
        tracing::info!(sandbox = %id, "sandbox removed");
        Ok(())
    }

    /// A network that can't be taken down does not hold the pod for ever: the journal keeps it and tries again at start.
    fn keep_network_for_later(&self, record: &crate::store::record::SandboxRecord) -> Result<(), ServiceError> {
        let Some(netns) = record.netns.clone() else { return Ok(()) };
        let mut journal =
            Journal::begin(&self.state, "RemovePodSandbox", &record.spec.name.key(), record.id.as_str(), now()).map_err(ServiceError::Store)?;
        journal.enter("unpin", Undo::Unpin(netns.clone())).map_err(ServiceError::Store)?;
        journal.enter("CNI DEL", Undo::NetworkDel { sandbox: record.id.clone(), netns }).map_err(ServiceError::Store)?;
        tracing::warn!(sandbox = %record.id, "network could not be taken down; it is tried again at start");
        Ok(())
    }

    /// Renames a writable layer aside and deletes it in the background: a large one must not hold the RPC.
    async fn discard_layer(&self, dir: PathBuf) -> Result<(), ServiceError> {
        let trash = self.trash();
        let aside = dir.file_name().map(|name| trash.join(name));
        let moved = blocking(move || -> Result<Option<PathBuf>, ServiceError> {
            make_dir(&trash).map_err(ServiceError::Store)?;
            let Some(aside) = aside else { return Ok(None) };
            match std::fs::rename(&dir, &aside) {
                Ok(()) => Ok(Some(aside)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(ServiceError::Host { what: "move aside", path: dir, source }),
            }
        })
        .await??;
        if let Some(path) = moved {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = remove_all(&path) {
                    tracing::warn!(error = %Chain(&error), "writable layer can't be deleted; it is tried again at start");
                }
            });
        }
        Ok(())
    }

    /// Where writable layers wait for their deletion.
    pub(super) fn trash(&self) -> PathBuf {
        self.config.root.join("trash")
    }
}
