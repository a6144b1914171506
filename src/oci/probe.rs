//! What this kernel can do with the filesystem that images are on: tried out, not looked up.
//!
//! Called by a process that ends afterwards (`copepod-monitor --probe DIR`), as root in the host's namespaces. It makes what a pod has,
//! with the functions that make it for pods, and throws it away. Nothing is left but files below `DIR`.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode};

use super::OciError;
use super::host::Host;
use super::root::{self, RootError};
use super::sandbox;
use super::userns::Joined;
use crate::plan::{IdRange, Overlay, SandboxPlan, UserNamespace};
use crate::sys::mount::{self, Attributes};

/// Why something can't be done on this node.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A file to try it with.
    #[error("cannot make {path} to try it with")]
    Make {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A copy of a mount.
    #[error("cannot copy the mount at {path}")]
    Copy {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// mount_setattr(2) with AT_RECURSIVE.
    #[error("cannot make mounts read-only with those below them")]
    ReadOnly(#[source] io::Error),
    /// The kernel took it and did nothing.
    #[error("a mount that was made read-only is writable")]
    Writable,
    /// A user namespace, or what else a pod with one has.
    #[error("cannot make a pod with a user namespace")]
    Pod(#[source] OciError),
    /// The host's namespaces.
    #[error("cannot reach the host's namespaces")]
    Host(#[source] io::Error),
    /// An overlay of layers with mapped ids.
    #[error("cannot make a root for a user namespace")]
    Root(#[source] RootError),
    /// A file in it.
    #[error("cannot look at a file in such a root")]
    Look(#[source] io::Error),
    /// The kernel took the mapping and did nothing.
    #[error("a file of user 0 belongs to {uid} in such a root, and not to {wanted}")]
    Owner {
        /// Who it belongs to.
        uid: u32,
        /// Who it should belong to.
        wanted: u32,
    },
}

/// Mounts can be made read-only with everything below them.
pub fn recursive_read_only(dir: &Path) -> Result<(), ProbeError> {
    let copied = |source| ProbeError::Copy { path: dir.into(), source };
    let opened = root::open_directory(dir).map_err(ProbeError::Root)?;
    let tree = mount::clone_tree(opened.as_fd(), true).map_err(copied)?;
    mount::set_attributes(tree.as_fd(), Attributes { readonly: true, ..Attributes::default() }, true).map_err(ProbeError::ReadOnly)?;
    match rustix::fs::mkdirat(&tree, "written", Mode::RWXU) {
        Err(rustix::io::Errno::ROFS) => Ok(()),
        Ok(()) | Err(_) => Err(ProbeError::Writable),
    }
}

/// A pod can have a user namespace, with layers on this filesystem.
pub fn user_namespaces(dir: &Path) -> Result<(), ProbeError> {
    const WANTED: u32 = 1 << 16;
    let make = |path: PathBuf| match std::fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(ProbeError::Make { path, source }),
    };
    let layers = make(dir.join("layers"))?;
    let file = make(layers.join("upper"))?.join("file");
    std::fs::write(&file, b"").map_err(|source| ProbeError::Make { path: file, source })?;
    make(layers.join("lower"))?;
    let (upper, work) = (make(dir.join("writable/upper"))?, make(dir.join("writable/work"))?);

    let range = IdRange { container: 0, host: WANTED, length: 1 << 16 };
    let mappings = UserNamespace { uids: range.clone(), gids: range };
    let pod = sandbox::create(&SandboxPlan { user_namespace: Some(mappings.clone()), ..SandboxPlan::default() }).map_err(ProbeError::Pod)?;
    let missing = || OciError::NoNamespace { kind: "user", of: "the pod".into() };
    let user = Joined::of(Some(&mappings), pod.user.as_ref().map(|fd| fd.as_fd())).map_err(ProbeError::Pod)?;
    let (user, staging) = user.zip(pod.staging.as_ref()).ok_or_else(missing).map_err(ProbeError::Pod)?;
    let overlay = Overlay { layers_dir: layers, lower: vec!["upper".into(), "lower".into()], upper, work, ..Overlay::default() };
    let host = Host::open().map_err(ProbeError::Host)?;
    let tree = root::mapped_overlay(&overlay, user, staging.as_fd(), &host).map_err(ProbeError::Root)?;
    let found = rustix::fs::statat(&tree, "file", AtFlags::SYMLINK_NOFOLLOW).map_err(|error| ProbeError::Look(error.into()))?;
    if found.st_uid == WANTED { Ok(()) } else { Err(ProbeError::Owner { uid: found.st_uid, wanted: WANTED }) }
}
