//! Limits.

use std::collections::BTreeMap;

use super::bad;
use crate::api;
use crate::errchain::Remote;
use crate::model::container::Resources;

/// What the kernel takes for a period of CPU time, and the least for a quota in it, in microseconds (kernel/sched/core.c).
const CPU_PERIOD: std::ops::RangeInclusive<i64> = 1000..=1_000_000;
/// What the kernel takes for cpu.shares.
const CPU_SHARES: std::ops::RangeInclusive<i64> = 2..=262_144;
/// Bytes. Below it no process gets as far as its first instruction, and what fails says so in no way that helps.
const MIN_MEMORY: i64 = 512 << 10;
/// Bytes of all `unified` keys and values, and how many.
const MAX_UNIFIED: (usize, usize) = (64 << 10, 256);

/// The limits of a container that is to be made.
pub(super) fn resources(from: Option<api::LinuxContainerResources>) -> Result<Resources, Remote> {
    let checked = limits("config.linux.resources", from.unwrap_or_default())?;
    checked.check_memory().map_err(|(value, reason)| bad("config.linux.resources.memory_swap_limit_in_bytes", &value.to_string(), reason))?;
    Ok(checked)
}

/// UpdateContainerResources: what is to change.
pub fn update(req: &mut api::UpdateContainerResourcesRequest) -> Result<Resources, Remote> {
    if req.windows.is_some() {
        return Err(bad("windows", "WindowsContainerResources", "is for Windows nodes"));
    }
    limits("linux", req.linux.take().unwrap_or_default())
}

/// The limits of a whole pod, which are kept and reported: the control group that they are for is kubelet's.
pub fn pod_resources(field: &str, from: Option<api::LinuxContainerResources>) -> Result<Option<Resources>, Remote> {
    from.map(|from| limits(field, from)).transpose()
}

/// Each field by itself; 0 and empty are "not given".
fn limits(field: &str, from: api::LinuxContainerResources) -> Result<Resources, Remote> {
    let check = |name: &str, value: i64, fits: bool, reason: &str| match fits {
        true => Ok(()),
        false => Err(bad(&format!("{field}.{name}"), &value.to_string(), reason)),
    };
    let limit = |value: i64, least: i64| value == 0 || value == -1 || value >= least;
    check("cpu_period", from.cpu_period, from.cpu_period == 0 || CPU_PERIOD.contains(&from.cpu_period), "is not 1000 to 1000000 microseconds")?;
    check("cpu_quota", from.cpu_quota, limit(from.cpu_quota, *CPU_PERIOD.start()), "is neither at least 1000 microseconds nor -1")?;
    check("cpu_shares", from.cpu_shares, from.cpu_shares == 0 || CPU_SHARES.contains(&from.cpu_shares), "is not 2 to 262144")?;
    let bytes = "is neither at least 524288 bytes nor -1";
    check("memory_limit_in_bytes", from.memory_limit_in_bytes, limit(from.memory_limit_in_bytes, MIN_MEMORY), bytes)?;
    check("memory_swap_limit_in_bytes", from.memory_swap_limit_in_bytes, limit(from.memory_swap_limit_in_bytes, MIN_MEMORY), bytes)?;
    check("oom_score_adj", from.oom_score_adj, (-1000..=1000).contains(&from.oom_score_adj), "is not -1000 to 1000")?;
    for (name, list) in [("cpuset_cpus", &from.cpuset_cpus), ("cpuset_mems", &from.cpuset_mems)] {
        if !list.is_empty() && !is_list(list) {
            return Err(bad(&format!("{field}.{name}"), list, "is not a list of numbers and ranges like 0-3,7"));
        }
    }
    Ok(Resources {
        cpu_period: from.cpu_period,
        cpu_quota: from.cpu_quota,
        cpu_shares: from.cpu_shares,
        memory_limit: from.memory_limit_in_bytes,
        memory_swap: from.memory_swap_limit_in_bytes,
        oom_score_adj: from.oom_score_adj,
        cpuset_cpus: from.cpuset_cpus,
        cpuset_mems: from.cpuset_mems,
        hugepages: hugepages(field, from.hugepage_limits)?,
        unified: unified(field, from.unified)?,
    })
}

/// `0-3,7`: the kernel's format (cpuset(7)), of which strides are nobody's business here.
fn is_list(text: &str) -> bool {
    let number = |text: &str| {
        (1..=5).contains(&text.len()).then(|| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u32>().ok())).flatten().flatten()
    };
    text.len() <= 4096
        && text.split(',').all(|part| match part.split_once('-') {
            None => number(part).is_some(),
            Some((first, last)) => matches!((number(first), number(last)), (Some(first), Some(last)) if first <= last),
        })
}

fn hugepages(field: &str, from: Vec<api::HugepageLimit>) -> Result<Vec<(String, u64)>, Remote> {
    let mut limits = BTreeMap::new();
    for limit in from {
        let number = limit.page_size.strip_suffix("KB").or(limit.page_size.strip_suffix("MB")).or(limit.page_size.strip_suffix("GB"));
        if number.is_none_or(|number| number.is_empty() || number.len() > 5 || !number.bytes().all(|b| b.is_ascii_digit())) {
            return Err(bad(&format!("{field}.hugepage_limits.page_size"), &limit.page_size, "is not a page size like 2MB"));
        }
        if limits.insert(limit.page_size.clone(), limit.limit).is_some_and(|before| before != limit.limit) {
            return Err(bad(&format!("{field}.hugepage_limits.page_size"), &limit.page_size, "has two limits"));
        }
    }
    Ok(limits.into_iter().collect())
}

