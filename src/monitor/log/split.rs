//! A stream of bytes into lines: complete ones, and parts of those that are too long.
//!
//! Where the stream was cut by reading it changes nothing: what comes out is a function of the bytes alone. A part is
//! made only when a line is known to be longer than the limit, or at the stream's end.

use std::io::BufRead;

/// A line longer than this is cut, where a plan doesn't say otherwise; containerd's and CRI-O's value.
pub const MAX_LINE: u32 = 16 * 1024;

/// Cuts one stream into lines.
#[derive(Debug)]
pub struct Splitter {
    max: usize,
    /// The line that has begun: at most `max` bytes.
    pending: Vec<u8>,
}

impl Splitter {
    /// Lines of at most `max` bytes; 0: [`MAX_LINE`].
    pub fn new(max: u32) -> Self {
        let max = if max == 0 { MAX_LINE } else { max };
        Self { max: max as usize, pending: Vec::new() }
    }

    /// Takes the next bytes of the stream. `line` gets each line as it ends: whether it is complete, and its content in two
    /// pieces, the first kept from earlier bytes.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(bool, &[u8], &[u8])) {
        while !bytes.is_empty() {
            let room = self.max - self.pending.len();
            // One byte more than there is room for: a newline there makes the line complete, anything else makes it too long.
            let window = &bytes[..bytes.len().min(room + 1)];
            let length = to_newline(window);
            if window[length - 1] == b'\n' {
                line(true, &self.pending, &window[..length - 1]);
                bytes = &bytes[length..];
            } else if length > room {
                line(false, &self.pending, &bytes[..room]);
                bytes = &bytes[room..];
            } else {
                self.pending.extend_from_slice(bytes);
                return;
            }
            self.forget();
        }
    }

    /// The stream has ended: what has begun is a part.
    pub fn finish(&mut self, mut line: impl FnMut(bool, &[u8], &[u8])) {
        if !self.pending.is_empty() {
            line(false, &self.pending, &[]);
            self.pending = Vec::new();
        }
    }

    fn forget(&mut self) {
        // A stream at rest keeps no large buffer.
        if self.pending.capacity() > 4096 { self.pending = Vec::new() } else { self.pending.clear() }
    }
}

/// Bytes up to the first newline and with it, or all of them. The standard library finds it with the C library's memchr.
fn to_newline(mut bytes: &[u8]) -> usize {
    bytes.skip_until(b'\n').unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(max: u32, chunks: &[&[u8]]) -> Vec<(bool, Vec<u8>)> {
        let mut splitter = Splitter::new(max);
        let mut lines = Vec::new();
        let mut keep = |full: bool, head: &[u8], tail: &[u8]| lines.push((full, [head, tail].concat()));
        for chunk in chunks {
            splitter.feed(chunk, &mut keep);
        }
        splitter.finish(&mut keep);
        lines
    }

    fn check(max: u32, chunks: &[&str], want: &[&str]) {
        let chunks: Vec<&[u8]> = chunks.iter().map(|c| c.as_bytes()).collect();
        let got: Vec<String> = lines(max, &chunks)
            .into_iter()
            .map(|(full, text)| format!("{}{}", if full { "F" } else { "P" }, String::from_utf8(text).unwrap()))
            .collect();
        assert_eq!(got, want, "{max} {chunks:?}");
    }

    #[test]
    fn lines_are_cut_at_newlines_the_limit_and_the_end() {
        check(4, &[], &[]);
        check(4, &["ab\n"], &["Fab"]);
        check(4, &["a", "b", "\n"], &["Fab"]);
        check(4, &["\n\n"], &["F", "F"]);
        check(4, &["abcd\n"], &["Fabcd"]);
        check(4, &["abcd", "\n"], &["Fabcd"]);
        check(4, &["abcde\n"], &["Pabcd", "Fe"]);
        check(4, &["abcd", "e\n"], &["Pabcd", "Fe"]);
        check(4, &["abcdefgh\n"], &["Pabcd", "Fefgh"]);
        check(4, &["abcdefghi"], &["Pabcd", "Pefgh", "Pi"]);
        check(4, &["ab\ncd"], &["Fab", "Pcd"]);
        check(1, &["abc\n"], &["Pa", "Pb", "Fc"]);
        check(0, &["ab\n"], &["Fab"]);
    }

    /// A small generator, so that a failure can be repeated.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn where_a_stream_is_cut_changes_nothing() {
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for round in 0..400 {
            let length = (random(&mut state) % 3000) as usize;
            let newline_every = 1 + random(&mut state) % 200;
            let bytes: Vec<u8> = (0..length)
                .map(|_| if random(&mut state).is_multiple_of(newline_every) { b'\n' } else { b'a' + (random(&mut state) % 26) as u8 })
                .collect();
            let max = 1 + (random(&mut state) % 100) as u32;
            let whole = lines(max, &[&bytes]);
            let mut chunks = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(rest.len().min(1 + (random(&mut state) % 150) as usize));
                chunks.push(chunk);
                rest = tail;
            }
            assert_eq!(lines(max, &chunks), whole, "round {round}");
            let content: Vec<u8> = whole.iter().flat_map(|(full, text)| text.iter().copied().chain(full.then_some(b'\n'))).collect();
            assert_eq!(content, bytes, "round {round}");
            assert!(whole.iter().all(|(_, text)| text.len() <= max as usize && !text.contains(&b'\n')));
        }
    }

    #[test]
    fn a_line_of_a_mebibyte_is_parts_of_one_line() {
        let mut bytes = vec![b'x'; 1 << 20];
        bytes.push(b'\n');
        let got = lines(0, &bytes.chunks(5000).collect::<Vec<_>>());
        assert_eq!(got.len(), (1 << 20) / MAX_LINE as usize);
        assert!(got[..got.len() - 1].iter().all(|(full, text)| !full && text.len() == MAX_LINE as usize));
        assert_eq!(got.last().map(|(full, text)| (*full, text.len())), Some((true, MAX_LINE as usize)));
    }
}
