//! The subprotocols `*.channel.k8s.io`: each message is a channel's number and bytes of its stream.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};

use super::WebSocketError;
use super::frame::{self, BINARY, Code, Part, Read, Reader, TEXT};
use crate::stream::connection::{Event, Machine, ProtocolError};
use crate::stream::output::{Output, Permit};

/// The channel that carries the half-close signal of version 5: 255 and the channel that is closed.
const CLOSE_SIGNAL: u8 = 255;

/// How a message looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// A byte, then the bytes.
    Binary,
    /// A digit, then base64.
    Base64,
}

/// What is known of the message that is being read.
enum Message {
    /// Its channel is not read yet.
    Begins,
    /// Bytes of a channel; base64 that isn't four characters yet.
    Of(u8, Vec<u8>),
    /// The half-close signal, whose channel follows.
    Closes(Option<u8>),
}

/// One connection. Streams are channels, from 0, and all are there from the beginning.
pub struct Channels {
    codec: Codec,
    count: u8,
    half_close: bool,
    reader: Reader,
    message: Message,
    output: Output,
}

impl Channels {
    /// With so many channels, at most 10 with base64; `half_close`: version 5.
    pub fn new(codec: Codec, count: u8, half_close: bool) -> Self {
        Self { codec, count, half_close, reader: Reader::default(), message: Message::Begins, output: Output::default() }
    }

