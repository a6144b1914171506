//! User namespaces: made with their mappings before any other namespace of the pod, and entered last by what runs in it.
//!
//! Who has entered one has no rights outside of it and can't come back. So a pod's namespaces are made by a process that lives no
//! longer than that takes, and an init or an exec'd process does everything that takes the host's root beforehand.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::{OciError, handshake};
use crate::errchain::Remote;
use crate::plan::{IdRange, UserNamespace};
use crate::sys::process::{CloneArgs, Keep};
use crate::sys::{creds, fd, mount, ns, process};

/// A user namespace that can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum UserNsError {
    /// A mapping that gives the container no root.
    #[error("user or group 0 of the container is mapped to nothing")]
    NoRoot,
    /// clone3(2) with CLONE_NEWUSER. ENOSPC: user.max_user_namespaces.
    #[error("cannot make a user namespace")]
    Make(#[source] io::Error),
    /// /proc/PID/uid_map and its like.
    #[error("cannot write {what} \"{map}\"")]
    Map {
        /// `uid_map` or `gid_map`.
        what: &'static str,
        /// The mapping, as the kernel takes it.
        map: String,
        /// Why.
        source: io::Error,
    },
    /// The process that makes namespaces inside.
    #[error("cannot talk to the user namespace's first process")]
    Talk(#[source] io::Error),
    /// The same process, in its own words.
    #[error("the user namespace's first process failed")]
    Inside(#[source] Remote),
    /// /proc/PID/ns.
    #[error("cannot open a {0} namespace")]
    Open(&'static str, #[source] io::Error),
    /// In that process: becoming root.
    #[error("cannot become root in a user namespace")]
    Root(#[source] io::Error),
    /// In that process: another namespace.
    #[error("cannot make a {0} namespace in a user namespace")]
    Unshare(&'static str, #[source] io::Error),
}

impl crate::errchain::Kinded for UserNsError {
    fn kind(&self) -> crate::errchain::Kind {
        use crate::errchain::Kind;
        match self {
            UserNsError::NoRoot => Kind::InvalidArgument,
            UserNsError::Make(source) if source.raw_os_error() == Some(libc::ENOSPC) => Kind::ResourceExhausted,
            UserNsError::Map { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => Kind::InvalidArgument,
            _ => Kind::Internal,
        }
    }
}

/// How long the first process may take: it makes namespaces and nothing else.
const WITHIN: std::time::Duration = std::time::Duration::from_secs(60);

/// Makes a user namespace and, owned by it, one namespace of each of `kinds`, in this order. Nothing runs in them. `proc` is the
/// host's, where this process is root.
pub fn make(mappings: &UserNamespace, kinds: &[ns::Kind], proc: BorrowedFd<'_>) -> Result<(OwnedFd, Vec<OwnedFd>), UserNsError> {
    if !kinds.is_empty() {
        mappings.root().ok_or(UserNsError::NoRoot)?;
    }
    let (ours, theirs) = fd::seqpacket_pair().map_err(UserNsError::Talk)?;
    let keep = Keep::only(&[theirs.as_fd()]);
    let args = CloneArgs { flags: libc::CLONE_NEWUSER as u64, cgroup: None };
    let first = move || be_first(theirs.as_fd(), kinds);
    let (pid, _pidfd) = process::spawn(args, Some(keep), first).map_err(UserNsError::Make)?;
    let number = pid.as_raw_nonzero().get() as u32;
    let begin = || -> Result<(OwnedFd, Vec<OwnedFd>), UserNsError> {
        write_map(proc, number, "gid_map", &mappings.gids)?;
        write_map(proc, number, "uid_map", &mappings.uids)?;
        let user = ns::open(proc, Some(number), ns::Kind::User).map_err(|error| UserNsError::Open("user", error))?;
        handshake::go(ours.as_fd()).map_err(UserNsError::Talk)?;
        match handshake::hear::<Option<Remote>>(ours.as_fd(), WITHIN).map_err(UserNsError::Talk)? {
            Some((None, _)) => {}
            Some((Some(remote), _)) => return Err(UserNsError::Inside(remote)),
            None => return Err(UserNsError::Talk(io::ErrorKind::UnexpectedEof.into())),
        }
        let open = |kind: &ns::Kind| ns::open(proc, Some(number), *kind).map_err(|error| UserNsError::Open(kind.name(), error));
        let others = kinds.iter().map(open).collect::<Result<_, _>>()?;
        Ok((user, others))
    };
    let made = begin();
    // The end of the socket is the end of the first process.
    drop(ours);
    let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()));
    made
}

/// The first process of a user namespace: makes namespaces as its root, and stays until they have been opened.
fn be_first(socket: BorrowedFd<'_>, kinds: &[ns::Kind]) -> i32 {
    process::set_name(c"copepod-userns");
    if !matches!(handshake::wait(socket), Ok(true)) {
        return process::CHILD_FAILED;
    }
    let root = if kinds.is_empty() { Ok(()) } else { become_root() };
    let made = root
        .map_err(UserNsError::Root)
        .and_then(|()| kinds.iter().try_for_each(|kind| ns::unshare(&[*kind]).map_err(|error| UserNsError::Unshare(kind.name(), error))));
    let answer = made.err().map(|error| Remote::new(&error));
    let _ = handshake::say(socket, &answer, &[]);
    let _ = handshake::wait(socket);
    0
}

fn write_map(proc: BorrowedFd<'_>, pid: u32, what: &'static str, range: &IdRange) -> Result<(), UserNsError> {
    let map = format!("{} {} {}", range.container, range.host, range.length);
    let write = || -> rustix::io::Result<usize> {
        let file = rustix::fs::openat(proc, format!("{pid}/{what}"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, map.as_bytes())
    };
    write().map(drop).map_err(|error| UserNsError::Map { what, map: map.clone(), source: error.into() })
}

/// Moves this process into a user namespace, as its root. What it could do on the host it can't do any more.
pub fn enter(user: BorrowedFd<'_>) -> io::Result<()> {
    ns::enter(user, ns::Kind::User)?;
    become_root()
}

fn become_root() -> io::Result<()> {
    creds::become_user(0, 0, &[])?;
    // A change of user may have set it.
    process::set_dumpable(false)
}

/// A user namespace with these mappings, to show a mount with: the pod's own where it has the same ones.
pub fn for_mount(mappings: &UserNamespace, pod: Option<Joined<'_>>, proc: BorrowedFd<'_>) -> Result<OwnedFd, UserNsError> {
    match pod {
        Some(pod) if pod.mappings == mappings => pod.user.try_clone_to_owned().map_err(|error| UserNsError::Open("user", error)),
        _ => make(mappings, &[], proc).map(|(user, _)| user),
    }
}

/// The type of the filesystem that a descriptor stands on, for messages. Reads the mount table of this process's namespace.
pub fn filesystem(fd: BorrowedFd<'_>) -> String {
    let read = || -> Option<String> {
        let id = mount::mount_id(fd).ok()?.to_string();
        let table = std::fs::read("/proc/self/mountinfo").ok()?;
        filesystem_in(&table, id.as_bytes())
    };
    read().unwrap_or_else(|| "unknown".into())
}

/// The field after the `-` (proc_pid_mountinfo(5)).
fn filesystem_in(table: &[u8], id: &[u8]) -> Option<String> {
    let line = table.split(|&b| b == b'\n').find(|line| line.split(|&b| b == b' ').next() == Some(id))?;
    let name = line.split(|&b| b == b' ').skip_while(|field| *field != b"-").nth(1)?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// The pod's user namespace, as a container joins it.
#[derive(Debug, Clone, Copy)]
pub struct Joined<'a> {
    /// The namespace.
    pub user: BorrowedFd<'a>,
    /// Its mappings.
    pub mappings: &'a UserNamespace,
    /// User and group of its root on the host.
    pub root: (u32, u32),
}

impl<'a> Joined<'a> {
    /// That of a plan, if it has one, which the monitor must hold then.
    pub fn of(mappings: Option<&'a UserNamespace>, held: Option<BorrowedFd<'a>>) -> Result<Option<Self>, OciError> {
        let Some(mappings) = mappings else { return Ok(None) };
        let user = held.ok_or_else(|| OciError::NoNamespace { kind: "user", of: "the pod".into() })?;
        let root = mappings.root().ok_or(OciError::UserNs(UserNsError::NoRoot))?;
        Ok(Some(Self { user, mappings, root }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filesystems_are_found_by_the_mounts_id() {
        let table = b"21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n22 21 0:5 / /a\\040b rw - nfs4 h:/x rw\n";
        assert_eq!(filesystem_in(table, b"22").as_deref(), Some("nfs4"));
        assert_eq!(filesystem_in(table, b"21").as_deref(), Some("ext4"));
        assert_eq!(filesystem_in(table, b"2"), None);
    }

    #[test]
    fn ids_are_mapped_within_their_range() {
        let range = IdRange { container: 10, host: 1000, length: 5 };
        for (id, host) in [(9, None), (10, Some(1000)), (14, Some(1004)), (15, None), (u32::MAX, None)] {
            assert_eq!(range.host_id(id), host, "{id}");
        }
        assert_eq!(IdRange { container: 0, host: u32::MAX, length: 2 }.host_id(1), None);
        let mappings = UserNamespace { uids: IdRange { container: 0, host: 7, length: 1 }, gids: range };
        assert_eq!(mappings.root(), None);
    }
}
