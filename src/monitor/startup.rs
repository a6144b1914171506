//! From a started program to a monitor: alone in its session, deaf to the terminal's signals, reachable by its socket.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::errchain::Remote;
use crate::monitor::clients::Clients;
use crate::monitor::pod::{Place, Pod};
use crate::monitor::runtime;
use crate::monitor_api::SOCKET;
use crate::sys::{fd, process};

/// Why there is no monitor.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The command line.
    #[error("usage: copepod-monitor --pod-dir DIR [--cgroup PATH], with a connected socket as descriptor 0: {0}")]
    Usage(String),
    /// Descriptor 0.
    #[error("cannot take descriptor 0")]
    Stdin(#[source] io::Error),
    /// What a process is to itself: session, signals, dumpable.
    #[error("cannot {what}")]
    Process {
        /// What could not be done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The pod's directory.
    #[error("cannot open pod directory {path:?}")]
    PodDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket in it.
    #[error("cannot listen on {path:?}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The monitors' control group, or finding the hierarchies.
    #[error("cannot use control groups")]
    Cgroup(#[source] Remote),
}

/// Makes this process the monitor of a pod.
pub fn start(args: impl Iterator<Item = OsString>) -> Result<Pod, StartError> {
    let (dir, cgroup) = parse(args)?;
    // Before anything else that execve would undo.
    let shielded = crate::oci::own_program::shield();
    shielded.map_err(|source| StartError::Process { what: "run from a read-only mount of this program", source })?;
    let first = process::take_stdin().map_err(StartError::Stdin)?;
    process::set_name(c"copepod-monitor");
    let done = |what, result: io::Result<()>| result.map_err(|source| StartError::Process { what, source });
    done("become undumpable", process::set_dumpable(false))?;
    // It fails where the process leads its group, which only means that there is nothing to leave.
    let _ = rustix::process::setsid();
    done("change to /", rustix::process::chdir("/").map_err(io::Error::from))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let children = process::signalfd(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
        .map_err(|source| StartError::Process { what: "wait for signals", source })?;
    let hierarchy = runtime::hierarchy().map_err(StartError::Cgroup)?;
    if let Some(path) = cgroup {
        runtime::enter(&hierarchy, &path).map_err(StartError::Cgroup)?;
    }
    let place = rustix::fs::open(&dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| StartError::PodDir { path: dir.clone(), source: error.into() })?;
    let listener = listen(&place).map_err(|source| StartError::Listen { path: dir.join(SOCKET), source })?;
    let mut clients = Clients::new(Some(listener));
    clients.add(first).map_err(StartError::Stdin)?;
    Ok(Pod::new(clients, Place { dir: place, children }, hierarchy))
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Result<(PathBuf, Option<String>), StartError> {
    let (mut dir, mut cgroup) = (None, None);
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| StartError::Usage(format!("{name:?} has no value")))?;
        match name.to_str() {
            Some("--pod-dir") => dir = Some(PathBuf::from(value)),
            Some("--cgroup") => cgroup = Some(value.into_string().map_err(|v| StartError::Usage(format!("{v:?} is not UTF-8")))?),
            _ => return Err(StartError::Usage(format!("{name:?} is not known"))),
        }
    }
    Ok((dir.ok_or_else(|| StartError::Usage("--pod-dir is missing".into()))?, cgroup))
}

/// A listening socket in the pod's directory, root's alone. Bound through /proc/self/fd: a socket's address has 108 bytes.
fn listen(dir: &OwnedFd) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    match rustix::fs::unlinkat(dir, SOCKET, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let address = SocketAddrUnix::new(format!("{}/{SOCKET}", fd::proc_path(dir.as_fd())))?;
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = rustix::net::bind(&socket, &address);
    rustix::process::umask(before);
    bound?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_parsed() {
        let check = |args: &[&str], want: Option<(&str, Option<&str>)>| {
            let got = parse(args.iter().map(OsString::from)).ok();
            assert_eq!(got, want.map(|(dir, cgroup)| (dir.into(), cgroup.map(str::to_string))), "{args:?}");
        };
        check(&["--pod-dir", "/run/p"], Some(("/run/p", None)));
        check(&["--cgroup", "/m", "--pod-dir", "/run/p"], Some(("/run/p", Some("/m"))));
        check(&["--pod-dir"], None);
        check(&["--cgroup", "/m"], None);
        check(&["--pod-dir", "/run/p", "--other", "x"], None);
    }
}
