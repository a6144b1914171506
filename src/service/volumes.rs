//! What a container has beside its root: images among its mounts, and the volumes that its own image defines.
//!
//! Nothing is mounted here. Images are resolved and their layers held while the container exists; the directories of volumes are made
//! beside the container's writable layer, and go with it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::{Service, ServiceError, files};
use crate::image::LayerLease;
use crate::model::container::ContainerSpec;
use crate::model::sandbox::SandboxSpec;
use crate::plan::{ContainerPlan, MountKind, Overlay};
use crate::store::make_dir;
use crate::store::record::VolumeImage;

/// The images among a container's mounts, in their order, and what keeps their layers on disk.
#[derive(Default)]
pub(super) struct VolumeImages {
    pub(super) images: Vec<VolumeImage>,
    pub(super) leases: Vec<LayerLease>,
}

impl VolumeImages {
    /// Each as layers with nothing writable on top.
    pub(super) fn layers(&self) -> Vec<Overlay> {
        let overlay = |lease: &LayerLease| Overlay { layers_dir: lease.layers_dir().into(), lower: lease.names().to_vec(), ..Overlay::default() };
        self.leases.iter().map(overlay).collect()
    }
}

impl Service {
    /// Finds and holds the images among a container's mounts. kubelet has pulled them.
    pub(super) fn volume_images(&self, spec: &ContainerSpec) -> Result<VolumeImages, ServiceError> {
        let mut volumes = VolumeImages::default();
        for mount in &spec.mounts {
            let Some(volume) = &mount.image else { continue };
            let failed = |source| ServiceError::ImageVolume { target: mount.container_path.clone(), source: Box::new(source) };
            let image = self
                .images
                .find(&volume.image)
                .map_err(|source| failed(ServiceError::Image { what: "cannot find the image", source }))?
                .ok_or_else(|| failed(ServiceError::NoImage { image: volume.image.clone() }))?;
            let lease = self.images.lease(&image);
            let lease = lease.map_err(|source| failed(ServiceError::Image { what: "cannot hold the image's layers", source }))?;
            volumes.images.push(VolumeImage { id: image.id.clone(), layers: lease.names().to_vec() });
            volumes.leases.push(lease);
        }
        Ok(volumes)
    }

    /// Removes an image with all its names, unless it is mounted in a container. One that is gone is removed.
    pub async fn remove_image(&self, reference: &str) -> Result<(), ServiceError> {
        let failed = |source| ServiceError::Image { what: "cannot remove the image", source };
        let Some(image) = self.images.find(reference).map_err(failed)? else { return Ok(()) };
        let mounted = |record: &crate::store::record::ContainerRecord| record.image_volumes.iter().any(|volume| volume.id == image.id);
        if let Some(container) = self.containers().iter().map(|container| container.record()).find(|record| mounted(record)) {
            return Err(ServiceError::ImageInUse { image: image.id.clone(), container: container.id.to_string() });
        }
        self.images.remove(reference).await.map_err(failed)
    }
}

/// The directories of the volumes that a container's image defines.
pub(super) fn own(plan: &ContainerPlan) -> Vec<PathBuf> {
    let directory = |kind: &MountKind| if let MountKind::Volume(path) = kind { Some(path.clone()) } else { None };
    plan.mounts.iter().filter_map(|mount| directory(&mount.kind)).collect()
}

/// Makes them, empty. Owner and mode become those that the image has there, where it has a directory.
pub(super) fn make(volumes: &[PathBuf], pod: &SandboxSpec) -> Result<(), ServiceError> {
    for path in volumes {
        make_dir(path).map_err(ServiceError::Store)?;
        let readable = fs::set_permissions(path, fs::Permissions::from_mode(0o755));
        readable.map_err(|source| ServiceError::Host { what: "set the mode of", path: path.clone(), source })?;
        files::own(path, pod)?;
    }
    Ok(())
}
