//! The stdio process itself: one poll loop over the containers' streams and the monitor's orders.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::errchain::{Kind, Remote};
use crate::monitor::log::{Log, Stream, file::Losses, line};
use crate::monitor::say;
use crate::monitor::stdio::attached::{Attached, Client, Said};
use crate::monitor::stdio::followed::{End, Followed};
use crate::monitor::stdio::orders::{Answer, Join, Message, Order};
use crate::monitor_api::MAX_MESSAGE;
use crate::sys::{fd, process};
use crate::wire;

/// Bytes of one read. Half a pipe: a writer goes on while the first half is written.
const INPUT: usize = 32 * 1024;
/// Bytes of lines in one write.
const OUTPUT: usize = 64 * 1024;
/// Reads of one stream for a drain: twice what a pipe holds, so that one who writes without end can't keep us.
const DRAIN_READS: usize = 4;

/// How long nothing has to happen before buffers are given back.
const QUIET: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Runs until the monitor is gone and every stream has ended.
pub fn run(control: OwnedFd, losses: &Losses) -> i32 {
    process::set_name(c"copepod-stdio");
    let copier = Copier { losses, input: Vec::new(), output: Vec::new() };
    let mut stdio = Stdio { control: Some(control), followed: Vec::new(), leaving: Attached::default(), next_client: 0, copier };
    stdio.leaving.end();
    while stdio.turn() {}
    0
}

/// The containers and the monitor.
struct Stdio<'a> {
    control: Option<OwnedFd>,
    followed: Vec<Followed>,
    /// Clients of containers that are not followed any more, which have not taken all that these had written.
    leaving: Attached,
    next_client: u32,
    copier: Copier<'a>,
}

/// What can be ready: of a container by its log's number, of a client by its own.
#[derive(Debug, Clone, Copy)]
enum Ready {
    /// The monitor.
    Control,
    /// A container's stream.
    End(u32, Stream),
    /// A container's stdin, which something waits for.
    Input(u32),
    /// A client's control socket.
    Client(u32, u32),
    /// What a client says.
    Stdin(u32, u32),
    /// A client's pipe, which something waits for.
    Full(u32, u32),
}

/// Stands for the containers of the clients that are leaving: no log has this number.
const NOBODY: u32 = 0;

