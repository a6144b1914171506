//! What only /proc knows of a container's processes. Nothing here reads what a process could make hang (its memory map).

use std::fs;

/// Processes that are looked into, and descriptors whose kind is asked for: of a container with more, the figures are of the
/// first.
const MAX_PROCESSES: usize = 1024;
const MAX_DESCRIPTORS: u64 = 16_384;

/// Figures over all processes of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) threads: u64,
    pub(super) descriptors: u64,
    pub(super) sockets: u64,
    /// RLIMIT_NOFILE of the first process. `None`: it has gone.
    pub(super) max_open_files: Option<u64>,
}

/// Reads them. `init` is the container's first process. What ends meanwhile doesn't count.
pub(super) fn read(pids: &[u32], init: u32) -> Processes {
    let mut found = Processes::default();
    for pid in pids.iter().take(MAX_PROCESSES) {
        // Of a directory two links are its own.
        let tasks = rustix::fs::stat(format!("/proc/{pid}/task")).map_or(0, |stat| u64::from(stat.st_nlink as u32).saturating_sub(2));
        found.threads += tasks;
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in entries.flatten() {
            found.descriptors += 1;
            if found.descriptors <= MAX_DESCRIPTORS
                && fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
            {
                found.sockets += 1;
            }
        }
    }
    // Its number may be somebody else's by now.
    if pids.contains(&init) {
        found.max_open_files = fs::read_to_string(format!("/proc/{init}/limits")).ok().and_then(|text| max_open_files(&text));
    }
    found
}

/// From lines like `Max open files            1024                 524288               files`.
fn max_open_files(text: &str) -> Option<u64> {
    let soft = text.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_counted() {
        let (_socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let own = std::process::id();
        let found = read(&[own, u32::MAX], own);
        assert!(found.threads >= 1 && found.descriptors >= 5 && found.sockets >= 2, "{found:?}");
        assert!(found.max_open_files.is_some_and(|limit| limit > 0));
        assert_eq!(read(&[], own), Processes::default());
    }

    #[test]
    fn limits_are_parsed() {
        let head = "Limit                     Soft Limit           Hard Limit           Units     \n";
        let line = |soft: &str| format!("{head}Max open files            {soft}                 524288               files     \n");
        assert_eq!(max_open_files(&line("1024")), Some(1024));
        assert_eq!(max_open_files(&line("unlimited")), Some(u64::MAX));
        assert_eq!(max_open_files(head), None);
    }
}
