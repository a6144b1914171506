//! A container as asked for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::sandbox::{IdMapping, NamespaceModes};
use super::selinux;

/// The CRI's MountPropagation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum Propagation {
    /// None.
    #[default]
    Private,
    /// Mounts on the host appear in the container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// An image that is mounted in place of a path on the host (KEP-4639).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ImageVolume {
    /// The image reference, which kubelet has resolved.
    pub image: String,
    /// Returned as they are.
    pub annotations: BTreeMap<String, String>,
    /// The image reference as the user wrote it.
    pub user_specified_image: String,
    /// Returned as it is.
    pub runtime_handler: String,
    /// What of the image is mounted, relative to its root; empty: all of it.
    pub sub_path: PathBuf,
}

/// A mount of a path of the host or of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Mount {
    /// Absolute path in the container.
    pub container_path: PathBuf,
    /// Absolute path on the host; empty with an image.
    pub host_path: PathBuf,
    /// An image in place of a path.
    #[serde(default)]
    pub image: Option<ImageVolume>,
    /// Read-only.
    pub readonly: bool,
    /// Read-only with what is mounted below.
    pub recursive_read_only: bool,
    /// Propagation.
    pub propagation: Propagation,
    /// What is mounted gets the container's SELinux label; without SELinux there is nothing to do.
    pub selinux_relabel: bool,
    /// Files belong to who these mappings of users and of groups say, seen from the ids on disk.
    #[serde(default)]
    pub idmap: Option<(IdMapping, IdMapping)>,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Device {
    /// Path in the container.
    pub container_path: PathBuf,
    /// Path on the host; a directory stands for every device below it.
    pub host_path: PathBuf,
    /// Any of `r`, `w`, `m`.
    pub permissions: String,
}

/// The CRI's LinuxContainerResources, less what is not asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Resources {
    /// Microseconds; 0: not set.
    pub cpu_period: i64,
    /// Microseconds; 0: not set.
    pub cpu_quota: i64,
    /// Weight; 0: not set.
    pub cpu_shares: i64,
    /// Bytes; 0: not set.
    pub memory_limit: i64,
    /// Bytes of memory and swap; 0: not set.
    pub memory_swap: i64,
    /// -1000 to 1000.
    pub oom_score_adj: i64,
    /// CPUs; empty: all.
    pub cpuset_cpus: String,
    /// Memory nodes; empty: all.
    pub cpuset_mems: String,
    /// Page size and bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 files.
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// These with the limits that `update` names: not 0 and not empty. Of huge pages and cgroup v2 files, each by its key.
    pub fn updated(&self, update: &Self) -> Self {
        let number = |old: i64, new: i64| if new == 0 { old } else { new };
        let text = |old: &String, new: &String| if new.is_empty() { old.clone() } else { new.clone() };
        let mut hugepages: BTreeMap<String, u64> = self.hugepages.iter().cloned().collect();
        hugepages.extend(update.hugepages.iter().cloned());
        let mut unified = self.unified.clone();
        unified.extend(update.unified.clone());
        Self {
            cpu_period: number(self.cpu_period, update.cpu_period),
            cpu_quota: number(self.cpu_quota, update.cpu_quota),
            cpu_shares: number(self.cpu_shares, update.cpu_shares),
            memory_limit: number(self.memory_limit, update.memory_limit),
            memory_swap: number(self.memory_swap, update.memory_swap),
            oom_score_adj: number(self.oom_score_adj, update.oom_score_adj),
            cpuset_cpus: text(&self.cpuset_cpus, &update.cpuset_cpus),
            cpuset_mems: text(&self.cpuset_mems, &update.cpuset_mems),
            hugepages: hugepages.into_iter().collect(),
            unified,
        }
    }

    /// Memory and swap together can't be less than memory alone, nor limited where memory isn't. The value of `memory_swap`
    /// that is wrong, and why.
    pub fn check_memory(&self) -> Result<(), (i64, &'static str)> {
        match (self.memory_limit, self.memory_swap) {
            (_, 0 | -1) => Ok(()),
            (0 | -1, swap) => Err((swap, "limits memory and swap together, but the memory has no limit of its own")),
            (memory, swap) if swap < memory => Err((swap, "is of memory and swap together, and less than the limit of memory alone")),
            _ => Ok(()),
        }
    }
}

/// A seccomp or AppArmor profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum SecurityProfile {
    /// None is asked for: unconfined.
    #[default]
    Unset,
    /// The runtime's own.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A file or a loaded profile by name.
    Localhost(String),
}

/// How groups of the image count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum GroupsPolicy {
    /// They join those listed.
    #[default]
    Merge,
    /// Only those listed.
    Strict,
}

/// The CRI's LinuxContainerSecurityContext.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Security {
    /// Capabilities to add, as names.
    pub add_capabilities: Vec<String>,
    /// Capabilities to drop.
    pub drop_capabilities: Vec<String>,
    /// Ambient capabilities to add.
    pub add_ambient_capabilities: Vec<String>,
    /// Everything allowed.
    pub privileged: bool,
    /// Namespaces.
    pub namespaces: NamespaceModes,
    /// A number; wins over the name.
    pub run_as_user: Option<u32>,
    /// A name in the image.
    pub run_as_username: String,
    /// A number; only with a user.
    pub run_as_group: Option<u32>,
    /// Read-only root.
    pub readonly_rootfs: bool,
    /// Groups beside the primary one.
    pub supplemental_groups: Vec<u32>,
    /// How the image's groups count.
    pub groups_policy: GroupsPolicy,
    /// no_new_privs.
    pub no_new_privs: bool,
    /// Hidden paths.
    pub masked_paths: Vec<String>,
    /// Read-only paths.
    pub readonly_paths: Vec<String>,
    /// Seccomp.
    pub seccomp: SecurityProfile,
    /// AppArmor.
    pub apparmor: SecurityProfile,
    /// SELinux.
    pub selinux: selinux::Options,
}

/// A container, as kubelet asks for it; checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ContainerSpec {
    /// Its name in the pod.
    pub name: String,
    /// How often kubelet has made it before.
    pub attempt: u32,
    /// The image reference, which kubelet has resolved.
    pub image: String,
    /// The image reference as the user wrote it.
    pub user_specified_image: String,
    /// Replaces the image's entrypoint.
    pub command: Vec<String>,
    /// Replaces the image's command.
    pub args: Vec<String>,
    /// Replaces the image's working directory.
    pub working_dir: String,
    /// Environment over the image's; values are any bytes but NUL.
    pub envs: Vec<(String, Vec<u8>)>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Labels, returned as they are.
    pub labels: BTreeMap<String, String>,
    /// Annotations, returned as they are.
    pub annotations: BTreeMap<String, String>,
    /// Below the pod's log directory; empty: no log.
    pub log_path: PathBuf,
    /// The process may read stdin.
    pub stdin: bool,
    /// stdin closes with its first client.
    pub stdin_once: bool,
    /// A terminal.
    pub tty: bool,
    /// Limits.
    pub resources: Resources,
    /// Security.
    pub security: Security,
    /// Replaces the image's stop signal; a number.
    pub stop_signal: Option<u32>,
}
