//! The cgroup driver: who makes, limits and removes the control groups of pods, containers and monitors, and how they are
//! named. With `cgroupfs` that is the creators alone, by files. With `systemd` each container is a scope in its pod's slice.
//!
//! A scope cannot be without a process. So it is made around a *holder*, a program of ours that does nothing, before the
//! container's creator begins; init is then cloned into the scope, as into any group, and the holder leaves. Should this daemon
//! die in between, so does the holder, and systemd removes a scope that is empty.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::sandbox::blocking;
use super::systemd::{Scope, Systemd};
use super::{Service, ServiceError};
use crate::cgroup::systemd::{self as units, Property, Value};
use crate::cgroup::{Cgroup, Hierarchy};
use crate::config::Config;
use crate::errchain::{Chain, Kind, Kinded};
use crate::ids::SandboxId;
use crate::plan::Resources;
use crate::sys;

/// Bytes that the monitor of one pod, with its stdio process, may use under systemd: many times what it needs, so that a fault in
/// one is not the node's.
const MONITOR_MEMORY: i64 = 128 << 20;
/// Where systemd says that it is the node's init (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// The slice of the monitors' scope.
const MONITORS_SLICE: &str = "system.slice";
/// The group of the process that keeps that scope.
const HOLDER: &str = "holder";
/// At a shutdown containers are stopped after it: until then it stops its pods itself.
const KUBELET: &str = "kubelet.service";

/// The driver and what it needs.
pub struct Cgroups {
    hierarchy: Hierarchy,
    /// `None`: cgroupfs.
    systemd: Option<Systemd>,
    /// The parent of pods for which none is asked for, as a path.
    default_parent: String,
    /// The group of monitors; empty: the daemon's own.
    monitors: String,
    /// The monitor's program, which can be a holder too.
    holder: PathBuf,
    /// How the description of each scope of this daemon's containers ends.
    owner: String,
    /// Keeps the monitors' scope while there is no monitor.
    monitors_held: tokio::sync::Mutex<Option<Holder>>,
}

/// A process that keeps a scope; ends when this is dropped.
pub struct Holder {
    pid: u32,
    _stdin: tokio::process::ChildStdin,
}

impl Cgroups {
    /// The driver that the configuration names; `auto`: systemd where it is the node's init and there is cgroup v2 alone.
    pub(super) async fn new(config: &Config, hierarchy: &Hierarchy, monitor: &Path) -> Result<Self, ServiceError> {
        let refused = |reason| ServiceError::Field {
            field: "cgroup.driver of the configuration",
            value: config.cgroup.driver.clone(),
            reason,
            kind: Kind::FailedPrecondition,
        };
        let missing = if !hierarchy.is_v2() {
            Some("needs cgroup v2 alone, which this node does not have")
        } else if !Path::new(BOOTED).is_dir() {
            Some("needs systemd as the node's init, which it is not")
        } else if !in_first_pid_namespace() {
            Some("needs the node's own PID namespace, in which the daemon is not")
        } else {
            None
        };
        let wanted = match (config.cgroup.driver.as_str(), missing) {
            ("systemd", Some(reason)) => return Err(refused(reason)),
            ("systemd", None) | ("auto", None) => true,
            _ => false,
        };
        let failed = |source| ServiceError::Systemd { what: "cannot use the systemd cgroup driver", source };
        let systemd = if wanted { Some(Systemd::connect().await.map_err(failed)?) } else { None };
        let monitors = match config.monitor.cgroup.as_str() {
            path if systemd.is_none() || path.is_empty() => path.to_string(),
            path => format!("/{MONITORS_SLICE}/{}", units::scope_of_path(path)),
        };
        let cgroups = Self {
            hierarchy: hierarchy.clone(),
            systemd,
            default_parent: config.cgroup.default_parent.clone(),
            monitors,
            holder: monitor.into(),
            owner: format!("of Copepod at {}", config.state.display()),
            monitors_held: tokio::sync::Mutex::default(),
        };
        tracing::info!(driver = cgroups.driver(), "cgroup driver");
        cgroups.make_monitors().await?;
        Ok(cgroups)
    }