impl Stdio<'_> {
    /// One wait and what came of it. False: nothing is left to do.
    fn turn(&mut self) -> bool {
        let Some(ready) = self.wait() else { return false };
        for (what, broken) in ready {
            match what {
                Ready::Control => self.order(),
                Ready::End(key, stream) => self.stream_ready(key, stream),
                Ready::Input(key) => self.input_ready(key, broken),
                Ready::Client(key, id) => self.client_ready(key, id),
                Ready::Stdin(key, id) => self.client_speaks(key, id),
                Ready::Full(key, id) => {
                    if let Some(attached) = self.attached(key) {
                        attached.flush(id, Instant::now());
                    }
                }
            }
        }
        let now = Instant::now();
        for at in 0..self.followed.len() {
            if self.followed[at].attached.settle(now) {
                self.close_input(self.followed[at].key);
            }
        }
        self.leaving.settle(now);
        true
    }

    /// Waits until something is ready or due: what, and whether its other end is closed. None: there is nothing to wait for.
    fn wait(&mut self) -> Option<Vec<(Ready, bool)>> {
        let mut watched = Watched(Vec::new());
        for followed in &self.followed {
            let key = followed.key;
            if !followed.attached.holds() {
                followed.ends.iter().for_each(|end| watched.add(Ready::End(key, end.stream), end.fd.as_fd(), PollFlags::IN));
            }
            let full = followed.input.as_ref().and_then(|input| input.full());
            full.into_iter().for_each(|input| watched.add(Ready::Input(key), input, PollFlags::OUT));
            let takes = followed.input.as_ref().is_some_and(|input| input.takes());
            for client in followed.attached.all() {
                watched.add_client(key, client);
                client.stdin.iter().filter(|_| takes).for_each(|stdin| watched.add(Ready::Stdin(key, client.id), stdin.as_fd(), PollFlags::IN));
            }
        }
        self.leaving.all().iter().for_each(|client| watched.add_client(NOBODY, client));
        self.control.iter().for_each(|control| watched.add(Ready::Control, control.as_fd(), PollFlags::IN));
        if watched.0.is_empty() {
            return None;
        }
        let due = self.followed.iter().map(|followed| &followed.attached).chain([&self.leaving]).filter_map(Attached::due).min();
        let (names, mut fds): (Vec<Ready>, Vec<PollFd<'_>>) = watched.0.into_iter().unzip();
        let ended = match due {
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now());
                poll(&mut fds, Some(&Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }))
            }
            None => match poll(&mut fds, Some(&QUIET)) {
                // The second poll comes at once after the rest: what lies between would be brought back into memory.
                Ok(0) => {
                    self.copier.rest();
                    poll(&mut fds, None)
                }
                ended => ended,
            },
        };
        match ended {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                say(format_args!("stdio: cannot poll: {error}"));
                return None;
            }
        }
        let broken = PollFlags::ERR | PollFlags::HUP;
        Some(
            names
                .into_iter()
                .zip(&fds)
                .filter(|(_, fd)| !fd.revents().is_empty())
                .map(|(name, fd)| (name, fd.revents().intersects(broken)))
                .collect(),
        )
    }

    fn find(&mut self, key: u32) -> Option<&mut Followed> {
        self.followed.iter_mut().find(|followed| followed.key == key)
    }

    fn attached(&mut self, key: u32) -> Option<&mut Attached> {
        if key == NOBODY { Some(&mut self.leaving) } else { self.find(key).map(|followed| &mut followed.attached) }
    }

    fn stream_ready(&mut self, key: u32, stream: Stream) {
        let Some(at) = self.followed.iter().position(|followed| followed.key == key) else { return };
        let Followed { log, ends, attached, .. } = &mut self.followed[at];
        ends.retain_mut(|end| end.stream != stream || self.copier.copy(end, log, attached));
    }

    fn input_ready(&mut self, key: u32, broken: bool) {
        let Some(followed) = self.find(key) else { return };
        // A terminal that nobody has open would say for ever that it is ready, and take nothing.
        if followed.input.as_mut().is_some_and(|input| !input.flush()) || broken {
            followed.drop_input();
        }
    }

    fn client_ready(&mut self, key: u32, id: u32) {
        let Some(client) = self.attached(key).and_then(|attached| attached.find(id)) else { return };
        match client.hear() {
            Said::Nothing => {}
            Said::Resize(size) => {
                if let Some(followed) = self.find(key) {
                    followed.resize(size);
                }
            }
            Said::Gone => {
                if self.attached(key).is_some_and(|attached| attached.remove(id)) {
                    self.close_input(key);
                }
            }
        }
    }

    /// Takes what a client says to what its container reads.
    fn client_speaks(&mut self, key: u32, id: u32) {
        let Some(at) = self.followed.iter().position(|followed| followed.key == key) else { return };
        let followed = &mut self.followed[at];
        let Some(input) = followed.input.as_mut().filter(|input| input.takes()) else { return };
        let Some(client) = followed.attached.find(id) else { return };
        let Some(stdin) = &client.stdin else { return };
        let words = &mut self.copier.input;
        words.clear();
        words.reserve_exact(INPUT);
        match rustix::io::read(stdin, rustix::buffer::spare_capacity(words)) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Ok(0) | Err(_) => {
                client.stdin = None;
                if std::mem::take(&mut client.closes_stdin) {
                    self.close_input(key);
                }
            }
            Ok(_) => {
                if !input.give(words) {
                    followed.drop_input();
                }
            }
        }
    }

    /// Ends what a container reads, for good.
    fn close_input(&mut self, key: u32) {
        if let Some(followed) = self.find(key) {
            followed.close_input();
            // The monitor has a duplicate, and must not give it to the next stdio process.
            self.answer(&Answer { stdin_closed: key, ..Answer::default() });
        }
    }

    fn answer(&self, answer: &Answer) {
        if let Some(control) = &self.control
            && let Err(error) = fd::send(control.as_fd(), &wire::encode(answer), &[])
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            say(format_args!("stdio: cannot answer: {error}"));
        }
    }

    fn order(&mut self) {
        let Some(control) = &self.control else { return };
        let received = fd::receive(control.as_fd(), MAX_MESSAGE);
        let (bytes, fds) = match received {
            Ok(Some(packet)) => packet,
            Ok(None) => {
                // The monitor is gone. What still writes is followed to its end; nobody can order anything any more.
                self.control = None;
                return;
            }
            Err(error) => {
                say(format_args!("stdio: cannot read an order: {error}"));
                self.control = None;
                return;
            }
        };
        let Ok(Message { seq, order }) = wire::decode(&bytes) else {
            say(format_args!("stdio: cannot read an order of {} bytes", bytes.len()));
            return;
        };
        let error = self.obey(order, fds).err();
        self.answer(&Answer { seq, error, ..Answer::default() });
    }

    fn obey(&mut self, order: Order, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let found = |key: u32, all: &[Followed]| all.iter().position(|f| f.key == key);
        match order {
            Order::None => {}
            Order::Open(open) => {
                let followed = Followed::open(open, fds)?;
                self.followed.push(followed);
            }
            Order::Attach(which) => {
                if let Some(followed) = self.find(which.key) {
                    fds.into_iter().for_each(|terminal| followed.add_terminal(terminal));
                }
            }
            Order::Reopen(which) => {
                if let Some(followed) = self.find(which.key) {
                    followed.log.reopen().map_err(|error| Remote::new(&error))?;
                }
            }
            Order::Drain(which) => {
                if let Some(at) = found(which.key, &self.followed) {
                    self.copier.drain(&mut self.followed[at]);
                    self.followed[at].attached.end();
                }
            }
            Order::Close(which) => {
                if let Some(at) = found(which.key, &self.followed) {
                    let mut followed = self.followed.swap_remove(at);
                    self.copier.drain(&mut followed);
                    for mut end in followed.ends {
                        self.copier.finish(&mut end, &mut followed.log);
                    }
                    self.leaving.adopt(followed.attached);
                }
            }
            Order::Join(join) => self.join(&join, fds)?,
        }
        Ok(())
    }

    /// Attaches a client to a container.
    fn join(&mut self, join: &Join, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        self.next_client += 1;
        let id = self.next_client;
        let gone = || Remote::text(Kind::FailedPrecondition, "the container is not there any more");
        let followed = self.find(join.key).ok_or_else(gone)?;
        let mut fds = fds.into_iter();
        let mut next = |wanted: bool| if wanted { fds.next() } else { None };
        let (control, stdin, stdout, stderr) = (next(true), next(join.stdin), next(join.stdout), next(join.stderr));
        let Some(control) = control else { return Err(Remote::text(Kind::Internal, "a client came without a control socket")) };
        let outputs = [(Stream::Stdout, stdout), (Stream::Stderr, stderr)].into_iter().filter_map(|(stream, pipe)| Some((stream, pipe?))).collect();
        let client = Client::new(id, control, stdin.filter(|_| followed.input.is_some()), outputs)
            .map_err(|error| Remote::from_links(Kind::Internal, vec!["cannot use the client's pipes".into(), error.to_string()]))?;
        let speaks = client.stdin.is_some();
        followed.attached.add(client)?;
        if followed.is_first(speaks)
            && let Some(client) = followed.attached.find(id)
        {
            client.closes_stdin = true;
        }
        Ok(())
    }
}

