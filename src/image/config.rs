//! What an image says about itself: the configuration blob of the image specification, and Docker's.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// How an image wants to be run. Everything here was written by a stranger: names are not resolved, numbers not parsed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group`, …; empty: not said.
    pub user: String,
    /// `KEY=value`.
    pub env: Vec<String>,
    /// Program and first arguments; empty: none.
    pub entrypoint: Vec<String>,
    /// Arguments, or the program if there is no entrypoint.
    pub cmd: Vec<String>,
    /// Empty: `/`.
    pub working_dir: String,
    /// For example `SIGTERM`, `RTMIN+3` or `9`.
    pub stop_signal: Option<String>,
    /// Directories that are to be volumes.
    pub volumes: BTreeSet<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// For example `80/tcp`.
    pub exposed_ports: BTreeSet<String>,
}

/// The configuration blob: what of it we use.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Blob {
    pub(super) architecture: Option<String>,
    pub(super) os: Option<String>,
    pub(super) variant: Option<String>,
    pub(super) created: Option<String>,
    config: Option<Section>,
    rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RootFs {
    r#type: String,
    diff_ids: Option<Vec<Digest>>,
}

/// The part that both image formats write with capital letters, any of it absent or null.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Section {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Words>,
    cmd: Option<Words>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, Option<String>>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

/// Very old images have one string where a list belongs.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Words {
    Many(Vec<String>),
    One(String),
}

impl Words {
    fn list(words: Option<Words>) -> Vec<String> {
        match words {
            None => Vec::new(),
            Some(Words::Many(list)) => list,
            Some(Words::One(word)) => vec![word],
        }
    }
}

/// Why a configuration blob is none of an image.
#[derive(Debug, thiserror::Error)]
pub enum BadConfig {
    /// It isn't JSON of the form expected.
    #[error("image configuration cannot be read")]
    Json {
        /// Why.
        source: serde_json::Error,
    },
    /// It describes something else than layers.
    #[error("image configuration has root file system type {0:?}, not \"layers\"")]
    RootFs(String),
}

impl Blob {
    /// Parses a blob.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, BadConfig> {
        let blob: Blob = serde_json::from_slice(bytes).map_err(|source| BadConfig::Json { source })?;
        if blob.rootfs.r#type != "layers" {
            return Err(BadConfig::RootFs(blob.rootfs.r#type.chars().take(80).collect()));
        }
        Ok(blob)
    }

    /// The layers' diff ids, lowest first.
    pub(super) fn diff_ids(&self) -> &[Digest] {
        self.rootfs.diff_ids.as_deref().unwrap_or(&[])
    }

    /// The part about running it.
    pub(super) fn image_config(&mut self) -> ImageConfig {
        let section = self.config.take().unwrap_or_default();
        ImageConfig {
            user: section.user.unwrap_or_default(),
            env: section.env.unwrap_or_default(),
            entrypoint: Words::list(section.entrypoint),
            cmd: Words::list(section.cmd),
            working_dir: section.working_dir.unwrap_or_default(),
            stop_signal: section.stop_signal.filter(|s| !s.is_empty()),
            volumes: section.volumes.unwrap_or_default().into_keys().collect(),
            labels: section.labels.unwrap_or_default().into_iter().map(|(k, v)| (k, v.unwrap_or_default())).collect(),
            exposed_ports: section.exposed_ports.unwrap_or_default().into_keys().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_of_both_formats_are_read() {
        let zero = format!("sha256:{}", "0".repeat(64));
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","created":"2020-01-01T00:00:00Z","history":[{{}}],"config":{{"User":"1000:1000","Env":["A=b"],
            "Entrypoint":null,"Cmd":["sh"],"WorkingDir":"/x","StopSignal":"SIGQUIT","Volumes":{{"/data":{{}}}},"Labels":{{"a":"b","n":null}},"Healthcheck":{{}},
            "ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{zero}"]}}}}"#
        );
        let mut blob = Blob::parse(text.as_bytes()).unwrap();
        assert_eq!(blob.diff_ids().len(), 1);
        let config = blob.image_config();
        assert_eq!((config.user.as_str(), config.working_dir.as_str(), config.stop_signal.as_deref()), ("1000:1000", "/x", Some("SIGQUIT")));
        assert_eq!((config.cmd, config.entrypoint), (vec!["sh".to_string()], vec![]));
        assert_eq!(config.labels["n"], "");
        assert!(config.volumes.contains("/data") && config.exposed_ports.contains("80/tcp"));
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let check = |text: &str, fits: bool| assert_eq!(Blob::parse(text.as_bytes()).is_ok(), fits, "{text}");
        check(r#"{"rootfs":{"type":"layers"}}"#, true);
        check(r#"{"rootfs":{"type":"layers","diff_ids":null},"config":null}"#, true);
        check(r#"{}"#, false);
        check(r#"{"rootfs":{"type":"squashfs"}}"#, false);
        check(r#"{"rootfs":{"type":"layers","diff_ids":["sha512:00"]}}"#, false);
        check(r#"{"rootfs":{"type":"layers"},"rootfs":{"type":"layers"}}"#, false);
        check("[]", false);
        check("", false);
    }
}
