//! A sandbox's configuration.

use std::path::PathBuf;

use super::resources::pod_resources;
use super::security::sandbox_security;
use super::{absolute, bad, clean, labels, missing, name};
use crate::api;
use crate::errchain::Remote;
use crate::model::sandbox::{Dns, IdMapping, NamespaceMode, NamespaceModes, PodName, PortMapping, Protocol, SandboxSpec, UserNamespace};

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
    let namespaces = namespaces("config.linux.security_context.namespace_options", security.namespace_options.clone())?;
    for (field, mode) in [("network", namespaces.network), ("ipc", namespaces.ipc)] {
        if !matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            return Err(bad(&format!("config.linux.security_context.namespace_options.{field}"), &format!("{mode:?}"), "is neither POD nor NODE"));
        }
    }
    if namespaces.user.mapping().is_some() {
        // Nothing of the node's processes is for a root that is not the node's; its network may be (KEP-5607).
        for (field, mode) in [("pid", namespaces.pid), ("ipc", namespaces.ipc)] {
            if mode == NamespaceMode::Node {
                let field = format!("config.linux.security_context.namespace_options.{field}");
                return Err(bad(&field, "NODE", "is not possible together with a user namespace of the pod's own"));
            }
        }
    }
    if namespaces.pid == NamespaceMode::Target {
        return Err(bad("config.linux.security_context.namespace_options.pid", "TARGET", "is for containers only"));
    }
    if linux.cgroup_parent.split('/').any(|part| part == "..") || linux.cgroup_parent.contains(['\0', '\n']) {
        return Err(bad("config.linux.cgroup_parent", &linux.cgroup_parent, "is not a control group path"));
    }
    Ok(SandboxSpec {
        name,
        hostname,
        log_directory,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        ports: config.port_mappings.into_iter().map(port).collect::<Result<_, _>>()?,
        labels: labels("config.labels", config.labels)?,
        annotations: labels("config.annotations", config.annotations)?,
        cgroup_parent: linux.cgroup_parent,
        namespaces,
        sysctls: linux.sysctls.into_iter().collect(),
        privileged: security.privileged,
        security: sandbox_security(&security)?,
        runtime_handler,
        overhead: pod_resources("config.linux.overhead", linux.overhead)?,
        resources: pod_resources("config.linux.resources", linux.resources)?,
    })
}

