//! The archive's bytes as they leave the decompressor: hashed, cut into entries, handed to the tree.

use std::io::{self, Read};
use std::os::fd::OwnedFd;

use rustix::fs::SeekFrom;
use tar_core::parse::{Limits as ParserLimits, ParseEvent, Parser};

use super::super::Limits;
use super::super::digest::{Digest, Hasher};
use super::UnpackError;
use super::entry::{self, Entry, Kind};
use super::tree::{Finished, Tree};

/// Bytes asked of the decompressor at once, and the largest piece of a file written at once.
const BUFFER: usize = 256 << 10;
/// Bytes that the headers of one entry may take together (path, link and extended header with attributes).
const MAX_HEADERS: usize = 4 << 20;

/// The decompressed bytes with a window on them.
struct Window<R> {
    from: R,
    hasher: Hasher,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    total: u64,
    limit: u64,
}

impl<R: Read> Window<R> {
    /// What is in the window.
    fn ready(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Reads more behind what is there. False: there is no more.
    fn fill(&mut self) -> Result<bool, UnpackError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                self.buffer.resize(self.buffer.len() * 2, 0);
            }
        }
        let n = loop {
            match self.from.read(&mut self.buffer[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(UnpackError::Decompress { source }),
                Ok(n) => break n,
            }
        };
        self.hasher.update(&self.buffer[self.end..self.end + n]);
        self.end += n;
        self.total += n as u64;
        if self.total > self.limit {
            return Err(UnpackError::Limit { what: "bytes", limit: self.limit });
        }
        Ok(n > 0)
    }

    /// Takes at most `limit` bytes that are there or come with one read. Empty: the archive has ended.
    fn take(&mut self, limit: u64) -> Result<&[u8], UnpackError> {
        if self.start == self.end {
            self.fill()?;
        }
        let n = limit.min((self.end - self.start) as u64) as usize;
        let from = self.start;
        self.start += n;
        Ok(&self.buffer[from..from + n])
    }

    /// Passes over bytes.
    fn skip(&mut self, mut bytes: u64) -> Result<(), UnpackError> {
        while bytes > 0 {
            match self.take(bytes)?.len() {
                0 => return Err(UnpackError::Cut),
                n => bytes -= n as u64,
            }
        }
        Ok(())
    }
}

/// Unpacks an archive into `root` and gives its digest. Reads to the very end: padding counts.
pub(super) fn apply(root: OwnedFd, from: impl Read, limits: &Limits) -> Result<(Finished, Digest), UnpackError> {
    let mut tree = Tree::new(root, limits)?;
    let mut window = Window { from, hasher: Hasher::default(), buffer: vec![0; BUFFER], start: 0, end: 0, total: 0, limit: limits.layer_bytes };
    let mut parser = Parser::new(ParserLimits { max_path_len: Some(limits.path_bytes as u32), ..ParserLimits::default() });
    // Else a time before 1970 is an error. What else it lets pass, `entry::read` checks.
    parser.set_ignore_pax_errors(true);
    let mut entries = 0;
    loop {
        let event = parser.parse(window.ready()).map_err(|source| UnpackError::Archive { source })?;
        let (consumed, entry, content) = match event {
            ParseEvent::NeedData { min_bytes } => {
                if min_bytes > MAX_HEADERS {
                    return Err(UnpackError::Limit { what: "bytes of headers in one entry", limit: MAX_HEADERS as u64 });
                }
                if !window.fill()? {
                    // Archives without the two empty blocks at their end are common enough.
                    if window.ready().iter().all(|&b| b == 0) && window.ready().len() <= 512 {
                        break;
                    }
                    return Err(UnpackError::Cut);
                }
                continue;
            }
            ParseEvent::GlobalExtensions { consumed, .. } => (consumed, None, 0),
            ParseEvent::Entry { consumed, entry } => (consumed, Some(entry::read(&entry, None, limits)?), entry::content_bytes(&entry)),
            ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                let read = entry::read(&entry, Some((&sparse_map, real_size)), limits)?;
                (consumed, Some(read), entry::content_bytes(&entry))
            }
            ParseEvent::End { consumed } => {
                window.start += consumed;
                break;
            }
        };
        window.start += consumed;
        entries += 1;
        if entries > limits.layer_entries {
            return Err(UnpackError::Limit { what: "entries", limit: limits.layer_entries });
        }
        // Checked before anything is made: also the sum can't overflow.
        if content > limits.layer_bytes {
            return Err(UnpackError::Limit { what: "bytes", limit: limits.layer_bytes });
        }
        match entry {
            Some(entry) => place(&mut tree, &mut window, entry, content)?,
            None => window.skip(content)?,
        }
        window.skip(content.next_multiple_of(512) - content)?;
    }
    while !window.take(u64::MAX)?.is_empty() {}
    Ok((tree.finish()?, window.hasher.finish()))
}

/// Makes what an entry says and takes its content from the archive.
fn place<R: Read>(tree: &mut Tree<'_>, window: &mut Window<R>, entry: Entry, content: u64) -> Result<(), UnpackError> {
    let failed = |action, path: &[u8], source: rustix::io::Errno| UnpackError::File { action, path: entry::shown(path), source: source.into() };
    match entry.kind {
        Kind::File { size } => {
            let file = tree.file(&entry.path, &entry.meta, size)?;
            let mut left = size;
            while left > 0 {
                let piece = window.take(left)?;
                if piece.is_empty() {
                    return Err(UnpackError::Cut);
                }
                left -= piece.len() as u64;
                write_all(&file, piece).map_err(|e| failed("write", &entry.path, e))?;
            }
            tree.close(file, &entry.path, &entry.meta)
        }
        Kind::Sparse { map, size } => {
            let file = tree.file(&entry.path, &entry.meta, content)?;
            for (offset, length) in map {
                rustix::fs::seek(&file, SeekFrom::Start(offset)).map_err(|e| failed("write", &entry.path, e))?;
                let mut left = length;
                while left > 0 {
                    let piece = window.take(left)?;
                    if piece.is_empty() {
                        return Err(UnpackError::Cut);
                    }
                    left -= piece.len() as u64;
                    write_all(&file, piece).map_err(|e| failed("write", &entry.path, e))?;
                }
            }
            rustix::fs::ftruncate(&file, size).map_err(|e| failed("write", &entry.path, e))?;
            tree.close(file, &entry.path, &entry.meta)
        }
        _ => {
            tree.place(entry)?;
            window.skip(content)
        }
    }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::write(file, bytes))? {
            0 => return Err(rustix::io::Errno::IO),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}
