//! The ends of a session's streams that tokio moves bytes through: pipes, and the master of a terminal.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::Sleep;

use super::super::exec::DRAIN;
use crate::monitor_api::ExecExited;
use crate::sys::{self, terminal};

/// Bytes that are still read after a command has ended, at most: what any pipe may have held at that moment (the default of
/// fs.pipe-max-size). Without a bound a child in the background that writes for ever would never let the session end.
const LEFT_BEHIND: u64 = 1 << 20;

/// The master of a terminal.
#[derive(Debug)]
pub struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    pub(super) fn new(master: OwnedFd) -> io::Result<Arc<Self>> {
        sys::fd::set_nonblocking(&master)?;
        Ok(Arc::new(Self(sys::reactor::register(master, Interest::READABLE | Interest::WRITABLE)?)))
    }

    pub(super) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        terminal::resize(self.0.get_ref().as_fd(), columns, rows)
    }

    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), buffer.initialize_unfilled())?)) {
                Ok(Ok(n)) => {
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                // A terminal's way to say that nobody has it open any more.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => return Poll::Ready(done),
                Err(_would_block) => {}
            }
        }
    }
}

/// What the client says to the process. Writing to one that does not read any more is `BrokenPipe` (pipes) or goes nowhere
/// (terminals). Shutting it down is the end of the process's input; so is dropping it, but for a terminal.
#[derive(Debug)]
pub struct Input(To);

#[derive(Debug)]
enum To {
    Pipe(pipe::Sender),
    Terminal(Arc<Terminal>),
    Closed,
}

impl Input {
    pub(super) fn pipe(ours: pipe::Sender) -> Self {
        Self(To::Pipe(ours))
    }

    pub(super) fn terminal(terminal: Arc<Terminal>) -> Self {
        Self(To::Terminal(terminal))
    }
}

impl AsyncWrite for Input {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            To::Pipe(pipe) => Pin::new(pipe).poll_write(cx, bytes),
            To::Terminal(terminal) => terminal.poll_write(cx, bytes),
            To::Closed => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// A pipe is closed; a terminal that still takes lines gets its end-of-input character, as from a user who has nothing more to
    /// say.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let To::Terminal(terminal) = &self.0
            && let Some(byte) = terminal::end_of_input(terminal.0.get_ref().as_fd())
        {
            // A program that has ended needs no end of its input.
            let _ = ready!(terminal.poll_write(cx, &[byte]));
        }
        self.0 = To::Closed;
        Poll::Ready(Ok(()))
    }
}

/// What the process says to the client.
///
/// Its end comes when nobody has the other end open any more; or, once the command has ended, after what was left in the pipe
/// and a moment without anything: a child in the background may hold the other end for ever.
pub struct Output {
    from: From,
    exit: Option<Exit>,
}

enum From {
    Pipe(pipe::Receiver),
    Terminal(Arc<Terminal>),
}

/// What is known of the command's end.
struct Exit {
    /// Resolves when it has ended.
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// It has; so many bytes may still be read.
    left: Option<u64>,
    /// How long there may be nothing to read then.
    quiet: Option<Pin<Box<Sleep>>>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Output")
    }
}

impl Output {
    /// Of a command whose end `end` tells.
    pub(super) fn of_exec(from: pipe::Receiver, end: watch::Receiver<Option<ExecExited>>) -> Self {
        Self { from: From::Pipe(from), exit: Some(Exit::new(end)) }
    }

    /// Likewise, from a terminal.
    pub(super) fn of_terminal(from: Arc<Terminal>, end: watch::Receiver<Option<ExecExited>>) -> Self {
        Self { from: From::Terminal(from), exit: Some(Exit::new(end)) }
    }

    /// Of a container, which has no other end than that of its pipe.
    pub(super) fn of_container(from: pipe::Receiver) -> Self {
        Self { from: From::Pipe(from), exit: None }
    }

    fn poll_source(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.from {
            From::Pipe(pipe) => Pin::new(pipe).poll_read(cx, buffer),
            From::Terminal(terminal) => terminal.poll_read(cx, buffer),
        }
    }
}

