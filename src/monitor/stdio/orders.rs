//! What the monitor tells its stdio process, one packet each, and the answer to each.

use crate::errchain::Remote;
use crate::plan::LogPlan;
use crate::{wire_enum, wire_struct};

wire_struct! {
    /// An order.
    pub struct Message {
        /// Repeated by the answer.
        1 seq: u32,
        /// What to do.
        2 order: Order,
    }

    /// What became of an order.
    pub struct Answer {
        /// The order's number.
        1 seq: u32,
        /// Why it failed.
        2 error: Option<Remote>,
        /// No answer: what the container of this log reads is closed for good.
        3 stdin_closed: u32,
    }

    /// A log and the streams that go to it.
    pub struct Open {
        /// A number for it.
        1 key: u32,
        /// The log.
        2 log: LogPlan,
        /// The last of the descriptors is the write end of the container's stdin.
        3 stdin: bool,
        /// A stdio process before this one had it: it can't fail, the file is opened as soon as it can be.
        4 again: bool,
        /// The container reads what attached clients say.
        5 reads: bool,
        /// Until the first of them goes.
        6 once: bool,
    }

    /// A client that attaches.
    pub struct Join {
        /// The number of the container's log.
        1 key: u32,
        /// It says something.
        2 stdin: bool,
        /// It takes stdout, or what a terminal shows.
        3 stdout: bool,
        /// It takes stderr.
        4 stderr: bool,
    }

    /// A log by its number.
    pub struct Key {
        /// The number.
        1 key: u32,
    }
}

wire_enum! {
    /// What to do.
    pub enum Order {
        /// Never sent.
        0 None,
        /// Opens a log. Descriptors: stdout and stderr; a terminal alone; or none, where the terminal comes later.
        1 Open(Open),
        /// Adds a terminal. Descriptors: it.
        2 Attach(Key),
        /// Opens the log's file anew; answered when it exists.
        3 Reopen(Key),
        /// The container has ended: writes what the streams hold now, and lets attached clients go with the last of it; answered
        /// when it is in the file.
        4 Drain(Key),
        /// The same, and forgets the log.
        5 Close(Key),
        /// Attaches a client. Descriptors: its control socket, then its ends of the streams that it has.
        6 Join(Join),
    }
}