/// What is waited for.
struct Watched<'a>(Vec<(Ready, PollFd<'a>)>);

impl<'a> Watched<'a> {
    fn add(&mut self, what: Ready, fd: BorrowedFd<'a>, flags: PollFlags) {
        self.0.push((what, PollFd::from_borrowed_fd(fd, flags)));
    }

    /// A client's control socket, and the pipes that something waits for.
    fn add_client(&mut self, key: u32, client: &'a Client) {
        self.add(Ready::Client(key, client.id), client.control(), PollFlags::IN);
        client.full().for_each(|pipe| self.add(Ready::Full(key, client.id), pipe, PollFlags::OUT));
    }
}

/// Moves bytes, with the one pair of buffers that all streams share.
struct Copier<'a> {
    losses: &'a Losses,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Copier<'_> {
    /// Reads once and writes what was read, to the log first. False: the stream has ended.
    fn copy(&mut self, end: &mut End, log: &mut Log, attached: &mut Attached) -> bool {
        self.input.clear();
        self.input.reserve_exact(INPUT);
        let read = loop {
            match rustix::io::read(&end.fd, rustix::buffer::spare_capacity(&mut self.input)) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                // EIO is a terminal's way to say that nobody has it open any more.
                Err(_) => break 0,
                Ok(n) => break n,
            }
        };
        if read == 0 {
            self.finish(end, log);
            return false;
        }
        self.write(end, log);
        attached.give(end.stream, &self.input);
        true
    }

    /// Writes what was read to the log.
    fn write(&mut self, end: &mut End, log: &mut Log) {
        if log.is_discarded() {
            return;
        }
        let Self { losses, input, output } = self;
        let stamp = line::now();
        output.reserve_exact(OUTPUT.saturating_sub(output.capacity()));
        end.splitter.feed(input, |full, head, tail| {
            if !output.is_empty() && output.len() + line::HEADER + head.len() + tail.len() >= OUTPUT {
                log.append(output, losses);
                output.clear();
            }
            line::push(output, &stamp, end.stream, full, head, tail);
        });
        log.append(output, losses);
        output.clear();
    }

    /// Writes a line that will not end any more.
    fn finish(&mut self, end: &mut End, log: &mut Log) {
        let Self { losses, output, .. } = self;
        end.splitter.finish(|full, head, tail| line::push(output, &line::now(), end.stream, full, head, tail));
        log.append(output, losses);
        output.clear();
    }

    /// Reads what is there now, without waiting for more.
    fn drain(&mut self, followed: &mut Followed) {
        let Followed { ends, log, attached, .. } = followed;
        ends.retain_mut(|end| {
            for _ in 0..DRAIN_READS {
                let mut fds = [PollFd::new(&end.fd, PollFlags::IN)];
                if !matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1)) {
                    return true;
                }
                if !self.copy(end, log, attached) {
                    return false;
                }
            }
            true
        });
    }

    /// Gives the buffers back, and what else a process at rest does not need.
    fn rest(&mut self) {
        self.input = Vec::new();
        self.output = Vec::new();
        process::rest();
    }
}
