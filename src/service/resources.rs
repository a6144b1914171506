//! UpdateContainerResources and UpdatePodSandboxResources, and what of limits only this node can judge.
//!
//! An update of a container is on record before its control group is touched, and part of the container's limits only when
//! the kernel has taken all of it: a daemon that was killed in between does the update again when it starts. Kubelet owns the
//! pod's own control group: what it says of a pod is kept and shown, and set nowhere.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, openat};

use super::sandbox::blocking;
use super::{Container, Service, ServiceError, fault};
use crate::cgroup::Cgroup;
use crate::errchain::{Chain, Kind, Kinded};
use crate::model::container::Resources;
use crate::model::lifecycle::{Op, Phase, admit};
use crate::model::spec;
use crate::store::record::ContainerRecord;

/// The CPUs and the memory nodes that this machine uses; the latter is missing where the kernel knows no nodes.
const CPUS: &str = "/sys/devices/system/cpu/online";
const NODES: &str = "/sys/devices/system/node/online";
/// How often processes are looked for that were born meanwhile.
const ROUNDS: usize = 3;

impl Service {
    /// Changes the limits of a container that is created or runs; 0 and empty leave a limit as it is. All or nothing.
    /// ResourceExhausted: a memory limit below what is in use; FailedPrecondition: the container has exited.
    pub async fn update_container(self: &Arc<Self>, id: &str, change: Resources) -> Result<(), ServiceError> {
        let container = self.find_container(id)?;
        let _op = container.op.lock().await;
        // One that was applied, and could not be noted.
        self.finish_update(&container).await?;
        let record = container.record();
        admit(record.phase(), Op::Update).map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })?;
        self.check_resources(&record.spec.resources.updated(&change))?;
        container.update(&self.state, |record| record.updating = Some(change)).map_err(ServiceError::Store)?;
        fault::point("recorded", "UpdateContainerResources");
        self.finish_update(&container).await?;
        tracing::info!(container = %record.id, "container's limits changed");
        Ok(())
    }

    /// Does the update that is on record, if there is one; what the kernel refuses is forgotten.
    pub(super) async fn finish_update(&self, container: &Container) -> Result<(), ServiceError> {
        let record = container.record();
        let Some(change) = record.updating.clone() else { return Ok(()) };
        let now = record.spec.resources.updated(&change);
        let applied = self.apply_update(&record, &change, &now).await;
        fault::point("applied", "UpdateContainerResources");
        let noted = container.update(&self.state, |record| {
            record.updating = None;
            if applied.is_ok() {
                record.spec.resources = now;
            }
        });
        match applied {
            // Its control group has gone with it.
            Err(error) if error.kind() == Kind::NotFound && container.record().phase() == Phase::Exited => {
                let refused = admit(Phase::Exited, Op::Update).map(drop);
                refused.map_err(|source| ServiceError::Refused { id: record.id.to_string(), source })
            }
            Err(error) => Err(error),
            Ok(()) => noted.map_err(ServiceError::Store),
        }
    }

    async fn apply_update(&self, record: &ContainerRecord, change: &Resources, now: &Resources) -> Result<(), ServiceError> {
        let failed = |source| ServiceError::Cgroup { what: "cannot set the container's limits", source };
        let cgroup = Cgroup::new(&self.hierarchy, &record.cgroup).map_err(failed)?;
        let plan = spec::update(now, change);
        let limits = plan.clone();
        let (from, to) = (self.oom_score(&record.spec.resources), self.oom_score(now));
        blocking(move || {
            rescore(&cgroup, from, to).inspect_err(|_| drop(rescore(&cgroup, to, from)))?;
            cgroup.update(&plan).map_err(failed).inspect_err(|_| drop(rescore(&cgroup, to, from)))
        })
        .await??;
        self.cgroups.updated(&record.cgroup, &limits).await?;
        // For commands that are executed from now on, and for who asks what the container is.
        let mut plan = self.plan_of(&record.id)?;
        plan.process.oom_score_adj = Some(to);
        plan.cgroup.resources = spec::limits(now, plan.cgroup.resources.pids_limit);
        self.put_plan(&record.id, &plan)
    }

    /// The oom_score_adj that a container with these limits has.
    fn oom_score(&self, resources: &Resources) -> i32 {
        let asked = resources.oom_score_adj.clamp(-1000, 1000) as i32;
        let own = || std::fs::read_to_string("/proc/self/oom_score_adj").ok()?.trim().parse().ok();
        if self.restrict_oom_score_adj { asked.max(own().unwrap_or(asked)) } else { asked }
    }

    /// Refuses limits that this node can't set, in words that name the field: the kernel's own would name a file.
    pub(super) fn check_resources(&self, all: &Resources) -> Result<(), ServiceError> {
        let bad = |field, value: String, reason| Err(ServiceError::Field { field, value, reason, kind: Kind::InvalidArgument });
        if let Err((value, reason)) = all.check_memory() {
            return bad("linux.resources.memory_swap_limit_in_bytes", value.to_string(), reason);
        }
        if let Some(key) = all.unified.keys().next().filter(|_| !self.hierarchy.is_v2()) {
            return bad("linux.resources.unified", key.clone(), "is a setting of cgroup v2, and this node has cgroup v1");
        }
        if !on_node(&all.cpuset_cpus, CPUS) {
            return bad("linux.resources.cpuset_cpus", all.cpuset_cpus.clone(), "names CPUs that this node lacks");
        }
        if !on_node(&all.cpuset_mems, NODES) {
            return bad("linux.resources.cpuset_mems", all.cpuset_mems.clone(), "names memory nodes that this node lacks");
        }
        Ok(())
    }

    /// Keeps what a pod's overhead and its containers' sum are now. What isn't given, or is 0, stays.
    pub async fn update_sandbox(&self, id: &str, overhead: Option<Resources>, resources: Option<Resources>) -> Result<(), ServiceError> {
        let sandbox = self.find_sandbox(id)?;
        let _op = sandbox.op.lock().await;
        let record = sandbox.record();
        if !record.ready() {
            return Err(ServiceError::NotReady { id: record.id.to_string() });
        }
        let change = |old: &mut Option<Resources>, new: Option<Resources>| {
            if let Some(new) = new {
                *old = Some(old.take().unwrap_or_default().updated(&new));
            }
        };
        sandbox
            .update(&self.state, |record| {
                change(&mut record.spec.overhead, overhead);
                change(&mut record.spec.resources, resources);
            })
            .map_err(ServiceError::Store)
    }

    /// An update that a daemon was killed in.
    pub(super) async fn resume_update(&self, container: &Container) {
        let record = container.record();
        if record.updating.is_none() || record.phase() == Phase::Exited {
            return;
        }
        match self.finish_update(container).await {
            Ok(()) => tracing::info!(container = %record.id, "container's limits changed, as was asked before the start"),
            Err(error) => tracing::error!(container = %record.id, error = %Chain(&error), "container's limits can't be changed"),
        }
    }
}

