//! What becomes of a reading.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use super::*;
use crate::cgroup::{CpuStats, HugepageStats, MemoryStats, PidsStats, PressureShare, SwapStats};
use crate::model::container::Resources;
use crate::service::layer_usage::Filesystem;

fn stats() -> Stats {
    let share = |total_us| PressureShare { total_us, ..PressureShare::default() };
    let pressure = Some(Pressure { some: share(3_000_000), full: share(1_999_999) });
    Stats {
        at: SystemTime::UNIX_EPOCH,
        cpu: Some(CpuStats { usage_ns: 5_999_999_999, throttled_ns: 2_000_000_000, ..CpuStats::default() }),
        memory: Some(MemoryStats { usage: 4096, peak: None, kernel: Some(7), oom_kills: 2, page_faults: 9, ..MemoryStats::default() }),
        swap: Some(SwapStats { usage: 11, limit: None }),
        pids: Some(PidsStats { current: 4, limit: None }),
        processes: vec![1, 2, 3],
        hugepages: vec![HugepageStats { size: "2MB".into(), usage: 5, peak: Some(6), limit: None }],
        io: vec![IoStats { major: 8, minor: 0, read_bytes: 1, write_bytes: 2, reads: 3, writes: 4 }],
        cpu_pressure: pressure,
        memory_pressure: pressure,
        io_pressure: pressure,
    }
}

fn collect(stats: &Stats, resources: Resources) -> Vec<Metric> {
    let mut out = Metrics { base: BASE_LABELS.map(str::to_uppercase).to_vec(), list: Vec::new() };
    out.of_group(stats, &HashMap::from([((8, 0), "/dev/sda".to_string())]));
    out.of_processes(stats, &Processes { threads: 40, descriptors: 12, sockets: 1, max_open_files: Some(1024) });
    out.of_spec(&ContainerSpec { resources, ..ContainerSpec::default() }, 77 * SECOND_NS);
    out.of_layer(&LayerUsage { bytes: 100, filesystem: Filesystem { size: 1000, ..Filesystem::default() }, ..LayerUsage::default() });
    out.add(&table::LAST_SEEN, 1);
    let interface = Interface { name: "eth0".into(), rx_bytes: 21, ..Interface::default() };
    out.list.into_iter().chain(of_network(&["BASE"; 6].map(str::to_string), &[interface])).collect()
}

fn value(metrics: &[Metric], name: &str, labels: &[&str]) -> Option<u64> {
    let found = metrics.iter().find(|metric| metric.of.name == name && metric.labels[BASE_LABELS.len()..] == *labels)?;
    Some(found.value)
}

#[test]
fn every_metric_has_a_value_and_its_labels() {
    let limits = Resources {
        cpu_quota: 20_000,
        memory_limit: 1 << 20,
        unified: BTreeMap::from([("memory.min".into(), "512".into())]),
        ..Resources::default()
    };
    let metrics = collect(&stats(), limits);
    let found: BTreeSet<_> = metrics.iter().map(|metric| metric.of.name).collect();
    let missing: Vec<_> = DESCRIPTORS.iter().map(|of| of.name).filter(|name| !found.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let mut series = BTreeSet::new();
    for metric in &metrics {
        assert_eq!(metric.labels.len(), BASE_LABELS.len() + metric.of.labels.len(), "{metric:?}");
        assert!(series.insert((metric.of.name, metric.labels.clone())), "twice: {metric:?}");
    }
    for (name, labels, want) in [
        ("container_cpu_usage_seconds_total", &["total"] as &[&str], 5),
        ("container_cpu_cfs_throttled_seconds_total", &[], 2),
        ("container_memory_max_usage_bytes", &[], 4096),
        ("container_memory_failures_total", &["pgfault", "hierarchy"], 9),
        ("container_memory_swap", &[], 11),
        ("container_oom_events_total", &[], 2),
        ("container_hugetlb_max_usage_bytes", &["2MB"], 6),
        ("container_blkio_device_usage_total", &["/dev/sda", "8", "0", "Write"], 2),
        ("container_fs_reads_total", &["/dev/sda"], 3),
        ("container_pressure_io_waiting_seconds_total", &[], 3),
        ("container_pressure_io_stalled_seconds_total", &[], 1),
        ("container_processes", &[], 3),
        ("container_threads", &[], 4),
        ("container_threads_max", &[], 0),
        ("container_ulimits_soft", &["max_open_files"], 1024),
        ("container_spec_cpu_period", &[], 100_000),
        ("container_spec_cpu_quota", &[], 20_000),
        ("container_spec_cpu_shares", &[], 1024),
        ("container_spec_memory_limit_bytes", &[], 1 << 20),
        ("container_spec_memory_swap_limit_bytes", &[], 1 << 20),
        ("container_spec_memory_reservation_limit_bytes", &[], 512),
        ("container_start_time_seconds", &[], 77),
        ("container_network_receive_bytes_total", &["eth0"], 21),
    ] {
        assert_eq!(value(&metrics, name, labels), Some(want), "{name}");
    }
}

#[test]
fn what_a_node_does_not_count_is_left_out() {
    let bare = Stats { pids: None, swap: None, hugepages: Vec::new(), cpu_pressure: None, memory_pressure: None, io_pressure: None, ..stats() };
    let metrics = collect(&bare, Resources { cpu_quota: -1, memory_limit: -1, ..Resources::default() });
    assert_eq!(value(&metrics, "container_threads", &[]), Some(40), "by /proc without the pids controller");
    assert_eq!(value(&metrics, "container_memory_swap", &[]), Some(0));
    assert_eq!(value(&metrics, "container_spec_memory_limit_bytes", &[]), Some(0));
    assert_eq!(value(&metrics, "container_spec_cpu_quota", &[]), None);
    assert_eq!(value(&metrics, "container_pressure_cpu_waiting_seconds_total", &[]), None);
}
