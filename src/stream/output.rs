//! What is to be written to a client: pieces, in order, and the permits that keep their senders in bounds.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};
use tokio::sync::OwnedSemaphorePermit;

/// Pieces that are handed to one write.
pub const SLICES: usize = 32;

/// What a sender holds for each chunk on its way: the stream's share, and the connection's until the chunk has to wait for
/// the peer's window.
#[derive(Debug)]
pub struct Permit {
    _stream: OwnedSemaphorePermit,
    connection: Option<OwnedSemaphorePermit>,
}

impl Permit {
    /// Of both.
    pub fn new(stream: OwnedSemaphorePermit, connection: OwnedSemaphorePermit) -> Self {
        Self { _stream: stream, connection: Some(connection) }
    }

    /// Leaves the connection's share to others.
    pub fn wait(&mut self) {
        self.connection = None;
    }
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    /// Freed when the last byte is written.
    _permit: Option<Permit>,
    control: bool,
}

/// The pieces.
#[derive(Debug, Default)]
pub struct Output {
    pieces: VecDeque<Piece>,
    length: usize,
    control: usize,
}

impl Output {
    /// Adds what answers the peer, and what it can therefore make grow.
    pub fn control(&mut self, bytes: Bytes) {
        self.control += bytes.len();
        self.push(bytes, None, true);
    }

    /// Adds what a stream sends.
    pub fn data(&mut self, bytes: Bytes, permit: Option<Permit>) {
        self.push(bytes, permit, false);
    }

    fn push(&mut self, bytes: Bytes, permit: Option<Permit>, control: bool) {
        if !bytes.is_empty() {
            self.length += bytes.len();
            self.pieces.push_back(Piece { bytes, _permit: permit, control });
        }
    }

    /// Adds all of `other`, which is empty then.
    pub fn append(&mut self, other: &mut Output) {
        self.pieces.append(&mut other.pieces);
        self.length += std::mem::take(&mut other.length);
        self.control += std::mem::take(&mut other.control);
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of answers.
    pub fn control_len(&self) -> usize {
        self.control
    }

    /// The first pieces.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let pieces = self.pieces.iter().take(SLICES);
        pieces.zip(slices.iter_mut()).map(|(piece, slice)| *slice = IoSlice::new(&piece.bytes)).count()
    }

    /// So many bytes are written.
    pub fn advance(&mut self, mut written: usize) {
        self.length -= written;
        while let Some(piece) = self.pieces.front_mut() {
            let part = written.min(piece.bytes.len());
            if piece.control {
                self.control -= part;
            }
            piece.bytes.advance(part);
            written -= part;
            if !piece.bytes.is_empty() {
                return;
            }
            self.pieces.pop_front();
        }
    }

    /// All of it, for tests.
    #[cfg(test)]
    pub fn take(&mut self) -> Vec<u8> {
        let all = self.pieces.iter().flat_map(|piece| piece.bytes.to_vec()).collect();
        *self = Self::default();
        all
    }
}
