//! A pod sandbox as asked for.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::container::{Resources, SecurityProfile};
use super::selinux;
use super::sysctl::{self, Holder, SysctlError};
use crate::plan;

/// Whose namespace: the CRI's NamespaceMode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum NamespaceMode {
    /// The pod's.
    #[default]
    Pod,
    /// The container's own.
    Container,
    /// The node's.
    Node,
    /// That of another container, named beside it.
    Target,
}

/// One range of ids, the same for users and groups: what is `container` in the container is `host` on the host, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// The first id in the container.
    pub container: u32,
    /// The first id on the host.
    pub host: u32,
    /// How many; not 0, and no id is beyond 2³² - 2.
    pub length: u32,
}

impl IdMapping {
    /// The id of the host for one of the container; `None`: it has none.
    pub fn host_id(&self, container: u32) -> Option<u32> {
        self.range().host_id(container)
    }

    /// As plans have it.
    pub fn range(&self) -> plan::IdRange {
        plan::IdRange { container: self.container, host: self.host, length: self.length }
    }
}

/// The CRI's UserNamespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum UserNamespace {
    /// Nothing is said: the node's.
    #[default]
    Unset,
    /// The node's.
    Node,
    /// The pod's own, with container id 0 mapped.
    Pod(IdMapping),
}

impl UserNamespace {
    /// The mapping of a user namespace of the pod's own.
    pub fn mapping(&self) -> Option<IdMapping> {
        if let UserNamespace::Pod(mapping) = self { Some(*mapping) } else { None }
    }

    /// As plans have it.
    pub fn plan(&self) -> Option<plan::UserNamespace> {
        self.mapping().map(|mapping| plan::UserNamespace { uids: mapping.range(), gids: mapping.range() })
    }

    /// User and group of the containers' root on the host: 0 in the node's.
    pub fn root(&self) -> u32 {
        self.mapping().and_then(|mapping| mapping.host_id(0)).unwrap_or(0)
    }
}

/// The CRI's NamespaceOption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct NamespaceModes {
    /// Pod or Node.
    pub network: NamespaceMode,
    /// Any.
    pub pid: NamespaceMode,
    /// Pod or Node.
    pub ipc: NamespaceMode,
    /// With `Target`: a container of the pod.
    pub target_id: String,
    /// The pod's own or the node's.
    #[serde(default)]
    pub user: UserNamespace,
}

/// What a pod is called. Unique over the node with its attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct PodName {
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// How often kubelet has made the sandbox before.
    pub attempt: u32,
}

impl PodName {
    /// The key under which the sandbox's name is reserved and its operations are journalled.
    pub fn key(&self) -> String {
        format!("{}/{}/{}/{}", self.namespace, self.name, self.uid, self.attempt)
    }
}

/// resolv.conf as kubelet wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Dns {
    /// The file's text. `None`: nothing is asked for, the host's own file is copied.
    pub fn resolv_conf(&self) -> Option<String> {
        if self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty() {
            return None;
        }
        let mut text = String::new();
        if !self.searches.is_empty() {
            text.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            text.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        Some(text)
    }
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One port that the node forwards to the pod, for the CNI plugin that does it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Its protocol.
    pub protocol: Protocol,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the node.
    pub host_port: u16,
    /// Address on the node; `None`: all.
    pub host_ip: Option<IpAddr>,
}

/// The CRI's LinuxSandboxSecurityContext, less what stands in [`SandboxSpec`]. Who and what profiles are for the pause process,
/// the one process that is the pod's own: a pod that shares no PID namespace has none. Its root is always read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct SandboxSecurity {
    /// User; `None`: root.
    pub run_as_user: Option<u32>,
    /// Group; only with a user.
    pub run_as_group: Option<u32>,
    /// Groups beside the primary one. There is no image whose groups could join them.
    pub supplemental_groups: Vec<u32>,
    /// Seccomp.
    pub seccomp: SecurityProfile,
    /// AppArmor.
    pub apparmor: SecurityProfile,
    /// SELinux; containers that have no options take these.
    pub selinux: selinux::Options,
}

