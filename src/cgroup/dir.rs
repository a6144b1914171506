//! One directory of a cgroup filesystem: its files by name, and what stands below it.
//!
//! Opened once per operation; every file is opened relative to it. Nothing is cached between operations, so that a group
//! that was removed and made again is never written through an old descriptor.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::CgroupError;

/// An open directory and its path, for errors.
#[derive(Debug)]
pub(super) struct Dir {
    path: PathBuf,
    fd: OwnedFd,
}

impl Dir {
    /// Opens a directory. `None`: there is none.
    pub(super) fn find(path: &Path) -> Result<Option<Self>, CgroupError> {
        match rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { path: path.to_path_buf(), fd })),
            Err(Errno::NOENT | Errno::NODEV) => Ok(None),
            Err(errno) => Err(CgroupError::Open { path: path.to_path_buf(), source: errno.into() }),
        }
    }

    /// Opens a directory that must be there.
    pub(super) fn open(path: &Path) -> Result<Self, CgroupError> {
        Self::find(path)?.ok_or_else(|| CgroupError::Open { path: path.to_path_buf(), source: Errno::NOENT.into() })
    }

    /// Its descriptor.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Its descriptor.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The path of a file in it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a value in one write(2). `false`: there is no such file.
    pub(super) fn try_write(&self, name: &str, value: &str) -> Result<bool, CgroupError> {
        match self.write_raw(name, value) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(source) => Err(CgroupError::Write { file: self.file(name), value: value.to_string(), source }),
        }
    }

    /// Writes a value to a file that a limit needs: without it the limit can't be had on this node.
    pub(super) fn write(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        match self.try_write(name, value)? {
            true => Ok(()),
            false => Err(CgroupError::Unsupported { file: self.file(name), value: value.to_string() }),
        }
    }

    /// Writes back what [`read`](Self::read) gave, unless it stands there still. `false`: it could not be.
    pub(super) fn restore(&self, name: &str, text: &str) -> bool {
        if matches!(self.read(name), Ok(Some(now)) if now == text) {
            return true;
        }
        // An empty list (v2's cpuset.cpus) is written as a line, since nothing is written by no bytes.
        let mut lines = text.lines().chain(text.trim().is_empty().then_some("\n"));
        lines.all(|line| self.try_write(name, line).is_ok())
    }

    /// Moves a process in.
    pub(super) fn enter(&self, pid: u32) -> Result<(), CgroupError> {
        self.write_raw("cgroup.procs", &pid.to_string()).map_err(|source| CgroupError::Enter { pid, path: self.path.clone(), source })
    }

    /// Opens a file for writing.
    pub(super) fn open_write(&self, name: &str) -> Result<OwnedFd, CgroupError> {
        rustix::fs::openat(&self.fd, name, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|errno| CgroupError::Open { path: self.file(name), source: errno.into() })
    }

    fn write_raw(&self, name: &str, value: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.fd, name, flags, Mode::empty())?;
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, value.as_bytes()))?;
        if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Opens a file for reading. `None`: there is none.
    pub(super) fn open_file(&self, name: &str) -> Result<Option<OwnedFd>, CgroupError> {
        match rustix::fs::openat(&self.fd, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT | Errno::NODEV) => Ok(None),
            Err(errno) => Err(CgroupError::Read { file: self.file(name), source: errno.into() }),
        }
    }

    /// A file's text. `None`: there is none, the group has gone meanwhile, or the kernel doesn't offer it (a pressure file
    /// with PSI switched off).
    pub(super) fn read(&self, name: &str) -> Result<Option<String>, CgroupError> {
        let Some(file) = self.open_file(name)? else { return Ok(None) };
        let mut bytes = Vec::with_capacity(4096);
        let mut offset = 0;
        loop {
            bytes.resize(offset + 4096, 0);
            match rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut bytes[offset..])) {
                Ok(0) => break,
                Ok(n) => offset += n,
                Err(Errno::NODEV | Errno::NOENT | Errno::OPNOTSUPP) => return Ok(None),
                Err(errno) => return Err(CgroupError::Read { file: self.file(name), source: errno.into() }),
            }
        }
        bytes.truncate(offset);
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// A file that holds one number, or `max`, which is `None` inside.
    pub(super) fn number(&self, name: &str) -> Result<Option<Option<u64>>, CgroupError> {
        let Some(text) = self.read(name)? else { return Ok(None) };
        match text.trim() {
            "max" => Ok(Some(None)),
            text => match text.parse::<u64>() {
                Ok(n) => Ok(Some(Some(n))),
                Err(_) => Err(CgroupError::Parse { file: self.file(name), value: text.to_string() }),
            },
        }
    }

    /// The processes in it, not those below. 0 stands for one that our PID namespace doesn't see, and is left out.
    pub(super) fn procs(&self, into: &mut Vec<u32>) -> Result<(), CgroupError> {
        let text = self.read("cgroup.procs")?.unwrap_or_default();
        into.extend(text.lines().filter_map(|line| line.trim().parse::<u32>().ok()).filter(|&pid| pid != 0));
        Ok(())
    }

    /// The processes in it and below.
    pub(super) fn procs_below(&self, into: &mut Vec<u32>) -> Result<(), CgroupError> {
        self.procs(into)?;
        for child in self.children()? {
            if let Some(dir) = Dir::find(&child)? {
                dir.procs_below(into)?;
            }
        }
        Ok(())
    }

    /// The groups directly below it.
    pub(super) fn children(&self) -> Result<Vec<PathBuf>, CgroupError> {
        // A group without any has two links; the link count saves reading a hundred file names. Not every filesystem
        // counts so: 1 says nothing (btrfs), and a test may run on such.
        let read = |errno: Errno| CgroupError::Open { path: self.path.clone(), source: errno.into() };
        if rustix::fs::fstat(&self.fd).map_err(read)?.st_nlink == 2 {
            return Ok(Vec::new());
        }
        let mut children = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(read)? {
            let entry = match entry {
                Ok(entry) => entry,
                Err(Errno::NOENT | Errno::NODEV) => break,
                Err(errno) => return Err(read(errno)),
            };
            let name = entry.file_name().to_bytes();
            if entry.file_type() == FileType::Directory && name != b"." && name != b".." {
                children.push(self.path.join(OsStr::from_bytes(name)));
            }
        }
        Ok(children)
    }
}

