//! Counters of a pod's interfaces, as the CRI's NetworkInterfaceUsage wants them.
//!
//! Read from /proc/thread-self/net/dev on a scratch thread that enters the namespace and ends: a thread of tokio's that had entered
//! one could run anything next.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::netns::{self, NetnsError};
use crate::sys;

/// How long the thread may take: all it does is in memory, but for opening the pin.
const LIMIT: Duration = Duration::from_secs(10);

/// What went through one interface since it was made, seen from the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Errors in receiving.
    pub rx_errors: u64,
    /// Packets that came and were dropped.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Errors in sending.
    pub tx_errors: u64,
    /// Packets that were to be sent and were dropped.
    pub tx_dropped: u64,
}

/// All interfaces of the namespace pinned at a path, `lo` among them, in the kernel's order.
pub async fn interfaces(path: PathBuf) -> Result<Vec<Interface>, NetnsError> {
    let timed_out = NetnsError { what: WHAT, path: path.clone(), source: io::ErrorKind::TimedOut.into() };
    match tokio::time::timeout(LIMIT, interfaces_of(vec![path])).await {
        Ok(mut found) => found.pop().unwrap_or(Err(timed_out)),
        Err(_) => Err(timed_out),
    }
}

/// The interfaces of many namespaces, one answer for each path, read one after the other on one thread.
pub async fn interfaces_of(paths: Vec<PathBuf>) -> Vec<Result<Vec<Interface>, NetnsError>> {
    let (send, receive) = tokio::sync::oneshot::channel();
    let asked = paths.clone();
    let started = sys::netns::scratch("netns-stats", move || {
        let _ = send.send(asked.iter().map(|path| read(path)).collect::<Vec<_>>());
    });
    let failure = match started {
        Ok(()) => match receive.await {
            Ok(found) => return found,
            Err(_) => io::ErrorKind::BrokenPipe,
        },
        Err(error) => error.kind(),
    };
    paths.into_iter().map(|path| Err(NetnsError { what: WHAT, path, source: failure.into() })).collect()
}

const WHAT: &str = "read the interfaces of";

/// On the scratch thread.
fn read(path: &Path) -> Result<Vec<Interface>, NetnsError> {
    let read = || -> io::Result<Vec<Interface>> {
        sys::netns::enter(netns::open(path)?.as_fd())?;
        parse(&std::fs::read_to_string("/proc/thread-self/net/dev")?)
    };
    read().map_err(|source| NetnsError { what: WHAT, path: path.to_path_buf(), source })
}

/// Two lines of headings, then `  eth0: ` and sixteen numbers (proc_pid_net(5)).
fn parse(text: &str) -> io::Result<Vec<Interface>> {
    let line = |line: &str| {
        let (name, numbers) = line.rsplit_once(':')?;
        let n: Vec<u64> = numbers.split_ascii_whitespace().map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = n[..] else { return None };
        let name = name.trim().to_string();
        Some(Interface { name, rx_bytes, rx_packets, rx_errors, rx_dropped, tx_bytes, tx_packets, tx_errors, tx_dropped })
    };
    text.lines().skip(2).map(|l| line(l).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("line {l:?} of net/dev")))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "Inter-|   Receive                                                |  Transmit\n \
        face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n";

    #[test]
    fn net_dev() {
        let text = format!(
            "{HEAD}    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0\n  \
            eth0: 11 12 13 14 15 16 17 18 21 22 23 24 25 26 27 28\neth0.7:1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
        );
        let found = parse(&text).unwrap();
        assert_eq!(found.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["lo", "eth0", "eth0.7"]);
        let eth0 = Interface {
            name: "eth0".into(),
            rx_bytes: 11,
            rx_packets: 12,
            rx_errors: 13,
            rx_dropped: 14,
            tx_bytes: 21,
            tx_packets: 22,
            tx_errors: 23,
            tx_dropped: 24,
        };
        assert_eq!(found[1], eth0);
        assert_eq!(parse(HEAD).unwrap(), []);
        for rubbish in ["eth0 1 2 3", "eth0: 1 2 3", "eth0: a 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"] {
            assert!(parse(&format!("{HEAD}{rubbish}\n")).is_err(), "{rubbish}");
        }
    }

    #[test]
    fn the_kernels_own() {
        let found = parse(&std::fs::read_to_string("/proc/self/net/dev").unwrap()).unwrap();
        assert!(found.iter().any(|interface| interface.name == "lo"));
    }
}
