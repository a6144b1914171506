//! From limits in cgroup v1 terms, which the CRI speaks, to the texts that v2's files take. Pure.

use std::path::PathBuf;

use super::CgroupError;

/// What files of v2 begin with that are settings: its controllers.
const CONTROLLERS: [&str; 9] = ["cpu", "cpuset", "dmem", "hugetlb", "io", "memory", "misc", "pids", "rdma"];

/// `cpu.shares` (2 to 262144, default 1024) as `cpu.weight` (1 to 10000, default 100). 0 is "not given".
///
/// The curve runs through both ends and through both defaults: `10^((l² + 125·l)/612 − 7/34)` with `l = log₂ shares`,
/// rounded up. It is what runc 1.3.2 and crun 1.23 use; the straight line of before gave a default container a weight of 39,
/// less than half of what a process outside of any container has.
pub(super) fn shares_to_weight(shares: u64) -> Option<u64> {
    match shares {
        0 => None,
        1..=2 => Some(1),
        262_144.. => Some(10_000),
        _ => {
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            Some((10f64.powf(exponent).ceil() as u64).clamp(1, 10_000))
        }
    }
}

/// A limit as v2's files have it: negative is `max`.
pub(super) fn limit_v2(limit: i64) -> String {
    if limit < 0 { "max".to_string() } else { limit.to_string() }
}

/// A limit as v1's files have it: negative is `-1`.
pub(super) fn limit_v1(limit: i64) -> String {
    limit.max(-1).to_string()
}

/// `cpu.max`: quota and period in microseconds. `now` is what the file holds, for the half that isn't given. 0 is "not given".
pub(super) fn cpu_max(
    quota: Option<i64>,
    period: Option<u64>,
    now: impl FnOnce() -> Result<String, CgroupError>,
) -> Result<Option<String>, CgroupError> {
    let quota = quota.filter(|&quota| quota != 0).map(limit_v2);
    Ok(match (quota, period.filter(|&period| period != 0)) {
        (None, None) => None,
        // A quota alone leaves the period as it is.
        (Some(quota), None) => Some(quota),
        (Some(quota), Some(period)) => Some(format!("{quota} {period}")),
        (None, Some(period)) => {
            let now = now()?;
            Some(format!("{} {period}", now.split_ascii_whitespace().next().unwrap_or("max")))
        }
    })
}

/// `memory.swap.max` from v1's limit of memory and swap together. `None`: leave it. 0 is "not given".
pub(super) fn swap_max(together: Option<i64>, memory: Option<i64>) -> Result<Option<String>, CgroupError> {
    let bad = |value: i64, why| CgroupError::BadValue { what: "limit of memory and swap together", value: value.to_string(), why };
    match (together.filter(|&n| n != 0), memory.filter(|&n| n != 0)) {
        (None, Some(..0)) => Ok(Some("max".to_string())),
        (None, _) => Ok(None),
        (Some(..0), _) => Ok(Some("max".to_string())),
        (Some(n), None | Some(..0)) => Err(bad(n, "the memory has no limit of its own")),
        (Some(n), Some(memory)) if n < memory => Err(bad(n, "it is less than the limit of memory alone")),
        (Some(n), Some(memory)) => Ok(Some((n - memory).to_string())),
    }
}

/// Refuses a memory limit below what is in use beside the page cache, which can be given back. `cache` is asked only if need be.
pub(super) fn check_shrink(
    file: impl FnOnce() -> PathBuf,
    limit: i64,
    current: u64,
    cache: impl FnOnce() -> Result<u64, CgroupError>,
) -> Result<(), CgroupError> {
    let Ok(limit) = u64::try_from(limit) else { return Ok(()) };
    if current <= limit {
        return Ok(());
    }
    let used = current.saturating_sub(cache()?);
    if used > limit { Err(CgroupError::Shrink { file: file(), limit, used }) } else { Ok(()) }
}

