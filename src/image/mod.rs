//! Images: what a registry offers becomes directories an overlay can be made of, and stays until it is removed.
//!
//! [`Images`] is the store and the only thing the service talks to: pull, list, find, remove, what it uses of the disk, and
//! leases that keep layers for containers. It knows nothing of containers, mounts or the CRI's messages, and it never runs
//! what it unpacks. Every layer exists once, unpacked, named by its diff id.

pub mod auth;
pub mod config;
pub mod digest;
mod download;
mod error;
mod http;
mod manifest;
pub mod platform;
mod pull;
pub mod reference;
mod registries;
mod registry;
mod store;
mod transport;
mod unpack;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::errchain::Chain;
use digest::Digest;

pub use auth::Credentials;
pub use config::ImageConfig;
pub use error::{ImageError, PullError};
pub use platform::Platform;
use pull::{Order, Shared};
pub use reference::Reference;
use registries::{Live, Registries, RegistriesError};
use store::Store;

/// How the store is set up. [`Config::new`] fills in what a node usually has.
#[derive(Debug, Clone)]
pub struct Config {
    /// Holds `images/` and `layers/`, for example /var/lib/copepod. Made if absent, 0700.
    pub root: PathBuf,
    /// registries.conf, version 2 (containers-registries.conf(5)). May be absent; read again when it changes.
    pub registries_conf: PathBuf,
    /// Drop-ins (`*.conf`) that are read after it, in the order of their names. May be absent.
    pub registries_conf_dir: PathBuf,
    /// Directories that hold `HOST[:PORT]/*.crt`, `*.cert` and `*.key` (containers-certs.d(5)). The first that has a host wins.
    pub certs_dirs: Vec<PathBuf>,
    /// Auth files (containers-auth.json(5)), asked in this order where a request has no credentials of its own. May be absent.
    pub auth_files: Vec<PathBuf>,
    /// Holds `NAMESPACE.json`, an auth file for the pods of that namespace, asked before the others.
    pub namespace_auth_dir: Option<PathBuf>,
    /// How long a credential helper may take.
    pub credential_helper_timeout: Duration,
    /// Layers of one pull that are fetched and unpacked at once.
    pub max_parallel_layers: usize,
    /// A transfer that brings no byte for so long has failed.
    pub progress_timeout: Duration,
    /// How long a layer stays that no image has yet: the next pull needs it where one was cut short.
    pub orphan_grace: Duration,
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
            auth_files: Vec::new(),
            namespace_auth_dir: None,
            credential_helper_timeout: Duration::from_secs(30),
            max_parallel_layers: 4,
            progress_timeout: Duration::from_secs(60),
            orphan_grace: Duration::from_secs(15 * 60),
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
    /// What its manifest is annotated with, as far as that is short.
    pub annotations: BTreeMap<String, String>,
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

/// The image store. Every method may be called from any thread of a tokio runtime.
pub struct Images {
    store: Arc<Store>,
    /// What pulls share.
    shared: Shared,
    registries: Arc<Live>,
    pulls: Mutex<HashMap<Key, Weak<Running>>>,
    /// Deletes what start-up found to belong to nothing.
    cleaning: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// What makes two pulls the same: the reference, the credentials, and the namespace where that may have some of its own.
type Key = (String, Option<Credentials>, String);

/// A pull that somebody waits for; the last who goes ends it.
struct Running {
    outcome: watch::Receiver<Option<Outcome>>,
    task: AbortHandle,
}

type Outcome = Result<Arc<Image>, Arc<PullError>>;

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Images {
    /// Opens the store, made if it is not there, and repairs what a crash left. Blocks.
    pub fn open(config: Config) -> Result<Arc<Images>, ImageError> {
        let registries = Arc::new(Live::new(config.registries_conf.clone(), config.registries_conf_dir.clone()));
        let (store, garbage) = Store::open(config)?;
        // Said now and not at the first pull; what is right is what a later mistake falls back to.
        let _ = registries.current();
        let cleaning = (!garbage.is_empty()).then(|| {
            let store = Arc::clone(&store);
            std::thread::spawn(move || garbage.iter().for_each(|path| store.delete(path)))
        });
        let shared = Shared { store: Arc::clone(&store), in_flight: Arc::default(), tokens: Arc::default() };
        Ok(Arc::new(Images { store, shared, registries, pulls: Mutex::default(), cleaning: Mutex::new(cleaning) }))
    }

    /// Pulls an image and answers when all of it is on disk. Pulls of the same image with the same credentials are one pull;
    /// it ends early when nobody waits for it any more. The caller's deadline is the caller's: it drops the future.
    pub async fn pull(self: &Arc<Self>, reference: &str, auth: Option<Credentials>) -> Result<Arc<Image>, ImageError> {
        self.pull_for(reference, auth, "").await
    }

    /// The same for a pod of a namespace (a name of one path component), which may have an auth file.
    pub async fn pull_for(self: &Arc<Self>, text: &str, auth: Option<Credentials>, namespace: &str) -> Result<Arc<Image>, ImageError> {
        let live = Arc::clone(&self.registries);
        let registries = tokio::task::spawn_blocking(move || live.current()).await.map_err(|source| ImageError::Thread { source })?;
        let registries = registries.map_err(|source| ImageError::Registries { source })?;
        // Who chose credentials for a short name took it for Docker Hub's: no other registry is shown them.
        let auth = auth.map(|auth| match reference::is_short(text) && auth.server_address.is_empty() {
            true => Credentials { server_address: "docker.io".into(), ..auth },
            false => auth,
        });
        let mut failed = Vec::new();
        for reference in registries.resolve(text)? {
            let order = Order { reference, auth: auth.clone(), namespace: namespace.to_string() };
            match self.pull_one(order, &registries).await {
                Ok(image) => return Ok(image),
                Err(error) => failed.push(error),
            }
        }
        let last = failed.pop().unwrap_or_else(|| ImageError::ShortName { source: RegistriesError::NoSearch { name: text.to_string() } });
        if failed.is_empty() {
            return Err(last);
        }
        let before: Vec<String> = failed.iter().map(|error| Chain(error).to_string()).collect();
        Err(ImageError::NotFoundAnywhere { name: text.to_string(), before: before.join("; "), source: Box::new(last) })
    }

    async fn pull_one(self: &Arc<Self>, order: Order, registries: &Arc<Registries>) -> Result<Arc<Image>, ImageError> {
        let reference = order.reference.clone();
        let running = self.join(order, registries);
        let mut outcome = running.outcome.clone();
        let outcome = match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        outcome.unwrap_or_else(|| Err(Arc::new(PullError::Vanished))).map_err(|source| ImageError::pull(&reference, source))
    }

    /// The pull of this image, started if there is none.
    fn join(self: &Arc<Self>, order: Order, registries: &Arc<Registries>) -> Arc<Running> {
        let namespace = self.store.config.namespace_auth_dir.as_ref().map_or_else(String::new, |_| order.namespace.clone());
        let key = (order.reference.to_string(), order.auth.clone(), namespace);
        let mut pulls = self.pulls.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.retain(|_, pull| pull.strong_count() > 0);
        // One that has its answer is over, though somebody may not have read it yet.
        let joined = pulls.get(&key).and_then(Weak::upgrade).filter(|pull| pull.outcome.borrow().is_none());
        if let Some(running) = joined {
            return running;
        }
        let (answer, outcome) = watch::channel(None);
        let (store, shared, registries) = (Arc::clone(&self.store), self.shared.clone(), Arc::clone(registries));
        let task = tokio::spawn(async move {
            let outcome = pull::run(shared, registries, order).await;
            match &outcome {
                Err(error) if pull::is_full(error) => {
                    let cleared = tokio::task::spawn_blocking(move || store.reap(Duration::ZERO)).await;
                    cleared.unwrap_or_else(|error| tracing::warn!(%error, "image store was not cleared"));
                }
                // Who has the answer may close the store.
                _ => drop(store),
            }
            answer.send_replace(Some(outcome.map_err(Arc::new)));
        });
        let running = Arc::new(Running { outcome, task: task.abort_handle() });
        pulls.insert(key, Arc::downgrade(&running));
        running
    }

    /// All images, by id. Never waits.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.store.list()
    }

