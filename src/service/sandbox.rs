//! RunPodSandbox and StopPodSandbox.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{EventKind, Sandbox, Service, ServiceError, files, monitors, now, random_id};
use crate::errchain::Chain;
use crate::ids::SandboxId;
use crate::model::sandbox::{NamespaceMode, Protocol, SandboxSpec};
use crate::monitor_api::{Body, Call};
use crate::net::{cni, netns};
use crate::plan::SandboxPlan;
use crate::store::journal::{Journal, Undo};
use crate::store::make_dir;
use crate::store::record::{ProcessId, SandboxRecord};
use crate::sys;

/// How long the exits of a stopped sandbox's containers may take to arrive after the monitor says that all is dead.
const EXITS: Duration = Duration::from_secs(5);

impl Service {
    /// Makes a sandbox. It is listed, and READY, only when this returns without an error; on an error nothing is left.
    pub async fn run_sandbox(self: &Arc<Self>, spec: SandboxSpec) -> Result<SandboxId, ServiceError> {
        if !spec.runtime_handler.is_empty() {
            return Err(ServiceError::NoHandler { handler: spec.runtime_handler });
        }
        if spec.namespaces.network != NamespaceMode::Node {
            self.networks.ready().map_err(|not| ServiceError::NetworkNotReady { message: not.to_string() })?;
        }
        let sysctls = spec.effective_sysctls(&self.config.runtime.default_sysctls).map_err(ServiceError::SandboxSpec)?;
        let id = SandboxId::from_random(random_id()?);
        let key = spec.name.key();
        self.reserve(&key, id.as_str())?;
        let mut journal = match Journal::begin(&self.state, "RunPodSandbox", &key, id.as_str(), now()) {
            Ok(journal) => journal,
            Err(error) => {
                self.release(&key);
                return Err(ServiceError::Store(error));
            }
        };
        match self.make_sandbox(&id, spec, sysctls, &mut journal).await {
            Ok(sandbox) => {
                self.insert_sandbox(sandbox.clone());
                if let Err(error) = journal.end() {
                    tracing::warn!(sandbox = %id, error = %Chain(&error), "journal entry stays");
                }
                self.publish_sandbox(&sandbox, EventKind::Created);
                self.publish_sandbox(&sandbox, EventKind::Started);
                tracing::info!(sandbox = %id, pod = %key, "sandbox runs");
                Ok(id)
            }
            Err(error) => Err(self.give_up(journal, error).await),
        }
    }

