//! Control groups as systemd names and limits them: slices, scopes, and limits as properties of units. Pure: the calls over
//! D-Bus are the daemon's.
//!
//! systemd owns what it made: it writes a unit's limits again when it likes (a `daemon-reload` does), so that whatever it has
//! a property for goes through that property, with the value that [`super::Cgroup::set`] writes. Devices don't: a unit
//! whose `DevicePolicy` is `auto` has no filter of systemd's, and ours is the only one, which systemd never touches.

use super::{CgroupError, convert};
use crate::plan::Resources;

/// `cpu.max` has no limit finer than this share of a CPU, in microseconds per second: systemd rounds to it, and so do its clients.
const QUOTA_STEP: u64 = 10_000;

/// A property of a unit (systemd.resource-control(5), org.freedesktop.systemd1(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    /// Its name on D-Bus.
    pub name: &'static str,
    /// Its value.
    pub value: Value,
}

/// A property's value, by its D-Bus type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `t`; u64::MAX is "infinity".
    Number(u64),
    /// `ay`: the lowest bit of the first byte is CPU or node 0.
    Bits(Vec<u8>),
}

/// The path of a slice: `a-b.slice` is below `a.slice` (systemd.slice(5)).
pub fn slice_path(name: &str) -> Result<String, CgroupError> {
    let bad = |why| CgroupError::BadPath { path: name.chars().take(200).collect(), why };
    let stem = name.strip_suffix(".slice").ok_or_else(|| bad("it is no slice: its name does not end in .slice"))?;
    if name.len() > 255 || !stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte)) {
        return Err(bad("it is no slice: units' names have up to 255 letters, digits and :-_.\\@"));
    }
    if stem.split('-').any(str::is_empty) {
        return Err(bad("it is no slice: a part of its name is empty"));
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    Ok(ends.map(|end| format!("/{}.slice", &stem[..end])).collect())
}

/// The slice that stands for a path of control groups: `/a/b` is `a-b.slice`, as systemd-escape(1) has it.
pub fn slice_of_path(path: &str) -> String {
    format!("{}.slice", escape(path))
}

/// The scope that stands for a path of control groups: `/a/b` is `a-b.scope`.
pub fn scope_of_path(path: &str) -> String {
    format!("{}.scope", escape(path))
}

/// The unit whose control group is at a path.
pub fn unit_of_path(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    (name.ends_with(".slice") || name.ends_with(".scope")).then_some(name)
}

/// The slice in which the unit at a path is.
pub fn slice_above(path: &str) -> Option<&str> {
    unit_of_path(path.rsplit_once('/')?.0).filter(|name| name.ends_with(".slice"))
}

fn escape(path: &str) -> String {
    let plain = |byte: u8, first: bool| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':' || (byte == b'.' && !first);
    let mut name = String::new();
    for byte in path.trim_matches('/').bytes() {
        match byte {
            b'/' => name.push('-'),
            _ if plain(byte, name.is_empty()) => name.push(char::from(byte)),
            _ => name.push_str(&format!("\\x{byte:02x}")),
        }
    }
    name
}

/// Limits as properties. What systemd has no property for (huge pages, other files of `unified`) is for
/// [`super::Cgroup::set`], which is called after it. `None` in `limits` leaves a property as it is.
pub fn properties(limits: &Resources) -> Result<Vec<Property>, CgroupError> {
    let mut found = Vec::new();
    let mut number = |name, value| found.push(Property { name, value: Value::Number(value) });
    if let Some(weight) = limits.cpu_shares.and_then(convert::shares_to_weight) {
        number("CPUWeight", weight);
    }
    if let Some((quota, period)) = quota(limits) {
        number("CPUQuotaPerSecUSec", quota);
        if let Some(period) = period {
            number("CPUQuotaPeriodUSec", period);
        }
    }
    let bytes = |limit: i64| u64::try_from(limit).unwrap_or(u64::MAX);
    if let Some(limit) = limits.memory_limit.filter(|&limit| limit != 0) {
        number("MemoryMax", bytes(limit));
    }
    if let Some(swap) = convert::swap_max(limits.memory_swap, limits.memory_limit)? {
        number("MemorySwapMax", swap.parse().unwrap_or(u64::MAX));
    }
    if let Some(limit) = limits.pids_limit.filter(|&limit| limit != 0) {
        number("TasksMax", bytes(limit));
    }
    for (key, value) in &limits.unified {
        let name = match key.as_str() {
            "memory.min" => "MemoryMin",
            "memory.low" => "MemoryLow",
            "memory.high" => "MemoryHigh",
            "memory.max" => "MemoryMax",
            "memory.swap.max" => "MemorySwapMax",
            "pids.max" => "TasksMax",
            "cpu.weight" => "CPUWeight",
            _ => continue,
        };
        // What is no number is refused by the kernel, with an error that names the file.
        match value.trim() {
            "max" => number(name, u64::MAX),
            text => text.parse().into_iter().for_each(|value| number(name, value)),
        }
    }
    for (name, list, what) in
        [("AllowedCPUs", &limits.cpuset_cpus, "list of CPUs"), ("AllowedMemoryNodes", &limits.cpuset_mems, "list of memory nodes")]
    {
        if !list.is_empty() {
            let bits =
                bits(list).ok_or_else(|| CgroupError::BadValue { what, value: list.chars().take(200).collect(), why: "it is not like 0-2,7" })?;
            found.push(Property { name, value: Value::Bits(bits) });
        }
    }
    Ok(found)
}

