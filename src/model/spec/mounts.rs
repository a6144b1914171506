//! Mounts, and the paths that are hidden or read-only.

use std::path::{Component, Path, PathBuf};

use super::{ImageDefaults, SpecError, Surroundings, absolute};
use crate::model::container::{self, ContainerSpec, Propagation};
use crate::model::sandbox::{NamespaceMode, SandboxSpec};
use crate::plan::{self, Bind, ImageMount, Mount, MountKind, Overlay};

/// Volumes that an image may define: each is a directory and a mount.
const MAX_VOLUMES: usize = 128;

pub(super) fn mounts(spec: &ContainerSpec, pod: &SandboxSpec, image: &ImageDefaults, around: &Surroundings) -> Result<Vec<Mount>, SpecError> {
    let mut all = Vec::new();
    for (mount, layers) in spec.mounts.iter().zip(layers_of(spec, around)) {
        let target = absolute("mounts.container_path", &mount.container_path.to_string_lossy())?;
        // The last of those that kubelet mounts at one place is what would be seen there.
        all.retain(|earlier: &Mount| earlier.target != target);
        let kind = match (&mount.image, layers) {
            (Some(image), Some(layers)) => MountKind::Image(ImageMount { layers, sub_path: image.sub_path.clone() }),
            _ => MountKind::Bind(bind(mount, &around.labels.mount)),
        };
        all.push(Mount { target, kind, readonly: mount.readonly, ..Mount::default() });
    }
    let asked_for = |target: &Path| all.iter().any(|mount: &Mount| mount.target == target);
    let of_the_image = volumes(image, &around.volumes_dir)?.into_iter().filter(|(target, _)| !asked_for(target));
    let of_the_image: Vec<Mount> =
        of_the_image.map(|(target, source)| Mount { target, kind: MountKind::Volume(source), ..Mount::default() }).collect();
    let files = around.pod_files.iter().filter(|(target, _)| !asked_for(target));
    let files: Vec<Mount> = files.map(|(target, source)| Mount { readonly: spec.security.readonly_rootfs, ..host_path(source, target) }).collect();
    let ours = own(spec, pod).into_iter().filter(|ours| !spec.mounts.iter().any(|mount| ours.target.starts_with(&mount.container_path)));
    let ours: Vec<Mount> = ours.collect();
    let head = ours.len();
    let mut all = [ours, of_the_image, files, all].concat();
    // Shallow before deep, so that no mount hides another; equal depths keep their order.
    all[head..].sort_by_key(|mount| mount.target.components().count());
    Ok(all)
}

/// What every container has. A mount of kubelet's takes its place, and that of what lies below it: the host's /dev brings its own
/// /dev/pts and /dev/shm.
fn own(spec: &ContainerSpec, pod: &SandboxSpec) -> Vec<Mount> {
    let privileged = spec.security.privileged;
    let special = |target: &str, kind, options: &str| Mount {
        target: target.into(),
        kind,
        nosuid: true,
        nodev: true,
        noexec: true,
        options: options.into(),
        ..Mount::default()
    };
    let shm = match pod.namespaces.ipc {
        NamespaceMode::Node => Mount { nosuid: true, nodev: true, noexec: true, ..host_path(Path::new("/dev/shm"), Path::new("/dev/shm")) },
        _ => special("/dev/shm", MountKind::PodShm, ""),
    };
    vec![
        special("/proc", MountKind::Proc, ""),
        Mount { nodev: false, ..special("/dev", MountKind::Tmpfs, "mode=755,size=65536k") },
        Mount { nodev: false, ..special("/dev/pts", MountKind::Devpts, "newinstance,ptmxmode=0666,mode=0620,gid=5") },
        special("/dev/mqueue", MountKind::Mqueue, ""),
        Mount { readonly: !privileged, ..special("/sys", MountKind::Sysfs, "") },
        Mount { readonly: !privileged, ..special("/sys/fs/cgroup", MountKind::Cgroup, "") },
        shm,
    ]
}

/// A path of the host's with what is mounted below it.
fn host_path(source: &Path, target: &Path) -> Mount {
    let bind = Bind { source: source.into(), recursive: true, ..Bind::default() };
    Mount { target: target.into(), kind: MountKind::Bind(bind), ..Mount::default() }
}

