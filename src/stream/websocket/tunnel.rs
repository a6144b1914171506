//! SPDY in the binary messages of a WebSocket, as newer clients forward ports: where one message ends means nothing.

use bytes::{Bytes, BytesMut};

use super::WebSocketError;
use super::frame::{self, BINARY, Code, Read, Reader};
use crate::stream::connection::{Event, Machine, ProtocolError};
use crate::stream::output::{Output, Permit};
use crate::stream::spdy::Session;

/// One connection.
#[derive(Default)]
pub struct Tunnel {
    reader: Reader,
    spdy: Session,
    /// What came out of messages, and is not a whole frame of SPDY.
    inner: BytesMut,
    output: Output,
    closed: bool,
}

impl Tunnel {
    /// A connection without streams.
    pub fn new() -> Self {
        Self { spdy: Session::new(), ..Self::default() }
    }

    fn fail(&mut self, error: WebSocketError) -> ProtocolError {
        self.wrap();
        self.output.control(frame::close(Code::ProtocolError));
        self.closed = true;
        ProtocolError::WebSocket(error)
    }

    /// Puts what SPDY has to say into a message.
    fn wrap(&mut self) {
        let said = self.spdy.output();
        if !said.is_empty() && !self.closed {
            let head = frame::begin(BINARY, said.len()).freeze();
            if said.control_len() > 0 {
                self.output.control(head)
            } else {
                self.output.data(head, None)
            }
            self.output.append(said);
        }
    }
}

impl Machine for Tunnel {
    fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Event>, ProtocolError> {
        loop {
            match self.spdy.receive(&mut self.inner) {
                Ok(None) => self.wrap(),
                Ok(Some(event)) => {
                    self.wrap();
                    return Ok(Some(event));
                }
                Err(ProtocolError::Spdy(error)) => return Err(self.fail(WebSocketError::Tunnelled(error))),
                Err(error) => return Err(error),
            }
            match self.reader.read(input, &mut self.output) {
                Ok(None) => return Ok(None),
                Ok(Some(Read::Part(part))) if part.kind == BINARY => self.inner.extend_from_slice(&part.bytes),
                Ok(Some(Read::Part(_))) => return Err(self.fail(WebSocketError::Message("of text in a tunnel"))),
                Ok(Some(Read::Close)) => {
                    self.closed = true;
                    return Ok(Some(Event::Goodbye));
                }
                Err(error) => return Err(self.fail(error)),
            }
        }
    }

    fn accept(&mut self, stream: u32) {
        self.spdy.accept(stream);
        self.wrap();
    }

    fn refuse(&mut self, stream: u32) {
        self.spdy.refuse(stream);
        self.wrap();
    }

    fn send(&mut self, stream: u32, bytes: Bytes, permit: Permit) {
        self.spdy.send(stream, bytes, permit);
        self.wrap();
    }

    fn finish(&mut self, stream: u32) {
        self.spdy.finish(stream);
        self.wrap();
    }

    fn reset(&mut self, stream: u32) {
        self.spdy.reset(stream);
        self.wrap();
    }

    fn taken(&mut self, stream: u32, n: usize) {
        self.spdy.taken(stream, n);
        self.wrap();
    }

    fn waits(&self) -> bool {
        self.spdy.waits()
    }

    fn close(&mut self) {
        if !self.closed {
            self.spdy.close();
            self.wrap();
            self.output.control(frame::close(Code::Normal));
            self.closed = true;
        }
    }

    fn output(&mut self) -> &mut Output {
        &mut self.output
    }
}
