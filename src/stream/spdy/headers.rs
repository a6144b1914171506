//! Header blocks: zlib streams that go through the whole connection, and the name/value pairs in them.
//!
//! What comes is inflated within a bound: a block of a few bytes may be a bomb. What goes out is a zlib stream of stored
//! blocks, with the dictionary's id in its head as the protocol demands: a server that only ever answers with empty headers
//! gains nothing from a compressor, which would be 256 KiB for each connection.

use flate2::{Decompress, FlushDecompress, Status};

use super::SpdyError;
use super::dictionary::DICTIONARY;

/// Bytes of an inflated block, and pairs in it. Kubernetes' clients send three pairs.
pub const MAX_BLOCK: usize = 16 << 10;
const MAX_PAIRS: usize = 64;
/// An empty stored block that is not the last.
const FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];
/// CMF and FLG of a stream with a preset dictionary and a window of 32 KiB (RFC 1950), then the dictionary's Adler-32.
const ZLIB_HEAD: [u8; 6] = [0x78, 0xbb, 0xe3, 0xc6, 0xa7, 0xc2];

/// The headers of a stream, by lower-case name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// From pairs.
    #[cfg(test)]
    pub fn new(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(name, value)| (name.to_ascii_lowercase(), (*value).to_owned())).collect())
    }

    /// The value of a header, named in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

/// Inflates the blocks of one connection, in the order in which they come.
pub struct Inflater {
    stream: Decompress,
    scratch: Vec<u8>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self { stream: Decompress::new(true), scratch: Vec::new() }
    }
}

impl Inflater {
    /// The headers in `block`. After an error the connection can't go on: its compression state is lost.
    pub fn headers(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        self.inflate(block)?;
        parse(&self.scratch)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<(), SpdyError> {
        self.scratch.clear();
        self.scratch.reserve(1024);
        let mut dictionary_given = false;
        loop {
            let (before_in, before_out) = (self.stream.total_in(), self.scratch.len());
            let status = self.stream.decompress_vec(block, &mut self.scratch, FlushDecompress::Sync);
            block = &block[(self.stream.total_in() - before_in) as usize..];
            match status {
                Err(error) if error.needs_dictionary().is_some() && !dictionary_given => {
                    dictionary_given = true;
                    self.stream.set_dictionary(DICTIONARY).map_err(|_| SpdyError::Headers("need another dictionary"))?;
                    continue;
                }
                Err(_) => return Err(SpdyError::Headers("can't be inflated")),
                // The stream lasts as long as the connection.
                Ok(Status::StreamEnd) => return Err(SpdyError::Headers("end the compressed stream")),
                Ok(Status::Ok | Status::BufError) => {}
            }
            let full = self.scratch.len() == self.scratch.capacity();
            if self.scratch.len() > MAX_BLOCK {
                return Err(SpdyError::Headers("are too long"));
            }
            if full {
                // Grows to just beyond the bound at most: a bomb is known by the first byte too many.
                self.scratch.reserve((MAX_BLOCK + 1).saturating_sub(self.scratch.len()).clamp(1, 4096));
            } else if block.is_empty() {
                return Ok(());
            } else if self.scratch.len() == before_out {
                return Err(SpdyError::Headers("can't be inflated"));
            }
        }
    }
}

/// Number of pairs, then for each: length and name, length and value.
fn parse(mut block: &[u8]) -> Result<Headers, SpdyError> {
    let pairs = number(&mut block)?;
    if pairs > MAX_PAIRS {
        return Err(SpdyError::Headers("are too many"));
    }
    let mut headers = Headers(Vec::with_capacity(pairs));
    for _ in 0..pairs {
        let name = text(&mut block)?;
        if name.is_empty() || name.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(SpdyError::Headers("have a name that is empty or in capitals"));
        }
        if headers.get(&name).is_some() {
            return Err(SpdyError::Headers("have the same name twice"));
        }
        let value = text(&mut block)?;
        headers.0.push((name, value));
    }
    if block.is_empty() { Ok(headers) } else { Err(SpdyError::Headers("have something behind them")) }
}

fn number(block: &mut &[u8]) -> Result<usize, SpdyError> {
    let (bytes, rest) = block.split_first_chunk::<4>().ok_or(SpdyError::Headers("are cut short"))?;
    *block = rest;
    Ok(u32::from_be_bytes(*bytes) as usize)
}

