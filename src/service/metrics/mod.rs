//! Metrics of pods and their containers: what kubelet shows at /metrics/cadvisor when it leaves the reading to us.

mod process;
mod table;

use std::collections::HashMap;
use std::sync::Arc;

pub use table::{BASE_LABELS, DESCRIPTORS, Descriptor, MetricKind};

use self::process::Processes;
use super::layer_usage::LayerUsage;
use super::{Container, Sandbox, Service};
use crate::cgroup::{IoStats, Pressure, Stats};
use crate::errchain::Chain;
use crate::model::container::ContainerSpec;
use crate::model::lifecycle::Phase;
use crate::net::stats::Interface;
use crate::store::record::{ContainerRecord, SandboxRecord};

/// One value.
#[derive(Debug, Clone)]
pub struct Metric {
    /// What it is.
    pub of: &'static Descriptor,
    /// The labels' values, in the order of [`BASE_LABELS`] and the descriptor's own.
    pub labels: Vec<String>,
    /// In the unit that the name says; whole ones.
    pub value: u64,
}

/// A pod's.
#[derive(Debug, Clone)]
pub struct PodMetrics {
    /// The sandbox.
    pub record: Arc<SandboxRecord>,
    /// The pod's own: its interfaces'.
    pub metrics: Vec<Metric>,
    /// Those of each of its containers that runs.
    pub containers: Vec<(Arc<ContainerRecord>, Vec<Metric>)>,
}

const SECOND_NS: u64 = 1_000_000_000;
const SECOND_US: u64 = 1_000_000;
/// What the kernel has where nothing is set, in microseconds and shares.
const DEFAULT_PERIOD: i64 = 100_000;
const DEFAULT_SHARES: i64 = 1024;

impl Service {
    /// The metrics of every sandbox that is ready. One that can't be read has none, and holds no other up.
    pub async fn metrics(self: &Arc<Self>) -> Vec<PodMetrics> {
        let sandboxes: Vec<_> = self.sandboxes().into_iter().filter(|sandbox| sandbox.record().ready()).collect();
        let networks = self.networks_of(&sandboxes).await;
        let until = self.ask_layers(&self.containers());
        self.gather(sandboxes.into_iter().zip(networks).collect(), move |service, (sandbox, network)| async move {
            service.pod_metrics(&sandbox, &network, until).await
        })
        .await
    }

    async fn pod_metrics(self: &Arc<Self>, sandbox: &Arc<Sandbox>, network: &[Interface], until: tokio::time::Instant) -> PodMetrics {
        let record = sandbox.record();
        let mut containers = Vec::new();
        for container in self.containers_of(&record.id) {
            let of = container.record();
            if of.phase() != Phase::Running {
                continue;
            }
            match self.container_metrics(&container, &of, &record, until).await {
                Ok(metrics) => containers.push((of, metrics)),
                Err(error) => tracing::debug!(container = %of.id, error = %Chain(&error), "metrics can't be read"),
            }
        }
        let base = base_labels(&record.cgroup_parent, record.id.as_str(), "", "POD", &record);
        PodMetrics { metrics: of_network(&base, network), record, containers }
    }

    async fn container_metrics(
        self: &Arc<Self>,
        container: &Arc<Container>,
        record: &ContainerRecord,
        pod: &SandboxRecord,
        until: tokio::time::Instant,
    ) -> Result<Vec<Metric>, super::ServiceError> {
        let pid = record.pid;
        let Some((stats, (processes, devices))) = self
            .read_group(container, move |stats| {
                let mut devices: HashMap<(u32, u32), String> = HashMap::new();
                for IoStats { major, minor, .. } in &stats.io {
                    devices.insert((*major, *minor), device_name(*major, *minor));
                }
                (process::read(&stats.processes, pid), devices)
            })
            .await?
        else {
            return Ok(Vec::new());
        };
        let layer = container.layer.known(until).await;
        let image = if record.spec.user_specified_image.is_empty() { &record.spec.image } else { &record.spec.user_specified_image };
        let base = base_labels(&record.cgroup, record.id.as_str(), image, &record.spec.name, pod);
        let mut out = Metrics { base, list: Vec::with_capacity(64) };
        out.of_group(&stats, &devices);
        out.of_processes(&stats, &processes);
        out.of_spec(&record.spec, record.started_at.unwrap_or(record.created_at));
        if let Some(layer) = layer {
            out.of_layer(&layer);
        }
        out.add(&table::LAST_SEEN, super::now() / SECOND_NS);
        Ok(out.list)
    }
}

