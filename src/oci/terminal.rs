//! A terminal of the container's own devpts, for init and for exec'd processes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::paths::{Leaf, Links, PathError, Root};
use crate::errchain::{Kind, Kinded};
use crate::sys::mount;

/// A terminal that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    /// No devpts.
    #[error("the container has no devpts at /dev/pts")]
    NoDevpts,
    /// What is at /dev/pts isn't a devpts.
    #[error("/dev/pts in the container is not a devpts")]
    NotDevpts,
    /// /dev/pts can't be opened.
    #[error("cannot open the container's devpts")]
    Devpts(#[source] PathError),
    /// A pair can't be made.
    #[error("cannot open a terminal in the container")]
    Open(#[source] io::Error),
    /// /dev/console can't be made.
    #[error("cannot make /dev/console")]
    ConsolePath(#[source] PathError),
    /// /dev/console can't be mounted.
    #[error("cannot mount /dev/console")]
    Console(#[source] io::Error),
    /// It can't become the controlling terminal.
    #[error("cannot take the terminal")]
    Take(#[source] io::Error),
}

impl Kinded for TerminalError {
    fn kind(&self) -> Kind {
        match self {
            TerminalError::NoDevpts | TerminalError::NotDevpts => Kind::FailedPrecondition,
            TerminalError::Devpts(error) | TerminalError::ConsolePath(error) => error.kind(),
            _ => Kind::Internal,
        }
    }
}

/// A pair of terminal ends.
pub struct Terminal {
    /// For whoever shows it.
    pub master: OwnedFd,
    /// For the process.
    pub peer: OwnedFd,
}

/// A new terminal in a devpts that is known to be one. `size`: columns, rows.
pub fn open(devpts: BorrowedFd<'_>, size: (u16, u16)) -> Result<Terminal, TerminalError> {
    pair(devpts, size).map_err(TerminalError::Open)
}

fn pair(devpts: BorrowedFd<'_>, (columns, rows): (u16, u16)) -> io::Result<Terminal> {
    // By descriptor, not by the name that ptsname(3) would give: that one is looked up where the container can replace it (CVE-2025-52565).
    let master = rustix::fs::openat(devpts, c"ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let peer = rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    if columns != 0 || rows != 0 {
        rustix::termios::tcsetwinsize(&master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?;
    }
    Ok(Terminal { master, peer })
}

/// The devpts of a container that runs, checked to be one.
pub fn devpts(root: Root<'_>) -> Result<OwnedFd, TerminalError> {
    let found = root.find(Path::new("/dev/pts")).map_err(TerminalError::Devpts)?.ok_or(TerminalError::NoDevpts)?;
    const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;
    let is_devpts = rustix::fs::fstatfs(&found).map_err(|error| TerminalError::Open(error.into()))?.f_type as u64 == DEVPTS_SUPER_MAGIC;
    if is_devpts { Ok(found) } else { Err(TerminalError::NotDevpts) }
}

/// Mounts the process's end on /dev/console.
pub fn bind_console(peer: BorrowedFd<'_>, root: Root<'_>) -> Result<(), TerminalError> {
    let target = root.make(Path::new("/dev/console"), Leaf::File, Links::Refuse).map_err(TerminalError::ConsolePath)?;
    let tree = mount::clone_tree(peer, false).map_err(TerminalError::Console)?;
    mount::attach(tree.as_fd(), target.as_fd()).map_err(TerminalError::Console)
}

/// Makes it the controlling terminal of this process, which leads a session.
pub fn take(peer: BorrowedFd<'_>) -> Result<(), TerminalError> {
    rustix::process::ioctl_tiocsctty(peer).map_err(|error| TerminalError::Take(error.into()))
}
