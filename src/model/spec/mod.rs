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
use crate::errchain::{Kind, Kinded};
use crate::plan::{Capabilities, CgroupPlan, ContainerPlan, DeviceNode, DeviceRule, LogPlan, Overlay, Process, Rlimit, Rootfs, capability};
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

/// What the node and the pod give a container.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// The container's id.
    pub id: String,
    /// The control group's path.
    pub cgroup: String,
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
    /// The compiled seccomp filter; empty: none.
    pub seccomp: Vec<u8>,
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
    let mounts = mounts::mounts(spec, pod, image, &around)?;
    let mask = capabilities(spec, around.default_capabilities)? & around.available_capabilities;
    let ambient = security
        .add_ambient_capabilities
        .iter()
        .try_fold(0, |sum, name| capability::parse(name).map(|bit| sum | bit).ok_or_else(|| SpecError::Capability(name.clone())))?
        & around.available_capabilities;
    let process = Process {
        args: process::args(spec, image)?,
        env: process::env(spec, image, &around.hostname),
        cwd: process::cwd(spec, image)?,
        user: process::user(spec, image)?,
        capabilities: Capabilities { bounding: mask | ambient, permitted: mask | ambient, effective: mask | ambient, inheritable: ambient, ambient },
        no_new_privileges: security.no_new_privs,
        rlimits: around.rlimits,
        oom_score_adj: Some(process::oom_score_adj(spec)?),
        seccomp: Bytes(around.seccomp),
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
        rootfs: Rootfs::Overlay(around.rootfs),
        rootfs_readonly: security.readonly_rootfs,
        mounts,
        namespaces: namespaces::namespaces(spec, pod, around.cgroup_v2)?,
        cgroup: CgroupPlan { path: around.cgroup, resources: limits(&spec.resources, around.pids_limit), devices },
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
