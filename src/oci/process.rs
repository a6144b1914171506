//! From a process of ours to the container's program: limits, working directory, user, capabilities, seccomp, execve.
//!
//! The same for a container's init and for an exec'd process. Both stand in the container's root by now, with nothing of the host
//! but their sockets and standard streams. Nothing here waits.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::devices;
use super::label::{self, LabelError};
use super::paths::{Leaf, Links, PathError, Root};
use crate::errchain::{Kind, Kinded};
use crate::plan::{Process, ResolvedUser, Rlimit, UserNamespace, capability};
use crate::sys::{creds, process, seccomp};

/// A process that cannot be made what its plan says.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Argument or environment can't be passed to a program.
    #[error("{what} {value:?} has a NUL byte")]
    Nul {
        /// `argument` or `environment variable`.
        what: &'static str,
        /// The text.
        value: OsString,
    },
    /// There is no program.
    #[error("the plan names no program")]
    NoProgram,
    /// oom_score_adj.
    #[error("cannot set oom_score_adj to {value}")]
    OomScore {
        /// The value.
        value: i32,
        /// Why.
        source: io::Error,
    },
    /// AppArmor, SELinux.
    #[error("cannot confine the process")]
    Label(#[source] LabelError),
    /// A resource limit.
    #[error("cannot set limit {name} to {soft}:{hard}")]
    Limit {
        /// RLIMIT_*.
        name: String,
        /// Soft limit.
        soft: u64,
        /// Hard limit.
        hard: u64,
        /// Why.
        source: io::Error,
    },
    /// The session keyring.
    #[error("cannot make a session keyring")]
    Keyring(#[source] io::Error),
    /// A standard stream.
    #[error("cannot set up descriptor {0}")]
    Stdio(i32, #[source] io::Error),
    /// The working directory can't be made.
    #[error("cannot make the working directory")]
    MakeCwd(#[source] PathError),
    /// The working directory can't be opened.
    #[error("cannot use the working directory")]
    OpenCwd(#[source] PathError),
    /// The working directory can't be entered.
    #[error("cannot enter the working directory {path}")]
    Cwd {
        /// Its path in the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The working directory is not in the container.
    #[error("the working directory {path} is outside the container's root")]
    CwdOutside {
        /// Its path in the container.
        path: PathBuf,
    },
    /// Capabilities that this process has not, and so can't give.
    #[error("cannot give capabilities {0}: this node does not have them")]
    Missing(String),
    /// Capabilities.
    #[error("cannot set the {0} capabilities")]
    Capabilities(&'static str, #[source] io::Error),
    /// A user or a group that the host has no id for.
    #[error("{what} {id} is outside of the mapping of the pod's user namespace, which has {length} ids from {first} on")]
    Unmapped {
        /// `user` or `group`.
        what: &'static str,
        /// The id.
        id: u32,
        /// The first id that is mapped.
        first: u32,
        /// How many are.
        length: u32,
    },
    /// User and groups.
    #[error("cannot become user {uid}, group {gid}")]
    User {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
        /// Why.
        source: io::Error,
    },
    /// PR_SET_DUMPABLE.
    #[error("cannot keep the process undumpable")]
    Dumpable(#[source] io::Error),
    /// PR_SET_NO_NEW_PRIVS.
    #[error("cannot set no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
    /// seccomp(2).
    #[error("cannot load the seccomp filter")]
    Seccomp(#[source] io::Error),
    /// The program isn't in PATH.
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotFound(OsString),
    /// The program can't be executed.
    #[error("exec: {path:?}")]
    Execute {
        /// Its path in the container.
        path: OsString,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for ProcessError {
    fn kind(&self) -> Kind {
        match self {
            ProcessError::Nul { .. }
            | ProcessError::NoProgram
            | ProcessError::CwdOutside { .. }
            | ProcessError::NotFound(_)
            | ProcessError::Unmapped { .. }
            | ProcessError::Execute { .. }
            | ProcessError::Cwd { .. } => Kind::InvalidArgument,
            ProcessError::MakeCwd(error) | ProcessError::OpenCwd(error) => error.kind(),
            ProcessError::Label(error) => error.kind(),
            ProcessError::Missing(_) => Kind::PermissionDenied,
            ProcessError::OomScore { source, .. } | ProcessError::Limit { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Kind::PermissionDenied
            }
            _ => Kind::Internal,
        }
    }
}

/// Limits of the kernel's own first process (INIT_RLIMITS in asm-generic/resource.h), by number.
#[derive(Debug, Clone)]
pub struct DefaultLimits([(u64, u64); LIMITS.len()]);

const NONE: u64 = u64::MAX;
/// RLIMIT_* by number.
const LIMITS: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

impl DefaultLimits {
    /// Reads what the kernel computes at boot from the host's `/proc` (`kernel.threads-max`); called by a creator.
    pub fn read(proc: BorrowedFd<'_>) -> Self {
        let threads = rustix::fs::openat(proc, c"sys/kernel/threads-max", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .ok()
            .and_then(|fd| io::read_to_string(std::fs::File::from(fd)).ok())
            .and_then(|text| text.trim().parse::<u64>().ok());
        // fork_init(): half of the threads that fit the memory.
        let threads = threads.map_or(NONE, |n| n / 2);
        const MIB: u64 = 1 << 20;
        let mut limits = [(NONE, NONE); LIMITS.len()];
        limits[libc::RLIMIT_STACK as usize] = (8 * MIB, NONE);
        limits[libc::RLIMIT_CORE as usize] = (0, NONE);
        limits[libc::RLIMIT_NPROC as usize] = (threads, threads);
        limits[libc::RLIMIT_NOFILE as usize] = (1024, 4096);
        limits[libc::RLIMIT_MEMLOCK as usize] = (8 * MIB, 8 * MIB);
        limits[libc::RLIMIT_SIGPENDING as usize] = (threads, threads);
        limits[libc::RLIMIT_MSGQUEUE as usize] = (819_200, 819_200);
        limits[libc::RLIMIT_NICE as usize] = (0, 0);
        limits[libc::RLIMIT_RTPRIO as usize] = (0, 0);
        Self(limits)
    }
}

fn set_limits(planned: &[Rlimit], defaults: &DefaultLimits) -> Result<(), ProcessError> {
    let name = |resource: u32| LIMITS.get(resource as usize).map_or_else(|| format!("number {resource}"), |name| name.to_string());
    for (resource, &(soft, hard)) in (0u32..).zip(&defaults.0) {
        if planned.iter().any(|limit| limit.resource == resource) {
            continue;
        }
        let failed = |source| ProcessError::Limit { name: name(resource), soft, hard, source };
        let (old_soft, old_hard) = creds::limit(resource).map_err(failed)?;
        if (old_soft, old_hard) == (soft, hard) {
            continue;
        }
        // Raising a hard limit takes CAP_SYS_RESOURCE; what nobody asked for by name stays lower then.
        if creds::set_limit(resource, soft, hard).is_err() {
            creds::set_limit(resource, soft.min(old_hard), hard.min(old_hard)).map_err(failed)?;
        }
    }
    for &Rlimit { resource, soft, hard } in planned {
        creds::set_limit(resource, soft, hard).map_err(|source| ProcessError::Limit { name: name(resource), soft, hard, source })?;
    }
    Ok(())
}

/// Raises those hard limits that will have to be higher, while this process has the host's CAP_SYS_RESOURCE: in a user namespace none
/// can be raised. What nobody asked for by name may stay lower.
pub fn raise_limits(planned: &[Rlimit], defaults: &DefaultLimits) -> Result<(), ProcessError> {
    for (resource, &(_, default)) in (0u32..).zip(&defaults.0) {
        let named = planned.iter().find(|limit| limit.resource == resource);
        let hard = named.map_or(default, |limit| limit.hard);
        let name = || LIMITS.get(resource as usize).map_or_else(|| format!("number {resource}"), |name| name.to_string());
        let (soft, old) = creds::limit(resource).map_err(|source| ProcessError::Limit { name: name(), soft: hard, hard, source })?;
        if hard > old
            && let Err(source) = creds::set_limit(resource, soft, hard)
            && let Some(limit) = named
        {
            return Err(ProcessError::Limit { name: name(), soft: limit.soft, hard, source });
        }
    }
    Ok(())
}

/// Whether a user and its groups are mapped.
pub fn check_mapped(user: &ResolvedUser, mappings: Option<&UserNamespace>) -> Result<(), ProcessError> {
    let Some(mappings) = mappings else { return Ok(()) };
    let ids = [("user", user.uid, &mappings.uids), ("group", user.gid, &mappings.gids)];
    let groups = user.groups.iter().map(|group| ("group", *group, &mappings.gids));
    match ids.into_iter().chain(groups).find(|(_, id, range)| range.host_id(*id).is_none()) {
        Some((what, id, range)) => Err(ProcessError::Unmapped { what, id, first: range.container, length: range.length }),
        None => Ok(()),
    }
}

/// Sets this process's oom_score_adj through the host's `/proc`, while it still has its privileges: with CAP_SYS_RESOURCE
/// the value becomes the lowest that the container's processes can set for themselves (proc_pid_oom_score_adj(5)).
pub fn set_oom_score(plan: &Process, proc: BorrowedFd<'_>) -> Result<(), ProcessError> {
    let value = plan.oom_score_adj.unwrap_or(0);
    let failed = |source: io::Error| ProcessError::OomScore { value, source };
    let open = |flags: OFlags| rustix::fs::openat(proc, c"self/oom_score_adj", flags | OFlags::CLOEXEC, Mode::empty());
    let current = open(OFlags::RDONLY).map_err(|error| failed(error.into()))?;
    let current: i32 = io::read_to_string(std::fs::File::from(current)).map_err(failed)?.trim().parse().unwrap_or(0);
    let value = if plan.restrict_oom_score_adj { value.max(current) } else { value };
    if value == current {
        return Ok(());
    }
    let file = open(OFlags::WRONLY).map_err(|error| failed(error.into()))?;
    rustix::io::write(&file, value.to_string().as_bytes()).map(drop).map_err(|error| failed(error.into()))
}

/// Has execve change to the plan's AppArmor profile and SELinux context. Through the host's `/proc`, while it is there.
pub fn set_labels(plan: &Process, proc: BorrowedFd<'_>) -> Result<(), ProcessError> {
    label::on_exec(plan, proc).map_err(ProcessError::Label)
}

/// Puts the streams on descriptors 0, 1 and 2 and gives them to the user, who may open them again as /dev/stderr.
pub fn take_stdio(streams: [BorrowedFd<'_>; 3], uid: u32) -> Result<(), ProcessError> {
    own(streams, uid, None)?;
    process::set_stdio(streams).map_err(|source| ProcessError::Stdio(0, source))
}

/// Gives the streams to the root of a user namespace, by its ids on the host: from inside it could not take what belongs to the host's
/// root. A terminal has its group already.
pub fn give_streams(streams: [BorrowedFd<'_>; 3], (uid, gid): (u32, u32)) -> Result<(), ProcessError> {
    let terminal = rustix::termios::isatty(streams[0]);
    own(streams, uid, Some(rustix::fs::Gid::from_raw(gid)).filter(|_| !terminal))
}

fn own(streams: [BorrowedFd<'_>; 3], uid: u32, gid: Option<rustix::fs::Gid>) -> Result<(), ProcessError> {
    for (number, fd) in (0..).zip(streams) {
        let failed = |source: io::Error| ProcessError::Stdio(number, source);
        let stat = rustix::fs::fstat(fd).map_err(|error| failed(error.into()))?;
        if stat.st_uid != uid && !devices::is_null(fd).map_err(failed)? {
            let owner = Some(rustix::fs::Uid::from_raw(uid));
            match rustix::fs::fchown(fd, owner, gid) {
                // A socket, or a file on a filesystem that keeps its owners: the stream works all the same.
                Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS | Errno::NOTSUP) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
    }
    Ok(())
}

/// A process that has become the container's user; what is left is seccomp and execve.
pub struct Ready<'a> {
    plan: &'a Process,
    args: Vec<CString>,
    env: Vec<CString>,
    capabilities: creds::Sets,
}

/// Argument and environment vectors as execve(2) takes them. A NUL byte in the plan is an error of the creator's.
fn strings(what: &'static str, list: &[OsString]) -> Result<Vec<CString>, ProcessError> {
    list.iter().map(|text| CString::new(text.as_bytes()).map_err(|_| ProcessError::Nul { what, value: text.clone() })).collect()
}

/// Checks what can be checked before anything is made.
pub fn check(plan: &Process) -> Result<(), ProcessError> {
    if plan.args.first().is_none_or(|program| program.is_empty()) {
        return Err(ProcessError::NoProgram);
    }
    strings("argument", &plan.args)?;
    strings("environment variable", &plan.env)?;
    Ok(())
}

/// Makes this process the container's user. `root` is the container's root, which this process stands in.
pub fn prepare<'a>(plan: &'a Process, user: &ResolvedUser, root: Root<'_>, defaults: &DefaultLimits) -> Result<Ready<'a>, ProcessError> {
    check(plan)?;
    let args = strings("argument", &plan.args)?;
    let mut env = strings("environment variable", &plan.env)?;
    if plan.env_var("HOME").is_none() {
        let home = [b"HOME=", user.home.as_os_str().as_bytes()].concat();
        let home = CString::new(home).map_err(|_| ProcessError::Nul { what: "environment variable", value: user.home.clone().into_os_string() })?;
        env.push(home);
    }
    set_limits(&plan.rlimits, defaults)?;
    match creds::new_session_keyring() {
        // No keyrings in this kernel, or no room for one more: neither is a way back to the host's.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EDQUOT | libc::EPERM)) => return Err(ProcessError::Keyring(error)),
        _ => {}
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    process::reset_signals();

    let entered = enter_cwd(plan, root);
    let capabilities = become_user(plan, user)?;
    // Root may be kept out where the user is not, as on NFS: the second try is the one that counts.
    if let Err(first) = entered
        && enter_cwd(plan, root).is_err()
    {
        return Err(first);
    }
    Ok(Ready { plan, args, env, capabilities })
}

/// Makes the working directory where it is missing, with mode 0755 and owned by root.
pub fn make_cwd(plan: &Process, root: Root<'_>) -> Result<(), ProcessError> {
    root.make(cwd(plan), Leaf::Directory, Links::Follow).map(drop).map_err(ProcessError::MakeCwd)
}

fn cwd(plan: &Process) -> &Path {
    if plan.cwd.as_os_str().is_empty() { Path::new("/") } else { &plan.cwd }
}

fn enter_cwd(plan: &Process, root: Root<'_>) -> Result<(), ProcessError> {
    let path = cwd(plan);
    // Resolved in the root and without magic links, so that /proc/self/fd/7 is refused whatever 7 may be (CVE-2024-21626).
    let directory = root.open(path, OFlags::PATH | OFlags::DIRECTORY).map_err(ProcessError::OpenCwd)?;
    rustix::process::fchdir(&directory).map_err(|error| ProcessError::Cwd { path: path.into(), source: error.into() })?;
    // The kernel's own word: a directory that can't be reached from the root is `(unreachable)/...`, or has no name at all.
    match rustix::process::getcwd(Vec::new()) {
        Ok(cwd) if cwd.to_bytes().starts_with(b"/") => Ok(()),
        Ok(_) | Err(Errno::NOENT) => Err(ProcessError::CwdOutside { path: path.into() }),
        Err(error) => Err(ProcessError::Cwd { path: path.into(), source: error.into() }),
    }
}

fn capability_names(set: u64) -> String {
    let names = (0..64).filter(|bit| set & (1 << bit) != 0).map(|bit| match capability::NAMES.get(bit) {
        Some(name) => format!("CAP_{name}"),
        None => format!("number {bit}"),
    });
    names.collect::<Vec<_>>().join(", ")
}

/// User, groups and capabilities; all but CAP_SYS_ADMIN where the filter needs it. Gives the sets that are to be at last.
fn become_user(plan: &Process, user: &ResolvedUser) -> Result<creds::Sets, ProcessError> {
    let wanted = &plan.capabilities;
    let have = creds::capabilities().map_err(|error| ProcessError::Capabilities("current", error))?;
    let all = wanted.permitted | wanted.effective | wanted.inheritable | wanted.ambient;
    let missing = (all & !have.permitted) | (wanted.bounding & !creds::bounding());
    if missing != 0 {
        return Err(ProcessError::Missing(capability_names(missing)));
    }
    // Another user than root gets nothing but the ambient set from execve. Until then it must not have more either, or its program
    // would be looked up and opened with rights that it will not have.
    let effective = if user.uid == 0 { wanted.effective } else { wanted.effective & wanted.ambient };
    let last = creds::Sets { permitted: wanted.permitted, effective, inheritable: wanted.inheritable };

    // CAP_SETPCAP goes last: the bounding set is lowered while it is there.
    creds::drop_bounding(wanted.bounding).map_err(|error| ProcessError::Capabilities("bounding", error))?;
    creds::keep_capabilities().map_err(|error| ProcessError::Capabilities("kept", error))?;
    creds::become_user(user.uid, user.gid, &user.groups).map_err(|source| ProcessError::User { uid: user.uid, gid: user.gid, source })?;
    // A change of user may have made the process dumpable again (fs.suid_dumpable), and it still has our memory and program.
    process::set_dumpable(false).map_err(ProcessError::Dumpable)?;
    let extra = if needs_admin(plan) { creds::SYS_ADMIN } else { 0 };
    creds::set_capabilities(creds::Sets { permitted: last.permitted | extra, effective: last.effective | extra, ..last })
        .map_err(|error| ProcessError::Capabilities("effective", error))?;
    creds::set_ambient(wanted.ambient).map_err(|error| ProcessError::Capabilities("ambient", error))?;
    process::set_dumpable(false).map_err(ProcessError::Dumpable)?;
    Ok(last)
}

/// Without no_new_privs, seccomp(2) takes CAP_SYS_ADMIN.
fn needs_admin(plan: &Process) -> bool {
    !plan.seccomp.0.is_empty() && !plan.no_new_privileges
}

impl Ready<'_> {
    /// Executes the program. Returns only on failure.
    pub fn execute(self) -> ProcessError {
        match self.try_execute() {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    fn try_execute(self) -> Result<std::convert::Infallible, ProcessError> {
        let program = find_program(self.plan)?;
        // The sockets and all else of ours end with execve. Up to then /proc/self/exe is the monitor's program on the host: the
        // process is not dumpable, which keeps /proc/PID/exe and fd shut to others, and where the image has that very link
        // executed, it is on a read-only mount (see `own_program`; CVE-2019-5736).
        process::close_on_exec_from(3).map_err(|source| ProcessError::Stdio(3, source))?;
        if self.plan.no_new_privileges {
            creds::set_no_new_privileges().map_err(ProcessError::NoNewPrivileges)?;
        }
        if !self.plan.seccomp.0.is_empty() {
            let flags = seccomp::Flags { log: self.plan.seccomp_log, spec_allow: !self.plan.seccomp_mitigate };
            seccomp::load(&self.plan.seccomp.0, flags).map_err(ProcessError::Seccomp)?;
        }
        if needs_admin(self.plan) {
            // From here on the filter decides; one that forbids capset(2) gives an error, not CAP_SYS_ADMIN.
            creds::set_capabilities(self.capabilities).map_err(|error| ProcessError::Capabilities("effective", error))?;
            process::set_dumpable(false).map_err(ProcessError::Dumpable)?;
        }
        Err(ProcessError::Execute { path: OsString::from_vec(program.as_bytes().to_vec()), source: process::exec(&program, &self.args, &self.env) })
    }
}

/// Where programs are when the environment has no PATH, as in execvp(3) and in both peers.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds the program as the container's user, in its root.
fn find_program(plan: &Process) -> Result<CString, ProcessError> {
    let Some(program) = plan.args.first() else { return Err(ProcessError::NoProgram) };
    let nul = || ProcessError::Nul { what: "argument", value: program.clone() };
    let not_found = || ProcessError::NotFound(program.clone());
    if program.as_bytes().contains(&b'/') {
        return CString::new(program.as_bytes()).map_err(|_| nul());
    }
    let path = plan.env_var("PATH").unwrap_or(OsStr::new(DEFAULT_PATH));
    let mut denied = None;
    for directory in path.as_bytes().split(|&b| b == b':') {
        let directory = if directory.is_empty() { Path::new(".") } else { Path::new(OsStr::from_bytes(directory)) };
        let candidate = directory.join(program);
        let Ok(stat) = rustix::fs::stat(&candidate) else { continue };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            continue;
        }
        let text = CString::new(candidate.as_os_str().as_bytes()).map_err(|_| nul())?;
        match rustix::fs::accessat(CWD, &candidate, Access::EXEC_OK, AtFlags::EACCESS) {
            Ok(()) => return Ok(text),
            // Perhaps access(2) is wrong about ambient capabilities; execve will say so if not.
            Err(Errno::ACCESS) => denied = denied.or(Some(text)),
            Err(_) => {}
        }
    }
    denied.ok_or_else(not_found)
}

/// The descriptors of the standard streams.
pub fn streams(stdio: &super::create::Stdio) -> [BorrowedFd<'_>; 3] {
    debug_assert!(stdio.stdin.as_raw_fd() >= 0);
    [stdio.stdin.as_fd(), stdio.stdout.as_fd(), stdio.stderr.as_fd()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_their_names() {
        assert_eq!(capability_names(1 | 1 << 21 | 1 << 40 | 1 << 60), "CAP_CHOWN, CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE, number 60");
    }

    #[test]
    fn a_process_without_a_program_is_refused() {
        let process = |args: &[&str]| Process { args: args.iter().map(OsString::from).collect(), ..Process::default() };
        assert!(matches!(check(&process(&[])), Err(ProcessError::NoProgram)));
        assert!(matches!(check(&process(&[""])), Err(ProcessError::NoProgram)));
        assert!(matches!(check(&process(&["a", "b\0"])), Err(ProcessError::Nul { .. })));
        assert!(check(&process(&["a"])).is_ok());
    }
}
