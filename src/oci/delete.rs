//! Removes what is left of a container: its control group. Everything else of it ended with its last process.

use std::time::Duration;

use super::OciError;
use crate::cgroup::{Cgroup, Hierarchy, remove_parents};

/// How long processes may take to die once they are killed, and the kernel to let go of their group.
pub(super) const WITHIN: Duration = Duration::from_secs(10);

/// Kills what is left in a container's control group and removes it, and those of the groups above it that creation had
/// made and that are empty. Idempotent. Runs in a creator.
///
/// # Errors
/// DeadlineExceeded: a process does not die, most often because the kernel waits for a disk. It may be asked again.
pub fn delete(cgroup_path: &str, parents_made: &[String], hierarchy: &Hierarchy) -> Result<(), OciError> {
    let failed = |source| OciError::Cgroup { path: cgroup_path.into(), source };
    let cgroup = Cgroup::new(hierarchy, cgroup_path).map_err(failed)?;
    cgroup.kill(WITHIN).map_err(failed)?;
    cgroup.remove(WITHIN).map_err(failed)?;
    remove_parents(hierarchy, parents_made).map_err(failed)
}
