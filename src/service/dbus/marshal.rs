//! D-Bus's encoding: every value at a multiple of its own size, arrays and strings with their length before them.

use super::Method;

/// A body that is being written; the caller keeps to its signature.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    /// `y`.
    pub fn byte(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// `u`.
    pub fn u32(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    /// `t`.
    pub fn u64(&mut self, value: u64) {
        self.align(8);
        self.bytes.extend(value.to_le_bytes());
    }

    /// `b`.
    pub fn bool(&mut self, value: bool) {
        self.u32(value.into());
    }

    /// `s` and `o`. What follows a NUL byte, which no string has, is left out.
    pub fn string(&mut self, value: &str) {
        let value = value.split('\0').next().unwrap_or_default();
        self.u32(value.len() as u32);
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    /// `g`.
    pub fn signature(&mut self, value: &str) {
        self.bytes.push(value.len() as u8);
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    /// `(…)`: the fields are written next.
    pub fn structure(&mut self) {
        self.align(8);
    }

    /// `a…`, of elements that begin at multiples of `align` (8 for structures and 64-bit numbers, 4 for strings and numbers, 1 for
    /// bytes).
    pub fn array<T>(&mut self, align: usize, elements: impl IntoIterator<Item = T>, mut each: impl FnMut(&mut Self, T)) {
        self.u32(0);
        let length_at = self.bytes.len() - 4;
        self.align(align);
        let start = self.bytes.len();
        elements.into_iter().for_each(|element| each(self, element));
        let length = (self.bytes.len() - start) as u32;
        self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }
}

/// A body that is being read; `None`: it has not what is asked for.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// A body from its beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(n)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    /// `y`.
    pub fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|taken| taken[0])
    }

    /// `u`.
    pub fn u32(&mut self) -> Option<u32> {
        self.align(4);
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    /// `s` and `o`.
    pub fn string(&mut self) -> Option<&'a str> {
        let length = self.u32()?;
        let text = self.take(length as usize)?;
        self.take(1)?;
        std::str::from_utf8(text).ok()
    }

    /// `g`.
    pub fn signature(&mut self) -> Option<&'a str> {
        let length = self.byte()?;
        let text = self.take(length.into())?;
        self.take(1)?;
        std::str::from_utf8(text).ok()
    }

    /// `(…)`: the fields are read next.
    pub fn structure(&mut self) {
        self.align(8);
    }

    /// `a…`, of elements that begin at multiples of `align`.
    pub fn array<T>(&mut self, align: usize, mut each: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let length = self.u32()? as usize;
        self.align(align);
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len())?;
        let mut elements = Vec::new();
        while self.at < end {
            elements.push(each(self)?);
        }
        (self.at == end).then_some(elements)
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An answer.
    Return,
    /// An answer that is an error.
    Error,
    /// A signal.
    Signal,
    /// A call of us, who serve nothing, or something newer.
    Other,
}

/// A message that came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Incoming {
    pub(super) kind: Kind,
    /// The serial of the call that it answers.
    pub(super) reply_to: u32,
    /// The signal's name.
    pub(super) member: String,
    /// The error's name.
    pub(super) error: String,
    pub(super) body: Vec<u8>,
}

/// Header fields.
mod field {
    pub(super) const PATH: u8 = 1;
    pub(super) const INTERFACE: u8 = 2;
    pub(super) const MEMBER: u8 = 3;
    pub(super) const ERROR_NAME: u8 = 4;
    pub(super) const REPLY_SERIAL: u8 = 5;
    pub(super) const DESTINATION: u8 = 6;
    pub(super) const SIGNATURE: u8 = 8;
}

/// A method call, whole.
pub(super) fn call(serial: u32, method: Method<'_>, signature: &str, body: &Writer) -> Vec<u8> {
    let mut message = Writer::default();
    // Little-endian, a call, no flags, version 1.
    [b'l', 1, 0, 1].into_iter().for_each(|byte| message.byte(byte));
    message.u32(body.bytes.len() as u32);
    message.u32(serial);
    let texts = [
        (field::PATH, "o", method.path),
        (field::INTERFACE, "s", method.interface),
        (field::MEMBER, "s", method.name),
        (field::DESTINATION, "s", method.destination),
        (field::SIGNATURE, "g", signature),
    ];
    message.array(8, texts.into_iter().filter(|(_, _, text)| !text.is_empty()), |message, (code, kind, text)| {
        message.structure();
        message.byte(code);
        message.signature(kind);
        if kind == "g" { message.signature(text) } else { message.string(text) }
    });
    message.align(8);
    message.bytes.extend(&body.bytes);
    message.bytes
}

