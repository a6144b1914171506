//! What a process may do: users and groups, capabilities, resource limits, the session keyring.
//!
//! Every call changes the calling thread alone; only single-threaded forked children use them.

use std::io;

use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Capability sets of a thread as bit masks (capabilities(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sets {
    /// Permitted.
    pub permitted: u64,
    /// Effective.
    pub effective: u64,
    /// Inheritable.
    pub inheritable: u64,
}

/// CAP_SYS_ADMIN as a bit.
pub const SYS_ADMIN: u64 = 1 << 21;
/// CAP_KILL as a bit.
pub const KILL: u64 = 1 << 5;

/// The sets of this thread.
pub fn capabilities() -> io::Result<Sets> {
    let sets = rustix::thread::capabilities(None)?;
    Ok(Sets { permitted: sets.permitted.bits(), effective: sets.effective.bits(), inheritable: sets.inheritable.bits() })
}

/// Sets the three sets at once.
pub fn set_capabilities(sets: Sets) -> io::Result<()> {
    let set = CapabilitySet::from_bits_retain;
    let sets = CapabilitySets { permitted: set(sets.permitted), effective: set(sets.effective), inheritable: set(sets.inheritable) };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// One operation of prctl(2) that takes integers only.
fn prctl(option: i32, a: u64, b: u64) -> io::Result<i32> {
    // SAFETY: the options used in this module take integers, no pointers.
    match unsafe { libc::prctl(option, a, b, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// The bounding set. Ends at the last capability that the kernel knows.
pub fn bounding() -> u64 {
    let bits = (0..64).map_while(|bit| prctl(libc::PR_CAPBSET_READ, bit, 0).ok().map(|set| if set == 1 { 1 << bit } else { 0 }));
    bits.fold(0, |set, bit: u64| set | bit)
}

/// Drops from the bounding set all that is not in `keep`. Needs CAP_SETPCAP.
pub fn drop_bounding(keep: u64) -> io::Result<()> {
    for bit in (0..64).filter(|bit| keep & (1 << bit) == 0) {
        match prctl(libc::PR_CAPBSET_DROP, bit, 0) {
            // The last one that the kernel knows was before this one.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            done => done.map(drop)?,
        }
    }
    Ok(())
}

/// Makes the ambient set exactly `set`, which must be within the permitted and the inheritable ones.
pub fn set_ambient(set: u64) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)?;
    (0..64).filter(|bit| set & (1 << bit) != 0).try_for_each(|bit| prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, bit).map(drop))
}

/// Permitted capabilities stay when the user changes from root to another (until execve).
pub fn keep_capabilities() -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1, 0).map(drop)
}

/// PR_SET_NO_NEW_PRIVS.
pub fn set_no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
}

/// Becomes a user: supplemental groups, then group, then user, real, effective and saved.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    let groups: Vec<Gid> = groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
    rustix::thread::set_thread_groups(&groups)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}

/// Does something as another effective user, and comes back. The process may be dumpable afterwards.
pub fn with_effective_user<T>(uid: u32, act: impl FnOnce() -> T) -> io::Result<T> {
    let (own, other) = (rustix::process::geteuid(), Uid::from_raw(uid));
    rustix::thread::set_thread_res_uid(own, other, own)?;
    let done = act();
    rustix::thread::set_thread_res_uid(own, own, own)?;
    Ok(done)
}

/// A resource limit: soft, hard; u64::MAX is none (getrlimit(2)).
pub fn limit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit64 for the kernel to fill; pid 0 is this process.
    match unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::null::<libc::rlimit64>(), &raw mut limit) } {
        0 => Ok((limit.rlim_cur, limit.rlim_max)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets a resource limit.
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is a valid rlimit64 that the kernel only reads; pid 0 is this process.
    match unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const limit, std::ptr::null_mut::<libc::rlimit64>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Leaves the session keyring for a new, empty one (keyctl(2)).
pub fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    match unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
