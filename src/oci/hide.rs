//! Masked and read-only paths of a container, put over what is mounted. Called in init.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::devices;
use super::paths::{PathError, Root};
use crate::errchain::{Kind, Kinded};
use crate::sys::mount::{self, Attributes, NewFs, NewFsError};

/// A path that cannot be hidden or protected.
#[derive(Debug, thiserror::Error)]
pub enum HideError {
    /// The path can't be resolved.
    #[error("cannot find what to protect")]
    Find(#[source] PathError),
    /// The path can't be masked.
    #[error("cannot mask {path}")]
    Mask {
        /// The path in the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The empty directory for masked ones can't be made.
    #[error("cannot make an empty directory to mask with")]
    Empty(#[source] NewFsError),
    /// What a file was masked with is not the null device.
    #[error("{path} is masked with something that is not the null device")]
    NotNull {
        /// The path in the container.
        path: PathBuf,
    },
    /// The path can't be made read-only.
    #[error("cannot make {path} read-only")]
    Readonly {
        /// The path in the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for HideError {
    fn kind(&self) -> Kind {
        match self {
            HideError::Find(error) => error.kind(),
            _ => Kind::Internal,
        }
    }
}

/// Masks paths; those that don't exist are passed over. `null` is a detached mount of the null device.
pub fn mask(paths: &[PathBuf], null: OwnedFd, root: Root<'_>) -> Result<(), HideError> {
    // The first file or directory takes the detached mount; the others take copies of that one, which is attached by then: a
    // detached mount can't be copied before Linux 6.15.
    let mut null = Cover::Detached(null);
    let mut empty: Option<Cover> = None;
    for path in paths {
        let Some(target) = root.find(path).map_err(HideError::Find)? else { continue };
        let failed = |source: io::Error| HideError::Mask { path: path.clone(), source };
        let stat = rustix::fs::fstat(&target).map_err(|error| failed(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let cover = match empty.take() {
                Some(cover) => cover,
                None => Cover::Detached(empty_directory().map_err(HideError::Empty)?),
            };
            empty = Some(cover.put(target.as_fd()).map_err(failed)?);
        } else {
            null = null.put(target.as_fd()).map_err(failed)?;
            if !devices::is_null(null.fd()).map_err(failed)? {
                return Err(HideError::NotNull { path: path.clone() });
            }
        }
    }
    Ok(())
}

fn empty_directory() -> Result<OwnedFd, NewFsError> {
    let fs = NewFs::open("tmpfs")?;
    fs.set("source", "tmpfs")?;
    fs.options("mode=555,size=4k,nr_inodes=2")?;
    fs.mount(Attributes { readonly: true, nosuid: true, nodev: true, noexec: true, noatime: false })
}

/// A mount that is put over paths.
enum Cover {
    Detached(OwnedFd),
    Attached(OwnedFd),
}

impl Cover {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Cover::Detached(fd) | Cover::Attached(fd) => fd.as_fd(),
        }
    }

    fn put(self, target: BorrowedFd<'_>) -> io::Result<Self> {
        match self {
            Cover::Detached(fd) => {
                mount::attach(fd.as_fd(), target)?;
                Ok(Cover::Attached(fd))
            }
            Cover::Attached(fd) => {
                let copy = mount::clone_tree(fd.as_fd(), false)?;
                mount::attach(copy.as_fd(), target)?;
                Ok(Cover::Attached(fd))
            }
        }
    }
}

/// Makes paths read-only, with all that is mounted below; those that don't exist are passed over.
pub fn protect(paths: &[PathBuf], root: Root<'_>) -> Result<(), HideError> {
    paths.iter().try_for_each(|path| protect_one(path, root))
}

fn protect_one(path: &Path, root: Root<'_>) -> Result<(), HideError> {
    let Some(target) = root.find(path).map_err(HideError::Find)? else { return Ok(()) };
    let failed = |source: io::Error| HideError::Readonly { path: path.into(), source };
    let tree = mount::clone_tree(target.as_fd(), true).map_err(failed)?;
    // A copy keeps nosuid, nodev and noexec of the mount it is of.
    mount::set_attributes(tree.as_fd(), Attributes { readonly: true, ..Attributes::default() }, true).map_err(failed)?;
    mount::attach(tree.as_fd(), target.as_fd()).map_err(failed)
}