impl Exit {
    fn new(mut end: watch::Receiver<Option<ExecExited>>) -> Self {
        // Closed without an end: the monitor is gone, and the command with it.
        let ended = Box::pin(async move { drop(end.wait_for(Option::is_some).await) });
        Self { ended, left: None, quiet: None }
    }

    /// How many bytes may still be read, once the command has ended.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Option<u64> {
        if self.left.is_none() && self.ended.as_mut().poll(cx).is_ready() {
            self.left = Some(LEFT_BEHIND);
        }
        self.left
    }
}

impl AsyncRead for Output {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let left = self.exit.as_mut().and_then(|exit| exit.poll_left(cx));
        if left == Some(0) {
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        let polled = self.poll_source(cx, buffer);
        let Some(exit) = self.exit.as_mut().filter(|_| left.is_some()) else { return polled };
        match polled {
            Poll::Ready(done) => {
                let read = (buffer.filled().len() - before) as u64;
                exit.left = exit.left.map(|left| left.saturating_sub(read));
                Poll::Ready(done)
            }
            Poll::Pending => exit.quiet.get_or_insert_with(|| Box::pin(tokio::time::sleep(DRAIN))).as_mut().poll(cx).map(Ok),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::exec::output_pipe;
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn wait<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    /// An output whose other end is open, and how its command's end is told.
    fn output() -> (Output, OwnedFd, watch::Sender<Option<ExecExited>>) {
        let (ended, end) = watch::channel(None);
        let (ours, theirs) = output_pipe().unwrap();
        (Output::of_exec(ours, end), theirs, ended)
    }

    #[test]
    fn output_ends_soon_after_the_command_though_the_pipe_is_held() {
        wait(async {
            let (mut output, theirs, ended) = output();
            rustix::io::write(&theirs, b"last words").unwrap();
            ended.send_replace(Some(ExecExited::default()));
            let mut text = String::new();
            output.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "last words");
            // The monitor is gone, and nobody will ever tell.
            let (mut output, _theirs, ended) = self::output();
            drop(ended);
            output.read_to_string(&mut text).await.unwrap();
        });
    }

    #[test]
    fn output_that_was_left_is_not_cut_by_a_slow_reader() {
        wait(async {
            let (mut output, theirs, ended) = output();
            rustix::io::write(&theirs, &[7; 60_000]).unwrap();
            ended.send_replace(Some(ExecExited::default()));
            let (mut all, mut some) = (0, [0; 1000]);
            loop {
                if all < 3000 {
                    tokio::time::sleep(DRAIN + DRAIN / 2).await;
                }
                match output.read(&mut some).await.unwrap() {
                    0 => break,
                    n => all += n,
                }
            }
            assert_eq!(all, 60_000);
        });
    }

    #[test]
    fn one_who_writes_for_ever_does_not_hold_the_session() {
        wait(async {
            let (mut output, theirs, ended) = output();
            ended.send_replace(Some(ExecExited::default()));
            let (mut all, mut some) = (0, [0; 4096]);
            loop {
                rustix::io::write(&theirs, &[7; 4096]).unwrap();
                match output.read(&mut some).await.unwrap() {
                    0 => break,
                    n => all += n as u64,
                }
            }
            assert_eq!(all, LEFT_BEHIND);
        });
    }

    #[test]
    fn a_terminals_input_has_an_end_and_its_output_ends_with_its_users() {
        wait(async {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
            grantpt(&master).unwrap();
            unlockpt(&master).unwrap();
            let peer = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
            let terminal = Terminal::new(master).unwrap();
            let (_ended, end) = watch::channel(None);
            let (mut input, mut output) = (Input::terminal(terminal.clone()), Output::of_terminal(terminal, end));
            input.write_all(b"a line\n").await.unwrap();
            input.shutdown().await.unwrap();
            assert!(input.write(b"x").await.is_err());
            let mut line = [0; 100];
            assert_eq!(rustix::io::read(&peer, &mut line).unwrap(), 7);
            assert_eq!(rustix::io::read(&peer, &mut line).unwrap(), 0);
            rustix::io::write(&peer, b"answer\n").unwrap();
            drop(peer);
            let mut text = String::new();
            output.read_to_string(&mut text).await.unwrap();
            // The terminal shows what is typed, too.
            assert_eq!(text, "a line\r\nanswer\r\n");
        });
    }
}
