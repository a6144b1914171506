//! Mounts by descriptor: filesystem contexts, detached trees, their attributes, and pivot_root.
//!
//! Nothing here takes a path inside a container. Paths on the host are the caller's own.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

/// Attributes of a mount (mount_setattr(2)). `true`: set; `false`: cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// MS_RDONLY.
    pub readonly: bool,
    /// MS_NOSUID.
    pub nosuid: bool,
    /// MS_NODEV.
    pub nodev: bool,
    /// MS_NOEXEC.
    pub noexec: bool,
    /// MS_NOATIME, else MS_RELATIME.
    pub noatime: bool,
}

const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME_MASK: u64 = 0x70;
const NOATIME: u64 = 0x10;

impl Attributes {
    /// The flags that are on, access time left alone unless `noatime`.
    fn on(self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.readonly, RDONLY) | bit(self.nosuid, NOSUID) | bit(self.nodev, NODEV) | bit(self.noexec, NOEXEC) | bit(self.noatime, NOATIME)
    }

    fn for_fsmount(self) -> MountAttrFlags {
        MountAttrFlags::from_bits_retain(self.on() as u32)
    }
}

/// How a mount takes part in propagation (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// MS_PRIVATE.
    Private,
    /// MS_SLAVE.
    Slave,
    /// MS_SHARED.
    Shared,
}

/// `struct mount_attr` (mount_setattr(2), Linux 5.12).
#[repr(C)]
#[derive(Default)]
struct RawAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn setattr(mount: BorrowedFd<'_>, recursive: bool, raw: &RawAttributes) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let empty: &CStr = c"";
    // SAFETY: the path is NUL-terminated, `raw` is a mount_attr of the size given, and the kernel only reads both.
    let done = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), empty.as_ptr(), flags, std::ptr::from_ref(raw), size_of::<RawAttributes>())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the attributes that are `true`; the others stay as they are. `mount` is the root of a mount.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> io::Result<()> {
    let set = attributes.on();
    if set == 0 {
        return Ok(());
    }
    // An access time mode is a value, not a flag: the kernel wants the whole field cleared with it.
    let clear = if set & ATIME_MASK != 0 { ATIME_MASK } else { 0 };
    setattr(mount, recursive, &RawAttributes { set, clear, ..RawAttributes::default() })
}

/// Makes a mount writable again.
pub fn clear_readonly(mount: BorrowedFd<'_>) -> io::Result<()> {
    setattr(mount, false, &RawAttributes { clear: RDONLY, ..RawAttributes::default() })
}

/// Shows the files of a mount under the ids that a user namespace maps theirs to: what belongs to 0 on disk belongs to the
/// namespace's root (MOUNT_ATTR_IDMAP, Linux 5.12). The mount is a detached copy that nobody has seen yet.
///
/// # Errors
/// `EINVAL`: its filesystem can't be mapped, or is mapped already.
pub fn set_idmap(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    const IDMAP: u64 = 0x0010_0000;
    setattr(mount, false, &RawAttributes { set: IDMAP, userns: userns.as_raw_fd() as u64, ..RawAttributes::default() })
}

/// Changes the propagation of a mount and of all mounts below it.
pub fn set_propagation(mount: BorrowedFd<'_>, propagation: Propagation) -> io::Result<()> {
    let propagation = match propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    setattr(mount, true, &RawAttributes { propagation, ..RawAttributes::default() })
}

/// Changes the propagation of every mount of this process's mount namespace.
pub fn set_propagation_of_all(propagation: Propagation) -> io::Result<()> {
    let flag = match propagation {
        Propagation::Private => MountPropagationFlags::PRIVATE,
        Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        Propagation::Shared => MountPropagationFlags::SHARED,
    };
    Ok(rustix::mount::mount_change("/", flag | MountPropagationFlags::REC)?)
}

/// A detached copy of the mount tree at a descriptor (which may be O_PATH): a bind mount that is nowhere yet. The mount it
/// stands on must belong to this process's mount namespace.
pub fn clone_tree(from: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(from, c"", flags)?)
}

/// Attaches a detached mount on what `onto` is open on, without resolving any path.
pub fn attach(tree: BorrowedFd<'_>, onto: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, c"", onto, c"", flags)?)
}

