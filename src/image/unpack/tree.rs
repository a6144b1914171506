//! The layer's files as they are made: every call is relative to a descriptor inside the layer's directory, and no name is
//! ever followed but by [`RESOLVE_IN_ROOT`](ResolveFlags::IN_ROOT) or one component at a time without following.
//!
//! Owner, mode, attributes and times of directories are set when the last entry is in: until then no directory is setgid, has
//! a default ACL or an mtime that the next file would spoil.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags};
use rustix::io::Errno;

use super::super::Limits;
use super::UnpackError;
use super::entry::{self, Entry, Kind, Meta};
use super::remove;
use crate::sys::fd::proc_path;

/// Parent directories kept open; when there are more all are dropped.
const CACHED: usize = 128;
/// Directories with their names and attributes, in bytes: what one layer may make us remember.
const MAX_REMEMBERED: u64 = 128 << 20;
/// Symbolic links followed on the way to one entry (the kernel's own MAXSYMLINKS is 40).
const MAX_LINKS: usize = 40;
/// Directories recorded as implied; beyond that they keep our defaults.
const MAX_IMPLIED: usize = 1024;
/// What disk space is counted in.
const BLOCK: u64 = 4096;
/// overlayfs's mark on a directory that hides the lower layers' (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_XDEV);

/// A layer in the making.
pub(super) struct Tree<'a> {
    root: Rc<OwnedFd>,
    limits: &'a Limits,
    /// Open parents by their path as entries name them.
    parents: HashMap<Vec<u8>, Rc<OwnedFd>>,
    /// What directories are to be in the end, by inode.
    directories: HashMap<u64, (Vec<u8>, Meta)>,
    remembered: u64,
    /// New files are root's and the root group's by themselves.
    plain_owner: bool,
    counted: Finished,
}

/// What was made.
#[derive(Debug, Default)]
pub(super) struct Finished {
    pub(super) disk_bytes: u64,
    pub(super) inodes: u64,
    pub(super) opaque: bool,
    pub(super) implied: Vec<String>,
}

