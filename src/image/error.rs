//! What can go wrong with an image, as the service sees it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::config::BadConfig;
use super::digest::Digest;
use super::manifest::ManifestError;
use super::reference::{BadReference, Reference};
use super::registries::RegistriesError;
use super::registry::RegistryError;
use super::unpack::UnpackError;
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
    /// A short name stands for nothing, or for too much.
    #[error("image has a short name")]
    ShortName {
        /// Why that is no name.
        source: RegistriesError,
    },
    /// registries.conf can't be read, and never could be.
    #[error("cannot tell where images come from")]
    Registries {
        /// Why.
        source: Arc<RegistriesError>,
    },
    /// None of the registries that a short name may mean has the image.
    #[error("short name {name:?} is found in no registry; before the last: {before}")]
    NotFoundAnywhere {
        /// The name.
        name: String,
        /// The errors of those tried first.
        before: String,
        /// That of the last.
        source: Box<ImageError>,
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
    /// The registry can't be reached or is out of order. kubelet knows the first word (k8s.io/cri-api/pkg/errors).
    #[error("RegistryUnavailable: cannot pull image {reference}")]
    RegistryUnavailable {
        /// The reference.
        reference: String,
        /// Why.
        source: Arc<PullError>,
    },
    /// The image was not pulled. Whoever waited for the same pull gets the same cause.
    #[error("cannot pull image {reference}")]
    Pull {
        /// The reference.
        reference: String,
        /// Why.
        source: Arc<PullError>,
    },
    /// A thread of the store's own failed.
    #[error("an operation on the image store was cut short")]
    Thread {
        /// How.
        source: tokio::task::JoinError,
    },
}

impl Kinded for ImageError {
    fn kind(&self) -> Kind {
        match self {
            ImageError::Reference { .. } | ImageError::Ambiguous { .. } => Kind::InvalidArgument,
            ImageError::ShortName { source } => source.kind(),
            ImageError::Registries { source } => source.kind(),
            ImageError::NotFoundAnywhere { source, .. } => source.kind(),
            ImageError::Locked { .. } => Kind::FailedPrecondition,
            ImageError::Store { source, .. } => io_kind(source),
            ImageError::NoLayer { .. } => Kind::NotFound,
            ImageError::RegistryUnavailable { source, .. } | ImageError::Pull { source, .. } => source.kind(),
            ImageError::Thread { .. } => Kind::Internal,
        }
    }
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// registries.conf can't be used, or forbids it.
    #[error("no source for the image")]
    Registries {
        /// Why.
        source: RegistriesError,
    },
    /// A registry did not give what was asked.
    #[error("cannot fetch it")]
    Registry {
        /// Why.
        source: RegistryError,
    },
    /// The manifest is refused.
    #[error("its manifest is refused")]
    Manifest {
        /// Why.
        source: ManifestError,
    },
    /// Lists that lead to lists without end.
    #[error("its manifest is a list in more than {limit} lists")]
    Nested {
        /// How many are followed.
        limit: usize,
    },
    /// The configuration is refused.
    #[error("its configuration is refused")]
    Config {
        /// Why.
        source: BadConfig,
    },
    /// A document is no text.
    #[error("its manifest or configuration is no UTF-8")]
    Text {
        /// Where.
        source: std::string::FromUtf8Error,
    },
    /// Manifest and configuration contradict each other.
    #[error("its manifest has {manifest} layers, its configuration {config}")]
    LayerCount {
        /// In the manifest.
        manifest: usize,
        /// In the configuration.
        config: usize,
    },
    /// A layer can't be unpacked or is not what it should be.
    #[error("cannot unpack layer {layer}")]
    Layer {
        /// Its digest.
        layer: Digest,
        /// Why.
        source: UnpackError,
    },
    /// The store can't be written.
    #[error("cannot store it")]
    Store {
        /// Why.
        source: Box<ImageError>,
    },
    /// A thread ended without an answer.
    #[error("the pull was cut short")]
    Thread {
        /// How.
        source: tokio::task::JoinError,
    },
    /// The task of the pull ended without an answer.
    #[error("the pull ended without an answer")]
    Vanished,
}

impl Kinded for PullError {
    fn kind(&self) -> Kind {
        match self {
            PullError::Registries { source } => source.kind(),
            PullError::Registry { source } => source.kind(),
            PullError::Manifest { source } => source.kind(),
            PullError::Layer { source, .. } => source.kind(),
            PullError::Store { source } => source.kind(),
            PullError::Nested { .. } | PullError::Config { .. } | PullError::Text { .. } | PullError::LayerCount { .. } => Kind::FailedPrecondition,
            PullError::Thread { .. } | PullError::Vanished => Kind::Internal,
        }
    }
}

impl ImageError {
    /// The failure of a pull, as each of those who waited for it gets it.
    pub(super) fn pull(reference: &Reference, source: Arc<PullError>) -> Self {
        let reference = reference.to_string();
        match source.kind() {
            Kind::Unavailable => ImageError::RegistryUnavailable { reference, source },
            _ => ImageError::Pull { reference, source },
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
