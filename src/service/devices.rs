//! Devices of the host that a container gets: those it asks for, and all of them if it is privileged.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::ServiceError;
use crate::errchain::Kind;
use crate::model::container::{ContainerSpec, Device};
use crate::plan::DeviceNode;

/// Directories and files of /dev that are the container's own (its pseudo terminals, shared memory, message queues).
const OWN: [&str; 8] = ["pts", "shm", "fd", "mqueue", "console", "ptmx", "core", "initctl"];
/// A directory tree of devices deeper than this is no such tree.
const MAX_DEPTH: usize = 8;
/// More devices than this are no container's.
const MAX_DEVICES: usize = 65_536;

/// The nodes, and what the container may do with each (any of `r`, `w`, `m`). No path is there twice: what is asked for comes before
/// what privilege brings, and the last before the first.
pub fn of(spec: &ContainerSpec) -> Result<Vec<(DeviceNode, String)>, ServiceError> {
    let mut nodes = Vec::new();
    if spec.security.privileged {
        collect(Path::new("/dev"), Path::new("/dev"), "rwm", 0, &mut nodes)?;
    }
    for device in &spec.devices {
        check(device)?;
        let before = nodes.len();
        collect(&device.host_path, &device.container_path, &device.permissions, 0, &mut nodes)?;
        if nodes.len() == before {
            return Err(bad("devices.host_path", device.host_path.display(), "is no device and holds none"));
        }
    }
    let mut seen: std::collections::HashSet<PathBuf> = std::collections::HashSet::new();
    let mut unique: Vec<_> = nodes.into_iter().rev().filter(|(node, _)| seen.insert(node.path.clone())).collect();
    unique.reverse();
    Ok(unique)
}

fn bad(field: &'static str, value: impl ToString, reason: &'static str) -> ServiceError {
    ServiceError::Field { field, value: value.to_string(), reason, kind: Kind::InvalidArgument }
}

fn check(device: &Device) -> Result<(), ServiceError> {
    let access = &device.permissions;
    let twice = |letter: &u8| access.bytes().filter(|other| other == letter).count() > 1;
    if access.is_empty() || !access.bytes().all(|b| b"rwm".contains(&b)) || access.as_bytes().iter().any(twice) {
        return Err(bad("devices.permissions", access, "is not made of r, w and m"));
    }
    Ok(())
}

fn collect(host: &Path, inside: &Path, access: &str, depth: usize, nodes: &mut Vec<(DeviceNode, String)>) -> Result<(), ServiceError> {
    let failed = |source| ServiceError::Host { what: "look at device", path: host.into(), source };
    // A device that is named may be a link (/dev/disk/by-id/…); below a directory links are left alone.
    let meta = if depth == 0 { fs::metadata(host) } else { fs::symlink_metadata(host) };
    let meta = match meta {
        // The kernel took it away since its directory was read.
        Err(error) if depth > 0 && error.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta.map_err(failed)?,
    };
    let kind = meta.file_type();
    if kind.is_dir() && depth < MAX_DEPTH {
        let is_dev = fs::canonicalize(host).is_ok_and(|path| path == Path::new("/dev"));
        for entry in fs::read_dir(host).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if is_dev && OWN.iter().any(|own| name == *own) {
                continue;
            }
            collect(&host.join(&name), &inside.join(&name), access, depth + 1, nodes)?;
        }
    } else if kind.is_char_device() || kind.is_block_device() {
        if nodes.len() == MAX_DEVICES {
            return Err(bad("devices", host.display(), "is one of more than 65536 devices"));
        }
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
