//! What a plugin is told about a pod beside its configuration: CNI_ARGS and the capability arguments.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

use super::error::NetError;

/// A pod, as far as its network needs to know it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// The sandbox's id: CNI_CONTAINERID.
    pub id: String,
    /// Kubernetes' name of the pod.
    pub name: String,
    /// Its namespace in Kubernetes.
    pub namespace: String,
    /// Its UID in Kubernetes.
    pub uid: String,
    /// Where its network namespace is pinned: CNI_NETNS. DEL does not need it to exist.
    pub netns: PathBuf,
    /// The pod's cgroup, for the capability `cgroupPath`. Empty: not given.
    pub cgroup_parent: String,
    /// The pod's annotations, for the capability `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Ports of the node that lead to the pod; those with host port 0 are left out.
    pub port_mappings: Vec<PortMapping>,
    /// Limits of its traffic.
    pub bandwidth: Option<Bandwidth>,
    /// Its resolver's settings.
    pub dns: Option<Dns>,
    /// Addresses it asks for, `10.1.2.3` or `10.1.2.3/24`; the capability `ips`.
    pub ips: Vec<String>,
    /// The hardware address it asks for; the capability `mac`.
    pub mac: Option<String>,
    /// The InfiniBand GUID it asks for; the capability `infinibandGUID`.
    pub infiniband_guid: Option<String>,
}

/// A port of the node that leads to a port of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    /// The node's port; 0: none.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// Of which protocol.
    pub protocol: Protocol,
    /// Of which address of the node; `None`: of all.
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Limits of a pod's traffic, in bits per second. `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// To the pod.
    pub ingress: Option<u64>,
    /// From the pod.
    pub egress: Option<u64>,
}

/// A resolver's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

impl Bandwidth {
    /// From the annotations `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth`, quantities such as `10M`.
    /// `None`: neither is there. Kubernetes allows 1 k to 1 P.
    pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Option<Self>, NetError> {
        let read = |key: &'static str| match annotations.get(key) {
            None => Ok(None),
            Some(text) => match quantity(text) {
                Some(rate) if (1_000..=1_000_000_000_000_000).contains(&rate) => Ok(Some(rate)),
                Some(_) => Err(bad(key, text, "is not between 1k and 1P")),
                None => Err(bad(key, text, "is no quantity")),
            },
        };
        let limits = Self { ingress: read("kubernetes.io/ingress-bandwidth")?, egress: read("kubernetes.io/egress-bandwidth")? };
        Ok((limits != Self::default()).then_some(limits))
    }
}

/// A quantity of Kubernetes, rounded up to an integer: digits, perhaps a fraction, perhaps a suffix.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u128 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || whole.len() > 18 || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let parse = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
    let scale = 10u128.pow(fraction.len() as u32);
    let value = (parse(whole)? * scale + parse(fraction)?).checked_mul(factor)?.div_ceil(scale);
    u64::try_from(value).ok()
}

/// The pairs of CNI_ARGS for a pod, in the order in which all peers send them.
pub(super) fn cni_args(pod: &Pod) -> Result<Vec<[String; 2]>, NetError> {
    let mut args = vec![["IgnoreUnknown".to_string(), "1".to_string()]];
    for (field, key, value) in [
        ("namespace", "K8S_POD_NAMESPACE", &pod.namespace),
        ("name", "K8S_POD_NAME", &pod.name),
        ("id", "K8S_POD_INFRA_CONTAINER_ID", &pod.id),
        ("uid", "K8S_POD_UID", &pod.uid),
    ] {
        // The form has no quoting: one of these would make another pair of it.
        if value.bytes().any(|b| b == b';' || b == b'=' || b.is_ascii_control()) {
            return Err(bad(field, value, "has a character that CNI_ARGS can't carry"));
        }
        args.push([key.to_string(), value.clone()]);
    }
    Ok(args)
}

/// The value of CNI_ARGS.
pub(super) fn join(args: &[[String; 2]]) -> String {
    args.iter().map(|pair| pair.join("=")).collect::<Vec<_>>().join(";")
}

/// The pod's id, which is CNI_CONTAINERID and a part of file names here and in plugins.
pub(super) fn check_id(id: &str) -> Result<(), NetError> {
    // 128: `<network>-<id>-<interface>` must be a file name.
    if is_name(id) && id.len() <= 128 { Ok(()) } else { Err(bad("id", id, "is not of the form that CNI asks for")) }
}

