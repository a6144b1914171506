//! A pod's own namespaces, its /dev/shm, and the pause process of a pod that shares its PID namespace.
//!
//! Runs in a creator, before any container. Networks are not its business beyond `lo`: CNI comes afterwards, from the daemon.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::handshake::{self, FromInit};
use super::host::Host;
use super::label::{self, LabelError};
use super::userns::{self, Joined};
use super::{OciError, mounts};
use crate::errchain::{Kind, Kinded, Remote};
use crate::plan::{ResolvedUser, SandboxPlan, UserNamespace};
use crate::sys::mount::{self, Attributes, NewFs};
use crate::sys::process::{CloneArgs, Keep};
use crate::sys::{creds, fd, net, ns, process, seccomp};

/// What holds a pod's namespaces open. `None`: the pod uses the host's.
#[derive(Debug, Default)]
pub struct SandboxNamespaces {
    /// network_namespaces(7).
    pub net: Option<OwnedFd>,
    /// ipc_namespaces(7).
    pub ipc: Option<OwnedFd>,
    /// uts_namespaces(7).
    pub uts: Option<OwnedFd>,
    /// pid_namespaces(7) of the pause process.
    pub pid: Option<OwnedFd>,
    /// user_namespaces(7), the owner of the others.
    pub user: Option<OwnedFd>,
    /// A private mount namespace that holds the pod's /dev/shm, and in which mapped layers are attached.
    pub staging: Option<OwnedFd>,
    /// The pause process, a child of the monitor: its pid and pidfd.
    pub pause: Option<(u32, OwnedFd)>,
}

/// Makes the pod's namespaces. Runs in a creator. If it fails, nothing is left of them; a pause process ends with its creator's
/// half of their socket.
pub fn create(plan: &SandboxPlan) -> Result<SandboxNamespaces, OciError> {
    process::set_dumpable(false).map_err(|error| OciError::Host("process attributes", error))?;
    rustix::process::umask(Mode::empty());
    let host = Host::open().map_err(|error| OciError::Host("namespaces", error))?;

    let wanted = [(plan.new_net, ns::Kind::Net), (plan.new_ipc, ns::Kind::Ipc), (plan.new_uts, ns::Kind::Uts)];
    let kinds: Vec<ns::Kind> = wanted.iter().filter(|(new, _)| *new).map(|(_, kind)| *kind).collect();
    let (user, made) = match &plan.user_namespace {
        Some(mappings) => {
            let (user, made) = userns::make(mappings, &kinds, host.proc.as_fd()).map_err(OciError::UserNs)?;
            // From the outside: the host's root may set there what the namespace's own may not.
            for (fd, kind) in made.iter().zip(&kinds) {
                ns::enter(fd.as_fd(), *kind).map_err(|source| OciError::Enter { kind: kind.name(), of: "the pod", source })?;
            }
            (Some(user), made)
        }
        None => {
            let make = |kind: &ns::Kind| {
                ns::unshare(&[*kind]).map_err(|error| OciError::Unshare(kind.name(), error))?;
                ns::open(host.proc.as_fd(), None, *kind).map_err(|error| OciError::Host("namespaces", error))
            };
            (None, kinds.iter().map(make).collect::<Result<_, _>>()?)
        }
    };
    let mut made = made.into_iter();
    let [net, ipc, uts] = wanted.map(|(new, _)| made.by_ref().take(usize::from(new)).next());
    let joined = Joined::of(plan.user_namespace.as_ref(), user.as_ref().map(|user| user.as_fd()))?;

    if plan.new_uts {
        rustix::system::sethostname(plan.hostname.as_bytes())
            .map_err(|error| OciError::Set { what: format!("host name {}", plan.hostname), source: error.into() })?;
    }
    if plan.new_net {
        net::loopback_up().map_err(|source| OciError::Set { what: "lo up".into(), source })?;
    }
    for (name, value) in &plan.sysctls {
        set_sysctl(name, value, plan, host.proc.as_fd())?;
    }

    let staging = (plan.shm_bytes > 0 || user.is_some()).then(|| staging(plan, joined, &host)).transpose()?;
    let (pid, pause) = if plan.shared_pid {
        let inside = joined.zip(staging.as_ref().map(|staging| staging.as_fd()));
        let (pid, pause) = pause(plan, inside, &host)?;
        (Some(pid), Some(pause))
    } else {
        (None, None)
    };
    Ok(SandboxNamespaces { net, ipc, uts, pid, user, staging, pause })
}

