//! The log of a container: what it writes, cut into lines of the CRI's log format and appended to a file.
//!
//! [`split`] cuts a stream of bytes into lines, [`line`] is the format, [`file`] the file with its full disks and
//! rotations. Only the stdio process uses it; it does not know where the bytes come from.

pub mod file;
pub mod line;
pub mod split;

pub use file::{Log, LogError};
pub use line::Stream;
