//! bpf(2), as far as the device filter of cgroup v2 needs it: load a program, attach it to a group, find and detach it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Insn {
    /// Operation.
    pub code: u8,
    /// Destination register in the low four bits, source register in the high four.
    pub regs: u8,
    /// Offset of a jump or of a load.
    pub off: i16,
    /// Immediate operand.
    pub imm: i32,
}

const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const PROG_GET_FD_BY_ID: i32 = 13;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 2;

/// Programs asked for when those attached to one group are listed: the kernel's own limit.
const MAX_PROGRAMS: usize = 64;

/// `union bpf_attr`: fields at offsets that depend on the command. Kernels write answers behind the size that they were
/// told (`query.revision`, since 6.17), so every command gets the whole of it.
#[repr(C, align(8))]
struct Attr([u8; 128]);

impl Attr {
    fn new() -> Self {
        Self([0; 128])
    }
    fn bytes(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
    fn u32(self, at: usize, value: u32) -> Self {
        self.bytes(at, &value.to_ne_bytes())
    }
    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(at, fd.as_raw_fd() as u32)
    }
    fn pointer<T>(self, at: usize, pointer: *const T) -> Self {
        self.bytes(at, &(pointer as u64).to_ne_bytes())
    }
    fn get(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
}

/// # Safety
/// Every pointer in `attr` must be valid for what `command` reads or writes there.
unsafe fn bpf(command: i32, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: `attr` is a zero-padded bpf_attr of the size given; the pointers in it are the caller's promise.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>()) } {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n as i32),
    }
}

/// Loads a program of the type BPF_PROG_TYPE_CGROUP_DEVICE. `name` is cut to 15 bytes; it is how the program is known
/// again ([`program_name`]). EINVAL or EACCES: the kernel's verifier refuses it.
pub fn load_device_filter(name: &str, program: &[Insn]) -> io::Result<OwnedFd> {
    let count = u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut attr = Attr::new()
        .u32(0, PROG_TYPE_CGROUP_DEVICE)
        .u32(4, count)
        .pointer(8, program.as_ptr())
        .pointer(16, c"Apache-2.0".as_ptr())
        .bytes(48, &name.as_bytes()[..name.len().min(15)]);
    // BPF_PROG_LOAD gives up with EAGAIN when a signal interrupts the verifier.
    loop {
        // SAFETY: the instructions and the licence outlive the call, and the count is theirs.
        match unsafe { bpf(PROG_LOAD, &mut attr) } {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            // SAFETY: the kernel has just made this descriptor for us (close-on-exec, as all of bpf(2)'s are).
            result => return result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
        }
    }
}

/// Attaches a device filter to a group beside those that are there (BPF_F_ALLOW_MULTI): all of them must allow.
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Attr::new().fd(0, cgroup).fd(4, program).u32(8, CGROUP_DEVICE).u32(12, F_ALLOW_MULTI);
    // SAFETY: the command takes no pointer.
    unsafe { bpf(PROG_ATTACH, &mut attr) }.map(drop)
}

/// Detaches a device filter from a group.
pub fn detach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Attr::new().fd(0, cgroup).fd(4, program).u32(8, CGROUP_DEVICE);
    // SAFETY: the command takes no pointer.
    unsafe { bpf(PROG_DETACH, &mut attr) }.map(drop)
}

/// The ids of the device filters attached to a group itself, not to those above it.
pub fn device_filters(cgroup: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; MAX_PROGRAMS];
    let mut attr = Attr::new().fd(0, cgroup).u32(4, CGROUP_DEVICE).pointer(16, ids.as_mut_ptr()).u32(24, MAX_PROGRAMS as u32);
    // SAFETY: `ids` outlives the call and has room for the number of ids given.
    unsafe { bpf(PROG_QUERY, &mut attr) }?;
    Ok(ids[..(attr.get(24) as usize).min(MAX_PROGRAMS)].to_vec())
}

/// A program by its id.
pub fn program(id: u32) -> io::Result<OwnedFd> {
    let mut attr = Attr::new().u32(0, id);
    // SAFETY: the command takes no pointer.
    let fd = unsafe { bpf(PROG_GET_FD_BY_ID, &mut attr) }?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The name that a program was loaded with.
pub fn program_name(program: BorrowedFd<'_>) -> io::Result<String> {
    /// `struct bpf_prog_info` up to `name`, which stands at byte 64.
    #[repr(C, align(8))]
    struct Info([u8; 80]);
    let mut info = Info([0; 80]);
    let mut attr = Attr::new().fd(0, program).u32(4, size_of::<Info>() as u32).pointer(8, std::ptr::from_mut(&mut info));
    // SAFETY: `info` outlives the call and has the size given; the lengths of the arrays that it could point to are zero.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let name = &info.0[64..];
    Ok(String::from_utf8_lossy(name.split(|&b| b == 0).next().unwrap_or_default()).into_owned())
}
