//! CreateContainer, StartContainer, StopContainer, ReopenContainerLog, and what happens when a container exits.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::confinement::Confinement;
use super::sandbox::blocking;
use super::volumes::{self, VolumeImages};
use super::{Container, EventKind, Sandbox, Service, ServiceError, devices, files, monitors, now, random_id};
use crate::errchain::{Chain, Kind, Kinded};
use crate::ids::{ContainerId, SandboxId};
use crate::image::{Image, LayerLease};
use crate::model::container::ContainerSpec;
use crate::model::lifecycle::{Admit, Op, Phase, admit};
use crate::model::sandbox::NamespaceMode;
use crate::model::spec::{self, ImageDefaults, Surroundings};
use crate::model::{rlimit, signal};
use crate::monitor_api::{self, Body, Call, ExitRecord, exit_record};
use crate::plan::{ContainerPlan, GroupsPolicy, Overlay, Process, User};
use crate::store::journal::{Journal, Undo};
use crate::store::make_dir;
use crate::store::record::{ContainerRecord, Exit};

/// A container's writable layer and overlay's own directory.
const UPPER: &str = "upper";
const WORK: &str = "work";
/// The volumes that its image defines.
const VOLUMES: &str = "volumes";
/// The encoded plan of a container, from which execs are made.
const PLAN: &str = "plan";

impl Service {
    /// Makes a container. It is listed only when this returns without an error; on an error nothing is left.
    pub async fn create_container(self: &Arc<Self>, sandbox: &str, spec: ContainerSpec) -> Result<ContainerId, ServiceError> {
        let sandbox = self.find_sandbox(sandbox)?;
        let pod = sandbox.record();
        let not_ready = || ServiceError::NotReady { id: pod.id.to_string() };
        if !pod.ready() {
            return Err(not_ready());
        }
        let monitor = sandbox.monitor().ok_or_else(not_ready)?;
        self.check_target(&pod.id, &spec)?;
        let image = self
            .images
            .find(&spec.image)
            .map_err(|source| ServiceError::Image { what: "cannot find the image", source })?
            .ok_or_else(|| ServiceError::NoImage { image: spec.image.clone() })?;
        let id = ContainerId::from_random(random_id()?);
        let key = ContainerRecord::key(&pod.spec.name.key(), &spec.name, spec.attempt);
        self.reserve(&key, id.as_str())?;
        let mut journal = match Journal::begin(&self.state, "CreateContainer", &key, id.as_str(), now()) {
            Ok(journal) => journal,
            Err(error) => {
                self.release(&key);
                return Err(ServiceError::Store(error));
            }
        };
        match self.make_container(&id, &sandbox, &monitor, spec, &image, &mut journal).await {
            Ok(container) => {
                self.insert_container(container.clone());
                if let Err(error) = journal.end() {
                    tracing::warn!(container = %id, error = %Chain(&error), "journal entry stays");
                }
                self.publish(&container, EventKind::Created);
                tracing::info!(container = %id, sandbox = %pod.id, name = key, "container created");
                Ok(id)
            }
            Err(error) => Err(self.give_up(journal, error).await),
        }
    }

    /// The container whose PID namespace is asked for is of the same pod, and runs.
    fn check_target(&self, pod: &SandboxId, spec: &ContainerSpec) -> Result<(), ServiceError> {
        let options = &spec.security.namespaces;
        if options.pid != NamespaceMode::Target {
            return Ok(());
        }
        let bad = |reason, kind| ServiceError::Field {
            field: "linux.security_context.namespace_options.target_id",
            value: options.target_id.clone(),
            reason,
            kind,
        };
        let target = self.containers_of(pod).into_iter().map(|container| container.record()).find(|record| record.id.as_str() == options.target_id);
        let target = target.ok_or_else(|| bad("is no container of this pod", Kind::NotFound))?;
        match target.phase() {
            Phase::Running => Ok(()),
            Phase::Created | Phase::Exited => Err(bad("does not run", Kind::FailedPrecondition)),
        }
    }

