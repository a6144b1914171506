//! What stands in a container's /dev.
//!
//! Everything is made in the tmpfs while it is still detached, by the creator: nothing else can see it, and the container's
//! device rules, which might forbid mknod, do not apply yet.

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
    /// A device that is not in /dev.
    #[error("device {path} is not in /dev")]
    Outside {
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
            DeviceError::Outside { .. } | DeviceError::Kind { .. } => Kind::InvalidArgument,
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

/// Fills a detached /dev. The caller's umask must be 0.
pub fn fill(dev: BorrowedFd<'_>, devices: &[DeviceNode]) -> Result<(), DeviceError> {
    for (name, major, minor) in DEFAULT {
        // A device of the plan by that name takes its place.
        if devices.iter().any(|device| device.path == Path::new("/dev").join(name)) {
            continue;
        }
        node(dev, Path::new(name), FileType::CharacterDevice, 0o666, (major, minor))?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, dev, name).map_err(|error| make_error(Path::new(name), error.into()))?;
    }
    devices.iter().try_for_each(|device| planned(dev, device))
}

fn planned(dev: BorrowedFd<'_>, device: &DeviceNode) -> Result<(), DeviceError> {
    let outside = || DeviceError::Outside { path: device.path.clone() };
    let below = device.path.strip_prefix("/dev").map_err(|_| outside())?;
    let name = below.file_name().ok_or_else(outside)?;
    let kind = match char::from_u32(device.kind) {
        Some('c' | 'u') => FileType::CharacterDevice,
        Some('b') => FileType::BlockDevice,
        Some('p') => FileType::Fifo,
        _ => return Err(DeviceError::Kind { path: device.path.clone(), kind: device.kind }),
    };
    let parent = match below.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            let parent = Path::new("/").join(parent);
            Some(Root(dev).make(&parent, Leaf::Directory, Links::Refuse).map_err(DeviceError::Directory)?)
        }
        _ => None,
    };
    let parent = parent.as_ref().map_or(dev, |fd| fd.as_fd());
    node(parent, Path::new(name), kind, device.mode & 0o7777, (device.major, device.minor))?;
    let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
    rustix::fs::chownat(parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| make_error(below, error.into()))
}

fn node(at: BorrowedFd<'_>, name: &Path, kind: FileType, mode: u32, (major, minor): (u32, u32)) -> Result<(), DeviceError> {
    rustix::fs::mknodat(at, name, kind, Mode::from_raw_mode(mode), rustix::fs::makedev(major, minor)).map_err(|error| make_error(name, error.into()))
}

fn make_error(name: &Path, source: io::Error) -> DeviceError {
    DeviceError::Make { path: Path::new("/dev").join(name), source }
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