    /// The image that `reference` names: an image id (`sha256:…`, its digits, or at least three of the first that no other image
    /// shares), a tag, or a digest reference. A name comes before the digits of an id; a short name stands for what it would be
    /// pulled as. Waits for nothing but stat(2) of registries.conf where the name is a short one.
    pub fn find(&self, reference: &str) -> Result<Option<Arc<Image>>, ImageError> {
        let hex = |digits: &str| (MIN_PREFIX..=64).contains(&digits.len()) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if let Some(digits) = reference.strip_prefix("sha256:").filter(|digits| hex(digits)) {
            return self.store.by_id(digits);
        }
        if reference.len() == 64 && hex(reference) {
            return self.store.by_id(reference);
        }
        let parsed = Reference::parse(reference)?;
        let candidates = match reference::is_short(reference) {
            true => self.registries.current().map_err(|source| ImageError::Registries { source })?.candidates(reference)?,
            false => vec![parsed],
        };
        match candidates.iter().find_map(|candidate| self.store.by_reference(&candidate.to_string())) {
            None if hex(reference) => self.store.by_id(reference),
            found => Ok(found),
        }
    }

    /// What is wrong with the files that say where images come from: what they said before is in force. Never waits.
    pub fn problem(&self) -> Option<String> {
        self.registries.problem()
    }

