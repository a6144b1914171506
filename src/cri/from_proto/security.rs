//! A container's security context.

use super::sandbox::namespaces;
use super::{bad, id, later, missing};
use crate::api;
use crate::errchain::Remote;
use crate::model::container::{GroupsPolicy, Security, SecurityProfile};
use crate::model::sandbox::NamespaceMode;

pub(super) fn security(from: Option<api::LinuxContainerSecurityContext>) -> Result<Security, Remote> {
    let from = from.unwrap_or_default();
    let prefix = "config.linux.security_context";
    if from.selinux_options.is_some_and(|options| options != api::SeLinuxOption::default()) {
        return Err(later(&format!("{prefix}.selinux_options"), "SELinux options"));
    }
    let run_as_user = from.run_as_user.map(|user| id(&format!("{prefix}.run_as_user"), user.value)).transpose()?;
    let run_as_group = from.run_as_group.map(|group| id(&format!("{prefix}.run_as_group"), group.value)).transpose()?;
    if run_as_user.is_some() && !from.run_as_username.is_empty() {
        return Err(bad(&format!("{prefix}.run_as_username"), &from.run_as_username, "is set together with run_as_user"));
    }
    if run_as_group.is_some() && run_as_user.is_none() && from.run_as_username.is_empty() {
        return Err(bad(
            &format!("{prefix}.run_as_group"),
            &run_as_group.unwrap_or_default().to_string(),
            "is set without run_as_user or run_as_username",
        ));
    }
    let groups_policy = match api::SupplementalGroupsPolicy::try_from(from.supplemental_groups_policy) {
        Ok(api::SupplementalGroupsPolicy::Merge) => GroupsPolicy::Merge,
        Ok(api::SupplementalGroupsPolicy::Strict) => GroupsPolicy::Strict,
        Err(_) => return Err(bad(&format!("{prefix}.supplemental_groups_policy"), &from.supplemental_groups_policy.to_string(), "is no policy")),
    };
    let seccomp = profile(&format!("{prefix}.seccomp"), from.seccomp)?;
    if let SecurityProfile::Localhost(name) = &seccomp
        && !from.privileged
    {
        return Err(later(&format!("{prefix}.seccomp.localhost_ref"), name));
    }
    let apparmor = profile(&format!("{prefix}.apparmor"), from.apparmor)?;
    if let SecurityProfile::Localhost(name) = &apparmor
        && !from.privileged
    {
        return Err(later(&format!("{prefix}.apparmor.localhost_ref"), name));
    }
    let namespaces = namespaces(&format!("{prefix}.namespace_options"), from.namespace_options)?;
    if namespaces.pid == NamespaceMode::Target && namespaces.target_id.is_empty() {
        return Err(missing(&format!("{prefix}.namespace_options.target_id")));
    }
    let capabilities = from.capabilities.unwrap_or_default();
    Ok(Security {
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        add_ambient_capabilities: capabilities.add_ambient_capabilities,
        privileged: from.privileged,
        namespaces,
        run_as_user,
        run_as_username: from.run_as_username,
        run_as_group,
        readonly_rootfs: from.readonly_rootfs,
        supplemental_groups: from
            .supplemental_groups
            .into_iter()
            .map(|group| id(&format!("{prefix}.supplemental_groups"), group))
            .collect::<Result<_, _>>()?,
        groups_policy,
        no_new_privs: from.no_new_privs,
        masked_paths: from.masked_paths,
        readonly_paths: from.readonly_paths,
        seccomp,
        apparmor,
    })
}

fn profile(field: &str, from: Option<api::SecurityProfile>) -> Result<SecurityProfile, Remote> {
    let Some(from) = from else { return Ok(SecurityProfile::Unset) };
    match api::security_profile::ProfileType::try_from(from.profile_type) {
        Ok(api::security_profile::ProfileType::RuntimeDefault) => Ok(SecurityProfile::RuntimeDefault),
        Ok(api::security_profile::ProfileType::Unconfined) => Ok(SecurityProfile::Unconfined),
        Ok(api::security_profile::ProfileType::Localhost) if from.localhost_ref.is_empty() => Err(missing(&format!("{field}.localhost_ref"))),
        Ok(api::security_profile::ProfileType::Localhost) => Ok(SecurityProfile::Localhost(from.localhost_ref)),
        Err(_) => Err(bad(&format!("{field}.profile_type"), &from.profile_type.to_string(), "is no profile type")),
    }
}