/// Microseconds of CPU per second, and the period. `None`: leave them.
fn quota(limits: &Resources) -> Option<(u64, Option<u64>)> {
    let quota = limits.cpu_quota.filter(|&quota| quota != 0)?;
    let period = limits.cpu_period.filter(|&period| period != 0);
    let Ok(quota) = u64::try_from(quota) else { return Some((u64::MAX, period)) };
    let per_second = quota.saturating_mul(1_000_000) / period.unwrap_or(100_000);
    Some((per_second.div_ceil(QUOTA_STEP).saturating_mul(QUOTA_STEP), period))
}

/// The bits of a list such as `0-2,7`, in the kernel's format (cpuset(7)). `None`: it is none.
fn bits(list: &str) -> Option<Vec<u8>> {
    /// More CPUs than any kernel is built for.
    const MOST: usize = 1 << 16;
    let mut bits = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        if bits.len() <= last / 8 {
            bits.resize(last / 8 + 1, 0u8);
        }
        (first..=last).for_each(|n| bits[n / 8] |= 1 << (n % 8));
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_below_those_that_its_name_begins_with() {
        let check = |name: &str, want: Option<&str>| assert_eq!(slice_path(name).ok().as_deref(), want, "{name:?}");
        check("kubepods.slice", Some("/kubepods.slice"));
        check("kubepods-burstable-pod0e2c_1f.slice", Some("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0e2c_1f.slice"));
        check("a\\x2db-c.slice", Some("/a\\x2db.slice/a\\x2db-c.slice"));
        for bad in ["", "-.slice", ".slice", "a--b.slice", "-a.slice", "a-.slice", "a/b.slice", "a b.slice", "a.scope", "kubepods", "ä.slice"] {
            check(bad, None);
        }
        check(&format!("{}.slice", "a".repeat(250)), None);
    }

    #[test]
    fn paths_have_units() {
        for (path, name) in [("/copepod", "copepod"), ("/a/b", "a-b"), ("/copepod-test/pods", "copepod\\x2dtest-pods"), ("/.a/.b", "\\x2ea-.b")] {
            assert_eq!(slice_of_path(path), format!("{name}.slice"));
            assert_eq!(scope_of_path(path), format!("{name}.scope"));
        }
        let path = "/k.slice/k-p.slice/copepod-1.scope";
        assert_eq!((unit_of_path(path), slice_above(path)), (Some("copepod-1.scope"), Some("k-p.slice")));
        assert_eq!((unit_of_path("/k/p"), slice_above("/k/copepod-1.scope"), slice_above("/k.slice")), (None, None, None));
    }

    #[test]
    fn limits_become_properties() {
        let check = |limits: Resources, want: &[(&'static str, u64)]| {
            let want: Vec<Property> = want.iter().map(|(name, value)| Property { name, value: Value::Number(*value) }).collect();
            assert_eq!(properties(&limits).unwrap(), want, "{limits:?}");
        };
        let none = Resources::default;
        check(none(), &[]);
        check(Resources { cpu_shares: Some(1024), pids_limit: Some(0), memory_limit: Some(0), ..none() }, &[("CPUWeight", 100)]);
        let quota = |quota, period| Resources { cpu_quota: Some(quota), cpu_period: period, ..none() };
        check(quota(50_000, Some(100_000)), &[("CPUQuotaPerSecUSec", 500_000), ("CPUQuotaPeriodUSec", 100_000)]);
        check(quota(1_001, Some(100_000)), &[("CPUQuotaPerSecUSec", 20_000), ("CPUQuotaPeriodUSec", 100_000)]);
        check(quota(25_000, None), &[("CPUQuotaPerSecUSec", 250_000)]);
        check(quota(-1, Some(100_000)), &[("CPUQuotaPerSecUSec", u64::MAX), ("CPUQuotaPeriodUSec", 100_000)]);
        check(
            Resources { memory_limit: Some(100), memory_swap: Some(150), pids_limit: Some(-1), ..none() },
            &[("MemoryMax", 100), ("MemorySwapMax", 50), ("TasksMax", u64::MAX)],
        );
        let unified = [("memory.high", "max"), ("memory.low", "5"), ("memory.oom.group", "1"), ("cpu.weight", "x")];
        let unified = unified.map(|(key, value)| (key.to_string(), value.to_string())).to_vec();
        check(Resources { unified, ..none() }, &[("MemoryHigh", u64::MAX), ("MemoryLow", 5)]);
        assert!(properties(&Resources { memory_limit: Some(100), memory_swap: Some(50), ..none() }).is_err());
    }

    #[test]
    fn lists_become_bits() {
        let check = |list: &str, want: Option<&[u8]>| assert_eq!(bits(list).as_deref(), want, "{list:?}");
        check("0", Some(&[1]));
        check("0-2,7", Some(&[0b1000_0111]));
        check("9", Some(&[0, 2]));
        check("0-1,8\n", Some(&[3, 1]));
        for bad in ["", "a", "2-1", "-1", "0-", "0,,1", "4294967296", "0-99999999"] {
            check(bad, None);
        }
        let limits = Resources { cpuset_cpus: "1".into(), ..Resources::default() };
        assert_eq!(properties(&limits).unwrap(), [Property { name: "AllowedCPUs", value: Value::Bits(vec![2]) }]);
        assert!(properties(&Resources { cpuset_mems: "x".into(), ..Resources::default() }).is_err());
    }
}
