//! The kernel, wrapped: the only module with `unsafe`. Each file is one family of system calls.
//!
//! Everything here takes and gives `OwnedFd`/`BorrowedFd`, born close-on-exec, and returns `io::Error` or the family's own
//! error. What rustix wraps safely is used from there directly.
#![allow(unsafe_code)]

pub mod bpf;
pub mod creds;
pub mod fd;
pub mod mount;
pub mod net;
pub mod netns;
pub mod ns;
pub mod process;
#[cfg(feature = "daemon")]
pub mod reactor;
pub mod seccomp;
pub mod terminal;
