//! Points at which a test can have the daemon killed: before a monitor call, when it is sent, when it is answered; and
//! when UpdateContainerResources, which calls no monitor, is on record, and when it is applied.
//!
//! `COPEPOD_FAULT=sent:CreateContainer` in the daemon's environment kills it with SIGKILL at that point; `…:2` at the
//! second time. Without the variable a point costs one comparison.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Signal, getpid, kill_process};

/// The variable.
pub const VARIABLE: &str = "COPEPOD_FAULT";
/// What a point's name starts with.
pub const MOMENTS: [&str; 3] = ["before", "sent", "answered"];

static ARMED: OnceLock<Option<(String, AtomicU32)>> = OnceLock::new();

/// Ends the process here if a test asked for it.
pub fn point(moment: &str, call: &str) {
    let armed = ARMED.get_or_init(|| {
        let value = std::env::var(VARIABLE).ok()?;
        let mut parts = value.splitn(3, ':');
        let name = format!("{}:{}", parts.next()?, parts.next()?);
        let times = parts.next().and_then(|n| n.parse().ok()).unwrap_or(1);
        Some((name, AtomicU32::new(times)))
    });
    let Some((name, left)) = armed else { return };
    if name.strip_prefix(moment).and_then(|rest| rest.strip_prefix(':')) == Some(call) && left.fetch_sub(1, Ordering::Relaxed) == 1 {
        let _ = kill_process(getpid(), Signal::KILL);
        // The signal is on its way: nothing more may happen.
        std::thread::park();
    }
}
