//! What ADD gave: the result of the last plugin, kept as it was printed, and what a pod needs of it.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::conf::{Version, object};

/// A pod on its network.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// The interface in the pod: `eth0`.
    pub interface: String,
    /// The interface's addresses, in the result's order; the first is the pod's.
    pub ips: Vec<IpAddr>,
    /// The interface's hardware address, where the result tells it (from version 0.3.0 on).
    pub mac: Option<String>,
    /// The whole result of the last plugin, as it was printed.
    pub result: Box<RawValue>,
}

/// What is wrong with a result.
#[derive(Debug, thiserror::Error)]
pub enum BadResult {
    /// It is no JSON, or not of the form that its version asks for.
    #[error("it has not the form of a result")]
    Form(#[source] serde_json::Error),
    /// It is of a version that isn't known.
    #[error("version {0:?} of results is not known")]
    Version(String),
    /// An address belongs to an interface that the result doesn't list.
    #[error("address {address} is of interface {index}, and there are {interfaces}")]
    NoInterface {
        /// The address.
        address: String,
        /// The index it names.
        index: usize,
        /// The number of interfaces.
        interfaces: usize,
    },
    /// An address that is none.
    #[error("{0:?} is no address")]
    BadAddress(String),
    /// No address for the pod's interface.
    #[error("it has no address of {0}")]
    NoAddress(String),
}

/// The result in the form of versions 0.3.0 and later; what 0.1.0 and 0.2.0 have instead is beside it.
#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    interfaces: Option<Vec<RawInterface>>,
    #[serde(default)]
    ips: Option<Vec<RawIp>>,
    #[serde(default)]
    ip4: Option<OldIp>,
    #[serde(default)]
    ip6: Option<OldIp>,
}

#[derive(Deserialize)]
struct RawVersion {
    #[serde(default, rename = "cniVersion")]
    version: Option<String>,
}

