//! Directories that an archive does not list: an overlay shows the topmost layer's owner and mode, so they must be those of
//! the layer below.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

/// Gives each of a layer's implied directories the owner, mode and times that the nearest layer below has for it. `below`: the
/// roots of the lower layers, topmost first. A path that none has, or that leads through a link, keeps what it has.
pub fn settle(layer: BorrowedFd<'_>, implied: &[String], below: &[OwnedFd]) -> rustix::io::Result<()> {
    for path in implied {
        let ours = match open(layer, path) {
            Ok(Some(ours)) => ours,
            Ok(None) | Err(Errno::NOTDIR) => continue,
            Err(error) => return Err(error),
        };
        for lower in below {
            match open(lower.as_fd(), path) {
                Ok(None) => continue,
                // A file or a whiteout hides what is further down.
                Err(Errno::NOTDIR) => {}
                Err(error) => return Err(error),
                Ok(Some(theirs)) => {
                    let stat = rustix::fs::fstat(&theirs)?;
                    rustix::fs::fchown(&ours, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
                    rustix::fs::fchmod(&ours, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
                    let time = |seconds, nanos| Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
                    let times = Timestamps {
                        last_access: time(stat.st_atime as i64, stat.st_atime_nsec),
                        last_modification: time(stat.st_mtime as i64, stat.st_mtime_nsec),
                    };
                    rustix::fs::futimens(&ours, &times)?;
                }
            }
            break;
        }
    }
    Ok(())
}

fn open(root: BorrowedFd<'_>, path: &str) -> rustix::io::Result<Option<OwnedFd>> {
    let at = if path.is_empty() { "." } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat2(root, at, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV) {
        Ok(open) => Ok(Some(open)),
        Err(Errno::NOENT | Errno::LOOP | Errno::XDEV) => Ok(None),
        Err(error) => Err(error),
    }
}