fn port(mapping: api::PortMapping) -> Result<PortMapping, Remote> {
    let number =
        |field: &str, value: i32| u16::try_from(value).map_err(|_| bad(&format!("config.port_mappings.{field}"), &value.to_string(), "is no port"));
    let protocol = match api::Protocol::try_from(mapping.protocol) {
        Ok(api::Protocol::Tcp) => Protocol::Tcp,
        Ok(api::Protocol::Udp) => Protocol::Udp,
        Ok(api::Protocol::Sctp) => Protocol::Sctp,
        Err(_) => return Err(bad("config.port_mappings.protocol", &mapping.protocol.to_string(), "is no protocol")),
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

pub(super) fn namespaces(field: &str, options: Option<api::NamespaceOption>) -> Result<NamespaceModes, Remote> {
    let options = options.unwrap_or_default();
    let mode = |part: &str, value: i32| match api::NamespaceMode::try_from(value) {
        Ok(api::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(api::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(api::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(api::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(bad(&format!("{field}.{part}"), &value.to_string(), "is no namespace mode")),
    };
    Ok(NamespaceModes {
        user: options.userns_options.map_or(Ok(UserNamespace::Unset), |user| user_namespace(&format!("{field}.userns_options"), &user))?,
        network: mode("network", options.network)?,
        pid: mode("pid", options.pid)?,
        ipc: mode("ipc", options.ipc)?,
        target_id: options.target_id,
    })
}

fn user_namespace(field: &str, options: &api::UserNamespace) -> Result<UserNamespace, Remote> {
    let all = [("uids", &options.uids), ("gids", &options.gids)];
    match api::NamespaceMode::try_from(options.mode) {
        Ok(api::NamespaceMode::Node) => match all.iter().find(|(_, list)| !list.is_empty()) {
            Some((part, list)) => Err(bad(&format!("{field}.{part}"), &shown(list), "is a mapping for the node's user namespace, which has none")),
            None => Ok(UserNamespace::Node),
        },
        Ok(api::NamespaceMode::Pod) => {
            let (uids, gids) = (mapping(&format!("{field}.uids"), &options.uids)?, mapping(&format!("{field}.gids"), &options.gids)?);
            if uids.host_id(0).is_none() {
                return Err(bad(&format!("{field}.uids"), &shown(&options.uids), "has no id for the container's root, 0"));
            }
            if gids != uids {
                return Err(bad(
                    &format!("{field}.gids"),
                    &shown(&options.gids),
                    &format!("is another mapping than that of uids, {}", shown(&options.uids)),
                ));
            }
            Ok(UserNamespace::Pod(uids))
        }
        Ok(other) => Err(bad(&format!("{field}.mode"), other.as_str_name(), "is neither POD nor NODE")),
        Err(_) => Err(bad(&format!("{field}.mode"), &options.mode.to_string(), "is no namespace mode")),
    }
}

/// The one mapping of a list.
pub(super) fn mapping(field: &str, list: &[api::IdMapping]) -> Result<IdMapping, Remote> {
    let [map] = list else { return Err(bad(field, &shown(list), "is not exactly one mapping")) };
    if map.length == 0 {
        return Err(bad(field, &shown(list), "has length 0"));
    }
    // The last id of all is -1 to the kernel: nobody's.
    if [map.host_id, map.container_id].iter().any(|first| u64::from(*first) + u64::from(map.length) > u64::from(u32::MAX)) {
        return Err(bad(field, &shown(list), "goes beyond id 4294967294"));
    }
    Ok(IdMapping { container: map.container_id, host: map.host_id, length: map.length })
}

/// `container:host:length` of each.
fn shown(list: &[api::IdMapping]) -> String {
    list.iter().map(|map| format!("{}:{}:{}", map.container_id, map.host_id, map.length)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::tests::refused;
    use super::*;

    fn pod() -> api::PodSandboxConfig {
        let metadata = api::PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 1 };
        api::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
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
    fn user_namespaces_have_one_mapping_with_a_root() {
        let map = |container_id, host_id, length| api::IdMapping { container_id, host_id, length };
        let good = vec![map(0, 100_000, 65536)];
        let parse = |mode: api::NamespaceMode, uids: &[api::IdMapping], gids: &[api::IdMapping]| {
            user_namespace("f", &api::UserNamespace { mode: mode.into(), uids: uids.to_vec(), gids: gids.to_vec() })
        };
        let wanted = UserNamespace::Pod(IdMapping { container: 0, host: 100_000, length: 65536 });
        assert_eq!(parse(api::NamespaceMode::Pod, &good, &good).unwrap(), wanted);
        assert_eq!(parse(api::NamespaceMode::Node, &[], &[]).unwrap(), UserNamespace::Node);
        let check = |uids: &[api::IdMapping], gids: &[api::IdMapping], words: &[&str]| refused(parse(api::NamespaceMode::Pod, uids, gids), words);
        check(&[], &good, &["f.uids", "exactly one"]);
        check(&good, &[], &["f.gids", "exactly one"]);
        check(&[map(0, 1000, 10), map(10, 2000, 10)], &good, &["f.uids", "0:1000:10, 10:2000:10", "exactly one"]);
        check(&[map(0, 1000, 10), map(5, 1005, 10)], &good, &["f.uids", "exactly one"]);
        check(&[map(0, 1000, 0)], &good, &["f.uids", "0:1000:0", "length 0"]);
        check(&[map(1, 1000, 10)], &[map(1, 1000, 10)], &["f.uids", "1:1000:10", "root"]);
        check(&good, &[map(0, 1000, 65536)], &["f.gids", "0:1000:65536", "0:100000:65536"]);
        check(&[map(0, u32::MAX - 1, 2)], &good, &["f.uids", "4294967294"]);
        refused(parse(api::NamespaceMode::Container, &good, &good), &["f.mode", "CONTAINER"]);
        refused(parse(api::NamespaceMode::Target, &[], &[]), &["f.mode", "TARGET"]);
        refused(parse(api::NamespaceMode::Node, &good, &[]), &["f.uids", "0:100000:65536"]);
        for part in ["pid", "ipc"] {
            let mut config = pod();
            let user = api::UserNamespace { mode: 0, uids: good.clone(), gids: good.clone() };
            let mut options = api::NamespaceOption { userns_options: Some(user), ..Default::default() };
            let node = api::NamespaceMode::Node.into();
            if part == "pid" {
                options.pid = node
            } else {
                options.ipc = node
            }
            let security_context = Some(api::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
            config.linux = Some(api::LinuxPodSandboxConfig { security_context, ..Default::default() });
            refused(sandbox(Some(config), String::new()), &[&format!("namespace_options.{part}"), "NODE"]);
        }
    }
}
