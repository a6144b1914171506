//! Namespaces: entering and leaving them.
//!
//! Only single-threaded, disposable processes call this (creators and what they fork): the daemon and the monitor never
//! leave the namespaces they were started in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

/// A kind of namespace (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// mount_namespaces(7).
    Mount,
    /// network_namespaces(7).
    Net,
    /// ipc_namespaces(7).
    Ipc,
    /// uts_namespaces(7).
    Uts,
    /// pid_namespaces(7): that of children made from then on.
    Pid,
    /// cgroup_namespaces(7).
    Cgroup,
    /// user_namespaces(7). Whoever enters one has every capability in it and none outside, and never comes back.
    User,
}

impl Kind {
    /// The name of its link in /proc/PID/ns.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Mount => "mnt",
            Kind::Net => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::Pid => "pid",
            Kind::Cgroup => "cgroup",
            Kind::User => "user",
        }
    }

    fn link(self) -> LinkNameSpaceType {
        match self {
            Kind::Mount => LinkNameSpaceType::Mount,
            Kind::Net => LinkNameSpaceType::Network,
            Kind::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Kind::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Kind::Pid => LinkNameSpaceType::ProcessID,
            Kind::Cgroup => LinkNameSpaceType::ControlGroup,
            Kind::User => LinkNameSpaceType::User,
        }
    }

    fn thread(self) -> ThreadNameSpaceType {
        match self {
            Kind::Mount => ThreadNameSpaceType::MOUNT,
            Kind::Net => ThreadNameSpaceType::NETWORK,
            Kind::Ipc => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
            Kind::Uts => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
            Kind::Pid => ThreadNameSpaceType::PROCESS_ID,
            Kind::Cgroup => ThreadNameSpaceType::CONTROL_GROUP,
            Kind::User => ThreadNameSpaceType::USER,
        }
    }

    fn unshare(self) -> UnshareFlags {
        match self {
            Kind::Mount => UnshareFlags::NEWNS,
            Kind::Net => UnshareFlags::NEWNET,
            Kind::Ipc => UnshareFlags::NEWIPC,
            Kind::Uts => UnshareFlags::NEWUTS,
            Kind::Pid => UnshareFlags::NEWPID,
            Kind::Cgroup => UnshareFlags::NEWCGROUP,
            Kind::User => UnshareFlags::NEWUSER,
        }
    }
}

/// Moves this process into the namespace of a /proc/PID/ns descriptor, which must be of that kind. With [`Kind::Mount`] the
/// root and the working directory become the namespace's root.
pub fn enter(fd: BorrowedFd<'_>, kind: Kind) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(fd, Some(kind.link()))?)
}

/// Moves this process into those namespaces of the process of a pidfd (Linux 5.8), all or none.
pub fn enter_process(pidfd: BorrowedFd<'_>, kinds: &[Kind]) -> io::Result<()> {
    let types = kinds.iter().fold(ThreadNameSpaceType::empty(), |all, kind| all | kind.thread());
    Ok(rustix::thread::move_into_thread_name_spaces(pidfd, types)?)
}

/// Gives this process new namespaces of these kinds.
pub fn unshare(kinds: &[Kind]) -> io::Result<()> {
    let flags = kinds.iter().fold(UnshareFlags::empty(), |all, kind| all | kind.unshare());
    // SAFETY: none of the kinds is CLONE_FILES, the one flag for which the call asks something of its caller.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// A descriptor for a namespace of this process, or of process `pid`.
pub fn open(proc: BorrowedFd<'_>, pid: Option<u32>, kind: Kind) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let process = pid.map_or_else(|| "self".to_string(), |pid| pid.to_string());
    Ok(rustix::fs::openat(proc.as_fd(), format!("{process}/ns/{}", kind.name()), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A descriptor for the PID namespace that this process has made for its children. There is none before the first child.
pub fn open_pid_for_children(proc: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::openat(proc, c"self/ns/pid_for_children", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}
