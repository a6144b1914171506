//! Mounts, and the paths that are hidden or read-only.

use std::path::{Path, PathBuf};

use super::{SpecError, absolute};
use crate::model::container::{ContainerSpec, Propagation};
use crate::model::sandbox::{NamespaceMode, SandboxSpec};
use crate::plan::{self, Bind, Mount, MountKind};

pub(super) fn mounts(spec: &ContainerSpec, pod: &SandboxSpec, pod_files: &[(PathBuf, PathBuf)]) -> Result<Vec<Mount>, SpecError> {
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
    let mut all = vec![
        special("/proc", MountKind::Proc, ""),
        Mount { nodev: false, ..special("/dev", MountKind::Tmpfs, "mode=755,size=65536k") },
        Mount { nodev: false, ..special("/dev/pts", MountKind::Devpts, "newinstance,ptmxmode=0666,mode=0620,gid=5") },
        special("/dev/mqueue", MountKind::Mqueue, ""),
        Mount { readonly: !privileged, ..special("/sys", MountKind::Sysfs, "") },
        Mount { readonly: !privileged, ..special("/sys/fs/cgroup", MountKind::Cgroup, "") },
    ];
    let bind = |source: &Path, target: &Path| Mount {
        target: target.into(),
        kind: MountKind::Bind(Bind { source: source.into(), recursive: true, ..Bind::default() }),
        ..Mount::default()
    };
    if pod.namespaces.ipc == NamespaceMode::Node {
        all.push(Mount { nosuid: true, nodev: true, noexec: true, ..bind(Path::new("/dev/shm"), Path::new("/dev/shm")) });
    } else {
        all.push(special("/dev/shm", MountKind::PodShm, ""));
    }
    let asked_for = |target: &Path| spec.mounts.iter().any(|mount| mount.container_path == target);
    for (target, source) in pod_files {
        if !asked_for(target) {
            all.push(Mount { readonly: spec.security.readonly_rootfs, ..bind(source, target) });
        }
    }
    for mount in &spec.mounts {
        let target = absolute("mounts.container_path", &mount.container_path.to_string_lossy())?;
        // A mount of kubelet's over one of ours replaces it.
        all.retain(|ours| ours.target != target);
        all.push(Mount {
            target,
            kind: MountKind::Bind(Bind {
                source: mount.host_path.clone(),
                recursive: true,
                propagation: match mount.propagation {
                    Propagation::Private => plan::Propagation::Private,
                    Propagation::HostToContainer => plan::Propagation::Slave,
                    Propagation::Bidirectional => plan::Propagation::Shared,
                },
                readonly_recursive: mount.recursive_read_only,
            }),
            readonly: mount.readonly,
            ..Mount::default()
        });
    }
    // Shallow before deep, so that no mount hides another; equal depths keep their order.
    let head = all.iter().take_while(|mount| !matches!(mount.kind, MountKind::Bind(_))).count();
    all[head..].sort_by_key(|mount| mount.target.components().count());
    Ok(all)
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

    #[test]
    fn kubelets_mounts_replace_ours_and_are_ordered_by_depth() {
        let (mut spec, _) = base();
        let mount = |target: &str| crate::model::container::Mount { container_path: target.into(), host_path: "/h".into(), ..Default::default() };
        spec.mounts = vec![mount("/a/b"), mount("/a"), mount("/etc/hosts")];
        let files = [(PathBuf::from("/etc/hosts"), PathBuf::from("/pod/hosts")), (PathBuf::from("/etc/hostname"), PathBuf::from("/pod/hostname"))];
        let all = mounts(&spec, &SandboxSpec::default(), &files).unwrap();
        let targets: Vec<_> = all.iter().map(|m| m.target.to_str().unwrap()).collect();
        assert_eq!(targets[targets.len() - 4..], ["/a", "/etc/hostname", "/a/b", "/etc/hosts"]);
    }
}
