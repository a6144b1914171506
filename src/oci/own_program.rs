//! Keeps this program's file out of reach of containers (CVE-2019-5736).
//!
//! A container's init is a fork of the monitor, and until its execve /proc/self/exe is the monitor's program on the host. An image can
//! have that very link executed: as its program, or as the interpreter of a script. Then the host's file is the program of a
//! process in the container, whose root may open it for writing. So the program is always executed from a read-only mount of its own
//! file, attached nowhere: through it nobody writes, whatever their privileges, and no copy of the file is needed.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;

use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::mount::OpenTreeFlags;

use crate::sys::mount::{self, Attributes};
use crate::sys::process;

/// Executes this program again from a read-only mount of it, with the same arguments and environment, unless it runs from one.
/// To be called first thing in `main` of every program whose forks enter containers. Returns when there is nothing to do, or with an
/// error, on which the program must not go on.
pub fn shield() -> io::Result<()> {
    let exe = rustix::fs::open(c"/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if rustix::fs::fstatvfs(&exe)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = rustix::mount::open_tree(CWD, c"/proc/self/exe", flags)?;
    mount::set_attributes(copy.as_fd(), Attributes { readonly: true, nosuid: true, nodev: true, ..Attributes::default() }, false)?;
    let strings = |list: Vec<Vec<u8>>| list.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let args = strings(std::env::args_os().map(OsStringExt::into_vec).collect())?;
    let env = strings(std::env::vars_os().map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'=')).collect())?;
    Err(process::exec_fd(copy.as_fd(), &args, &env))
}
