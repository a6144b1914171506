//! Requests, parsed: from generated types to the model's, or an error that names the field and the value.

mod container;
mod image;
mod mount;
mod resources;
mod sandbox;
mod security;

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};

pub use container::container;
pub use image::{credentials, image, pull_namespace};
pub use resources::{pod_resources, update};
pub use sandbox::sandbox;

use crate::errchain::{Kind, Remote};

/// Bytes of all labels or annotations of one object.
const MAX_LABELS: usize = 1 << 20;

/// A field that can't be taken.
fn bad(field: &str, value: &str, reason: &str) -> Remote {
    let shown: String = value.chars().take(200).collect();
    Remote::text(Kind::InvalidArgument, format!("field {field}: {shown:?} {reason}"))
}

fn missing(field: &str) -> Remote {
    Remote::text(Kind::InvalidArgument, format!("field {field} is missing"))
}

/// What a later release honours. Asking for it is refused rather than ignored.
fn later(field: &str, value: &str) -> Remote {
    Remote::text(Kind::Unimplemented, format!("field {field}: {value:?} is not supported yet"))
}

/// The ports of a PortForwardRequest; none: the client names them later.
pub fn ports(ports: &[i32]) -> Result<Vec<u16>, Remote> {
    let port = |port: &i32| u16::try_from(*port).ok().filter(|port| *port != 0);
    ports.iter().map(|number| port(number).ok_or_else(|| bad("port", &number.to_string(), "is no port: 1 to 65535"))).collect()
}

/// A name that becomes part of keys and, with kubelet, of paths.
fn name(field: &str, value: &str) -> Result<String, Remote> {
    if value.is_empty() {
        return Err(missing(field));
    }
    if value.len() > 253 || value.contains(['/', '\0', '\n']) || value == ".." || value == "." {
        return Err(bad(field, value, "is not a name of at most 253 characters without '/'"));
    }
    Ok(value.into())
}

fn absolute(field: &str, value: &str) -> Result<PathBuf, Remote> {
    if value.is_empty() {
        return Err(missing(field));
    }
    if !value.starts_with('/') || value.contains('\0') || value.len() > 4096 {
        return Err(bad(field, value, "is not an absolute path"));
    }
    Ok(value.into())
}

fn labels(field: &str, map: std::collections::HashMap<String, String>) -> Result<BTreeMap<String, String>, Remote> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAX_LABELS {
        return Err(bad(field, &format!("{size} bytes"), "are more than 1 MiB"));
    }
    Ok(map.into_iter().collect())
}

/// A path without `..`, `.` and doubled slashes; `..` is refused.
fn clean(field: &str, path: PathBuf) -> Result<PathBuf, Remote> {
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(bad(field, &path.to_string_lossy(), "must not contain '..'"));
    }
    Ok(path.components().collect())
}

fn id(field: &str, value: i64) -> Result<u32, Remote> {
    // u32::MAX is -1 to the kernel: "leave as it is", which would be root.
    u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or_else(|| bad(field, &value.to_string(), "is not 0 to 4294967294"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errchain::{Chain, Kinded};

    /// The request was refused as invalid, with an error that has these words.
    pub(super) fn refused<T: std::fmt::Debug>(result: Result<T, Remote>, words: &[&str]) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        for word in words {
            assert!(Chain(&error).to_string().contains(word), "{error} lacks {word}");
        }
    }
}
