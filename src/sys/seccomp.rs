//! seccomp(2): puts a filter on the calling thread.
//!
//! It knows nothing of profiles or of how a filter is made (`crate::seccomp` compiles them in the daemon and the OCI command
//! line); it gets the finished program as bytes, which is all that the monitor's children link. Called by `oci` in the forked
//! child that becomes the container's process, as the last thing before execve.

use std::io;

/// The most instructions of one filter: BPF_MAXINSNS of `linux/bpf_common.h`.
pub const MAX_INSTRUCTIONS: usize = 4096;

/// Bytes of one `struct sock_filter`.
pub const INSTRUCTION_SIZE: usize = 8;

/// How the kernel is to treat a filter (seccomp(2), `SECCOMP_FILTER_FLAG_*`). TSYNC is deliberately missing: a filter is
/// for the one thread that is about to execute the container's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flags {
    /// Every action but Allow is written to the audit log (Linux 4.14).
    pub log: bool,
    /// Do not disable speculative store bypass for the process (Linux 4.17). Without it every filtered process runs with
    /// the costly mitigation; from 5.16 on that is off by default anyway.
    pub spec_allow: bool,
}

impl Default for Flags {
    /// What runc takes for a profile that says nothing of flags: SPEC_ALLOW.
    fn default() -> Self {
        Flags { log: false, spec_allow: true }
    }
}

impl Flags {
    fn bits(self) -> libc::c_ulong {
        let log = if self.log { libc::SECCOMP_FILTER_FLAG_LOG } else { 0 };
        let spec_allow = if self.spec_allow { libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW } else { 0 };
        log | spec_allow
    }
}

/// Puts a filter on the calling thread; it is kept through fork and execve and cannot be taken off again.
///
/// `filter` is an array of `struct sock_filter` in native byte order, of 1 to [`MAX_INSTRUCTIONS`] instructions; its alignment
/// does not matter. Allocates nothing, takes no lock: safe in a forked child.
///
/// # Errors
/// `InvalidInput` for a length that is no such array; EINVAL from the kernel for a program it refuses; EACCES without
/// both no_new_privs and CAP_SYS_ADMIN in the thread's user namespace; ENOMEM where the filters of the thread together pass
/// 32768 instructions.
pub fn load(filter: &[u8], flags: Flags) -> io::Result<()> {
    let length = filter.len() / INSTRUCTION_SIZE;
    if filter.is_empty() || !filter.len().is_multiple_of(INSTRUCTION_SIZE) || length > MAX_INSTRUCTIONS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "length is not that of a seccomp filter"));
    }
    // The cast of the pointer is sound for any alignment: only the kernel reads through it, with copy_from_user.
    let program = libc::sock_fprog { len: length as u16, filter: filter.as_ptr().cast_mut().cast() };
    // SAFETY: `program` names exactly `filter`, whose length in instructions was checked above; the kernel copies it during
    // the call and writes to neither.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags.bits(), &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_filter_is_refused() {
        // None of these may reach the kernel: a filter on the test's own thread would stay.
        for length in [0, 1, 7, 9, INSTRUCTION_SIZE * (MAX_INSTRUCTIONS + 1)] {
            let error = load(&vec![0; length], Flags::default()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{length} bytes");
            assert_eq!(error.raw_os_error(), None, "{length} bytes");
        }
    }

    #[test]
    fn the_kernel_refuses_a_program_that_does_not_return() {
        // BPF_LD | BPF_W | BPF_ABS and nothing after it.
        let error = load(&[0x20, 0, 0, 0, 0, 0, 0, 0], Flags { log: true, spec_allow: true }).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)), "{error}");
    }
}
