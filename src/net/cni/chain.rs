//! A verb over all plugins of a network: which configuration and environment each gets, in which order, and what goes on after a failure.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::value::{RawValue, to_raw_value};

use super::args;
use super::cache::Entry;
use super::conf::{Network, Plugin, Version};
use super::error::{Call, CallError, NetError, Verb};
use super::exec::{self, Start};
use super::result;

/// What every run of a plugin shares.
pub(super) struct Chain<'a> {
    pub(super) network: &'a Network,
    pub(super) bin_dirs: &'a [PathBuf],
    pub(super) limit: Duration,
}

/// An attachment that the specification's GC is told to keep.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub(super) struct Valid {
    #[serde(rename = "containerID")]
    pub(super) id: String,
    pub(super) ifname: String,
}

impl Chain<'_> {
    /// ADD, in order, each plugin with the result of the one before. The result of the last.
    pub(super) async fn add(&self, entry: &Entry) -> Result<Box<RawValue>, NetError> {
        let mut previous: Option<Box<RawValue>> = None;
        for plugin in &self.network.plugins {
            let added = self.attach_verb(Verb::Add, plugin, entry, previous.as_deref(), Some(Path::new(&entry.netns))).await?;
            previous = Some(added);
        }
        previous.ok_or_else(|| NetError::NotReady { source: super::NotReady::new(format!("network {:?} has no plugins", self.network.name)) })
    }

    /// DEL, in reverse order, over all plugins though some fail (the specification would stop, and leave more behind).
    pub(super) async fn del(&self, entry: &Entry, netns: Option<&Path>) -> Vec<NetError> {
        // A result for DEL came with 0.4.0.
        let kept = entry.result.as_deref().filter(|_| self.network.version >= Version::V0_4_0);
        let mut failures = Vec::new();
        for plugin in self.network.plugins.iter().rev() {
            if let Err(error) = self.attach_verb_silent(Verb::Del, plugin, entry, kept, netns).await {
                failures.push(error);
            }
        }
        failures
    }

    /// CHECK, in order, up to the first failure.
    pub(super) async fn check(&self, entry: &Entry, netns: &Path) -> Result<(), NetError> {
        for plugin in &self.network.plugins {
            self.attach_verb_silent(Verb::Check, plugin, entry, entry.result.as_deref(), Some(netns)).await?;
        }
        Ok(())
    }

    /// STATUS, in order, up to the first failure.
    pub(super) async fn status(&self) -> Result<(), NetError> {
        for plugin in &self.network.plugins {
            self.run(Verb::Status, plugin, request(self.network, plugin, &[]), Vec::new()).await?;
        }
        Ok(())
    }

    /// GC, over all plugins though some fail.
    pub(super) async fn gc(&self, valid: &[Valid]) -> Vec<NetError> {
        let mut failures = Vec::new();
        for plugin in &self.network.plugins {
            // The first name is the specification's, the second an early draft's that plugins were built against.
            let keys = [("cni.dev/valid-attachments", raw(&valid)), ("cni.dev/attachments", raw(&valid))];
            if let Err(error) = self.run(Verb::Gc, plugin, request(self.network, plugin, &keys), Vec::new()).await {
                failures.push(error);
            }
        }
        failures
    }

    async fn attach_verb_silent(
        &self,
        verb: Verb,
        plugin: &Plugin,
        entry: &Entry,
        previous: Option<&RawValue>,
        netns: Option<&Path>,
    ) -> Result<(), NetError> {
        let stdin = attach_request(self.network, plugin, entry, previous);
        self.run(verb, plugin, stdin, attach_env(entry, netns)).await.map(|_| ())
    }

    async fn attach_verb(
        &self,
        verb: Verb,
        plugin: &Plugin,
        entry: &Entry,
        previous: Option<&RawValue>,
        netns: Option<&Path>,
    ) -> Result<Box<RawValue>, NetError> {
        let stdin = attach_request(self.network, plugin, entry, previous);
        let output = self.run(verb, plugin, stdin, attach_env(entry, netns)).await?;
        result::parse(&output.stdout, self.network.version).map_err(|source| {
            let source = CallError::BadResult { stdout: exec::shown(&output.stdout), stderr: output.stderr, source };
            NetError::Plugin { call: self.call(verb, plugin), source: Box::new(source) }
        })
    }

    async fn run(&self, verb: Verb, plugin: &Plugin, stdin: Vec<u8>, mut env: Vec<(&'static str, OsString)>) -> Result<exec::Output, NetError> {
        env.push(("CNI_COMMAND", verb.as_str().into()));
        env.push(("CNI_PATH", exec::cni_path(self.bin_dirs)));
        let start = Start { plugin: plugin.kind.clone(), bin_dirs: self.bin_dirs.to_vec(), env };
        let failed = |source| NetError::Plugin { call: self.call(verb, plugin), source: Box::new(source) };
        exec::run(start, stdin, self.limit).await.map_err(failed)
    }

    fn call(&self, verb: Verb, plugin: &Plugin) -> Call {
        Call { verb, plugin: plugin.kind.clone(), network: self.network.name.clone() }
    }
}

