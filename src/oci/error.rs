//! What can go wrong in the embedded runtime.

use crate::errchain::{Kind, Kinded, Remote};

/// An operation of the embedded runtime that failed.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// A process that this one had started failed; its own chain follows.
    #[error("container process could not be set up")]
    Init(#[source] Remote),
    /// Not built yet.
    #[error("{0} is not built yet")]
    Unbuilt(&'static str),
}

impl Kinded for OciError {
    fn kind(&self) -> Kind {
        match self {
            OciError::Init(remote) => remote.kind(),
            OciError::Unbuilt(_) => Kind::Unimplemented,
        }
    }
}