/// Every number of `list` is in the kernel's list at `path`. One that can't be read is left for the kernel to judge.
fn on_node(list: &str, path: &str) -> bool {
    if list.is_empty() {
        return true;
    }
    let Ok(online) = std::fs::read_to_string(path) else { return true };
    let online: Vec<(u32, u32)> = ranges(online.trim()).collect();
    ranges(list).all(|(first, last)| (first..=last).all(|n| online.iter().any(|(low, high)| (*low..=*high).contains(&n))))
}

/// `0-3,7` as (0, 3), (7, 7).
fn ranges(list: &str) -> impl Iterator<Item = (u32, u32)> {
    list.split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.parse().ok()?, last.parse().ok()?))
    })
}

/// Gives `to` to every process of a group that has the oom_score_adj `from`. One that chose its own keeps it.
fn rescore(cgroup: &Cgroup, from: i32, to: i32) -> Result<(), ServiceError> {
    if from == to {
        return Ok(());
    }
    for _ in 0..ROUNDS {
        let procs = cgroup.procs(true).map_err(|source| ServiceError::Cgroup { what: "cannot list the container's processes", source })?;
        let mut changed = false;
        for pid in procs {
            match rescore_process(pid, cgroup.path(), from, to) {
                Ok(did) => changed |= did,
                // It has ended.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
                Err(source) => return Err(ServiceError::Host { what: "change", path: format!("/proc/{pid}/oom_score_adj").into(), source }),
            }
        }
        if !changed {
            break;
        }
    }
    Ok(())
}

/// By the process's own directory, so that another of the same number is never meant.
fn rescore_process(pid: u32, cgroup: &str, from: i32, to: i32) -> io::Result<bool> {
    let dir = rustix::fs::open(format!("/proc/{pid}"), OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let read = |name: &str| io::read_to_string(std::fs::File::from(openat(dir.as_fd(), name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?));
    if !read("cgroup")?.contains(cgroup) || read("oom_score_adj")?.trim().parse() != Ok(from) {
        return Ok(false);
    }
    let file = openat(dir.as_fd(), "oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, to.to_string().as_bytes())?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_judged_by_what_the_node_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("online");
        std::fs::write(&path, "0-3,6\n").unwrap();
        for (list, fits) in [("", true), ("0", true), ("1-3,6", true), ("4", false), ("3-6", false), ("99999", false)] {
            assert_eq!(on_node(list, path.to_str().unwrap()), fits, "{list}");
        }
        assert!(on_node("7", "/no/such/file"));
    }
}