/// A huge page size as the kernel's file names have it: `2MB`, `64KB`, `1GB`.
pub(super) fn check_page_size(size: &str) -> Result<(), CgroupError> {
    let digits = size.strip_suffix("KB").or_else(|| size.strip_suffix("MB")).or_else(|| size.strip_suffix("GB")).unwrap_or_default();
    if (1..=5).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(());
    }
    Err(CgroupError::BadValue { what: "huge page size", value: size.to_string(), why: "it is not like 2MB" })
}

/// A `unified` key must be a plain file of a controller that there is: no path, and of the core's files only the limits.
/// `cgroup.procs` or `cgroup.kill` are not settings.
pub(super) fn check_unified(key: &str) -> Result<(), CgroupError> {
    let plain = !key.is_empty() && key.len() <= 255 && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let known = key.split_once('.').is_some_and(|(name, rest)| CONTROLLERS.contains(&name) && !rest.is_empty() && !key.contains(".."));
    let core = matches!(key, "cgroup.max.depth" | "cgroup.max.descendants");
    if plain && (known || core) { Ok(()) } else { Err(CgroupError::BadKey { key: key.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_run_through_both_ends_and_the_default() {
        let check = |shares: u64, weight: Option<u64>| assert_eq!(shares_to_weight(shares), weight, "{shares}");
        check(0, None);
        check(1, Some(1));
        check(2, Some(1));
        check(1024, Some(100));
        check(102, Some(17));
        check(2048, Some(174));
        check(262_144, Some(10_000));
        check(u64::MAX, Some(10_000));
        let mut last = 0;
        for shares in 2..=262_144 {
            let weight = shares_to_weight(shares).unwrap();
            assert!(weight >= last && (1..=10_000).contains(&weight), "{shares}");
            last = weight;
        }
    }

    #[test]
    fn cpu_max_keeps_the_half_that_is_not_given() {
        let check = |quota, period, want: Option<&str>| {
            assert_eq!(cpu_max(quota, period, || Ok("5000 20000\n".into())).unwrap().as_deref(), want, "{quota:?} {period:?}");
        };
        check(None, None, None);
        check(Some(0), Some(0), None);
        check(Some(10_000), None, Some("10000"));
        check(Some(10_000), Some(50_000), Some("10000 50000"));
        check(Some(-1), Some(50_000), Some("max 50000"));
        check(Some(-1), None, Some("max"));
        check(None, Some(50_000), Some("5000 50000"));
    }

    #[test]
    fn swap_is_what_is_above_memory() {
        let check =
            |together, memory, want: Option<&str>| assert_eq!(swap_max(together, memory).unwrap().as_deref(), want, "{together:?} {memory:?}");
        check(None, None, None);
        check(None, Some(100), None);
        check(Some(0), Some(100), None);
        check(None, Some(-1), Some("max"));
        check(Some(-1), Some(100), Some("max"));
        check(Some(100), Some(100), Some("0"));
        check(Some(150), Some(100), Some("50"));
        for (together, memory) in [(Some(99), Some(100)), (Some(99), None), (Some(99), Some(-1))] {
            assert!(swap_max(together, memory).is_err(), "{together:?} {memory:?}");
        }
    }

    #[test]
    fn keys_are_plain_files() {
        for key in ["memory.high", "memory.swap.max", "io.max", "hugetlb.2MB.max", "cgroup.max.depth", "cpu.max.burst"] {
            assert!(check_unified(key).is_ok(), "{key}");
        }
        for key in [
            "",
            "memory",
            ".",
            "..",
            "../memory.max",
            "a/b.c",
            "cgroup.procs",
            "cgroup.kill",
            "memory..max",
            "memory.",
            ".max",
            "a.b",
            "memory.a\n",
            "memory.ä",
        ] {
            assert!(check_unified(key).is_err(), "{key:?}");
        }
        for (size, fits) in [("2MB", true), ("64KB", true), ("1GB", true), ("2M", false), ("MB", false), ("../2MB", false), ("2097152MB", false)] {
            assert_eq!(check_page_size(size).is_ok(), fits, "{size}");
        }
    }
}