#[derive(Deserialize)]
struct RawInterface {
    name: String,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct RawIp {
    address: String,
    #[serde(default)]
    interface: Option<i64>,
}

/// `ip4` and `ip6` of versions 0.1.0 and 0.2.0.
#[derive(Deserialize)]
struct OldIp {
    ip: String,
}

/// Checks that what a plugin printed is a result, of which version soever; a result that doesn't say is of its configuration's.
pub(super) fn parse(printed: &[u8], configured: Version) -> Result<Box<RawValue>, BadResult> {
    let raw: Box<RawValue> = serde_json::from_slice(printed).map_err(BadResult::Form)?;
    read(&raw, configured)?;
    Ok(raw)
}

fn read(raw: &RawValue, configured: Version) -> Result<(Version, Raw), BadResult> {
    let version: RawVersion = object(raw.get()).map_err(BadResult::Form)?;
    let version = match version.version.as_deref() {
        None | Some("") => configured,
        Some(text) => Version::parse(text).ok_or_else(|| BadResult::Version(text.chars().take(80).collect()))?,
    };
    Ok((version, serde_json::from_str(raw.get()).map_err(BadResult::Form)?))
}

/// What the pod's interface got.
pub(super) fn attachment(network: &str, interface: &str, result: &RawValue, configured: Version) -> Result<Attachment, BadResult> {
    let (version, raw) = read(result, configured)?;
    let interfaces = raw.interfaces.unwrap_or_default();
    // An interface of the node (its own eth0, say) has no sandbox; but some plugins leave it out for the pod's, too.
    let named = |i: &RawInterface| i.name == interface;
    let sandboxed = |i: &RawInterface| i.sandbox.as_deref().is_some_and(|sandbox| !sandbox.is_empty());
    let pods = interfaces.iter().position(|i| named(i) && sandboxed(i)).or_else(|| interfaces.iter().position(named));
    let mut ips = Vec::new();
    if version < Version::V0_3_0 {
        for old in [raw.ip4, raw.ip6].into_iter().flatten() {
            ips.push(address(&old.ip)?);
        }
    } else {
        for ip in raw.ips.unwrap_or_default() {
            let index = ip.interface.map(|index| usize::try_from(index).unwrap_or(usize::MAX));
            if let Some(index) = index.filter(|&index| index >= interfaces.len()) {
                return Err(BadResult::NoInterface { address: ip.address, index, interfaces: interfaces.len() });
            }
            // Without an index: an address of the interface that was asked for.
            if index.is_none() || index == pods {
                ips.push(address(&ip.address)?);
            }
        }
    }
    if ips.is_empty() {
        return Err(BadResult::NoAddress(interface.to_string()));
    }
    let mac = pods.and_then(|i| interfaces[i].mac.clone()).filter(|mac| !mac.is_empty());
    Ok(Attachment { network: network.to_string(), interface: interface.to_string(), ips, mac, result: result.to_owned() })
}

/// An address with its prefix: `10.1.0.5/16`.
fn address(text: &str) -> Result<IpAddr, BadResult> {
    let bad = || BadResult::BadAddress(text.chars().take(80).collect());
    let (ip, prefix) = text.split_once('/').ok_or_else(bad)?;
    let ip: IpAddr = ip.parse().map_err(|_| bad())?;
    let prefix: u8 = prefix.parse().map_err(|_| bad())?;
    if prefix > if ip.is_ipv4() { 32 } else { 128 } || ip.is_unspecified() {
        return Err(bad());
    }
    Ok(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Ok`: the addresses and the hardware address. `Err`: what the error says.
    #[track_caller]
    fn check(configured: Version, printed: &str, expected: Result<(&[&str], Option<&str>), &str>) {
        let found = parse(printed.as_bytes(), configured).and_then(|raw| attachment("net", "eth0", &raw, configured));
        match (found, expected) {
            (Ok(found), Ok((ips, mac))) => {
                assert_eq!(found.ips.iter().map(|ip| ip.to_string()).collect::<Vec<_>>(), ips, "{printed}");
                assert_eq!(found.mac.as_deref(), mac, "{printed}");
                assert_eq!(found.result.get(), printed.trim(), "the result is kept as it was printed");
            }
            (Err(error), Err(text)) => assert!(error.to_string().contains(text), "{printed}: {error}"),
            (found, expected) => panic!("{printed}: {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn results_of_every_version() {
        let v = |text| Version::parse(text).unwrap();
        check(v("0.1.0"), r#"{"ip4":{"ip":"10.1.0.5/16","gateway":"10.1.0.1"},"dns":{}}"#, Ok((&["10.1.0.5"], None)));
        check(v("0.2.0"), r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.1.0.5/16"},"ip6":{"ip":"fd00::5/64"}}"#, Ok((&["10.1.0.5", "fd00::5"], None)));
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let printed = r#"{"cniVersion":"VERSION","interfaces":[{"name":"cni0","mac":"aa:aa"},{"name":"veth1"},
                {"name":"eth0","mac":"bb:bb","sandbox":"/run/netns/x"}],
                "ips":[{"version":"4","interface":2,"address":"10.1.0.5/16","gateway":"10.1.0.1"},
                {"version":"6","interface":2,"address":"fd00::5/64"},{"interface":0,"address":"10.1.0.1/16"}],"dns":{}}"#;
            check(v("0.2.0"), &printed.replace("VERSION", version), Ok((&["10.1.0.5", "fd00::5"], Some("bb:bb"))));
        }
    }

    #[test]
    fn the_version_comes_from_the_result_and_else_from_the_configuration() {
        let (old, new) = (Version::parse("0.2.0").unwrap(), Version::parse("1.0.0").unwrap());
        check(new, r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.1.0.5/16"}}"#, Ok((&["10.1.0.5"], None)));
        check(old, r#"{"cniVersion":"","ip4":{"ip":"10.1.0.5/16"}}"#, Ok((&["10.1.0.5"], None)));
        check(new, r#"{"ips":[{"address":"10.1.0.5/16"}]}"#, Ok((&["10.1.0.5"], None)));
        check(old, r#"{"cniVersion":"2.0.0"}"#, Err("version \"2.0.0\""));
    }

    #[test]
    fn rubbish_is_refused() {
        let new = Version::parse("1.0.0").unwrap();
        for printed in ["", "hello", "{", "[]", "null", "{} {}", r#"{"ips":7}"#, r#"{"ips":[{}]}"#] {
            check(new, printed, Err("form of a result"));
        }
        check(new, "{}", Err("no address of eth0"));
        let host = r#"{"interfaces":[{"name":"eth0"},{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":0,"address":"10.1.0.5/16"}]}"#;
        check(new, host, Err("no address of eth0"));
        check(new, r#"{"ips":[{"address":"10.1.0.5/16","interface":3}]}"#, Err("of interface 3, and there are 0"));
        check(new, r#"{"ips":[{"address":"10.1.0.5/16","interface":-1}]}"#, Err("of interface"));
        for address in ["10.1.0.5", "10.1.0.5/33", "fd00::1/129", "10.1.0/24", "0.0.0.0/0", "x/1"] {
            check(new, &format!(r#"{{"ips":[{{"address":"{address}"}}]}}"#), Err("is no address"));
        }
    }

    #[test]
    fn what_plugins_leave_out() {
        let new = Version::parse("1.0.0").unwrap();
        check(new, r#"{"interfaces":[{"name":"eth0"}],"ips":[{"interface":0,"address":"10.1.0.5/16"}]}"#, Ok((&["10.1.0.5"], None)));
        check(new, r#"{"interfaces":null,"ips":[{"address":"10.1.0.5/16"}],"routes":null}"#, Ok((&["10.1.0.5"], None)));
    }
}
