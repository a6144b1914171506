//! Processes: fork and clone3, pidfds, signals, waiting, and what a process is before it executes another program.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;

/// What a clone of this process is to be. Zero flags: a plain fork with a pidfd.
#[derive(Debug, Default, Clone, Copy)]
pub struct CloneArgs<'a> {
    /// CLONE_* flags; CLONE_PIDFD is always added. CLONE_VM and CLONE_FILES are refused.
    pub flags: u64,
    /// With `flags & CLONE_INTO_CGROUP` (set by us): a directory of cgroup v2.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// In which process `clone` returned.
#[derive(Debug)]
pub enum Forked {
    /// The new process.
    Child,
    /// The one that called: the child's id in our PID namespace, and a pidfd.
    Parent(Pid, OwnedFd),
}

/// Layout of `struct clone_args` up to `cgroup` (clone3(2), Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct RawCloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The number of threads of this process.
pub fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// Whether this process has one thread. Needs no /proc: the kernel refuses CLONE_THREAD in unshare(2) to any other.
pub fn single_threaded() -> bool {
    // SAFETY: in a process of one thread the call changes nothing, and in any other it fails.
    #[allow(clippy::disallowed_methods)]
    let done = unsafe { libc::unshare(libc::CLONE_THREAD) };
    done == 0
}

/// The descriptors that a forked child keeps, by number: a list that outlives the borrows it was made of.
#[derive(Debug, Clone)]
pub struct Keep(Vec<u32>);

impl Keep {
    /// These and no others.
    pub fn only(fds: &[BorrowedFd<'_>]) -> Self {
        let mut numbers: Vec<u32> = fds.iter().map(|fd| fd.as_raw_fd() as u32).collect();
        numbers.sort_unstable();
        Self(numbers)
    }
}

/// Forks, runs `child` in the new process and ends that with the code it returns, without destructors of what stands above.
/// With `keep`, the child first closes every other descriptor from 3 on: `child` must use none but those.
///
/// # Errors
/// `InvalidInput` in a process of more than one thread: a child would get a copy of every lock as it is at this instant.
pub fn spawn(args: CloneArgs<'_>, keep: Option<Keep>, child: impl FnOnce() -> i32) -> io::Result<(Pid, OwnedFd)> {
    if !single_threaded() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "only single-threaded processes fork"));
    }
    // SAFETY: this is the only thread.
    match unsafe { clone(args) }? {
        Forked::Parent(pid, pidfd) => Ok((pid, pidfd)),
        Forked::Child => {
            let _never_unwind = EndOnDrop;
            if let Some(Keep(keep)) = keep {
                let mut next = 3;
                for fd in keep {
                    if fd > next && close_range(next, fd - 1, 0).is_err() {
                        exit_now(CHILD_FAILED);
                    }
                    next = next.max(fd + 1);
                }
                if close_range(next, u32::MAX, 0).is_err() {
                    exit_now(CHILD_FAILED);
                }
            }
            exit_now(child());
        }
    }
}

/// Exit code of a forked child that panicked or could not begin.
pub const CHILD_FAILED: i32 = 70;

/// Ends a forked child that unwinds: it must never run on in its parent's stack frames.
struct EndOnDrop;

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        exit_now(CHILD_FAILED);
    }
}

/// Forks with clone3(2).
///
/// # Safety
/// The caller must be the only thread of the process: the child gets a copy of every lock (the allocator's among them) as
/// it is at this instant. Debug builds check it.
pub unsafe fn clone(args: CloneArgs<'_>) -> io::Result<Forked> {
    debug_assert!(single_threaded(), "only single-threaded processes fork");
    if args.flags & (libc::CLONE_VM | libc::CLONE_FILES) as u64 != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut pidfd: RawFd = -1;
    let parent = args.flags & libc::CLONE_PARENT as u64 != 0;
    let mut raw = RawCloneArgs {
        flags: args.flags | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        // With CLONE_PARENT the child takes the caller's own exit signal, and the field must be 0.
        exit_signal: if parent { 0 } else { libc::SIGCHLD as u64 },
        ..RawCloneArgs::default()
    };
    if let Some(cgroup) = args.cgroup {
        const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
        raw.flags |= CLONE_INTO_CGROUP;
        raw.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `raw` is a valid clone_args of the size given, and `pidfd` outlives the call. Without CLONE_VM the child has
    // its own copy of our memory; that no other thread was inside a lock is the caller's promise.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut raw, size_of::<RawCloneArgs>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => {
            // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = Pid::from_raw(pid as i32).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            Ok(Forked::Parent(pid, pidfd))
        }
    }
}

