//! A volume that an image defines (`VOLUME`): a directory of the container's own that begins with what the image has there.
//!
//! Called in init, when nothing is mounted in the root yet: what is copied is the image's, whatever is mounted above it later, and
//! nobody else can change it. Everything goes by descriptor, and no symbolic link is followed below the directory itself.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::paths::{PathError, Root};
use crate::errchain::{Kind, Kinded};

/// A volume that cannot be filled.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The directory in the image can't be found.
    #[error("cannot find what the image has there")]
    Find(#[source] PathError),
    /// An entry can't be copied.
    #[error("cannot copy {path} of the image's volume")]
    Copy {
        /// The entry, relative to the volume.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Directories in directories without end.
    #[error("the image's volume is deeper than {MAX_DEPTH} directories")]
    Depth,
}

impl Kinded for VolumeError {
    fn kind(&self) -> Kind {
        match self {
            VolumeError::Find(error) => error.kind(),
            VolumeError::Copy { source, .. } if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => Kind::ResourceExhausted,
            VolumeError::Copy { .. } => Kind::Internal,
            VolumeError::Depth => Kind::InvalidArgument,
        }
    }
}

/// As deep as a layer may be (`image::Limits`); two descriptors are open for each.
const MAX_DEPTH: usize = 256;

/// Copies what the image has at `target` into the volume: content, owners, modes, times, extended attributes, hard links. A
/// target that the image lacks, or that is no directory, leaves the volume as it is.
pub fn fill(volume: BorrowedFd<'_>, target: &Path, root: Root<'_>) -> Result<(), VolumeError> {
    let Some(found) = root.find(target).map_err(VolumeError::Find)? else { return Ok(()) };
    let failed = |error: Errno| VolumeError::Copy { path: PathBuf::new(), source: error.into() };
    let stat = rustix::fs::fstat(&found).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(());
    }
    let from = directory(found.as_fd(), c".").map_err(failed)?;
    let to = directory(volume, c".").map_err(failed)?;
    let mut copy = Copy { volume: to.as_fd(), links: HashMap::new() };
    copy.directory(from.as_fd(), to.as_fd(), Path::new(""), 0)?;
    finish(from.as_fd(), to.as_fd(), &stat).map_err(|source| VolumeError::Copy { path: PathBuf::new(), source })
}

struct Copy<'a> {
    volume: BorrowedFd<'a>,
    /// Files with more than one name: device and inode, and where the first copy is in the volume.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Copy<'_> {
    fn directory(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &Path, depth: usize) -> Result<(), VolumeError> {
        if depth > MAX_DEPTH {
            return Err(VolumeError::Depth);
        }
        let failed = |error: Errno| VolumeError::Copy { path: path.into(), source: error.into() };
        for entry in Dir::read_from(from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let path = path.join(OsStr::from_bytes(name.to_bytes()));
            self.entry(from, to, name, &path, depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, path: &Path, depth: usize) -> Result<(), VolumeError> {
        let failed = |source: io::Error| VolumeError::Copy { path: path.into(), source };
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| failed(error.into()))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let made = rustix::fs::mkdirat(to, name, Mode::RWXU).and_then(|()| Ok((directory(from, name)?, directory(to, name)?)));
            let (below, copy) = made.map_err(|error| failed(error.into()))?;
            self.directory(below.as_fd(), copy.as_fd(), path, depth + 1)?;
            return finish(below.as_fd(), copy.as_fd(), &stat).map_err(failed);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                return rustix::fs::linkat(self.volume, first, to, name, AtFlags::empty()).map_err(|error| failed(error.into()));
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.into());
        }
        match kind {
            FileType::RegularFile => file(from, to, name, &stat),
            FileType::Symlink => symlink(from, to, name, &stat).map_err(io::Error::from),
            kind => node(to, name, kind, &stat).map_err(io::Error::from),
        }
        .map_err(failed)
    }
}

fn directory(at: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
    let source = rustix::fs::openat(from, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    let copy = rustix::fs::openat(to, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
    let (mut reader, mut writer) = (std::fs::File::from(source), std::fs::File::from(copy));
    io::copy(&mut reader, &mut writer)?;
    finish(reader.as_fd(), writer.as_fd(), stat)
}

fn symlink(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let text = rustix::fs::readlinkat(from, name, Vec::new())?;
    rustix::fs::symlinkat(text, to, name)?;
    let (uid, gid) = owner(stat);
    rustix::fs::chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    rustix::fs::utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

/// A FIFO, a socket or a device, which the device rules keep shut as they do in the image. In a user namespace, where nobody can make
/// or open a device, there is none.
fn node(to: BorrowedFd<'_>, name: &CStr, kind: FileType, stat: &Stat) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    match rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev) {
        Err(Errno::PERM) if matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) => return Ok(()),
        made => made?,
    }
    let (uid, gid) = owner(stat);
    rustix::fs::chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    // What was just made, which nobody else can reach, is no link.
    rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    rustix::fs::utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

/// Owner, mode, extended attributes and times, in the order in which none undoes another: chown(2) takes set-user-ID bits and
/// capabilities away.
fn finish(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    rustix::fs::fchown(to, uid, gid)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    attributes(from, to)?;
    Ok(rustix::fs::futimens(to, &times(stat))?)
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

/// The attributes that belong to the content: users' own, access lists, capabilities of files. An SELinux label is the
/// volume's, not the image's; one that the volume's filesystem can't hold is left out.
fn attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let names = match list(from) {
        Err(Errno::NOTSUP) => return Ok(()),
        names => names?,
    };
    let ours = |name: &&[u8]| {
        let kept: [&[u8]; 3] = [b"user.", b"system.posix_acl_", b"security.capability"];
        kept.iter().any(|prefix| name.starts_with(prefix))
    };
    for name in names.split(|&b| b == 0).filter(ours) {
        let name = CString::new(name)?;
        let mut value = vec![0; rustix::fs::fgetxattr_query(from, &name)?];
        let n = rustix::fs::fgetxattr(from, &name, &mut value[..])?;
        match rustix::fs::fsetxattr(to, &name, &value[..n], XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn list(from: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut names = vec![0; rustix::fs::flistxattr_query(from)?];
    let n = rustix::fs::flistxattr(from, &mut names[..])?;
    names.truncate(n);
    Ok(names)
}