fn base_labels(cgroup: &str, name: &str, image: &str, container: &str, pod: &SandboxRecord) -> Vec<String> {
    let of = &pod.spec.name;
    [cgroup, name, image, container, &of.name, &of.namespace].map(str::to_string).to_vec()
}

/// `/dev/vda`; where the device has no name (an overlay, btrfs), its numbers.
fn device_name(major: u32, minor: u32) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok();
    let name = link.as_deref().and_then(|link| link.file_name()?.to_str());
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}

fn of_network(base: &[String], network: &[Interface]) -> Vec<Metric> {
    let mut out = Metrics { base: base.to_vec(), list: Vec::new() };
    for interface in network {
        for (of, value) in [
            (&table::NET_RX_BYTES, interface.rx_bytes),
            (&table::NET_RX_ERRORS, interface.rx_errors),
            (&table::NET_RX_DROPPED, interface.rx_dropped),
            (&table::NET_RX_PACKETS, interface.rx_packets),
            (&table::NET_TX_BYTES, interface.tx_bytes),
            (&table::NET_TX_ERRORS, interface.tx_errors),
            (&table::NET_TX_DROPPED, interface.tx_dropped),
            (&table::NET_TX_PACKETS, interface.tx_packets),
        ] {
            out.add_with(of, &[&interface.name], value);
        }
    }
    out.list
}

/// Metrics of one container, as they are collected.
struct Metrics {
    base: Vec<String>,
    list: Vec<Metric>,
}

impl Metrics {
    fn add(&mut self, of: &'static Descriptor, value: u64) {
        self.add_with(of, &[], value);
    }

    fn add_with(&mut self, of: &'static Descriptor, labels: &[&str], value: u64) {
        debug_assert_eq!(of.labels.len(), labels.len(), "{}", of.name);
        let labels = self.base.iter().cloned().chain(labels.iter().map(|label| label.to_string())).collect();
        self.list.push(Metric { of, labels, value });
    }

    fn of_group(&mut self, stats: &Stats, devices: &HashMap<(u32, u32), String>) {
        if let Some(cpu) = &stats.cpu {
            self.add_with(&table::CPU_USAGE, &["total"], cpu.usage_ns / SECOND_NS);
            self.add(&table::CPU_USER, cpu.user_ns / SECOND_NS);
            self.add(&table::CPU_SYSTEM, cpu.system_ns / SECOND_NS);
            self.add(&table::CFS_PERIODS, cpu.periods);
            self.add(&table::CFS_THROTTLED_PERIODS, cpu.throttled_periods);
            self.add(&table::CFS_THROTTLED_SECONDS, cpu.throttled_ns / SECOND_NS);
        }
        if let Some(memory) = &stats.memory {
            self.add(&table::MEMORY_CACHE, memory.cache);
            self.add(&table::MEMORY_FAILCNT, memory.limit_hits);
            self.add(&table::MEMORY_KERNEL, memory.kernel.unwrap_or(0));
            self.add(&table::MEMORY_MAPPED_FILE, memory.mapped_file);
            self.add(&table::MEMORY_MAX_USAGE, memory.peak.unwrap_or(memory.usage));
            self.add(&table::MEMORY_RSS, memory.rss);
            self.add(&table::MEMORY_USAGE, memory.usage);
            self.add(&table::MEMORY_WORKING_SET, memory.working_set);
            self.add(&table::OOM_EVENTS, memory.oom_kills);
            // The kernel's own figures are those of the group with everything below it.
            for scope in ["container", "hierarchy"] {
                self.add_with(&table::MEMORY_FAILURES, &["pgfault", scope], memory.page_faults);
                self.add_with(&table::MEMORY_FAILURES, &["pgmajfault", scope], memory.major_page_faults);
            }
            // Where swap isn't accounted, none is used that anybody knows of.
            self.add(&table::MEMORY_SWAP, stats.swap.map_or(0, |swap| swap.usage));
        }
        for pages in &stats.hugepages {
            self.add_with(&table::HUGETLB_USAGE, &[&pages.size], pages.usage);
            self.add_with(&table::HUGETLB_MAX_USAGE, &[&pages.size], pages.peak.unwrap_or(pages.usage));
        }
        for io in &stats.io {
            let unnamed = String::new();
            let device = devices.get(&(io.major, io.minor)).unwrap_or(&unnamed);
            self.add_with(&table::FS_READS, &[device], io.reads);
            self.add_with(&table::FS_READ_BYTES, &[device], io.read_bytes);
            self.add_with(&table::FS_WRITES, &[device], io.writes);
            self.add_with(&table::FS_WRITE_BYTES, &[device], io.write_bytes);
            let (major, minor) = (io.major.to_string(), io.minor.to_string());
            self.add_with(&table::BLKIO_USAGE, &[device, &major, &minor, "Read"], io.read_bytes);
            self.add_with(&table::BLKIO_USAGE, &[device, &major, &minor, "Write"], io.write_bytes);
        }
        let mut pressure = |of: Option<&Pressure>, waiting, stalled| {
            if let Some(of) = of {
                self.add(waiting, of.some.total_us / SECOND_US);
                self.add(stalled, of.full.total_us / SECOND_US);
            }
        };
        pressure(stats.cpu_pressure.as_ref(), &table::PSI_CPU_WAITING, &table::PSI_CPU_STALLED);
        pressure(stats.memory_pressure.as_ref(), &table::PSI_MEMORY_WAITING, &table::PSI_MEMORY_STALLED);
        pressure(stats.io_pressure.as_ref(), &table::PSI_IO_WAITING, &table::PSI_IO_STALLED);
    }