    async fn make_sandbox(
        self: &Arc<Self>,
        id: &SandboxId,
        mut spec: SandboxSpec,
        sysctls: Vec<(String, String)>,
        journal: &mut Journal,
    ) -> Result<Arc<Sandbox>, ServiceError> {
        let own_net = spec.namespaces.network != NamespaceMode::Node;
        let own_ipc = spec.namespaces.ipc != NamespaceMode::Node;
        if spec.hostname.is_empty() || !own_net {
            spec.hostname = files::host_name();
        }
        let confinement = self.pause_confinement(&spec).await?;
        let level = self.selinux.level(&spec.security.selinux).map_err(ServiceError::SeLinux)?;
        let labels = self.selinux.labels(&spec.security.selinux, level.name(), spec.privileged).map_err(ServiceError::SeLinux)?;
        let (cgroup_parent, cgroup_parent_ours) = self.cgroups.pod(&spec.cgroup_parent, id)?;
        let dir = self.state.sandbox(id);
        journal.enter("directory", Undo::RemoveDir(dir.clone())).map_err(ServiceError::Store)?;
        make_dir(&dir).map_err(ServiceError::Store)?;
        files::write_pod_files(&dir, &spec)?;

        if cgroup_parent_ours {
            journal.enter("cgroup", Undo::RemoveCgroup(cgroup_parent.clone())).map_err(ServiceError::Store)?;
        }

        let (monitor_cgroup, its_own) = self.cgroups.monitor(id);
        if its_own {
            journal.enter("monitor's cgroup", Undo::RemoveCgroup(monitor_cgroup.clone())).map_err(ServiceError::Store)?;
            self.cgroups.prepare_monitor(&monitor_cgroup).await?;
        }
        // A monitor without a sandbox ends by itself when its first connection does: one that was started just before a
        // crash, and is in no journal yet, leaves nothing.
        let mut noted = Ok(());
        let (monitor, process) = monitors::start(&self.program, id, &dir, &monitor_cgroup, self.from_monitors.clone(), |process| {
            noted = journal.enter("monitor", Undo::KillMonitor(process));
            Ok(())
        })
        .await
        .map_err(ServiceError::monitor("cannot start the pod's monitor"))?;
        noted.map_err(ServiceError::Store)?;

        let plan = SandboxPlan {
            id: id.to_string(),
            hostname: if own_net { spec.hostname.clone() } else { String::new() },
            new_net: own_net,
            new_ipc: own_ipc,
            new_uts: own_net,
            shared_pid: spec.namespaces.pid == NamespaceMode::Pod,
            sysctls,
            shm_bytes: if own_ipc { self.config.runtime.shm_bytes } else { 0 },
            oom_score_adj: None,
            user_namespace: spec.namespaces.user.plan(),
            pause: confinement,
            mount_label: labels.mount,
        };
        let plan = monitors::seal("CreateSandbox", &plan).map_err(ServiceError::monitor("cannot make the pod's namespaces"))?;
        let answer = monitor.call(Call::CreateSandbox, vec![plan]).await.map_err(ServiceError::monitor("cannot make the pod's namespaces"))?;
        let (Body::Sandbox(made), fds) = answer else {
            return Err(ServiceError::monitor("cannot make the pod's namespaces")(monitors::MonitorError::Unexpected { call: "CreateSandbox" }));
        };
        let pause = match made.pause_pid {
            0 => None,
            pid => sys::process::start_time(pid).ok().map(|start_time| ProcessId { pid, start_time }),
        };

        let mut record = SandboxRecord {
            id: id.clone(),
            spec,
            created_at: now(),
            monitor: process,
            pause,
            netns: None,
            ips: Vec::new(),
            cni_result: None,
            cgroup_parent,
            cgroup_parent_ours,
            stopped_at: None,
            network_released: !own_net,
            selinux_level: level.name().into(),
        };
        if own_net {
            let Some(fd) = fds.into_iter().next() else {
                return Err(ServiceError::monitor("cannot make the pod's namespaces")(monitors::MonitorError::Unexpected { call: "CreateSandbox" }));
            };
            let path = self.config.network.netns_dir.join(format!("copepod-{}", &id.as_str()[..16]));
            journal.enter("network namespace", Undo::Unpin(path.clone())).map_err(ServiceError::Store)?;
            let at = path.clone();
            blocking(move || netns::pin(fd.as_fd(), &at))
                .await?
                .map_err(|source| ServiceError::Netns { what: "cannot pin the network namespace", source })?;
            record.netns = Some(path.clone());
            journal.enter("CNI ADD", Undo::NetworkDel { sandbox: id.clone(), netns: path.clone() }).map_err(ServiceError::Store)?;
            let pod = network_pod(&record, &path)?;
            let attachment = self.networks.add(&pod).await.map_err(|source| ServiceError::Net { what: "cannot set up the pod's network", source })?;
            record.ips = attachment.ips;
            record.cni_result = serde_json::to_value(&attachment.result).ok();
        }
        files::write_hosts(&dir, &record)?;
        // From here on the sandbox exists: recovery takes the record, not the journal.
        self.state.put_sandbox(&record).map_err(ServiceError::Store)?;
        level.keep();
        Ok(Sandbox::new(record, Some(monitor)))
    }

    /// Stops everything in a sandbox and gives its network back. One that is gone is stopped.
    pub async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<(), ServiceError> {
        let Ok(sandbox) = self.find_sandbox(id) else { return Ok(()) };
        let _op = sandbox.op.lock().await;
        self.stop_sandbox_held(&sandbox).await
    }