    async fn make_container(
        self: &Arc<Self>,
        id: &ContainerId,
        sandbox: &Sandbox,
        monitor: &monitors::Monitor,
        spec: ContainerSpec,
        image: &Image,
        journal: &mut Journal,
    ) -> Result<Arc<Container>, ServiceError> {
        let pod = sandbox.record();
        let lease = self.images.lease(image).map_err(|source| ServiceError::Image { what: "cannot hold the image's layers", source })?;
        let cgroup = self.cgroups.container(&pod.cgroup_parent, id);
        let layer_dir = self.layer_dir(id);
        let confinement = self.confinement(&pod, &spec).await?;
        let volumes = self.volume_images(&spec)?;
        let plan = self.container_plan(id, &pod, &spec, image, &lease, &volumes, confinement, &cgroup, &layer_dir)?;
        let stop_signal = stop_signal(&spec, image)?;

        let state_dir = self.state.container(id);
        journal.enter("directory", Undo::RemoveDir(state_dir.clone())).map_err(ServiceError::Store)?;
        make_dir(&state_dir).map_err(ServiceError::Store)?;
        let exit_file = preallocate(&self.state.exit_file(id))?;
        self.put_plan(id, &plan)?;
        journal.enter("writable layer", Undo::RemoveDir(layer_dir.clone())).map_err(ServiceError::Store)?;
        let own_volumes = volumes::own(&plan);
        let pod_spec = pod.clone();
        let log_dir = plan.log.dir.clone();
        let wants_log = !plan.log.path.as_os_str().is_empty();
        blocking(move || -> Result<(), ServiceError> {
            for dir in [layer_dir.join(UPPER), layer_dir.join(WORK)] {
                make_dir(&dir).map_err(ServiceError::Store)?;
            }
            // The upper directory becomes the container's `/`.
            fs::set_permissions(layer_dir.join(UPPER), std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(|source| ServiceError::Host {
                what: "set the mode of",
                path: layer_dir.join(UPPER),
                source,
            })?;
            files::own(&layer_dir.join(UPPER), &pod_spec.spec)?;
            if wants_log {
                fs::create_dir_all(&log_dir).map_err(|source| ServiceError::Host { what: "make log directory", path: log_dir.clone(), source })?;
            }
            volumes::make(&own_volumes, &pod_spec.spec)
        })
        .await??;

        journal
            .enter("container", Undo::RemoveContainer { sandbox: pod.id.clone(), container: id.clone(), cgroup: cgroup.clone() })
            .map_err(ServiceError::Store)?;
        // Until init is in the group.
        let holder = self.cgroups.prepare(&cgroup, &plan.cgroup.resources).await?;
        let what = "cannot create the container";
        let sealed = monitors::seal("CreateContainer", &plan).map_err(ServiceError::monitor(what))?;
        let call = Call::CreateContainer(monitor_api::CreateContainer { id: id.to_string() });
        let answer = monitor.call(call, vec![sealed, exit_file.into()]).await.map_err(ServiceError::monitor(what))?;
        let (Body::Created(created), _) = answer else {
            return Err(ServiceError::monitor(what)(monitors::MonitorError::Unexpected { call: "CreateContainer" }));
        };
        drop(holder);
        let record = ContainerRecord {
            id: id.clone(),
            sandbox: pod.id.clone(),
            spec,
            image_id: image.id.clone(),
            layers: lease.names().to_vec(),
            image_volumes: volumes.images,
            created_at: now(),
            pid: created.pid,
            cgroup,
            user: (created.user.uid, created.user.gid, created.user.groups),
            stop_signal,
            started_at: None,
            exit: None,
            updating: None,
        };
        // From here on the container exists: recovery takes the record, not the journal.
        self.state.put_container(&record).map_err(ServiceError::Store)?;
        Ok(Container::new(record, volumes.leases.into_iter().chain([lease]).collect(), &self.config))
    }

    #[allow(clippy::too_many_arguments)]
    fn container_plan(
        &self,
        id: &ContainerId,
        pod: &crate::store::record::SandboxRecord,
        spec: &ContainerSpec,
        image: &Image,
        lease: &LayerLease,
        volumes: &VolumeImages,
        confinement: Confinement,
        cgroup: &str,
        layer_dir: &Path,
    ) -> Result<ContainerPlan, ServiceError> {
        if spec.security.privileged && !pod.spec.privileged {
            return Err(ServiceError::Field {
                field: "linux.security_context.privileged",
                value: "true".into(),
                reason: "is not possible in a sandbox that is not privileged",
                kind: Kind::InvalidArgument,
            });
        }
        self.check_resources(&spec.resources)?;
        let defaults = ImageDefaults {
            name: spec.image.clone(),
            user: image.config.user.clone(),
            env: image.config.env.clone(),
            entrypoint: image.config.entrypoint.clone(),
            cmd: image.config.cmd.clone(),
            working_dir: image.config.working_dir.clone(),
            volumes: image.config.volumes.clone(),
        };
        let available = self.available_to(pod);
        let pids = self.config.runtime.pids_limit;
        let around = Surroundings {
            id: id.to_string(),
            cgroup: cgroup.into(),
            cgroup_made: self.cgroups.makes_groups(),
            rootfs: Overlay {
                layers_dir: lease.layers_dir().into(),
                lower: lease.names().to_vec(),
                upper: layer_dir.join(UPPER),
                work: layer_dir.join(WORK),
                ..Overlay::default()
            },
            pivot_dir: self.state.pivot(),
            image_volumes: volumes.layers(),
            volumes_dir: layer_dir.join(VOLUMES),
            pod_files: files::pod_files(&self.state.sandbox(&pod.id)),
            hostname: pod.spec.hostname.clone(),
            seccomp: confinement.seccomp,
            apparmor: confinement.apparmor,
            labels: confinement.labels,
            default_capabilities: self.default_capabilities,
            available_capabilities: available,
            rlimits: self.rlimits.clone(),
            pids_limit: (pids > 0).then_some(pids),
            log_max_line: self.config.runtime.log_max_line,
            devices: devices::of(spec)?,
            restrict_oom_score_adj: self.restrict_oom_score_adj,
            cgroup_v2: self.hierarchy.is_v2(),
        };
        spec::plan(spec, &pod.spec, &defaults, around).map_err(ServiceError::Spec)
    }

    /// Starts a created container. One whose program can't be executed is EXITED afterwards, with reason `StartError`.
    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<(), ServiceError> {
        let container = self.find_container(id)?;
        let _op = container.op.lock().await;
        let record = container.record();
        admit(record.phase(), Op::Start).map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })?;
        let sandbox = self.sandbox_of(&record)?;
        let monitor = sandbox.monitor().ok_or_else(|| ServiceError::NotReady { id: record.sandbox.to_string() })?;
        let call = Call::StartContainer(monitor_api::Container { id: record.id.to_string() });
        match monitor.call(call, Vec::new()).await {
            Ok((Body::Started(started), _)) => {
                container.update(&self.state, |record| record.started_at = Some(started.started_at)).map_err(ServiceError::Store)?;
                self.publish(&container, EventKind::Started);
                tracing::info!(container = %record.id, pid = record.pid, "container started");
                Ok(())
            }
            Ok(_) => Err(ServiceError::monitor("cannot start the container")(monitors::MonitorError::Unexpected { call: "StartContainer" })),
            Err(error) => {
                let error = ServiceError::monitor("cannot start the container")(error);
                if !matches!(error.kind(), Kind::DeadlineExceeded | Kind::Unavailable) {
                    self.failed_start(&container, &Chain(&error).to_string());
                }
                Err(error)
            }
        }
    }

    fn failed_start(&self, container: &Container, message: &str) {
        let at = now();
        let updated = container.update(&self.state, |record| {
            record.started_at = record.started_at.or(Some(at));
            record.exit = Some(Exit { code: 128, finished_at: at, reason: "StartError".into(), message: message.into() });
        });
        if let Err(error) = updated {
            tracing::error!(container = %container.record().id, error = %Chain(&error), "failed start can't be recorded");
        }
        self.publish(container, EventKind::Stopped);
    }

    /// Stops a container: its signal, then SIGKILL after `grace`. One that is gone or has exited is stopped.
    pub async fn stop_container(self: &Arc<Self>, id: &str, grace: Duration) -> Result<(), ServiceError> {
        let Ok(container) = self.find_container(id) else { return Ok(()) };
        let record = container.record();
        match admit(record.phase(), Op::Stop).map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })? {
            Admit::AlreadyDone => return Ok(()),
            Admit::Do => {}
        }
        let monitor = match self.sandbox_of(&record)?.monitor() {
            Some(monitor) => monitor,
            None => {
                self.bury(&self.sandbox_of(&record)?).await?;
                return Ok(());
            }
        };
        let call = Call::StopContainer(monitor_api::StopContainer {
            id: record.id.to_string(),
            signal: record.stop_signal,
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        });
        let deadline = grace.saturating_add(monitor.deadline()).min(Duration::from_secs(u64::from(u32::MAX)));
        match monitor.done_within(call, deadline).await {
            Err(monitors::MonitorError::Gone) => self.bury(&self.sandbox_of(&record)?).await?,
            done => done.map_err(ServiceError::monitor("cannot stop the container"))?,
        }
        // The exit stands in the monitor's queue before the answer; the service's own task takes it.
        let mut exited = container.exited.subscribe();
        if tokio::time::timeout(Duration::from_secs(5), exited.wait_for(|done| *done)).await.is_err() {
            self.take_exit_file(&container, "the monitor reported no exit");
        }
        Ok(())
    }

    /// Opens the log anew. Only while the container runs.
    pub async fn reopen_log(self: &Arc<Self>, id: &str) -> Result<(), ServiceError> {
        let container = self.find_container(id)?;
        let record = container.record();
        admit(record.phase(), Op::ReopenLog).map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })?;
        let monitor = self.sandbox_of(&record)?.monitor().ok_or_else(|| ServiceError::NotReady { id: record.sandbox.to_string() })?;
        let call = Call::ReopenLog(monitor_api::Container { id: record.id.to_string() });
        monitor.done(call).await.map_err(ServiceError::monitor("cannot reopen the log"))
    }

    /// A container's init has ended: the fact goes on record once, then to subscribers.
    pub(super) fn on_exit(&self, exit: &ExitRecord) {
        let Ok(container) = self.find_container(&exit.container) else { return };
        if container.record().exit.is_some() {
            return;
        }
        let updated = container.update(&self.state, |record| {
            if exit.started_at != 0 {
                record.started_at = record.started_at.or(Some(exit.started_at));
            }
            record.exit = Some(exit_of(exit));
        });
        match updated {
            Ok(()) => tracing::info!(container = %exit.container, code = exit.code, oom = exit.oom_killed, "container exited"),
            Err(error) => tracing::error!(container = %exit.container, error = %Chain(&error), "exit can't be recorded"),
        }
        self.publish(&container, EventKind::Stopped);
    }

    /// Takes a container's exit from the file that its monitor filled; if there is none, `why` goes on record with 137.
    pub(super) fn take_exit_file(&self, container: &Container, why: &str) {
        let record = container.record();
        if record.phase() == Phase::Exited {
            return;
        }
        let filled = fs::read(self.state.exit_file(&record.id)).ok().and_then(|bytes| exit_record::decode(&bytes));
        if let Some(exit) = filled.filter(|exit| exit.container == record.id.as_str()) {
            return self.on_exit(&exit);
        }
        let exit = Exit { code: 137, finished_at: now(), reason: "MonitorDied".into(), message: why.into() };
        if let Err(error) = container.update(&self.state, |record| record.exit = Some(exit)) {
            tracing::error!(container = %record.id, error = %Chain(&error), "exit can't be recorded");
        }
        self.publish(container, EventKind::Stopped);
    }

    /// The directory of a container's writable layer.
    pub(super) fn layer_dir(&self, id: &ContainerId) -> PathBuf {
        self.config.root.join("containers").join(id.as_str())
    }

    /// Keeps what a container is made with.
    pub(super) fn put_plan(&self, id: &ContainerId, plan: &ContainerPlan) -> Result<(), ServiceError> {
        crate::store::replace(&self.state.container(id).join(PLAN), &crate::wire::encode(plan), 0o600).map_err(ServiceError::Store)
    }

    /// The process of a container, from which execs are made.
    pub(super) fn process_of(&self, record: &ContainerRecord) -> Result<Process, ServiceError> {
        // Who the container turned out to be, whatever it has written to its /etc/passwd since.
        let (uid, gid, groups) = &record.user;
        let user = User { uid: Some(*uid), gid: Some(*gid), supplemental: groups.clone(), policy: GroupsPolicy::Strict, ..User::default() };
        Ok(Process { user, ..self.plan_of(&record.id)?.process })
    }

    /// What a container was made with.
    pub(super) fn plan_of(&self, id: &ContainerId) -> Result<ContainerPlan, ServiceError> {
        let path = self.state.container(id).join(PLAN);
        let bytes = fs::read(&path).map_err(|source| ServiceError::Host { what: "read", path: path.clone(), source })?;
        crate::wire::decode(&bytes).map_err(|error| ServiceError::Host {
            what: "decode",
            path,
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
        })
    }
}

