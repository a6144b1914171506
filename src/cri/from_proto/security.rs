//! The security contexts of a container and of a sandbox.

use super::sandbox::namespaces;
use super::{bad, id, missing};
use crate::api;
use crate::errchain::Remote;
use crate::model::container::{GroupsPolicy, Security, SecurityProfile};
use crate::model::sandbox::{NamespaceMode, SandboxSecurity};
use crate::model::selinux;

/// Bytes of a profile's name or path.
const MAX_PROFILE: usize = 4096;

pub(super) fn security(from: Option<api::LinuxContainerSecurityContext>) -> Result<Security, Remote> {
    let from = from.unwrap_or_default();
    let prefix = "config.linux.security_context";
    let field = |name: &str| format!("{prefix}.{name}");
    if from.run_as_user.is_some() && !from.run_as_username.is_empty() {
        return Err(bad(&field("run_as_username"), &from.run_as_username, "is set together with run_as_user"));
    }
    if from.run_as_username.contains(|c: char| c.is_control() || c == ':') || from.run_as_username.len() > 256 {
        return Err(bad(&field("run_as_username"), &from.run_as_username, "is no user's name"));
    }
    let namespaces = namespaces(&format!("{prefix}.namespace_options"), from.namespace_options)?;
    if namespaces.pid == NamespaceMode::Target && namespaces.target_id.is_empty() {
        return Err(missing(&format!("{prefix}.namespace_options.target_id")));
    }
    let (run_as_user, run_as_group) = user(prefix, from.run_as_user, from.run_as_group, &from.run_as_username)?;
    #[allow(deprecated)]
    let (seccomp_path, apparmor_profile) = (&from.seccomp_profile_path, &from.apparmor_profile);
    let capabilities = from.capabilities.unwrap_or_default();
    Ok(Security {
        seccomp: profile(&field("seccomp"), from.seccomp, &field("seccomp_profile_path"), seccomp_path)?,
        apparmor: profile(&field("apparmor"), from.apparmor, &field("apparmor_profile"), apparmor_profile)?,
        selinux: selinux(&field("selinux_options"), from.selinux_options)?,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        add_ambient_capabilities: capabilities.add_ambient_capabilities,
        privileged: from.privileged,
        namespaces,
        run_as_user,
        run_as_username: from.run_as_username,
        run_as_group,
        readonly_rootfs: from.readonly_rootfs,
        supplemental_groups: groups(prefix, from.supplemental_groups)?,
        groups_policy: policy(prefix, from.supplemental_groups_policy)?,
        no_new_privs: from.no_new_privs,
        masked_paths: from.masked_paths,
        readonly_paths: from.readonly_paths,
    })
}

/// A sandbox's, but for its namespaces and whether it is privileged.
pub(super) fn sandbox_security(from: &api::LinuxSandboxSecurityContext) -> Result<SandboxSecurity, Remote> {
    let prefix = "config.linux.security_context";
    let field = |name: &str| format!("{prefix}.{name}");
    let (run_as_user, run_as_group) = user(prefix, from.run_as_user, from.run_as_group, "")?;
    // Checked only: with no image there are no groups to merge.
    policy(prefix, from.supplemental_groups_policy)?;
    #[allow(deprecated)]
    let seccomp_path = &from.seccomp_profile_path;
    Ok(SandboxSecurity {
        run_as_user,
        run_as_group,
        supplemental_groups: groups(prefix, from.supplemental_groups.clone())?,
        seccomp: profile(&field("seccomp"), from.seccomp.clone(), &field("seccomp_profile_path"), seccomp_path)?,
        apparmor: profile(&field("apparmor"), from.apparmor.clone(), "", "")?,
        selinux: selinux(&field("selinux_options"), from.selinux_options.clone())?,
    })
}

/// User and group by number. A group alone is refused: nobody could say whose it is.
fn user(prefix: &str, user: Option<api::Int64Value>, group: Option<api::Int64Value>, name: &str) -> Result<(Option<u32>, Option<u32>), Remote> {
    let user = user.map(|user| id(&format!("{prefix}.run_as_user"), user.value)).transpose()?;
    let group = group.map(|group| id(&format!("{prefix}.run_as_group"), group.value)).transpose()?;
    match group {
        Some(gid) if user.is_none() && name.is_empty() => {
            Err(bad(&format!("{prefix}.run_as_group"), &gid.to_string(), "is set without run_as_user or run_as_username"))
        }
        _ => Ok((user, group)),
    }
}

fn groups(prefix: &str, groups: Vec<i64>) -> Result<Vec<u32>, Remote> {
    groups.into_iter().map(|group| id(&format!("{prefix}.supplemental_groups"), group)).collect()
}

fn policy(prefix: &str, policy: i32) -> Result<GroupsPolicy, Remote> {
    match api::SupplementalGroupsPolicy::try_from(policy) {
        Ok(api::SupplementalGroupsPolicy::Merge) => Ok(GroupsPolicy::Merge),
        Ok(api::SupplementalGroupsPolicy::Strict) => Ok(GroupsPolicy::Strict),
        Err(_) => Err(bad(&format!("{prefix}.supplemental_groups_policy"), &policy.to_string(), "is no policy")),
    }
}