    fn step(&mut self, input: &mut BytesMut) -> Result<Option<Event>, WebSocketError> {
        loop {
            match self.reader.read(input, &mut self.output)? {
                None => return Ok(None),
                Some(Read::Close) => return Ok(Some(Event::Goodbye)),
                Some(Read::Part(part)) => {
                    if let Some(event) = self.part(part)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    fn part(&mut self, Part { first, last, mut bytes, .. }: Part) -> Result<Option<Event>, WebSocketError> {
        if first {
            self.message = Message::Begins;
        }
        if matches!(self.message, Message::Begins) {
            let Some(&channel) = bytes.first() else { return Ok(None) };
            let _ = bytes.split_to(1);
            self.message = match self.codec {
                Codec::Binary if self.half_close && channel == CLOSE_SIGNAL => Message::Closes(None),
                Codec::Binary => Message::Of(channel, Vec::new()),
                Codec::Base64 => Message::Of(channel.wrapping_sub(b'0'), Vec::new()),
            };
        }
        match &mut self.message {
            Message::Begins => Ok(None),
            Message::Closes(channel) => {
                for byte in bytes {
                    if channel.replace(byte).is_some() {
                        return Err(WebSocketError::Message("that closes more than one channel"));
                    }
                }
                match *channel {
                    _ if !last => Ok(None),
                    Some(channel) if channel < self.count => Ok(Some(Event::Finished { stream: u32::from(channel) })),
                    _ => Err(WebSocketError::Message("that closes no channel")),
                }
            }
            Message::Of(channel, carried) => {
                let channel = *channel;
                if self.codec == Codec::Base64 {
                    bytes = decode(carried, &bytes, last)?;
                }
                // Kubelet ignores what is for no channel, and so do its clients.
                Ok((channel < self.count && !bytes.is_empty()).then_some(Event::Data { stream: u32::from(channel), bytes }))
            }
        }
    }
}

/// The bytes of a piece of base64; less than four characters are carried over to the next.
fn decode(carried: &mut Vec<u8>, bytes: &[u8], last: bool) -> Result<Bytes, WebSocketError> {
    let wrong = |_| WebSocketError::Message("that is not base64");
    carried.extend_from_slice(bytes);
    let whole = if last { carried.len() } else { carried.len() / 4 * 4 };
    let decoded = STANDARD.decode(&carried[..whole]).map_err(wrong)?;
    carried.drain(..whole);
    Ok(Bytes::from(decoded))
}

impl Machine for Channels {
    fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Event>, ProtocolError> {
        self.step(input).map_err(|error| {
            self.output.control(frame::close(Code::ProtocolError));
            ProtocolError::WebSocket(error)
        })
    }

    fn accept(&mut self, _: u32) {}

    fn refuse(&mut self, _: u32) {}

    fn send(&mut self, stream: u32, bytes: Bytes, permit: Permit) {
        match self.codec {
            Codec::Binary => {
                let mut head = frame::begin(BINARY, 1 + bytes.len());
                head.put_u8(stream as u8);
                if bytes.is_empty() {
                    return self.output.data(head.freeze(), Some(permit));
                }
                self.output.data(head.freeze(), None);
                self.output.data(bytes, Some(permit));
            }
            Codec::Base64 => {
                let text = STANDARD.encode(&bytes);
                let mut message = frame::begin(TEXT, 1 + text.len());
                message.put_u8(b'0' + stream as u8);
                message.put_slice(text.as_bytes());
                self.output.data(message.freeze(), Some(permit));
            }
        }
    }

    // No version has a way to tell a client of one channel's end.
    fn finish(&mut self, _: u32) {}

    fn reset(&mut self, _: u32) {}

    fn taken(&mut self, _: u32, _: usize) {}

    fn waits(&self) -> bool {
        false
    }

    fn close(&mut self) {
        self.output.control(frame::close(Code::Normal));
    }

    fn output(&mut self) -> &mut Output {
        &mut self.output
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::tests::client;
    use super::*;

    /// What a client's messages mean, cut into frames of so many bytes.
    fn events(mut channels: Channels, messages: &[(u8, &[u8])], cut: usize) -> Result<Vec<(u32, Vec<u8>)>, ProtocolError> {
        let mut input = BytesMut::new();
        for (kind, message) in messages {
            let parts: Vec<_> = if message.is_empty() { vec![*message] } else { message.chunks(cut).collect() };
            for (n, part) in parts.iter().enumerate() {
                input.extend_from_slice(&client(n + 1 == parts.len(), if n == 0 { *kind } else { 0 }, part));
            }
        }
        let mut found: Vec<(u32, Vec<u8>)> = Vec::new();
        while let Some(event) = channels.receive(&mut input)? {
            match event {
                Event::Data { stream, bytes } => match found.last_mut() {
                    Some((last, so_far)) if *last == stream => so_far.extend_from_slice(&bytes),
                    _ => found.push((stream, bytes.to_vec())),
                },
                Event::Finished { stream } => found.push((1000 + stream, Vec::new())),
                other => panic!("{other:?}"),
            }
        }
        Ok(found)
    }

    #[test]
    fn messages_reach_their_channels() {
        for cut in [1, 2, 3, 5, 100] {
            let messages: &[(u8, &[u8])] =
                &[(BINARY, b"\x00in"), (BINARY, b""), (TEXT, b"\x04size"), (BINARY, b"\x09nowhere"), (BINARY, b"\x00"), (BINARY, b"\x00put")];
            let found = events(Channels::new(Codec::Binary, 5, false), messages, cut).unwrap();
            assert_eq!(found, [(0, b"in".to_vec()), (4, b"size".to_vec()), (0, b"put".to_vec())]);
            let messages: &[(u8, &[u8])] = &[(TEXT, b"0aW4="), (TEXT, b"4c2l6ZQ=="), (TEXT, b"0"), (TEXT, b"0cHV0IGlu")];
            let found = events(Channels::new(Codec::Base64, 5, false), messages, cut).unwrap();
            assert_eq!(found, [(0, b"in".to_vec()), (4, b"size".to_vec()), (0, b"put in".to_vec())]);
        }
    }

    #[test]
    fn version_5_closes_one_channel() {
        for cut in [1, 2] {
            let found =
                events(Channels::new(Codec::Binary, 5, true), &[(BINARY, b"\x00x"), (BINARY, b"\xff\x00"), (BINARY, b"\xff\x04")], cut).unwrap();
            assert_eq!(found, [(0, b"x".to_vec()), (1000, vec![]), (1004, vec![])]);
            let check = |message: &[u8]| assert!(events(Channels::new(Codec::Binary, 5, true), &[(BINARY, message)], cut).is_err(), "{message:?}");
            check(b"\xff");
            check(b"\xff\x05");
            check(b"\xff\x00\x00");
        }
        // Before version 5 it is a channel that nobody has.
        assert_eq!(events(Channels::new(Codec::Binary, 5, false), &[(BINARY, b"\xff\x00")], 9).unwrap(), []);
    }

    #[test]
    fn base64_that_is_none_ends_the_connection() {
        for message in [&b"0aW4"[..], b"0a", b"0????", b"0aW4=aW4="] {
            assert!(events(Channels::new(Codec::Base64, 5, false), &[(TEXT, message)], 100).is_err(), "{message:?}");
        }
    }

    #[tokio::test]
    async fn what_we_send_carries_its_channel() {
        let semaphore = std::sync::Arc::new(tokio::sync::Semaphore::new(10));
        let check = async |codec, stream, bytes: &'static [u8], expected: &[u8]| {
            let mut channels = Channels::new(codec, 5, false);
            let permit = async || semaphore.clone().acquire_owned().await.unwrap();
            let permit = Permit::new(permit().await, permit().await);
            channels.send(stream, Bytes::from_static(bytes), permit);
            assert_eq!(semaphore.available_permits(), 8);
            assert_eq!(channels.output().take(), expected);
            assert_eq!(semaphore.available_permits(), 10);
        };
        check(Codec::Binary, 1, b"out", b"\x82\x04\x01out").await;
        check(Codec::Binary, 2, b"", b"\x82\x01\x02").await;
        check(Codec::Base64, 3, b"err", b"\x81\x053ZXJy").await;
        check(Codec::Base64, 1, b"", b"\x81\x011").await;
    }
}
