//! Frames of RFC 6455, section 5: a reader that passes messages on in parts, and how ours are written.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::WebSocketError;
use crate::stream::connection::chunk;
use crate::stream::output::Output;

/// Bytes of a control frame's payload.
const MAX_CONTROL: usize = 125;
/// Bytes of a message that are passed on at once.
const MAX_PART: usize = 64 << 10;

const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Why a connection is closed (section 7.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    /// In order.
    Normal = 1000,
    /// A frame or message that can't be.
    ProtocolError = 1002,
}

/// A part of a message.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    /// [`TEXT`] or [`BINARY`].
    pub kind: u8,
    /// The message begins with it.
    pub first: bool,
    /// The message ends with it.
    pub last: bool,
    /// Its bytes, unmasked.
    pub bytes: Bytes,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Of a message.
    Part(Part),
    /// The client closes; our own Close is in the output.
    Close,
}

/// A frame of which the payload is being read.
struct Frame {
    opcode: u8,
    fin: bool,
    mask: [u8; 4],
    left: u64,
}

/// The reader of one connection. Answers to control frames go to its output.
#[derive(Default)]
pub struct Reader {
    frame: Option<Frame>,
    /// The kind of the message that is not complete, and whether something of it was passed on.
    message: Option<(u8, bool)>,
    closed: bool,
}

impl Reader {
    /// The next part of a message, or the close. `None`: needs more bytes.
    pub fn read(&mut self, input: &mut BytesMut, output: &mut Output) -> Result<Option<Read>, WebSocketError> {
        loop {
            // Nothing is read after a Close.
            if self.closed {
                input.clear();
                return Ok(None);
            }
            let frame = match &mut self.frame {
                Some(frame) => frame,
                none => match head(input)? {
                    Some(frame) => none.insert(frame),
                    None => return Ok(None),
                },
            };
            if frame.opcode >= CLOSE {
                let length = frame.left as usize;
                if input.len() < length {
                    return Ok(None);
                }
                let mut payload = input.split_to(length);
                unmask(&mut payload, &mut frame.mask);
                let opcode = frame.opcode;
                self.frame = None;
                match opcode {
                    PING => output.control(message(PONG, &payload)),
                    PONG => {}
                    _ => {
                        check_close(&payload)?;
                        self.closed = true;
                        output.control(message(CLOSE, payload.get(..2).unwrap_or_default()));
                        return Ok(Some(Read::Close));
                    }
                }
                continue;
            }
            if let Some(part) = self.part(input)? {
                return Ok(Some(Read::Part(part)));
            }
            if self.frame.is_some() {
                return Ok(None);
            }
        }
    }

    /// What of the current data frame is there. `None`: nothing yet, or an empty frame in the middle of a message.
    fn part(&mut self, input: &mut BytesMut) -> Result<Option<Part>, WebSocketError> {
        let Some(frame) = &mut self.frame else { return Ok(None) };
        match (frame.opcode, self.message) {
            (CONTINUATION, None) => return Err(WebSocketError::Frame("a continuation of no message")),
            (CONTINUATION, Some(_)) => {}
            (_, Some(_)) => return Err(WebSocketError::Frame("a message within another")),
            (kind, None) => self.message = Some((kind, false)),
        }
        // From here on what is left of the frame continues the message.
        frame.opcode = CONTINUATION;
        if frame.left > 0 && input.is_empty() {
            return Ok(None);
        }
        let n = frame.left.min(input.len() as u64).min(MAX_PART as u64) as usize;
        frame.left -= n as u64;
        unmask(&mut input[..n], &mut frame.mask);
        let bytes = chunk(input, n);
        let ended = frame.left == 0;
        let last = ended && frame.fin;
        if ended {
            self.frame = None;
        }
        let (kind, begun) = self.message.unwrap_or((BINARY, false));
        self.message = if last { None } else { Some((kind, begun || !bytes.is_empty())) };
        Ok((last || !bytes.is_empty()).then_some(Part { kind, first: !begun, last, bytes }))
    }
}

