//! The stdio process: the monitor's one long-lived helper, which moves what containers write into their log files.
//!
//! A log on a stuck disk blocks this process and nobody else. It holds nothing that the monitor has not got a duplicate
//! of: killed at any instant, another one takes over, and at most the bytes of one read are missing. It never reads more
//! before what it has read is in a file or counted as lost, except for a line that has not ended.
//!
//! [`orders`] is what it is told, [`process`] the process, [`link`] the monitor's end. Not here: reaping, and what the
//! daemon asked for.

pub mod link;
pub mod orders;
pub mod process;
