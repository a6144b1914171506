//! A layer in one pass: compressed bytes in, files out, both digests on the way.
//!
//! Runs on one blocking thread per layer. Nothing here knows of registries or of the store: it is given a directory and a
//! source of bytes, and leaves in the directory what overlayfs takes as a lower directory. On an error the caller throws the
//! directory away.

mod archive;
mod entry;
mod implied;
pub mod remove;
mod tree;

use std::io::{self, BufRead, Read};
use std::os::fd::OwnedFd;

use super::Limits;
use super::digest::{Digest, Hasher};
use crate::errchain::{Kind, Kinded};
pub(super) use implied::settle as settle_implied;

/// What a layer turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// Digest of the bytes as they came.
    pub compressed: Digest,
    /// How many there were.
    pub compressed_bytes: u64,
    /// Digest of the archive.
    pub diff_id: Digest,
    /// Bytes on disk, to the block.
    pub disk_bytes: u64,
    /// Inodes made.
    pub inodes: u64,
    /// The layer hides everything below it.
    pub opaque: bool,
    /// Directories that the archive did not list, parents of what it did: their owner and mode are the lower layers' to say.
    pub implied: Vec<String>,
}

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The bytes stop or can't be decompressed.
    #[error("cannot decompress layer")]
    Decompress {
        /// Why.
        source: io::Error,
    },
    /// A compression that we don't know.
    #[error("layer is compressed with {0}, which is not supported")]
    Compression(&'static str),
    /// The archive is damaged.
    #[error("layer is no valid tar archive")]
    Archive {
        /// Why.
        source: tar_core::parse::ParseError,
    },
    /// The archive stops in the middle.
    #[error("layer ends in the middle of its archive")]
    Cut,
    /// An entry asks for what no layer may have.
    #[error("entry {path:?} of the layer is refused: {why}")]
    Refused {
        /// The entry's path.
        path: String,
        /// Why.
        why: &'static str,
    },
    /// A bound of the configuration is passed.
    #[error("layer has more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// A file can't be made.
    #[error("cannot {action} {path:?}")]
    File {
        /// What was to be done.
        action: &'static str,
        /// The path in the layer.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// What came is not what was promised.
    #[error("layer has {what} {actual}, not {expected}")]
    Mismatch {
        /// Digest, size or diff id.
        what: &'static str,
        /// What the manifest or configuration says.
        expected: String,
        /// What came.
        actual: String,
    },
}

impl Kinded for UnpackError {
    fn kind(&self) -> Kind {
        match self {
            UnpackError::File { source, .. } => super::error::io_kind(source),
            UnpackError::Limit { .. } => Kind::ResourceExhausted,
            UnpackError::Compression(_) => Kind::Unimplemented,
            _ => Kind::FailedPrecondition,
        }
    }
}

/// A source that arrives in pieces and is hashed as it passes. `next` gives the next piece, `None` at the end.
pub struct Pieces<B, F> {
    next: F,
    current: Option<B>,
    at: usize,
    hasher: Hasher,
    bytes: u64,
}

impl<B: AsRef<[u8]>, F: FnMut() -> Option<B>> Pieces<B, F> {
    /// From a function that gives the pieces.
    pub fn new(next: F) -> Self {
        Self { next, current: None, at: 0, hasher: Hasher::default(), bytes: 0 }
    }

    /// Takes all that is left; gives the digest and the number of all bytes.
    pub fn drain(&mut self) -> (Digest, u64) {
        self.current = None;
        self.at = 0;
        while let Some(piece) = (self.next)() {
            self.hasher.update(piece.as_ref());
            self.bytes += piece.as_ref().len() as u64;
        }
        (std::mem::take(&mut self.hasher).finish(), self.bytes)
    }
}

impl<B: AsRef<[u8]>, F: FnMut() -> Option<B>> BufRead for Pieces<B, F> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.as_ref().is_none_or(|piece| self.at == piece.as_ref().len()) {
            self.at = 0;
            self.current = (self.next)();
            match &self.current {
                None => return Ok(&[]),
                Some(piece) => {
                    self.hasher.update(piece.as_ref());
                    self.bytes += piece.as_ref().len() as u64;
                }
            }
        }
        Ok(self.current.as_ref().map_or(&[], |piece| &piece.as_ref()[self.at..]))
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

impl<B: AsRef<[u8]>, F: FnMut() -> Option<B>> Read for Pieces<B, F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(into)?;
        self.consume(n);
        Ok(n)
    }
}

/// What was read ahead to see the compression, then the rest.
struct Sniffed<'a, R> {
    head: &'a [u8],
    rest: &'a mut R,
}

impl<R: BufRead> BufRead for Sniffed<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.head.is_empty() { self.rest.fill_buf() } else { Ok(self.head) }
    }

    fn consume(&mut self, n: usize) {
        if self.head.is_empty() {
            self.rest.consume(n);
        } else {
            self.head = &self.head[n..];
        }
    }
}

impl<R: BufRead> Read for Sniffed<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(into)?;
        self.consume(n);
        Ok(n)
    }
}

/// Bytes that tell one compression from another.
const MAGIC: usize = 6;
/// Largest zstd window (2^27 bytes), as the format's own tools have it by default: memory one layer may ask for.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Unpacks into `root`, an empty directory. The compression is told by the first bytes, whatever the media type said.
pub fn unpack<B, F>(root: OwnedFd, pieces: &mut Pieces<B, F>, limits: &Limits) -> Result<Unpacked, UnpackError>
where
    B: AsRef<[u8]>,
    F: FnMut() -> Option<B>,
{
    let decompress = |source| UnpackError::Decompress { source };
    let mut head = [0; MAGIC];
    let mut filled = 0;
    while filled < MAGIC {
        match pieces.read(&mut head[filled..]).map_err(decompress)? {
            0 => break,
            n => filled += n,
        }
    }
    let head = &head[..filled];
    let mut sniffed = Sniffed { head, rest: pieces };
    let (tree, diff_id) = match head {
        [0x1f, 0x8b, ..] => archive::apply(root, flate2::bufread::MultiGzDecoder::new(&mut sniffed), limits)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(&mut sniffed).map_err(decompress)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(decompress)?;
            archive::apply(root, decoder, limits)?
        }
        [b'B', b'Z', b'h', ..] => return Err(UnpackError::Compression("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(UnpackError::Compression("xz")),
        [0x04, 0x22, 0x4d, 0x18, ..] => return Err(UnpackError::Compression("lz4")),
        _ => archive::apply(root, &mut sniffed, limits)?,
    };
    // A decoder may stop before the last byte; the digest is of all of them.
    let (compressed, compressed_bytes) = pieces.drain();
    Ok(Unpacked {
        compressed,
        compressed_bytes,
        diff_id,
        disk_bytes: tree.disk_bytes,
        inodes: tree.inodes,
        opaque: tree.opaque,
        implied: tree.implied,
    })
}

#[cfg(test)]
mod tests;
