//! A container's mounts.

use std::path::{Path, PathBuf};

use super::sandbox::mapping;
use super::{absolute, bad, clean, labels};
use crate::api;
use crate::errchain::Remote;
use crate::model::container::{self, ImageVolume, Propagation};

pub(super) fn mount(mount: api::Mount) -> Result<container::Mount, Remote> {
    let idmap = if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        None
    } else {
        Some((mapping("config.mounts.uidMappings", &mount.uid_mappings)?, mapping("config.mounts.gidMappings", &mount.gid_mappings)?))
    };
    let propagation = match api::MountPropagation::try_from(mount.propagation) {
        Ok(api::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(api::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(api::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => return Err(bad("config.mounts.propagation", &mount.propagation.to_string(), "is no propagation")),
    };
    if mount.recursive_read_only && (!mount.readonly || propagation != Propagation::Private) {
        return Err(bad("config.mounts.recursive_read_only", "true", "needs readonly and private propagation"));
    }
    let target = clean("config.mounts.container_path", absolute("config.mounts.container_path", &mount.container_path)?)?;
    if target == Path::new("/") {
        return Err(bad("config.mounts.container_path", &mount.container_path, "is the root"));
    }
    // kubelet leaves the field out, crictl may send an empty message.
    let image = match &mount.image {
        Some(image) if !image.image.is_empty() || mount.host_path.is_empty() => Some(image_volume(&mount, image)?),
        _ if !mount.image_sub_path.is_empty() => {
            return Err(bad("config.mounts.image_sub_path", &mount.image_sub_path, "needs an image"));
        }
        _ => None,
    };
    Ok(container::Mount {
        container_path: target,
        host_path: if image.is_some() { PathBuf::new() } else { absolute("config.mounts.host_path", &mount.host_path)? },
        image,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        selinux_relabel: mount.selinux_relabel,
        idmap,
    })
}

/// The image of a mount. What the CRI excludes beside it is refused, so that nobody takes an image for writable.
fn image_volume(mount: &api::Mount, image: &api::ImageSpec) -> Result<ImageVolume, Remote> {
    if image.image.is_empty() {
        return Err(super::missing("config.mounts.image.image"));
    }
    if !mount.host_path.is_empty() {
        return Err(bad("config.mounts.host_path", &mount.host_path, "must be empty in a mount of an image"));
    }
    if !mount.readonly {
        return Err(bad("config.mounts.readonly", "false", "is not possible in a mount of an image"));
    }
    if mount.propagation != api::MountPropagation::PropagationPrivate as i32 {
        return Err(bad("config.mounts.propagation", &mount.propagation.to_string(), "is not possible in a mount of an image"));
    }
    let field = "config.mounts.image_sub_path";
    let sub_path = clean(field, PathBuf::from(&mount.image_sub_path))?;
    if sub_path.is_absolute() || mount.image_sub_path.contains('\0') || mount.image_sub_path.len() > 4096 {
        return Err(bad(field, &mount.image_sub_path, "is not a path relative to the image's root"));
    }
    Ok(ImageVolume {
        image: image.image.clone(),
        annotations: labels("config.mounts.image.annotations", image.annotations.clone())?,
        user_specified_image: image.user_specified_image.clone(),
        runtime_handler: image.runtime_handler.clone(),
        sub_path: sub_path.components().filter(|part| *part != std::path::Component::CurDir).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::refused;
    use super::*;

    #[test]
    fn mounts_are_checked_field_by_field() {
        let base = || api::Mount { container_path: "/c".into(), host_path: "/h".into(), ..Default::default() };
        let of_image = || api::Mount {
            host_path: String::new(),
            readonly: true,
            image: Some(api::ImageSpec { image: "busybox".into(), ..Default::default() }),
            ..base()
        };
        let check = |wrong: api::Mount, words: &[&str]| refused(mount(wrong), words);
        check(api::Mount { container_path: String::new(), ..base() }, &["container_path", "missing"]);
        check(api::Mount { container_path: "c".into(), ..base() }, &["container_path", "\"c\""]);
        check(api::Mount { container_path: "/a/../b".into(), ..base() }, &["container_path", "/a/../b", "'..'"]);
        check(api::Mount { container_path: "/./".into(), ..base() }, &["container_path", "root"]);
        check(api::Mount { host_path: String::new(), ..base() }, &["host_path", "missing"]);
        check(api::Mount { host_path: "h\0".into(), ..base() }, &["host_path"]);
        check(api::Mount { propagation: 7, ..base() }, &["propagation", "7"]);
        check(api::Mount { recursive_read_only: true, ..base() }, &["recursive_read_only", "readonly"]);
        check(api::Mount { recursive_read_only: true, readonly: true, propagation: 1, ..base() }, &["recursive_read_only", "private"]);
        check(api::Mount { image_sub_path: "etc".into(), ..base() }, &["image_sub_path", "needs an image"]);
        check(api::Mount { image: Some(api::ImageSpec::default()), ..of_image() }, &["image.image", "missing"]);
        check(api::Mount { host_path: "/h".into(), ..of_image() }, &["host_path", "/h", "image"]);
        check(api::Mount { readonly: false, ..of_image() }, &["readonly", "false", "image"]);
        check(api::Mount { propagation: 2, ..of_image() }, &["propagation", "2", "image"]);
        check(api::Mount { image_sub_path: "/etc".into(), ..of_image() }, &["image_sub_path", "/etc"]);
        check(api::Mount { image_sub_path: "a/../..".into(), ..of_image() }, &["image_sub_path", "a/../.."]);

        let made = mount(api::Mount { container_path: "//a/./b/".into(), image: Some(api::ImageSpec::default()), ..base() }).unwrap();
        assert_eq!((made.container_path, made.image), ("/a/b".into(), None));
        let made = mount(api::Mount { image_sub_path: "./etc//x/.".into(), ..of_image() }).unwrap();
        assert_eq!(made.image.unwrap().sub_path, Path::new("etc/x"));
    }
}