fn failed<'p>(action: &'static str, path: &'p [u8]) -> impl Fn(Errno) -> UnpackError + 'p {
    move |source| UnpackError::File { action, path: entry::shown(path), source: source.into() }
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn name(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// openat2(2) asks to try again when something moved while it looked at `..` inside the root.
fn resolve(root: &OwnedFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    for _ in 0..32 {
        match rustix::fs::openat2(root, name(path), flags, Mode::empty(), IN_ROOT) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

impl<'a> Tree<'a> {
    /// Into an empty directory of ours.
    pub(super) fn new(root: OwnedFd, limits: &'a Limits) -> Result<Self, UnpackError> {
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(failed("set the mode of", b"/"))?;
        let stat = rustix::fs::fstat(&root).map_err(failed("look at", b"/"))?;
        Ok(Self {
            root: Rc::new(root),
            limits,
            parents: HashMap::new(),
            directories: HashMap::new(),
            remembered: 0,
            plain_owner: stat.st_uid == 0 && stat.st_gid == 0,
            counted: Finished { disk_bytes: BLOCK, inodes: 1, opaque: false, implied: vec![String::new()] },
        })
    }

    /// Makes an empty file of `size` bytes to come; [`Tree::close`] ends it.
    pub(super) fn file(&mut self, path: &[u8], meta: &Meta, size: u64) -> Result<OwnedFd, UnpackError> {
        let (parent, base) = self.parent_of(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(meta.mode & 0o777);
        let file = self.make(&parent, base, path, || rustix::fs::openat(&*parent, name(base), flags, mode))?;
        self.counted.disk_bytes += size.next_multiple_of(BLOCK);
        Ok(file)
    }

    /// Gives a written file its owner, mode, attributes and times: in this order, since a new owner clears setuid and writing
    /// clears file capabilities.
    pub(super) fn close(&self, file: OwnedFd, path: &[u8], meta: &Meta) -> Result<(), UnpackError> {
        if !self.plain_owner || !meta.owner.is_root() || !meta.group.is_root() {
            rustix::fs::fchown(&file, Some(meta.owner), Some(meta.group)).map_err(failed("set the owner of", path))?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(meta.mode)).map_err(failed("set the mode of", path))?;
        for (key, value) in &meta.xattrs {
            kept(rustix::fs::fsetxattr(&file, key.as_c_str(), value, XattrFlags::empty())).map_err(failed("set an attribute of", path))?;
        }
        rustix::fs::futimens(&file, &meta.times()).map_err(failed("set the times of", path))
    }

    /// Makes everything that is no file.
    pub(super) fn place(&mut self, entry: Entry) -> Result<(), UnpackError> {
        let Entry { path, kind, meta } = entry;
        match kind {
            Kind::File { .. } | Kind::Sparse { .. } | Kind::Skip => Ok(()),
            Kind::Directory => self.directory(path, meta),
            Kind::Whiteout => self.whiteout(&path),
            Kind::Opaque => self.opaque(&path),
            Kind::Link(target) => self.link(&path, &target),
            Kind::Symlink(target) => {
                let (parent, base) = self.parent_of(&path)?;
                self.make(&parent, base, &path, || rustix::fs::symlinkat(name(&target), &*parent, name(base)))?;
                self.dress(&parent, base, &path, &meta)
            }
            Kind::Device { block, major, minor } => {
                let kind = if block { FileType::BlockDevice } else { FileType::CharacterDevice };
                self.node(&path, &meta, kind, rustix::fs::makedev(major, minor))
            }
            Kind::Fifo => self.node(&path, &meta, FileType::Fifo, 0),
        }
    }

    /// Sets what directories are to be and gives the counters.
    pub(super) fn finish(mut self) -> Result<Finished, UnpackError> {
        self.parents.clear();
        for (inode, (path, meta)) in &self.directories {
            // The name may lead elsewhere by now, or nowhere: then the directory was replaced and its entry is void.
            let at = if path.is_empty() { b"." } else { &path[..] };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = match resolve(&self.root, at, flags) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                other => other.map_err(failed("open", path))?,
            };
            let stat = rustix::fs::fstat(&directory).map_err(failed("look at", path))?;
            if stat.st_ino != *inode {
                continue;
            }
            rustix::fs::fchown(&directory, Some(meta.owner), Some(meta.group)).map_err(failed("set the owner of", path))?;
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(meta.mode)).map_err(failed("set the mode of", path))?;
            for (key, value) in &meta.xattrs {
                kept(rustix::fs::fsetxattr(&directory, key.as_c_str(), value, XattrFlags::empty())).map_err(failed("set an attribute of", path))?;
            }
            rustix::fs::futimens(&directory, &meta.times()).map_err(failed("set the times of", path))?;
        }
        Ok(self.counted)
    }

    /// The directory that is to hold `path`, made if need be, and the last component.
    fn parent_of<'p>(&mut self, path: &'p [u8]) -> Result<(Rc<OwnedFd>, &'p [u8]), UnpackError> {
        let (parent, base) = entry::split(path);
        Ok((self.open(parent)?, base))
    }

    /// Opens a directory by its clean path, following the layer's own symbolic links inside it, and makes what is missing.
    fn open(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, UnpackError> {
        if path.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        if let Some(open) = self.parents.get(path) {
            return Ok(Rc::clone(open));
        }
        let open = match resolve(&self.root, path, DIRECTORY) {
            Ok(open) => Rc::new(open),
            Err(Errno::NOENT | Errno::NOTDIR) => self.walk(path)?,
            Err(error) => return Err(failed("open", path)(error)),
        };
        if self.parents.len() >= CACHED {
            self.parents.clear();
        }
        self.parents.insert(path.to_vec(), Rc::clone(&open));
        Ok(open)
    }

    /// Goes to a directory one component at a time and makes those that are missing, also where a link dangles.
    fn walk(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, UnpackError> {
        let fail = |action| failed(action, path);
        let mut above: Vec<Rc<OwnedFd>> = Vec::new();
        let mut here = Rc::clone(&self.root);
        let mut to_go: Vec<Vec<u8>> = path.split(|&b| b == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        // How much of `path` is behind us, while no link has led elsewhere.
        let mut passed = 0;
        while let Some(component) = to_go.pop() {
            match &component[..] {
                b"" | b"." => continue,
                b".." => {
                    here = above.pop().unwrap_or_else(|| Rc::clone(&self.root));
                    continue;
                }
                _ => {}
            }
            let base = name(&component);
            passed += component.len() + usize::from(passed > 0);
            let known = (links == 0).then(|| &path[..passed]);
            let next = match rustix::fs::openat(&*here, base, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
                Err(Errno::NOENT) => self.imply(&here, &component, known)?,
                Err(error) => return Err(fail("open")(error)),
                Ok(found) => {
                    let stat = rustix::fs::fstat(&found).map_err(fail("look at"))?;
                    match FileType::from_raw_mode(stat.st_mode) {
                        FileType::Directory => found,
                        FileType::Symlink => {
                            links += 1;
                            if links > MAX_LINKS {
                                return Err(fail("open")(Errno::LOOP));
                            }
                            let target = rustix::fs::readlinkat(&found, "", Vec::new()).map_err(fail("read the link"))?;
                            if target.as_bytes().starts_with(b"/") {
                                above.clear();
                                here = Rc::clone(&self.root);
                            }
                            to_go.extend(target.as_bytes().split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
                            if to_go.len() + above.len() > self.limits.path_depth * 2 {
                                return Err(fail("open")(Errno::NAMETOOLONG));
                            }
                            continue;
                        }
                        _ if is_whiteout(&stat) => {
                            rustix::fs::unlinkat(&*here, base, AtFlags::empty()).map_err(fail("replace"))?;
                            let made = self.imply(&here, &component, None)?;
                            set_opaque(made.as_fd()).map_err(fail("mark"))?;
                            made
                        }
                        _ => return Err(fail("open")(Errno::NOTDIR)),
                    }
                }
            };
            above.push(std::mem::replace(&mut here, Rc::new(next)));
        }
        Ok(here)
    }

    /// Makes a directory that the archive does not list. `path`: its own, if the lower layers may know it.
    fn imply(&mut self, parent: &OwnedFd, component: &[u8], path: Option<&[u8]>) -> Result<OwnedFd, UnpackError> {
        let fail = |action| failed(action, component);
        rustix::fs::mkdirat(parent, name(component), Mode::from_raw_mode(0o755)).map_err(fail("make directory"))?;
        // The umask is not ours to trust.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(parent, name(component), flags, Mode::empty()).map_err(fail("open"))?;
        rustix::fs::fchmod(&made, Mode::from_raw_mode(0o755)).map_err(fail("set the mode of"))?;
        self.counted.disk_bytes += BLOCK;
        self.counted.inodes += 1;
        if let Some(path) = path.and_then(|path| std::str::from_utf8(path).ok())
            && self.counted.implied.len() < MAX_IMPLIED
        {
            self.counted.implied.push(path.to_string());
        }
        Ok(made)
    }

    /// Makes a name with `call`. What has the name already is replaced: the last entry of an archive wins.
    fn make<T>(&mut self, parent: &Rc<OwnedFd>, base: &[u8], path: &[u8], call: impl Fn() -> rustix::io::Result<T>) -> Result<T, UnpackError> {
        let made = match call() {
            Err(Errno::EXIST) => {
                self.replace(parent, base, path)?;
                call()
            }
            other => other,
        };
        self.counted.inodes += 1;
        made.map_err(failed("make", path))
    }

    /// Removes what has a name.
    fn replace(&mut self, parent: &Rc<OwnedFd>, base: &[u8], path: &[u8]) -> Result<(), UnpackError> {
        // Whatever was resolved through it is resolved again.
        self.parents.clear();
        remove::remove_at(parent.as_fd(), name(base)).map_err(|source| UnpackError::File { action: "replace", path: entry::shown(path), source })
    }

    fn directory(&mut self, path: Vec<u8>, meta: Meta) -> Result<(), UnpackError> {
        if path.is_empty() {
            let stat = rustix::fs::fstat(&*self.root).map_err(failed("look at", &path))?;
            self.counted.implied.retain(|implied| !implied.is_empty());
            return self.remember(stat.st_ino, path, meta);
        }
        let (parent, base) = self.parent_of(&path)?;
        let mode = Mode::from_raw_mode(meta.mode & 0o777 | 0o700);
        let mut made = rustix::fs::mkdirat(&*parent, name(base), mode);
        if made == Err(Errno::EXIST) {
            let stat = rustix::fs::statat(&*parent, name(base), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at", &path))?;
            if is_directory(&stat) {
                self.counted.implied.retain(|implied| implied.as_bytes() != path);
                return self.remember(stat.st_ino, path, meta);
            }
            self.replace(&parent, base, &path)?;
            made = rustix::fs::mkdirat(&*parent, name(base), mode);
            if made.is_ok() && is_whiteout(&stat) {
                let directory =
                    rustix::fs::openat(&*parent, name(base), DIRECTORY | OFlags::NOFOLLOW, Mode::empty()).map_err(failed("open", &path))?;
                set_opaque(directory.as_fd()).map_err(failed("mark", &path))?;
            }
        }
        made.map_err(failed("make", &path))?;
        self.counted.inodes += 1;
        self.counted.disk_bytes += BLOCK;
        let stat = rustix::fs::statat(&*parent, name(base), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at", &path))?;
        self.remember(stat.st_ino, path, meta)
    }

    fn remember(&mut self, inode: u64, path: Vec<u8>, meta: Meta) -> Result<(), UnpackError> {
        let attributes: usize = meta.xattrs.iter().map(|(key, value)| key.as_bytes().len() + value.len() + 64).sum();
        self.remembered += (path.len() + attributes + 128) as u64;
        if self.remembered > MAX_REMEMBERED {
            return Err(UnpackError::Limit { what: "bytes of directory names and attributes", limit: MAX_REMEMBERED });
        }
        self.directories.insert(inode, (path, meta));
        Ok(())
    }

    /// `.wh.NAME`. What this very layer has by the name stays (the specification: a whiteout speaks of lower layers only); if
    /// it is a directory, it hides the lower one.
    fn whiteout(&mut self, path: &[u8]) -> Result<(), UnpackError> {
        let (parent, base) = self.parent_of(path)?;
        match rustix::fs::mknodat(&*parent, name(base), FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => {
                self.counted.inodes += 1;
                Ok(())
            }
            Err(Errno::EXIST) => match rustix::fs::openat(&*parent, name(base), DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(directory) => set_opaque(directory.as_fd()).map_err(failed("mark", path)),
                Err(_) => Ok(()),
            },
            Err(error) => Err(failed("make a whiteout for", path)(error)),
        }
    }

    fn opaque(&mut self, path: &[u8]) -> Result<(), UnpackError> {
        if path.is_empty() {
            // overlayfs does not look at this mark on a layer's root: the store leaves the lower layers away instead.
            self.counted.opaque = true;
            return Ok(());
        }
        let directory = self.open(path)?;
        set_opaque(directory.as_fd()).map_err(failed("mark", path))
    }

    /// A hard link. Its entry repeats the inode's owner, mode and times, or says something else: nothing of it is taken.
    fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), UnpackError> {
        let (parent, base) = self.parent_of(path)?;
        let (target_parent, target_base) = entry::split(target);
        if target_base.is_empty() {
            return Err(failed("link", path)(Errno::PERM));
        }
        let at = if target_parent.is_empty() { b"." } else { target_parent };
        let from = resolve(&self.root, at, DIRECTORY).map_err(failed("find the target of link", path))?;
        let stat = rustix::fs::statat(&from, name(target_base), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("find the target of link", path))?;
        if is_whiteout(&stat) {
            return Err(failed("find the target of link", path)(Errno::NOENT));
        }
        let call = || rustix::fs::linkat(&from, name(target_base), &*parent, name(base), AtFlags::empty());
        match call() {
            Err(Errno::EXIST) => {
                let there = rustix::fs::statat(&*parent, name(base), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at", path))?;
                if there.st_ino == stat.st_ino {
                    return Ok(());
                }
                self.replace(&parent, base, path)?;
                call().map_err(failed("link", path))
            }
            other => other.map_err(failed("link", path)),
        }
    }

    fn node(&mut self, path: &[u8], meta: &Meta, kind: FileType, device: rustix::fs::Dev) -> Result<(), UnpackError> {
        let (parent, base) = self.parent_of(path)?;
        let mode = Mode::from_raw_mode(meta.mode & 0o777);
        self.make(&parent, base, path, || rustix::fs::mknodat(&*parent, name(base), kind, mode, device))?;
        self.dress(&parent, base, path, meta)
    }

    /// Owner, mode, attributes and times of what can't be opened: through a descriptor of the inode itself.
    fn dress(&self, parent: &OwnedFd, base: &[u8], path: &[u8], meta: &Meta) -> Result<(), UnpackError> {
        let fail = |action| failed(action, path);
        let inode = rustix::fs::openat(parent, name(base), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map_err(fail("open"))?;
        let symlink = FileType::from_raw_mode(rustix::fs::fstat(&inode).map_err(fail("look at"))?.st_mode) == FileType::Symlink;
        rustix::fs::chownat(&inode, "", Some(meta.owner), Some(meta.group), AtFlags::EMPTY_PATH).map_err(fail("set the owner of"))?;
        if !symlink {
            rustix::fs::chmod(proc_path(inode.as_fd()), Mode::from_raw_mode(meta.mode)).map_err(fail("set the mode of"))?;
        }
        for (key, value) in &meta.xattrs {
            // No user.* on these kinds (xattr(7)); a symbolic link can't be reached through its descriptor.
            if !symlink && !key.as_bytes().starts_with(b"user.") {
                kept(set_through(inode.as_fd(), key, value)).map_err(fail("set an attribute of"))?;
            }
        }
        // AT_EMPTY_PATH for times: Linux 5.8.
        rustix::fs::utimensat(&inode, "", &meta.times(), AtFlags::EMPTY_PATH).map_err(fail("set the times of"))
    }
}

/// A file system without an attribute's namespace loses the attribute, as everybody has it; anything else is an error.
fn kept(set: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match set {
        Err(Errno::OPNOTSUPP) => Ok(()),
        other => other,
    }
}

fn set_through(inode: BorrowedFd<'_>, key: &CString, value: &[u8]) -> rustix::io::Result<()> {
    rustix::fs::setxattr(proc_path(inode), key.as_c_str(), value, XattrFlags::empty())
}

fn set_opaque(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    rustix::fs::setxattr(proc_path(directory), OPAQUE, b"y", XattrFlags::empty())
}
