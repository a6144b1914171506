//! The default filter in the kernel: on a thread of its own, since a filter stays.

use std::io;

use rustix::net::{AddressFamily, SocketType};

use super::super::{Arch, Flags, compile, runtime_default};
use crate::sys;

#[test]
fn the_kernel_takes_the_default_filter() {
    let filter = compile(&runtime_default(0, Arch::NATIVE, (6, 1)), Arch::NATIVE).unwrap();
    let confined = move || {
        // Without it, only root may load a filter.
        rustix::thread::set_no_new_privs(true).unwrap();
        sys::seccomp::load(&filter, Flags::default()).unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
        let socket = |family| rustix::net::socket(family, SocketType::DGRAM, None);
        assert!(socket(AddressFamily::UNIX).is_ok() && socket(AddressFamily::INET).is_ok());
        // AF_ALG, AF_VSOCK, and one that does not exist: all the same.
        for family in [38, 40, 300] {
            assert_eq!(socket(AddressFamily::from_raw(family)).unwrap_err(), rustix::io::Errno::PERM, "{family}");
        }
        let fsopen = rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC);
        assert_eq!(fsopen.unwrap_err(), rustix::io::Errno::PERM);
        // clone3 fails with ENOSYS, and the C library goes on with clone.
        std::thread::spawn(|| std::fs::read("/proc/self/comm").map(|_| ())).join().unwrap()
    };
    let result: io::Result<()> = std::thread::spawn(confined).join().unwrap();
    result.unwrap();
}
