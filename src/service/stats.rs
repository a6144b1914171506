//! Resource usage of containers and pods. A reading waits for no operation and for no other container's.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use super::layer_usage::LayerUsage;
use super::sandbox::blocking;
use super::{Container, Sandbox, Service, ServiceError, now};
use crate::cgroup::{Cgroup, Pressure, Stats};
use crate::errchain::{Chain, Kind, Kinded};
use crate::model::lifecycle::Phase;
use crate::net::stats::{Interface, interfaces_of};
use crate::store::record::{ContainerRecord, SandboxRecord};

/// How long one reading may take; all of it is in memory.
const READ: Duration = Duration::from_secs(2);
/// How long a call waits for the first figure of a writable layer.
const FIRST_LAYER: Duration = Duration::from_millis(300);
/// Readings at once.
const AT_ONCE: usize = 8;
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
    /// Processes.
    pub processes: u64,
    /// PSI, on cgroup v2.
    pub cpu_psi: Option<Pressure>,
    /// PSI, on cgroup v2.
    pub memory_psi: Option<Pressure>,
    /// PSI, on cgroup v2.
    pub io_psi: Option<Pressure>,
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
    /// Of its control group; where several pods have the same, the sum over its containers.
    pub usage: Option<Usage>,
    /// Its interfaces, `lo` left out.
    pub network: Vec<Interface>,
    /// Its containers that run.
    pub containers: Vec<ContainerUsage>,
}

/// What is remembered of a control group between two calls.
#[derive(Debug, Default)]
pub struct Samples {
    /// Time and CPU time of the last sample.
    cpu: Option<(u64, u64)>,
    nano_cores: Option<u64>,
    /// The last CPU time read, whether it was a sum, and what comes on top of it.
    last_ns: u64,
    summed: bool,
    before_ns: u64,
    /// The most that was seen, where the kernel doesn't say.
    peak_memory: u64,
    peak_hugepages: HashMap<String, u64>,
}

impl Samples {
    /// The mean load since the last sample that is old enough.
    fn load(&mut self, at: u64, cpu_ns: u64) -> Option<u64> {
        if let Some((then, before)) = self.cpu {
            let window = at.saturating_sub(then);
            if window < MIN_WINDOW {
                return self.nano_cores;
            }
            let used = u128::from(cpu_ns.saturating_sub(before));
            self.nano_cores = (used * 1_000_000_000).checked_div(window.into()).map(|load| load as u64);
        }
        self.cpu = Some((at, cpu_ns));
        self.nano_cores
    }

    /// CPU time that never falls: a pod's control group goes with its last container and comes back empty with the next,
    /// and a sum is less by a container that was removed.
    fn grown(&mut self, cpu_ns: u64, summed: bool) -> u64 {
        if summed != self.summed {
            self.before_ns = (self.before_ns + self.last_ns).saturating_sub(cpu_ns);
        } else {
            self.before_ns += self.last_ns.saturating_sub(cpu_ns);
        }
        (self.last_ns, self.summed) = (cpu_ns, summed);
        self.before_ns + cpu_ns
    }

    /// Fills in the peaks that the kernel doesn't keep.
    fn peaks(&mut self, stats: &mut Stats) {
        if let Some(memory) = &mut stats.memory {
            self.peak_memory = self.peak_memory.max(memory.usage);
            memory.peak = memory.peak.or(Some(self.peak_memory));
        }
        for pages in &mut stats.hugepages {
            let peak = self.peak_hugepages.entry(pages.size.clone()).or_default();
            *peak = pages.usage.max(*peak);
            pages.peak = pages.peak.or(Some(*peak));
        }
    }
}

impl Service {
    /// A container's usage now.
    pub async fn container_usage(self: &Arc<Self>, container: &Arc<Container>) -> Result<ContainerUsage, ServiceError> {
        let until = self.ask_layers(std::slice::from_ref(container));
        self.usage_of(container, until).await
    }

    /// The usage of many containers, in their order. One that can't be read, or not in time, is there without figures.
    pub async fn container_usages(self: &Arc<Self>, containers: Vec<Arc<Container>>) -> Vec<ContainerUsage> {
        let until = self.ask_layers(&containers);
        self.gather(containers, move |service, container| async move { service.usage_or_none(&container, until).await }).await
    }

