//! Frames of SPDY/3.1, section 2.2: what stands in their heads, and how ours are written.

use bytes::{BufMut, Bytes, BytesMut};

use super::SpdyError;

/// Bytes of every frame's head.
pub const HEAD: usize = 8;
/// Bytes of a control frame's payload that are read; headers are the longest there is to say.
pub const MAX_CONTROL: usize = 16 << 10;

/// A stream's number; a client's are odd.
pub type StreamId = u32;

/// FLAG_FIN: the sender sends no more on the stream.
pub const FIN: u8 = 1;
/// FLAG_UNIDIRECTIONAL: the receiver may send nothing on the stream.
pub const UNIDIRECTIONAL: u8 = 2;

pub const SYN_STREAM: u16 = 1;
pub const SYN_REPLY: u16 = 2;
pub const RST_STREAM: u16 = 3;
pub const SETTINGS: u16 = 4;
pub const PING: u16 = 6;
pub const GOAWAY: u16 = 7;
pub const HEADERS: u16 = 8;
pub const WINDOW_UPDATE: u16 = 9;

/// Why a stream is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    /// There is no such stream.
    InvalidStream = 2,
    /// It was not taken on.
    Refused = 3,
    /// Nobody needs it any more.
    Cancel = 5,
    /// A window has grown beyond what a window can be.
    FlowControl = 7,
}

/// Why the session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum GoAway {
    /// In order.
    Ok = 0,
    /// The peer did what it must not.
    ProtocolError = 1,
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Bytes of a stream.
    Data {
        /// Which.
        stream: StreamId,
        /// [`FIN`] or nothing.
        flags: u8,
        /// How many follow.
        length: usize,
    },
    /// Something about a stream or the session.
    Control {
        /// What.
        kind: u16,
        /// What they mean depends on `kind`.
        flags: u8,
        /// Bytes of payload.
        length: usize,
    },
}

impl Head {
    /// From a frame's first bytes.
    pub fn parse(bytes: [u8; HEAD]) -> Result<Self, SpdyError> {
        let [a, b, c, d, flags, x, y, z] = bytes;
        let first = u32::from_be_bytes([a, b, c, d]);
        let length = u32::from_be_bytes([0, x, y, z]) as usize;
        if first & 0x8000_0000 == 0 {
            return if first == 0 { Err(SpdyError::Frame("data of stream 0")) } else { Ok(Head::Data { stream: first, flags, length }) };
        }
        if (first >> 16) & 0x7fff != 3 {
            return Err(SpdyError::Frame("a version other than 3"));
        }
        if length > MAX_CONTROL {
            return Err(SpdyError::Frame("a control frame that is too long"));
        }
        Ok(Head::Control { kind: first as u16, flags, length })
    }
}

/// The head of a frame with so many bytes of a stream. `length` < 2^24.
pub fn data(stream: StreamId, fin: bool, length: usize) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD);
    frame.put_u32(stream);
    frame.put_u32(u32::from(if fin { FIN } else { 0 }) << 24 | length as u32);
    frame.freeze()
}

/// SYN_REPLY with a header block.
pub fn syn_reply(stream: StreamId, block: &[u8]) -> Bytes {
    let mut frame = control(SYN_REPLY, 4 + block.len());
    frame.put_u32(stream);
    frame.put_slice(block);
    frame.freeze()
}

/// RST_STREAM.
pub fn rst_stream(stream: StreamId, why: Reset) -> Bytes {
    let mut frame = control(RST_STREAM, 8);
    frame.put_u32(stream);
    frame.put_u32(why as u32);
    frame.freeze()
}

/// PING.
pub fn ping(id: u32) -> Bytes {
    let mut frame = control(PING, 4);
    frame.put_u32(id);
    frame.freeze()
}

/// GOAWAY; `last`: the last stream that was taken on.
pub fn goaway(last: StreamId, why: GoAway) -> Bytes {
    let mut frame = control(GOAWAY, 8);
    frame.put_u32(last);
    frame.put_u32(why as u32);
    frame.freeze()
}

/// WINDOW_UPDATE; stream 0: the session's.
pub fn window_update(stream: StreamId, delta: u32) -> Bytes {
    let mut frame = control(WINDOW_UPDATE, 8);
    frame.put_u32(stream);
    frame.put_u32(delta);
    frame.freeze()
}

fn control(kind: u16, length: usize) -> BytesMut {
    let mut frame = BytesMut::with_capacity(HEAD + length);
    frame.put_u16(0x8003);
    frame.put_u16(kind);
    frame.put_u32(length as u32);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_the_protocol_draws_them() {
        let check = |frame: Bytes, expected: &[u8]| assert_eq!(&frame[..], expected);
        check(data(5, true, 0x0102), &[0, 0, 0, 5, 1, 0, 1, 2]);
        check(ping(7), &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 7]);
        check(rst_stream(3, Reset::Cancel), &[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5]);
        check(goaway(9, GoAway::ProtocolError), &[0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 1]);
        check(window_update(1, 0x8000), &[0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0x80, 0]);
        check(syn_reply(1, b"xyz"), &[0x80, 3, 0, 2, 0, 0, 0, 7, 0, 0, 0, 1, b'x', b'y', b'z']);
    }

    #[test]
    fn heads_that_no_frame_has_are_refused() {
        let check = |bytes, expected: Option<Head>| assert_eq!(Head::parse(bytes).ok(), expected, "{bytes:?}");
        check([0, 0, 0, 5, 1, 0, 1, 0], Some(Head::Data { stream: 5, flags: 1, length: 256 }));
        check([0x80, 3, 0, 6, 0, 0, 0, 4], Some(Head::Control { kind: PING, flags: 0, length: 4 }));
        check([0, 0, 0, 0, 0, 0, 0, 0], None);
        check([0x80, 2, 0, 6, 0, 0, 0, 4], None);
        check([0x80, 3, 0, 8, 0, 0, 0x40, 1], None);
        check(*b"GET / HT", Some(Head::Data { stream: 0x4745_5420, flags: b'/', length: 0x20_4854 }));
    }
}
