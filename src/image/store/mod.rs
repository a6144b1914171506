//! The images and layers on disk, the index of them in memory, and who needs which layer.
//!
//! Three things keep a layer: an image that has it, a pin (a lease of the service, a pull in progress), and for a while its
//! being new. Everything that writes runs on blocking threads, one at a time; readers take a snapshot and never wait.
//!
//! The order of a pull: files, layer records (renamed, not synced), one syncfs, the image's record (synced, renamed, synced).
//! The order of a removal: the image's record (gone, synced), layer records (gone, synced), files. So whatever instant the
//! power fails at, a record that is there tells the truth.

mod load;
mod records;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rustix::fs::{CWD, Mode};

use super::config::Blob;
use super::digest::Digest;
use super::manifest;
use super::reference::Reference;
use super::unpack::{self, Unpacked, remove};
use super::{Config, Image, ImageConfig, ImageError, Step};
use records::{ImageRecord, LayerRecord, Tag, VERSION};

/// Digest references kept of one image: a list that is rebuilt daily around the same image must not grow for ever.
const MAX_DIGESTS: usize = 32;

/// The store's part that pulls, leases and the service share.
pub(super) struct Store {
    pub(super) config: Config,
    images_dir: PathBuf,
    pub(super) layers_dir: PathBuf,
    /// Holds the lock on the store.
    _lock: OwnedFd,
    boot: String,
    state: Mutex<State>,
    /// One writer of records at a time. Held over I/O: only blocking threads take it, and before `state`.
    writing: Mutex<()>,
    /// One deleter at a time, so that whoever asks for it finds it done. Taken before `writing`.
    deleting: Mutex<()>,
    snapshot: ArcSwap<Snapshot>,
    /// Whether the service has said which layers it needs.
    may_reap: AtomicBool,
}

#[derive(Default)]
struct State {
    images: HashMap<Digest, Stored>,
    layers: HashMap<Digest, Layer>,
    /// The number of the next layer's name.
    next: u64,
}

struct Layer {
    name: String,
    record: LayerRecord,
    /// Leases and pulls that need it.
    pins: usize,
    /// Unpacked (or found at start-up) and in no image since.
    fresh: Option<Instant>,
}

/// An image as it is on disk, with what is computed from that once.
struct Stored {
    record: ImageRecord,
    diff_ids: Vec<Digest>,
    config: ImageConfig,
    annotations: BTreeMap<String, String>,
    created: String,
    os: String,
    architecture: String,
    image: Arc<Image>,
}

impl Stored {
    fn new(record: ImageRecord, mut blob: Blob) -> Self {
        let config = blob.image_config();
        let diff_ids = if blob.diff_ids().is_empty() { vec![empty_layer()] } else { blob.diff_ids().to_vec() };
        let image = Arc::new(Image {
            id: record.id.to_string(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: 0,
            layers: Vec::new(),
            config: ImageConfig::default(),
            annotations: BTreeMap::new(),
            pinned: false,
            pulled_at: UNIX_EPOCH,
            created: String::new(),
            os: String::new(),
            architecture: String::new(),
        });
        let text = |field: Option<String>| field.unwrap_or_default();
        let annotations = manifest::annotations(&record.manifest);
        let (created, os, architecture) = (text(blob.created), text(blob.os), text(blob.architecture));
        Self { diff_ids, config, annotations, created, os, architecture, record, image }
    }
}

/// What readers see.
#[derive(Default)]
struct Snapshot {
    images: Vec<Arc<Image>>,
    by_reference: HashMap<String, Arc<Image>>,
    by_id: BTreeMap<String, Arc<Image>>,
}

/// An image to be published; its layers are pinned by the caller.
pub(super) struct NewImage {
    pub(super) reference: Reference,
    pub(super) id: Digest,
    pub(super) config: String,
    pub(super) manifest: String,
    pub(super) manifest_digest: Digest,
    /// What the reference itself led to: a list's digest or the manifest's.
    pub(super) top_digest: Digest,
}

/// Keeps layers while it lives.
pub(super) struct Pins {
    store: Arc<Store>,
    /// With the name, since a layer that vanished and was fetched again is another one.
    layers: Vec<(Digest, String)>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.store.state();
        for (diff_id, name) in &self.layers {
            if let Some(layer) = state.layers.get_mut(diff_id).filter(|layer| layer.name == *name) {
                layer.pins = layer.pins.saturating_sub(1);
            }
        }
        let idle = state.doomed(Duration::MAX).is_empty();
        drop(state);
        // Deleting is work for another thread; without a runtime the next removal does it.
        if !idle && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let store = Arc::clone(&self.store);
            runtime.spawn_blocking(move || store.reap(store.config.orphan_grace));
        }
    }
}

