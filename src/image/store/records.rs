//! What the store keeps beside the layers' files: one small JSON file for each image and each layer, written whole or not at all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::super::digest::Digest;

/// Files that were being written when the process ended begin so.
pub(super) const TEMPORARY: &str = ".tmp-";
/// The form of the records. A record of a newer form is left alone, and its image is not listed.
pub(super) const VERSION: u32 = 1;
/// Bytes of a record: a manifest and a configuration at their limits, escaped.
const MAX_RECORD: u64 = 64 << 20;

/// `layers/NAME.json`: the directory `layers/NAME` is whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in super::super) struct LayerRecord {
    pub(super) version: u32,
    pub(in super::super) diff_id: Digest,
    pub(super) compressed: Digest,
    pub(super) compressed_bytes: u64,
    pub(in super::super) disk_bytes: u64,
    pub(in super::super) inodes: u64,
    /// It hides every layer below.
    pub(in super::super) opaque: bool,
    /// The boot in which it was unpacked: later ones trust it only where an image was published with it, after a sync.
    pub(super) boot: String,
}

/// A tag and when it was pulled, in nanoseconds since 1970: of two images that claim it the later one has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tag {
    pub(super) reference: String,
    pub(super) at: u64,
}

/// `images/HEX.json`: everything about an image, its own documents word for word.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) version: u32,
    pub(super) id: Digest,
    pub(super) tags: Vec<Tag>,
    pub(super) digests: Vec<String>,
    pub(super) pulled_at: u64,
    pub(super) manifest_digest: Digest,
    pub(super) manifest: String,
    pub(super) config: String,
}

/// Reads a record. `None`: it is damaged or of a newer form; what is wrong is logged.
pub(super) fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Option<T>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_RECORD).read_to_end(&mut text)?;
    #[derive(Deserialize)]
    struct Form {
        version: u32,
    }
    let parsed = serde_json::from_slice::<Form>(&text).and_then(|form| {
        let known = form.version <= VERSION;
        if known { serde_json::from_slice(&text).map(Some) } else { Ok(None) }
    });
    match parsed {
        Ok(Some(record)) => Ok(Some(record)),
        Ok(None) => {
            tracing::warn!(path = %path.display(), "image store record is of a newer release");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "image store record is damaged");
            Ok(None)
        }
    }
}

/// Writes a record beside its place; [`publish`] gives it its name. With `durable` its bytes are on disk when this returns.
pub(super) fn prepare(path: &Path, record: &impl Serialize, durable: bool) -> io::Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!("{TEMPORARY}{name}"));
    let write = || {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        if durable { file.sync_all() } else { Ok(()) }
    };
    write().inspect_err(|_| discard(&temporary))?;
    Ok(temporary)
}

/// Gives a prepared record its name.
pub(super) fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    std::fs::rename(temporary, path).inspect_err(|_| discard(temporary))
}

fn discard(temporary: &Path) {
    // Start-up removes what stays.
    let _ = std::fs::remove_file(temporary);
}

/// Removes a record. One that is not there is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens a directory.
pub(super) fn directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Names made and removed in a directory are on disk when this returns.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::fsync(directory(path)?)?)
}