/// The length of a whole message, from its first 16 bytes.
pub(super) fn length(head: &[u8; 16]) -> Option<usize> {
    let mut reader = Reader::new(head);
    if reader.byte()? != b'l' {
        return None;
    }
    reader.take(3)?;
    let (body, _, fields) = (reader.u32()? as usize, reader.u32()?, reader.u32()? as usize);
    16usize.checked_add(fields)?.checked_next_multiple_of(8)?.checked_add(body)
}

/// A whole message that came; `None`: it is none.
pub(super) fn incoming(message: &[u8]) -> Option<Incoming> {
    let mut reader = Reader::new(message);
    let (order, kind, _, version) = (reader.byte()?, reader.byte()?, reader.byte()?, reader.byte()?);
    if order != b'l' || version != 1 {
        return None;
    }
    let kind = match kind {
        2 => Kind::Return,
        3 => Kind::Error,
        4 => Kind::Signal,
        _ => Kind::Other,
    };
    let (length, _serial) = (reader.u32()? as usize, reader.u32()?);
    let mut incoming = Incoming { kind, reply_to: 0, member: String::new(), error: String::new(), body: Vec::new() };
    reader.array(8, |reader| {
        reader.structure();
        let code = reader.byte()?;
        match (code, reader.signature()?) {
            (field::MEMBER, "s") => incoming.member = reader.string()?.to_string(),
            (field::ERROR_NAME, "s") => incoming.error = reader.string()?.to_string(),
            (field::REPLY_SERIAL, "u") => incoming.reply_to = reader.u32()?,
            (_, "s" | "o") => drop(reader.string()?),
            (_, "g") => drop(reader.signature()?),
            (_, "u") => drop(reader.u32()?),
            _ => return None,
        }
        Some(())
    })?;
    reader.align(8);
    incoming.body = reader.take(length)?.to_vec();
    Some(incoming)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned_and_read_back() {
        let mut writer = Writer::default();
        writer.byte(7);
        writer.u32(1);
        writer.string("ab");
        writer.u64(u64::MAX);
        writer.array(8, [("x", 1u32), ("yz", 2)], |writer, (name, number)| {
            writer.structure();
            writer.string(name);
            writer.u32(number);
        });
        writer.array(1, [1u8, 2, 3], Writer::byte);
        assert_eq!(&writer.bytes[..24], [7, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, b'a', b'b', 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
        let mut reader = Reader::new(&writer.bytes);
        assert_eq!((reader.byte(), reader.u32(), reader.string()), (Some(7), Some(1), Some("ab")));
        reader.structure();
        assert_eq!(reader.take(8), Some([255; 8].as_slice()));
        let rows = reader.array(8, |reader| {
            reader.structure();
            Some((reader.string()?.to_string(), reader.u32()?))
        });
        assert_eq!(rows, Some(vec![("x".to_string(), 1), ("yz".to_string(), 2)]));
        assert_eq!(reader.array(1, Reader::byte), Some(vec![1, 2, 3]));
        assert_eq!(reader.byte(), None);
        let mut empty = Writer::default();
        empty.array(8, [0u64; 0], Writer::u64);
        // The padding before the first element is there without one.
        assert_eq!(empty.bytes, [0; 8]);
    }

    #[test]
    fn a_call_is_a_message() {
        let method = Method { destination: "a.b", path: "/a", interface: "a.c", name: "Do" };
        let mut body = Writer::default();
        body.string("x");
        let message = call(9, method, "s", &body);
        let head: [u8; 16] = message[..16].try_into().unwrap();
        assert_eq!(length(&head), Some(message.len()));
        let read = incoming(&message).unwrap();
        assert_eq!((read.kind, read.member.as_str(), read.body.as_slice()), (Kind::Other, "Do", body.bytes.as_slice()));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let mut message = call(1, Method { destination: "a.b", path: "/a", interface: "a.c", name: "Do" }, "", &Writer::default());
        for cut in 0..message.len() {
            assert_eq!(incoming(&message[..cut]), None, "{cut}");
        }
        for at in 0..message.len() {
            // Whatever it is then, reading it ends.
            for value in [0, 1, 255] {
                let was = std::mem::replace(&mut message[at], value);
                let _ = incoming(&message);
                message[at] = was;
            }
        }
        message[0] = b'B';
        assert_eq!(incoming(&message), None);
        assert_eq!(length(&message[..16].try_into().unwrap()), None);
        let mut huge = [255; 16];
        huge[0] = b'l';
        assert!(length(&huge).is_none_or(|length| length > super::super::MAX_MESSAGE));
    }
}
