//! What a control group uses, in one form for both versions.
//!
//! What a node or a kernel doesn't count is `None`, not zero. Numbers are those of the group with everything below it.

use std::time::SystemTime;

use super::CgroupError;
use super::dir::Dir;
use super::{v1, v2};

/// A reading.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// When it was taken.
    pub at: SystemTime,
    /// Processor time.
    pub cpu: Option<CpuStats>,
    /// Memory.
    pub memory: Option<MemoryStats>,
    /// Swap. `None`: swap isn't accounted.
    pub swap: Option<SwapStats>,
    /// Tasks.
    pub pids: Option<PidsStats>,
    /// Processes: thread groups, not threads.
    pub processes: Vec<u32>,
    /// Huge pages, by size.
    pub hugepages: Vec<HugepageStats>,
    /// Block devices.
    pub io: Vec<IoStats>,
    /// How long something waited for a CPU. v2's hierarchy only, which the hybrid has too.
    pub cpu_pressure: Option<Pressure>,
    /// How long something waited for memory.
    pub memory_pressure: Option<Pressure>,
    /// How long something waited for block devices.
    pub io_pressure: Option<Pressure>,
}

/// Processor time, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuStats {
    /// All of it, over all CPUs.
    pub usage_ns: u64,
    /// In user mode. An estimate by clock ticks on v1; may even exceed `usage_ns`.
    pub user_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// Periods with a quota that have passed.
    pub periods: u64,
    /// Periods in which the quota ran out.
    pub throttled_periods: u64,
    /// Time for which tasks were held back.
    pub throttled_ns: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryStats {
    /// All that is charged, page cache included.
    pub usage: u64,
    /// The most that `usage` was. `None`: before Linux 5.19 on v2.
    pub peak: Option<u64>,
    /// `usage` without the page cache that is not in active use: what kubelet evicts by.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page cache, tmpfs included.
    pub cache: u64,
    /// Page cache that is mapped.
    pub mapped_file: u64,
    /// The kernel's own memory on behalf of the group.
    pub kernel: Option<u64>,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that had to read from a device.
    pub major_page_faults: u64,
    /// How often the limit stood in the way.
    pub limit_hits: u64,
    /// Processes that the OOM killer has ended.
    pub oom_kills: u64,
    /// The group's own limit. `None`: unlimited.
    pub limit: Option<u64>,
    /// `limit` − `working_set`. `None`: unlimited.
    pub available: Option<u64>,
}

/// Swap, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SwapStats {
    /// In use.
    pub usage: u64,
    /// The group's own limit. `None`: unlimited.
    pub limit: Option<u64>,
}

/// Tasks: threads, each counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PidsStats {
    /// How many there are.
    pub current: u64,
    /// How many there may be. `None`: unlimited.
    pub limit: Option<u64>,
}

/// Huge pages of one size, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HugepageStats {
    /// `2MB`.
    pub size: String,
    /// In use.
    pub usage: u64,
    /// The most that `usage` was. `None`: v2 doesn't say.
    pub peak: Option<u64>,
    /// The limit. `None`: unlimited.
    pub limit: Option<u64>,
}

/// One block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoStats {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Pressure stall information (Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    /// Some task waited.
    pub some: PressureShare,
    /// Every task waited.
    pub full: PressureShare,
}

/// Shares of time in percent, and a total.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PressureShare {
    /// Over ten seconds.
    pub avg10: f64,
    /// Over a minute.
    pub avg60: f64,
    /// Over five minutes.
    pub avg300: f64,
    /// Microseconds since the group was made.
    pub total_us: u64,
}

/// The value of a line `name value`.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// v1 has unlimited as the largest number of whole pages; nothing real comes near it.
fn v1_limit(limit: u64) -> Option<u64> {
    (limit < 1 << 62).then_some(limit)
}

fn pressure(dir: &Dir, file: &str) -> Result<Option<Pressure>, CgroupError> {
    let Some(text) = dir.read(file)? else { return Ok(None) };
    Ok(parse_pressure(&text))
}

fn parse_pressure(text: &str) -> Option<Pressure> {
    let share = |name: &str| -> Option<PressureShare> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        let value = |key: &str| line.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        Some(PressureShare {
            avg10: value("avg10")?.parse().ok()?,
            avg60: value("avg60")?.parse().ok()?,
            avg300: value("avg300")?.parse().ok()?,
            total_us: value("total")?.parse().ok()?,
        })
    };
    // cpu.pressure has no line for `full` before Linux 5.13.
    Some(Pressure { some: share("some")?, full: share("full").unwrap_or_default() })
}