fn bind(mount: &container::Mount, label: &str) -> Bind {
    Bind {
        source: mount.host_path.clone(),
        recursive: true,
        propagation: match mount.propagation {
            Propagation::Private => plan::Propagation::Private,
            Propagation::HostToContainer => plan::Propagation::Slave,
            Propagation::Bidirectional => plan::Propagation::Shared,
        },
        readonly_recursive: mount.recursive_read_only,
        make_source: true,
        relabel: if mount.selinux_relabel { label.into() } else { String::new() },
        idmap: mount.idmap.map(|(uids, gids)| plan::UserNamespace { uids: uids.range(), gids: gids.range() }),
    }
}

/// For each mount the layers of its image, if it has one.
fn layers_of<'a>(spec: &'a ContainerSpec, around: &'a Surroundings) -> impl Iterator<Item = Option<Overlay>> + 'a {
    let mut images = around.image_volumes.iter();
    spec.mounts.iter().map(move |mount| mount.image.as_ref().and_then(|_| images.next()).map(|layers| read_only(layers, &around.pivot_dir)))
}

/// An overlay of layers alone: it takes two of them at least.
fn read_only(layers: &Overlay, empty: &Path) -> Overlay {
    let mut overlay = layers.clone();
    if overlay.lower.len() < 2 {
        overlay.lower.push(empty.to_string_lossy().into_owned());
    }
    overlay
}

/// The volumes that an image defines: where they go, and the directories that they are. What the image wants at the root or among the
/// runtime's own mounts is not for an image to say, and is passed over.
fn volumes(image: &ImageDefaults, dir: &Path) -> Result<Vec<(PathBuf, PathBuf)>, SpecError> {
    let mut targets: Vec<PathBuf> = image.volumes.iter().map(|text| cleaned(text)).collect();
    targets.retain(|target| !["/proc", "/sys", "/dev"].iter().any(|own| target.starts_with(own)) && target != Path::new("/"));
    targets.sort();
    targets.dedup();
    if targets.len() > MAX_VOLUMES {
        let value = format!("{} volumes", targets.len());
        return Err(SpecError::Field { field: "Volumes of the image", value, reason: "are more than 128" });
    }
    Ok(targets.into_iter().enumerate().map(|(n, target)| (target, dir.join(n.to_string()))).collect())
}

/// As an absolute path without `.` and `..`, as those of an image's configuration are meant.
fn cleaned(text: &str) -> PathBuf {
    let mut path = PathBuf::from("/");
    for part in Path::new(text).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => _ = path.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    path
}

/// The mounts with an SELinux context: those that are the container's own, images, and the pod's files. The kernel's views of
/// itself have their own labels, and what is bound from the host keeps its unless the mount asks for another.
pub(super) fn labelled(mut mounts: Vec<Mount>, around: &Surroundings) -> Vec<Mount> {
    let context = &around.labels.mount;
    for mount in &mut mounts {
        match &mut mount.kind {
            MountKind::Tmpfs | MountKind::Devpts | MountKind::Mqueue | MountKind::Volume(_) => mount.context = context.clone(),
            MountKind::Image(image) => image.layers.context = context.clone(),
            MountKind::Bind(bind) if around.pod_files.iter().any(|(_, source)| *source == bind.source) => bind.relabel = context.clone(),
            _ => {}
        }
    }
    mounts
}