fn unified(field: &str, from: std::collections::HashMap<String, String>) -> Result<BTreeMap<String, String>, Remote> {
    let size: usize = from.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAX_UNIFIED.0 || from.len() > MAX_UNIFIED.1 {
        return Err(bad(&format!("{field}.unified"), &format!("{} keys of {size} bytes", from.len()), "are more than 256 keys of 64 KiB"));
    }
    for (key, value) in &from {
        if !key.contains('.') || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
            return Err(bad(&format!("{field}.unified"), key, "is not the name of a control group's file"));
        }
        if value.trim().is_empty() || value.bytes().any(|b| b != b'\n' && b.is_ascii_control()) {
            return Err(bad(&format!("{field}.unified[{key}]"), value, "is no value for a control group's file"));
        }
    }
    Ok(from.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::super::tests::refused;
    use super::*;

    #[test]
    fn each_limit_is_checked() {
        type Limits = api::LinuxContainerResources;
        let check = |change: fn(&mut Limits), words: Option<&[&str]>| {
            let mut from = Limits::default();
            change(&mut from);
            match words {
                Some(words) => refused(resources(Some(from)), words),
                None => drop(resources(Some(from)).unwrap()),
            }
        };
        check(|_| {}, None);
        check(|r| r.cpu_period = 1000, None);
        check(|r| r.cpu_period = 999, Some(&["config.linux.resources.cpu_period", "999"]));
        check(|r| r.cpu_period = 1_000_001, Some(&["cpu_period", "1000001"]));
        check(|r| r.cpu_quota = -1, None);
        check(|r| r.cpu_quota = -2, Some(&["cpu_quota", "-2"]));
        check(|r| r.cpu_quota = 999, Some(&["cpu_quota", "999"]));
        check(|r| r.cpu_shares = 1, Some(&["cpu_shares", "1"]));
        check(|r| r.cpu_shares = 262_145, Some(&["cpu_shares", "262145"]));
        check(|r| r.memory_limit_in_bytes = -1, None);
        check(|r| r.memory_limit_in_bytes = 524_287, Some(&["memory_limit_in_bytes", "524287"]));
        check(|r| r.memory_swap_limit_in_bytes = -1, None);
        check(|r| r.memory_swap_limit_in_bytes = 1 << 30, Some(&["memory_swap_limit_in_bytes", "1073741824"]));
        check(|r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (1 << 30, 1 << 30), None);
        check(|r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (1 << 30, 1 << 29), Some(&["memory_swap_limit_in_bytes", "536870912"]));
        check(|r| r.oom_score_adj = 1001, Some(&["oom_score_adj", "1001"]));
        check(|r| r.cpuset_cpus = "0-1,3".into(), None);
        for list in ["x", "1-", "3-1", ",", "0,", "-1", "0 1", "123456"] {
            let from = Limits { cpuset_cpus: list.into(), ..Limits::default() };
            refused(resources(Some(from)), &["cpuset_cpus", list]);
            let from = Limits { cpuset_mems: list.into(), ..Limits::default() };
            refused(resources(Some(from)), &["cpuset_mems", list]);
        }
        let page = |size: &str, limit| api::HugepageLimit { page_size: size.into(), limit };
        let pages = |limits: Vec<api::HugepageLimit>| resources(Some(Limits { hugepage_limits: limits, ..Limits::default() }));
        assert_eq!(pages(vec![page("2MB", 1), page("1GB", 0)]).unwrap().hugepages, [("1GB".to_string(), 0), ("2MB".to_string(), 1)]);
        refused(pages(vec![page("2M", 1)]), &["hugepage_limits.page_size", "2M"]);
        refused(pages(vec![page("2MB", 1), page("2MB", 2)]), &["page_size", "2MB", "two limits"]);
        let one = |key: &str, value: &str| resources(Some(Limits { unified: [(key.into(), value.into())].into(), ..Limits::default() }));
        one("memory.high", "max").unwrap();
        for key in ["", "memory", "../memory.max", "a/b.c", "memory.max\n"] {
            refused(one(key, "1"), &["resources.unified"]);
        }
        refused(one("memory.high", ""), &["unified[memory.high]"]);
        refused(one("memory.high", "1\0"), &["unified[memory.high]"]);
    }

    #[test]
    fn an_update_is_for_linux() {
        let mut windows = api::UpdateContainerResourcesRequest { windows: Some(api::WindowsContainerResources::default()), ..Default::default() };
        refused(update(&mut windows), &["windows", "Windows nodes"]);
        // An update's swap may be for the memory that the container has.
        let limits = api::LinuxContainerResources { memory_swap_limit_in_bytes: 1 << 30, ..Default::default() };
        let mut swap = api::UpdateContainerResourcesRequest { linux: Some(limits), ..Default::default() };
        assert_eq!(update(&mut swap).unwrap().memory_swap, 1 << 30);
    }
}