    /// A pod's usage now: of its control group, its interfaces, its containers.
    pub async fn pod_usage(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> PodUsage {
        let network = self.networks_of(std::slice::from_ref(sandbox)).await.pop().unwrap_or_default();
        let until = self.ask_layers(&self.containers_of(&sandbox.record().id));
        self.pod_usage_with(sandbox, network, until).await
    }

    /// The usage of many pods, in their order. What can't be read, or not in time, is left out.
    pub async fn pod_usages(self: &Arc<Self>, sandboxes: Vec<Arc<Sandbox>>) -> Vec<PodUsage> {
        let networks = self.networks_of(&sandboxes).await;
        let containers: Vec<_> = sandboxes.iter().flat_map(|sandbox| self.containers_of(&sandbox.record().id)).collect();
        let until = self.ask_layers(&containers);
        self.gather(sandboxes.into_iter().zip(networks).collect(), move |service, (sandbox, network)| async move {
            service.pod_usage_with(&sandbox, network, until).await
        })
        .await
    }

    async fn pod_usage_with(self: &Arc<Self>, sandbox: &Arc<Sandbox>, network: Vec<Interface>, until: Instant) -> PodUsage {
        let record = sandbox.record();
        let mut containers = Vec::new();
        for container in self.containers_of(&record.id) {
            if container.record().phase() == Phase::Running {
                containers.push(self.usage_or_none(&container, until).await);
            }
        }
        let parent = if record.ready() { self.parent_usage(sandbox, &record).await } else { Parent::Unread };
        let mut usage = match parent {
            Parent::Read(usage) => Some((*usage, false)),
            // A sum that lacks one would be no sum.
            Parent::NotItsOwn if containers.iter().all(|container| container.usage.is_some()) => {
                Some((sum(containers.iter().filter_map(|container| container.usage.as_ref())), true))
            }
            Parent::NotItsOwn | Parent::Unread => None,
        };
        if let Some((usage, summed)) = &mut usage {
            let mut samples = sandbox.samples.lock().unwrap_or_else(PoisonError::into_inner);
            usage.cpu_ns = samples.grown(usage.cpu_ns, *summed);
            // Kubelet's control group has a past, with the pod's earlier sandbox; ours begins with this one.
            if samples.cpu.is_none() && record.cgroup_parent_ours {
                samples.cpu = Some((record.created_at, 0));
            }
            usage.nano_cores = samples.load(usage.at, usage.cpu_ns);
        }
        PodUsage { record, at: now(), usage: usage.map(|(usage, _)| usage), network, containers }
    }

    async fn parent_usage(self: &Arc<Self>, sandbox: &Arc<Sandbox>, record: &SandboxRecord) -> Parent {
        let shares = |other: &SandboxRecord| other.id != record.id && other.ready() && other.cgroup_parent == record.cgroup_parent;
        if self.sandboxes().iter().any(|other| shares(&other.record())) {
            return Parent::NotItsOwn;
        }
        match self.read(&sandbox.reading, &record.cgroup_parent, |_| ()).await {
            Ok(Some((stats, ()))) => Parent::Read(Box::new(usage(&stats))),
            // Of a pod without containers there may be none.
            Ok(None) => Parent::NotItsOwn,
            // The root.
            Err(error) if error.kind() == Kind::InvalidArgument => Parent::NotItsOwn,
            Err(error) => {
                tracing::debug!(sandbox = %record.id, error = %Chain(&error), "usage can't be read");
                Parent::Unread
            }
        }
    }

    async fn usage_or_none(self: &Arc<Self>, container: &Arc<Container>, until: Instant) -> ContainerUsage {
        match self.usage_of(container, until).await {
            Ok(usage) => usage,
            Err(error) => {
                let record = container.record();
                tracing::debug!(container = %record.id, error = %Chain(&error), "usage can't be read");
                ContainerUsage { record, usage: None, layer: container.layer.known(until).await }
            }
        }
    }

    async fn usage_of(self: &Arc<Self>, container: &Arc<Container>, until: Instant) -> Result<ContainerUsage, ServiceError> {
        let record = container.record();
        let stats = if record.phase() == Phase::Running { self.read_group(container, |_| ()).await? } else { None };
        let usage = stats.map(|(stats, ())| {
            let mut usage = usage(&stats);
            let mut samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
            // Before the first call: nothing was used at the start.
            if samples.cpu.is_none() {
                samples.cpu = record.started_at.map(|at| (at, 0));
            }
            usage.nano_cores = samples.load(usage.at, usage.cpu_ns);
            usage
        });
        Ok(ContainerUsage { record, usage, layer: container.layer.known(until).await })
    }

    /// Has the layers measured that are due. Gives the time until which a first figure is worth waiting for.
    pub(super) fn ask_layers(&self, containers: &[Arc<Container>]) -> Instant {
        for container in containers {
            // With the volumes that its image defines, which are beside the layer.
            self.walker.ask(&container.layer, || self.layer_dir(&container.record().id));
        }
        Instant::now() + FIRST_LAYER
    }

    /// The interfaces of each sandbox, `lo` left out: none of one that isn't ready, or has the node's network.
    pub(super) async fn networks_of(&self, sandboxes: &[Arc<Sandbox>]) -> Vec<Vec<Interface>> {
        let records: Vec<_> = sandboxes.iter().map(|sandbox| sandbox.record()).collect();
        let paths: Vec<Option<PathBuf>> = records.iter().map(|record| record.netns.clone().filter(|_| record.ready())).collect();
        let asked = interfaces_of(paths.iter().flatten().cloned().collect());
        let mut found = tokio::time::timeout(READ, asked).await.unwrap_or_default().into_iter();
        let of = |(record, path): (&Arc<SandboxRecord>, &Option<PathBuf>)| {
            let read = path.as_ref().and_then(|_| found.next());
            let read =
                read.map(|read| read.inspect_err(|error| tracing::debug!(sandbox = %record.id, error = %Chain(error), "interfaces can't be read")));
            read.and_then(Result::ok).unwrap_or_default().into_iter().filter(|interface| interface.name != "lo").collect()
        };
        records.iter().zip(&paths).map(of).collect()
    }

    /// Reads a container's control group, and what `also` finds of it, on a thread that may block.
    pub(super) async fn read_group<T: Send + 'static>(
        &self,
        container: &Arc<Container>,
        also: impl FnOnce(&Stats) -> T + Send + 'static,
    ) -> Result<Option<(Stats, T)>, ServiceError> {
        let mut read = self.read(&container.reading, &container.record().cgroup, also).await?;
        if let Some((stats, _)) = &mut read {
            container.samples.lock().unwrap_or_else(PoisonError::into_inner).peaks(stats);
        }
        Ok(read)
    }