    fn of_processes(&mut self, stats: &Stats, processes: &Processes) {
        self.add(&table::PROCESSES, stats.processes.len() as u64);
        // The pids controller counts whether or not there is a limit; without it /proc does.
        self.add(&table::THREADS, stats.pids.map_or(processes.threads, |pids| pids.current));
        self.add(&table::THREADS_MAX, stats.pids.and_then(|pids| pids.limit).unwrap_or(0));
        self.add(&table::FILE_DESCRIPTORS, processes.descriptors);
        self.add(&table::SOCKETS, processes.sockets);
        if let Some(limit) = processes.max_open_files {
            self.add_with(&table::ULIMITS_SOFT, &["max_open_files"], limit);
        }
    }

    fn of_spec(&mut self, spec: &ContainerSpec, started_at: u64) {
        let limits = &spec.resources;
        let or = |value: i64, default: i64| if value > 0 { value } else { default } as u64;
        self.add(&table::SPEC_CPU_PERIOD, or(limits.cpu_period, DEFAULT_PERIOD));
        self.add(&table::SPEC_CPU_SHARES, or(limits.cpu_shares, DEFAULT_SHARES));
        if let Ok(quota) = u64::try_from(limits.cpu_quota)
            && quota > 0
        {
            self.add(&table::SPEC_CPU_QUOTA, quota);
        }
        self.add(&table::SPEC_MEMORY_LIMIT, or(limits.memory_limit, 0));
        // Without a limit of its own there is no swap beside memory's.
        self.add(&table::SPEC_MEMORY_SWAP_LIMIT, if limits.memory_swap == 0 { or(limits.memory_limit, 0) } else { or(limits.memory_swap, 0) });
        let protected = ["memory.low", "memory.min"].iter().find_map(|key| limits.unified.get(*key)?.trim().parse().ok());
        self.add(&table::SPEC_MEMORY_RESERVATION, protected.unwrap_or(0));
        self.add(&table::START_TIME, started_at / SECOND_NS);
    }

    fn of_layer(&mut self, layer: &LayerUsage) {
        let filesystem = &layer.filesystem;
        let device = device_name(filesystem.device.0, filesystem.device.1);
        self.add_with(&table::FS_USAGE, &[&device], layer.bytes);
        self.add_with(&table::FS_LIMIT, &[&device], filesystem.size);
        self.add_with(&table::FS_INODES_TOTAL, &[&device], filesystem.inodes);
        self.add_with(&table::FS_INODES_FREE, &[&device], filesystem.inodes_free);
    }
}

#[cfg(test)]
mod tests;
