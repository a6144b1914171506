//! Errors that keep their causes: the chain on one line, the kind of a failure, and both sent whole to another process.
//!
//! An error variant names the operation that failed and what it was about; its cause is the `source`. Nothing prints a
//! cause into its own text. The chain is printed once, at the edge, with [`Chain`]. A process that fails on behalf of
//! another (a creator for the monitor, the monitor for the daemon) sends a [`Remote`].

use std::error::Error;
use std::fmt;

use crate::wire::{Reader, Wire, WireError};

/// What sort of failure an error is, in the terms a caller can act on. `cri::rpc` alone turns it into a gRPC code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Our fault or the node's: nothing the caller can change in its request.
    #[default]
    Internal,
    /// The request itself is wrong, whatever the state of the node.
    InvalidArgument,
    /// The object named does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The object is not in a state that allows this.
    FailedPrecondition,
    /// A deadline passed.
    DeadlineExceeded,
    /// A limit of the node or of the configuration is reached.
    ResourceExhausted,
    /// Something needed is not there now; the same request may succeed later.
    Unavailable,
    /// Not built yet, or not available on this node.
    Unimplemented,
    /// Refused by a policy or by the other side.
    PermissionDenied,
    /// Credentials are missing or wrong.
    Unauthenticated,
    /// The operation was given up.
    Aborted,
}

impl Kind {
    const ALL: [Kind; 12] = [
        Kind::Internal,
        Kind::InvalidArgument,
        Kind::NotFound,
        Kind::AlreadyExists,
        Kind::FailedPrecondition,
        Kind::DeadlineExceeded,
        Kind::ResourceExhausted,
        Kind::Unavailable,
        Kind::Unimplemented,
        Kind::PermissionDenied,
        Kind::Unauthenticated,
        Kind::Aborted,
    ];
}

impl Wire for Kind {
    fn put(&self, out: &mut Vec<u8>) {
        (*self as u32).put(out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        // A kind that a newer process knows and this one doesn't is still an error: Internal.
        let n = u32::get(input)?;
        Ok(Kind::ALL.get(n as usize).copied().unwrap_or_default())
    }
}

/// Errors that know their [`Kind`].
pub trait Kinded: Error + Send + Sync + 'static {
    /// What sort of failure this is.
    fn kind(&self) -> Kind;
}

/// Displays an error with all its causes: `cannot create container: cannot mount overlay: permission denied`.
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// The links of a chain, outermost first.
pub fn links(error: &dyn Error) -> Vec<String> {
    let mut links = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        links.push(error.to_string());
        cause = error.source();
    }
    links
}

/// An error that happened in another process: its kind and every link of its chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Remote {
    kind: Kind,
    text: String,
    cause: Option<Box<Remote>>,
}

/// Links kept of a chain, and bytes of each: an error must fit one message whatever a path in it was.
const MAX_LINKS: usize = 16;
const MAX_LINK: usize = 2048;

impl Remote {
    /// From a typed error.
    pub fn new(error: &dyn Kinded) -> Self {
        Self::from_links(error.kind(), links(error))
    }

    /// An error of one link.
    pub fn text(kind: Kind, text: impl Into<String>) -> Self {
        Self::from_links(kind, vec![text.into()])
    }

    /// From texts, outermost first. Long texts and long chains are cut.
    pub fn from_links(kind: Kind, mut links: Vec<String>) -> Self {
        links.truncate(MAX_LINKS);
        let mut cause = None;
        for mut text in links.into_iter().rev() {
            if text.len() > MAX_LINK {
                let cut = (0..=MAX_LINK).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
                text.truncate(cut);
                text.push('…');
            }
            cause = Some(Box::new(Remote { kind, text, cause }));
        }
        cause.map(|boxed| *boxed).unwrap_or_default()
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Remote {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
    }
}

impl Kinded for Remote {
    fn kind(&self) -> Kind {
        self.kind
    }
}

impl Wire for Remote {
    fn put(&self, out: &mut Vec<u8>) {
        self.kind.put(out);
        links(self).put(out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let kind = Kind::get(input)?;
        Ok(Remote::from_links(kind, Vec::<String>::get(input)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_crosses_the_wire_whole() {
        let remote = Remote::from_links(Kind::NotFound, vec!["a".into(), "b".into(), "c".into()]);
        let mut out = Vec::new();
        remote.put(&mut out);
        let back = Remote::get(&mut Reader::new(&out)).unwrap();
        assert_eq!(back, remote);
        assert_eq!(Chain(&back).to_string(), "a: b: c");
        assert_eq!(back.kind(), Kind::NotFound);
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let remote = Remote::text(Kind::Internal, "ä".repeat(5000));
        assert!(remote.to_string().len() <= MAX_LINK + 3);
    }
}
