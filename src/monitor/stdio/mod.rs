//! The stdio process: the monitor's one long-lived helper, which moves what containers write into their log files and to attached
//! clients.
//!
//! A log on a stuck disk blocks this process and nobody else. It holds nothing that the monitor has not got a duplicate
//! of: killed at any instant, another one takes over, and at most the bytes of one read are missing. It never reads more
//! before what it has read is in a file or counted as lost, except for a line that has not ended.
//!
//! Attached clients end with it, and can attach to the next one.
//!
//! [`orders`] is what it is told, [`process`] the process, [`followed`] a container in it, [`input`] what that reads and [`attached`]
//! who is attached to it; [`link`] is the monitor's end. Not here: reaping, and what the
//! daemon asked for.

pub mod attached;
pub mod followed;
pub mod input;
pub mod link;
pub mod orders;
pub mod process;
