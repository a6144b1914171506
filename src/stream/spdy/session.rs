//! The state of one SPDY connection: its streams, windows and the frames that are due. No I/O.

use std::collections::{HashMap, VecDeque};

use bytes::{Buf, Bytes, BytesMut};

use super::SpdyError;
use super::frame::{self, GoAway, HEAD, Head, Reset, StreamId};
use super::headers::{Deflater, Inflater};
use crate::stream::connection::{Event, Machine, ProtocolError, chunk};
use crate::stream::output::{Output, Permit};

/// Streams of one connection at once. A forwarded TCP connection is two.
pub const MAX_STREAMS: usize = 1000;
/// The window that each stream and the session begin with, in both directions (sections 2.6.8, 3.1's session window).
const WINDOW: i64 = 64 << 10;
/// What must have been taken before it is told: few frames, and never late.
const UPDATE: i64 = WINDOW / 2;
const MAX_WINDOW: i64 = 0x7fff_ffff;
const INITIAL_WINDOW_SIZE: u32 = 7;

/// What is known of a stream that is open in one direction at least.
struct Stream {
    /// The client may still send.
    theirs: bool,
    /// We may still send.
    ours: bool,
    /// Bytes that we may send, for a client that says so.
    window: i64,
    /// What waits for the window.
    waiting: VecDeque<(Bytes, Permit)>,
    /// FIN is due behind what waits.
    finishing: bool,
    received: Received,
}

/// What we have received and not yet told the client of.
#[derive(Default)]
struct Received {
    /// Beyond the last WINDOW_UPDATE.
    outstanding: i64,
    /// Of it, what was taken.
    taken: i64,
}

impl Received {
    /// What to tell now, if so many bytes more are taken.
    fn take(&mut self, n: usize) -> Option<u32> {
        self.taken += n as i64;
        if self.taken < UPDATE {
            return None;
        }
        let delta = std::mem::take(&mut self.taken);
        self.outstanding -= delta;
        Some(delta.min(MAX_WINDOW) as u32)
    }
}

/// Data that is being read.
struct Reading {
    stream: StreamId,
    left: usize,
    fin: bool,
}

/// One connection.
#[derive(Default)]
pub struct Session {
    streams: HashMap<StreamId, Stream>,
    /// The highest stream that the client has opened.
    last: StreamId,
    reading: Option<Reading>,
    inflater: Option<Inflater>,
    deflater: Deflater,
    output: Output,
    received: Received,
    /// The client has sent more than a window: it keeps none, and need not be told.
    keeps_no_window: bool,
    /// Bytes that we may send over all streams.
    window: i64,
    /// What a new stream's window is, relative to [`WINDOW`].
    initial: i64,
    /// The client has told windows of streams, of the session.
    bound: (bool, bool),
    /// No more streams: the client says goodbye, or we do.
    going: bool,
}

impl Session {
    /// A connection without streams.
    pub fn new() -> Self {
        Self { window: WINDOW, initial: WINDOW, ..Self::default() }
    }