/// The entry of a device, made where it is new. `name` is `8:0`.
fn device<'a>(list: &'a mut Vec<IoStats>, name: &str) -> Option<&'a mut IoStats> {
    let (major, minor) = name.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let at = list.iter().position(|io| (io.major, io.minor) == (major, minor)).unwrap_or(list.len());
    if at == list.len() {
        list.push(IoStats { major, minor, ..IoStats::default() });
    }
    list.get_mut(at)
}

fn parse_io_v2(text: &str) -> Vec<IoStats> {
    let mut list = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let Some(io) = words.next().and_then(|name| device(&mut list, name)) else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => io.read_bytes = value,
                "wbytes" => io.write_bytes = value,
                "rios" => io.reads = value,
                "wios" => io.writes = value,
                _ => {}
            }
        }
    }
    list
}

fn parse_io_v1(bytes: &str, operations: &str) -> Vec<IoStats> {
    let mut list = Vec::new();
    let parts = |line: &str| -> Option<(String, String, u64)> {
        let mut words = line.split(' ');
        Some((words.next()?.to_string(), words.next()?.to_string(), words.next()?.parse().ok()?))
    };
    for (text, is_bytes) in [(bytes, true), (operations, false)] {
        for (name, kind, value) in text.lines().filter_map(parts) {
            let Some(io) = device(&mut list, &name) else { continue };
            match (kind.as_str(), is_bytes) {
                ("Read", true) => io.read_bytes = value,
                ("Write", true) => io.write_bytes = value,
                ("Read", false) => io.reads = value,
                ("Write", false) => io.writes = value,
                _ => {}
            }
        }
    }
    list
}

impl Stats {
    fn empty(processes: Vec<u32>) -> Self {
        Self {
            at: SystemTime::now(),
            cpu: None,
            memory: None,
            swap: None,
            pids: None,
            processes,
            hugepages: Vec::new(),
            io: Vec::new(),
            cpu_pressure: None,
            memory_pressure: None,
            io_pressure: None,
        }
    }

    fn read_pressure(&mut self, dir: &Dir) -> Result<(), CgroupError> {
        self.cpu_pressure = pressure(dir, "cpu.pressure")?;
        self.memory_pressure = pressure(dir, "memory.pressure")?;
        self.io_pressure = pressure(dir, "io.pressure")?;
        Ok(())
    }

    fn read_hugepages(&mut self, dir: &Dir, page_sizes: &[String]) -> Result<(), CgroupError> {
        for size in page_sizes {
            if let Some(Some(usage)) = dir.number(&format!("hugetlb.{size}.current"))? {
                let limit = dir.number(&format!("hugetlb.{size}.max"))?.flatten();
                self.hugepages.push(HugepageStats { size: size.clone(), usage, peak: None, limit });
            }
        }
        Ok(())
    }

    fn read_pids(&mut self, dir: &Dir) -> Result<(), CgroupError> {
        if let Some(Some(current)) = dir.number("pids.current")? {
            self.pids = Some(PidsStats { current, limit: dir.number("pids.max")?.flatten() });
        }
        Ok(())
    }
}

pub(super) fn read_v2(group: &v2::Group, page_sizes: &[String]) -> Result<Stats, CgroupError> {
    let dir = Dir::open(&group.dir)?;
    let mut stats = Stats::empty(group.procs(true)?);
    if let Some(text) = dir.read("cpu.stat")? {
        let us = |name| field(&text, name).unwrap_or(0);
        stats.cpu = Some(CpuStats {
            usage_ns: us("usage_usec") * 1000,
            user_ns: us("user_usec") * 1000,
            system_ns: us("system_usec") * 1000,
            periods: us("nr_periods"),
            throttled_periods: us("nr_throttled"),
            throttled_ns: us("throttled_usec") * 1000,
        });
    }
    if let (Some(Some(usage)), Some(text)) = (dir.number("memory.current")?, dir.read("memory.stat")?) {
        let bytes = |name| field(&text, name).unwrap_or(0);
        let working_set = usage.saturating_sub(bytes("inactive_file"));
        let limit = dir.number("memory.max")?.flatten();
        let events = dir.read("memory.events")?.unwrap_or_default();
        // Its parts, before Linux 5.18.
        let kernel = || ["slab", "kernel_stack", "pagetables", "percpu"].iter().filter_map(|name| field(&text, name)).reduce(|a, b| a + b);
        stats.memory = Some(MemoryStats {
            usage,
            peak: dir.number("memory.peak")?.flatten(),
            working_set,
            rss: bytes("anon"),
            cache: bytes("file"),
            mapped_file: bytes("file_mapped"),
            kernel: field(&text, "kernel").or_else(kernel),
            page_faults: bytes("pgfault"),
            major_page_faults: bytes("pgmajfault"),
            limit_hits: field(&events, "max").unwrap_or(0),
            oom_kills: field(&events, "oom_kill").unwrap_or(0),
            limit,
            available: limit.map(|limit| limit.saturating_sub(working_set)),
        });
        if let Some(Some(usage)) = dir.number("memory.swap.current")? {
            stats.swap = Some(SwapStats { usage, limit: dir.number("memory.swap.max")?.flatten() });
        }
    }
    stats.read_pids(&dir)?;
    stats.io = dir.read("io.stat")?.map(|text| parse_io_v2(&text)).unwrap_or_default();
    if group.controllers.iter().any(|name| name == "hugetlb") {
        stats.read_hugepages(&dir, page_sizes)?;
    }
    stats.read_pressure(&dir)?;
    Ok(stats)
}

