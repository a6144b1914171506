//! RuntimeDefault: the profile for pods that ask for the runtime's own.
//!
//! It is containerd's (`contrib/seccomp`, 2.4), which pods on most nodes have been run with: the same rules, by capability and
//! by architecture, so that a pod meets no other verdicts here. `tests/seccomp/containerd-*.txt` hold it to that.

use super::{Action, Arch, Arg, Flags, Op, Profile, Rule};

/// Calls that every container may make.
const ALWAYS: &str = "\
    _llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 clock_adjtime \
    clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range \
    connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
    epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir \
    fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat \
    fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat \
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 \
    getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage \
    getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 \
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc \
    kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr \
    listxattrat llistxattr lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules lsm_set_self_attr lstat lstat64 madvise \
    map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect \
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget \
    msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal \
    pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 \
    pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg \
    remap_file_pages removexattr removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask \
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max \
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 \
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop \
    semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 \
    setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid \
    setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown \
    sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statmount statx symlink \
    symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 \
    timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate \
    truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid \
    write writev";

/// Calls that exist only on one family of architectures.
const ON_X86: &str = "arch_prctl modify_ldt";
const ON_ARM: &str = "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls";

/// Reading and tracing other processes; safe for all since the kernel checks the filter again after a tracer (Linux 4.8).
const TRACING: &str = "process_vm_readv process_vm_writev ptrace";

/// What a capability, by its bit, adds.
const BY_CAPABILITY: [(u32, &str); 14] = [
    (2, "open_by_handle_at"),                                                           // CAP_DAC_READ_SEARCH
    (16, "delete_module init_module finit_module"),                                     // CAP_SYS_MODULE
    (17, "iopl ioperm"),                                                                // CAP_SYS_RAWIO
    (18, "chroot"),                                                                     // CAP_SYS_CHROOT
    (19, "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"), // CAP_SYS_PTRACE
    (20, "acct"),                                                                       // CAP_SYS_PACCT
    (
        CAP_SYS_ADMIN,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount open_tree \
      perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    (22, "reboot"),                                                    // CAP_SYS_BOOT
    (23, "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"), // CAP_SYS_NICE
    (25, "settimeofday stime clock_settime clock_settime64"),          // CAP_SYS_TIME
    (26, "vhangup"),                                                   // CAP_SYS_TTY_CONFIG
    (34, "syslog"),                                                    // CAP_SYSLOG
    (38, "perf_event_open"),                                           // CAP_PERFMON
    (39, "bpf"),                                                       // CAP_BPF
];

const CAP_SYS_ADMIN: u32 = 21;

/// Address families for socket(2): all below AF_ALG, which is the kernel's cryptography and not for a container, then these
/// from AF_NFC to AF_MCTP. Missing is AF_VSOCK (40): it is not bound to a network namespace.
const FAMILIES_BELOW: u64 = 38;
const FAMILIES: [u64; 6] = [39, 41, 42, 43, 44, 45];

/// personality(2): PER_LINUX and PER_LINUX32, with and without UNAME26, and the question for the current one.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The CLONE_NEW* flags of clone(2): namespaces are for CAP_SYS_ADMIN.
const CLONE_NEW: u64 = 0x7e02_0000;

/// The default profile for a process with these capabilities (a mask, bit N for capability N) in its bounding set.
///
/// `arch` is the native architecture, `kernel` the running kernel's version and patch level: `(6, 1)`.
pub fn runtime_default(capabilities: u64, arch: Arch, kernel: (u32, u32)) -> Profile {
    let arm = matches!(arch, Arch::Aarch64 | Arch::Arm);
    let architectures = if arm { vec![Arch::Arm, Arch::Aarch64] } else { vec![Arch::X86_64, Arch::X86, Arch::X32] };
    let arg = |op, value, value_two| vec![Arg { index: 0, op, value, value_two }];

    let mut rules = vec![allow(ALWAYS, vec![]), allow("socket", arg(Op::Lt, FAMILIES_BELOW, 0))];
    rules.extend(FAMILIES.map(|family| allow("socket", arg(Op::Eq, family, 0))));
    rules.extend(PERSONALITIES.map(|personality| allow("personality", arg(Op::Eq, personality, 0))));
    if kernel >= (4, 8) {
        rules.push(allow(TRACING, vec![]));
    }
    rules.push(allow(if arm { ON_ARM } else { ON_X86 }, vec![]));
    let granted = |capability: u32| capabilities & (1 << capability) != 0;
    rules.extend(BY_CAPABILITY.iter().filter(|(capability, _)| granted(*capability)).map(|(_, names)| allow(names, vec![])));
    if !granted(CAP_SYS_ADMIN) {
        rules.push(allow("clone", arg(Op::MaskedEq, CLONE_NEW, 0)));
        // Its flags are in memory, where no filter sees them. ENOSYS makes C libraries fall back to clone.
        rules.push(Rule { names: vec!["clone3".to_owned()], action: Action::Errno(38), args: vec![] });
    }
    Profile { default_action: Action::Errno(1), architectures, rules, flags: Flags::default() }
}

/// The capabilities that change the profile: two sets that agree in these give the same one.
pub(super) fn relevant(capabilities: u64) -> u64 {
    BY_CAPABILITY.iter().fold(0, |mask, (capability, _)| mask | (capabilities & (1 << capability)))
}

fn allow(names: &str, args: Vec<Arg>) -> Rule {
    Rule { names: names.split_ascii_whitespace().map(str::to_owned).collect(), action: Action::Allow, args }
}
