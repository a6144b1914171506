//! Which seccomp filter a container gets, compiled once per profile.

use crate::model::container::SecurityProfile;
use crate::seccomp::{Arch, Cache};

use super::ServiceError;

/// The compiled filters of this node.
pub struct Filters {
    cache: Cache,
    kernel: (u32, u32),
}

impl Filters {
    /// For this machine and kernel.
    pub fn new() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
        Self { cache: Cache::new(), kernel: (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) }
    }

    /// The program for a profile and a set of capabilities; empty: none.
    pub fn filter(&self, profile: &SecurityProfile, capabilities: u64) -> Result<Vec<u8>, ServiceError> {
        match profile {
            SecurityProfile::Unset | SecurityProfile::Unconfined => Ok(Vec::new()),
            SecurityProfile::RuntimeDefault => {
                Ok(self.cache.runtime_default(capabilities, Arch::NATIVE, self.kernel).map_err(ServiceError::Seccomp)?.to_vec())
            }
            SecurityProfile::Localhost(name) => Err(unsupported(name)),
        }
    }
}

fn unsupported(value: &str) -> ServiceError {
    ServiceError::Field {
        field: "linux.security_context.seccomp",
        value: value.into(),
        reason: "is not supported yet",
        kind: crate::errchain::Kind::Unimplemented,
    }
}
