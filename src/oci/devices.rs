//! What stands in a container's /dev, and devices elsewhere.
//!
//! Everything in /dev is made in the tmpfs while it is still detached, by the creator: nothing else can see it, and the container's
//! device rules, which might forbid mknod, do not apply yet. What is to stand elsewhere is made by init, in the mounted root.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};

use super::paths::{Leaf, Links, PathError, Root};
use crate::errchain::{Kind, Kinded};
use crate::plan::DeviceNode;

/// A /dev that cannot be filled.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A device in place of the root.
    #[error("device {path} has no name")]
    Name {
        /// Its path in the container.
        path: PathBuf,
    },
    /// A device that is neither block nor character nor FIFO.
    #[error("device {path} is of unknown type {kind}")]
    Kind {
        /// Its path in the container.
        path: PathBuf,
        /// The type's character code.
        kind: u32,
    },
    /// A node that cannot be made.
    #[error("cannot make {path} in the container")]
    Make {
        /// Its path in the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory for a node cannot be made.
    #[error("cannot make the directory of a device")]
    Directory(#[source] PathError),
    /// The host's /dev/null cannot be used.
    #[error("cannot open the host's /dev/null")]
    OpenNull(#[source] io::Error),
    /// The host's /dev/null is something else.
    #[error("the host's /dev/null is not the null device")]
    NotNull,
}

impl Kinded for DeviceError {
    fn kind(&self) -> Kind {
        match self {
            DeviceError::Name { .. } | DeviceError::Kind { .. } => Kind::InvalidArgument,
            DeviceError::Directory(error) => error.kind(),
            DeviceError::Make { .. } | DeviceError::OpenNull(_) | DeviceError::NotNull => Kind::Internal,
        }
    }
}

/// Name, major and minor number of the devices every container has (runtime-spec, config-linux, "Default Devices").
const DEFAULT: [(&str, u32, u32); 6] = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Symbolic links that every /dev has (runtime-spec, runtime-linux, "Dev symbolic links").
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
    ("core", "/proc/kcore"),
];

/// Fills a detached /dev. The caller's umask must be 0. `owner`: the container's root on the host, where it is another than the host's.
/// The devices of the plan keep their owners: a user namespace is no way to the host's disks.
pub fn fill(dev: BorrowedFd<'_>, devices: &[DeviceNode], owner: Option<(u32, u32)>) -> Result<(), DeviceError> {
    // A device of the plan takes the place of ours by its name.
    let taken = |name: &str| devices.iter().any(|device| device.path == Path::new("/dev").join(name));
    for (name, major, minor) in DEFAULT.iter().filter(|(name, ..)| !taken(name)) {
        node(dev, Path::new(name), FileType::CharacterDevice, 0o666, (*major, *minor))?;
        if let Some((uid, gid)) = owner {
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            let failed = |error: rustix::io::Errno| make_error(&Path::new("/dev").join(name), error.into());
            rustix::fs::chownat(dev, *name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        }
    }
    for (name, target) in LINKS.iter().filter(|(name, _)| !taken(name)) {
        rustix::fs::symlinkat(*target, dev, *name).map_err(|error| make_error(&Path::new("/dev").join(name), error.into()))?;
    }
    devices
        .iter()
        .filter_map(|device| Some((device, in_dev(&device.path)?)))
        .try_for_each(|(device, below)| planned(Root(dev), device, &Path::new("/").join(below), Links::Refuse))
}

/// Makes the devices that are not in /dev, once everything is mounted. One that is there already is left as it is.
pub fn outside(devices: &[DeviceNode], root: Root<'_>) -> Result<(), DeviceError> {
    devices.iter().filter(|device| in_dev(&device.path).is_none()).try_for_each(|device| match planned(root, device, &device.path, Links::Follow) {
        Err(DeviceError::Make { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists && is_there(root, device) => Ok(()),
        done => done,
    })
}

fn in_dev(path: &Path) -> Option<&Path> {
    path.strip_prefix("/dev").ok()
}

fn is_there(root: Root<'_>, device: &DeviceNode) -> bool {
    let stat = root.find(&device.path).ok().flatten().and_then(|fd| rustix::fs::fstat(fd).ok());
    stat.is_some_and(|stat| {
        Some(FileType::from_raw_mode(stat.st_mode)) == kind(device) && stat.st_rdev == rustix::fs::makedev(device.major, device.minor)
    })
}

fn kind(device: &DeviceNode) -> Option<FileType> {
    match char::from_u32(device.kind)? {
        'c' | 'u' => Some(FileType::CharacterDevice),
        'b' => Some(FileType::BlockDevice),
        'p' => Some(FileType::Fifo),
        _ => None,
    }
}

/// Makes a device at `path`, which is below this root.
fn planned(root: Root<'_>, device: &DeviceNode, path: &Path, links: Links) -> Result<(), DeviceError> {
    let kind = kind(device).ok_or_else(|| DeviceError::Kind { path: device.path.clone(), kind: device.kind })?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(DeviceError::Name { path: device.path.clone() }) };
    let parent = root.make(parent, Leaf::Directory, links).map_err(DeviceError::Directory)?;
    let failed = |error: rustix::io::Errno| make_error(&device.path, error.into());
    let numbers = rustix::fs::makedev(device.major, device.minor);
    rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(device.mode & 0o7777), numbers).map_err(failed)?;
    let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
    rustix::fs::chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
}

fn node(dev: BorrowedFd<'_>, name: &Path, kind: FileType, mode: u32, (major, minor): (u32, u32)) -> Result<(), DeviceError> {
    rustix::fs::mknodat(dev, name, kind, Mode::from_raw_mode(mode), rustix::fs::makedev(major, minor))
        .map_err(|error| make_error(&Path::new("/dev").join(name), error.into()))
}

fn make_error(path: &Path, source: io::Error) -> DeviceError {
    DeviceError::Make { path: path.into(), source }
}

/// A detached mount of the host's /dev/null, which is checked to be that: masked files go under it (CVE-2025-31133).
pub fn null() -> Result<OwnedFd, DeviceError> {
    let null = rustix::fs::openat(CWD, c"/dev/null", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| DeviceError::OpenNull(error.into()))?;
    if !is_null(null.as_fd()).map_err(DeviceError::OpenNull)? {
        return Err(DeviceError::NotNull);
    }
    crate::sys::mount::clone_tree(null.as_fd(), false).map_err(DeviceError::OpenNull)
}

/// Whether a descriptor is open on the null device.
pub fn is_null(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3))
}