/// The frame that begins the input, once all of its head is there.
fn head(input: &mut BytesMut) -> Result<Option<Frame>, WebSocketError> {
    let Some(&[first, second]) = input.first_chunk::<2>() else { return Ok(None) };
    let (fin, opcode, short) = (first & 0x80 != 0, first & 0x0f, usize::from(second & 0x7f));
    if first & 0x70 != 0 {
        return Err(WebSocketError::Frame("a frame of an extension"));
    }
    if !matches!(opcode, CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG) {
        return Err(WebSocketError::Frame("a frame of an unknown kind"));
    }
    if second & 0x80 == 0 {
        return Err(WebSocketError::Frame("a frame without a mask"));
    }
    if opcode >= CLOSE && (!fin || short > MAX_CONTROL) {
        return Err(WebSocketError::Frame("a control frame that is too long or in pieces"));
    }
    let extended = match short {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let length = 2 + extended + 4;
    if input.len() < length {
        return Ok(None);
    }
    let mut head = input.split_to(length);
    head.advance(2);
    let left = match extended {
        2 => u64::from(head.get_u16()),
        8 => head.get_u64(),
        _ => short as u64,
    };
    // The shortest form that fits, and no sign (section 5.2).
    if (extended == 2 && left < 126) || (extended == 8 && (left <= 0xffff || left >> 63 != 0)) {
        return Err(WebSocketError::Frame("a length that is not in its shortest form"));
    }
    let mut mask = [0; 4];
    head.copy_to_slice(&mut mask);
    Ok(Some(Frame { opcode, fin, mask, left }))
}

/// Removes the mask, and turns it to where the payload goes on.
fn unmask(bytes: &mut [u8], mask: &mut [u8; 4]) {
    let wide = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    let (chunks, rest) = bytes.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    mask.rotate_left(rest.len() % 4);
}

/// A Close has no payload, or a code that a peer may send and a reason in UTF-8.
fn check_close(payload: &[u8]) -> Result<(), WebSocketError> {
    match payload.split_first_chunk::<2>() {
        None if payload.is_empty() => Ok(()),
        Some((code, reason)) if matches!(u16::from_be_bytes(*code), 1000..=1003 | 1007..=1014 | 3000..=4999) && str::from_utf8(reason).is_ok() => {
            Ok(())
        }
        _ => Err(WebSocketError::Frame("a close that is not well formed")),
    }
}

/// The head of a message of so many bytes, in one frame.
pub fn begin(kind: u8, length: usize) -> BytesMut {
    let mut frame = BytesMut::with_capacity(16);
    frame.put_u8(0x80 | kind);
    match length {
        0..126 => frame.put_u8(length as u8),
        126..=0xffff => {
            frame.put_u8(126);
            frame.put_u16(length as u16);
        }
        _ => {
            frame.put_u8(127);
            frame.put_u64(length as u64);
        }
    }
    frame
}

/// A Close.
pub fn close(code: Code) -> Bytes {
    message(CLOSE, &(code as u16).to_be_bytes())
}

fn message(kind: u8, payload: &[u8]) -> Bytes {
    let mut frame = begin(kind, payload.len());
    frame.put_slice(payload);
    frame.freeze()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A client's frame.
    pub fn client(fin: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = begin(opcode, payload.len()).to_vec();
        frame[0] = if fin { 0x80 | opcode } else { opcode };
        frame[1] |= 0x80;
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        frame.extend_from_slice(&mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        frame
    }

    /// Each message with its kind, what was answered, and whether a Close came.
    type Messages = (Vec<(u8, Vec<u8>)>, Vec<u8>, bool);

    /// Everything read, in steps of so many bytes.
    fn read(bytes: &[u8], step: usize) -> Result<Messages, WebSocketError> {
        let (mut reader, mut input, mut output) = (Reader::default(), BytesMut::new(), Output::default());
        let (mut messages, mut current, mut closed) = (Vec::new(), None, false);
        for bytes in bytes.chunks(step) {
            input.extend_from_slice(bytes);
            while let Some(read) = reader.read(&mut input, &mut output)? {
                match read {
                    Read::Part(part) => {
                        assert_eq!(part.first, current.is_none());
                        let mut message: Vec<u8> = current.take().unwrap_or_default();
                        message.extend_from_slice(&part.bytes);
                        if part.last { messages.push((part.kind, message)) } else { current = Some(message) }
                    }
                    Read::Close => closed = true,
                }
            }
        }
        Ok((messages, output.take(), closed))
    }

    #[test]
    fn messages_come_whole_however_they_are_cut() {
        let long: Vec<u8> = (0..200_000).map(|n| (n % 251) as u8).collect();
        let mut bytes = client(true, BINARY, b"one");
        bytes.extend(client(false, TEXT, b"t"));
        bytes.extend(client(true, PING, b"are you there"));
        bytes.extend(client(false, CONTINUATION, b""));
        bytes.extend(client(true, CONTINUATION, b"wo"));
        bytes.extend(client(true, BINARY, b""));
        bytes.extend(client(true, PONG, b""));
        bytes.extend(client(true, BINARY, &long[..300]));
        bytes.extend(client(true, BINARY, &long));
        bytes.extend(client(true, CLOSE, &[0x03, 0xe8, b'o', b'k']));
        bytes.extend(client(true, BINARY, b"after the end"));
        for step in [1, 2, 3, 7, 1000, usize::MAX] {
            let (messages, answers, closed) = read(&bytes, step).unwrap();
            let expected =
                [(BINARY, b"one".to_vec()), (TEXT, b"two".to_vec()), (BINARY, vec![]), (BINARY, long[..300].to_vec()), (BINARY, long.clone())];
            assert!(messages == expected, "step {step}: {} messages", messages.len());
            assert_eq!(answers, [message(PONG, b"are you there"), message(CLOSE, &[0x03, 0xe8])].concat());
            assert!(closed);
        }
    }

    #[test]
    fn what_the_rfc_forbids_is_refused() {
        let check = |bytes: &[u8], words: &str| {
            let error = read(bytes, usize::MAX).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        };
        check(b"GET / HTTP/1.1", "extension");
        check(&[0xc2, 0x80], "extension");
        check(&[0x83, 0x80], "unknown kind");
        check(&[0x82, 0x01, 0x00], "mask");
        check(&[0x09, 0x80], "control");
        check(&[0x89, 0xfe, 0, 126, 0, 0, 0, 0], "control");
        check(&client(true, CONTINUATION, b"x"), "continuation");
        check(&[client(false, BINARY, b"x"), client(true, BINARY, b"y")].concat(), "within");
        check(&[0x82, 0xfe, 0, 125, 0, 0, 0, 0], "shortest");
        check(&[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], "shortest");
        check(&[0x82, 0xff, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0], "shortest");
        check(&client(true, CLOSE, b"x"), "close");
        check(&client(true, CLOSE, &[0x03, 0xed]), "close");
        check(&client(true, CLOSE, &[0x03, 0xe8, 0xff]), "close");
    }
}