/// The environment of an attachment's verbs. Without a namespace, CNI_NETNS is empty: DEL must manage without.
fn attach_env(entry: &Entry, netns: Option<&Path>) -> Vec<(&'static str, OsString)> {
    vec![
        ("CNI_CONTAINERID", entry.id.clone().into()),
        ("CNI_IFNAME", entry.interface.clone().into()),
        ("CNI_NETNS", netns.map(Path::as_os_str).unwrap_or_default().to_os_string()),
        ("CNI_ARGS", args::join(entry.args.as_deref().unwrap_or_default()).into()),
    ]
}

/// A plugin's configuration for an attachment's verb: with the capability arguments that it declares, and the previous result.
fn attach_request(network: &Network, plugin: &Plugin, entry: &Entry, previous: Option<&RawValue>) -> Vec<u8> {
    let mut keys = Vec::new();
    if let Some(previous) = previous {
        keys.push(("prevResult", versioned(previous, network.version)));
    }
    let given = entry.capabilities.iter().flatten();
    let declared: serde_json::Map<_, _> =
        given.filter(|(name, _)| plugin.capabilities.contains(name)).map(|(name, value)| (name.clone(), value.clone())).collect();
    if !declared.is_empty() {
        keys.push(("runtimeConfig", raw(&declared)));
    }
    request(network, plugin, &keys)
}

/// A plugin's configuration with the network's name and version, and more keys. `capabilities` stays where it is: the specification
/// would have it taken out, libcni never did, and plugins that call others read it.
fn request(network: &Network, plugin: &Plugin, more: &[(&str, Box<RawValue>)]) -> Vec<u8> {
    let mut keys = plugin.keys.clone();
    keys.insert("name".to_string(), raw(&network.name));
    keys.insert("cniVersion".to_string(), raw(&network.version.to_string()));
    for (key, value) in more {
        keys.insert((*key).to_string(), value.clone());
    }
    raw(&keys).get().as_bytes().to_vec()
}

/// A result as it is, but for a version where it has none: the next plugin would take it for 0.1.0.
fn versioned(result: &RawValue, version: Version) -> Box<RawValue> {
    let keys: Result<std::collections::BTreeMap<String, &RawValue>, _> = serde_json::from_str(result.get());
    match keys {
        Ok(mut keys) if keys.get("cniVersion").is_none_or(|v| matches!(v.get(), "\"\"" | "null")) => {
            let version = raw(&version.to_string());
            keys.insert("cniVersion".to_string(), &version);
            raw(&keys)
        }
        _ => result.to_owned(),
    }
}

/// Any of the values here as JSON: strings, and maps with string keys, which can't fail.
fn raw(value: &impl serde::Serialize) -> Box<RawValue> {
    to_raw_value(value).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;

    fn request_of(conf: Value, capabilities: Value, previous: Option<&str>) -> Value {
        let network = Network::parse(&json!({"name": "n", "cniVersion": "1.0.0", "plugins": [conf]}).to_string()).unwrap();
        let mut entry = Entry::new(&network, "abc", "eth0", Path::new("/ns"), "o");
        entry.capabilities = Some(serde_json::from_value::<BTreeMap<_, _>>(capabilities).unwrap());
        let previous = previous.map(|text| RawValue::from_string(text.to_string()).unwrap());
        serde_json::from_slice(&attach_request(&network, &network.plugins[0], &entry, previous.as_deref())).unwrap()
    }

    #[test]
    fn a_plugin_gets_what_it_declares() {
        let check = |conf: Value, runtime: Option<Value>| {
            let given = json!({"portMappings": [{"hostPort": 1}], "mac": "aa", "dns": {}});
            let request = request_of(conf.clone(), given, None);
            assert_eq!(request.get("runtimeConfig"), runtime.as_ref(), "{conf}");
            assert_eq!((&request["name"], &request["cniVersion"]), (&json!("n"), &json!("1.0.0")));
        };
        check(json!({"type": "x"}), None);
        check(json!({"type": "x", "name": "other", "cniVersion": "0.1.0"}), None);
        check(json!({"type": "x", "capabilities": {"mac": true}}), Some(json!({"mac": "aa"})));
        check(json!({"type": "x", "capabilities": {"mac": false, "ips": true}}), None);
        check(
            json!({"type": "x", "capabilities": {"mac": true, "portMappings": true}}),
            Some(json!({"mac": "aa", "portMappings": [{"hostPort": 1}]})),
        );
    }

    #[test]
    fn the_previous_result_is_passed_as_it_is() {
        let check = |previous: &str, expected: Value| {
            assert_eq!(request_of(json!({"type": "x"}), json!({}), Some(previous))["prevResult"], expected);
        };
        check(r#"{"cniVersion":"1.0.0","x":[1,{"y":null}]}"#, json!({"cniVersion": "1.0.0", "x": [1, {"y": null}]}));
        check(r#"{"cniVersion":"0.2.0","ip4":{}}"#, json!({"cniVersion": "0.2.0", "ip4": {}}));
        check(r#"{"x":1}"#, json!({"cniVersion": "1.0.0", "x": 1}));
        check(r#"{"x":1,"cniVersion":""}"#, json!({"cniVersion": "1.0.0", "x": 1}));
        assert_eq!(request_of(json!({"type": "x"}), json!({}), None).get("prevResult"), None);
        let exact = versioned(&RawValue::from_string(r#"{"n":1.50,"big":123456789012345678901}"#.into()).unwrap(), Version::V1_1_0);
        assert_eq!(exact.get(), r#"{"big":123456789012345678901,"cniVersion":"1.1.0","n":1.50}"#);
    }
}
