//! The control groups that a container sees in /sys/fs/cgroup.
//!
//! With version 1 that is a tmpfs with a bind of the container's own directory of each hierarchy: the same whether it has a cgroup
//! namespace or not. With version 2 init mounts cgroup2 in its cgroup namespace; a container in the host's cgroup namespace
//! gets a bind of the host's mount, since a fresh one there would reset the host's mount options (nsdelegate).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use super::mounts::MountError;
use crate::cgroup::{Cgroup, Hierarchy};
use crate::sys::mount::{self, Attributes, NewFs, Propagation};

/// Where version 2 is mounted by convention.
const HOST: &str = "/sys/fs/cgroup";

/// The container's view of hierarchies of version 1.
#[derive(Debug)]
pub struct CgroupView {
    tmpfs: OwnedFd,
    hierarchies: Vec<(PathBuf, OwnedFd)>,
    readonly: bool,
}

impl CgroupView {
    /// Its descriptors.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        std::iter::once(self.tmpfs.as_fd()).chain(self.hierarchies.iter().map(|(_, fd)| fd.as_fd())).collect()
    }

    /// Attaches it, and gives what is to become read-only.
    pub fn attach(self, target: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
        mount::attach(self.tmpfs.as_fd(), target)?;
        for (name, tree) in &self.hierarchies {
            // The tmpfs is ours alone, and so are its directories.
            let place = rustix::fs::openat(&self.tmpfs, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            mount::attach(tree.as_fd(), place.as_fd())?;
        }
        Ok(self.readonly.then_some(self.tmpfs))
    }
}

/// Prepares the view of the container's group, which exists; `None`: the host has only version 2.
pub fn prepare(cgroup: &Cgroup, hierarchy: &Hierarchy, attributes: Attributes) -> Result<Option<CgroupView>, MountError> {
    if hierarchy.is_v2() {
        return Ok(None);
    }
    let fs = NewFs::open("tmpfs").map_err(MountError::Filesystem)?;
    fs.set("source", "tmpfs").and_then(|()| fs.options("mode=755,size=64k")).map_err(MountError::Filesystem)?;
    let tmpfs = fs.mount(Attributes { readonly: false, ..attributes }).map_err(MountError::Filesystem)?;
    let mut view = CgroupView { tmpfs, hierarchies: Vec::new(), readonly: attributes.readonly };
    for (name, path) in cgroup.dirs() {
        let failed = |source: io::Error| MountError::Cgroup { path: path.into(), source };
        let tree = copy(path, attributes).map_err(failed)?;
        rustix::fs::mkdirat(&view.tmpfs, name, Mode::from_raw_mode(0o755)).map_err(|error| failed(error.into()))?;
        // `cpu` and `cpuacct` for `cpu,cpuacct`, as on the host.
        if name.contains(',') {
            for controller in name.split(',') {
                rustix::fs::symlinkat(name, &view.tmpfs, controller).map_err(|error| failed(error.into()))?;
            }
        }
        view.hierarchies.push((name.into(), tree));
    }
    Ok(Some(view))
}

/// A detached copy of the mount at a directory of the host, with these attributes.
fn copy(path: &Path, attributes: Attributes) -> io::Result<OwnedFd> {
    let opened = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let tree = mount::clone_tree(opened.as_fd(), false)?;
    mount::set_propagation(tree.as_fd(), Propagation::Private)?;
    mount::set_attributes(tree.as_fd(), attributes, false)?;
    Ok(tree)
}

/// A bind of the host's own mount of version 2.
pub fn host_unified(hierarchy: &Hierarchy, attributes: Attributes) -> Result<OwnedFd, MountError> {
    let path = hierarchy.mounts().first().map_or(Path::new(HOST), |(_, path)| path);
    copy(path, attributes).map_err(|source| MountError::Cgroup { path: path.into(), source })
}
