//! Resource usage of containers and pods.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use super::sandbox::blocking;
use super::{Container, Sandbox, Service, ServiceError, now};
use crate::cgroup::{Cgroup, Pressure};
use crate::errchain::{Chain, Kind, Kinded};
use crate::model::lifecycle::Phase;
use crate::net::stats::{Interface, interfaces};
use crate::store::record::{ContainerRecord, SandboxRecord};

/// A writable layer's size is measured again only after this many nanoseconds.
const LAYER_AGE: u64 = 30_000_000_000;
/// Two samples closer than this say nothing about the load between them.
const MIN_WINDOW: u64 = 100_000_000;

/// What a control group uses.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    /// Nanoseconds since the epoch.
    pub at: u64,
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Mean load between two samples, in billionths of a CPU.
    pub nano_cores: Option<u64>,
    /// Bytes.
    pub memory: u64,
    /// Bytes, less what the kernel would give back first.
    pub working_set: u64,
    /// Bytes of anonymous memory.
    pub rss: u64,
    /// Bytes below the limit; `None`: there is no limit.
    pub available: Option<u64>,
    /// Faults.
    pub page_faults: u64,
    /// Faults that went to disk.
    pub major_page_faults: u64,
    /// Bytes.
    pub swap: u64,
    /// Bytes; `None`: no limit or unknown.
    pub swap_available: Option<u64>,
    /// Processes and threads.
    pub processes: u64,
    /// PSI, on cgroup v2.
    pub cpu_psi: Option<Pressure>,
    /// PSI, on cgroup v2.
    pub memory_psi: Option<Pressure>,
    /// PSI, on cgroup v2.
    pub io_psi: Option<Pressure>,
}

/// The size of a writable layer.
#[derive(Debug, Clone)]
pub struct LayerUsage {
    /// Nanoseconds since the epoch.
    pub at: u64,
    /// Where the filesystem is known by.
    pub mountpoint: String,
    /// Bytes.
    pub bytes: u64,
    /// Files.
    pub inodes: u64,
}

/// A container's usage. Without `usage` it doesn't run.
#[derive(Debug, Clone)]
pub struct ContainerUsage {
    /// The container.
    pub record: Arc<ContainerRecord>,
    /// What it uses.
    pub usage: Option<Usage>,
    /// Its writable layer.
    pub layer: Option<LayerUsage>,
}

/// A pod's usage.
#[derive(Debug, Clone)]
pub struct PodUsage {
    /// The sandbox.
    pub record: Arc<SandboxRecord>,
    /// Nanoseconds since the epoch.
    pub at: u64,
    /// The sum over its containers.
    pub usage: Option<Usage>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Its interfaces, `lo` left out.
    pub network: Vec<Interface>,
    /// Its containers that run.
    pub containers: Vec<ContainerUsage>,
}

/// What is remembered of a container between two calls.
#[derive(Debug, Default)]
pub struct Samples {
    /// Time and CPU time of the last sample.
    cpu: Option<(u64, u64)>,
    nano_cores: Option<u64>,
    layer: Option<LayerUsage>,
}

impl Samples {
    /// The mean load since the last sample that is old enough.
    fn load(&mut self, at: u64, cpu_ns: u64) -> Option<u64> {
        if let Some((then, before)) = self.cpu {
            let window = at.saturating_sub(then);
            if window < MIN_WINDOW && self.nano_cores.is_some() {
                return self.nano_cores;
            }
            let used = u128::from(cpu_ns.saturating_sub(before));
            self.nano_cores = (used * 1_000_000_000).checked_div(window.into()).map(|load| load as u64);
        }
        self.cpu = Some((at, cpu_ns));
        self.nano_cores
    }
}

impl Service {
    /// A container's usage now.
    pub async fn container_usage(self: &Arc<Self>, container: &Arc<Container>) -> Result<ContainerUsage, ServiceError> {
        let record = container.record();
        let usage = if record.phase() == Phase::Running { self.cgroup_usage(&record.cgroup).await? } else { None };
        let usage = usage.map(|mut usage| {
            let mut samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
            // Before the first call: nothing was used at the start.
            if samples.cpu.is_none() {
                samples.cpu = record.started_at.map(|at| (at, 0));
            }
            usage.nano_cores = samples.load(usage.at, usage.cpu_ns);
            usage
        });
        let layer = self.layer_usage(container, &record).await?;
        Ok(ContainerUsage { record, usage, layer })
    }