/// Attaches a detached mount on a path of the host.
pub fn attach_at(tree: BorrowedFd<'_>, path: &std::path::Path) -> io::Result<()> {
    Ok(rustix::mount::move_mount(tree, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Makes an attached mount the root of this process's mount namespace and lets go of everything that was there before.
pub fn pivot_into(root: BorrowedFd<'_>) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and is taken off again.
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")?;
    Ok(())
}

/// An overlay by mount(2), whose options may be 4096 bytes long, where fsconfig(2) allows 255. Relative names in `options`
/// are resolved in the working directory.
pub fn overlay_by_mount(target: &std::path::Path, options: &CStr) -> io::Result<()> {
    Ok(rustix::mount::mount(c"overlay", target, c"overlay", MountFlags::empty(), options)?)
}

/// Why a filesystem could not be made: the kernel's error, and what it wrote about it.
#[derive(Debug, thiserror::Error)]
#[error("{operation} of {filesystem} failed{log}")]
pub struct NewFsError {
    filesystem: &'static str,
    operation: String,
    log: String,
    #[source]
    source: io::Error,
}

impl NewFsError {
    /// The kernel's error.
    pub fn cause(&self) -> &io::Error {
        &self.source
    }
}

/// A filesystem that is being configured (fsopen(2)).
#[derive(Debug)]
pub struct NewFs {
    filesystem: &'static str,
    context: OwnedFd,
}

impl NewFs {
    /// Opens a context for a filesystem type.
    pub fn open(filesystem: &'static str) -> Result<Self, NewFsError> {
        match rustix::mount::fsopen(filesystem, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => Ok(Self { filesystem, context }),
            Err(error) => Err(NewFsError { filesystem, operation: "fsopen".into(), log: String::new(), source: error.into() }),
        }
    }

    /// Sets an option to a value of at most 255 bytes.
    pub fn set(&self, key: &str, value: impl rustix::path::Arg) -> Result<(), NewFsError> {
        rustix::mount::fsconfig_set_string(&self.context, key, value).map_err(|error| self.error(format!("option {key}"), error))
    }

    /// Sets an option that has no value.
    pub fn flag(&self, key: &str) -> Result<(), NewFsError> {
        rustix::mount::fsconfig_set_flag(&self.context, key).map_err(|error| self.error(format!("option {key}"), error))
    }

    /// Sets options as mount(8) writes them: `size=65536k,mode=755`.
    pub fn options(&self, options: &str) -> Result<(), NewFsError> {
        options.split(',').filter(|option| !option.is_empty()).try_for_each(|option| match option.split_once('=') {
            Some((key, value)) => self.set(key, value),
            None => self.flag(option),
        })
    }

    /// Has SELinux give everything in the filesystem this context; an empty one changes nothing. A kernel without SELinux refuses
    /// any other.
    pub fn context(&self, context: &str) -> Result<(), NewFsError> {
        if context.is_empty() { Ok(()) } else { self.set("context", context) }
    }

    /// Makes the filesystem and a detached mount of it.
    pub fn mount(self, attributes: Attributes) -> Result<OwnedFd, NewFsError> {
        rustix::mount::fsconfig_create(&self.context).map_err(|error| self.error("creation".into(), error))?;
        rustix::mount::fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes.for_fsmount())
            .map_err(|error| self.error("fsmount".into(), error))
    }

    fn error(&self, operation: String, error: rustix::io::Errno) -> NewFsError {
        NewFsError { filesystem: self.filesystem, operation, log: self.log(), source: error.into() }
    }

    /// What the kernel wrote into the context, as ` (first; second)`.
    fn log(&self) -> String {
        let mut messages = Vec::new();
        let mut buffer = [0u8; 1024];
        // One read is one message; ENODATA ends them.
        while let Ok(n) = rustix::io::read(&self.context, &mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..n]);
            // Each begins with its class: `e `, `w ` or `i `.
            messages.push(text.trim_end().get(2..).unwrap_or_default().to_string());
            if n == 0 || messages.len() == 8 {
                break;
            }
        }
        if messages.is_empty() { String::new() } else { format!(" ({})", messages.join("; ")) }
    }
}

/// The kernel's id of the mount that a descriptor stands on (statx(2), STATX_MNT_ID), as in /proc/PID/mountinfo.
pub fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = rustix::fs::statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
}
