//! Paths inside a container's root, which whoever built the image or shares a volume may have made hostile.
//!
//! A path is never joined to a prefix and handed to the kernel. It is resolved by openat2(2) beneath the root's descriptor, or
//! walked one component at a time with O_NOFOLLOW, each from the descriptor of the one before: whatever is renamed or
//! replaced meanwhile, every descriptor was reached from the root downwards. What is missing is made relative to such a
//! descriptor. Called in init and in exec's helper, and for a /dev that is still detached.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::errchain::{Kind, Kinded};

/// A path in a container that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The kernel refused it.
    #[error("cannot open {path} in the container")]
    Open {
        /// The path in the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A missing part could not be made.
    #[error("cannot make {path} in the container")]
    Make {
        /// The path in the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory where a file is needed, or the other way round.
    #[error("{path} in the container is not a {want}")]
    Type {
        /// The path in the container.
        path: PathBuf,
        /// What it should be.
        want: &'static str,
    },
    /// It goes over a symbolic link where none may be.
    #[error("{path} in the container goes over a symbolic link, which is refused there")]
    Link {
        /// The path in the container.
        path: PathBuf,
    },
    /// It goes over too many symbolic links.
    #[error("{path} in the container goes over more than {MAX_LINKS} symbolic links")]
    Links {
        /// The path in the container.
        path: PathBuf,
    },
    /// It is not absolute, or it is the root itself.
    #[error("{path:?} is no absolute path below the container's root")]
    Absolute {
        /// The path.
        path: PathBuf,
    },
}

impl Kinded for PathError {
    fn kind(&self) -> Kind {
        match self {
            // What the container lacks, or has in the way, is for whoever asked for it to change.
            PathError::Open { source, .. } if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => {
                Kind::InvalidArgument
            }
            PathError::Open { .. } | PathError::Make { .. } => Kind::Internal,
            PathError::Type { .. } | PathError::Link { .. } | PathError::Links { .. } | PathError::Absolute { .. } => Kind::InvalidArgument,
        }
    }
}

/// As many as the kernel follows (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// What the last component is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaf {
    /// A directory.
    Directory,
    /// Anything else; an empty regular file where it is missing.
    File,
}

/// What symbolic links on the way mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// They are followed, as if the container's root were `/`.
    Follow,
    /// They are refused: for /proc, /sys and /dev, whose place the runtime itself relies on (CVE-2023-27561).
    Refuse,
}

/// A container's root directory.
#[derive(Debug, Clone, Copy)]
pub struct Root<'a>(pub BorrowedFd<'a>);