/// A plain fork.
///
/// # Safety
/// As for [`clone`].
pub unsafe fn fork() -> io::Result<Forked> {
    // SAFETY: the caller promises what `clone` asks for.
    unsafe { clone(CloneArgs::default()) }
}

/// For the first line of a program that was started with a socket as its descriptor 0: takes it, puts /dev/null in the
/// place of 0 and 1, and closes whatever else the caller had left open. Descriptor 2 stays.
pub fn take_stdin() -> io::Result<OwnedFd> {
    // SAFETY: descriptor 0 is only duplicated, and what comes back is new.
    let taken = rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(0) }, 3)?;
    let number = taken.as_raw_fd() as u32;
    // The program has just begun: no `OwnedFd` but this one stands for a descriptor from 3 on.
    if number > 3 {
        close_range(3, number - 1, 0)?;
    }
    close_range(number + 1, u32::MAX, 0)?;
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    for place in [0, 1] {
        // SAFETY: both are descriptors; what stood at 0 and 1 belongs to nobody in this process.
        if unsafe { libc::dup2(null.as_raw_fd(), place) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(taken)
}

/// Gives heap that is free back to the kernel, where the C library can: for a process that is large for a moment only.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim only gives back pages that hold no allocation.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of what a process at rest does not need: free heap, and the pages of its own program, which stay in the page cache
/// and come back one by one as they are run. Each process of a pod has few pages of its own; those of the program would be
/// the most of it by far.
pub fn rest() {
    trim_heap();
    unsafe extern "C" {
        static __executable_start: u8;
        static etext: u8;
    }
    // SAFETY: sysconf takes an integer and gives one.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(4096) as usize;
    let start = (&raw const __executable_start).addr().next_multiple_of(page);
    let end = (&raw const etext).addr() / page * page;
    if start < end {
        // SAFETY: the linker puts the program's headers, constants and code between the two, and nothing writable: the pages
        // are the file's own, and reading one again gives the same bytes.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

/// Ends this process at once, without running destructors or exit handlers: for forked children.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes any integer and does not return.
    unsafe { libc::_exit(code) }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The child.
    pub pid: Pid,
    /// Exit code; 128 + n where a signal ended it.
    pub code: i32,
    /// The signal that ended it; 0: none.
    pub signal: u32,
}

/// Reaps one child that has ended, whichever it is. `None`: none has, or there is none.
pub fn reap() -> io::Result<Option<Ended>> {
    reap_with(libc::WNOHANG)
}

/// Waits for any child to end and reaps it. `None`: there is no child.
pub fn reap_wait() -> io::Result<Option<Ended>> {
    reap_with(0)
}

fn reap_with(options: i32) -> io::Result<Option<Ended>> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid int for the kernel to fill.
        match unsafe { libc::waitpid(-1, &raw mut status, options) } {
            0 => return Ok(None),
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
                error => return Err(error),
            },
            pid => {
                let signal = if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) as u32 } else { 0 };
                let code = if signal != 0 { 128 + signal as i32 } else { libc::WEXITSTATUS(status) };
                let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                return Ok(Some(Ended { pid, code, signal }));
            }
        }
    }
}