/// Masked and read-only paths.
pub(super) fn hidden(spec: &ContainerSpec) -> Result<(Vec<PathBuf>, Vec<PathBuf>), SpecError> {
    let all = |field, list: &[String]| list.iter().map(|path| absolute(field, path)).collect::<Result<Vec<_>, _>>();
    Ok((
        all("linux.security_context.masked_paths", &spec.security.masked_paths)?,
        all("linux.security_context.readonly_paths", &spec.security.readonly_paths)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::base;
    use super::*;

    fn at(target: &str) -> container::Mount {
        container::Mount { container_path: target.into(), host_path: "/h".into(), ..Default::default() }
    }

    fn targets(asked: &[&str], volumes: &[&str]) -> Vec<String> {
        let (mut spec, mut image) = base();
        spec.mounts = asked.iter().map(|target| at(target)).collect();
        image.volumes = volumes.iter().map(|text| text.to_string()).collect();
        let pod_files = vec![("/etc/hosts".into(), "/pod/hosts".into()), ("/etc/hostname".into(), "/pod/hostname".into())];
        let around = Surroundings { pod_files, volumes_dir: "/v".into(), ..Surroundings::default() };
        let all = mounts(&spec, &SandboxSpec::default(), &image, &around).unwrap();
        all.iter().map(|mount| mount.target.to_str().unwrap().to_string()).collect()
    }

    #[test]
    fn kubelets_mounts_replace_ours_and_are_ordered_by_depth() {
        let own = ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/dev/shm"];
        let check = |asked: &[&str], volumes: &[&str], without: &[&str], rest: &[&str]| {
            let ours = own.iter().filter(|target| !without.contains(target));
            let want: Vec<&str> = ours.chain(rest).copied().collect();
            assert_eq!(targets(asked, volumes), want, "{asked:?} {volumes:?}");
        };
        check(&[], &[], &[], &["/etc/hosts", "/etc/hostname"]);
        check(&["/a/b", "/a", "/etc/hosts"], &[], &[], &["/a", "/etc/hostname", "/a/b", "/etc/hosts"]);
        check(&["/a", "/b", "/a"], &[], &[], &["/b", "/a", "/etc/hosts", "/etc/hostname"]);
        check(&["/dev/shm"], &[], &["/dev/shm"], &["/etc/hosts", "/etc/hostname", "/dev/shm"]);
        check(&["/dev"], &[], &["/dev", "/dev/pts", "/dev/mqueue", "/dev/shm"], &["/dev", "/etc/hosts", "/etc/hostname"]);
        check(&["/devices", "/sys"], &[], &["/sys", "/sys/fs/cgroup"], &["/devices", "/sys", "/etc/hosts", "/etc/hostname"]);
        check(&["/etc"], &[], &[], &["/etc", "/etc/hosts", "/etc/hostname"]);
        check(
            &["/data/deep", "/data"],
            &["/data", "/log", "/data/deep/er"],
            &[],
            &["/log", "/data", "/etc/hosts", "/etc/hostname", "/data/deep", "/data/deep/er"],
        );
        check(&[], &["rel/./x/../y/", "/", "/proc/x", "/dev", "//a", "/a"], &[], &["/a", "/rel/y", "/etc/hosts", "/etc/hostname"]);
    }

    #[test]
    fn images_have_two_layers_at_least_and_the_one_that_is_meant() {
        let (mut spec, image) = base();
        let of = |sub_path: &str| Some(container::ImageVolume { sub_path: sub_path.into(), ..Default::default() });
        spec.mounts = vec![at("/h"), container::Mount { image: of("x"), ..at("/one") }, container::Mount { image: of(""), ..at("/two") }];
        let overlay = |lower: &[&str]| Overlay { lower: lower.iter().map(|name| name.to_string()).collect(), ..Overlay::default() };
        let image_volumes = vec![overlay(&["a"]), overlay(&["b", "a"])];
        let around = Surroundings { image_volumes, pivot_dir: "/empty".into(), ..Surroundings::default() };
        let all = mounts(&spec, &SandboxSpec::default(), &image, &around).unwrap();
        let images = all.iter().filter_map(|mount| match &mount.kind {
            MountKind::Image(image) => Some((mount.target.to_str().unwrap(), image.sub_path.to_str().unwrap(), image.layers.lower.join(","))),
            _ => None,
        });
        assert_eq!(images.collect::<Vec<_>>(), [("/one", "x", "a,/empty".into()), ("/two", "", "b,a".into())]);
    }

    #[test]
    fn an_image_may_not_define_volumes_without_end() {
        let (_, mut image) = base();
        image.volumes = (0..129).map(|n| n.to_string()).collect();
        assert!(volumes(&image, Path::new("/v")).unwrap_err().to_string().contains("129 volumes"));
    }
}
