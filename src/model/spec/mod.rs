//! From what is asked for to what is done: a container, its pod and its image become a [`ContainerPlan`]. Pure.

mod devices;
mod mounts;
mod namespaces;
mod process;
mod resources;

use std::collections::BTreeSet;
use std::path::PathBuf;

pub use process::capabilities;
pub use resources::{limits, update};

use super::container::{ContainerSpec, SecurityProfile};
use super::sandbox::SandboxSpec;
use super::selinux::Labels;
use crate::errchain::{Kind, Kinded};
use crate::plan::{CgroupPlan, ContainerPlan, DeviceNode, DeviceRule, LogPlan, Overlay, Process, Rlimit, Rootfs};
use crate::wire::Bytes;

/// Why a container can't be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Neither the request nor the image says what to run.
    #[error("no command: field command is empty, and image {image} has neither an entrypoint nor a command")]
    NoCommand {
        /// The image.
        image: String,
    },
    /// A capability that doesn't exist.
    #[error("field linux.security_context.capabilities: {0:?} is no capability")]
    Capability(String),
    /// A capability that is wanted and not.
    #[error("field linux.security_context.capabilities: {0:?} is both in add_ambient_capabilities and in drop_capabilities")]
    Contradiction(String),
    /// A name or a number is out of range, or a path is not absolute.
    #[error("field {field}: {value:?} {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// The value.
        value: String,
        /// What it must be.
        reason: &'static str,
    },
}

impl Kinded for SpecError {
    fn kind(&self) -> Kind {
        Kind::InvalidArgument
    }
}

/// What of an image's configuration matters to a container.
#[derive(Debug, Clone, Default)]
pub struct ImageDefaults {
    /// The image, for messages.
    pub name: String,
    /// `USER`.
    pub user: String,
    /// `ENV`.
    pub env: Vec<String>,
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
    /// `WORKDIR`.
    pub working_dir: String,
    /// `VOLUME`.
    pub volumes: BTreeSet<String>,
}

/// A compiled seccomp filter and how it is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// The array of `struct sock_filter`; empty: there is none.
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_LOG.
    pub log: bool,
    /// Without SECCOMP_FILTER_FLAG_SPEC_ALLOW.
    pub mitigate: bool,
}

/// What the node and the pod give a container.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// The container's id.
    pub id: String,
    /// The control group's path.
    pub cgroup: String,
    /// That group is there when the container is created.
    pub cgroup_made: bool,
    /// The overlay's parts.
    pub rootfs: Overlay,
    /// Where creators attach roots.
    pub pivot_dir: PathBuf,
    /// The pod's files, mounted at /etc/resolv.conf, /etc/hostname and /etc/hosts where kubelet mounts none.
    pub pod_files: Vec<(PathBuf, PathBuf)>,
    /// The layers of the images among the mounts, in their order; nothing is writable in them.
    pub image_volumes: Vec<Overlay>,
    /// Where the volumes that the image defines have their directories.
    pub volumes_dir: PathBuf,
    /// The value of HOSTNAME.
    pub hostname: String,
    /// The compiled seccomp filter.
    pub seccomp: Filter,
    /// The AppArmor profile; empty: none.
    pub apparmor: String,
    /// The SELinux labels; empty on a node without SELinux.
    pub labels: Labels,
    /// Capabilities of a container by default.
    pub default_capabilities: u64,
    /// Capabilities that the daemon itself has: nothing beyond can be given.
    pub available_capabilities: u64,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Processes and threads; `None`: no limit.
    pub pids_limit: Option<i64>,
    /// Bytes of a log line.
    pub log_max_line: u32,
    /// Devices of the host for a privileged container and those asked for, with the access they are given.
    pub devices: Vec<(DeviceNode, String)>,
    /// Raise a lower oom_score_adj to the daemon's own.
    pub restrict_oom_score_adj: bool,
    /// Nodes that are cgroup v2 have a private cgroup namespace.
    pub cgroup_v2: bool,
}

/// The whole plan.
pub fn plan(spec: &ContainerSpec, pod: &SandboxSpec, image: &ImageDefaults, around: Surroundings) -> Result<ContainerPlan, SpecError> {
    let security = &spec.security;
    let mounts = mounts::labelled(mounts::mounts(spec, pod, image, &around)?, &around);
    let process = Process {
        args: process::args(spec, image)?,
        env: process::env(spec, image, &around.hostname),
        cwd: process::cwd(spec, image)?,
        user: process::user(spec, image)?,
        capabilities: capabilities(spec, around.default_capabilities, around.available_capabilities)?,
        no_new_privileges: security.no_new_privs,
        rlimits: around.rlimits,
        oom_score_adj: Some(process::oom_score_adj(spec)?),
        seccomp: Bytes(around.seccomp.program),
        seccomp_log: around.seccomp.log,
        seccomp_mitigate: around.seccomp.mitigate,
        apparmor: around.apparmor,
        selinux: around.labels.process,
        terminal: spec.tty,
        terminal_size: (0, 0),
        restrict_oom_score_adj: around.restrict_oom_score_adj,
    };
    let (masked, readonly) = if security.privileged { (Vec::new(), Vec::new()) } else { mounts::hidden(spec)? };
    let mut devices = devices::default_rules(security.privileged);
    for (node, access) in &around.devices {
        if !security.privileged {
            devices.push(DeviceRule { allow: true, kind: node.kind, major: Some(node.major), minor: Some(node.minor), access: access.clone() });
        }
    }
    Ok(ContainerPlan {
        id: around.id,
        rootfs: Rootfs::Overlay(Overlay { context: around.labels.mount.clone(), ..around.rootfs }),
        rootfs_readonly: security.readonly_rootfs,
        mounts,
        namespaces: namespaces::namespaces(spec, pod, around.cgroup_v2)?,
        cgroup: CgroupPlan { path: around.cgroup, made: around.cgroup_made, resources: limits(&spec.resources, around.pids_limit), devices },
        process,
        masked_paths: masked,
        readonly_paths: readonly,
        devices: around.devices.into_iter().map(|(node, _)| node).collect(),
        log: LogPlan {
            dir: pod.log_directory.clone(),
            path: if pod.log_directory.as_os_str().is_empty() { PathBuf::new() } else { spec.log_path.clone() },
            max_line: around.log_max_line,
        },
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        pivot_dir: around.pivot_dir,
        user_namespace: pod.namespaces.user.plan(),
    })
}

fn absolute(field: &'static str, path: &str) -> Result<PathBuf, SpecError> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(path.into())
    } else {
        Err(SpecError::Field { field, value: path.into(), reason: "is not an absolute path" })
    }
}

/// Which seccomp filter a container gets.
pub fn seccomp_profile(spec: &ContainerSpec) -> &SecurityProfile {
    if spec.security.privileged { &SecurityProfile::Unconfined } else { &spec.security.seccomp }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn base() -> (ContainerSpec, ImageDefaults) {
        let spec = ContainerSpec { command: vec!["sh".into()], ..ContainerSpec::default() };
        (spec, ImageDefaults { name: "img".into(), ..ImageDefaults::default() })
    }
}
