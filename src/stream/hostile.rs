//! Feeds the machines what a hostile client may send, and checks what must hold then: for `fuzz/` and for the tests.
//!
//! Whatever comes, a machine neither panics nor keeps more of it than its bounds say, and where the bytes were cut makes no
//! difference to what it makes of them.

use bytes::{Bytes, BytesMut};

use super::connection::{Event, Machine};
use super::spdy::{Inflater, Session};
use super::websocket::{Channels, Codec, Tunnel};

/// Answers per byte that was received, at most: a stray frame of data is 8 bytes, the RST_STREAM that answers it 16; inside
/// a tunnel there is a head in front of it.
const AMPLIFICATION: usize = 4;

/// What a machine made of the bytes: events, with neighbouring data joined, and what it answered.
type Made = (Vec<(String, Vec<u8>)>, usize);

/// Bytes of a SPDY client.
pub fn spdy(bytes: &[u8]) {
    check(bytes, Session::new);
}

/// Bytes of a WebSocket client, of each subprotocol.
pub fn websocket(bytes: &[u8]) {
    check(bytes, || Channels::new(Codec::Binary, 5, true));
    // Of base64 that is none, more or less of what was right comes before the error.
    run(bytes, Channels::new(Codec::Base64, 5, false), usize::MAX);
    run(bytes, Channels::new(Codec::Base64, 5, false), 7);
    check(bytes, Tunnel::new);
}

/// Header blocks of a SPDY client, each behind two bytes that tell its length.
pub fn headers(mut bytes: &[u8]) {
    let mut inflater = Inflater::default();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (block, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
        if inflater.headers(block).is_err() {
            return;
        }
        bytes = rest;
    }
}

fn check<M: Machine>(bytes: &[u8], machine: impl Fn() -> M) {
    let whole = run(bytes, machine(), usize::MAX);
    let cut = run(bytes, machine(), 7);
    assert_eq!(whole.0, cut.0, "what is made of the bytes depends on where they are cut");
    assert!(whole.1 <= 64 + AMPLIFICATION * bytes.len(), "{} bytes are answered with {}", bytes.len(), whole.1);
}

fn run<M: Machine>(bytes: &[u8], mut machine: M, cut: usize) -> Made {
    let mut input = BytesMut::new();
    let mut events: Vec<(String, Vec<u8>)> = Vec::new();
    'all: for part in bytes.chunks(cut) {
        input.extend_from_slice(part);
        loop {
            match machine.receive(&mut input) {
                Ok(None) => break,
                Ok(Some(Event::Data { stream, bytes })) => data(&mut events, stream, &bytes),
                Ok(Some(event)) => {
                    let end = event == Event::Goodbye;
                    if let Event::Opened { stream, .. } = event {
                        machine.accept(stream);
                    }
                    events.push((format!("{event:?}"), Vec::new()));
                    if end {
                        break 'all;
                    }
                }
                Err(error) => {
                    events.push((format!("{error:?}"), Vec::new()));
                    break 'all;
                }
            }
        }
    }
    (events, machine.output().len())
}

fn data(events: &mut Vec<(String, Vec<u8>)>, stream: u32, bytes: &Bytes) {
    let what = format!("data of {stream}");
    match events.last_mut() {
        Some((last, so_far)) if *last == what => so_far.extend_from_slice(bytes),
        _ => events.push((what, bytes.to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::spdy::headers_tests::Compressor;
    use super::super::websocket::frame_tests::client;
    use super::*;
    use crate::random::Random;

    impl Random {
        /// Changes some bytes, leaves some away, doubles some.
        fn spoil(&mut self, bytes: &mut Vec<u8>) {
            for _ in 0..self.next(4) {
                if bytes.is_empty() {
                    return;
                }
                let at = self.next(bytes.len());
                match self.next(4) {
                    0 => bytes[at] = self.next(256) as u8,
                    1 => bytes[at] ^= 1 << self.next(8),
                    2 => drop(bytes.drain(at..(at + self.next(9)).min(bytes.len()))),
                    _ => bytes.extend_from_within(at..(at + self.next(40)).min(bytes.len())),
                }
            }
        }

        /// What a client sends, more or less.
        fn frames(&mut self) -> Vec<u8> {
            let mut client = Compressor::default();
            let mut bytes = Vec::new();
            for n in 0..self.next(12) as u32 {
                let word = [0, 1, 3, 5, n, 0x7fff_ffff, 0xffff_ffff][self.next(7)];
                let kind = self.next(11) as u16;
                let mut payload = [word.to_be_bytes(), [0, 0, 0, self.next(9) as u8]].concat();
                match kind {
                    0 => {
                        let length = self.next(50);
                        bytes.extend([word.to_be_bytes(), [self.next(2) as u8, 0, 0, length as u8]].concat());
                        bytes.extend((0..length).map(|n| n as u8));
                        continue;
                    }
                    1 => {
                        payload = [(2 * n + 1).to_be_bytes(), [0; 4]].concat();
                        payload.extend([0, 0]);
                        payload.extend(client.block(&[("streamtype", ["data", "error", "stdin"][self.next(3)]), ("port", "80")]));
                    }
                    2 | 8 => payload.extend(client.block(&[])),
                    4 => payload = [1u32.to_be_bytes(), [0, 0, 0, self.next(9) as u8], word.to_be_bytes()].concat(),
                    6 => payload.truncate(4),
                    _ => {}
                }
                bytes.extend([0x8003u16.to_be_bytes(), kind.to_be_bytes(), [self.next(4) as u8, 0], (payload.len() as u16).to_be_bytes()].concat());
                bytes.extend(payload);
            }
            bytes
        }

        /// The same in a client's WebSocket messages.
        fn messages(&mut self, bytes: &[u8]) -> Vec<u8> {
            let mut messages = Vec::new();
            let mut rest = bytes;
            while !rest.is_empty() {
                let (part, after) = rest.split_at((1 + self.next(200)).min(rest.len()));
                messages.extend(client(self.next(3) > 0, [0, 1, 2, 2, 2, 8, 9, 10][self.next(8)], part));
                rest = after;
            }
            messages
        }
    }

    #[test]
    fn the_corpus_holds() {
        for (name, check) in [("spdy", spdy as fn(&[u8])), ("headers", headers), ("websocket", websocket)] {
            let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let files: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(files.len() >= 3, "{name}: {files:?}");
            for file in files {
                check(&std::fs::read(file).unwrap());
            }
        }
    }

    #[test]
    fn machines_stand_whatever_comes() {
        for seed in 1..=3000 {
            let mut random = Random(seed);
            let mut frames = random.frames();
            let mut messages = random.messages(&frames);
            spdy(&frames);
            websocket(&messages);
            random.spoil(&mut frames);
            random.spoil(&mut messages);
            spdy(&frames);
            websocket(&messages);
        }
    }

    #[test]
    fn the_inflater_stands_whatever_comes() {
        for seed in 1..=3000 {
            let mut random = Random(seed);
            let mut client = Compressor::default();
            let mut bytes = Vec::new();
            for _ in 0..random.next(5) {
                let value: String = (0..random.next(300)).map(|n| (b'a' + (n % 26) as u8) as char).collect();
                let block = client.block(&[("streamtype", &value), ("port", "80")]);
                bytes.extend((block.len() as u16).to_be_bytes());
                bytes.extend(block);
            }
            headers(&bytes);
            random.spoil(&mut bytes);
            headers(&bytes);
        }
    }
}
