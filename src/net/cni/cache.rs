//! What is attached: libcni's cache, in its place and form (`cniCacheV1`), so that its tools read it.
//!
//! Each attachment is one file, `results/NETWORK-ID-INTERFACE`, with the configuration and the arguments that DEL needs. Ours
//! bear one key more, `copepod`, which libcni ignores: the owner (the daemon's state directory), so that neither another runtime's
//! attachments nor those of a second daemon on the machine are ever taken for ours. A file without `result` is an intent: an ADD
//! that has begun. Files are replaced by rename and not synced: the leases that they are about aren't either.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::conf::{Network, read_at_most};
use super::error::NetError;
use super::result::{self, Attachment};

/// Bytes of one file: a configuration in base64 and a result.
const MAX_FILE: u64 = 4 << 20;

/// An attachment that the cache holds and that is ours.
#[derive(Debug, Clone)]
pub struct CachedAttachment {
    /// The sandbox's id.
    pub id: String,
    /// The interface in the pod.
    pub interface: String,
    /// The network's name.
    pub network: String,
    /// Where the pod's network namespace was pinned.
    pub netns: PathBuf,
    /// What ADD gave. `None`: it began and never ended, or its result is of no use; DEL undoes it all the same.
    pub attachment: Option<Attachment>,
}

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Entry {
    kind: String,
    #[serde(rename = "containerId")]
    pub(super) id: String,
    /// The conflist, in base64 as Go writes bytes.
    config: String,
    #[serde(rename = "ifName")]
    pub(super) interface: String,
    #[serde(rename = "networkName")]
    pub(super) network: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) netns: String,
    #[serde(default, rename = "cniArgs", skip_serializing_if = "Option::is_none")]
    pub(super) args: Option<Vec<[String; 2]>>,
    #[serde(default, rename = "capabilityArgs", skip_serializing_if = "Option::is_none")]
    pub(super) capabilities: Option<BTreeMap<String, Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    copepod: Option<Mark>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    owner: String,
}

const KIND: &str = "cniCacheV1";

impl Entry {
    /// An attachment that is about to be made.
    pub(super) fn new(network: &Network, id: &str, interface: &str, netns: &Path, owner: &str) -> Self {
        Self {
            kind: KIND.to_string(),
            id: id.to_string(),
            config: STANDARD.encode(&network.json),
            interface: interface.to_string(),
            network: network.name.clone(),
            netns: netns.to_string_lossy().into_owned(),
            args: None,
            capabilities: None,
            result: None,
            copepod: Some(Mark { owner: owner.to_string() }),
        }
    }

    /// The network as it was when the attachment was made.
    pub(super) fn network(&self, path: &Path) -> Result<Network, NetError> {
        let unreadable =
            |what: String| NetError::Cache { what: "read", path: path.to_path_buf(), source: io::Error::new(io::ErrorKind::InvalidData, what) };
        let bytes = STANDARD.decode(&self.config).map_err(|error| unreadable(error.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|error| unreadable(error.to_string()))?;
        Network::parse(&text).map_err(|source| NetError::KeptConf { path: path.to_path_buf(), source })
    }

    fn is_of(&self, owner: &str) -> bool {
        self.copepod.as_ref().is_some_and(|mark| mark.owner == owner)
    }

    fn attachment(&self) -> Option<Attachment> {
        let network = self.network(Path::new("")).ok()?;
        result::attachment(&self.network, &self.interface, self.result.as_deref()?, network.version).ok()
    }
}

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    results: PathBuf,
    owner: String,
}

impl Cache {
    /// Over libcni's directory; nothing is made before something is to be kept.
    pub(super) fn new(dir: &Path, owner: &str) -> Self {
        Self { dir: dir.to_path_buf(), results: dir.join("results"), owner: owner.to_string() }
    }

    pub(super) fn owner(&self) -> &str {
        &self.owner
    }

    /// Writes or replaces an entry.
    pub(super) fn put(&self, entry: &Entry) -> Result<(), NetError> {
        let path = self.results.join(format!("{}-{}-{}", entry.network, entry.id, entry.interface));
        // Beside the results: libcni reads whatever is among them.
        let tmp = self.dir.join(format!(".copepod-{}-{}.tmp", entry.id, entry.interface));
        let write = || -> io::Result<()> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.results)?;
            let bytes = serde_json::to_vec(entry)?;
            let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
            io::Write::write_all(&mut file, &bytes)?;
            std::fs::rename(&tmp, &path)
        };
        write().map_err(|source| {
            let _ = std::fs::remove_file(&tmp);
            NetError::Cache { what: "write", path: path.clone(), source }
        })
    }

    /// Forgets an entry. One that is not there is forgotten already.
    pub(super) fn remove(&self, path: &Path) -> Result<(), NetError> {
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(NetError::Cache { what: "remove", path: path.to_path_buf(), source }),
            _ => Ok(()),
        }
    }

    /// Our entries of one attachment, whatever the network: a crash between a change of the configuration and a new ADD leaves two.
    pub(super) fn of(&self, id: &str, interface: &str) -> Result<Vec<(PathBuf, Entry)>, NetError> {
        let suffix = format!("-{id}-{interface}");
        let ours = |entry: &Entry| entry.is_of(&self.owner) && entry.id == id && entry.interface == interface;
        Ok(self.read(|name| name.ends_with(&suffix))?.into_iter().filter(|(_, entry)| ours(entry)).collect())
    }

    /// Our entries.
    pub(super) fn ours(&self) -> Result<Vec<(PathBuf, Entry)>, NetError> {
        Ok(self.read(|_| true)?.into_iter().filter(|(_, entry)| entry.is_of(&self.owner)).collect())
    }

    /// What others have attached to a network.
    pub(super) fn others(&self, network: &str) -> Result<Vec<Entry>, NetError> {
        let all = self.read(|_| true)?.into_iter().map(|(_, entry)| entry);
        Ok(all.filter(|entry| entry.network == network && !entry.is_of(&self.owner)).collect())
    }

    /// Entries that can be read, by file name; another runtime's rubbish is its own business.
    fn read(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<(PathBuf, Entry)>, NetError> {
        let failed = |path: &Path, source| NetError::Cache { what: "read", path: path.to_path_buf(), source };
        let names = match std::fs::read_dir(&self.results) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| failed(&self.results, error))?,
        };
        let mut entries = Vec::new();
        for name in names {
            let path = name.map_err(|error| failed(&self.results, error))?.path();
            if !path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted) {
                continue;
            }
            let entry = read_at_most(&path, MAX_FILE).ok().and_then(|text| serde_json::from_str::<Entry>(&text).ok());
            if let Some(entry) = entry.filter(|entry| entry.kind == KIND) {
                entries.push((path, entry));
            }
        }
        entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(entries)
    }
}

