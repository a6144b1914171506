//! Removes what is left of a container.

use super::{Hierarchy, OciError};

/// Kills what is left in a container's control group and removes it, and those of the groups above it that creation had
/// made and that are empty. Idempotent. Runs in a creator.
pub fn delete(_cgroup_path: &str, _parents_made: &[String], _hierarchy: &Hierarchy) -> Result<(), OciError> {
    Err(OciError::Unbuilt("delete::delete"))
}