    /// A pod's usage now: the sum over its containers, its interfaces, its containers.
    pub async fn pod_usage(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<PodUsage, ServiceError> {
        let record = sandbox.record();
        let mut containers = Vec::new();
        for container in self.containers_of(&record.id) {
            if container.record().phase() == Phase::Running {
                containers.push(self.container_usage(&container).await?);
            }
        }
        let network = match (&record.netns, record.ready()) {
            (Some(path), true) => {
                let read = interfaces(path.clone()).await;
                read.inspect_err(|error| tracing::debug!(sandbox = %record.id, error = %Chain(error), "interfaces can't be read")).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let running: Vec<_> = containers.iter().filter_map(|container| container.usage.clone()).collect();
        let usage = record.ready().then(|| sum(&running));
        let processes = usage.as_ref().map(|usage| usage.processes);
        let network = network.into_iter().filter(|interface| interface.name != "lo").collect();
        Ok(PodUsage { record, at: now(), usage, processes, network, containers })
    }

    /// `None`: the control group is gone, the container is about to be reported as exited.
    async fn cgroup_usage(&self, path: &str) -> Result<Option<Usage>, ServiceError> {
        let failed = |source| ServiceError::Cgroup { what: "cannot read the control group's figures", source };
        let cgroup = Cgroup::new(&self.hierarchy, path).map_err(failed)?;
        let stats = match blocking(move || cgroup.stats()).await? {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            stats => stats.map_err(failed)?,
        };
        let (cpu, memory, swap) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default(), stats.swap.unwrap_or_default());
        Ok(Some(Usage {
            at: now(),
            cpu_ns: cpu.usage_ns,
            nano_cores: None,
            memory: memory.usage,
            working_set: memory.working_set,
            rss: memory.rss,
            available: memory.available,
            page_faults: memory.page_faults,
            major_page_faults: memory.major_page_faults,
            swap: swap.usage,
            swap_available: swap.limit.map(|limit| limit.saturating_sub(swap.usage)),
            processes: stats.pids.map_or(stats.processes, |pids| pids.current),
            cpu_psi: stats.cpu_pressure,
            memory_psi: stats.memory_pressure,
            io_psi: stats.io_pressure,
        }))
    }

    async fn layer_usage(&self, container: &Arc<Container>, record: &ContainerRecord) -> Result<Option<LayerUsage>, ServiceError> {
        let at = now();
        let known = container.samples.lock().unwrap_or_else(PoisonError::into_inner).layer.clone();
        if let Some(known) = known.filter(|known| at.saturating_sub(known.at) < LAYER_AGE) {
            return Ok(Some(known));
        }
        let dir = self.layer_dir(&record.id).join("upper");
        let (bytes, inodes) = blocking(move || tree_size(&dir)).await?;
        let mountpoint = self.config.root.to_string_lossy().into_owned();
        let layer = LayerUsage { at, mountpoint, bytes, inodes };
        container.samples.lock().unwrap_or_else(PoisonError::into_inner).layer = Some(layer.clone());
        Ok(Some(layer))
    }
}

/// Bytes and inodes below a directory; links are not followed, what vanishes meanwhile does not count.
fn tree_size(dir: &Path) -> (u64, u64) {
    let (mut bytes, mut inodes) = (0, 0);
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        inodes += 1;
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                open.push(entry.path());
            } else {
                inodes += 1;
            }
        }
    }
    (bytes, inodes)
}

fn sum(parts: &[Usage]) -> Usage {
    let mut total = Usage { at: now(), nano_cores: Some(0), available: None, ..Usage::default() };
    for part in parts {
        total.cpu_ns += part.cpu_ns;
        total.nano_cores = total.nano_cores.map(|sum| sum + part.nano_cores.unwrap_or(0));
        total.memory += part.memory;
        total.working_set += part.working_set;
        total.rss += part.rss;
        total.page_faults += part.page_faults;
        total.major_page_faults += part.major_page_faults;
        total.swap += part.swap;
        total.processes += part.processes;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_the_mean_between_two_samples() {
        let mut samples = Samples { cpu: Some((1_000_000_000, 0)), ..Samples::default() };
        assert_eq!(samples.load(2_000_000_000, 500_000_000), Some(500_000_000));
        assert_eq!(samples.load(2_000_000_001, 600_000_000), Some(500_000_000), "too close: the last value stands");
        assert_eq!(samples.load(3_000_000_000, 500_000_000), Some(0));
    }

    #[test]
    fn a_tree_is_measured_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/f"), [1; 5000]).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("l")).unwrap();
        let (bytes, inodes) = tree_size(dir.path());
        assert_eq!(inodes, 4);
        assert!(bytes >= 5000);
    }
}