impl From<&Entry> for CachedAttachment {
    fn from(entry: &Entry) -> Self {
        Self {
            id: entry.id.clone(),
            interface: entry.interface.clone(),
            network: entry.network.clone(),
            netns: PathBuf::from(&entry.netns),
            attachment: entry.attachment(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = r#"{"name":"pods","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;

    fn cache(dir: &Path, owner: &str) -> Cache {
        Cache::new(dir, owner)
    }

    fn entry(id: &str, owner: &str) -> Entry {
        let network = Network::parse(CONF).unwrap();
        let mut entry = Entry::new(&network, id, "eth0", Path::new("/run/netns/x"), owner);
        entry.args = Some(vec![["IgnoreUnknown".into(), "1".into()]]);
        entry
    }

    #[test]
    fn the_form_is_libcnis() {
        let dir = tempfile::tempdir().unwrap();
        let mut entry = entry("abc", "/run/copepod");
        entry.result = Some(RawValue::from_string(r#"{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24"}]}"#.into()).unwrap());
        cache(dir.path(), "/run/copepod").put(&entry).unwrap();
        let text = std::fs::read_to_string(dir.path().join("results/pods-abc-eth0")).unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            found,
            serde_json::json!({
                "kind": "cniCacheV1", "containerId": "abc", "config": STANDARD.encode(CONF), "ifName": "eth0", "networkName": "pods",
                "netns": "/run/netns/x", "cniArgs": [["IgnoreUnknown", "1"]],
                "result": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}, "copepod": {"owner": "/run/copepod"},
            })
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the results");
    }

    #[test]
    fn only_ours_are_ours() {
        let dir = tempfile::tempdir().unwrap();
        let ours = cache(dir.path(), "/run/copepod");
        assert!(ours.ours().unwrap().is_empty(), "no directory is no entries");
        ours.put(&entry("aaa", "/run/copepod")).unwrap();
        ours.put(&entry("bbb", "/run/other")).unwrap();
        let results = dir.path().join("results");
        for (name, text) in [("rubbish", "{"), ("pods-ccc-eth0", r#"{"cniVersion":"0.2.0"}"#), ("empty", "")] {
            std::fs::write(results.join(name), text).unwrap();
        }
        // As containerd writes it.
        let foreign = format!(
            r#"{{"kind":"cniCacheV1","containerId":"ddd","config":"{}","ifName":"eth0","networkName":"pods","cniArgs":[["K8S_POD_UID","u"]],
                "capabilityArgs":{{"io.kubernetes.cri.pod-annotations":null}},"result":{{"cniVersion":"1.0.0","dns":{{}}}}}}"#,
            STANDARD.encode(CONF)
        );
        std::fs::write(results.join("pods-ddd-eth0"), foreign).unwrap();
        let ids = |entries: Vec<(PathBuf, Entry)>| entries.into_iter().map(|(_, entry)| entry.id).collect::<Vec<_>>();
        assert_eq!(ids(ours.ours().unwrap()), ["aaa"]);
        assert_eq!(ids(ours.of("aaa", "eth0").unwrap()), ["aaa"]);
        assert!(ours.of("bbb", "eth0").unwrap().is_empty());
        assert!(ours.of("aa", "eth0").unwrap().is_empty(), "the end of another's name");
        assert_eq!(ours.others("pods").unwrap().into_iter().map(|entry| entry.id).collect::<Vec<_>>(), ["bbb", "ddd"]);
        assert!(ours.others("elsewhere").unwrap().is_empty());
    }

    #[test]
    fn an_intent_has_no_attachment_and_is_replaced_by_the_result() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), "/run/copepod");
        let mut entry = entry("abc", "/run/copepod");
        cache.put(&entry).unwrap();
        assert!(CachedAttachment::from(&cache.ours().unwrap()[0].1).attachment.is_none());
        entry.result = Some(RawValue::from_string(r#"{"ips":[{"address":"10.0.0.2/24"}]}"#.into()).unwrap());
        cache.put(&entry).unwrap();
        let kept = cache.ours().unwrap();
        let attachment = CachedAttachment::from(&kept[0].1).attachment.unwrap();
        assert_eq!(attachment.ips, ["10.0.0.2".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(kept[0].1.network(&kept[0].0).unwrap().plugins[0].kind, "bridge");
        cache.remove(&kept[0].0).unwrap();
        cache.remove(&kept[0].0).unwrap();
        assert!(cache.ours().unwrap().is_empty());
    }
}
