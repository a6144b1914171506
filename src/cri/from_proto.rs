//! Requests, parsed: from generated types to the model's, or an error that names the field and the value.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use crate::api;
use crate::errchain::{Kind, Remote};
use crate::model::container::{self, ContainerSpec, GroupsPolicy, Propagation, Resources, Security, SecurityProfile};
use crate::model::sandbox::{Dns, NamespaceMode, NamespaceModes, PodName, PortMapping, Protocol, SandboxSpec};
use crate::model::signal;

/// Bytes of all labels or annotations of one object.
const MAX_LABELS: usize = 1 << 20;

/// A field that can't be taken.
fn bad(field: &str, value: &str, reason: &str) -> Remote {
    let shown: String = value.chars().take(200).collect();
    Remote::text(Kind::InvalidArgument, format!("field {field}: {shown:?} {reason}"))
}

fn missing(field: &str) -> Remote {
    Remote::text(Kind::InvalidArgument, format!("field {field} is missing"))
}

/// What a later release honours. Asking for it is refused rather than ignored.
fn later(field: &str, value: &str) -> Remote {
    Remote::text(Kind::Unimplemented, format!("field {field}: {value:?} is not supported yet"))
}

/// A name that becomes part of keys and, with kubelet, of paths.
fn name(field: &str, value: &str) -> Result<String, Remote> {
    if value.is_empty() {
        return Err(missing(field));
    }
    if value.len() > 253 || value.contains(['/', '\0', '\n']) || value == ".." || value == "." {
        return Err(bad(field, value, "is not a name of at most 253 characters without '/'"));
    }
    Ok(value.into())
}

fn absolute(field: &str, value: &str) -> Result<PathBuf, Remote> {
    if value.is_empty() {
        return Err(missing(field));
    }
    if !value.starts_with('/') || value.contains('\0') || value.len() > 4096 {
        return Err(bad(field, value, "is not an absolute path"));
    }
    Ok(value.into())
}

fn labels(field: &str, map: std::collections::HashMap<String, String>) -> Result<BTreeMap<String, String>, Remote> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAX_LABELS {
        return Err(bad(field, &format!("{size} bytes"), "are more than 1 MiB"));
    }
    Ok(map.into_iter().collect())
}

/// A sandbox's configuration.
pub fn sandbox(config: Option<api::PodSandboxConfig>, runtime_handler: String) -> Result<SandboxSpec, Remote> {
    let config = config.ok_or_else(|| missing("config"))?;
    let metadata = config.metadata.ok_or_else(|| missing("config.metadata"))?;
    let name = PodName {
        name: name("config.metadata.name", &metadata.name)?,
        namespace: name("config.metadata.namespace", &metadata.namespace)?,
        uid: name("config.metadata.uid", &metadata.uid)?,
        attempt: metadata.attempt,
    };
    let hostname = config.hostname;
    if hostname.len() > 64 || hostname.contains(|c: char| c.is_control() || c.is_whitespace() || c == '/') {
        return Err(bad("config.hostname", &hostname, "is not a host name of at most 64 characters"));
    }
    let log_directory = match config.log_directory.as_str() {
        "" => PathBuf::new(),
        dir => clean("config.log_directory", absolute("config.log_directory", dir)?)?,
    };
    let dns = config.dns_config.unwrap_or_default();
    for (field, list) in [("servers", &dns.servers), ("searches", &dns.searches), ("options", &dns.options)] {
        if let Some(value) = list.iter().find(|value| value.is_empty() || value.contains(|c: char| c.is_control() || c == ' ')) {
            return Err(bad(&format!("config.dns_config.{field}"), value, "has spaces or control characters, or is empty"));
        }
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let namespaces = namespaces("config.linux.security_context.namespace_options", security.namespace_options)?;
    for (field, mode) in [("network", namespaces.network), ("ipc", namespaces.ipc)] {
        if !matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            return Err(bad(&format!("config.linux.security_context.namespace_options.{field}"), &format!("{mode:?}"), "is neither POD nor NODE"));
        }
    }
    if namespaces.pid == NamespaceMode::Target {
        return Err(bad("config.linux.security_context.namespace_options.pid", "TARGET", "is for containers only"));
    }
    if security.selinux_options.is_some_and(|options| options != api::SeLinuxOption::default()) {
        return Err(later("config.linux.security_context.selinux_options", "SELinux options"));
    }
    if !linux.cgroup_parent.is_empty() && linux.cgroup_parent.ends_with(".slice") && !linux.cgroup_parent.contains('/') {
        return Err(bad("config.linux.cgroup_parent", &linux.cgroup_parent, "is a systemd slice, but the cgroup driver is cgroupfs"));
    }
    if linux.cgroup_parent.split('/').any(|part| part == "..") || linux.cgroup_parent.contains(['\0', '\n']) {
        return Err(bad("config.linux.cgroup_parent", &linux.cgroup_parent, "is not a control group path"));
    }
    let cgroup_parent = match linux.cgroup_parent.as_str() {
        "" => String::new(),
        path if path.starts_with('/') => path.into(),
        path => format!("/{path}"),
    };
    Ok(SandboxSpec {
        name,
        hostname,
        log_directory,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        ports: config.port_mappings.into_iter().map(port).collect::<Result<_, _>>()?,
        labels: labels("config.labels", config.labels)?,
        annotations: labels("config.annotations", config.annotations)?,
        cgroup_parent,
        namespaces,
        sysctls: linux.sysctls.into_iter().collect(),
        privileged: security.privileged,
        runtime_handler,
    })
}