/// The form of network names and container ids in CNI: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`.
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// All capability arguments there are for a pod, by capability (CNI's CONVENTIONS). A plugin gets those that it declares.
pub(super) fn capabilities(pod: &Pod) -> BTreeMap<String, Value> {
    let mut args = BTreeMap::new();
    let ports: Vec<Value> = pod.port_mappings.iter().filter(|port| port.host_port != 0).map(port).collect();
    if !ports.is_empty() {
        args.insert("portMappings".to_string(), Value::Array(ports));
    }
    if let Some(limits) = pod.bandwidth {
        // A rate needs a burst (in bits); this is the largest that every version of the plugin takes, so only the rate limits.
        const BURST: u64 = u32::MAX as u64;
        let mut value = serde_json::Map::new();
        for (rate, rate_key, burst_key) in [(limits.ingress, "ingressRate", "ingressBurst"), (limits.egress, "egressRate", "egressBurst")] {
            if let Some(rate) = rate {
                value.insert(rate_key.to_string(), rate.into());
                value.insert(burst_key.to_string(), BURST.into());
            }
        }
        args.insert("bandwidth".to_string(), Value::Object(value));
    }
    if let Some(dns) = &pod.dns {
        args.insert("dns".to_string(), json!(dns));
    }
    if !pod.ips.is_empty() {
        args.insert("ips".to_string(), json!(pod.ips));
    }
    if let Some(mac) = &pod.mac {
        args.insert("mac".to_string(), json!(mac));
    }
    if let Some(guid) = &pod.infiniband_guid {
        args.insert("infinibandGUID".to_string(), json!(guid));
    }
    if !pod.cgroup_parent.is_empty() {
        args.insert("cgroupPath".to_string(), json!(pod.cgroup_parent));
    }
    args.insert("io.kubernetes.cri.pod-annotations".to_string(), json!(pod.annotations));
    args
}

fn port(port: &PortMapping) -> Value {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let host_ip = port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
    json!({"hostPort": port.host_port, "containerPort": port.container_port, "protocol": protocol, "hostIP": host_ip})
}

fn bad(field: &'static str, value: &str, why: &'static str) -> NetError {
    NetError::BadPod { field, value: value.chars().take(80).collect(), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        Pod { id: "abc".into(), name: "web-0".into(), namespace: "default".into(), uid: "u-1".into(), ..Pod::default() }
    }

    #[test]
    fn args_are_what_every_plugin_of_kubernetes_reads() {
        assert_eq!(
            join(&cni_args(&pod()).unwrap()),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
        );
    }

    #[test]
    fn values_that_would_forge_a_pair_are_refused() {
        for name in ["a;K8S_POD_UID=x", "a=b", "a\nb", "a\0", "\u{7f}"] {
            assert!(cni_args(&Pod { name: name.into(), ..pod() }).is_err(), "{name:?}");
        }
        assert!(cni_args(&Pod { name: "ümläut .".into(), ..pod() }).is_ok());
    }

    #[test]
    fn ids_are_file_names() {
        let check = |id: &str, fits: bool| assert_eq!(check_id(id).is_ok(), fits, "{id:?}");
        check("0123abcdef", true);
        check("a_b.c-d", true);
        check("", false);
        check("-a", false);
        check("../a", false);
        check("a/b", false);
        check(&"a".repeat(128), true);
        check(&"a".repeat(129), false);
    }

    #[test]
    fn capabilities_have_the_names_and_forms_of_the_conventions() {
        let check = |pod: Pod, key: &str, value: Option<Value>| assert_eq!(capabilities(&pod).remove(key), value, "{key}");
        let mapping = |host_port, protocol, host_ip: Option<&str>| PortMapping {
            host_port,
            container_port: 80,
            protocol,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        check(pod(), "portMappings", None);
        check(Pod { port_mappings: vec![mapping(0, Protocol::Tcp, None)], ..pod() }, "portMappings", None);
        check(
            Pod { port_mappings: vec![mapping(8080, Protocol::Tcp, None), mapping(53, Protocol::Udp, Some("::1"))], ..pod() },
            "portMappings",
            Some(json!([
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
                {"hostPort": 53, "containerPort": 80, "protocol": "udp", "hostIP": "::1"},
            ])),
        );
        let limits = Bandwidth { ingress: Some(1_000_000), egress: None };
        check(Pod { bandwidth: Some(limits), ..pod() }, "bandwidth", Some(json!({"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295u64})));
        let dns = Dns { servers: vec!["10.0.0.10".into()], searches: vec!["svc".into()], options: vec![] };
        check(Pod { dns: Some(dns), ..pod() }, "dns", Some(json!({"servers": ["10.0.0.10"], "searches": ["svc"], "options": []})));
        check(Pod { ips: vec!["10.1.2.3/24".into()], ..pod() }, "ips", Some(json!(["10.1.2.3/24"])));
        check(Pod { mac: Some("c2:11:22:33:44:55".into()), ..pod() }, "mac", Some(json!("c2:11:22:33:44:55")));
        check(Pod { cgroup_parent: "/kubepods/pod1".into(), ..pod() }, "cgroupPath", Some(json!("/kubepods/pod1")));
        let annotations = BTreeMap::from([("a".to_string(), "b".to_string())]);
        check(Pod { annotations, ..pod() }, "io.kubernetes.cri.pod-annotations", Some(json!({"a": "b"})));
    }

    #[test]
    fn bandwidth_annotations() {
        let check = |text: &str, rate: Option<u64>| {
            let annotations = BTreeMap::from([("kubernetes.io/ingress-bandwidth".to_string(), text.to_string())]);
            let limits = Bandwidth::from_annotations(&annotations).ok().flatten();
            assert_eq!(limits.and_then(|limits| limits.ingress), rate, "{text:?}");
        };
        check("10M", Some(10_000_000));
        check("1.5M", Some(1_500_000));
        check("1Ki", Some(1024));
        check("1000", Some(1000));
        for wrong in ["", "M", "999", "2P", "1.2.3M", "-1M", "10m", "10 M", "99999999999999999999"] {
            check(wrong, None);
        }
        assert_eq!(Bandwidth::from_annotations(&BTreeMap::new()).unwrap(), None);
    }
}
