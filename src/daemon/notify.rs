//! What the service manager is told: that the daemon serves, that it is well, that it ends (sd_notify(3)).
//!
//! A datagram to the socket that `NOTIFY_SOCKET` names; without it nobody asked. Well means that the CRI answers on its own
//! socket, as it would answer kubelet: a daemon that only lives is ended by the watchdog, and its pods don't notice.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use crate::api;
use crate::api::runtime_service_client::RuntimeServiceClient;

/// The service manager's socket, if there is one.
#[derive(Debug)]
pub struct Notify {
    socket: Option<UnixDatagram>,
}

impl Notify {
    /// As the environment says. A socket that can't be reached is reported, and the daemon runs without.
    pub fn from_env() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Self { socket: None } };
        let socket = connect(&path).inspect_err(|error| tracing::warn!(?path, %error, "the service manager can't be told")).ok();
        Self { socket }
    }

    /// Says something, such as `READY=1`.
    pub fn tell(&self, state: &str) {
        if let Some(Err(error)) = self.socket.as_ref().map(|socket| socket.send(state.as_bytes())) {
            tracing::warn!(state, %error, "the service manager can't be told");
        }
    }
}

/// Asks the CRI for its status as often as the service manager wants to hear that all is well, and says so when it answers. Returns
/// at once where there is no watchdog.
pub async fn watchdog(notify: &Notify, listen: &Path) {
    let Some(span) = watchdog_span(std::env::var("WATCHDOG_USEC").ok().as_deref(), std::env::var("WATCHDOG_PID").ok().as_deref()) else { return };
    if notify.socket.is_none() {
        return;
    }
    let pause = span / 3;
    let mut client = RuntimeServiceClient::new(crate::client::lazy(listen));
    loop {
        match tokio::time::timeout(pause, client.status(api::StatusRequest::default())).await {
            Ok(Ok(_)) => notify.tell("WATCHDOG=1"),
            Ok(Err(error)) => tracing::error!(%error, "the CRI does not answer its own probe"),
            Err(_) => tracing::error!(seconds = pause.as_secs(), "the CRI has not answered its own probe in time"),
        }
        tokio::time::sleep(pause).await;
    }
}

/// The time within which the service manager wants to hear from this process (sd_watchdog_enabled(3)).
fn watchdog_span(usec: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    let for_us = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let usec: u64 = usec?.parse().ok()?;
    (for_us && usec > 0).then(|| Duration::from_micros(usec))
}

fn connect(path: &std::ffi::OsStr) -> std::io::Result<UnixDatagram> {
    use std::os::unix::ffi::OsStrExt;
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // Whoever does not read is not waited for.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_for_the_process_that_is_named() {
        let own = std::process::id().to_string();
        let check = |usec, pid, want: Option<u64>| assert_eq!(watchdog_span(usec, pid), want.map(Duration::from_secs), "{usec:?} {pid:?}");
        check(None, None, None);
        check(Some("30000000"), None, Some(30));
        check(Some("30000000"), Some(own.as_str()), Some(30));
        check(Some("30000000"), Some("1"), None);
        check(Some("30000000"), Some(""), None);
        check(Some("0"), None, None);
        check(Some("soon"), None, None);
    }

    #[test]
    fn states_are_datagrams() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notify = Notify { socket: Some(connect(path.as_os_str()).unwrap()) };
        notify.tell("READY=1");
        let mut bytes = [0; 64];
        let n = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..n], b"READY=1");

        let name = format!("copepod-notify-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notify { socket: Some(connect(format!("@{name}").as_ref()).unwrap()) }.tell("STOPPING=1");
        let n = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..n], b"STOPPING=1");
    }
}
