//! Seccomp profiles and the compiler that turns them into filters.
//!
//! A [`Profile`] says, in the terms of the OCI runtime specification's `LinuxSeccomp`, what is to happen to each system call.
//! [`compile`] makes the BPF program for it, as bytes that `sys::seccomp::load` gives to the kernel as they are.
//! [`runtime_default`] is the profile that Kubernetes calls RuntimeDefault, [`from_json`] reads one from a file or from a
//! container's config.json, and a [`Cache`] keeps what was compiled. The daemon and the OCI command line call all this; the
//! monitor only ever holds the bytes.
//!
//! It does no I/O, and it deliberately does not use libseccomp: a distribution's version (2.5.4 in Debian 12) does not know
//! the calls that Linux got since 5.17 and so cannot allow them, takes 10 ms to compile the default profile (the largest
//! single part of a create), and would be the daemon's only C library. What matters is that a profile gets the same verdicts
//! as with runc, so these of libseccomp's and runc's ways are kept, and tested against both:
//!
//! - The native architecture always belongs to the filter, listed or not. A call from an architecture that is not in the
//!   filter kills the thread, and so does one with x32's bit where x32 is not in it; but number -1, which a tracer uses to
//!   skip a call, gets the default action.
//! - Names that an architecture does not know are skipped there. A rule whose action is the default one does nothing.
//! - Rules for the same call are alternatives. One without conditions beats all with conditions, wherever it stands, and
//!   the first of several such wins. Conditions of one rule must all hold; but where two of them are about the same
//!   argument, each becomes a rule of its own. Among conditional rules the first that matches in the profile's order wins;
//!   libseccomp orders them by their arguments instead and refuses some contradictions, so profiles that depend on it differ.
//! - Arguments are 64 bits wide on x86_64 and aarch64. On x86, x32 and arm only the lower 32 bits of argument and value are
//!   compared.
//! - x86 has each socket and System V IPC call twice: on its own and behind `socketcall` or `ipc`. A rule for `socket` is a
//!   rule for both; behind the multiplexer its condition on the first argument is replaced by the number of the call, and
//!   conditions on others are compared with the multiplexer's arguments.
//! - Calls newer than the newest one that the profile names on an architecture fail with ENOSYS and not as the default
//!   action says, so that programs fall back to older calls; not if the default action lets calls through. x86's doubled
//!   calls do not count as named here.
//!
//! The program is one binary search over ranges of numbers for each architecture, native first. It uses only what the kernel
//! (since 5.11) can evaluate ahead of time, so that calls that are always allowed cost no BPF at all.

mod bpf;
mod cache;
mod compile;
mod default;
mod json;
mod syscalls;
mod table;
#[cfg(test)]
mod tests;

pub use cache::Cache;
pub use compile::compile;
pub use default::runtime_default;
pub use json::{Host, from_json};

pub use crate::sys::seccomp::Flags;

use crate::errchain::{Kind, Kinded};

/// An architecture, that is one table of system calls. All are little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86, the compatibility mode of x86_64.
    X86,
    /// x86_64 with 32-bit pointers: the same entry to the kernel, with a bit set in the number.
    X32,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM (EABI), the compatibility mode of aarch64.
    Arm,
}

impl Arch {
    /// The architecture this program was built for.
    #[cfg(target_arch = "x86_64")]
    pub const NATIVE: Arch = Arch::X86_64;
    /// The architecture this program was built for.
    #[cfg(target_arch = "aarch64")]
    pub const NATIVE: Arch = Arch::Aarch64;

