//! Names of system calls to numbers, and x86's calls that exist twice.

use super::Arch;
use super::table::TABLE;

/// The number of a call that an architecture doesn't have.
pub(super) const NONE: u32 = u32::MAX;

/// A call's name, and its numbers by [`Arch`].
pub(super) type Row = (&'static str, [u32; 5]);

/// The bit in the number that makes a call of x86_64 one of x32 (`__X32_SYSCALL_BIT`).
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// The number of a call, as the filter sees it.
pub(super) fn number(name: &str, arch: Arch) -> Option<u32> {
    let row = TABLE.binary_search_by(|(other, _)| (*other).cmp(name)).ok()?;
    let number = TABLE[row].1[arch as usize];
    let bit = if arch == Arch::X32 { X32_BIT } else { 0 };
    (number != NONE).then_some(number | bit)
}

/// The multiplexer behind which a call can also be reached, and its number there: `socketcall` (`SYS_*` of `linux/net.h`)
/// or `ipc` (`linux/ipc.h`). Only x86 has them.
pub(super) fn multiplexed(name: &str, arch: Arch) -> Option<(u32, u32)> {
    const SOCKETCALL: [&str; 20] = [
        "socket",
        "bind",
        "connect",
        "listen",
        "accept",
        "getsockname",
        "getpeername",
        "socketpair",
        "send",
        "recv",
        "sendto",
        "recvfrom",
        "shutdown",
        "setsockopt",
        "getsockopt",
        "sendmsg",
        "recvmsg",
        "accept4",
        "recvmmsg",
        "sendmmsg",
    ];
    const IPC: [(&str, u32); 12] = [
        ("semop", 1),
        ("semget", 2),
        ("semctl", 3),
        ("semtimedop", 4),
        ("msgsnd", 11),
        ("msgrcv", 12),
        ("msgget", 13),
        ("msgctl", 14),
        ("shmat", 21),
        ("shmdt", 22),
        ("shmget", 23),
        ("shmctl", 24),
    ];
    if arch != Arch::X86 {
        return None;
    }
    let socket = SOCKETCALL.iter().position(|&call| call == name);
    let socket = socket.and_then(|index| Some((number("socketcall", arch)?, index as u32 + 1)));
    let ipc = IPC.iter().find(|(call, _)| *call == name);
    socket.or_else(|| ipc.and_then(|&(_, index)| Some((number("ipc", arch)?, index))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_complete() {
        assert!(TABLE.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (name, numbers) in TABLE {
            // Since Linux 5.1 a new call has one number wherever it is.
            if (424..512).contains(&numbers[0]) {
                assert!(numbers.iter().all(|number| [numbers[0], NONE].contains(number)), "{name}: {numbers:?}");
            }
        }
    }

    #[test]
    fn numbers() {
        let check = |name: &str, expected: [Option<u32>; 5]| {
            assert_eq!(Arch::ALL.map(|(_, arch)| number(name, arch)), expected, "{name}");
        };
        check("read", [Some(0), Some(3), Some(0x4000_0000), Some(63), Some(3)]);
        check("execve", [Some(59), Some(11), Some(0x4000_0208), Some(221), Some(11)]);
        check("open_tree_attr", [Some(467), Some(467), Some(0x4000_01d3), Some(467), Some(467)]);
        check("socketcall", [None, Some(102), None, None, None]);
        check("set_tls", [None, None, None, None, Some(0xf0005)]);
        check("no_such_call", [None; 5]);
        #[cfg(target_arch = "x86_64")]
        for (name, ours) in [("clone3", libc::SYS_clone3), ("accept4", libc::SYS_accept4), ("seccomp", libc::SYS_seccomp)] {
            assert_eq!(number(name, Arch::X86_64), Some(ours as u32), "{name}");
        }
    }

    #[test]
    fn doubled_calls() {
        assert_eq!(multiplexed("socket", Arch::X86), Some((102, 1)));
        assert_eq!(multiplexed("sendmmsg", Arch::X86), Some((102, 20)));
        assert_eq!(multiplexed("shmctl", Arch::X86), Some((117, 24)));
        assert_eq!(multiplexed("read", Arch::X86), None);
        assert_eq!(multiplexed("socket", Arch::X86_64), None);
    }
}