/// The namespace that a sysctl belongs to; `None`: the whole node's, or unknown. The last word after the daemon's own check: what is
/// written here can only ever reach a namespace of the pod (CVE-2022-0811).
fn namespace_of(path: &str) -> Option<ns::Kind> {
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    match path {
        "kernel/hostname" | "kernel/domainname" => Some(ns::Kind::Uts),
        _ if IPC.contains(&path) || path.starts_with("fs/mqueue/") => Some(ns::Kind::Ipc),
        _ if path.starts_with("net/") => Some(ns::Kind::Net),
        _ => None,
    }
}

/// The path of a sysctl below /proc/sys. As in sysctl(8): whichever of `.` and `/` comes first separates, the other is part of
/// a name, such as that of a network interface.
fn sysctl_path(name: &str) -> Option<String> {
    let dots = name.find(['.', '/']).is_none_or(|at| name.as_bytes()[at] == b'.');
    let path: String = if dots {
        name.chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect()
    } else {
        name.into()
    };
    let fits = |part: &str| !part.is_empty() && part != "." && part != ".." && part.bytes().all(|b| b.is_ascii_graphic());
    path.split('/').all(fits).then_some(path)
}

fn set_sysctl(name: &str, value: &str, plan: &SandboxPlan, proc: BorrowedFd<'_>) -> Result<(), OciError> {
    let bad = || OciError::SysctlName(name.into());
    let path = sysctl_path(name).ok_or_else(bad)?;
    let own = match namespace_of(&path) {
        Some(ns::Kind::Net) => plan.new_net,
        Some(ns::Kind::Ipc) => plan.new_ipc,
        Some(ns::Kind::Uts) => plan.new_uts,
        _ => false,
    };
    if !own {
        return Err(bad());
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let write = || -> std::io::Result<()> {
        let file = rustix::fs::openat2(proc, format!("sys/{path}"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)?;
        rustix::io::write(&file, value.as_bytes())?;
        Ok(())
    };
    let written = match (write(), plan.user_namespace.as_ref().and_then(UserNamespace::root)) {
        // Since Linux 6.9 a sysctl of an IPC namespace belongs to the root of its user namespace, and not to the host's any more.
        (Err(error), Some((uid, _))) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {
            let written = creds::with_effective_user(uid, write).and_then(|written| written);
            process::set_dumpable(false).map_err(|error| OciError::Host("process attributes", error))?;
            written
        }
        (written, _) => written,
    };
    written.map_err(|source| OciError::Set { what: format!("sysctl {name} to {value:?}"), source })
}

/// Where creators attach a container's root, in their copies of the staging mount namespace.
pub(super) const STAGED_ROOT: &str = "/root";
/// Where they attach layers with mapped ids, and the directory of the writable one.
pub(super) const STAGED_LAYERS: &str = "/layers";
pub(super) const STAGED_WRITABLE: &str = "/writable";

/// A mount namespace whose root is a tmpfs with the pod's /dev/shm in it, and which holds nothing of the host. It belongs to the host's
/// user namespace.
fn staging(plan: &SandboxPlan, user: Option<Joined<'_>>, host: &Host) -> Result<OwnedFd, OciError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| OciError::Staging { what: "staging mounts", source };
    ns::unshare(&[ns::Kind::Mount]).map_err(|error| OciError::Unshare("mnt", error))?;
    // Any directory will do as a mountpoint on the way; this one is on every host.
    // The root of a user namespace passes through it on its way to the container's root; there is nothing else.
    let root = empty_root("mode=711,size=64k", false, Path::new("/proc")).map_err(failed)?;
    for dir in [mounts::STAGED_SHM, STAGED_ROOT, STAGED_LAYERS, STAGED_WRITABLE] {
        rustix::fs::mkdirat(CWD, dir, Mode::from_raw_mode(0o700)).map_err(|error| failed(Box::new(error)))?;
    }
    if plan.shm_bytes > 0 {
        let shm = shm(plan, user).map_err(|error| OciError::Staging { what: "/dev/shm", source: Box::new(error) })?;
        mount::attach_at(shm.as_fd(), Path::new(mounts::STAGED_SHM)).map_err(|error| failed(Box::new(error)))?;
    }
    drop(root);
    let namespace = ns::open(host.proc.as_fd(), None, ns::Kind::Mount).map_err(|error| failed(Box::new(error)))?;
    host.come_back().map_err(|error| OciError::Host("mount namespace", error))?;
    Ok(namespace)
}

fn shm(plan: &SandboxPlan, user: Option<Joined<'_>>) -> Result<OwnedFd, mount::NewFsError> {
    let fs = NewFs::open("tmpfs")?;
    fs.set("source", "shm")?;
    fs.options(&format!("mode=1777,size={}", plan.shm_bytes))?;
    fs.context(&plan.mount_label)?;
    if let Some((uid, gid)) = user.map(|user| user.root) {
        fs.options(&format!("uid={uid},gid={gid}"))?;
    }
    fs.mount(Attributes { nosuid: true, nodev: true, noexec: true, ..Attributes::default() })
}

/// Makes an empty tmpfs the root, in a mount namespace that this process has just made.
fn empty_root(options: &str, readonly: bool, on: &Path) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
    mount::set_propagation_of_all(mount::Propagation::Private)?;
    let fs = NewFs::open("tmpfs")?;
    fs.set("source", "tmpfs")?;
    fs.options(options)?;
    let root = fs.mount(Attributes { readonly, nosuid: true, nodev: true, noexec: true, noatime: false })?;
    mount::attach_at(root.as_fd(), on)?;
    mount::pivot_into(root.as_fd())?;
    Ok(root)
}

/// How long the pause process may take to begin.
const BEGIN: Duration = Duration::from_secs(30);

/// Starts the pause process, and gives its PID namespace. `inside`: the pod's user namespace, for that one to belong to, with the
/// staging mount namespace; then this process ends up in it and can do nothing more for the pod.
fn pause(plan: &SandboxPlan, inside: Option<(Joined<'_>, BorrowedFd<'_>)>, host: &Host) -> Result<(OwnedFd, (u32, OwnedFd)), OciError> {
    let failed = |error: std::io::Error| OciError::Pause(error);
    let on = match inside {
        Some((user, staging)) => {
            if let Some(score) = plan.oom_score_adj {
                // For the pause process, which gets its parent's score and can't set its own in the user namespace.
                let _ = set_oom_score(host.proc.as_fd(), score);
            }
            ns::enter(staging, ns::Kind::Mount).map_err(|source| OciError::Enter { kind: "mnt", of: "the pod", source })?;
            userns::enter(user.user).map_err(OciError::EnterUserNs)?;
            STAGED_ROOT
        }
        None => "/proc",
    };
    ns::unshare(&[ns::Kind::Pid]).map_err(|error| OciError::Unshare("pid", error))?;
    ns::unshare(&[ns::Kind::Mount]).map_err(|error| OciError::Unshare("mnt", error))?;
    empty_root("mode=555,size=4k,nr_inodes=2", true, Path::new(on))
        .map_err(|source| OciError::Staging { what: "root of the pause process", source })?;
    let (ours, theirs) = fd::seqpacket_pair().map_err(failed)?;
    let proc = host.proc.try_clone().map_err(failed)?;
    let keep = Keep::only(&[theirs.as_fd(), proc.as_fd()]);
    let score = plan.oom_score_adj.filter(|_| inside.is_none());
    let args = CloneArgs { flags: libc::CLONE_PARENT as u64, cgroup: None };
    let (pid, pidfd) = process::spawn(args, Some(keep), move || be_pause(plan, theirs, proc, score)).map_err(failed)?;
    if inside.is_none() {
        host.come_back().map_err(|error| OciError::Host("mount namespace", error))?;
    }
    let pid = pid.as_raw_nonzero().get() as u32;
    let begun = match handshake::hear(ours.as_fd(), BEGIN) {
        Ok(Some((FromInit::Ready(_), _))) => Ok(()),
        Ok(Some((FromInit::Failed(remote), _))) => Err(OciError::Remote("the pause process", remote)),
        Ok(_) => Err(OciError::PauseFailed),
        Err(error) => Err(failed(error)),
    };
    // Not that of the pause process, which isn't dumpable: the root of a user namespace has no way to look into it.
    let namespace = ns::open_pid_for_children(host.proc.as_fd()).map_err(failed);
    match begun.and(namespace) {
        Ok(namespace) => Ok((namespace, (pid, pidfd))),
        Err(error) => {
            let _ = process::signal(pidfd.as_fd(), libc::SIGKILL as u32);
            Err(error)
        }
    }
}

/// A pause process that can't be what its plan says.
#[derive(Debug, thiserror::Error)]
enum PauseError {
    #[error("cannot set up the process")]
    SetUp(#[source] std::io::Error),
    #[error("cannot become user {uid}, group {gid}")]
    User { uid: u32, gid: u32, source: std::io::Error },
    #[error("cannot drop its capabilities")]
    Capabilities(#[source] std::io::Error),
    #[error("cannot confine it")]
    Label(#[source] LabelError),
    #[error("cannot load its seccomp filter")]
    Seccomp(#[source] std::io::Error),
    #[error("its seccomp filter does not let it wait for signals")]
    Idle(#[source] std::io::Error),
}

impl Kinded for PauseError {
    fn kind(&self) -> Kind {
        match self {
            PauseError::Label(error) => error.kind(),
            PauseError::Idle(_) => Kind::InvalidArgument,
            _ => Kind::Internal,
        }
    }
}

fn set_oom_score(proc: BorrowedFd<'_>, score: i32) -> std::io::Result<()> {
    let file = rustix::fs::openat(proc, c"self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, score.to_string().as_bytes())?;
    Ok(())
}

/// The pause process: PID 1 of the pod, with an empty root, no descriptors and no capabilities.
fn be_pause(plan: &SandboxPlan, socket: OwnedFd, proc: OwnedFd, oom_score_adj: Option<i32>) -> i32 {
    let said = match confine_pause(plan, proc.as_fd(), oom_score_adj) {
        Ok(()) => FromInit::Ready(ResolvedUser::default()),
        Err(error) => FromInit::Failed(Remote::new(&error)),
    };
    let heard = handshake::say(socket.as_fd(), &said, &[]);
    match (said, heard) {
        (FromInit::Ready(_), Ok(())) => process::idle_as_init(),
        _ => process::CHILD_FAILED,
    }
}

fn confine_pause(plan: &SandboxPlan, proc: BorrowedFd<'_>, oom_score_adj: Option<i32>) -> Result<(), PauseError> {
    process::set_name(c"pause");
    process::reset_signals();
    process::block_signals();
    rustix::process::setsid().map_err(|error| PauseError::SetUp(error.into()))?;
    if let Some(score) = oom_score_adj {
        // A node without CAP_SYS_RESOURCE can't protect it; the pod works without.
        let _ = set_oom_score(proc, score);
    }
    creds::drop_bounding(0).map_err(PauseError::Capabilities)?;
    if let Some(user) = &plan.pause.user {
        creds::become_user(user.uid, user.gid, &user.groups).map_err(|source| PauseError::User { uid: user.uid, gid: user.gid, source })?;
    }
    creds::set_ambient(0).map_err(PauseError::Capabilities)?;
    creds::set_capabilities(creds::Sets::default()).map_err(PauseError::Capabilities)?;
    label::change_profile(&plan.pause.apparmor, proc).map_err(PauseError::Label)?;
    creds::set_no_new_privileges().map_err(PauseError::SetUp)?;
    // Again: a change of user or capabilities may have set it.
    process::set_dumpable(false).map_err(PauseError::SetUp)?;
    if !plan.pause.seccomp.0.is_empty() {
        let flags = seccomp::Flags { log: plan.pause.seccomp_log, spec_allow: !plan.pause.seccomp_mitigate };
        seccomp::load(&plan.pause.seccomp.0, flags).map_err(PauseError::Seccomp)?;
        process::can_idle().map_err(PauseError::Idle)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_in_the_pods_namespaces() {
        let check = |name: &str, path: Option<&str>, kind: Option<ns::Kind>| {
            let found = sysctl_path(name);
            assert_eq!(found.as_deref(), path, "{name}");
            assert_eq!(found.as_deref().and_then(namespace_of), kind, "{name}");
        };
        check("net.ipv4.ip_local_port_range", Some("net/ipv4/ip_local_port_range"), Some(ns::Kind::Net));
        check("net/ipv4/conf/eth0.1/forwarding", Some("net/ipv4/conf/eth0.1/forwarding"), Some(ns::Kind::Net));
        check("net.ipv4.conf.eth0/1.forwarding", Some("net/ipv4/conf/eth0.1/forwarding"), Some(ns::Kind::Net));
        check("kernel.shm_rmid_forced", Some("kernel/shm_rmid_forced"), Some(ns::Kind::Ipc));
        check("fs.mqueue.msg_max", Some("fs/mqueue/msg_max"), Some(ns::Kind::Ipc));
        check("kernel.core_pattern", Some("kernel/core_pattern"), None);
        check("vm.overcommit_memory", Some("vm/overcommit_memory"), None);
        for bad in ["", "net..ipv4", "net/../kernel/core_pattern", "net.ipv4.", "net.a b", "net.a\nb"] {
            check(bad, None, None);
        }
    }
}
