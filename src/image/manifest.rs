//! Manifests and indexes: OCI's and Docker's (schema 2), told apart by their structure, never by their word alone.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Limits;
use super::digest::{BadDigest, Digest};
use super::platform::Platform;
use crate::errchain::{Kind, Kinded};

/// Media types asked of a registry.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

const INDEXES: [&str; 2] = ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFESTS: [&str; 2] = ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIGS: [&str; 2] = ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// A blob by its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
}

/// What a registry answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Document {
    /// An image.
    Manifest {
        /// Its configuration.
        config: Blob,
        /// Its layers, lowest first.
        layers: Vec<Blob>,
    },
    /// A list; this is the entry for our platform.
    Index(Blob),
}

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no JSON of the form expected.
    #[error("manifest cannot be read")]
    Json {
        /// Why.
        source: serde_json::Error,
    },
    /// Two programs could read it as two different things (GHSA-5j5w-g665-5m35).
    #[error("manifest is ambiguous: {0}")]
    Ambiguous(&'static str),
    /// Version 1 of the format can't be verified.
    #[error("image has a manifest of schema 1, which is not supported: push it again with a current tool")]
    Schema1,
    /// It is something else than an image.
    #[error("{what} has media type {media_type:?}, which is not supported")]
    MediaType {
        /// Manifest, configuration or layer.
        what: &'static str,
        /// Its type.
        media_type: String,
    },
    /// A digest can't be used.
    #[error("{what} cannot be addressed")]
    Digest {
        /// Which blob.
        what: &'static str,
        /// Why.
        source: BadDigest,
    },
    /// The list has nothing for this machine.
    #[error("image has no manifest for {wanted}, only for {offered}")]
    NoPlatform {
        /// Ours.
        wanted: String,
        /// Theirs.
        offered: String,
    },
    /// It is larger than we take.
    #[error("image has more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many we take.
        limit: u64,
    },
}

impl Kinded for ManifestError {
    fn kind(&self) -> Kind {
        match self {
            ManifestError::NoPlatform { .. } => Kind::NotFound,
            ManifestError::Schema1 | ManifestError::MediaType { .. } => Kind::Unimplemented,
            ManifestError::Limit { .. } => Kind::ResourceExhausted,
            _ => Kind::FailedPrecondition,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u64>,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
    signatures: Option<serde::de::IgnoredAny>,
}

/// A descriptor. `urls` and `data` are deliberately not read: a registry does not send us elsewhere (CVE-2020-15157).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct RawPlatform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Descriptor {
    fn blob(&self, what: &'static str) -> Result<Blob, ManifestError> {
        let digest = Digest::parse(&self.digest).map_err(|source| ManifestError::Digest { what, source })?;
        Ok(Blob { digest, size: self.size })
    }

    fn unsupported(&self, what: &'static str) -> ManifestError {
        ManifestError::MediaType { what, media_type: self.media_type.chars().take(100).collect() }
    }
}

/// Whether a layer is a tar archive; its compression is told by its bytes.
fn is_archive(media_type: &str) -> bool {
    let oci = media_type.strip_prefix("application/vnd.oci.image.layer.");
    match oci.map(|rest| rest.strip_prefix("nondistributable.").unwrap_or(rest)) {
        Some(rest) => matches!(rest, "v1.tar" | "v1.tar+gzip" | "v1.tar+zstd"),
        None => matches!(
            media_type,
            "application/vnd.docker.image.rootfs.diff.tar"
                | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                | "application/vnd.docker.image.rootfs.diff.tar.zstd"
                | "application/vnd.docker.image.rootfs.foreign.diff.tar"
                | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
                | "application/vnd.docker.container.image.rootfs.diff+x-gtar"
        ),
    }
}

/// Parses a document. `content_type`: the header it came with, empty: none.
pub fn parse(bytes: &[u8], content_type: &str, platform: &Platform, limits: &Limits) -> Result<Document, ManifestError> {
    let raw: Raw = serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { source })?;
    if raw.schema_version == Some(1) || raw.fs_layers.is_some() || (raw.signatures.is_some() && raw.layers.is_none()) {
        return Err(ManifestError::Schema1);
    }
    if raw.manifests.is_some() && (raw.layers.is_some() || raw.config.is_some()) {
        return Err(ManifestError::Ambiguous("it has both manifests and layers"));
    }
    let is_index = raw.manifests.is_some();
    let content_type = content_type.split(';').next().unwrap_or("").trim();
    for said in [raw.media_type.as_deref().unwrap_or(""), content_type] {
        if (is_index && MANIFESTS.contains(&said)) || (!is_index && INDEXES.contains(&said)) {
            return Err(ManifestError::Ambiguous("its media type contradicts its content"));
        }
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(entries), ..) => choose(&entries, platform).map(Document::Index),
        (None, Some(config), layers) => {
            let layers = layers.unwrap_or_default();
            if layers.len() > limits.layers {
                return Err(ManifestError::Limit { what: "layers", limit: limits.layers as u64 });
            }
            if !CONFIGS.contains(&config.media_type.as_str()) {
                return Err(config.unsupported("image configuration"));
            }
            if config.size > limits.config_bytes {
                return Err(ManifestError::Limit { what: "bytes of configuration", limit: limits.config_bytes });
            }
            if let Some(layer) = layers.iter().find(|layer| !is_archive(&layer.media_type)) {
                return Err(layer.unsupported("layer"));
            }
            let layers = layers.iter().map(|layer| layer.blob("layer")).collect::<Result<_, _>>()?;
            Ok(Document::Manifest { config: config.blob("image configuration")?, layers })
        }
        (None, None, _) => {
            let media_type = raw.media_type.filter(|t| !t.is_empty()).unwrap_or_else(|| content_type.to_string());
            Err(ManifestError::MediaType { what: "manifest", media_type: media_type.chars().take(100).collect() })
        }
    }
}

