//! A container's mounts.

use std::path::Path;

use super::{absolute, bad, clean, later};
use crate::api;
use crate::errchain::Remote;
use crate::model::container::{self, Propagation};

pub(super) fn mount(mount: api::Mount) -> Result<container::Mount, Remote> {
    if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
        return Err(later("config.mounts.image", &mount.container_path));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(later("config.mounts.uidMappings", &mount.container_path));
    }
    let propagation = match api::MountPropagation::try_from(mount.propagation) {
        Ok(api::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(api::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(api::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => return Err(bad("config.mounts.propagation", &mount.propagation.to_string(), "is no propagation")),
    };
    if mount.recursive_read_only && (!mount.readonly || propagation != Propagation::Private) {
        return Err(bad("config.mounts.recursive_read_only", "true", "needs readonly and private propagation"));
    }
    let container_path = absolute("config.mounts.container_path", &mount.container_path)?;
    if clean("config.mounts.container_path", container_path.clone())? == Path::new("/") {
        return Err(bad("config.mounts.container_path", &mount.container_path, "is the root"));
    }
    Ok(container::Mount {
        container_path: clean("config.mounts.container_path", container_path)?,
        host_path: absolute("config.mounts.host_path", &mount.host_path)?,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        selinux_relabel: mount.selinux_relabel,
    })
}