/// The archive of nothing: an image without layers still needs a directory below its containers.
pub(super) fn empty_layer() -> Digest {
    Digest::of(&[0; 1024])
}

impl State {
    /// Layers that nothing keeps; new ones count once they are older than `grace`.
    fn doomed(&self, grace: Duration) -> Vec<Digest> {
        let used = self.used();
        let doomed = |(diff_id, layer): (&Digest, &Layer)| {
            let young = layer.fresh.is_some_and(|since| since.elapsed() < grace);
            (layer.pins == 0 && !young && !used.contains(diff_id)).then_some(*diff_id)
        };
        self.layers.iter().filter_map(doomed).collect()
    }

    /// Layers of images.
    fn used(&self) -> HashSet<Digest> {
        self.images.values().flat_map(|stored| stored.diff_ids.iter().copied()).collect()
    }

    /// Computes what readers see of an image.
    fn rebuild(&mut self, id: Digest, config: &Config) {
        let Some(stored) = self.images.get_mut(&id) else { return };
        let mut names = Vec::new();
        let mut size = (stored.record.config.len() + stored.record.manifest.len()) as u64;
        let mut seen = HashSet::new();
        let mut hidden = false;
        // A layer that occurs twice counts where it is topmost: what is below shows nothing that it doesn't.
        for diff_id in stored.diff_ids.iter().rev().filter(|diff_id| seen.insert(**diff_id)) {
            let Some(layer) = self.layers.get(diff_id) else { continue };
            size += layer.record.disk_bytes;
            if !hidden {
                names.push(layer.name.clone());
            }
            hidden |= layer.record.opaque;
        }
        let tags: Vec<String> = stored.record.tags.iter().map(|tag| tag.reference.clone()).collect();
        let pinned = tags.iter().chain(&stored.record.digests).any(|reference| is_pinned(reference, &config.pinned));
        stored.image = Arc::new(Image {
            id: id.to_string(),
            tags,
            digests: stored.record.digests.clone(),
            size,
            layers: names,
            config: stored.config.clone(),
            annotations: stored.annotations.clone(),
            pinned,
            pulled_at: UNIX_EPOCH + Duration::from_nanos(stored.record.pulled_at),
            created: stored.created.clone(),
            os: stored.os.clone(),
            architecture: stored.architecture.clone(),
        });
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (id, stored) in &self.images {
            for reference in stored.image.tags.iter().chain(&stored.image.digests) {
                snapshot.by_reference.insert(reference.clone(), Arc::clone(&stored.image));
            }
            snapshot.by_id.insert(id.hex(), Arc::clone(&stored.image));
        }
        snapshot.images = snapshot.by_id.values().cloned().collect();
        snapshot
    }
}

fn is_pinned(reference: &str, patterns: &[String]) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => reference.starts_with(prefix),
        None => reference == pattern || Reference::parse(pattern).is_ok_and(|normal| normal.to_string() == reference),
    })
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let path = path.to_path_buf();
    move |source| ImageError::Store { action, path: path.clone(), source }
}

fn nanos_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