/// Makes a directory. `false`: it is there already.
pub(super) fn make(path: &Path) -> Result<bool, CgroupError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(errno) => Err(CgroupError::Create { path: path.to_path_buf(), source: errno.into() }),
    }
}

/// Makes a directory and the missing ones above it, down from `root`, which must exist. Gives those made, outermost first.
pub(super) fn make_below(root: &Path, path: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    // The common case first: everything above is there.
    match make(path) {
        Ok(true) => return Ok(vec![path.to_path_buf()]),
        Ok(false) => return Ok(Vec::new()),
        Err(CgroupError::Create { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut missing: Vec<&Path> = path.ancestors().take_while(|above| *above != root).collect();
    missing.reverse();
    let mut made = Vec::new();
    for dir in missing {
        match make(dir) {
            Ok(true) => made.push(dir.to_path_buf()),
            Ok(false) => {}
            Err(error) => {
                for dir in made.iter().rev() {
                    let _ = rustix::fs::rmdir(dir);
                }
                return Err(error);
            }
        }
    }
    Ok(made)
}

/// Removes one directory. `true`: it is gone. `false`: something is in it still.
pub(super) fn remove(path: &Path) -> Result<bool, CgroupError> {
    match rustix::fs::unlinkat(rustix::fs::CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(true),
        Err(Errno::BUSY | Errno::NOTEMPTY) => Ok(false),
        Err(errno) => Err(CgroupError::Remove { path: path.to_path_buf(), source: errno.into() }),
    }
}

/// Removes a directory and those below it, deepest first. `true`: all are gone.
pub(super) fn remove_tree(path: &Path) -> Result<bool, CgroupError> {
    if remove(path)? {
        return Ok(true);
    }
    let Some(dir) = Dir::find(path)? else { return Ok(true) };
    let mut gone = true;
    for child in dir.children()? {
        gone &= remove_tree(&child)?;
    }
    Ok(gone && remove(path)?)
}