fn selinux(field: &str, from: Option<api::SeLinuxOption>) -> Result<selinux::Options, Remote> {
    let from = from.unwrap_or_default();
    let options = selinux::Options { user: from.user, role: from.role, kind: from.r#type, level: from.level };
    options.check().map_err(|error| bad(&format!("{field}.{}", error.part), &error.value, error.reason))?;
    Ok(options)
}

/// A seccomp or AppArmor profile. kubelet fills the old field as well as the new one; the new one counts.
fn profile(field: &str, from: Option<api::SecurityProfile>, old_field: &str, old: &str) -> Result<SecurityProfile, Remote> {
    use api::security_profile::ProfileType;
    let Some(from) = from else { return old_profile(old_field, old) };
    let reference = format!("{field}.localhost_ref");
    match ProfileType::try_from(from.profile_type) {
        Ok(ProfileType::RuntimeDefault | ProfileType::Unconfined) if !from.localhost_ref.is_empty() => {
            Err(bad(&reference, &from.localhost_ref, "is for profile type Localhost only"))
        }
        Ok(ProfileType::RuntimeDefault) => Ok(SecurityProfile::RuntimeDefault),
        Ok(ProfileType::Unconfined) => Ok(SecurityProfile::Unconfined),
        Ok(ProfileType::Localhost) => localhost(&reference, &from.localhost_ref),
        Err(_) => Err(bad(&format!("{field}.profile_type"), &from.profile_type.to_string(), "is no profile type")),
    }
}

/// The form of the deprecated fields, one string. `docker/default` is what dockershim called the default.
fn old_profile(field: &str, value: &str) -> Result<SecurityProfile, Remote> {
    match value {
        "" => Ok(SecurityProfile::Unset),
        "runtime/default" | "docker/default" => Ok(SecurityProfile::RuntimeDefault),
        "unconfined" => Ok(SecurityProfile::Unconfined),
        _ if value.starts_with(LOCALHOST) => localhost(field, value),
        _ => Err(bad(field, value, "is none of runtime/default, docker/default, unconfined and localhost/PROFILE")),
    }
}

const LOCALHOST: &str = "localhost/";

/// A profile's path or name, without the prefix that it may have in either form.
fn localhost(field: &str, value: &str) -> Result<SecurityProfile, Remote> {
    let name = value.strip_prefix(LOCALHOST).unwrap_or(value);
    if name.is_empty() {
        return Err(missing(field));
    }
    if name.len() > MAX_PROFILE || name.contains(char::is_control) {
        return Err(bad(field, value, "has control characters or more than 4096 bytes"));
    }
    Ok(SecurityProfile::Localhost(name.into()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::refused;
    use super::*;

    #[test]
    fn profiles_come_from_the_new_field_else_the_old_one() {
        let new = |kind: i32, reference: &str| Some(api::SecurityProfile { profile_type: kind, localhost_ref: reference.into() });
        let check = |from, old: &str, want: SecurityProfile| assert_eq!(profile("new", from, "old", old).unwrap(), want, "{old}");
        let localhost = |name: &str| SecurityProfile::Localhost(name.into());
        check(None, "", SecurityProfile::Unset);
        check(None, "runtime/default", SecurityProfile::RuntimeDefault);
        check(None, "docker/default", SecurityProfile::RuntimeDefault);
        check(None, "unconfined", SecurityProfile::Unconfined);
        check(None, "localhost/a/b.json", localhost("a/b.json"));
        check(None, "localhost//abs.json", localhost("/abs.json"));
        check(new(0, ""), "localhost/x", SecurityProfile::RuntimeDefault);
        check(new(1, ""), "runtime/default", SecurityProfile::Unconfined);
        check(new(2, "/p.json"), "", localhost("/p.json"));
        check(new(2, "localhost/name"), "nonsense", localhost("name"));
        let bad = |from, old: &str, words: &[&str]| refused(profile("new", from, "old", old), words);
        bad(None, "localhost/", &["old"]);
        bad(None, "profile", &["old", "profile"]);
        bad(new(2, ""), "", &["new.localhost_ref"]);
        bad(new(2, "a\nb"), "", &["new.localhost_ref", "control"]);
        bad(new(0, "x"), "", &["new.localhost_ref", "x", "Localhost"]);
        bad(new(7, ""), "", &["new.profile_type", "7"]);
    }

    #[test]
    fn a_sandboxs_security_errors_name_field_and_value() {
        let check = |change: fn(&mut api::LinuxSandboxSecurityContext), words: &[&str]| {
            let mut from = api::LinuxSandboxSecurityContext::default();
            change(&mut from);
            refused(sandbox_security(&from), words);
        };
        assert_eq!(sandbox_security(&api::LinuxSandboxSecurityContext::default()).unwrap(), SandboxSecurity::default());
        check(|s| s.run_as_user = Some(api::Int64Value { value: -1 }), &["security_context.run_as_user", "-1"]);
        check(|s| s.run_as_group = Some(api::Int64Value { value: 7 }), &["run_as_group", "7", "without"]);
        check(|s| s.supplemental_groups = vec![1 << 32], &["supplemental_groups", "4294967296"]);
        check(|s| s.supplemental_groups_policy = 9, &["supplemental_groups_policy", "9"]);
        check(|s| s.selinux_options = Some(api::SeLinuxOption { level: "s0,c1".into(), ..Default::default() }), &["selinux_options.level", "s0,c1"]);
    }
}
