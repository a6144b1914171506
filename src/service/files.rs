//! The files of a pod that its containers see: /etc/resolv.conf, /etc/hostname, /etc/hosts.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::ServiceError;
use crate::model::sandbox::{NamespaceMode, SandboxSpec};
use crate::store::record::SandboxRecord;
use crate::store::replace;

const RESOLV_CONF: &str = "resolv.conf";
const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
/// Bytes of a file of the host's that is copied.
const MAX_COPY: u64 = 1 << 20;

/// The node's host name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Writes what is known before the network is.
pub fn write_pod_files(dir: &Path, spec: &SandboxSpec) -> Result<(), ServiceError> {
    let resolv = match spec.dns.resolv_conf() {
        Some(text) => text.into_bytes(),
        None => copy_of("/etc/resolv.conf")?,
    };
    write(dir, spec, RESOLV_CONF, &resolv)?;
    write(dir, spec, HOSTNAME, format!("{}\n", spec.hostname).as_bytes())
}

/// Writes the hosts file; the node's own for a pod on its network.
pub fn write_hosts(dir: &Path, record: &SandboxRecord) -> Result<(), ServiceError> {
    if record.spec.namespaces.network == NamespaceMode::Node {
        return write(dir, &record.spec, HOSTS, &copy_of("/etc/hosts")?);
    }
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in &record.ips {
        text.push_str(&format!("{ip}\t{}\n", record.spec.hostname));
    }
    write(dir, &record.spec, HOSTS, text.as_bytes())
}

/// Where they go in a container, and where they are.
pub fn pod_files(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    [RESOLV_CONF, HOSTNAME, HOSTS].iter().map(|name| (Path::new("/etc").join(name), dir.join(name))).collect()
}

/// They belong to the containers' root.
fn write(dir: &Path, spec: &SandboxSpec, name: &str, bytes: &[u8]) -> Result<(), ServiceError> {
    let path = dir.join(name);
    replace(&path, bytes, 0o644).map_err(ServiceError::Store)?;
    own(&path, spec)
}

/// Gives a file of the host's to the root of the pod's containers.
pub fn own(path: &Path, spec: &SandboxSpec) -> Result<(), ServiceError> {
    match spec.namespaces.user.root() {
        0 => Ok(()),
        root => std::os::unix::fs::chown(path, Some(root), Some(root)).map_err(|source| ServiceError::Host {
            what: "give to the pod's root",
            path: path.into(),
            source,
        }),
    }
}

/// A file of the host's; empty where there is none.
fn copy_of(path: &str) -> Result<Vec<u8>, ServiceError> {
    let mut bytes = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(MAX_COPY).read_to_end(&mut bytes)) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(ServiceError::Host { what: "read", path: path.into(), source }),
        _ => Ok(bytes),
    }
}