    /// `None`: the control group is gone, the container is about to be reported as exited. Of one whose reading hangs, one
    /// thread at most waits, and nobody waits for it longer than [`READ`].
    async fn read<T: Send + 'static>(
        &self,
        reading: &Arc<Semaphore>,
        path: &str,
        also: impl FnOnce(&Stats) -> T + Send + 'static,
    ) -> Result<Option<(Stats, T)>, ServiceError> {
        let failed = |source| ServiceError::Cgroup { what: "cannot read the control group's figures", source };
        let slow = |_| ServiceError::SlowFigures { path: path.into() };
        let cgroup = Cgroup::new(&self.hierarchy, path).map_err(failed)?;
        let deadline = Instant::now() + READ;
        let permit = tokio::time::timeout_at(deadline, reading.clone().acquire_owned()).await.map_err(slow)?;
        let work = blocking(move || {
            let _permit = permit;
            cgroup.stats().map(|stats| {
                let found = also(&stats);
                (stats, found)
            })
        });
        match tokio::time::timeout_at(deadline, work).await.map_err(slow)?? {
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            read => read.map(Some).map_err(failed),
        }
    }

    /// Asks for each item, a few at a time, and gives the answers in the items' order.
    pub(super) async fn gather<T, R, F>(self: &Arc<Self>, items: Vec<T>, ask: impl Fn(Arc<Self>, T) -> F) -> Vec<R>
    where
        R: Send + 'static,
        F: Future<Output = R> + Send + 'static,
    {
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        let asked: Vec<_> = items
            .into_iter()
            .map(|item| {
                let (slots, answer) = (slots.clone(), ask(self.clone(), item));
                tokio::spawn(async move {
                    let _slot = slots.acquire_owned().await;
                    answer.await
                })
            })
            .collect();
        let mut answers = Vec::with_capacity(asked.len());
        for answer in asked {
            answers.extend(answer.await.ok());
        }
        answers
    }
}