/// Sends a signal, by number, to the process of a pidfd. A process that is gone is `NotFound`.
pub fn signal(pidfd: BorrowedFd<'_>, signal: u32) -> io::Result<()> {
    // SAFETY: the pidfd is valid for the call, and a null siginfo is what kill(2) would send.
    let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, std::ptr::null::<libc::siginfo_t>(), 0) };
    match done {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Err(io::ErrorKind::NotFound.into()),
            error => Err(error),
        },
    }
}

/// A pidfd for a process of this PID namespace.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Field 22 of /proc/PID/stat: clock ticks from boot to the start of a process. With the pid it names a process for good.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    // The command's name, in parentheses, may hold anything; what follows the last one is ours.
    let after = stat.iter().rposition(|&b| b == b')').map(|i| &stat[i + 1..]);
    let field = after.and_then(|rest| rest.split(|&b| b == b' ').filter(|f| !f.is_empty()).nth(19));
    field.and_then(|f| std::str::from_utf8(f).ok()).and_then(|f| f.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Sets every signal to its default action and unblocks all: what a container's program expects at its start.
pub fn reset_signals() {
    /// `struct sigaction` as the kernel has it; all zero: SIG_DFL.
    #[repr(C)]
    #[derive(Default)]
    struct Action {
        handler: usize,
        flags: libc::c_ulong,
        restorer: usize,
        mask: u64,
    }
    let default = Action::default();
    for number in 1..=64 {
        // Not signal(3), which refuses the two signals that libc keeps to itself: those may be ignored too, by inheritance.
        // SAFETY: `default` is a valid kernel sigaction with an 8-byte mask, which the kernel only reads; an error (SIGKILL,
        // SIGSTOP) leaves the signal as it is.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, number, &raw const default, std::ptr::null_mut::<Action>(), size_of::<u64>()) };
    }
    // SAFETY: an empty set is a valid mask, and the old one is not asked for.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Blocks `signals` and gives a descriptor from which they are read (signalfd(2)), non-blocking.
pub fn signalfd(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set lives through both calls, and a descriptor that comes back is new and ours.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for &number in signals {
            libc::sigaddset(&raw mut set, number);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Reads what is pending on a signalfd and forgets it.
pub fn drain_signalfd(fd: BorrowedFd<'_>) {
    let mut buffer = [0u8; size_of::<libc::signalfd_siginfo>() * 8];
    while matches!(rustix::io::read(fd, &mut buffer), Ok(n) if n > 0) {}
}

/// Blocks every signal that can be blocked.
pub fn block_signals() {
    // SAFETY: a full set is a valid mask, and the old one is not asked for.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
}

/// Whether this process may wait for signals: a seccomp filter can forbid it.
pub fn can_idle() -> io::Result<()> {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set and the time live through the call, and no siginfo is asked for.
    let done = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now)
    };
    match io::Error::last_os_error() {
        error if done == -1 && !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Err(error),
        _ => Ok(()),
    }
}

/// What an init of a PID namespace does that has nothing to do: closes every descriptor, reaps orphans, and ends on SIGTERM or
/// SIGINT. [`block_signals`] comes first, or the kernel would drop both, as it does for an init without handlers.
pub fn idle_as_init() -> ! {
    // SAFETY: this function never returns and uses no descriptor, so that nobody misses those that are closed.
    let _ = unsafe { close_from(0) };
    // SAFETY: the set lives through the loop.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for number in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut set, number);
        }
        set
    };
    loop {
        // SAFETY: `set` is valid, and no siginfo is asked for.
        match unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) } {
            libc::SIGTERM | libc::SIGINT => exit_now(0),
            // Refused, by a seccomp filter: better to end than to try for ever.
            -1 if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) => exit_now(CHILD_FAILED),
            _ => while let Ok(Some(_)) = reap() {},
        }
    }
}

/// The process of a pidfd as `proc`, a procfs, sees it: from /proc/self/fdinfo. 0: it has ended, or is in no namespace below.
pub fn pidfd_pid(proc: BorrowedFd<'_>, pidfd: BorrowedFd<'_>) -> io::Result<u32> {
    use rustix::fs::{Mode, OFlags};
    let info = rustix::fs::openat(proc, format!("self/fdinfo/{}", pidfd.as_raw_fd()), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let info = io::read_to_string(std::fs::File::from(info))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).ok_or(io::ErrorKind::InvalidData)?;
    Ok(pid.trim().parse().unwrap_or(0))
}

