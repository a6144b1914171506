//! Undoing an operation that failed or was cut: its journal in reverse, every step idempotent.

use std::sync::Arc;
use std::time::Duration;

use super::sandbox::blocking;
use super::{Service, ServiceError, monitors};
use crate::cgroup::Cgroup;
use crate::errchain::Chain;
use crate::monitor_api::{self, Call};
use crate::net::cni;
use crate::net::netns;
use crate::store::journal::{Journal, Undo};
use crate::store::remove_all;

/// How long a control group may take to become empty, and to go.
const KILL: Duration = Duration::from_secs(10);
const REMOVE: Duration = Duration::from_secs(5);

impl Service {
    /// Undoes a failed operation and gives back its error. Its name is free again only if every step was undone; else the
    /// journal keeps what is left, and the next start tries again.
    pub(super) async fn give_up(self: &Arc<Self>, journal: Journal, error: ServiceError) -> ServiceError {
        let key = journal.entry().key.clone();
        tracing::debug!(key, error = %Chain(&error), "operation failed, undoing");
        match self.undo(journal).await {
            Ok(()) => {
                self.release(&key);
                error
            }
            Err(undo) => {
                tracing::error!(key, errors = undo.join("; "), "operation could not be undone; it is tried again at start");
                ServiceError::NotUndone { undo, source: Box::new(error) }
            }
        }
    }

    /// Undoes every step, last first. A step that fails stops what stands before it: a directory stays while something
    /// may still use it.
    pub(super) async fn undo(&self, mut journal: Journal) -> Result<(), Vec<String>> {
        while let Some(step) = journal.last() {
            if let Err(error) = self.undo_step(&step).await {
                return Err(vec![format!("{}: {}", step_name(&step), Chain(&error))]);
            }
            journal.undone().map_err(|error| vec![Chain(&error).to_string()])?;
        }
        journal.end().map_err(|error| vec![Chain(&error).to_string()])
    }

    async fn undo_step(&self, step: &Undo) -> Result<(), ServiceError> {
        match step {
            Undo::RemoveDir(path) => {
                let path = path.clone();
                blocking(move || remove_all(&path)).await?.map_err(ServiceError::Store)
            }
            Undo::KillMonitor(process) => monitors::kill(*process).await.map_err(|source| ServiceError::Host {
                what: "kill",
                path: format!("/proc/{}", process.pid).into(),
                source,
            }),
            Undo::Unpin(path) => {
                let path = path.clone();
                blocking(move || netns::unpin(&path))
                    .await?
                    .map_err(|source| ServiceError::Netns { what: "cannot unpin the network namespace", source })
            }
            Undo::NetworkDel { sandbox, netns } => {
                let pod = cni::Pod { id: sandbox.to_string(), netns: netns.clone(), ..cni::Pod::default() };
                self.networks.del(&pod).await.map_err(|source| ServiceError::Net { what: "cannot take down the pod's network", source })
            }
            Undo::RemoveContainer { sandbox, container, cgroup } => {
                if let Some(monitor) = self.find_sandbox(sandbox.as_str()).ok().and_then(|sandbox| sandbox.monitor()) {
                    let call = Call::RemoveContainer(monitor_api::Container { id: container.to_string() });
                    match monitor.done(call).await {
                        Err(monitors::MonitorError::Gone) => {}
                        done => {
                            done.map_err(ServiceError::monitor("cannot remove the container"))?;
                            return self.cgroups.release(cgroup).await;
                        }
                    }
                }
                self.remove_cgroup(cgroup, true).await
            }
            Undo::RemoveCgroup(path) => self.remove_cgroup(path, false).await,
        }
    }

    /// Removes a control group, killing what is in it if `kill`.
    pub(super) async fn remove_cgroup(&self, path: &str, kill: bool) -> Result<(), ServiceError> {
        let cgroup = Cgroup::new(&self.hierarchy, path).map_err(|source| ServiceError::Cgroup { what: "cannot name the control group", source })?;
        let failed = |source| ServiceError::Cgroup { what: "cannot remove the control group", source };
        if kill {
            let cgroup = cgroup.clone();
            blocking(move || cgroup.kill(KILL)).await?.map_err(failed)?;
        }
        self.cgroups.release(path).await?;
        blocking(move || cgroup.remove(REMOVE)).await?.map_err(failed)
    }
}

fn step_name(step: &Undo) -> &'static str {
    match step {
        Undo::RemoveDir(_) => "remove directory",
        Undo::KillMonitor(_) => "kill monitor",
        Undo::Unpin(_) => "unpin network namespace",
        Undo::NetworkDel { .. } => "CNI DEL",
        Undo::RemoveContainer { .. } => "remove container",
        Undo::RemoveCgroup(_) => "remove control group",
    }
}