    /// `cgroupfs` or `systemd`.
    pub fn driver(&self) -> &'static str {
        if self.systemd.is_some() { "systemd" } else { "cgroupfs" }
    }

    /// The path of a pod's control group, and whether it is ours to remove. kubelet names slices to systemd and paths to cgroupfs.
    pub(super) fn pod(&self, asked: &str, id: &SandboxId) -> Result<(String, bool), ServiceError> {
        let bad = |reason| {
            let value = asked.chars().take(200).collect();
            ServiceError::Field { field: "config.linux.cgroup_parent", value, reason, kind: Kind::InvalidArgument }
        };
        if self.systemd.is_none() {
            return match asked {
                "" => Ok((format!("{}/{id}", self.default_parent), true)),
                slice if slice.ends_with(".slice") && !slice.contains('/') => Err(bad("is a systemd slice, but the cgroup driver is cgroupfs")),
                path => Ok((format!("/{}", path.trim_start_matches('/')), false)),
            };
        }
        let name = match asked {
            "" => {
                let above = units::slice_of_path(&self.default_parent);
                format!("{}-{id}.slice", above.trim_end_matches(".slice"))
            }
            path => path.rsplit('/').next().unwrap_or_default().to_string(),
        };
        let path = units::slice_path(&name).map_err(|_| bad("is no systemd slice, but the cgroup driver is systemd"))?;
        if asked.contains('/') && asked.trim_start_matches('/') != path.trim_start_matches('/') {
            return Err(bad("is not where systemd has that slice"));
        }
        Ok((path, asked.is_empty()))
    }

    /// The path of a container's control group in its pod's.
    pub(super) fn container(&self, pod: &str, id: &impl std::fmt::Display) -> String {
        let pod = pod.trim_end_matches('/');
        if self.systemd.is_some() { format!("{pod}/copepod-{id}.scope") } else { format!("{pod}/{id}") }
    }

    /// Containers' groups are made by [`prepare`](Self::prepare), and not by their creators.
    pub(super) fn makes_groups(&self) -> bool {
        self.systemd.is_some()
    }

    /// Makes a container's group, where the creator doesn't. To be dropped when init is in it.
    pub(super) async fn prepare(&self, path: &str, limits: &Resources) -> Result<Option<Holder>, ServiceError> {
        let Some(systemd) = &self.systemd else { return Ok(None) };
        let (name, slice) = unit(path)?;
        let mut properties = limit_properties(limits)?;
        // systemd has a default of its own, where Kubernetes means none.
        if properties.iter().all(|property| property.name != "TasksMax") {
            properties.push(Property { name: "TasksMax", value: Value::Number(u64::MAX) });
        }
        let holder = self.hold()?;
        let description = format!("Container {} {}", container_of(name).unwrap_or_default(), self.owner);
        let scope = Scope { name, slice, description: &description, pid: holder.pid, stops_after: KUBELET, properties: &properties };
        systemd.start_scope(&scope).await.map_err(|source| ServiceError::Systemd { what: "cannot make the container's scope", source })?;
        Ok(Some(holder))
    }

    /// Has systemd, which writes a unit's limits again when it likes, know those that a container's group was just given.
    pub(super) async fn updated(&self, path: &str, limits: &Resources) -> Result<(), ServiceError> {
        let Some(systemd) = &self.systemd else { return Ok(()) };
        let properties = limit_properties(limits)?;
        if properties.is_empty() {
            return Ok(());
        }
        let (name, _) = unit(path)?;
        let failed = |source| ServiceError::Systemd { what: "cannot change the limits of the container's scope", source };
        systemd.set_properties(name, &properties).await.map_err(failed)
    }

    /// Has systemd forget the unit of a group that is being removed; nothing lives in it any more.
    pub(super) async fn release(&self, path: &str) -> Result<(), ServiceError> {
        match (&self.systemd, units::unit_of_path(path)) {
            (Some(systemd), Some(name)) => {
                systemd.stop(name).await.map_err(|source| ServiceError::Systemd { what: "cannot stop the control group's unit", source })
            }
            _ => Ok(()),
        }
    }

    /// Stops scopes of this daemon's that belong to no container: a crash left them.
    pub(super) async fn sweep(&self, known: impl Fn(&str) -> bool) {
        let Some(systemd) = &self.systemd else { return };
        let units = match systemd.units("copepod-*.scope").await {
            Ok(units) => units,
            Err(error) => return tracing::warn!(error = %Chain(&error), "scopes can't be listed"),
        };
        for unit in units.iter().filter(|unit| unit.description.ends_with(&self.owner)) {
            if container_of(&unit.name).is_none_or(&known) {
                continue;
            }
            match systemd.stop(&unit.name).await {
                Ok(()) => tracing::info!(scope = unit.name, "scope of a container that is gone was stopped"),
                Err(error) => tracing::warn!(scope = unit.name, error = %Chain(&error), "scope of a container that is gone can't be stopped"),
            }
        }
    }

    /// The group that a pod's monitor is to enter, and whether it is that monitor's alone, to be removed after it. Empty: the
    /// daemon's own.
    pub(super) fn monitor(&self, id: &SandboxId) -> (String, bool) {
        if self.systemd.is_none() || self.monitors.is_empty() {
            return (self.monitors.clone(), false);
        }
        (format!("{}/{id}", self.monitors), true)
    }

    /// Makes that group.
    pub(super) async fn prepare_monitor(&self, path: &str) -> Result<(), ServiceError> {
        let failed = |source| ServiceError::Cgroup { what: "cannot make the monitor's control group", source };
        self.make_monitors().await?;
        let cgroup = Cgroup::new(&self.hierarchy, path).map_err(failed)?;
        let limits = Resources { memory_limit: Some(MONITOR_MEMORY), ..Resources::default() };
        blocking(move || cgroup.create().and_then(|_| cgroup.set(&limits))).await?.map_err(failed)
    }

    /// Monitors live outside of the pods' groups and of the daemon's.
    async fn make_monitors(&self) -> Result<(), ServiceError> {
        if self.monitors.is_empty() {
            return Ok(());
        }
        let failed = |source| ServiceError::Cgroup { what: "cannot make the monitors' control group", source };
        let cgroup = Cgroup::new(&self.hierarchy, &self.monitors).map_err(failed)?;
        let Some(systemd) = &self.systemd else {
            return if cgroup.exists() { Ok(()) } else { cgroup.create().map(drop).map_err(failed) };
        };
        // One scope for all, which lives as long as this daemon or any monitor does.
        let mut held = self.monitors_held.lock().await;
        if held.is_some() && cgroup.exists() {
            return Ok(());
        }
        let failed = |source| ServiceError::Systemd { what: "cannot make the monitors' scope", source };
        let (name, slice) = unit(&self.monitors)?;
        let holder = self.hold()?;
        let properties = [Property { name: "TasksMax", value: Value::Number(u64::MAX) }];
        let scope = Scope { name, slice, description: "Monitors of Copepod's pods", pid: holder.pid, stops_after: KUBELET, properties: &properties };
        match systemd.start_scope(&scope).await {
            // An earlier daemon made it.
            Err(error) if error.kind() == Kind::AlreadyExists && cgroup.exists() => {}
            started => started.map_err(failed)?,
        }
        // Each process of it is in a group of its own: what has groups with limits below it takes none.
        let pid = holder.pid;
        let entered = blocking(move || enter_below(&cgroup, HOLDER, pid)).await?;
        entered.map_err(|source| ServiceError::Host { what: "move a process into", path: format!("{}/{HOLDER}", self.monitors).into(), source })?;
        *held = Some(holder);
        Ok(())
    }

    fn hold(&self) -> Result<Holder, ServiceError> {
        let failed = |source| ServiceError::Host { what: "start", path: self.holder.clone(), source };
        let mut command = sys::process::command(&self.holder);
        command.arg("--hold").env_clear().current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = tokio::process::Command::from(command).spawn().map_err(failed)?;
        let (Some(pid), Some(stdin)) = (child.id(), child.stdin.take()) else { return Err(failed(std::io::ErrorKind::NotFound.into())) };
        // Reaped when it ends.
        tokio::spawn(async move {
            let _ = child.wait().await;
        });
        Ok(Holder { pid, _stdin: stdin })
    }
}