    fn step(&mut self, input: &mut BytesMut) -> Result<Option<Event>, SpdyError> {
        loop {
            if let Some(reading) = &mut self.reading {
                let (stream, fin) = (reading.stream, reading.fin);
                if reading.left == 0 {
                    self.reading = None;
                    if fin && let Some(event) = self.finished(stream) {
                        return Ok(Some(event));
                    }
                } else if input.is_empty() {
                    return Ok(None);
                } else {
                    let n = reading.left.min(input.len());
                    reading.left -= n;
                    if let Some(event) = self.data(stream, chunk(input, n)) {
                        return Ok(Some(event));
                    }
                }
                continue;
            }
            let Some(head) = input.first_chunk::<HEAD>() else { return Ok(None) };
            match Head::parse(*head)? {
                Head::Data { stream, flags, length } => {
                    input.advance(HEAD);
                    self.reading = Some(Reading { stream, left: length, fin: flags & frame::FIN != 0 });
                    if stream > self.last || stream % 2 == 0 {
                        self.output.control(frame::rst_stream(stream, Reset::InvalidStream));
                    }
                }
                Head::Control { length, .. } if input.len() < HEAD + length => return Ok(None),
                Head::Control { kind, flags, length } => {
                    input.advance(HEAD);
                    let payload = input.split_to(length);
                    if let Some(event) = self.control(kind, flags, &payload)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// Bytes of a stream; those of one that takes none any more are taken at once.
    fn data(&mut self, id: StreamId, bytes: Bytes) -> Option<Event> {
        let n = bytes.len() as i64;
        self.received.outstanding += n;
        self.keeps_no_window |= self.received.outstanding > WINDOW;
        match self.streams.get_mut(&id).filter(|stream| stream.theirs) {
            Some(stream) => {
                stream.received.outstanding += n;
                self.keeps_no_window |= stream.received.outstanding > WINDOW;
                Some(Event::Data { stream: id, bytes })
            }
            None => {
                self.taken(id, bytes.len());
                None
            }
        }
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Option<Event>, SpdyError> {
        match kind {
            frame::SYN_STREAM => self.syn_stream(flags, payload),
            frame::SYN_REPLY => {
                let (id, block) = stream_id(payload)?;
                self.inflater.get_or_insert_default().headers(block)?;
                // We open no stream, so it answers none.
                self.output.control(frame::rst_stream(id, Reset::InvalidStream));
                Ok(None)
            }
            frame::HEADERS => {
                let (id, block) = stream_id(payload)?;
                self.inflater.get_or_insert_default().headers(block)?;
                Ok(if flags & frame::FIN != 0 { self.finished(id) } else { None })
            }
            frame::RST_STREAM => {
                let [id, _why] = numbers(payload)?;
                Ok(self.streams.remove(&id).map(|_| Event::Reset { stream: id }))
            }
            frame::SETTINGS => self.settings(payload).map(|()| None),
            frame::PING => {
                let [id] = numbers(payload)?;
                // An even one would answer ours, and we send none.
                if id % 2 == 1 {
                    self.output.control(frame::ping(id));
                }
                Ok(None)
            }
            frame::GOAWAY => {
                let [_last, _why] = numbers(payload)?;
                self.going = true;
                Ok(None)
            }
            frame::WINDOW_UPDATE => {
                let [id, delta] = numbers(payload)?;
                self.window_update(id, i64::from(delta & 0x7fff_ffff))
            }
            // Section 2.2.1: what is not known is ignored.
            _ => Ok(None),
        }
    }

    fn syn_stream(&mut self, flags: u8, payload: &[u8]) -> Result<Option<Event>, SpdyError> {
        let (id, rest) = stream_id(payload)?;
        // The stream it belongs to, its priority and its credential's slot mean nothing here.
        let block = rest.get(6..).ok_or(SpdyError::Frame("a SYN_STREAM that is too short"))?;
        let headers = self.inflater.get_or_insert_default().headers(block)?;
        if id % 2 == 0 || id <= self.last {
            return Err(SpdyError::Frame("a stream's number that is even or not above the last"));
        }
        self.last = id;
        if self.going {
            return Ok(None);
        }
        if self.streams.len() >= MAX_STREAMS {
            self.output.control(frame::rst_stream(id, Reset::Refused));
            return Ok(None);
        }
        let finished = flags & frame::FIN != 0;
        let stream = Stream {
            theirs: !finished,
            ours: flags & frame::UNIDIRECTIONAL == 0,
            window: self.initial,
            waiting: VecDeque::new(),
            finishing: false,
            received: Received::default(),
        };
        self.streams.insert(id, stream);
        Ok(Some(Event::Opened { stream: id, headers, finished }))
    }

    /// The client sends no more on the stream.
    fn finished(&mut self, id: StreamId) -> Option<Event> {
        let stream = self.streams.get_mut(&id).filter(|stream| stream.theirs)?;
        stream.theirs = false;
        self.forget(id);
        Some(Event::Finished { stream: id })
    }

    fn settings(&mut self, payload: &[u8]) -> Result<(), SpdyError> {
        let (count, entries) = payload.split_first_chunk::<4>().ok_or(SpdyError::Frame("SETTINGS that are too short"))?;
        if entries.len() != (u32::from_be_bytes(*count) as usize).saturating_mul(8) {
            return Err(SpdyError::Frame("SETTINGS of another length than they say"));
        }
        for entry in entries.chunks_exact(8) {
            let [key, value] = numbers(entry)?;
            if key & 0x00ff_ffff == INITIAL_WINDOW_SIZE {
                let value = i64::from(value).min(MAX_WINDOW);
                let change = value - std::mem::replace(&mut self.initial, value);
                self.bound.0 = true;
                for stream in self.streams.values_mut() {
                    stream.window += change;
                }
            }
        }
        self.send_what_may();
        Ok(())
    }

    fn window_update(&mut self, id: StreamId, delta: i64) -> Result<Option<Event>, SpdyError> {
        if delta == 0 {
            return Err(SpdyError::Frame("a WINDOW_UPDATE of nothing"));
        }
        if id == 0 {
            self.bound.1 = true;
            self.window += delta;
            if self.window > MAX_WINDOW {
                return Err(SpdyError::Frame("a window that is too large"));
            }
            self.send_what_may();
            return Ok(None);
        }
        self.bound.0 = true;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(None) };
        stream.window += delta;
        if stream.window > MAX_WINDOW {
            self.streams.remove(&id);
            self.output.control(frame::rst_stream(id, Reset::FlowControl));
            return Ok(Some(Event::Reset { stream: id }));
        }
        self.send_waiting(id);
        Ok(None)
    }

    fn send_what_may(&mut self) {
        let mut waiting: Vec<_> = self.streams.iter().filter(|(_, stream)| !stream.waiting.is_empty()).map(|(id, _)| *id).collect();
        waiting.sort_unstable();
        for id in waiting {
            self.send_waiting(id);
        }
    }

    /// Writes what of a stream's data its window and the session's let through, and FIN when that was the last.
    fn send_waiting(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        while let Some((mut bytes, mut permit)) = stream.waiting.pop_front() {
            let of_stream = if self.bound.0 { stream.window } else { MAX_WINDOW };
            let of_session = if self.bound.1 { self.window } else { MAX_WINDOW };
            let room = of_stream.min(of_session).clamp(0, bytes.len() as i64) as usize;
            if room == 0 && !bytes.is_empty() {
                // The connection's share is for those who can go on.
                permit.wait();
                stream.waiting.push_front((bytes, permit));
                return;
            }
            stream.window -= room as i64;
            self.window -= room as i64;
            let part = bytes.split_to(room);
            self.output.data(frame::data(id, false, room), None);
            if bytes.is_empty() {
                self.output.data(part, Some(permit));
            } else {
                self.output.data(part, None);
                stream.waiting.push_front((bytes, permit));
            }
        }
        if std::mem::take(&mut stream.finishing) {
            stream.ours = false;
            self.output.data(frame::data(id, true, 0), None);
            self.forget(id);
        }
    }

    /// Drops a stream that is over in both directions.
    fn forget(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(|stream| !stream.ours && !stream.theirs) {
            self.streams.remove(&id);
        }
    }
}

impl Machine for Session {
    fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Event>, ProtocolError> {
        self.step(input).map_err(|error| {
            self.going = true;
            self.output.control(frame::goaway(self.last, GoAway::ProtocolError));
            ProtocolError::Spdy(error)
        })
    }

    fn accept(&mut self, stream: u32) {
        if self.streams.contains_key(&stream) {
            let block = self.deflater.empty();
            self.output.control(frame::syn_reply(stream, &block));
        }
    }

    fn send(&mut self, id: u32, bytes: Bytes, permit: Permit) {
        if let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.ours && !stream.finishing) {
            stream.waiting.push_back((bytes, permit));
            self.send_waiting(id);
        }
    }

    fn finish(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.ours) {
            stream.finishing = true;
            self.send_waiting(id);
        }
    }

    fn reset(&mut self, id: u32) {
        if self.streams.remove(&id).is_some() {
            self.output.control(frame::rst_stream(id, Reset::Cancel));
        }
    }

    fn refuse(&mut self, id: u32) {
        if self.streams.remove(&id).is_some() {
            self.output.control(frame::rst_stream(id, Reset::Refused));
        }
    }

    fn taken(&mut self, id: u32, n: usize) {
        if self.keeps_no_window {
            return;
        }
        if let Some(delta) = self.received.take(n) {
            self.output.control(frame::window_update(0, delta));
        }
        if let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.theirs)
            && let Some(delta) = stream.received.take(n)
        {
            self.output.control(frame::window_update(id, delta));
        }
    }

    fn waits(&self) -> bool {
        self.streams.values().any(|stream| !stream.waiting.is_empty())
    }

    fn close(&mut self) {
        self.going = true;
        let mut open: Vec<_> = self.streams.drain().collect();
        open.sort_unstable_by_key(|(id, _)| *id);
        for (id, stream) in open {
            if stream.ours {
                self.output.data(frame::data(id, true, 0), None);
            }
            // A client that waits for its own end of a stream needs to hear that nobody reads it.
            if stream.theirs {
                self.output.control(frame::rst_stream(id, Reset::Cancel));
            }
        }
        self.output.control(frame::goaway(self.last, GoAway::Ok));
    }

    fn output(&mut self) -> &mut Output {
        &mut self.output
    }
}

/// The stream that a payload begins with, and the rest.
fn stream_id(payload: &[u8]) -> Result<(StreamId, &[u8]), SpdyError> {
    let (id, rest) = payload.split_first_chunk::<4>().ok_or(SpdyError::Frame("a control frame that is too short"))?;
    match u32::from_be_bytes(*id) & 0x7fff_ffff {
        0 => Err(SpdyError::Frame("a control frame about stream 0")),
        id => Ok((id, rest)),
    }
}

/// A payload that is numbers, all of it.
fn numbers<const N: usize>(payload: &[u8]) -> Result<[u32; N], SpdyError> {
    if payload.len() != 4 * N {
        return Err(SpdyError::Frame("a control frame of another length than its kind has"));
    }
    let mut numbers = [0; N];
    for (number, bytes) in numbers.iter_mut().zip(payload.as_chunks::<4>().0) {
        *number = u32::from_be_bytes(*bytes);
    }
    Ok(numbers)
}