fn exit_of(exit: &ExitRecord) -> Exit {
    let (reason, message) = match &exit.start_error {
        Some(error) => ("StartError", Chain(error).to_string()),
        None if exit.oom_killed => ("OOMKilled", String::new()),
        None if exit.code == 0 => ("Completed", String::new()),
        None => ("Error", String::new()),
    };
    Exit { code: exit.code, finished_at: exit.finished_at, reason: reason.into(), message }
}

/// The file that the monitor fills when the container ends; its room is taken now, so that a full tmpfs fails the create.
fn preallocate(path: &Path) -> Result<File, ServiceError> {
    let failed = |source| ServiceError::Host { what: "allocate", path: path.into(), source };
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, exit_record::SIZE).map_err(|error| failed(error.into()))?;
    Ok(file)
}

fn stop_signal(spec: &ContainerSpec, image: &Image) -> Result<u32, ServiceError> {
    match (spec.stop_signal, image.config.stop_signal.as_deref().filter(|name| !name.is_empty())) {
        (Some(signal), _) => Ok(signal),
        (None, Some(name)) => signal::parse(name).ok_or_else(|| ServiceError::Field {
            field: "StopSignal of the image",
            value: name.into(),
            reason: "is no signal",
            kind: Kind::InvalidArgument,
        }),
        (None, None) => Ok(libc::SIGTERM as u32),
    }
}

/// The resource limits of the configuration, which were checked when it was read. A daemon without CAP_SYS_RESOURCE can't
/// raise its own hard limits: what is above them is lowered, once and said aloud, rather than failing every container.
pub(super) fn rlimits(config: &crate::config::Config, may_raise: bool) -> Vec<crate::plan::Rlimit> {
    let mut limits: Vec<_> = config.runtime.default_ulimits.iter().filter_map(|text| rlimit::parse(text)).collect();
    for limit in limits.iter_mut().filter(|_| !may_raise) {
        let own = crate::sys::creds::limit(limit.resource).map_or(u64::MAX, |(_, hard)| hard);
        if limit.hard > own {
            tracing::warn!(resource = limit.resource, asked = limit.hard, given = own, "defaultUlimits is above the daemon's own hard limit");
            limit.hard = own;
            limit.soft = limit.soft.min(own);
        }
    }
    limits
}