/// Sends SIGKILL to a child by its pid. Only for a child that nobody else can reap: else the pid may be another's by now.
pub fn kill_child(pid: u32) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
}

/// Sets or clears PR_SET_DUMPABLE. A process that isn't dumpable can't be traced, and its /proc/PID/{root,fd,exe} are
/// closed to the container.
pub fn set_dumpable(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, u64::from(on))
}

/// Orphans below this process become its children.
pub fn set_subreaper(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, u64::from(on))
}

/// Gives the process the name that /proc/PID/comm shows; cut to 15 bytes.
pub fn set_name(name: &CStr) {
    // SAFETY: the string is NUL-terminated and only read.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

fn prctl(option: i32, value: u64) -> io::Result<()> {
    // SAFETY: the options used here take one integer and three zeros.
    match unsafe { libc::prctl(option, value, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens /dev/null on those of the descriptors 0 to 2 that are closed, so that nothing else is ever opened there.
pub fn occupy_stdio() -> io::Result<()> {
    use std::os::fd::IntoRawFd;
    loop {
        let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        let _stays_open = null.into_raw_fd();
    }
}

/// Makes 0, 1 and 2 copies of these descriptors, which stay open across execve. The originals stay as they are.
pub fn set_stdio(streams: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    // First above 2, so that none is overwritten before it was copied.
    let mut above = Vec::with_capacity(3);
    for fd in streams {
        above.push(rustix::io::fcntl_dupfd_cloexec(fd, 3)?);
    }
    for (number, fd) in (0..).zip(&above) {
        // SAFETY: both are descriptors; whoever owned 0 to 2 finds them replaced, which is what standard streams are for.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec (Linux 5.11).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX, 1 << 2)
}

/// Closes every descriptor from `first` on, whoever owns it: for a forked child that keeps only what stands below.
///
/// # Safety
/// No `OwnedFd` at or above `first` may be used or dropped afterwards.
pub unsafe fn close_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX, 0)
}

fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: the call takes integers only; that nobody uses a closed descriptor is the public functions' contract.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn pointers(strings: &[std::ffi::CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
}

/// Executes the program that a descriptor (which may be O_PATH) is open on (execveat(2)). Returns only on error.
pub fn exec_fd(program: BorrowedFd<'_>, args: &[std::ffi::CString], env: &[std::ffi::CString]) -> io::Error {
    let (args, env) = (pointers(args), pointers(env));
    let empty: &CStr = c"";
    // SAFETY: the path is NUL-terminated, both arrays end with a null pointer, and all strings outlive the call.
    unsafe { libc::syscall(libc::SYS_execveat, program.as_raw_fd(), empty.as_ptr(), args.as_ptr(), env.as_ptr(), libc::AT_EMPTY_PATH) };
    io::Error::last_os_error()
}

/// Executes a program. Returns only on error.
pub fn exec(path: &CStr, args: &[std::ffi::CString], env: &[std::ffi::CString]) -> io::Error {
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer, and the strings they point to outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// The one place that names a program to start from the daemon or a test. Environment and descriptors are the caller's to set.
#[allow(clippy::disallowed_methods)]
pub fn command(program: impl AsRef<OsStr>) -> std::process::Command {
    std::process::Command::new(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_of_this_boot() {
        let ticks = start_time(std::process::id()).unwrap();
        assert!(ticks > 0);
        assert_eq!(start_time(std::process::id()).unwrap(), ticks);
        assert!(start_time(u32::MAX - 1).is_err());
    }

    #[test]
    fn a_pidfd_of_nobody_is_refused() {
        assert!(pidfd_open(0).is_err());
        assert!(pidfd_open(i32::MAX as u32).is_err());
    }
}
