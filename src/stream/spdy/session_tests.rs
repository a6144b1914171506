//! What the machine does with what clients send, well behaved and not.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::Semaphore;

use super::Session;
use super::frame::{self, HEAD};
use super::headers::Headers;
use super::headers::tests::Compressor;
use super::session::MAX_STREAMS;
use crate::stream::connection::{Event, Machine};
use crate::stream::output::Permit;

/// A client and the machine that serves it.
struct Pair {
    client: Compressor,
    session: Session,
    input: BytesMut,
    chunks: Arc<Semaphore>,
}

/// A frame that the machine wrote.
#[derive(Debug, PartialEq, Eq)]
enum Frame {
    Data(u32, u8, usize),
    Control(u16, Vec<u8>),
}

fn control(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let head = [&0x8003u16.to_be_bytes()[..], &kind.to_be_bytes(), &((u32::from(flags) << 24) | payload.len() as u32).to_be_bytes()];
    [&head.concat()[..], payload].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn data(stream: u32, flags: u8, bytes: &[u8]) -> Vec<u8> {
    [&words(&[stream, u32::from(flags) << 24 | bytes.len() as u32])[..], bytes].concat()
}

impl Pair {
    fn new() -> Self {
        Self { client: Compressor::default(), session: Session::new(), input: BytesMut::new(), chunks: Arc::new(Semaphore::new(1000)) }
    }

    fn open(&mut self, stream: u32, flags: u8, headers: &[(&str, &str)]) -> Vec<u8> {
        let block = self.client.block(headers);
        control(frame::SYN_STREAM, flags, &[&words(&[stream, 0])[..], &[0, 0], &block].concat())
    }

    /// Opens streams that the machine takes on.
    fn opened(mut self, streams: &[u32]) -> Self {
        for &stream in streams {
            let frame = self.open(stream, 0, &[]);
            assert_eq!(self.feed(&frame).unwrap().len(), 1);
            self.session.accept(stream);
        }
        self.frames();
        self
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Event>, String> {
        self.input.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(event) = self.session.receive(&mut self.input).map_err(|error| crate::errchain::Chain(&error).to_string())? {
            events.push(event);
        }
        Ok(events)
    }

    fn send(&mut self, stream: u32, length: usize) {
        let permit = || self.chunks.clone().try_acquire_owned().unwrap();
        let permit = Permit::new(permit(), permit());
        self.session.send(stream, Bytes::from(vec![7; length]), permit);
    }

    fn frames(&mut self) -> Vec<Frame> {
        let bytes = self.session.output().take();
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while let Some((head, after)) = rest.split_first_chunk::<HEAD>() {
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
            let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            frames.push(match first & 0x8000_0000 {
                0 => Frame::Data(first, head[4], length),
                _ => Frame::Control(first as u16, after[..length].to_vec()),
            });
            rest = &after[length..];
        }
        assert!(rest.is_empty());
        frames
    }
}

#[test]
fn a_stream_lives_from_syn_stream_to_both_ends() {
    let mut pair = Pair::new();
    // Names come in lower case, as Go's client sends them.
    let mut bytes = pair.open(1, 0, &[("streamtype", "stdin")]);
    bytes.extend(data(1, 0, b"hello"));
    bytes.extend(data(1, frame::FIN, b" world"));
    bytes.extend(data(1, 0, b"too late"));
    let expected = [
        Event::Opened { stream: 1, headers: Headers::new(&[("streamtype", "stdin")]), finished: false },
        Event::Data { stream: 1, bytes: Bytes::from_static(b"hello") },
        Event::Data { stream: 1, bytes: Bytes::from_static(b" world") },
        Event::Finished { stream: 1 },
    ];
    assert_eq!(pair.feed(&bytes).unwrap(), expected);
    pair.session.accept(1);
    pair.send(1, 10);
    pair.session.finish(1);
    // It is over: nothing is sent any more.
    pair.send(1, 10);
    pair.session.finish(1);
    let reply = [&words(&[1])[..], &[0x78, 0xbb, 0xe3, 0xc6, 0xa7, 0xc2, 0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]].concat();
    assert_eq!(pair.frames(), [Frame::Control(frame::SYN_REPLY, reply), Frame::Data(1, 0, 10), Frame::Data(1, frame::FIN, 0)]);
    assert_eq!(pair.chunks.available_permits(), 1000);
}

#[test]
fn where_the_bytes_are_cut_means_nothing() {
    let mut client = Pair::new();
    let mut bytes = Vec::new();
    for stream in [1, 3, 5] {
        bytes.extend(client.open(stream, 0, &[("streamtype", "data"), ("port", "80"), ("requestid", &stream.to_string())]));
        bytes.extend(data(stream, 0, &[stream as u8; 300]));
    }
    bytes.extend(control(frame::PING, 0, &words(&[1])));
    bytes.extend(data(3, frame::FIN, b""));
    bytes.extend(control(frame::RST_STREAM, 0, &words(&[5, 5])));
    let run = |cut: usize| {
        let mut pair = Pair::new();
        let mut found = Vec::new();
        for part in bytes.chunks(cut) {
            for event in pair.feed(part).unwrap() {
                match (event, found.last_mut()) {
                    (Event::Data { stream, bytes }, Some((last, so_far))) if *last == format!("data {stream}") => *so_far += bytes.len(),
                    (Event::Data { stream, bytes }, _) => found.push((format!("data {stream}"), bytes.len())),
                    (event, _) => found.push((format!("{event:?}"), 0)),
                }
            }
        }
        (found, pair.frames())
    };
    let whole = run(usize::MAX);
    assert_eq!(whole.1, [Frame::Control(frame::PING, words(&[1]))]);
    for cut in [1, 2, 3, 5, 8, 13, 100] {
        assert_eq!(run(cut), whole, "{cut}");
    }
}

#[test]
fn windows_bind_who_keeps_them() {
    // Go's client never says a word about windows.
    let mut pair = Pair::new().opened(&[1]);
    for _ in 0..10 {
        pair.send(1, 32 << 10);
    }
    assert_eq!(pair.frames().len(), 10);
    assert!(!pair.session.waits());

    // One that has told a window gets no more than that, and the rest when it says so.
    let mut pair = Pair::new().opened(&[1, 3]);
    pair.feed(&control(frame::WINDOW_UPDATE, 0, &words(&[1, 1000]))).unwrap();
    pair.send(1, 65536);
    pair.send(1, 2000);
    pair.session.finish(1);
    pair.send(3, 10);
    assert_eq!(pair.frames(), [Frame::Data(1, 0, 65536), Frame::Data(1, 0, 1000), Frame::Data(3, 0, 10)]);
    assert!(pair.session.waits());
    // The connection's share of what waits is free for others.
    assert_eq!(pair.chunks.available_permits(), 999);
    pair.feed(&control(frame::WINDOW_UPDATE, 0, &words(&[1, 1000]))).unwrap();
    assert_eq!(pair.frames(), [Frame::Data(1, 0, 1000), Frame::Data(1, frame::FIN, 0)]);
    assert!(!pair.session.waits());

    // The session's window, and a new initial one.
    let mut pair = Pair::new().opened(&[1]);
    pair.feed(&control(frame::WINDOW_UPDATE, 0, &words(&[0, 1]))).unwrap();
    pair.send(1, 65536);
    pair.send(1, 100);
    assert_eq!(pair.frames(), [Frame::Data(1, 0, 65536), Frame::Data(1, 0, 1)]);
    let mut pair = Pair::new().opened(&[1]);
    pair.feed(&control(frame::SETTINGS, 0, &words(&[1, 7, 100]))).unwrap();
    pair.send(1, 300);
    assert_eq!(pair.frames(), [Frame::Data(1, 0, 100)]);
    pair.feed(&control(frame::SETTINGS, 0, &words(&[1, 7, 150]))).unwrap();
    assert_eq!(pair.frames(), [Frame::Data(1, 0, 50)]);
}

#[test]
fn what_is_taken_is_told_until_the_client_shows_that_it_keeps_no_window() {
    let mut pair = Pair::new().opened(&[1]);
    pair.feed(&data(1, 0, &[0; 40000])).unwrap();
    pair.session.taken(1, 30000);
    assert_eq!(pair.frames(), []);
    pair.session.taken(1, 10000);
    let update = |stream, delta| Frame::Control(frame::WINDOW_UPDATE, words(&[stream, delta]));
    assert_eq!(pair.frames(), [update(0, 40000), update(1, 40000)]);
    // What nobody takes counts for the session.
    pair.feed(&[data(1, frame::FIN, b""), data(1, 0, &[0; 40000])].concat()).unwrap();
    assert_eq!(pair.frames(), [update(0, 40000)]);

    let mut pair = Pair::new().opened(&[1]);
    pair.feed(&data(1, 0, &[0; 65537])).unwrap();
    pair.session.taken(1, 65537);
    assert_eq!(pair.frames(), []);
}

#[test]
fn what_the_machine_answers() {
    let check = |bytes: &[u8], events: &[Event], frames: &[Frame]| {
        let mut pair = Pair::new().opened(&[1, 3]);
        assert_eq!(pair.feed(bytes).unwrap(), events, "{bytes:?}");
        assert_eq!(pair.frames(), frames, "{bytes:?}");
    };
    let reset = |stream, why| Frame::Control(frame::RST_STREAM, words(&[stream, why]));
    check(&control(frame::PING, 0, &words(&[5])), &[], &[Frame::Control(frame::PING, words(&[5]))]);
    check(&control(frame::PING, 0, &words(&[4])), &[], &[]);
    check(&control(frame::RST_STREAM, 0, &words(&[3, 5])), &[Event::Reset { stream: 3 }], &[]);
    check(&control(frame::RST_STREAM, 0, &words(&[9, 5])), &[], &[]);
    check(&data(5, 0, b"x"), &[], &[reset(5, 2)]);
    check(&data(2, 0, b"x"), &[], &[reset(2, 2)]);
    check(&data(1, 0, b""), &[], &[]);
    check(&control(10, 0, b"credentials"), &[], &[]);
    check(&control(99, 0xff, b""), &[], &[]);
    check(&control(frame::GOAWAY, 0, &words(&[0, 0])), &[], &[]);
    check(&control(frame::WINDOW_UPDATE, 0, &words(&[9, 1])), &[], &[]);
    let twice = [control(frame::WINDOW_UPDATE, 0, &words(&[1, 0x7fff_ffff])), control(frame::PING, 0, &words(&[1]))].concat();
    check(&twice, &[Event::Reset { stream: 1 }], &[reset(1, 7), Frame::Control(frame::PING, words(&[1]))]);
}

#[test]
fn no_stream_is_opened_beyond_the_limit_or_after_goodbye() {
    let mut pair = Pair::new();
    for n in 0..MAX_STREAMS as u32 {
        let frame = pair.open(2 * n + 1, 0, &[]);
        assert_eq!(pair.feed(&frame).unwrap().len(), 1);
    }
    let frame = pair.open(9001, 0, &[]);
    assert_eq!(pair.feed(&frame).unwrap(), []);
    assert_eq!(pair.frames(), [Frame::Control(frame::RST_STREAM, words(&[9001, 3]))]);
    pair.session.reset(1);
    let frame = pair.open(9003, 0, &[]);
    assert_eq!(pair.feed(&frame).unwrap().len(), 1);
    pair.session.refuse(9003);
    pair.feed(&control(frame::GOAWAY, 0, &words(&[0, 0]))).unwrap();
    let frame = pair.open(9005, 0, &[]);
    assert_eq!(pair.feed(&frame).unwrap(), []);

    let mut pair = Pair::new().opened(&[1, 3]);
    pair.session.finish(3);
    pair.session.close();
    let reset = |stream| Frame::Control(frame::RST_STREAM, words(&[stream, 5]));
    let goaway = Frame::Control(frame::GOAWAY, words(&[3, 0]));
    assert_eq!(pair.frames(), [Frame::Data(3, 1, 0), Frame::Data(1, 1, 0), reset(1), reset(3), goaway]);
}

#[test]
fn what_is_malformed_ends_the_connection_with_goaway() {
    let check = |bytes: &[u8], expected: &str| {
        let mut pair = Pair::new().opened(&[1]);
        let error = pair.feed(bytes).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(pair.frames().last(), Some(&Frame::Control(frame::GOAWAY, words(&[1, 1]))), "{expected}");
    };
    check(&data(0, 0, b"x"), "stream 0");
    check(&[0x80, 2, 0, 1, 0, 0, 0, 10], "version");
    check(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], "too long");
    check(&control(frame::SYN_STREAM, 0, &[0; 9]), "stream 0");
    check(&control(frame::SYN_STREAM, 0, &words(&[3, 0])), "too short");
    check(&control(frame::SYN_STREAM, 0, &[&words(&[3, 0])[..], &[0, 0], b"garbage"].concat()), "inflated");
    check(&control(frame::HEADERS, 0, &[&words(&[1])[..], b"garbage"].concat()), "inflated");
    check(&control(frame::PING, 0, &[1]), "length");
    check(&control(frame::RST_STREAM, 0, &words(&[1])), "length");
    check(&control(frame::GOAWAY, 0, &words(&[1, 2, 3])), "length");
    check(&control(frame::SETTINGS, 0, &words(&[2, 7, 100])), "SETTINGS");
    check(&control(frame::SETTINGS, 0, &words(&[0xffff_ffff])), "SETTINGS");
    check(&control(frame::WINDOW_UPDATE, 0, &words(&[1, 0])), "nothing");
    check(&control(frame::WINDOW_UPDATE, 0, &words(&[0, 0x7fff_ffff])), "too large");
    for stream in [1, 2] {
        let mut pair = Pair::new().opened(&[1]);
        let frame = pair.open(stream, 0, &[]);
        assert!(pair.feed(&frame).unwrap_err().contains("not above"), "{stream}");
    }
}
