//! Which sysctls a pod may set: those that one of its own namespaces holds (sysctl.d(5), the kernel's sysctl docs).

/// The namespace that holds a sysctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// The network namespace.
    Net,
    /// The IPC namespace.
    Ipc,
    /// The UTS namespace.
    Uts,
}

/// Why a sysctl is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SysctlError {
    /// The name has characters that no sysctl has, or a path in it (CVE-2022-0811).
    #[error("sysctl name {0:?} is not dot- or slash-separated words of [a-zA-Z0-9_-]")]
    Name(String),
    /// The value has control characters.
    #[error("value {value:?} of sysctl {name} has characters other than printable ASCII, space and tab")]
    Value {
        /// The name.
        name: String,
        /// The value.
        value: String,
    },
    /// No namespace of a pod holds it: it would change the host.
    #[error("sysctl {0} is not namespaced: it would change the node")]
    NotNamespaced(String),
}

/// Checks one sysctl and says which namespace holds it. The name is given back with dots.
pub fn parse(name: &str, value: &str) -> Result<(String, Holder), SysctlError> {
    let word = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    // As sysctl(8) does: whichever of `.` and `/` comes first separates; the other is part of a word (`eth0/100`). We take
    // no name that mixes them, which is every name that a namespace holds but those of odd interfaces.
    let separator = if name.contains('/') { '/' } else { '.' };
    if name.len() > 256 || !name.split(separator).all(word) {
        return Err(SysctlError::Name(name.chars().take(80).collect()));
    }
    let dotted = name.replace('/', ".");
    if value.len() > 4096 || !value.bytes().all(|b| (b' '..=b'~').contains(&b) || b == b'\t') {
        return Err(SysctlError::Value { name: dotted, value: value.chars().take(80).collect() });
    }
    let ipc = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let holder = if ipc.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        Holder::Ipc
    } else if dotted.starts_with("net.") {
        Holder::Net
    } else if dotted == "kernel.domainname" {
        Holder::Uts
    } else {
        return Err(SysctlError::NotNamespaced(dotted));
    };
    Ok((dotted, holder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_sysctls_pass() {
        let holder = |name: &str| parse(name, "1").map(|(_, holder)| holder);
        assert_eq!(holder("kernel.shm_rmid_forced"), Ok(Holder::Ipc));
        assert_eq!(holder("fs.mqueue.msg_max"), Ok(Holder::Ipc));
        assert_eq!(holder("net.ipv4.ip_forward"), Ok(Holder::Net));
        assert_eq!(parse("net/ipv4/ip_forward", "1").unwrap().0, "net.ipv4.ip_forward");
        for bad in ["kernel.core_pattern", "vm.swappiness", "kernel.hostname", "kernel.shm_rmid_forced.x", "fs.file-max"] {
            assert_eq!(holder(bad), Err(SysctlError::NotNamespaced(bad.to_string())), "{bad}");
        }
        for bad in ["", "net.ipv4.x+kernel.core_pattern=y", "net..x", "net.ipv4/../../kernel", "net ipv4", "net.\n"] {
            assert!(matches!(holder(bad), Err(SysctlError::Name(_))), "{bad:?}");
        }
        assert!(matches!(parse("net.ipv4.x", "1\n2"), Err(SysctlError::Value { .. })));
    }
}
