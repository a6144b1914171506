//! Exec and attach: a client's streams, and a process's.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::ask::{BoxFuture, Streams};
use super::connection::{Connection, Incoming, Outgoing};
use super::session::Stopping;
use super::status::End;
use super::upgrade::Version;
use crate::errchain::{Chain, Remote};

/// Bytes that are read of a process's output at once.
const CHUNK: usize = 32 << 10;
/// How long a client may take to open its streams.
const OPENING: Duration = Duration::from_secs(30);
/// Bytes of a resize message that is not complete.
const MAX_RESIZE: usize = 4096;

/// Which streams a client is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// It sends stdin.
    pub stdin: bool,
    /// It reads stdout.
    pub stdout: bool,
    /// It reads stderr.
    pub stderr: bool,
    /// It sends the terminal's size.
    pub resize: bool,
}

/// One stream of a client, in both directions: SPDY's are so, and each end is waited for.
pub type Halves = (Incoming, Outgoing);

/// A client's streams.
#[derive(Default)]
pub struct Channels {
    /// Stdin.
    pub stdin: Option<Halves>,
    /// Stdout.
    pub stdout: Option<Halves>,
    /// Stderr.
    pub stderr: Option<Halves>,
    /// How it ended.
    pub error: Option<Halves>,
    /// The terminal's size.
    pub resize: Option<Halves>,
}

impl Wanted {
    /// The streams as a SPDY client opens them, by their `streamType`. `None`: it left, took too long, or opened another one
    /// or one twice.
    pub async fn collect(self, connection: &mut Connection) -> Option<Channels> {
        let mut channels = Channels::default();
        let wanted = 1 + [self.stdin, self.stdout, self.stderr, self.resize].into_iter().filter(|wanted| *wanted).count();
        let collecting = async {
            for _ in 0..wanted {
                let opened = connection.opened().await?;
                let (slot, expected) = match opened.headers.get("streamtype") {
                    Some("error") => (&mut channels.error, true),
                    Some("stdin") => (&mut channels.stdin, self.stdin),
                    Some("stdout") => (&mut channels.stdout, self.stdout),
                    Some("stderr") => (&mut channels.stderr, self.stderr),
                    Some("resize") => (&mut channels.resize, self.resize),
                    _ => return None,
                };
                if !expected || slot.is_some() {
                    return None;
                }
                *slot = opened.accept();
            }
            Some(())
        };
        timeout(OPENING, collecting).await.ok().flatten()?;
        Some(channels)
    }
}

/// Moves bytes until the process has ended, the client is gone or the server ends, and tells the client how it was.
/// `attached`: an exit is no failure then, and says nothing.
pub async fn serve(
    connection: &Connection,
    channels: Channels,
    opening: BoxFuture<'_, Result<Streams, Remote>>,
    attached: bool,
    version: Version,
    mut stopping: Stopping,
) {
    let Channels { stdin, stdout, stderr, error, resize } = channels;
    let Some((unused, mut error)) = error else { return };
    // The client has nothing to say here.
    drop(unused);
    let end = tokio::select! {
        () = connection.gone() => return,
        () = stopping.wait() => End::Failure("the container runtime is shutting down".into()),
        opened = opening => match opened {
            Err(why) => End::Failure(Chain(&why).to_string()),
            Ok(streams) => {
                let rest = Channels { stdin, stdout, stderr, error: None, resize };
                match process(connection, rest, streams, attached, stopping).await {
                    None => return,
                    Some(end) => end,
                }
            }
        },
    };
    let told = end.told(version);
    if !told.is_empty() {
        let _ = error.send(Bytes::from(told)).await;
    }
}