impl Root<'_> {
    /// Opens an existing path with these flags, links followed within the root.
    pub fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, PathError> {
        // EAGAIN: something above was renamed during the walk (openat2(2)); the container's own doing, so it is tried again, but not for ever.
        for _ in 0..64 {
            match self.openat2(path, flags, ResolveFlags::empty()) {
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(PathError::Open { path: path.into(), source: error.into() }),
                Ok(fd) => return Ok(fd),
            }
        }
        Err(PathError::Open { path: path.into(), source: Errno::AGAIN.into() })
    }

    /// An O_PATH descriptor of an existing path; `None`: there is nothing.
    pub fn find(&self, path: &Path) -> Result<Option<OwnedFd>, PathError> {
        match self.open(path, OFlags::PATH) {
            Ok(fd) => Ok(Some(fd)),
            Err(PathError::Open { source, .. }) if matches!(Errno::from_io_error(&source), Some(Errno::NOENT | Errno::NOTDIR)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// An O_PATH descriptor of a path; what is missing is made: directories with mode 0755, the leaf as asked.
    pub fn make(&self, path: &Path, leaf: Leaf, links: Links) -> Result<OwnedFd, PathError> {
        if !path.is_absolute() {
            return Err(PathError::Absolute { path: path.into() });
        }
        let resolve = if links == Links::Refuse { ResolveFlags::NO_SYMLINKS } else { ResolveFlags::empty() };
        match self.openat2(path, OFlags::PATH, resolve) {
            Ok(fd) => check_leaf(fd, path, leaf),
            Err(Errno::NOENT | Errno::AGAIN) => self.walk(path, leaf, links),
            Err(Errno::LOOP) if links == Links::Refuse => Err(PathError::Link { path: path.into() }),
            Err(error) => Err(PathError::Open { path: path.into(), source: error.into() }),
        }
    }

    fn openat2(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::io::retry_on_intr(|| rustix::fs::openat2(self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve))
    }

    fn walk(&self, path: &Path, leaf: Leaf, links: Links) -> Result<OwnedFd, PathError> {
        let open_error = |error: Errno| PathError::Open { path: path.into(), source: error.into() };
        let mut rest = components(path);
        // The directories gone into, the innermost last: `..` goes back to what was opened, not to what the kernel would call the parent now.
        let mut within: Vec<OwnedFd> = Vec::new();
        let mut followed = 0;
        while let Some(name) = rest.pop_front() {
            if name == ".." {
                within.pop();
                continue;
            }
            let here = within.last().map_or(self.0, |fd| fd.as_fd());
            let want = if rest.is_empty() { leaf } else { Leaf::Directory };
            let child = open_or_make(here, &name, want).map_err(|error| match error {
                (true, error) => PathError::Make { path: path.into(), source: error.into() },
                (false, error) => open_error(error),
            })?;
            let kind = FileType::from_raw_mode(rustix::fs::fstat(&child).map_err(open_error)?.st_mode);
            match kind {
                FileType::Symlink if links == Links::Refuse => return Err(PathError::Link { path: path.into() }),
                FileType::Symlink => {
                    followed += 1;
                    if followed > MAX_LINKS {
                        return Err(PathError::Links { path: path.into() });
                    }
                    // The text of the link, never its magic: /proc/self/fd/3 means the path it shows, within the root.
                    let text = rustix::fs::readlinkat(&child, c"", Vec::new()).map_err(open_error)?;
                    let text = Path::new(OsStr::from_bytes(text.to_bytes()));
                    if text.is_absolute() {
                        within.clear();
                    }
                    components(text).into_iter().rev().for_each(|part| rest.push_front(part));
                }
                FileType::Directory => within.push(child),
                _ if rest.is_empty() => return check_leaf(child, path, leaf),
                _ => return Err(open_error(Errno::NOTDIR)),
            }
        }
        let end = match within.pop() {
            Some(fd) => fd,
            None => self.0.try_clone_to_owned().map_err(|source| PathError::Open { path: path.into(), source })?,
        };
        check_leaf(end, path, leaf)
    }
}

/// Opens one component without following it, making it where it is missing. The flag of an error: it came from making.
fn open_or_make(here: BorrowedFd<'_>, name: &OsStr, want: Leaf) -> Result<OwnedFd, (bool, Errno)> {
    let open = || rustix::fs::openat(here, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    match open() {
        Err(Errno::NOENT) => {}
        done => return done.map_err(|error| (false, error)),
    }
    let made = match want {
        Leaf::Directory => rustix::fs::mkdirat(here, name, Mode::from_raw_mode(0o755)),
        Leaf::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(here, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        // Somebody else was quicker; what they made is looked at like anything else.
        Ok(()) | Err(Errno::EXIST) => open().map_err(|error| (true, error)),
        Err(error) => Err((true, error)),
    }
}

fn check_leaf(fd: OwnedFd, path: &Path, leaf: Leaf) -> Result<OwnedFd, PathError> {
    let stat = rustix::fs::fstat(&fd).map_err(|error| PathError::Open { path: path.into(), source: error.into() })?;
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    match leaf {
        Leaf::Directory if !is_directory => Err(PathError::Type { path: path.into(), want: "directory" }),
        Leaf::File if is_directory => Err(PathError::Type { path: path.into(), want: "file" }),
        _ => Ok(fd),
    }
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_os_string()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes `path` in a root that `prepare` filled, and tells where it ended up, seen from the directory above the root.
    fn check(prepare: impl Fn(&Path), path: &str, leaf: Leaf, links: Links) -> Result<String, String> {
        let above = tempfile::tempdir().unwrap();
        let root = above.path().join("root");
        std::fs::create_dir(&root).unwrap();
        prepare(&root);
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let made = Root(fd.as_fd()).make(Path::new(path), leaf, links).map_err(|error| error.to_string())?;
        let end = std::fs::read_link(crate::sys::fd::proc_path(made.as_fd())).unwrap();
        let entries = std::fs::read_dir(above.path()).unwrap().count();
        assert_eq!(entries, 1, "something was made outside the root");
        Ok(end.strip_prefix(above.path().canonicalize().unwrap()).unwrap().to_str().unwrap().to_string())
    }

    #[test]
    fn what_is_missing_is_made_within_the_root() {
        let nothing = |_: &Path| {};
        let made = |path, leaf| check(nothing, path, leaf, Links::Follow).unwrap();
        assert_eq!(made("/a/b/c", Leaf::Directory), "root/a/b/c");
        assert_eq!(made("/a/b/c", Leaf::File), "root/a/b/c");
        assert_eq!(made("/../../a", Leaf::Directory), "root/a");
        assert_eq!(made("/a/../../b/./c", Leaf::Directory), "root/b/c");
        assert_eq!(made("/", Leaf::Directory), "root");
    }

    #[test]
    fn links_stay_within_the_root() {
        let cases: [(&str, &str, &str, &str); 6] = [
            ("run", "var_run", "/run", "root/run"),
            ("x", "x", "../../..", "root/file"),
            ("x", "x", "/", "root/file"),
            ("x", "x", "/../../outside", "root/outside/file"),
            ("x", "x", "../missing/../other", "root/other/file"),
            ("x", "x", "/proc/self/root", "root/proc/self/root/file"),
        ];
        for (_, link, text, want) in cases {
            let prepare = |root: &Path| symlink(text, root.join(link)).unwrap();
            let path = format!("/{link}/{}", if link == "x" { "file" } else { "" });
            let leaf = if link == "x" { Leaf::File } else { Leaf::Directory };
            assert_eq!(check(prepare, &path, leaf, Links::Follow).as_deref(), Ok(want), "{text}");
            assert!(check(prepare, &path, leaf, Links::Refuse).unwrap_err().contains("symbolic link"), "{text}");
        }
    }

    #[test]
    fn loops_and_wrong_types_are_errors() {
        let round = |root: &Path| symlink("/a", root.join("a")).unwrap();
        assert!(check(round, "/a/b", Leaf::File, Links::Follow).is_err());
        let file = |root: &Path| std::fs::write(root.join("f"), "").unwrap();
        assert!(check(file, "/f", Leaf::Directory, Links::Follow).unwrap_err().contains("not a directory"));
        assert!(check(file, "/f/g", Leaf::File, Links::Follow).is_err());
        let directory = |root: &Path| std::fs::create_dir(root.join("d")).unwrap();
        assert!(check(directory, "/d", Leaf::File, Links::Follow).unwrap_err().contains("not a file"));
        assert!(check(directory, "d", Leaf::Directory, Links::Follow).is_err());
    }
}