fn port(mapping: api::PortMapping) -> Result<PortMapping, Remote> {
    let number =
        |field: &str, value: i32| u16::try_from(value).map_err(|_| bad(&format!("config.port_mappings.{field}"), &value.to_string(), "is no port"));
    let protocol = match mapping.protocol() {
        api::Protocol::Tcp => Protocol::Tcp,
        api::Protocol::Udp => Protocol::Udp,
        api::Protocol::Sctp => Protocol::Sctp,
    };
    let host_ip = match mapping.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| bad("config.port_mappings.host_ip", text, "is no IP address"))?),
    };
    Ok(PortMapping {
        protocol,
        container_port: number("container_port", mapping.container_port)?,
        host_port: number("host_port", mapping.host_port)?,
        host_ip,
    })
}

fn namespaces(field: &str, options: Option<api::NamespaceOption>) -> Result<NamespaceModes, Remote> {
    let options = options.unwrap_or_default();
    let mode = |part: &str, value: i32| match api::NamespaceMode::try_from(value) {
        Ok(api::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(api::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(api::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(api::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(bad(&format!("{field}.{part}"), &value.to_string(), "is no namespace mode")),
    };
    if let Some(user) = &options.userns_options {
        match user.mode() {
            api::NamespaceMode::Node => {}
            api::NamespaceMode::Pod => return Err(later(&format!("{field}.userns_options.mode"), "POD")),
            other => return Err(bad(&format!("{field}.userns_options.mode"), other.as_str_name(), "is neither POD nor NODE")),
        }
    }
    Ok(NamespaceModes {
        network: mode("network", options.network)?,
        pid: mode("pid", options.pid)?,
        ipc: mode("ipc", options.ipc)?,
        target_id: options.target_id,
    })
}

/// A path without `..`, `.` and doubled slashes; `..` is refused.
fn clean(field: &str, path: PathBuf) -> Result<PathBuf, Remote> {
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(bad(field, &path.to_string_lossy(), "must not contain '..'"));
    }
    Ok(path.components().collect())
}

/// A container's configuration.
pub fn container(config: Option<api::ContainerConfig>) -> Result<ContainerSpec, Remote> {
    let config = config.ok_or_else(|| missing("config"))?;
    let metadata = config.metadata.ok_or_else(|| missing("config.metadata"))?;
    let image = config.image.ok_or_else(|| missing("config.image"))?;
    if image.image.is_empty() {
        return Err(missing("config.image.image"));
    }
    let log_path = clean("config.log_path", PathBuf::from(&config.log_path))?;
    if log_path.is_absolute() {
        return Err(bad("config.log_path", &config.log_path, "is not relative to the pod's log directory"));
    }
    for (field, value) in config.command.iter().map(|v| ("config.command", v)).chain(config.args.iter().map(|v| ("config.args", v))) {
        if value.contains('\0') {
            return Err(bad(field, value, "has a NUL byte"));
        }
    }
    let envs = config.envs.into_iter().map(env).collect::<Result<_, _>>()?;
    if let Some(device) = config.cdi_devices.first() {
        return Err(later("config.CDI_devices", &device.name));
    }
    let linux = config.linux.unwrap_or_default();
    let stop_signal = match api::Signal::try_from(config.stop_signal) {
        Ok(api::Signal::RuntimeDefault) => None,
        Ok(named) => Some(stop_signal(named)?),
        Err(_) => return Err(bad("config.stop_signal", &config.stop_signal.to_string(), "is no signal")),
    };
    Ok(ContainerSpec {
        name: name("config.metadata.name", &metadata.name)?,
        attempt: metadata.attempt,
        image: image.image,
        user_specified_image: image.user_specified_image,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        devices: config
            .devices
            .into_iter()
            .map(|device| {
                Ok(container::Device {
                    container_path: absolute("config.devices.container_path", &device.container_path)?,
                    host_path: absolute("config.devices.host_path", &device.host_path)?,
                    permissions: device.permissions,
                })
            })
            .collect::<Result<_, Remote>>()?,
        labels: labels("config.labels", config.labels)?,
        annotations: labels("config.annotations", config.annotations)?,
        log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources(linux.resources)?,
        security: security(linux.security_context)?,
        stop_signal,
    })
}

fn stop_signal(named: api::Signal) -> Result<u32, Remote> {
    // The names are the C library's, but for the offsets: SIGRTMINPLUS1, SIGRTMAXMINUS1.
    let name = named.as_str_name().replace("PLUS", "+").replace("MINUS", "-");
    signal::parse(&name).ok_or_else(|| bad("config.stop_signal", named.as_str_name(), "is no signal"))
}

fn env(pair: api::KeyValue) -> Result<(String, Vec<u8>), Remote> {
    if pair.key.is_empty() || pair.key.contains(['=', '\0']) {
        return Err(bad("config.envs.key", &pair.key, "is empty or has '=' or NUL"));
    }
    if pair.value.contains(&0) {
        return Err(bad("config.envs.value", &String::from_utf8_lossy(&pair.value), "has a NUL byte"));
    }
    Ok((pair.key, pair.value))
}

fn mount(mount: api::Mount) -> Result<container::Mount, Remote> {
    if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
        return Err(later("config.mounts.image", &mount.container_path));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(later("config.mounts.uidMappings", &mount.container_path));
    }
    let propagation = match api::MountPropagation::try_from(mount.propagation) {
        Ok(api::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(api::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(api::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => return Err(bad("config.mounts.propagation", &mount.propagation.to_string(), "is no propagation")),
    };
    if mount.recursive_read_only && (!mount.readonly || propagation != Propagation::Private) {
        return Err(bad("config.mounts.recursive_read_only", "true", "needs readonly and private propagation"));
    }
    let container_path = absolute("config.mounts.container_path", &mount.container_path)?;
    if clean("config.mounts.container_path", container_path.clone())? == Path::new("/") {
        return Err(bad("config.mounts.container_path", &mount.container_path, "is the root"));
    }
    Ok(container::Mount {
        container_path: clean("config.mounts.container_path", container_path)?,
        host_path: absolute("config.mounts.host_path", &mount.host_path)?,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        selinux_relabel: mount.selinux_relabel,
    })
}

fn resources(from: Option<api::LinuxContainerResources>) -> Result<Resources, Remote> {
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

fn id(field: &str, value: i64) -> Result<u32, Remote> {
    // u32::MAX is -1 to the kernel: "leave as it is", which would be root.
    u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or_else(|| bad(field, &value.to_string(), "is not 0 to 4294967294"))
}

fn security(from: Option<api::LinuxContainerSecurityContext>) -> Result<Security, Remote> {
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
    let capabilities = from.capabilities.unwrap_or_default();
    Ok(Security {
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        add_ambient_capabilities: capabilities.add_ambient_capabilities,
        privileged: from.privileged,
        namespaces: namespaces(&format!("{prefix}.namespace_options"), from.namespace_options)?,
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

/// Credentials of a pull.
pub fn credentials(auth: Option<api::AuthConfig>) -> Option<crate::image::Credentials> {
    let auth = auth?;
    (auth != api::AuthConfig::default()).then_some(crate::image::Credentials {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    })
}

/// The reference of an image spec.
pub fn image(spec: Option<api::ImageSpec>) -> Result<String, Remote> {
    let spec = spec.ok_or_else(|| missing("image"))?;
    if spec.image.is_empty() { Err(missing("image.image")) } else { Ok(spec.image) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errchain::{Chain, Kinded};

    fn pod() -> api::PodSandboxConfig {
        let metadata = api::PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 1 };
        api::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
    }

    fn ctr() -> api::ContainerConfig {
        api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(api::ImageSpec { image: "busybox".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn refused<T: std::fmt::Debug>(result: Result<T, Remote>, words: &[&str]) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        for word in words {
            assert!(Chain(&error).to_string().contains(word), "{error} lacks {word}");
        }
    }

    #[test]
    fn sandbox_errors_name_field_and_value() {
        assert_eq!(sandbox(Some(pod()), String::new()).unwrap().name.key(), "n/p/u/1");
        let check = |change: fn(&mut api::PodSandboxConfig), words: &[&str]| {
            let mut config = pod();
            change(&mut config);
            refused(sandbox(Some(config), String::new()), words);
        };
        refused(sandbox(None, String::new()), &["config"]);
        check(|c| c.metadata = None, &["config.metadata"]);
        check(|c| c.metadata.as_mut().unwrap().name.clear(), &["config.metadata.name"]);
        check(|c| c.metadata.as_mut().unwrap().uid = "../x".into(), &["config.metadata.uid", "../x"]);
        check(|c| c.hostname = "a b".into(), &["config.hostname", "a b"]);
        check(|c| c.log_directory = "var/log".into(), &["config.log_directory", "var/log"]);
        check(|c| c.log_directory = "/var/../etc".into(), &["config.log_directory", ".."]);
        check(|c| c.dns_config = Some(api::DnsConfig { servers: vec!["1.1.1.1\nx".into()], ..Default::default() }), &["dns_config.servers"]);
        check(|c| c.port_mappings = vec![api::PortMapping { container_port: 70000, ..Default::default() }], &["container_port", "70000"]);
        check(|c| c.port_mappings = vec![api::PortMapping { host_ip: "x".into(), ..Default::default() }], &["host_ip", "\"x\""]);
        check(
            |c| c.linux = Some(api::LinuxPodSandboxConfig { cgroup_parent: "/a/../b".into(), ..Default::default() }),
            &["cgroup_parent", "/a/../b"],
        );
    }

    #[test]
    fn container_errors_name_field_and_value() {
        assert_eq!(container(Some(ctr())).unwrap().name, "c");
        let check = |change: fn(&mut api::ContainerConfig), words: &[&str]| {
            let mut config = ctr();
            change(&mut config);
            refused(container(Some(config)), words);
        };
        let context = |c: &mut api::ContainerConfig, change: fn(&mut api::LinuxContainerSecurityContext)| {
            let mut security = api::LinuxContainerSecurityContext::default();
            change(&mut security);
            c.linux = Some(api::LinuxContainerConfig { security_context: Some(security), ..Default::default() });
        };
        check(|c| c.image = None, &["config.image"]);
        check(|c| c.log_path = "../x".into(), &["config.log_path", "../x"]);
        check(|c| c.log_path = "/x".into(), &["config.log_path", "/x"]);
        check(|c| c.envs = vec![api::KeyValue { key: "a=b".into(), value: Vec::new() }], &["config.envs.key", "a=b"]);
        check(
            |c| c.mounts = vec![api::Mount { container_path: "/".into(), host_path: "/x".into(), ..Default::default() }],
            &["container_path", "root"],
        );
        check(|c| c.mounts = vec![api::Mount { container_path: "/a".into(), host_path: "x".into(), ..Default::default() }], &["host_path", "\"x\""]);
        check(|c| c.stop_signal = 99, &["config.stop_signal", "99"]);
        let mut config = ctr();
        context(&mut config, |s| s.run_as_user = Some(api::Int64Value { value: -1 }));
        refused(container(Some(config)), &["run_as_user", "-1"]);
        let mut config = ctr();
        context(&mut config, |s| s.run_as_user = Some(api::Int64Value { value: u32::MAX.into() }));
        refused(container(Some(config)), &["run_as_user", "4294967295"]);
        let mut config = ctr();
        context(&mut config, |s| s.run_as_group = Some(api::Int64Value { value: 5 }));
        refused(container(Some(config)), &["run_as_group", "without"]);
    }

    #[test]
    fn every_stop_signal_of_the_api_is_known() {
        for number in 1..=65 {
            let named = api::Signal::try_from(number).unwrap();
            assert!(stop_signal(named).is_ok(), "{}", named.as_str_name());
        }
        assert_eq!(stop_signal(api::Signal::Sigrtmaxminus1).unwrap(), 63);
        assert_eq!(stop_signal(api::Signal::Sigterm).unwrap(), 15);
    }
}