    pub(crate) const ALL: [(&'static str, Arch); 5] = [
        ("SCMP_ARCH_X86_64", Arch::X86_64),
        ("SCMP_ARCH_X86", Arch::X86),
        ("SCMP_ARCH_X32", Arch::X32),
        ("SCMP_ARCH_AARCH64", Arch::Aarch64),
        ("SCMP_ARCH_ARM", Arch::Arm),
    ];

    /// `AUDIT_ARCH_*`, the kernel's name for it in `struct seccomp_data`.
    fn audit(self) -> u32 {
        match self {
            Arch::X86_64 | Arch::X32 => 0xc000_003e,
            Arch::X86 => 0x4000_0003,
            Arch::Aarch64 => 0xc000_00b7,
            Arch::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments are compared in all their 64 bits.
    fn is_wide(self) -> bool {
        matches!(self, Arch::X86_64 | Arch::Aarch64)
    }
}

/// What is to happen to a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The whole process dies of SIGSYS.
    KillProcess,
    /// The thread dies of SIGSYS.
    KillThread,
    /// The thread gets SIGSYS, which it may catch.
    Trap,
    /// The call fails with this error.
    Errno(u16),
    /// A tracer is told, with this number; without one the call fails with ENOSYS.
    Trace(u16),
    /// The call is made, and logged.
    Log,
    /// A process that listens on the filter decides.
    Notify,
    /// The call is made.
    Allow,
}

impl Action {
    /// What the filter returns for it: `SECCOMP_RET_*` of `linux/seccomp.h`.
    fn code(self) -> u32 {
        match self {
            Action::KillProcess => 0x8000_0000,
            Action::KillThread => 0,
            Action::Trap => 0x0003_0000,
            Action::Errno(number) => 0x0005_0000 | u32::from(number),
            Action::Notify => 0x7fc0_0000,
            Action::Trace(number) => 0x7ff0_0000 | u32::from(number),
            Action::Log => 0x7ffc_0000,
            Action::Allow => 0x7fff_0000,
        }
    }
}

/// How an argument is compared with a value, both unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// It differs.
    Ne,
    /// It is less.
    Lt,
    /// It is less or equal.
    Le,
    /// It is equal.
    Eq,
    /// It is greater or equal.
    Ge,
    /// It is greater.
    Gt,
    /// Its bits under the mask `value` are those of `value_two`.
    MaskedEq,
}

/// A condition on one argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Arg {
    /// Which argument: 0 to 5.
    pub index: u8,
    /// How it is compared.
    pub op: Op,
    /// With what; for [`Op::MaskedEq`] the mask.
    pub value: u64,
    /// For [`Op::MaskedEq`] what must be left under the mask; else unused.
    pub value_two: u64,
}

/// What happens to some calls, and when.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The calls' names.
    pub names: Vec<String>,
    /// What happens to them.
    pub action: Action,
    /// When: all of these, see the module's documentation. Empty: always.
    pub args: Vec<Arg>,
}

/// What is to happen to every system call of a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Profile {
    /// For calls that no rule is about.
    pub default_action: Action,
    /// The architectures that may be used, beside the native one.
    pub architectures: Vec<Arch>,
    /// The rules.
    pub rules: Vec<Rule>,
    /// How the filter is to be loaded.
    pub flags: Flags,
}

/// Why a profile is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The text is not JSON, or a field has another type.
    #[error("cannot parse seccomp profile")]
    Parse {
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// A field has a value that the specification does not know, or that is not supported.
    #[error("seccomp profile: {field}: invalid value {value:?}")]
    Value {
        /// The field's path: `syscalls[3].action`.
        field: String,
        /// What stands there.
        value: String,
    },
    /// Two fields that say the same thing in two ways.
    #[error("seccomp profile: {one} and {other} exclude each other")]
    Both {
        /// The first.
        one: String,
        /// The second.
        other: String,
    },
    /// An action needs a listener on the filter, which no container of ours has.
    #[error("seccomp profile: SCMP_ACT_NOTIFY is not supported")]
    Listener,
    /// A condition is about an argument that no system call has.
    #[error("seccomp profile: rule for {call}: no argument {index}")]
    Argument {
        /// The call.
        call: String,
        /// The argument's index.
        index: u8,
    },
    /// The filter is larger than the kernel takes.
    #[error("seccomp filter of {instructions} instructions is longer than {}", crate::sys::seccomp::MAX_INSTRUCTIONS)]
    TooLong {
        /// How many it would have.
        instructions: usize,
    },
}

impl Kinded for SeccompError {
    fn kind(&self) -> Kind {
        // A profile is always somebody's input, and only that can be wrong.
        Kind::InvalidArgument
    }
}