    /// As [`Self::stop_sandbox`], by somebody who holds the sandbox's lock.
    pub(super) async fn stop_sandbox_held(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), ServiceError> {
        let record = sandbox.record();
        let id = &record.id;
        if record.ready() {
            if let Some(monitor) = sandbox.monitor() {
                match monitor.done(Call::StopSandbox).await {
                    // A monitor that is gone: what it held is killed by whoever notices, and marked here too.
                    Err(monitors::MonitorError::Gone) => self.bury(sandbox).await?,
                    done => done.map_err(ServiceError::monitor("cannot stop the pod's containers"))?,
                }
            } else {
                self.bury(sandbox).await?;
            }
            self.await_exits(id).await;
            sandbox.update(&self.state, |record| record.stopped_at = record.stopped_at.or(Some(now()))).map_err(ServiceError::Store)?;
            tracing::info!(sandbox = %id, "sandbox stopped");
            self.publish_sandbox(sandbox, EventKind::Stopped);
        }
        self.release_network(sandbox).await
    }

    /// Every container's exit is on record; what does not arrive in time is read from the exit files.
    async fn await_exits(&self, id: &SandboxId) {
        let wait = async {
            for container in self.containers_of(id) {
                let mut exited = container.exited.subscribe();
                let _ = exited.wait_for(|done| *done).await;
            }
        };
        if tokio::time::timeout(EXITS, wait).await.is_err() {
            for container in self.containers_of(id) {
                self.take_exit_file(&container, "the monitor reported no exit");
            }
        }
    }

    /// CNI DEL and unpinning. What fails is reported and may be tried again.
    pub(super) async fn release_network(&self, sandbox: &Sandbox) -> Result<(), ServiceError> {
        let record = sandbox.record();
        if record.network_released {
            return Ok(());
        }
        if let Some(path) = &record.netns {
            let pod = network_pod(&record, path)?;
            self.networks.del(&pod).await.map_err(|source| ServiceError::Net { what: "cannot take down the pod's network", source })?;
            let at = path.clone();
            blocking(move || netns::unpin(&at))
                .await?
                .map_err(|source| ServiceError::Netns { what: "cannot unpin the network namespace", source })?;
        }
        sandbox.update(&self.state, |record| record.network_released = true).map_err(ServiceError::Store)
    }
}

/// What the CNI client needs to know of a sandbox.
pub(super) fn network_pod(record: &SandboxRecord, path: &Path) -> Result<cni::Pod, ServiceError> {
    let annotations = &record.spec.annotations;
    let bandwidth = cni::Bandwidth::from_annotations(annotations).map_err(|source| ServiceError::Net { what: "config.annotations", source })?;
    let dns = &record.spec.dns;
    Ok(cni::Pod {
        id: record.id.to_string(),
        name: record.spec.name.name.clone(),
        namespace: record.spec.name.namespace.clone(),
        uid: record.spec.name.uid.clone(),
        netns: PathBuf::from(path),
        cgroup_parent: record.cgroup_parent.clone(),
        annotations: annotations.clone(),
        bandwidth,
        dns: Some(cni::Dns { servers: dns.servers.clone(), searches: dns.searches.clone(), options: dns.options.clone() }),
        port_mappings: record
            .spec
            .ports
            .iter()
            .filter(|port| port.host_port != 0)
            .map(|port| cni::PortMapping {
                host_port: port.host_port,
                container_port: port.container_port,
                protocol: match port.protocol {
                    Protocol::Tcp => cni::Protocol::Tcp,
                    Protocol::Udp => cni::Protocol::Udp,
                    Protocol::Sctp => cni::Protocol::Sctp,
                },
                host_ip: port.host_ip,
            })
            .collect(),
        ..cni::Pod::default()
    })
}

/// Runs what may block on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ServiceError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ServiceError::Task)
}
