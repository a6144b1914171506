//! Trees deleted, however deep: a bounded number of descriptors, no recursion that a hostile layer could drive.

use std::ffi::{CString, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags};
use rustix::io::Errno;

/// Levels that are descended; what lies deeper is first moved up.
const MAX_DEPTH: usize = 48;

/// Removes `name` in `parent`, whatever it is. One that is not there is no error. Nothing is followed.
pub fn remove_at(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let top = open(parent, name)?;
    clear(top.as_fd(), top.as_fd(), 0, &mut 0)?;
    Ok(gone(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR))?)
}

fn open(parent: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Empties a directory; what lies too deep is moved into `top`, which is emptied last.
fn clear(top: BorrowedFd<'_>, directory: BorrowedFd<'_>, depth: usize, moved: &mut u64) -> io::Result<()> {
    loop {
        let found = names(directory)?;
        if found.is_empty() {
            return Ok(());
        }
        for (name, is_directory) in found {
            if is_directory && depth >= MAX_DEPTH {
                move_up(top, directory, &name, moved)?;
            } else if is_directory {
                let child = open(directory, name.as_c_str())?;
                clear(top, child.as_fd(), depth + 1, moved)?;
                gone(rustix::fs::unlinkat(directory, name.as_c_str(), AtFlags::REMOVEDIR))?;
            } else {
                gone(rustix::fs::unlinkat(directory, name.as_c_str(), AtFlags::empty()))?;
            }
        }
    }
}

fn move_up(top: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &CString, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        match rustix::fs::renameat_with(directory, name.as_c_str(), top, format!(".removed-{moved}"), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            other => return Ok(gone(other)?),
        }
    }
}

fn gone(done: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match done {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// At most so many names at once: a directory of millions is emptied in parts.
const BATCH: usize = 4096;

fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<(CString, bool)>> {
    rustix::fs::seek(directory, rustix::fs::SeekFrom::Start(0))?;
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while names.len() < BATCH
        && let Some(entry) = entries.next()
    {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let is_directory = match entry.file_type() {
            FileType::Directory => true,
            FileType::Unknown => {
                let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            _ => false,
        };
        names.push((name.to_owned(), is_directory));
    }
    Ok(names)
}