impl Store {
    fn assemble(config: Config, images_dir: PathBuf, layers_dir: PathBuf, lock: OwnedFd, boot: String, state: State) -> Self {
        Self {
            config,
            images_dir,
            layers_dir,
            _lock: lock,
            boot,
            state: Mutex::new(state),
            writing: Mutex::default(),
            deleting: Mutex::default(),
            snapshot: ArcSwap::default(),
            may_reap: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, step: Step) {
        if let Some(fault) = self.config.fault {
            fault(step);
        }
    }

    fn rebuild_all(&self) {
        let mut state = self.state();
        let ids: Vec<Digest> = state.images.keys().copied().collect();
        for id in ids {
            state.rebuild(id, &self.config);
        }
        self.snapshot.store(Arc::new(state.snapshot()));
    }

    /// All images.
    pub(super) fn list(&self) -> Vec<Arc<Image>> {
        self.snapshot.load().images.clone()
    }

    /// By normalised reference.
    pub(super) fn by_reference(&self, reference: &str) -> Option<Arc<Image>> {
        self.snapshot.load().by_reference.get(reference).cloned()
    }

    /// By the first digits of its id.
    pub(super) fn by_id(&self, prefix: &str) -> Result<Option<Arc<Image>>, ImageError> {
        let snapshot = self.snapshot.load();
        let mut found = snapshot.by_id.range(prefix.to_string()..).take_while(|(hex, _)| hex.starts_with(prefix)).map(|(_, image)| image);
        match (found.next(), found.next()) {
            (Some(_), Some(_)) => Err(ImageError::Ambiguous { prefix: prefix.to_string() }),
            (first, _) => Ok(first.cloned()),
        }
    }

    /// The configuration of an image that we have, word for word.
    pub(super) fn config_text(&self, id: Digest) -> Option<String> {
        self.state().images.get(&id).map(|stored| stored.record.config.clone())
    }

    /// The configuration and the manifest of an image.
    pub(super) fn documents(&self, id: Digest) -> Option<(String, String)> {
        self.state().images.get(&id).map(|stored| (stored.record.config.clone(), stored.record.manifest.clone()))
    }

    /// Bytes and inodes of everything.
    pub(super) fn usage(&self) -> (u64, u64) {
        let state = self.state();
        let layers = state.layers.values().fold((0, 0), |(bytes, inodes), layer| {
            // The record beside it is a file, too.
            (bytes + layer.record.disk_bytes + 4096, inodes + layer.record.inodes + 1)
        });
        state.images.values().fold(layers, |(bytes, inodes), stored| {
            (bytes + ((stored.record.config.len() + stored.record.manifest.len()) as u64).next_multiple_of(4096), inodes + 1)
        })
    }

    /// Pins a layer that is on disk.
    pub(super) fn pin(self: &Arc<Self>, diff_id: Digest) -> Option<Pins> {
        let name = self.state().layers.get(&diff_id)?.name.clone();
        let there = self.layers_dir.join(&name).is_dir();
        let mut state = self.state();
        if !there {
            // Somebody deleted it behind our back: it is fetched again, alone.
            tracing::warn!(layer = %diff_id, name, "layer has vanished from the image store");
            state.layers.retain(|_, layer| layer.name != name);
            return None;
        }
        state.layers.get_mut(&diff_id).filter(|layer| layer.name == name)?.pins += 1;
        Some(Pins { store: Arc::clone(self), layers: vec![(diff_id, name)] })
    }

    /// Pins layers by their names.
    pub(super) fn pin_names(self: &Arc<Self>, names: &[String]) -> Result<Pins, ImageError> {
        let mut state = self.state();
        let find = |name: &String| {
            let layer = state.layers.iter().find(|(_, layer)| layer.name == *name);
            layer.map(|(diff_id, layer)| (*diff_id, layer.name.clone())).ok_or_else(|| ImageError::NoLayer { name: name.chars().take(80).collect() })
        };
        let layers: Vec<(Digest, String)> = names.iter().map(find).collect::<Result<_, _>>()?;
        for (diff_id, _) in &layers {
            if let Some(layer) = state.layers.get_mut(diff_id) {
                layer.pins += 1;
            }
        }
        drop(state);
        Ok(Pins { store: Arc::clone(self), layers })
    }

    /// Makes a directory for a layer to come: its name, and the directory.
    pub(super) fn begin_layer(&self) -> Result<(String, OwnedFd), ImageError> {
        let number = {
            let mut state = self.state();
            state.next += 1;
            state.next - 1
        };
        let name = base36(number);
        let path = self.layers_dir.join(&name);
        self.fault(Step::LayerDirectory);
        rustix::fs::mkdirat(CWD, &path, Mode::from_raw_mode(0o700)).map_err(|e| failed("make", &path)(e.into()))?;
        let directory = records::directory(&path).map_err(failed("open", &path))?;
        self.fault(Step::LayerFiles);
        Ok((name, directory))
    }

    /// Deletes the directory of a layer that did not come about.
    pub(super) fn abandon_layer(&self, name: &str) {
        self.delete(&self.layers_dir.join(name));
    }

    /// Deletes a directory of the layers' directory. What can't be deleted is tried again at the next start.
    pub(super) fn delete(&self, path: &Path) {
        let deleted = records::directory(&self.layers_dir).and_then(|parent| {
            use std::os::fd::AsFd;
            remove::remove_at(parent.as_fd(), path.file_name().unwrap_or_default())
        });
        if let Err(error) = deleted {
            tracing::warn!(path = %path.display(), %error, "layer cannot be deleted");
        }
    }

    /// Takes a whole layer into the store, pinned.
    pub(super) fn finish_layer(self: &Arc<Self>, name: String, unpacked: &Unpacked) -> Result<Pins, ImageError> {
        let record = LayerRecord {
            version: VERSION,
            diff_id: unpacked.diff_id,
            compressed: unpacked.compressed,
            compressed_bytes: unpacked.compressed_bytes,
            disk_bytes: unpacked.disk_bytes,
            inodes: unpacked.inodes,
            opaque: unpacked.opaque,
            boot: self.boot.clone(),
        };
        let path = self.layers_dir.join(format!("{name}.json"));
        let _writing = self.writing();
        self.fault(Step::LayerRecord);
        let temporary = records::prepare(&path, &record, false).map_err(failed("write", &path))?;
        self.fault(Step::LayerPublish);
        records::publish(&temporary, &path).map_err(failed("write", &path))?;
        let mut state = self.state();
        state.layers.insert(unpacked.diff_id, Layer { name: name.clone(), record, pins: 1, fresh: Some(Instant::now()) });
        // Only where the layer had vanished are there images already that have it.
        let ids: Vec<Digest> = state.images.values().filter(|i| i.diff_ids.contains(&unpacked.diff_id)).map(|i| i.record.id).collect();
        for id in &ids {
            state.rebuild(*id, &self.config);
        }
        if !ids.is_empty() {
            self.snapshot.store(Arc::new(state.snapshot()));
        }
        Ok(Pins { store: Arc::clone(self), layers: vec![(unpacked.diff_id, name)] })
    }

    /// Gives directories that a new layer's archive does not list the owner and mode they have below it.
    pub(super) fn settle(&self, diff_id: Digest, implied: &[String], below: &[Digest]) -> Result<(), ImageError> {
        let open = |diff_id: &Digest| {
            let name = self.state().layers.get(diff_id).map(|layer| layer.name.clone())?;
            records::directory(&self.layers_dir.join(name)).ok()
        };
        let Some(layer) = open(&diff_id) else { return Ok(()) };
        let below: Vec<OwnedFd> = below.iter().filter_map(open).collect();
        use std::os::fd::AsFd;
        unpack::settle_implied(layer.as_fd(), implied, &below).map_err(|e| failed("set the owners of directories in", &self.layers_dir)(e.into()))
    }

    /// Publishes an image, all of whose layers are there: on disk, then in the index.
    pub(super) fn publish(&self, new: NewImage, blob: Blob) -> Result<Arc<Image>, ImageError> {
        let _writing = self.writing();
        let now = nanos_now();
        let tag = new.reference.digest().is_none().then(|| new.reference.to_string());
        let mut digests = vec![new.reference.with_digest(new.top_digest), new.reference.with_digest(new.manifest_digest)];
        let (record, changed, unsynced) = {
            let state = self.state();
            let old = state.images.get(&new.id).map(|stored| &stored.record);
            let mut tags = old.map_or_else(Vec::new, |old| old.tags.clone());
            if let Some(reference) = &tag
                && !tags.iter().any(|tag| tag.reference == *reference)
            {
                tags.push(Tag { reference: reference.clone(), at: now });
            }
            for digest in old.map_or(&[][..], |old| &old.digests) {
                digests.push(digest.clone());
            }
            let mut seen = HashSet::new();
            digests.retain(|digest| seen.insert(digest.clone()));
            digests.truncate(MAX_DIGESTS);
            let same = |old: &ImageRecord| old.tags == tags && digests.iter().all(|digest| old.digests.contains(digest));
            let changed = !old.is_some_and(same);
            let used = state.used();
            let unsynced = blob.diff_ids().iter().any(|diff_id| !used.contains(diff_id)) || blob.diff_ids().is_empty();
            let record = ImageRecord {
                version: VERSION,
                id: new.id,
                tags,
                digests,
                pulled_at: now,
                manifest_digest: new.manifest_digest,
                manifest: new.manifest,
                config: new.config,
            };
            (record, changed, unsynced || old.is_none())
        };
        if unsynced {
            self.fault(Step::Sync);
            let layers = records::directory(&self.layers_dir).map_err(failed("open", &self.layers_dir))?;
            rustix::fs::syncfs(layers).map_err(|e| failed("sync", &self.layers_dir)(e.into()))?;
        }
        if changed {
            self.write_image(&record)?;
        }
        let moved = {
            let mut state = self.state();
            let stored = Stored::new(record, blob);
            for diff_id in &stored.diff_ids {
                if let Some(layer) = state.layers.get_mut(diff_id) {
                    layer.fresh = None;
                }
            }
            state.images.insert(new.id, stored);
            let mut moved = Vec::new();
            for (id, other) in state.images.iter_mut().filter(|(id, _)| **id != new.id) {
                if other.record.tags.iter().any(|t| Some(&t.reference) == tag.as_ref()) {
                    other.record.tags.retain(|t| Some(&t.reference) != tag.as_ref());
                    moved.push((*id, other.record.clone()));
                }
            }
            state.rebuild(new.id, &self.config);
            for (id, _) in &moved {
                state.rebuild(*id, &self.config);
            }
            self.snapshot.store(Arc::new(state.snapshot()));
            moved
        };
        for (_, record) in moved {
            self.fault(Step::TagMove);
            self.write_image(&record)?;
        }
        let image = self.state().images.get(&new.id).map(|stored| Arc::clone(&stored.image));
        image.ok_or_else(|| ImageError::NoLayer { name: new.id.to_string() })
    }

    fn write_image(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let path = self.images_dir.join(format!("{}.json", record.id.hex()));
        self.fault(Step::ImageRecord);
        let temporary = records::prepare(&path, record, true).map_err(failed("write", &path))?;
        self.fault(Step::ImagePublish);
        records::publish(&temporary, &path).map_err(failed("write", &path))?;
        records::sync_directory(&self.images_dir).map_err(failed("sync", &self.images_dir))
    }

    /// Removes an image, and the layers that nothing else keeps.
    pub(super) fn remove(&self, image: &Image) -> Result<(), ImageError> {
        let Ok(id) = Digest::parse(&image.id) else { return Ok(()) };
        {
            let _writing = self.writing();
            let path = self.images_dir.join(format!("{}.json", id.hex()));
            self.fault(Step::ImageRemove);
            records::remove(&path).map_err(failed("remove", &path))?;
            records::sync_directory(&self.images_dir).map_err(failed("sync", &self.images_dir))?;
            let mut state = self.state();
            state.images.remove(&id);
            self.snapshot.store(Arc::new(state.snapshot()));
        }
        self.reap(self.config.orphan_grace);
        Ok(())
    }

    /// From now on layers are deleted when nothing needs them.
    pub(super) fn allow_reaping(&self) {
        self.may_reap.store(true, Ordering::Release);
    }

    /// Deletes layers that nothing keeps; of new ones those that are older than `grace`.
    pub(super) fn reap(&self, grace: Duration) {
        if !self.may_reap.load(Ordering::Acquire) {
            return;
        }
        let _deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut paths = Vec::new();
        {
            let _writing = self.writing();
            let doomed: Vec<Layer> = {
                let mut state = self.state();
                let doomed = state.doomed(grace);
                doomed.iter().filter_map(|diff_id| state.layers.remove(diff_id)).collect()
            };
            for layer in doomed {
                self.fault(Step::LayerRemove);
                let path = self.layers_dir.join(&layer.name);
                match records::remove(&path.with_extension("json")) {
                    Ok(()) => paths.push(path),
                    // It stays as it is until the next start finds it.
                    Err(error) => tracing::warn!(path = %path.display(), %error, "layer cannot be removed"),
                }
            }
            if !paths.is_empty()
                && let Err(error) = records::sync_directory(&self.layers_dir)
            {
                tracing::warn!(path = %self.layers_dir.display(), %error, "layers are not deleted");
                return;
            }
        }
        for path in paths {
            self.fault(Step::LayerDelete);
            self.delete(&path);
        }
    }
}

/// A layer's name: overlayfs takes the paths of all layers in one string, so they are short.
fn base36(mut number: u64) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut digits = Vec::new();
    loop {
        digits.push(char::from(DIGITS[(number % 36) as usize]));
        number /= 36;
        if number == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}
