//! An image as a mount of a container (KEP-4639): its layers with nothing writable on top, or a part of them.
//!
//! Called by a creator in the host's mount namespace. The image is as hostile as a container's own: its sub-path is resolved by
//! openat2(2) within it. Nobody can change it meanwhile, since the overlay is read-only and out of everybody's sight.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};

use super::mounts::Sources;
use super::paths::{Leaf, PathError, Root};
use super::root::{self, Prepared, RootError};
use super::sandbox;
use crate::errchain::{Kind, Kinded};
use crate::plan::ImageMount;
use crate::sys::mount::{self, Propagation};
use crate::sys::ns;

/// An image that cannot be mounted. kubelet knows the first word (k8s.io/cri-api/pkg/errors).
#[derive(Debug, thiserror::Error)]
pub enum ImageVolumeError {
    /// The layers can't be put together.
    #[error("ImageVolumeMountFailed: cannot put the image's layers together")]
    Layers(#[source] RootError),
    /// A place to take a part of the image from.
    #[error("ImageVolumeMountFailed: cannot attach the image where nobody sees it")]
    Stage(#[source] io::Error),
    /// The sub-path can't be opened.
    #[error("ImageVolumeMountFailed: cannot open sub-path {path} in the image")]
    SubPath {
        /// The sub-path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The sub-path is neither a file nor a directory.
    #[error("ImageVolumeMountFailed: sub-path {path} in the image is neither a directory nor a regular file")]
    SubPathType {
        /// The sub-path.
        path: PathBuf,
    },
    /// The sub-path can't be bound.
    #[error("ImageVolumeMountFailed: cannot bind sub-path {path} of the image")]
    Bind {
        /// The sub-path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for ImageVolumeError {
    fn kind(&self) -> Kind {
        match self {
            // What the image lacks is for whoever named it to change.
            ImageVolumeError::SubPath { .. } | ImageVolumeError::SubPathType { .. } => Kind::InvalidArgument,
            ImageVolumeError::Layers(error) => error.kind(),
            ImageVolumeError::Stage(_) | ImageVolumeError::Bind { .. } => Kind::Internal,
        }
    }
}

/// A detached mount of the image or of its sub-path, and what it is to be mounted on. `mountpoint` is an empty directory of the
/// host's.
pub fn prepare(image: &ImageMount, mountpoint: &Path, from: Sources<'_>) -> Result<(OwnedFd, Leaf), ImageVolumeError> {
    let (host, staging) = (from.host, from.staging);
    let whole = match (from.user, staging) {
        (Some(user), Some(staging)) => root::mapped_overlay(&image.layers, user, staging, host).map(Prepared::Detached),
        _ => root::overlay_by_fd(&image.layers),
    };
    match whole.map_err(ImageVolumeError::Layers)? {
        Prepared::Detached(tree) if image.sub_path.as_os_str().is_empty() => Ok((tree, Leaf::Directory)),
        whole => {
            let part = in_private(image, whole, mountpoint, staging);
            host.come_back().map_err(ImageVolumeError::Stage)?;
            part
        }
    }
}

/// Attaches the image in a mount namespace that ends with this call, and takes what is wanted out of it: before Linux 6.15 only
/// what is attached can be bound.
fn in_private(
    image: &ImageMount,
    whole: Prepared<'_>,
    mountpoint: &Path,
    staging: Option<BorrowedFd<'_>>,
) -> Result<(OwnedFd, Leaf), ImageVolumeError> {
    // A new mount namespace is a copy: of the staging one, with its two mounts, where no path of the host's is needed any more.
    let on = match (&whole, staging) {
        (Prepared::Detached(_), Some(staging)) => {
            ns::enter(staging, ns::Kind::Mount).map_err(ImageVolumeError::Stage)?;
            Path::new(sandbox::STAGED_ROOT)
        }
        _ => mountpoint,
    };
    let private = ns::unshare(&[ns::Kind::Mount]).and_then(|()| mount::set_propagation_of_all(Propagation::Private));
    private.map_err(ImageVolumeError::Stage)?;
    let tree = match whole {
        Prepared::Detached(tree) => {
            mount::attach_at(tree.as_fd(), on).map_err(ImageVolumeError::Stage)?;
            tree
        }
        Prepared::InPlace(layers) => root::mount_in_place(layers, on).and_then(|()| root::open_directory(on)).map_err(ImageVolumeError::Layers)?,
    };
    let path = &image.sub_path;
    let failed = |source: io::Error| ImageVolumeError::SubPath { path: path.clone(), source };
    let part = match path.as_os_str().is_empty() {
        true => tree,
        false => Root(tree.as_fd()).open(path, OFlags::PATH).map_err(|error| match error {
            PathError::Open { source, .. } => failed(source),
            error => failed(io::Error::other(error)),
        })?,
    };
    let stat = rustix::fs::fstat(&part).map_err(|error| failed(error.into()))?;
    let leaf = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Leaf::Directory,
        FileType::RegularFile => Leaf::File,
        _ => return Err(ImageVolumeError::SubPathType { path: path.clone() }),
    };
    let bound = mount::clone_tree(part.as_fd(), false).map_err(|source| ImageVolumeError::Bind { path: path.clone(), source })?;
    Ok((bound, leaf))
}
