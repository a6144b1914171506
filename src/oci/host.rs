//! What a creator keeps of the host while it wanders through other namespaces.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};

use crate::sys::ns;

/// statfs(2)'s type of a procfs.
pub const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// The host, from before anything was entered.
#[derive(Debug)]
pub struct Host {
    /// The host's /proc.
    pub proc: OwnedFd,
    mounts: OwnedFd,
}

impl Host {
    /// Takes hold of it. The process is in the host's namespaces.
    pub fn open() -> io::Result<Self> {
        // Descriptors 0 to 2 become somebody's standard streams later on: nothing of ours may stand there.
        crate::sys::process::occupy_stdio()?;
        let proc = rustix::fs::openat(CWD, c"/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // What is written below it (a sysctl, oom_score_adj) must reach the kernel and nothing else.
        if rustix::fs::fstatfs(&proc)?.f_type as u64 != PROC_SUPER_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "/proc is not a procfs"));
        }
        let mounts = ns::open(proc.as_fd(), None, ns::Kind::Mount)?;
        Ok(Self { proc, mounts })
    }

    /// Goes back to the host's mount namespace, where paths mean what they say.
    pub fn come_back(&self) -> io::Result<()> {
        ns::enter(self.mounts.as_fd(), ns::Kind::Mount)
    }
}
