//! Start-up: what is on disk becomes the index, what a crash left is put right.
//!
//! A layer's directory counts only with its record, a record only with its directory. An image counts only with all its
//! layers; one that lacks a layer is dropped, its other layers are kept for a while, and the next pull fetches what is missing.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::FlockOperation;

use super::super::config::Blob;
use super::super::digest::Digest;
use super::super::{Config, ImageError};
use super::records::{self, ImageRecord, LayerRecord, TEMPORARY};
use super::{Layer, State, Store, Stored};

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let path = path.to_path_buf();
    move |source| ImageError::Store { action, path: path.clone(), source }
}

impl Store {
    /// Opens the store. Beside it: directories that belong to nothing.
    pub(in super::super) fn open(config: Config) -> Result<(Arc<Self>, Vec<PathBuf>), ImageError> {
        let (images_dir, layers_dir) = (config.root.join("images"), config.root.join("layers"));
        for path in [&config.root, &images_dir, &layers_dir] {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))?;
        }
        for path in [&images_dir, &layers_dir] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed("set the mode of", path))?;
            // A default ACL of the directory above would reach into every layer.
            let _ = rustix::fs::removexattr(path, "system.posix_acl_default");
        }
        let lock = records::directory(&images_dir).map_err(failed("open", &images_dir))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ImageError::Locked { path: config.root.clone() }),
            Err(error) => return Err(failed("lock", &images_dir)(error.into())),
        }
        let boot_file = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = std::fs::read_to_string(boot_file).map_err(failed("read", boot_file))?.trim().to_string();

        let images = images(&images_dir)?;
        let (mut layers, mut garbage, next) = layers(&layers_dir)?;
        let mut state = State { next, ..State::default() };
        let whole = |stored: &Stored| stored.diff_ids.iter().all(|diff_id| layers.contains_key(diff_id));
        let (whole, damaged): (Vec<_>, Vec<_>) = images.into_iter().partition(whole);
        for stored in &damaged {
            let path = images_dir.join(format!("{}.json", stored.record.id.hex()));
            tracing::warn!(image = %stored.record.id, "image lacks a layer and is dropped: the next pull fetches what is missing");
            records::remove(&path).map_err(failed("remove", &path))?;
        }
        let referenced: HashSet<Digest> = whole.iter().flat_map(|stored| stored.diff_ids.iter().copied()).collect();
        let useful: HashSet<Digest> = damaged.iter().flat_map(|stored| stored.diff_ids.iter().copied()).collect();
        layers.retain(|diff_id, layer| {
            let kept = referenced.contains(diff_id) || useful.contains(diff_id) || layer.record.boot == boot;
            if !kept {
                // Unpacked before the machine went down and never synced: nobody knows what is in it.
                garbage.push(layers_dir.join(&layer.name));
            } else if !referenced.contains(diff_id) {
                layer.fresh = Some(Instant::now());
            }
            kept
        });
        for path in &garbage {
            let record = path.with_extension("json");
            records::remove(&record).map_err(failed("remove", &record))?;
        }
        for path in [&images_dir, &layers_dir] {
            records::sync_directory(path).map_err(failed("sync", path))?;
        }
        state.layers = layers;
        settle_tags(whole, &mut state);
        let store = Arc::new(Self::assemble(config, images_dir, layers_dir, lock, boot, state));
        store.rebuild_all();
        Ok((store, garbage))
    }
}

/// Every image record; temporary files are removed on the way.
fn images(directory: &Path) -> Result<Vec<Stored>, ImageError> {
    let mut images = Vec::new();
    for (name, path) in list(directory)? {
        if name.starts_with(TEMPORARY) {
            records::remove(&path).map_err(failed("remove", &path))?;
            continue;
        }
        let Some(id) = name.strip_suffix(".json").and_then(Digest::from_hex) else { continue };
        let Some(record) = records::read::<ImageRecord>(&path).map_err(failed("read", &path))? else { continue };
        // The configuration is the image's identity: a record whose own does not fit is worth nothing.
        let blob = Blob::parse(record.config.as_bytes());
        match blob {
            Ok(blob) if record.id == id && Digest::of(record.config.as_bytes()) == id => images.push(Stored::new(record, blob)),
            _ => {
                tracing::warn!(path = %path.display(), "image store record does not fit its name and is removed");
                records::remove(&path).map_err(failed("remove", &path))?;
            }
        }
    }
    Ok(images)
}

type Layers = (HashMap<Digest, Layer>, Vec<PathBuf>, u64);

/// Every whole layer, the directories that are none, and the number the next name is made of.
fn layers(directory: &Path) -> Result<Layers, ImageError> {
    let mut directories = HashSet::new();
    let mut files = Vec::new();
    for (name, path) in list(directory)? {
        if name.starts_with(TEMPORARY) {
            records::remove(&path).map_err(failed("remove", &path))?;
        } else if path.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            directories.insert(name);
        } else if let Some(name) = name.strip_suffix(".json") {
            files.push((name.to_string(), path));
        }
    }
    let next = directories.iter().filter_map(|name| u64::from_str_radix(name, 36).ok()).max().map_or(0, |last| last + 1);
    let mut layers = HashMap::new();
    for (name, path) in files {
        let record = records::read::<LayerRecord>(&path).map_err(failed("read", &path))?;
        match record {
            Some(record) if directories.contains(&name) && !layers.contains_key(&record.diff_id) => {
                directories.remove(&name);
                layers.insert(record.diff_id, Layer { name, record, pins: 0, fresh: None });
            }
            _ => records::remove(&path).map_err(failed("remove", &path))?,
        }
    }
    let garbage = directories.into_iter().map(|name| directory.join(name)).collect();
    Ok((layers, garbage, next))
}

/// Puts images into the state. A tag that two of them claim (a crash between the two writes of its move) goes to the later.
fn settle_tags(images: Vec<Stored>, state: &mut State) {
    let mut latest: HashMap<String, u64> = HashMap::new();
    for tag in images.iter().flat_map(|stored| &stored.record.tags) {
        let at = latest.entry(tag.reference.clone()).or_default();
        *at = (*at).max(tag.at);
    }
    for mut stored in images {
        stored.record.tags.retain(|tag| latest.get(&tag.reference) == Some(&tag.at));
        state.images.insert(stored.record.id, stored);
    }
}

fn list(directory: &Path) -> Result<Vec<(String, PathBuf)>, ImageError> {
    let fail = failed("read", directory);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(&fail)? {
        let entry = entry.map_err(&fail)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    found.sort();
    Ok(found)
}