/// Bytes of annotations kept of one image: they stand in every answer about it.
const MAX_ANNOTATIONS: usize = 4096;

/// A manifest's annotations, in the order of their keys as many as fit.
pub fn annotations(manifest: &str) -> BTreeMap<String, String> {
    #[derive(Deserialize)]
    struct Annotated {
        annotations: Option<BTreeMap<String, String>>,
    }
    let mut room = MAX_ANNOTATIONS;
    let found = serde_json::from_str::<Annotated>(manifest).ok().and_then(|manifest| manifest.annotations).unwrap_or_default();
    let fits = |(key, value): &(String, String)| {
        let left = room.checked_sub(key.len() + value.len());
        room = left.unwrap_or(room);
        left.is_some()
    };
    found.into_iter().filter(fits).collect()
}

fn choose(entries: &[Descriptor], platform: &Platform) -> Result<Blob, ManifestError> {
    let known = |entry: &&Descriptor| {
        entry.media_type.is_empty() || INDEXES.contains(&entry.media_type.as_str()) || MANIFESTS.contains(&entry.media_type.as_str())
    };
    let of = |entry: &Descriptor| entry.platform.as_ref().map(|p| Platform::new(&p.os, &p.architecture, p.variant.as_deref().unwrap_or("")));
    let fitting = entries.iter().filter(known).filter_map(|entry| {
        // An entry that names no platform is taken when none fits better.
        let distance = of(entry).map_or(Some(u32::MAX), |offered| platform.distance(&offered))?;
        Some((distance, entry))
    });
    match fitting.min_by_key(|(distance, _)| *distance) {
        Some((_, entry)) => entry.blob("manifest"),
        None => {
            let mut offered: Vec<String> = entries.iter().filter_map(of).map(|p| p.to_string().chars().take(60).collect()).collect();
            offered.dedup();
            offered.truncate(20);
            Err(ManifestError::NoPlatform { wanted: platform.to_string(), offered: offered.join(", ") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";

    fn descriptor(media_type: &str, fill: char, more: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{}","size":7{more}}}"#, fill.to_string().repeat(64))
    }

    fn image(layer: &str) -> String {
        let config = descriptor("application/vnd.oci.image.config.v1+json", 'c', "");
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{}]}}"#, descriptor(layer, '1', r#","urls":["http://evil"]"#))
    }

    fn check(text: &str, content_type: &str, expected: Result<char, &str>) {
        let host = Platform::new("linux", "amd64", "v2");
        match (parse(text.as_bytes(), content_type, &host, &Limits::default()), expected) {
            (Ok(Document::Manifest { layers, .. }), Ok(fill)) => assert!(layers.iter().all(|l| l.digest.hex().starts_with(fill)), "{text}"),
            (Ok(Document::Index(blob)), Ok(fill)) => assert!(blob.digest.hex().starts_with(fill), "{text}: {blob:?}"),
            (Err(error), Err(part)) => assert!(crate::errchain::Chain(&error).to_string().contains(part), "{text}: {error}"),
            (other, _) => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn manifests_are_read() {
        check(&image("application/vnd.oci.image.layer.v1.tar+gzip"), OCI, Ok('1'));
        check(&image("application/vnd.oci.image.layer.v1.tar+zstd"), "", Ok('1'));
        check(&image("application/vnd.docker.image.rootfs.diff.tar.gzip"), "text/plain; charset=utf-8", Ok('1'));
        check(&image("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), OCI, Ok('1'));
        check(&image("application/vnd.oci.image.layer.nondistributable.v1.tar"), OCI, Ok('1'));
        check(&image("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), OCI, Err("not supported"));
        check(&image("application/vnd.wasm"), OCI, Err("not supported"));
        check(&image("application/vnd.oci.image.layer.v1.tar"), INDEX, Err("ambiguous"));
        check(r#"{"schemaVersion":1,"fsLayers":[]}"#, "", Err("schema 1"));
        check(r#"{"schemaVersion":2}"#, "application/x", Err("application/x"));
        check(&image("application/vnd.oci.image.layer.v1.tar").replace(r#""layers""#, r#""manifests":[],"layers""#), "", Err("ambiguous"));
        check(&image("application/vnd.oci.image.layer.v1.tar").replace(r#""size":7,"urls""#, r#""size":-7,"urls""#), "", Err("invalid value"));
        check(&image("application/vnd.oci.image.layer.v1.tar").replace(r#""layers""#, r#""layers":[],"layers""#), "", Err("duplicate"));
        check(&image("application/vnd.oci.image.layer.v1.tar").replace("image.config.v1", "empty.v1"), "", Err("empty.v1"));
        let many = format!("[{}]", vec![descriptor("application/vnd.oci.image.layer.v1.tar", '1', ""); 501].join(","));
        let config = descriptor("application/vnd.oci.image.config.v1+json", 'c', "");
        check(&format!(r#"{{"schemaVersion":2,"config":{config},"layers":{many}}}"#), "", Err("more than 500 layers"));
        let large = image("application/vnd.oci.image.layer.v1.tar").replacen(r#""size":7"#, r#""size":8388609"#, 1);
        check(&large, "", Err("more than 8388608 bytes of configuration"));
        check("null", "", Err("cannot be read"));
        check("{", "", Err("cannot be read"));
    }

    #[test]
    fn annotations_are_kept_as_far_as_they_fit() {
        let check = |text: &str, keys: &[&str]| assert_eq!(annotations(text).keys().map(String::as_str).collect::<Vec<_>>(), keys, "{text}");
        check(r#"{"annotations": {"b": "1", "a": "2"}}"#, &["a", "b"]);
        check(&format!(r#"{{"annotations": {{"a": "{}", "b": "1"}}}}"#, "x".repeat(5000)), &["b"]);
        check(r#"{"annotations": null}"#, &[]);
        check(r#"{"annotations": {"a": 1}}"#, &[]);
        check("{}", &[]);
    }

    #[test]
    fn lists_give_the_entry_of_the_platform() {
        let list = |entries: &[(char, &str)]| {
            let entries: Vec<_> = entries.iter().map(|(fill, platform)| descriptor(OCI, *fill, &format!(r#","platform":{platform}"#))).collect();
            format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#, entries.join(","))
        };
        let (arm, amd, v2, v4) = (
            r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#,
            r#"{"os":"linux","architecture":"amd64"}"#,
            r#"{"os":"linux","architecture":"amd64","variant":"v2"}"#,
            r#"{"os":"linux","architecture":"amd64","variant":"v4"}"#,
        );
        let unknown = r#"{"os":"unknown","architecture":"unknown"}"#;
        check(&list(&[('a', arm), ('b', amd), ('e', unknown)]), INDEX, Ok('b'));
        check(&list(&[('b', amd), ('d', v4), ('c', v2)]), INDEX, Ok('c'));
        check(&list(&[('a', arm), ('d', v4)]), INDEX, Err("no manifest for linux/amd64/v2, only for linux/arm64/v8, linux/amd64/v4"));
        check(&list(&[('a', "null"), ('b', amd)]), "", Ok('b'));
        check(&list(&[('a', "null")]), "", Ok('a'));
        check(&list(&[('b', amd)]), OCI, Err("ambiguous"));
        check(&list(&[]), "", Err("no manifest"));
        check(&list(&[('b', amd)]).replace("sha256", "sha512"), "", Err("manifest cannot be addressed"));
    }
}