impl Service {
    /// kubelet is to use the systemd cgroup driver; else cgroupfs.
    pub fn uses_systemd(&self) -> bool {
        self.cgroups.systemd.is_some()
    }
}

fn limit_properties(limits: &Resources) -> Result<Vec<Property>, ServiceError> {
    units::properties(limits).map_err(|source| ServiceError::Cgroup { what: "cannot set the container's limits", source })
}

/// A scope and its slice.
fn unit(path: &str) -> Result<(&str, &str), ServiceError> {
    let found = units::unit_of_path(path).zip(units::slice_above(path));
    found.ok_or_else(|| ServiceError::Field {
        field: "control group",
        value: path.into(),
        reason: "is no scope in a slice: it was made by another cgroup driver",
        kind: Kind::FailedPrecondition,
    })
}

/// The container of a scope, by its name.
fn container_of(scope: &str) -> Option<&str> {
    scope.strip_prefix("copepod-")?.strip_suffix(".scope")
}

/// Puts a process into a group below a delegated one, which has nothing to do with it but that it is there.
fn enter_below(cgroup: &Cgroup, name: &str, pid: u32) -> std::io::Result<()> {
    for (_, dir) in cgroup.dirs() {
        match fs::create_dir(dir.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        fs::write(dir.join(name).join("cgroup.procs"), pid.to_string())?;
    }
    Ok(())
}

/// D-Bus carries process ids as systemd's own namespace has them.
fn in_first_pid_namespace() -> bool {
    /// PROC_PID_INIT_INO (linux/nsfs.h).
    const FIRST: &str = "pid:[4026531836]";
    fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link == Path::new(FIRST))
}
