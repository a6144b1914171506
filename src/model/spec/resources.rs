//! Limits, as the plan has them.

use crate::model::container::ContainerSpec;
use crate::plan;

pub(super) fn resources(spec: &ContainerSpec, pids_limit: Option<i64>) -> plan::Resources {
    let r = &spec.resources;
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
