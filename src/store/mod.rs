//! What the daemon must know again after it was killed: records of sandboxes and containers, and the journal of operations.
//!
//! Small JSON files on tmpfs, each replaced as a whole (tmp → rename, no fsync: what is on tmpfs dies with the kernel and
//! not before). Not a database: the index is the service's, in memory, and is made anew from these files at start.

pub mod journal;
pub mod record;

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::errchain::{Kind, Kinded};

/// A file of the state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It can't be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It can't be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It can't be removed.
    #[error("cannot remove {path}")]
    Remove {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Its content is not what it must be.
    #[error("{path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// Another daemon has the directory.
    #[error("{path} is in use by another daemon")]
    Locked {
        /// The directory.
        path: PathBuf,
    },
}

impl Kinded for StoreError {
    fn kind(&self) -> Kind {
        match self {
            StoreError::Write { source, .. } if source.raw_os_error().is_some_and(|n| n == libc::ENOSPC || n == libc::EDQUOT) => {
                Kind::ResourceExhausted
            }
            StoreError::Locked { .. } => Kind::FailedPrecondition,
            _ => Kind::Internal,
        }
    }
}

/// Replaces a file: the old content or the new is there, never a part of either.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let failed = |source| StoreError::Write { path: path.into(), source };
    let tmp = path.with_extension("tmp");
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&tmp)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&tmp, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&tmp);
        failed(error)
    })
}

/// Makes a directory and its parents, 0700.
pub fn make_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| StoreError::Write { path: path.into(), source })
}

/// Removes a file or a whole directory; one that is gone is no error.
pub fn remove_all(path: &Path) -> Result<(), StoreError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::Remove { path: path.into(), source: error }),
        _ => Ok(()),
    }
}

/// Holds a directory for this process alone, until it is dropped or the process ends.
pub struct Lock {
    _file: fs::File,
}

/// Takes the lock of a directory.
pub fn lock(dir: &Path) -> Result<Lock, StoreError> {
    let path = dir.join("lock");
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| StoreError::Write { path: path.clone(), source })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock { _file: file }),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked { path: dir.into() }),
        Err(error) => Err(StoreError::Write { path, source: error.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_once() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        assert!(matches!(lock(dir.path()), Err(StoreError::Locked { .. })));
        drop(held);
        lock(dir.path()).unwrap();
    }

    #[test]
    fn replacing_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        remove_all(&path).unwrap();
        remove_all(&path).unwrap();
    }
}