fn text(block: &mut &[u8]) -> Result<String, SpdyError> {
    let length = number(block)?;
    let (bytes, rest) = block.split_at_checked(length).ok_or(SpdyError::Headers("are cut short"))?;
    *block = rest;
    String::from_utf8(bytes.to_vec()).map_err(|_| SpdyError::Headers("are not UTF-8"))
}

/// Writes blocks, of no header.
#[derive(Debug, Default)]
pub struct Deflater {
    begun: bool,
}

impl Deflater {
    /// A block of no header.
    pub fn empty(&mut self) -> Vec<u8> {
        const NONE: [u8; 4] = [0; 4];
        let mut block = Vec::with_capacity(15);
        if !std::mem::replace(&mut self.begun, true) {
            block.extend_from_slice(&ZLIB_HEAD);
        }
        // A stored block that isn't the last (RFC 1951, section 3.2.4), and an empty one, zlib's mark of a flush: Go's inflater
        // gives out nothing before it.
        block.push(0);
        block.extend_from_slice(&(NONE.len() as u16).to_le_bytes());
        block.extend_from_slice(&(!(NONE.len() as u16)).to_le_bytes());
        block.extend_from_slice(&NONE);
        block.extend_from_slice(&FLUSH);
        block
    }
}

#[cfg(test)]
pub mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    /// What a client sends: a compressor as Go's, at its best level and with the dictionary.
    pub struct Compressor(Compress);

    impl Default for Compressor {
        fn default() -> Self {
            let mut stream = Compress::new(Compression::best(), true);
            stream.set_dictionary(DICTIONARY).unwrap();
            Self(stream)
        }
    }

    impl Compressor {
        pub fn raw(&mut self, block: &[u8]) -> Vec<u8> {
            let mut out = Vec::with_capacity(block.len() + 256);
            self.0.compress_vec(block, &mut out, FlushCompress::Sync).unwrap();
            out
        }

        pub fn block(&mut self, pairs: &[(&str, &str)]) -> Vec<u8> {
            self.raw(&plain(pairs))
        }
    }

    fn plain(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut block = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(text.len() as u32).to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        block
    }

    #[test]
    fn blocks_of_one_connection_follow_each_other() {
        let (mut client, mut inflater) = (Compressor::default(), Inflater::default());
        for n in 0..300 {
            let id = n.to_string();
            let pairs = [("streamtype", "data"), ("port", "8080"), ("requestid", id.as_str())];
            let block = client.block(&pairs);
            assert_eq!(inflater.headers(&block).unwrap(), Headers::new(&pairs), "{n}");
        }
        assert_eq!(inflater.headers(&client.block(&[])).unwrap(), Headers::default());
        // More than one step of the buffer.
        let long = "x".repeat(9000);
        let block = client.block(&[("a", &long)]);
        assert_eq!(inflater.headers(&block).unwrap().get("a"), Some(long.as_str()));
    }

    #[test]
    fn what_we_write_is_a_zlib_stream_with_the_dictionary() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for _ in 0..5 {
            assert_eq!(inflater.headers(&deflater.empty()).unwrap(), Headers::default());
        }
    }

    #[test]
    fn what_is_wrong_is_refused_within_the_bounds() {
        let check = |block: Vec<u8>, words: &str| {
            let mut inflater = Inflater::default();
            let error = inflater.headers(&Compressor::default().raw(&block)).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
            assert!(inflater.scratch.capacity() <= MAX_BLOCK + 4096, "{}", inflater.scratch.capacity());
        };
        check(vec![], "cut short");
        check(vec![0, 0, 0, 1], "cut short");
        check(vec![0xff; 8], "too many");
        check([&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff][..], b"x"].concat(), "cut short");
        check(plain(&[("Capital", "x")]), "capitals");
        check(plain(&[("", "x")]), "empty");
        check(plain(&[("a", "x"), ("a", "y")]), "twice");
        check([plain(&[("a", "x")]), vec![0]].concat(), "behind");
        check([&[0, 0, 0, 1, 0, 0, 0, 1][..], b"a", &[0, 0, 0, 1, 0xff]].concat(), "UTF-8");
        check(vec![0; 100 << 20], "too long");
        let check = |block: &[u8], words: &str| {
            let error = Inflater::default().headers(block).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        };
        check(b"GET / HTTP/1.1", "inflated");
        check(&[0x78, 0xbb, 1, 2, 3, 4, 0], "dictionary");
        let mut ended = Vec::with_capacity(100);
        Compressor::default().0.compress_vec(&[0; 4], &mut ended, FlushCompress::Finish).unwrap();
        check(&ended, "end the compressed stream");
    }
}
