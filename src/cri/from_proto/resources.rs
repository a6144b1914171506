//! Limits.

use super::bad;
use crate::api;
use crate::errchain::Remote;
use crate::model::container::Resources;

pub(super) fn resources(from: Option<api::LinuxContainerResources>) -> Result<Resources, Remote> {
    let from = from.unwrap_or_default();
    if !(-1000..=1000).contains(&from.oom_score_adj) {
        return Err(bad("config.linux.resources.oom_score_adj", &from.oom_score_adj.to_string(), "is not -1000 to 1000"));
    }
    let negative = [("cpu_period", from.cpu_period), ("cpu_shares", from.cpu_shares)].into_iter().find(|(_, value)| *value < 0);
    if let Some((field, value)) = negative {
        return Err(bad(&format!("config.linux.resources.{field}"), &value.to_string(), "is negative"));
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
        hugepages: from.hugepage_limits.into_iter().map(|limit| (limit.page_size, limit.limit)).collect(),
        unified: from.unified.into_iter().collect(),
    })
}
