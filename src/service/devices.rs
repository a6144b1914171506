//! Devices of the host that a container gets: those it asks for, and all of them if it is privileged.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::ServiceError;
use crate::errchain::Kind;
use crate::model::container::ContainerSpec;
use crate::plan::DeviceNode;

/// Directories and files of /dev that are the container's own (its pseudo terminals, shared memory, message queues).
const OWN: [&str; 8] = ["pts", "shm", "fd", "mqueue", "console", "ptmx", "core", "initctl"];
/// A directory tree of devices deeper than this is no such tree.
const MAX_DEPTH: usize = 8;

/// The nodes, and what the container may do with each (any of `r`, `w`, `m`).
pub fn of(spec: &ContainerSpec) -> Result<Vec<(DeviceNode, String)>, ServiceError> {
    let mut nodes = Vec::new();
    if spec.security.privileged {
        collect(Path::new("/dev"), Path::new("/dev"), "rwm", 0, &mut nodes)?;
    }
    for device in &spec.devices {
        let bad = |value: String, reason| ServiceError::Field { field: "devices", value, reason, kind: Kind::InvalidArgument };
        let access = &device.permissions;
        if access.is_empty() || !access.bytes().all(|b| b"rwm".contains(&b)) {
            return Err(bad(access.clone(), "is not made of r, w and m"));
        }
        if !device.container_path.is_absolute() {
            return Err(bad(device.container_path.display().to_string(), "is not an absolute path"));
        }
        let before = nodes.len();
        collect(&device.host_path, &device.container_path, access, 0, &mut nodes)?;
        if nodes.len() == before {
            return Err(bad(device.host_path.display().to_string(), "is no device and holds none"));
        }
    }
    Ok(nodes)
}

fn collect(host: &Path, inside: &Path, access: &str, depth: usize, nodes: &mut Vec<(DeviceNode, String)>) -> Result<(), ServiceError> {
    let failed = |source| ServiceError::Host { what: "look at device", path: host.into(), source };
    // A device that is named may be a link (/dev/disk/by-id/…); below a directory links are left alone.
    let meta = if depth == 0 { fs::metadata(host) } else { fs::symlink_metadata(host) }.map_err(failed)?;
    let kind = meta.file_type();
    if kind.is_dir() && depth < MAX_DEPTH {
        for entry in fs::read_dir(host).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if host == Path::new("/dev") && OWN.iter().any(|own| name == *own) {
                continue;
            }
            collect(&host.join(&name), &inside.join(&name), access, depth + 1, nodes)?;
        }
    } else if kind.is_char_device() || kind.is_block_device() {
        let letter = if kind.is_char_device() { b'c' } else { b'b' };
        let node = DeviceNode {
            path: inside.into(),
            kind: letter.into(),
            major: rustix::fs::major(meta.rdev()),
            minor: rustix::fs::minor(meta.rdev()),
            mode: meta.mode() & 0o777,
            uid: meta.uid(),
            gid: meta.gid(),
        };
        nodes.push((node, access.into()));
    }
    Ok(())
}