/// The process's part: `None` when the client is gone. Ends with every stream of the client finished.
async fn process(connection: &Connection, channels: Channels, streams: Streams, attached: bool, mut stopping: Stopping) -> Option<End> {
    let Streams { stdin, stdout, stderr, mut control } = streams;
    let input = async {
        if let (Some((incoming, outgoing)), Some(stdin)) = (channels.stdin, stdin) {
            feed(incoming, stdin).await;
            // The process reads no more, or the client says no more.
            drop(outgoing);
        }
    };
    let outputs = async { tokio::join!(drain(stdout, channels.stdout), drain(stderr, channels.stderr)) };
    let (mut input, mut outputs) = (pin!(input), pin!(outputs));
    let mut sizes = channels.resize.map(|(incoming, outgoing)| Sizes { incoming, _outgoing: outgoing, buffer: Vec::new() });
    let (mut fed, mut drained, mut exit) = (false, false, None);
    loop {
        match exit.take() {
            Some(exit) if drained => return Some(ended(exit, attached)),
            waiting => exit = waiting,
        }
        tokio::select! {
            () = connection.gone() => return None,
            () = stopping.wait() => return Some(End::Failure("the container runtime is shutting down".into())),
            () = &mut input, if !fed => fed = true,
            _ = &mut outputs, if !drained => drained = true,
            ended = control.ended(), if exit.is_none() => exit = Some(ended),
            size = next_size(&mut sizes), if sizes.is_some() => match size {
                Some((width, height)) => control.resize(width, height),
                None => sizes = None,
            },
        }
    }
}

fn ended(exit: Result<i32, Remote>, attached: bool) -> End {
    match exit {
        Ok(0) => End::Success,
        Ok(_) if attached => End::Success,
        Ok(code) => End::Exit(code),
        Err(why) => End::Failure(Chain(&why).to_string()),
    }
}

/// Writes what the client sends; a stream that is cut ends as one that is finished.
async fn feed(mut incoming: Incoming, mut stdin: Box<dyn AsyncWrite + Send + Unpin>) {
    while let Ok(Some(bytes)) = incoming.next().await {
        if stdin.write_all(&bytes).await.is_err() {
            // What still comes is thrown away: a process need not read its stdin.
            return;
        }
    }
    let _ = stdin.shutdown().await;
}

/// Sends what the process writes. When the client takes no more, the process learns it from its pipe.
async fn drain(output: Option<Box<dyn AsyncRead + Send + Unpin>>, halves: Option<Halves>) {
    let (Some(mut output), Some((incoming, mut outgoing))) = (output, halves) else { return };
    // The client has nothing to say here.
    drop(incoming);
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        match output.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if outgoing.send(buffer.split().freeze()).await.is_err() {
            return;
        }
    }
}

/// Sizes of a terminal, as JSON objects one after the other.
struct Sizes {
    incoming: Incoming,
    _outgoing: Outgoing,
    buffer: Vec<u8>,
}

#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

/// The newest size; `None` when there will be none any more. Cancel-safe.
async fn next_size(sizes: &mut Option<Sizes>) -> Option<(u16, u16)> {
    let sizes = sizes.as_mut()?;
    loop {
        let bytes = sizes.incoming.next().await.ok()??;
        sizes.buffer.extend_from_slice(&bytes);
        if let Some(size) = last_size(&mut sizes.buffer)? {
            return Some(size);
        }
    }
}

/// The last whole size of the buffer, which keeps what is behind it. `None`: there is something else in it.
fn last_size(buffer: &mut Vec<u8>) -> Option<Option<(u16, u16)>> {
    let mut found = serde_json::Deserializer::from_slice(buffer).into_iter::<Size>();
    let (mut last, mut whole) = (None, 0);
    loop {
        match found.next() {
            Some(Ok(size)) => {
                last = Some((size.width, size.height));
                whole = found.byte_offset();
            }
            Some(Err(error)) if !error.is_eof() => return None,
            _ => break,
        }
    }
    buffer.drain(..whole);
    (buffer.len() <= MAX_RESIZE).then_some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_come() {
        let mut buffer = Vec::new();
        let mut check = |more: &str, expected: Option<Option<(u16, u16)>>| {
            buffer.extend_from_slice(more.as_bytes());
            assert_eq!(last_size(&mut buffer), expected, "{more:?}");
        };
        check("", Some(None));
        check("{\"Width\":80,\"Hei", Some(None));
        check("ght\":24}\n", Some(Some((80, 24))));
        check("{\"Width\":1,\"Height\":2}{\"Width\":3,\"Height\":4}\n{", Some(Some((3, 4))));
        check("\"Height\":6,\"Width\":5}", Some(Some((5, 6))));
        check(&" ".repeat(MAX_RESIZE + 2), None);
        for wrong in ["{\"Width\":70000,\"Height\":1}", "[]", "x", "{\"Width\":-1,\"Height\":1}"] {
            assert_eq!(last_size(&mut wrong.into()), None, "{wrong}");
        }
    }
}
