//! Network namespaces with a path: pinned by a bind mount, so that plugins find them and they outlive their makers.
//!
//! Unlike `ip netns add`, this leaves the directory's own mount as it is: nothing is made a mount point or shared.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::errchain::{Kind, Kinded};
use crate::sys::fd::proc_path;

/// What can fail about a pin.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}")]
pub struct NetnsError {
    /// `pin a network namespace at`, `look at the namespace at`, `unpin the namespace at`, `read the interfaces of`.
    pub what: &'static str,
    /// The path.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl Kinded for NetnsError {
    fn kind(&self) -> Kind {
        match self.source.kind() {
            io::ErrorKind::AlreadyExists => Kind::AlreadyExists,
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::TimedOut => Kind::DeadlineExceeded,
            _ => Kind::Internal,
        }
    }
}

/// statfs(2)'s type of namespace files (include/uapi/linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// Mounts that are taken off one path: more than one only if somebody else stacked them.
const MAX_STACK: usize = 16;

/// Binds a network namespace to a new file; its directory is made if it is not there. A file that is there already is an error, also
/// one that a crash left without a namespace: [`unpin`] it first.
pub fn pin(netns: BorrowedFd<'_>, path: &Path) -> Result<(), NetnsError> {
    let failed = |source| NetnsError { what: "pin a network namespace at", path: path.to_path_buf(), source };
    let bind = || -> io::Result<()> {
        if !is_netns(netns)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no namespace"));
        }
        if let Some(dir) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        }
        drop(rustix::fs::open(path, OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty())?);
        rustix::mount::mount_bind(proc_path(netns), path).map_err(|error| {
            let _ = std::fs::remove_file(path);
            error.into()
        })
    };
    bind().map_err(failed)
}

/// Lets go of a pinned namespace and removes its file, whatever of it is there: after a crash between two steps too. The namespace
/// lives on while a process or a descriptor is in it.
pub fn unpin(path: &Path) -> Result<(), NetnsError> {
    let failed = |source| NetnsError { what: "unpin the namespace at", path: path.to_path_buf(), source };
    for _ in 0..MAX_STACK {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, any more or at all; or not there.
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(error) => return Err(failed(error.into())),
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Whether there is a namespace at a path. A path that is not there, or a plain file that a crash or a reboot left, is none.
pub fn is_pinned(path: &Path) -> Result<bool, NetnsError> {
    let failed = |source: io::Error| NetnsError { what: "look at the namespace at", path: path.to_path_buf(), source };
    match open(path) {
        Ok(fd) => is_netns(fd.as_fd()).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Opens the namespace, or whatever is at the path: without following a last symbolic link, and without waiting for a FIFO's writer.
pub(super) fn open(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK, Mode::empty())?)
}

fn is_netns(fd: BorrowedFd<'_>) -> io::Result<bool> {
    #[allow(clippy::unnecessary_cast)] // The field's type differs between architectures.
    Ok(rustix::fs::fstatfs(fd)?.f_type as i64 == NSFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_are_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/here/ns");
        let file = std::fs::File::open(dir.path()).unwrap();
        assert!(pin(file.as_fd(), &path).is_err());
        assert!(!path.exists());
        assert!(!is_pinned(&path).unwrap());
        std::fs::write(dir.path().join("plain"), "").unwrap();
        assert!(!is_pinned(&dir.path().join("plain")).unwrap());
    }

    #[test]
    fn unpin_takes_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ns");
        unpin(&path).unwrap();
        // As a crash between the file and the mount leaves it.
        std::fs::write(&path, "").unwrap();
        unpin(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_link_is_no_pin() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        std::os::unix::fs::symlink("/proc/self/ns/net", &path).unwrap();
        assert!(is_pinned(&path).is_err(), "a namespace, but not one that is pinned here");
        unpin(&path).unwrap();
        assert!(std::fs::symlink_metadata(&path).is_err());
    }
}