/// A pod sandbox, as kubelet asks for it; checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct SandboxSpec {
    /// Its name.
    pub name: PodName,
    /// Host name; empty with the node's network.
    pub hostname: String,
    /// Directory for log files; empty: no logs.
    pub log_directory: PathBuf,
    /// DNS.
    pub dns: Dns,
    /// Ports.
    pub ports: Vec<PortMapping>,
    /// Labels, returned as they are.
    pub labels: BTreeMap<String, String>,
    /// Annotations, returned as they are.
    pub annotations: BTreeMap<String, String>,
    /// The control group under which containers go; empty: ours.
    pub cgroup_parent: String,
    /// Namespaces.
    pub namespaces: NamespaceModes,
    /// Sysctls, names with dots.
    pub sysctls: BTreeMap<String, String>,
    /// Containers of the pod may be privileged.
    pub privileged: bool,
    /// Security of what the pod itself runs, and what its containers take where they say nothing.
    #[serde(default)]
    pub security: SandboxSecurity,
    /// The handler asked for; empty: the default one.
    pub runtime_handler: String,
    /// What the pod takes beside its containers. Kept and shown; the pod's control group is kubelet's.
    #[serde(default)]
    pub overhead: Option<Resources>,
    /// The sum over its containers, likewise.
    #[serde(default)]
    pub resources: Option<Resources>,
}

/// Why a sandbox can't be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SandboxSpecError {
    /// A sysctl that is refused.
    #[error("field linux.sysctls is refused")]
    Sysctl(#[from] SysctlError),
    /// A sysctl of a namespace that the pod shares with the node.
    #[error("field linux.sysctls: {name} belongs to the {what} namespace, which the pod shares with the node")]
    SharedNamespace {
        /// The sysctl.
        name: String,
        /// The namespace.
        what: &'static str,
    },
}

impl SandboxSpec {
    /// The sysctls to set: `defaults` that the pod's namespaces hold, and over them the pod's own.
    pub fn effective_sysctls(&self, defaults: &BTreeMap<String, String>) -> Result<Vec<(String, String)>, SandboxSpecError> {
        let own = |holder| match holder {
            Holder::Net => self.namespaces.network != NamespaceMode::Node,
            Holder::Ipc => self.namespaces.ipc != NamespaceMode::Node,
            Holder::Uts => self.namespaces.network != NamespaceMode::Node,
        };
        let mut all = BTreeMap::new();
        for (name, value) in defaults {
            let (name, holder) = sysctl::parse(name, value)?;
            if own(holder) {
                all.insert(name, value.clone());
            }
        }
        for (name, value) in &self.sysctls {
            let (name, holder) = sysctl::parse(name, value)?;
            if !own(holder) {
                let what = match holder {
                    Holder::Net => "network",
                    Holder::Ipc => "IPC",
                    Holder::Uts => "UTS",
                };
                return Err(SandboxSpecError::SharedNamespace { name, what });
            }
            all.insert(name, value.clone());
        }
        Ok(all.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_as_asked_for() {
        let check = |dns: Dns, want: Option<&str>| assert_eq!(dns.resolv_conf().as_deref(), want);
        check(Dns::default(), None);
        let full = Dns { servers: vec!["10.0.0.1".into(), "::1".into()], searches: vec!["a.b".into(), "c".into()], options: vec!["ndots:5".into()] };
        check(full, Some("search a.b c\nnameserver 10.0.0.1\nnameserver ::1\noptions ndots:5\n"));
    }

    #[test]
    fn sysctls_follow_the_pods_namespaces() {
        let defaults = BTreeMap::from([("net.ipv4.x".to_string(), "0".to_string())]);
        let mut spec = SandboxSpec { sysctls: BTreeMap::from([("net/ipv4/x".into(), "1".into())]), ..SandboxSpec::default() };
        assert_eq!(spec.effective_sysctls(&defaults).unwrap(), [("net.ipv4.x".to_string(), "1".to_string())]);
        spec.namespaces.network = NamespaceMode::Node;
        assert!(matches!(spec.effective_sysctls(&defaults), Err(SandboxSpecError::SharedNamespace { what: "network", .. })));
        spec.sysctls.clear();
        assert!(spec.effective_sysctls(&defaults).unwrap().is_empty());
    }
}
