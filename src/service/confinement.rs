//! What confines the processes of a container and of a pod: seccomp filter, AppArmor profile, SELinux labels. Decided before
//! anything is made, so that a profile that is missing or wrong leaves nothing behind.

use super::sandbox::blocking;
use super::{Service, ServiceError};
use crate::model::container::{ContainerSpec, SecurityProfile};
use crate::model::sandbox::{NamespaceMode, SandboxSpec};
use crate::model::selinux::Labels;
use crate::model::spec::{self, Filter};
use crate::plan::{PausePlan, ResolvedUser, capability};
use crate::store::record::SandboxRecord;
use crate::wire::Bytes;

/// What a container's processes are confined to.
pub(super) struct Confinement {
    /// Its filter.
    pub seccomp: Filter,
    /// Its profile.
    pub apparmor: String,
    /// Its labels.
    pub labels: Labels,
}

impl Service {
    /// The capabilities that a pod's containers can have: the daemon's own, but all there are in a user namespace of the pod's own.
    pub(super) fn available_to(&self, pod: &SandboxRecord) -> u64 {
        if pod.spec.namespaces.user.mapping().is_some() { capability::ALL } else { self.available_capabilities }
    }

    /// A container's.
    pub(super) async fn confinement(&self, pod: &SandboxRecord, spec: &ContainerSpec) -> Result<Confinement, ServiceError> {
        let security = &spec.security;
        let capabilities = spec::capabilities(spec, self.default_capabilities, self.available_to(pod)).map_err(ServiceError::Spec)?;
        let options = if security.selinux.is_empty() { &pod.spec.security.selinux } else { &security.selinux };
        Ok(Confinement {
            seccomp: self.filter(spec::seccomp_profile(spec).clone(), capabilities.bounding).await?,
            apparmor: self.apparmor.profile(&security.apparmor, security.privileged).await.map_err(ServiceError::AppArmor)?,
            labels: self.selinux.labels(options, &pod.selinux_level, security.privileged).map_err(ServiceError::SeLinux)?,
        })
    }

    /// A pause process's. It keeps the monitor's SELinux context: only execve changes one, and it executes nothing. What is asked for is checked for every pod, though only one that shares its PID namespace has such
    /// a process: the error comes with the field, not with the next release.
    pub(super) async fn pause_confinement(&self, spec: &SandboxSpec) -> Result<PausePlan, ServiceError> {
        let security = &spec.security;
        let profile = if spec.privileged { SecurityProfile::Unconfined } else { security.seccomp.clone() };
        let filter = self.filter(profile, 0).await?;
        let apparmor = self.apparmor.profile(&security.apparmor, spec.privileged).await.map_err(ServiceError::AppArmor)?;
        if spec.namespaces.pid != NamespaceMode::Pod {
            return Ok(PausePlan::default());
        }
        let user = security.run_as_user.map(|uid| {
            let gid = security.run_as_group.unwrap_or(0);
            let mut groups = vec![gid];
            groups.extend(security.supplemental_groups.iter().filter(|group| **group != gid));
            ResolvedUser { uid, gid, groups, home: "/".into() }
        });
        Ok(PausePlan { user, seccomp: Bytes(filter.program), seccomp_log: filter.log, seccomp_mitigate: filter.mitigate, apparmor })
    }

    async fn filter(&self, profile: SecurityProfile, capabilities: u64) -> Result<Filter, ServiceError> {
        let filters = self.filters.clone();
        match profile {
            SecurityProfile::Localhost(_) => blocking(move || filters.filter(&profile, capabilities)).await?,
            // No file is read for any other.
            _ => filters.filter(&profile, capabilities),
        }
        .map_err(ServiceError::Seccomp)
    }
}