    /// An image's configuration and its manifest, word for word; `None`: it is gone.
    pub fn documents(&self, image: &Image) -> Option<(String, String)> {
        self.store.documents(Digest::parse(&image.id).ok()?)
    }

    /// Removes the image that `reference` names, with all its tags. One that is not there is no error. Layers that a lease holds
    /// stay until it is dropped.
    pub async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let Some(image) = self.find(reference)? else { return Ok(()) };
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || store.remove(&image)).await.map_err(|source| ImageError::Thread { source })?
    }

    /// What the store uses. From counters; no tree is walked.
    pub async fn fs_info(&self) -> Result<FsInfo, ImageError> {
        let (used_bytes, used_inodes) = self.store.usage();
        Ok(FsInfo { mountpoint: self.store.config.root.clone(), used_bytes, used_inodes, timestamp: SystemTime::now() })
    }

    /// Keeps an image's layers on disk while the lease lives, even when the image is removed.
    pub fn lease(&self, image: &Image) -> Result<LayerLease, ImageError> {
        self.lease_layers(&image.layers)
    }

    /// The same by the layers' names, as a container's record kept them over a restart of the daemon.
    pub fn lease_layers(&self, names: &[String]) -> Result<LayerLease, ImageError> {
        let pins = self.store.pin_names(names)?;
        Ok(LayerLease { layers_dir: self.store.layers_dir.clone(), names: names.to_vec(), _pins: pins })
    }

    /// Deletes the layers that no image, lease or pull needs. The service calls it once it has leased again what its containers use;
    /// until then nothing is deleted but what was never whole.
    pub async fn collect(&self) {
        let cleaning = self.cleaning.lock().unwrap_or_else(PoisonError::into_inner).take();
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || {
            if cleaning.is_some_and(|thread| thread.join().is_err()) {
                tracing::warn!("leftovers of the image store were not all deleted");
            }
            store.allow_reaping();
            store.reap(store.config.orphan_grace);
        });
        if let Err(error) = done.await {
            tracing::warn!(%error, "layers were not collected");
        }
    }
}

/// Digits of an image id that may name it.
const MIN_PREFIX: usize = 3;

/// Keeps layers on disk while it lives.
pub struct LayerLease {
    layers_dir: PathBuf,
    names: Vec<String>,
    _pins: store::Pins,
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

impl std::fmt::Debug for LayerLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerLease").field("names", &self.names).finish_non_exhaustive()
    }
}
