//! Limits, as the plan has them.

use crate::model::container::Resources;
use crate::plan;

/// All limits of a container; that of processes is the configuration's.
pub fn limits(r: &Resources, pids_limit: Option<i64>) -> plan::Resources {
    let set = |n: i64| (n != 0).then_some(n);
    plan::Resources {
        cpu_shares: u64::try_from(r.cpu_shares).ok().filter(|n| *n != 0),
        cpu_quota: set(r.cpu_quota),
        cpu_period: u64::try_from(r.cpu_period).ok().filter(|n| *n != 0),
        cpuset_cpus: r.cpuset_cpus.clone(),
        cpuset_mems: r.cpuset_mems.clone(),
        memory_limit: set(r.memory_limit),
        // Without a swap limit of its own a container with a memory limit gets no swap, as kubelet's NoSwap expects.
        memory_swap: set(r.memory_swap).or(set(r.memory_limit)),
        pids_limit,
        hugepages: r.hugepages.clone(),
        unified: r.unified.clone().into_iter().collect(),
    }
}

/// The plan of a container that has `now` (what was asked for, changed by `update`) for those limits that `update` names.
/// Memory and swap are set together: on cgroup v2 the one depends on the other.
pub fn update(now: &Resources, update: &Resources) -> plan::Resources {
    let memory = update.memory_limit != 0 || update.memory_swap != 0;
    let memory_limit = if memory { now.memory_limit } else { 0 };
    let memory_swap = if memory { now.memory_swap } else { 0 };
    limits(&Resources { memory_limit, memory_swap, ..update.clone() }, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_sets_what_it_names() {
        let mib = 1i64 << 20;
        let old = Resources { cpu_shares: 512, memory_limit: 64 * mib, cpuset_cpus: "0".into(), ..Resources::default() };
        let check = |change: Resources, want: plan::Resources| {
            let now = old.updated(&change);
            assert_eq!(update(&now, &change), want, "{change:?}");
        };
        check(Resources::default(), plan::Resources::default());
        check(Resources { cpu_quota: -1, ..Resources::default() }, plan::Resources { cpu_quota: Some(-1), ..plan::Resources::default() });
        check(
            Resources { memory_limit: 128 * mib, ..Resources::default() },
            plan::Resources { memory_limit: Some(128 * mib), memory_swap: Some(128 * mib), ..plan::Resources::default() },
        );
        check(
            Resources { memory_swap: 96 * mib, ..Resources::default() },
            plan::Resources { memory_limit: Some(64 * mib), memory_swap: Some(96 * mib), ..plan::Resources::default() },
        );
    }
}
