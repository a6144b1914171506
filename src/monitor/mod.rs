//! The monitor: one process per pod, which holds the pod's namespaces, reaps its processes and answers the daemon.
//!
//! It has one thread and one poll loop ([`pod`]), and nothing in it waits for anybody's disk, mount, or client: what may
//! block is forked ([`creator`]), output is moved by a process of its own ([`stdio`]), and answers are queued ([`clients`]).
//! It outlives the daemon; what happens meanwhile is recorded and told to the next one. It is not a supervisor: it decides
//! nothing, restarts no container, and knows no CRI.
//!
//! Started by the daemon as `copepod-monitor --pod-dir DIR [--cgroup PATH]`, with the first connection as descriptor 0; and as
//! `copepod-monitor --probe DIR` to try out what the node can do. As
//! `copepod-monitor --hold` the program is no monitor: it does nothing until its descriptor 0 ends, and keeps the control group
//! that it was put into.

pub mod attach;
pub mod children;
pub mod clients;
pub mod containers;
pub mod creator;
pub mod execs;
pub mod log;
pub mod ooms;
pub mod pod;
pub mod requests;
pub mod runtime;
pub mod sandbox;
pub mod startup;
pub mod stdio;
pub mod stop;

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::errchain::Chain;
use crate::monitor_api::probe;
use crate::oci;

/// The program: runs until the daemon says [`crate::monitor_api::Call::Exit`].
pub fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    if args.next_if(|argument| argument == probe::ARGUMENT).is_some() {
        return try_out(args.next().as_deref().map(Path::new));
    }
    if args.next_if(|argument| argument == "--hold").is_some() {
        return hold();
    }
    match startup::start(args) {
        Ok(mut pod) => {
            pod.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(format_args!("{}", Chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// The other thing that this program does: tries out what the node can do, and says so on stdout, one feature a line.
fn try_out(dir: Option<&Path>) -> ExitCode {
    let Some(dir) = dir else {
        say(format_args!("usage: copepod-monitor {} DIR", probe::ARGUMENT));
        return ExitCode::FAILURE;
    };
    let tried =
        [(probe::RECURSIVE_READ_ONLY_MOUNTS, oci::probe::recursive_read_only(dir)), (probe::USER_NAMESPACES, oci::probe::user_namespaces(dir))];
    for (name, result) in tried {
        let answer = result.map_or_else(|error| Chain(&error).to_string().replace('\n', " "), |()| probe::YES.into());
        // Nobody who would read it is no reason to fail.
        let _ = writeln!(std::io::stdout(), "{name} {answer}");
    }
    ExitCode::SUCCESS
}

/// Waits for the end of descriptor 0, which comes with its writer's.
fn hold() -> ExitCode {
    match std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// One line on stderr, which is the daemon's log. A line that would have to wait is not said, one that can't be written is
/// nobody's concern: stderr may be a pipe whose reader is gone.
pub fn say(text: fmt::Arguments<'_>) {
    let stderr = std::io::stderr();
    let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
    if matches!(poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1)) {
        // A pipe that poll says is writable takes PIPE_BUF bytes at least.
        let mut line = format!("copepod-monitor[{}]: {text}", std::process::id()).replace('\n', " ").into_bytes();
        line.truncate(4000);
        line.push(b'\n');
        let _ = stderr.lock().write_all(&line);
    }
}
