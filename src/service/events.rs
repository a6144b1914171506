//! Events: what monitors tell us, taken in one task; and what we tell subscribers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use tokio::sync::{broadcast, mpsc};

use super::{Container, Sandbox, Service, ServiceError, monitors, now};
use crate::errchain::Chain;
use crate::ids::SandboxId;
use crate::monitor_api::Body;
use crate::store::record::{ContainerRecord, SandboxRecord};

/// What happened to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was made.
    Created,
    /// It was started.
    Started,
    /// It has ended.
    Stopped,
    /// It was removed.
    Deleted,
}

/// One event, with the state of the whole pod at that time.
#[derive(Debug, Clone)]
pub struct ContainerEvent {
    /// The container's id, or the sandbox's for its own events.
    pub id: String,
    /// What happened.
    pub kind: EventKind,
    /// Nanoseconds since the epoch.
    pub at: u64,
    /// The sandbox; `None` where it is gone.
    pub sandbox: Option<Arc<SandboxRecord>>,
    /// Its containers.
    pub containers: Vec<Arc<ContainerRecord>>,
}

impl Service {
    /// Follows events from now on. A subscriber that lags loses the oldest, and is told how many.
    pub fn subscribe(&self) -> broadcast::Receiver<ContainerEvent> {
        self.events.subscribe()
    }

    /// A subscriber was too slow for so many events.
    pub fn events_lost(&self, n: u64) {
        let all = self.lost.fetch_add(n, Ordering::Relaxed) + n;
        tracing::warn!(lost = n, all, "a subscriber of events is too slow");
    }

    /// How many events all subscribers together were too slow for.
    pub fn n_events_lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(super) fn publish(&self, container: &Container, kind: EventKind) {
        let record = container.record();
        let sandbox = self.find_sandbox(record.sandbox.as_str()).ok().map(|sandbox| sandbox.record());
        self.send(record.id.to_string(), &record.sandbox, sandbox, kind);
    }

    /// Of the sandbox itself, which may be removed already: kubelet passes over an event that doesn't say of which pod it is.
    pub(super) fn publish_sandbox(&self, sandbox: &Sandbox, kind: EventKind) {
        let record = sandbox.record();
        self.send(record.id.to_string(), &record.id.clone(), Some(record), kind);
    }

    fn send(&self, id: String, pod: &SandboxId, sandbox: Option<Arc<SandboxRecord>>, kind: EventKind) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let containers = self.containers_of(pod).iter().map(|container| container.record()).collect();
        let _ = self.events.send(ContainerEvent { id, kind, at: now(), sandbox, containers });
    }

    /// Takes what monitors say until the daemon ends.
    pub(super) async fn follow_monitors(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<monitors::Event>) {
        while let Some(event) = events.recv().await {
            match event.what {
                monitors::What::Message(Body::Exited(exit)) => self.on_exit(&exit),
                monitors::What::Message(Body::ExecExited(exit)) => self.on_exec_exit(exit),
                monitors::What::Message(other) => tracing::warn!(sandbox = %event.sandbox, message = ?other, "monitor sent what is no event"),
                // On a task of its own: other pods' events do not wait for this one's burial.
                monitors::What::Lost => {
                    self.on_execs_lost(&event.sandbox);
                    let service = self.clone();
                    tokio::spawn(async move { service.on_lost(&event.sandbox).await });
                }
            }
        }
    }

    async fn on_lost(self: &Arc<Self>, id: &SandboxId) {
        let Ok(sandbox) = self.find_sandbox(id.as_str()) else { return };
        let record = sandbox.record();
        if sandbox.monitor.load().is_none() {
            return;
        }
        if monitors::alive(record.monitor) {
            // It closed the connection (it may have been too slow a reader for it): greet it again.
            match monitors::connect(id, &self.state.sandbox(id), self.program.deadline, self.from_monitors.clone()).await {
                Ok((monitor, snapshot)) => {
                    sandbox.monitor.store(Some(Arc::new(monitor)));
                    self.reconcile(&sandbox, &snapshot);
                    return;
                }
                Err(error) => tracing::error!(sandbox = %id, error = %Chain(&error), "monitor can't be reached"),
            }
        }
        if let Err(error) = self.bury(&sandbox).await {
            tracing::error!(sandbox = %id, error = %Chain(&error), "what a dead monitor left can't be killed");
        }
    }

    /// A sandbox without a monitor: kills what is left of its containers, records their exits, and marks it NOTREADY so
    /// that kubelet replaces it.
    pub(super) async fn bury(&self, sandbox: &Arc<Sandbox>) -> Result<(), ServiceError> {
        sandbox.monitor.store(None);
        let record = sandbox.record();
        let mut failed = None;
        for container in self.containers_of(&record.id) {
            if let Err(error) = self.remove_cgroup(&container.record().cgroup, true).await {
                failed = Some(error);
            }
            self.take_exit_file(&container, "the pod's monitor died");
        }
        // A monitor that lives but can't be reached would go on holding the pod. The pause, as the init of the pod's
        // processes, can end only when all of them have.
        for process in std::iter::once(record.monitor).chain(record.pause) {
            if let Err(source) = monitors::kill(process).await {
                failed = Some(ServiceError::Host { what: "kill", path: format!("/proc/{}", process.pid).into(), source });
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if record.ready() {
            sandbox.update(&self.state, |record| record.stopped_at = record.stopped_at.or(Some(now()))).map_err(ServiceError::Store)?;
            tracing::warn!(sandbox = %record.id, "the pod's monitor died; the sandbox is not ready");
            self.publish_sandbox(sandbox, EventKind::Stopped);
        }
        Ok(())
    }

    /// How many execs are waited for.
    pub fn running_execs(&self) -> usize {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
