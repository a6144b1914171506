//! SELinux labels of volumes, where the CRI asks for them.
//!
//! Called by a creator in the host's mount namespace, for the source of a bind. Relabelling a directory of the system's own would
//! take the node from every other process (CVE-2021-43816): those are refused. Entries are named by their directory's descriptor
//! and one component, and no link is followed: a container that writes the same volume leads the walk nowhere else.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

use crate::errchain::{Kind, Kinded};
use crate::sys::fd::proc_path;

/// Labels that cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum RelabelError {
    /// A directory of the system.
    #[error("relabelling {path} is refused: the whole node depends on its labels")]
    System {
        /// The directory, with all links resolved.
        path: PathBuf,
    },
    /// A label can't be set, or an entry can't be read.
    #[error("cannot set the label of {path}")]
    Set {
        /// The entry.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for RelabelError {
    fn kind(&self) -> Kind {
        match self {
            RelabelError::System { .. } => Kind::InvalidArgument,
            RelabelError::Set { .. } => Kind::Internal,
        }
    }
}

const ATTRIBUTE: &str = "security.selinux";
/// What is never relabelled: neither these nor, by them, everything below.
const SYSTEM: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
];
/// Likewise with everything below.
const SYSTEM_TREES: [&str; 5] = ["/boot", "/dev", "/proc", "/sys", "/usr"];

/// Gives `top` (an O_PATH descriptor will do) and everything below it on its filesystem this label. What has it already is not
/// written. A filesystem without labels is left as it is.
pub fn relabel(top: BorrowedFd<'_>, label: &str) -> Result<(), RelabelError> {
    let path = std::fs::read_link(proc_path(top)).map_err(|source| RelabelError::Set { path: PathBuf::new(), source })?;
    if is_system(&path) {
        return Err(RelabelError::System { path });
    }
    let failed = |error: Errno| RelabelError::Set { path: path.clone(), source: error.into() };
    let stat = rustix::fs::fstat(top).map_err(failed)?;
    // Through the descriptor's own link in /proc, which leads to what it is open on, whatever has its path now.
    match set(Path::new(&proc_path(top)), label, true) {
        Err(Errno::NOTSUP) => return Ok(()),
        done => done.map_err(failed)?,
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(());
    }
    let mut rest = vec![PathBuf::new()];
    while let Some(relative) = rest.pop() {
        let failed = |error: Errno| RelabelError::Set { path: path.join(&relative), source: error.into() };
        let dir = match open_below(top, &relative) {
            // It was moved or removed meanwhile, or something is mounted there: the label is not ours to set.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => continue,
            dir => dir.map_err(failed)?,
        };
        for entry in Dir::read_from(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let failed = |error: Errno| RelabelError::Set { path: path.join(&relative).join(name), source: error.into() };
            let below = match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                stat => stat.map_err(failed)?,
            };
            if below.st_dev != stat.st_dev {
                continue;
            }
            match set(&Path::new(&proc_path(dir.as_fd())).join(name), label, false) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(failed(error)),
            }
            if FileType::from_raw_mode(below.st_mode) == FileType::Directory {
                rest.push(relative.join(name));
            }
        }
    }
    Ok(())
}

/// Whether nothing of it may be relabelled. `path` has no links.
fn is_system(path: &Path) -> bool {
    SYSTEM.iter().any(|system| path == Path::new(system)) || SYSTEM_TREES.iter().any(|tree| path.starts_with(tree))
}

fn open_below(top: BorrowedFd<'_>, relative: &Path) -> Result<OwnedFd, Errno> {
    let path = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(top, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Sets the label of what `path` names: of a link itself unless `follow`.
fn set(path: &Path, label: &str, follow: bool) -> Result<(), Errno> {
    let mut now = [0u8; 512];
    let n = match follow {
        true => rustix::fs::getxattr(path, ATTRIBUTE, &mut now[..]),
        false => rustix::fs::lgetxattr(path, ATTRIBUTE, &mut now[..]),
    };
    // The kernel gives a label with a final NUL where a policy is loaded, and as it was set where none is.
    if n.is_ok_and(|n| now[..n].strip_suffix(b"\0").unwrap_or(&now[..n]) == label.as_bytes()) {
        return Ok(());
    }
    match follow {
        true => rustix::fs::setxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()),
        false => rustix::fs::lsetxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_directories_are_refused() {
        for path in ["/", "/etc", "/usr", "/usr/share/x", "/var", "/var/lib", "/proc/1", "/dev/shm"] {
            assert!(is_system(Path::new(path)), "{path}");
        }
        for path in ["/var/lib/kubelet/pods/x/volumes/y", "/etc/app", "/srv/data", "/home/user", "/usrx"] {
            assert!(!is_system(Path::new(path)), "{path}");
        }
    }
}
