//! The metrics: what they are called, what they mean, and what their labels are.
//!
//! Names and labels are those under which kubelet's own collector (cAdvisor) shows the same facts, so that dashboards and
//! alerts go on working; the set is what critest asks for.

/// How a value behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows, until the container is another.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// A metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its name.
    pub name: &'static str,
    /// How its value behaves.
    pub kind: MetricKind,
    /// What it means.
    pub help: &'static str,
    /// The labels after [`BASE_LABELS`].
    pub labels: &'static [&'static str],
}

/// The labels that every metric begins with: the control group, the id, the image as it was asked for, the container's name
/// (`POD` for the pod itself), the pod's name and namespace.
pub const BASE_LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

macro_rules! metrics {
    ($($id:ident $name:literal $kind:ident [$($label:literal)*] $help:literal;)*) => {
        $(pub(super) static $id: Descriptor = Descriptor { name: $name, kind: MetricKind::$kind, help: $help, labels: &[$($label),*] };)*
        /// Every metric.
        pub static DESCRIPTORS: &[&Descriptor] = &[$(&$id),*];
    };
}

metrics! {
    BLKIO_USAGE "container_blkio_device_usage_total" Counter ["device" "major" "minor" "operation"] "Bytes read from and written to block devices.";
    CFS_PERIODS "container_cpu_cfs_periods_total" Counter [] "Periods with a CPU quota that have passed.";
    CFS_THROTTLED_PERIODS "container_cpu_cfs_throttled_periods_total" Counter [] "Periods in which the CPU quota ran out.";
    CFS_THROTTLED_SECONDS "container_cpu_cfs_throttled_seconds_total" Counter [] "Seconds for which tasks were held back by the CPU quota.";
    CPU_SYSTEM "container_cpu_system_seconds_total" Counter [] "Seconds of CPU time in the kernel.";
    CPU_USAGE "container_cpu_usage_seconds_total" Counter ["cpu"] "Seconds of CPU time.";
    CPU_USER "container_cpu_user_seconds_total" Counter [] "Seconds of CPU time in user mode.";
    FILE_DESCRIPTORS "container_file_descriptors" Gauge [] "Open file descriptors.";
    FS_INODES_FREE "container_fs_inodes_free" Gauge ["device"] "Free inodes of the filesystem of the writable layer.";
    FS_INODES_TOTAL "container_fs_inodes_total" Gauge ["device"] "Inodes of the filesystem of the writable layer.";
    FS_LIMIT "container_fs_limit_bytes" Gauge ["device"] "Size of the filesystem of the writable layer in bytes.";
    FS_READ_BYTES "container_fs_reads_bytes_total" Counter ["device"] "Bytes read from block devices.";
    FS_READS "container_fs_reads_total" Counter ["device"] "Reads from block devices.";
    FS_USAGE "container_fs_usage_bytes" Gauge ["device"] "Size of the writable layer in bytes.";
    FS_WRITE_BYTES "container_fs_writes_bytes_total" Counter ["device"] "Bytes written to block devices.";
    FS_WRITES "container_fs_writes_total" Counter ["device"] "Writes to block devices.";
    HUGETLB_MAX_USAGE "container_hugetlb_max_usage_bytes" Gauge ["pagesize"] "The most bytes of huge pages that were in use.";
    HUGETLB_USAGE "container_hugetlb_usage_bytes" Gauge ["pagesize"] "Bytes of huge pages in use.";
    LAST_SEEN "container_last_seen" Gauge [] "When these figures were read, in seconds since the epoch.";
    MEMORY_CACHE "container_memory_cache" Gauge [] "Bytes of page cache.";
    MEMORY_FAILCNT "container_memory_failcnt" Counter [] "How often memory usage hit its limit.";
    MEMORY_FAILURES "container_memory_failures_total" Counter ["failure_type" "scope"] "Page faults.";
    MEMORY_KERNEL "container_memory_kernel_usage" Gauge [] "Bytes of the kernel's own memory.";
    MEMORY_MAPPED_FILE "container_memory_mapped_file" Gauge [] "Bytes of mapped files.";
    MEMORY_MAX_USAGE "container_memory_max_usage_bytes" Gauge [] "The most bytes of memory that were in use.";
    MEMORY_RSS "container_memory_rss" Gauge [] "Bytes of anonymous memory.";
    MEMORY_SWAP "container_memory_swap" Gauge [] "Bytes of swap in use.";
    MEMORY_USAGE "container_memory_usage_bytes" Gauge [] "Bytes of memory in use, page cache included.";
    MEMORY_WORKING_SET "container_memory_working_set_bytes" Gauge [] "Bytes of memory in use, without page cache that is inactive.";
    NET_RX_BYTES "container_network_receive_bytes_total" Counter ["interface"] "Bytes received.";
    NET_RX_ERRORS "container_network_receive_errors_total" Counter ["interface"] "Errors in receiving.";
    NET_RX_DROPPED "container_network_receive_packets_dropped_total" Counter ["interface"] "Packets dropped in receiving.";
    NET_RX_PACKETS "container_network_receive_packets_total" Counter ["interface"] "Packets received.";
    NET_TX_BYTES "container_network_transmit_bytes_total" Counter ["interface"] "Bytes sent.";
    NET_TX_ERRORS "container_network_transmit_errors_total" Counter ["interface"] "Errors in sending.";
    NET_TX_DROPPED "container_network_transmit_packets_dropped_total" Counter ["interface"] "Packets dropped in sending.";
    NET_TX_PACKETS "container_network_transmit_packets_total" Counter ["interface"] "Packets sent.";
    OOM_EVENTS "container_oom_events_total" Counter [] "Processes that the kernel killed for want of memory.";
    PSI_CPU_STALLED "container_pressure_cpu_stalled_seconds_total" Counter [] "Seconds in which every task waited for a CPU.";
    PSI_CPU_WAITING "container_pressure_cpu_waiting_seconds_total" Counter [] "Seconds in which some task waited for a CPU.";
    PSI_IO_STALLED "container_pressure_io_stalled_seconds_total" Counter [] "Seconds in which every task waited for I/O.";
    PSI_IO_WAITING "container_pressure_io_waiting_seconds_total" Counter [] "Seconds in which some task waited for I/O.";
    PSI_MEMORY_STALLED "container_pressure_memory_stalled_seconds_total" Counter [] "Seconds in which every task waited for memory.";
    PSI_MEMORY_WAITING "container_pressure_memory_waiting_seconds_total" Counter [] "Seconds in which some task waited for memory.";
    PROCESSES "container_processes" Gauge [] "Processes.";
    SOCKETS "container_sockets" Gauge [] "Open sockets.";
    SPEC_CPU_PERIOD "container_spec_cpu_period" Gauge [] "Period of the CPU quota in microseconds.";
    SPEC_CPU_QUOTA "container_spec_cpu_quota" Gauge [] "CPU quota in microseconds per period.";
    SPEC_CPU_SHARES "container_spec_cpu_shares" Gauge [] "CPU shares.";
    SPEC_MEMORY_LIMIT "container_spec_memory_limit_bytes" Gauge [] "Memory limit in bytes; 0 without one.";
    SPEC_MEMORY_RESERVATION "container_spec_memory_reservation_limit_bytes" Gauge [] "Protected memory in bytes; 0 without any.";
    SPEC_MEMORY_SWAP_LIMIT "container_spec_memory_swap_limit_bytes" Gauge [] "Limit of memory and swap together in bytes; 0 without one.";
    START_TIME "container_start_time_seconds" Gauge [] "When the container was started, in seconds since the epoch.";
    THREADS "container_threads" Gauge [] "Threads.";
    THREADS_MAX "container_threads_max" Gauge [] "How many threads there may be; 0 without a limit.";
    ULIMITS_SOFT "container_ulimits_soft" Gauge ["ulimit"] "Soft resource limits of the container's first process.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_one_of_its_own() {
        let names: std::collections::BTreeSet<_> = DESCRIPTORS.iter().map(|descriptor| descriptor.name).collect();
        assert_eq!(names.len(), 56);
        for descriptor in DESCRIPTORS {
            assert!(descriptor.name.starts_with("container_") && descriptor.help.ends_with('.'), "{descriptor:?}");
            // Two names are older than the rule that `_total` is a counter's.
            let counts = (descriptor.name.ends_with("_total") && descriptor.name != "container_fs_inodes_total")
                || descriptor.name == "container_memory_failcnt";
            assert_eq!(descriptor.kind == MetricKind::Counter, counts, "{descriptor:?}");
        }
    }
}
