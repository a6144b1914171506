//! A terminal as whoever holds its master sees it: its size, and the end of its input.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};

/// Sets the size of the terminal; its foreground processes get SIGWINCH.
pub fn resize(master: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    Ok(tcsetwinsize(master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// The byte that a reader of the terminal takes for the end of its input, `^D` as a rule. None where the terminal hands bytes
/// through as they are (termios(3), non-canonical mode): there is no such byte then.
pub fn end_of_input(master: BorrowedFd<'_>) -> Option<u8> {
    // On a master these are the attributes of the other side (tty_ioctl(4)).
    let modes = tcgetattr(master).ok()?;
    let byte = modes.special_codes[SpecialCodeIndex::VEOF];
    // _POSIX_VDISABLE is 0 on Linux: the program has switched the byte off.
    (modes.local_modes.contains(LocalModes::ICANON) && byte != 0).then_some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{OptionalActions, tcgetwinsize, tcsetattr};
    use std::os::fd::AsFd;

    #[test]
    fn a_master_knows_size_and_end() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let peer = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        resize(master.as_fd(), 132, 43).unwrap();
        let size = tcgetwinsize(&peer).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (132, 43));
        assert_eq!(end_of_input(master.as_fd()), Some(4));
        let mut modes = tcgetattr(&peer).unwrap();
        modes.make_raw();
        tcsetattr(&peer, OptionalActions::Now, &modes).unwrap();
        assert_eq!(end_of_input(master.as_fd()), None);
    }
}