/// What the control group above a pod's containers says of the pod.
enum Parent {
    /// This.
    Read(Box<Usage>),
    /// Nothing: there is none, or it is not this pod's alone.
    NotItsOwn,
    /// It could not be asked.
    Unread,
}

/// A reading, in the terms of the CRI.
fn usage(stats: &Stats) -> Usage {
    let (cpu, memory, swap) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default(), stats.swap.unwrap_or_default());
    Usage {
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
        processes: stats.processes.len() as u64,
        cpu_psi: stats.cpu_pressure,
        memory_psi: stats.memory_pressure,
        io_psi: stats.io_pressure,
    }
}

fn sum<'a>(parts: impl Iterator<Item = &'a Usage>) -> Usage {
    let mut total = Usage { at: now(), ..Usage::default() };
    for part in parts {
        total.cpu_ns += part.cpu_ns;
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
    use crate::cgroup::{HugepageStats, MemoryStats};

    #[test]
    fn load_is_the_mean_between_two_samples() {
        let mut samples = Samples { cpu: Some((1_000_000_000, 0)), ..Samples::default() };
        assert_eq!(samples.load(2_000_000_000, 500_000_000), Some(500_000_000));
        assert_eq!(samples.load(2_000_000_001, 600_000_000), Some(500_000_000), "too close: the last value stands");
        assert_eq!(samples.load(3_000_000_000, 500_000_000), Some(0));
        let mut young = Samples { cpu: Some((1_000_000_000, 0)), ..Samples::default() };
        assert_eq!(young.load(1_001_000_000, 8_000_000), None, "what a start costs is no load");
    }

    #[test]
    fn a_pods_counter_never_falls() {
        let check = |readings: &[(u64, bool, u64)]| {
            let mut samples = Samples::default();
            for (read, summed, want) in readings {
                assert_eq!(samples.grown(*read, *summed), *want, "{read} in {readings:?}");
            }
        };
        // The control group went, and came back.
        check(&[(5, false, 5), (9, false, 9), (0, false, 9), (3, false, 12), (4, false, 13)]);
        check(&[(5, false, 5), (9, false, 9), (0, true, 9), (3, false, 9), (4, false, 10)]);
        // One of two containers was removed.
        check(&[(8, true, 8), (5, true, 8), (6, true, 9)]);
        // Another pod came beneath the same control group, and went.
        check(&[(100, false, 100), (90, true, 100), (101, false, 101), (102, false, 102)]);
    }

    #[test]
    fn peaks_are_kept_where_the_kernel_does_not() {
        let reading = |usage, peak| {
            let pages = HugepageStats { size: "2MB".into(), usage, ..HugepageStats::default() };
            let memory = MemoryStats { usage, peak, ..MemoryStats::default() };
            let (swap, pids, cpu, at) = (None, None, None, std::time::SystemTime::UNIX_EPOCH);
            let (processes, hugepages, io) = (Vec::new(), vec![pages], Vec::new());
            let (cpu_pressure, memory_pressure, io_pressure) = (None, None, None);
            Stats { at, cpu, memory: Some(memory), swap, pids, processes, hugepages, io, cpu_pressure, memory_pressure, io_pressure }
        };
        let mut samples = Samples::default();
        for (usage, peak, want) in [(5, None, (5, 5)), (9, None, (9, 9)), (2, None, (9, 9)), (2, Some(20), (20, 9))] {
            let mut stats = reading(usage, peak);
            samples.peaks(&mut stats);
            assert_eq!((stats.memory.unwrap().peak, stats.hugepages[0].peak), (Some(want.0), Some(want.1)));
        }
    }
}
