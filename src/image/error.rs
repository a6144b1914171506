//! What can go wrong with an image, as the service sees it.

use std::io;
use std::path::PathBuf;

use super::reference::BadReference;
use crate::errchain::{Kind, Kinded};

/// Why an operation on images failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A reference can't be read.
    #[error("image reference {reference:?} is not valid")]
    Reference {
        /// The reference, cut to 300 characters.
        reference: String,
        /// Why.
        source: BadReference,
    },
    /// More than one image has an id that begins so.
    #[error("image id {prefix:?} is ambiguous")]
    Ambiguous {
        /// The digits.
        prefix: String,
    },
    /// Another process has the store open.
    #[error("image store {path} is in use by another process")]
    Locked {
        /// The store's root.
        path: PathBuf,
    },
    /// The store can't be read or written.
    #[error("cannot {action} {path}")]
    Store {
        /// What was to be done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A layer that was to be leased is not there.
    #[error("layer {name:?} is not in the image store")]
    NoLayer {
        /// Its name.
        name: String,
    },
    /// The image was not pulled.
    #[error("cannot pull image {reference}")]
    NotPulled {
        /// The reference.
        reference: String,
    },
}

impl Kinded for ImageError {
    fn kind(&self) -> Kind {
        match self {
            ImageError::Reference { .. } | ImageError::Ambiguous { .. } => Kind::InvalidArgument,
            ImageError::Locked { .. } => Kind::FailedPrecondition,
            ImageError::Store { source, .. } => io_kind(source),
            ImageError::NoLayer { .. } => Kind::NotFound,
            ImageError::NotPulled { .. } => Kind::Unimplemented,
        }
    }
}

/// The kind of a failed system call: a full disk is a limit reached.
pub(super) fn io_kind(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Kind::ResourceExhausted,
        _ => Kind::Internal,
    }
}
