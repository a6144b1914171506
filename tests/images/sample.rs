//! Images made by the tests, and what a well-behaved registry answers about them.

use std::collections::HashMap;

use copepod::image::digest::Digest;
use tar_core::EntryType;
use tar_core::builder::EntryBuilder;

use super::server::{Answer, Request};

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layer: the compressed blob and the digest of the archive in it.
#[derive(Clone)]
pub struct Layer {
    pub blob: Vec<u8>,
    pub diff_id: Digest,
}

impl Layer {
    /// Of files.
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let mut tar = Vec::new();
        for (path, content) in files {
            let mut builder = EntryBuilder::new_ustar();
            builder.path(path).entry_type(EntryType::Regular).mode(0o644).unwrap().size(content.len() as u64).unwrap();
            tar.extend_from_slice(&builder.finish_bytes());
            tar.extend_from_slice(content);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.extend_from_slice(&[0; 1024]);
        Self { blob: gzip(&tar), diff_id: Digest::of(&tar) }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that no compression makes smaller.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// An image.
#[derive(Clone)]
pub struct Sample {
    pub layers: Vec<Layer>,
    pub config: String,
    pub manifest: String,
}

pub fn descriptor(media_type: &str, bytes: &[u8], more: &str) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":{}{more}}}"#, Digest::of(bytes), bytes.len())
}

impl Sample {
    /// Of layers, lowest first; `label` makes it different from others with the same.
    pub fn new(label: &str, layers: &[Layer]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| format!("\"{}\"", layer.diff_id)).collect();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["A=b"],"Cmd":["sh"],"User":"5","Labels":{{"l":"{label}"}}}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        );
        let descriptors: Vec<_> = layers.iter().map(|layer| descriptor(LAYER, &layer.blob, "")).collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{},"layers":[{}]}}"#,
            descriptor(CONFIG, config.as_bytes(), ""),
            descriptors.join(",")
        );
        Self { layers: layers.to_vec(), config, manifest }
    }

    /// Two layers of one file each.
    pub fn simple(label: &str) -> Self {
        Self::new(label, &[Layer::new(&[("base", b"base")]), Layer::new(&[("top", label.as_bytes())])])
    }

    pub fn id(&self) -> String {
        Digest::of(self.config.as_bytes()).to_string()
    }

    pub fn digest(&self) -> String {
        Digest::of(self.manifest.as_bytes()).to_string()
    }

    /// A list that names it for linux/amd64, and something else for another platform.
    pub fn list(&self) -> String {
        let ours = descriptor(MANIFEST, self.manifest.as_bytes(), r#","platform":{"os":"linux","architecture":"amd64"}"#);
        let other = descriptor(MANIFEST, b"other", r#","platform":{"os":"linux","architecture":"s390x"}"#);
        format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{other},{ours}]}}"#)
    }
}

/// What a registry holds: manifests by name or digest, blobs by digest. One repository is as good as another.
#[derive(Clone, Default)]
pub struct Content {
    manifests: HashMap<String, (String, Vec<u8>)>,
    blobs: HashMap<String, Vec<u8>>,
}

impl Content {
    pub fn add(mut self, name: &str, sample: &Sample) -> Self {
        self.document(name, MANIFEST, &sample.manifest);
        self.blob(sample.config.as_bytes());
        for layer in &sample.layers {
            self.blob(&layer.blob);
        }
        self
    }

    pub fn add_list(mut self, name: &str, sample: &Sample) -> Self {
        self = self.add(&sample.digest(), sample);
        self.document(name, INDEX, &sample.list());
        self
    }

    pub fn document(&mut self, name: &str, media_type: &str, text: &str) {
        let entry = (media_type.to_string(), text.as_bytes().to_vec());
        self.manifests.insert(Digest::of(text.as_bytes()).to_string(), entry.clone());
        self.manifests.insert(name.to_string(), entry);
    }

    pub fn blob(&mut self, bytes: &[u8]) {
        self.blobs.insert(Digest::of(bytes).to_string(), bytes.to_vec());
    }

    /// What a registry without faults answers.
    pub fn answer(&self, request: &Request) -> Answer {
        let unknown = || Answer::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#);
        let path = request.path.split('?').next().unwrap_or("");
        if let Some((_, name)) = path.split_once("/manifests/") {
            return self
                .manifests
                .get(name)
                .map_or_else(unknown, |(media_type, bytes)| Answer::new(200, bytes.clone()).with("content-type", media_type));
        }
        let Some((_, digest)) = path.split_once("/blobs/") else { return Answer::new(200, "{}") };
        let Some(bytes) = self.blobs.get(digest) else { return unknown() };
        match request.from() {
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                Answer::new(206, bytes[from..].to_vec()).with("content-range", range)
            }
            None => Answer::new(200, bytes.clone()),
        }
    }
}
