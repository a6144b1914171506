//! Descriptors: sealed memfds, and packets with descriptors over Unix sockets.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType,
};

/// A memfd that holds `bytes` and can never change again.
pub fn sealed_memfd(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Reads a memfd that another process sealed. One that is not sealed against writing, or larger than `limit`, is refused:
/// its sender could change it while it is read.
pub fn read_sealed(fd: OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    let seals = rustix::fs::fcntl_get_seals(&fd)?;
    if !seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "memfd is not sealed"));
    }
    let size = rustix::fs::fstat(&fd)?.st_size as u64;
    if size > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("memfd of {size} bytes is larger than {limit}")));
    }
    rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(0))?;
    let mut bytes = Vec::with_capacity(size as usize);
    File::from(fd).take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Like [`read_sealed`] for a memfd that is kept, and that several processes may read at once: the descriptor's position
/// is neither used nor moved.
pub fn read_sealed_again(fd: BorrowedFd<'_>, limit: u64) -> io::Result<Vec<u8>> {
    let seals = rustix::fs::fcntl_get_seals(fd)?;
    let size = rustix::fs::fstat(fd)?.st_size as u64;
    if !seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK) || size > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("memfd of {size} bytes is not sealed, or larger than {limit}")));
    }
    let mut bytes = vec![0; size as usize];
    let mut at = 0;
    while at < bytes.len() {
        match rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut bytes[at..], at as u64))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => at += n,
        }
    }
    Ok(bytes)
}

/// A connected pair of SOCK_SEQPACKET sockets.
pub fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one packet with descriptors beside it. SIGPIPE is never raised.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, bytes, fds, SendFlags::NOSIGNAL)
}

/// Like [`send`], but answers `WouldBlock` where the peer does not keep up.
pub fn try_send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, bytes, fds, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

fn send_with(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one packet"));
    }
    let sent = rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags))?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one packet of at most `limit` bytes. `None`: the peer has closed. A packet or a control message that does not
/// fit is an error. Answers `WouldBlock` on a non-blocking socket that has nothing.
pub fn receive(socket: BorrowedFd<'_>, limit: usize) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    // Asked for its size first, so that a monitor at rest never has dirtied a buffer of `limit` bytes.
    let (_, size) = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut [0u8; 0][..], RecvFlags::PEEK | RecvFlags::TRUNC))?;
    if size > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("packet of {size} bytes is larger than {limit}")));
    }
    let mut bytes = vec![0; size];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        rustix::io::retry_on_intr(|| rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        })
        .collect();
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet or its descriptors were cut"));
    }
    if message.bytes == 0 && fds.is_empty() {
        return Ok(None);
    }
    bytes.truncate(message.bytes);
    Ok(Some((bytes, fds)))
}

/// The process at the other end of a Unix socket is root and in our PID namespace.
pub fn peer_is_root(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let peer = rustix::net::sockopt::socket_peercred(socket)?;
    Ok(peer.uid.is_root() && peer.pid.as_raw_nonzero().get() > 0)
}

/// Non-blocking from now on.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

/// The path by which the kernel names a descriptor of this process; a way round the 108 bytes of a socket's address.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_carry_descriptors() {
        let (a, b) = seqpacket_pair().unwrap();
        let memfd = sealed_memfd("plan", b"hello").unwrap();
        send(a.as_fd(), b"x", &[memfd.as_fd()]).unwrap();
        let (bytes, mut fds) = receive(b.as_fd(), 16).unwrap().unwrap();
        assert_eq!(bytes, b"x");
        assert_eq!(read_sealed(fds.pop().unwrap(), 100).unwrap(), b"hello");
        drop(a);
        assert!(receive(b.as_fd(), 16).unwrap().is_none());
    }

    #[test]
    fn an_unsealed_or_large_memfd_is_refused() {
        let open = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(read_sealed(open, 100).is_err());
        assert!(read_sealed(sealed_memfd("large", &[0; 101]).unwrap(), 100).is_err());
    }

    #[test]
    fn a_cut_packet_is_an_error() {
        let (a, b) = seqpacket_pair().unwrap();
        send(a.as_fd(), &[0; 64], &[]).unwrap();
        assert!(receive(b.as_fd(), 16).is_err());
    }
}
