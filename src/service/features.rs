//! What this node can do: tried out once, at the start, on this kernel and on the filesystem that images are on.
//!
//! The daemon itself changes no namespace and mounts nothing, so that the monitor's program does it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::errchain::Chain;
use crate::monitor_api::probe;
use crate::store::{make_dir, remove_all};
use crate::sys;

/// What a runtime handler offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// Mounts that are read-only with everything below them.
    pub recursive_read_only_mounts: bool,
    /// Pods with a user namespace of their own.
    pub user_namespaces: bool,
}

/// How long it may take: a few mounts.
const WITHIN: Duration = Duration::from_secs(30);

/// Tries them out, in a directory of its own below the root directory. What can't be tried out is not offered.
pub(super) async fn probe(program: &Path, root: &Path) -> Features {
    let dir = root.join("probe");
    let prepared = remove_all(&dir).and_then(|()| make_dir(&dir));
    if let Err(error) = prepared {
        tracing::warn!(error = %Chain(&error), "what this node can do can't be tried out");
        return Features::default();
    }
    let mut command = sys::process::command(program);
    command.arg(probe::ARGUMENT).arg(&dir).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let run = tokio::process::Command::from(command).kill_on_drop(true).output();
    let features = match tokio::time::timeout(WITHIN, run).await {
        Ok(Ok(output)) => read(&String::from_utf8_lossy(&output.stdout)),
        Ok(Err(error)) => {
            tracing::warn!(program = %program.display(), %error, "what this node can do can't be tried out");
            Features::default()
        }
        Err(_) => {
            tracing::warn!(after = ?WITHIN, "what this node can do could not be tried out in time");
            Features::default()
        }
    };
    if let Err(error) = remove_all(&dir) {
        tracing::warn!(error = %Chain(&error), "files for trying out what this node can do stay");
    }
    features
}

/// Reads what the program says, one feature a line: its name, `yes` or why not.
fn read(text: &str) -> Features {
    let has = |name: &str| {
        let said = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        if said != Some(probe::YES) {
            tracing::warn!(feature = name, why = said.unwrap_or("the probe said nothing of it"), "this node lacks a feature");
        }
        said == Some(probe::YES)
    };
    Features { recursive_read_only_mounts: has(probe::RECURSIVE_READ_ONLY_MOUNTS), user_namespaces: has(probe::USER_NAMESPACES) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_is_one() {
        let check = |text: &str, recursive_read_only_mounts, user_namespaces| {
            assert_eq!(read(text), Features { recursive_read_only_mounts, user_namespaces }, "{text:?}");
        };
        check("", false, false);
        check("recursive-read-only-mounts yes\nuser-namespaces yes\n", true, true);
        check("user-namespaces cannot make a user namespace: No space left on device\nrecursive-read-only-mounts yes\n", true, false);
        check("user-namespaces-not yes\nrecursive-read-only-mountsyes\n", false, false);
        check("user-namespaces yes, perhaps", false, false);
    }
}