pub(super) fn read_v1(group: &v1::Group, page_sizes: &[String]) -> Result<Stats, CgroupError> {
    // Of one hierarchy: a process is moved in all of them together, and its number is read for no decision.
    let mut procs = Vec::new();
    for controller in ["memory", "pids", "cpuacct"] {
        if let Some(dir) = group.find(controller)? {
            dir.procs_below(&mut procs)?;
            break;
        }
    }
    let mut stats = Stats::empty(procs);
    if let Some(dir) = group.find("cpuacct")? {
        let ns = |file| Ok::<u64, CgroupError>(dir.number(file)?.flatten().unwrap_or(0));
        stats.cpu = Some(CpuStats {
            usage_ns: ns("cpuacct.usage")?,
            user_ns: ns("cpuacct.usage_user")?,
            system_ns: ns("cpuacct.usage_sys")?,
            ..CpuStats::default()
        });
    }
    if let (Some(cpu), Some(dir)) = (&mut stats.cpu, group.find("cpu")?) {
        let text = dir.read("cpu.stat")?.unwrap_or_default();
        let count = |name| field(&text, name).unwrap_or(0);
        (cpu.periods, cpu.throttled_periods, cpu.throttled_ns) = (count("nr_periods"), count("nr_throttled"), count("throttled_time"));
    }
    if let Some(dir) = group.find("memory")? {
        let number = |file| Ok::<Option<u64>, CgroupError>(dir.number(file)?.flatten());
        let usage = number("memory.usage_in_bytes")?.unwrap_or(0);
        let text = dir.read("memory.stat")?.unwrap_or_default();
        let bytes = |name| field(&text, name).unwrap_or(0);
        let working_set = usage.saturating_sub(bytes("total_inactive_file"));
        let memory_limit = number("memory.limit_in_bytes")?;
        let limit = memory_limit.and_then(v1_limit);
        stats.memory = Some(MemoryStats {
            usage,
            peak: number("memory.max_usage_in_bytes")?,
            working_set,
            rss: bytes("total_rss"),
            cache: bytes("total_cache"),
            mapped_file: bytes("total_mapped_file"),
            kernel: number("memory.kmem.usage_in_bytes")?,
            page_faults: bytes("total_pgfault"),
            major_page_faults: bytes("total_pgmajfault"),
            // Where both limits are the same, the upper one is the one that is hit.
            limit_hits: number("memory.failcnt")?.unwrap_or(0) + number("memory.memsw.failcnt")?.unwrap_or(0),
            oom_kills: dir.read("memory.oom_control")?.and_then(|text| field(&text, "oom_kill")).unwrap_or(0),
            limit,
            available: limit.map(|limit| limit.saturating_sub(working_set)),
        });
        if let (Some(together), Some(memory)) = (number("memory.memsw.limit_in_bytes")?, memory_limit) {
            let limit = v1_limit(together).map(|together| together.saturating_sub(memory));
            stats.swap = Some(SwapStats { usage: bytes("total_swap"), limit });
        }
    }
    if let Some(dir) = group.find("pids")? {
        stats.read_pids(&dir)?;
    }
    if let Some(dir) = group.find("blkio")? {
        let bytes = dir.read("blkio.throttle.io_service_bytes_recursive")?.unwrap_or_default();
        let operations = dir.read("blkio.throttle.io_serviced_recursive")?.unwrap_or_default();
        stats.io = parse_io_v1(&bytes, &operations);
    }
    if let Some(dir) = group.find("hugetlb")? {
        for size in page_sizes {
            if let Some(Some(usage)) = dir.number(&format!("hugetlb.{size}.usage_in_bytes"))? {
                let limit = dir.number(&format!("hugetlb.{size}.limit_in_bytes"))?.flatten().and_then(v1_limit);
                let peak = dir.number(&format!("hugetlb.{size}.max_usage_in_bytes"))?.flatten();
                stats.hugepages.push(HugepageStats { size: size.clone(), usage, peak, limit });
            }
        }
    } else if let Some(dir) = group.hybrid_hugetlb()? {
        stats.read_hugepages(&dir, page_sizes)?;
    }
    if let Some(dir) = group.find("")? {
        stats.read_pressure(&dir)?;
    }
    Ok(stats)
}
