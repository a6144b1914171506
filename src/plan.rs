//! The plan: what a sandbox or a container is to be, fully checked, in the form the monitor and its creators act on.
//!
//! A leaf: types and their encoding, no policy. The daemon writes a plan from the CRI's configuration (or `oci::from_spec`
//! from an OCI one) and sends it in a sealed memfd; nothing after that reads a spec. Every field is critical: a monitor
//! that meets one it doesn't know refuses the plan (see [`crate::wire`]).

pub mod capability;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::wire::Bytes;
use crate::{wire_enum, wire_struct};

wire_enum! {
    /// Where a namespace of a container comes from.
    pub enum Namespace {
        /// The host's own.
        0 Host,
        /// The pod's, held by the monitor.
        1 Pod,
        /// A new one of its own.
        2 Private,
        /// That of another container of the pod, named by its id.
        3 Container(String),
    }

    /// How mounts made later on one side reach the other (mount_namespaces(7)).
    pub enum Propagation {
        /// Neither way.
        0 Private,
        /// Host to container.
        1 Slave,
        /// Both ways; the source must be on a shared mount.
        2 Shared,
    }

    /// How a path on the host becomes a mount.
    pub enum MountKind {
        /// A fresh tmpfs; `options` such as `size=65536k,mode=755`.
        0 Tmpfs,
        /// A bind of `source`, a path on the host; symbolic links are followed there.
        1 Bind(Bind),
        /// procfs of the container's PID namespace.
        2 Proc,
        /// sysfs of the container's network namespace.
        3 Sysfs,
        /// POSIX message queues of the container's IPC namespace.
        4 Mqueue,
        /// A devpts instance of its own.
        5 Devpts,
        /// The container's view of the cgroup hierarchies.
        6 Cgroup,
        /// The pod's shared /dev/shm, held in the monitor's staging mount namespace.
        7 PodShm,
        /// An image, read-only.
        8 Image(ImageMount),
        /// A directory on the host that is the container's own: empty, and filled with what the image has at the target
        /// (a volume that the image defines).
        9 Volume(PathBuf),
    }

    /// What the container's root is made of.
    pub enum Rootfs {
        /// Nothing: an invalid plan.
        0 None,
        /// Layers under a writable one.
        1 Overlay(Overlay),
        /// A directory that holds an unpacked root filesystem; bound as it is.
        2 Directory(PathBuf),
    }

    /// How the groups of the image's /etc/group join the supplemental groups (KEP-3619).
    pub enum GroupsPolicy {
        /// The user's groups in the image and those listed.
        0 Merge,
        /// Only those listed.
        1 Strict,
    }
}

wire_struct! {
    /// A pod sandbox: its namespaces and what is set in them.
    pub struct SandboxPlan {
        /// The sandbox's id.
        1 id: String,
        /// Host name of a new UTS namespace.
        2 hostname: String,
        /// A network namespace of the pod's own, with `lo` up.
        3 new_net: bool,
        /// An IPC namespace of the pod's own.
        4 new_ipc: bool,
        /// A UTS namespace of the pod's own.
        5 new_uts: bool,
        /// One PID namespace for all containers, with a pause process as its init.
        6 shared_pid: bool,
        /// Names (with dots) and values, set in the pod's namespaces. Checked by the daemon.
        7 sysctls: Vec<(String, String)>,
        /// Size in bytes of the pod's /dev/shm; 0: none is made (the host's IPC namespace).
        8 shm_bytes: u64,
        /// oom_score_adj of the pause process.
        9 oom_score_adj: Option<i32>,
        /// A user namespace of the pod's own, which owns the others.
        10 user_namespace: Option<UserNamespace>,
        /// What the pause process is confined to.
        11 pause: PausePlan,
        /// SELinux context of the pod's /dev/shm; empty: what the policy gives it.
        12 mount_label: String,
    }

    /// The confinement of a pause process, beside having no capabilities, no descriptors and an empty read-only root.
    pub struct PausePlan {
        /// Who it runs as; `None`: root.
        1 user: Option<ResolvedUser>,
        /// A seccomp filter as the array of `struct sock_filter`; empty: none.
        2 seccomp: Bytes,
        /// SECCOMP_FILTER_FLAG_LOG.
        3 seccomp_log: bool,
        /// Without SECCOMP_FILTER_FLAG_SPEC_ALLOW.
        4 seccomp_mitigate: bool,
        /// AppArmor profile; empty: the monitor's own.
        5 apparmor: String,
    }

    /// A container, whole.
    pub struct ContainerPlan {
        /// The container's id.
        1 id: String,
        /// The container's root.
        2 rootfs: Rootfs,
        /// The root mount is read-only once everything is in place.
        3 rootfs_readonly: bool,
        /// Mounts in the order in which they are made.
        4 mounts: Vec<Mount>,
        /// Namespaces; the mount namespace is always private.
        5 namespaces: Namespaces,
        /// The control group and its limits.
        6 cgroup: CgroupPlan,
        /// The process.
        7 process: Process,
        /// Paths in the container that are hidden: files under /dev/null, directories under an empty read-only tmpfs.
        8 masked_paths: Vec<PathBuf>,
        /// Paths in the container that become read-only.
        9 readonly_paths: Vec<PathBuf>,
        /// Device nodes made in /dev beside the default ones.
        10 devices: Vec<DeviceNode>,
        /// Where stdout and stderr go.
        11 log: LogPlan,
        /// The process can read from stdin (attach); otherwise stdin is /dev/null.
        12 stdin: bool,
        /// stdin is closed when the first attached client goes.
        13 stdin_once: bool,
        /// An empty directory in which creators attach the root before they pivot into it.
        14 pivot_dir: PathBuf,
        /// The mappings of the pod's user namespace, which the container joins; `None`: the host's. Ids elsewhere in the plan are as
        /// the container sees them, but for the owners of `devices`.
        15 user_namespace: Option<UserNamespace>,
    }

    /// The mappings of a user namespace (user_namespaces(7)).
    pub struct UserNamespace {
        /// User ids.
        1 uids: IdRange,
        /// Group ids.
        2 gids: IdRange,
    }

    /// Ids that follow each other.
    pub struct IdRange {
        /// The first, as the container sees it.
        1 container: u32,
        /// The first, as the host sees it.
        2 host: u32,
        /// How many.
        3 length: u32,
    }

    /// An overlay root.
    pub struct Overlay {
        /// Directory that holds the layers.
        1 layers_dir: PathBuf,
        /// Names of the layers in `layers_dir`, topmost first. An absolute path is one elsewhere.
        2 lower: Vec<String>,
        /// The writable layer, empty at first. No path: there is none, and the overlay is read-only.
        3 upper: PathBuf,
        /// Overlay's work directory, on the same filesystem as `upper`.
        4 work: PathBuf,
        /// SELinux context of everything in it; empty: what the layers' files have.
        5 context: String,
    }

    /// A mount in the container.
    pub struct Mount {
        /// Absolute path in the container; missing parts are made inside its root.
        1 target: PathBuf,
        /// What is mounted.
        2 kind: MountKind,
        /// Read-only.
        3 readonly: bool,
        /// MS_NOSUID.
        4 nosuid: bool,
        /// MS_NODEV.
        5 nodev: bool,
        /// MS_NOEXEC.
        6 noexec: bool,
        /// Filesystem options, comma-separated; only for tmpfs and devpts.
        7 options: String,
        /// MS_NOATIME, else MS_RELATIME.
        8 noatime: bool,
        /// SELinux context of a new tmpfs, devpts or mqueue and of all in it, or of a volume; empty: what the policy gives.
        9 context: String,
    }

    /// A bind mount.
    pub struct Bind {
        /// Path on the host.
        1 source: PathBuf,
        /// The mounts below the source come along.
        2 recursive: bool,
        /// Propagation of the bind.
        3 propagation: Propagation,
        /// With `readonly`: the mounts below become read-only too.
        4 readonly_recursive: bool,
        /// A source that is missing is made, a directory of mode 0755, as both CRI-O and containerd do.
        5 make_source: bool,
        /// An SELinux label that the source and everything below it gets; empty: none.
        6 relabel: String,
        /// Files belong to who these mappings say, seen from the ids on disk; `None`: to who they belong to on disk. The mounts below
        /// stay as they are.
        7 idmap: Option<UserNamespace>,
    }

    /// An image as a mount.
    pub struct ImageMount {
        /// Its layers, at least two, under nothing writable.
        1 layers: Overlay,
        /// What of the image is mounted, relative to its root and resolved within it; empty: all of it.
        2 sub_path: PathBuf,
    }

    /// Where each namespace comes from.
    pub struct Namespaces {
        /// network_namespaces(7).
        1 net: Namespace,
        /// ipc_namespaces(7).
        2 ipc: Namespace,
        /// uts_namespaces(7).
        3 uts: Namespace,
        /// pid_namespaces(7).
        4 pid: Namespace,
        /// cgroup_namespaces(7): `Host` or `Private`.
        5 cgroup: Namespace,
    }

    /// A control group and its limits.
    pub struct CgroupPlan {
        /// Path from the root of each hierarchy, such as `/kubepods/burstable/podX/ID`. Its parent is made only where it
        /// is absent, and is never configured.
        1 path: String,
        /// The limits.
        2 resources: Resources,
        /// Device rules; the first rule is what holds where none matches (deny all).
        3 devices: Vec<DeviceRule>,
        /// The group is there: systemd made it, and removes it.
        4 made: bool,
    }

    /// Limits, in cgroup v1 terms as the CRI has them. `None` leaves the kernel's default.
    pub struct Resources {
        /// Relative weight, 2 to 262144; converted for v2.
        1 cpu_shares: Option<u64>,
        /// Microseconds per period; negative: no limit.
        2 cpu_quota: Option<i64>,
        /// Microseconds.
        3 cpu_period: Option<u64>,
        /// CPUs, in the kernel's list format; empty: the parent's.
        4 cpuset_cpus: String,
        /// Memory nodes, in the kernel's list format; empty: the parent's.
        5 cpuset_mems: String,
        /// Bytes; negative: no limit.
        6 memory_limit: Option<i64>,
        /// Bytes of memory and swap together (v1's sense); negative: no limit.
        7 memory_swap: Option<i64>,
        /// Processes and threads; negative: no limit.
        8 pids_limit: Option<i64>,
        /// Page sizes (`2MB`) and their limits in bytes.
        9 hugepages: Vec<(String, u64)>,
        /// cgroup v2 files and the values to write.
        10 unified: Vec<(String, String)>,
    }

    /// One rule of the device filter, last match wins.
    pub struct DeviceRule {
        /// Allow, else deny.
        1 allow: bool,
        /// `a` for all types, `b` or `c`. As a character's code.
        2 kind: u32,
        /// `None`: every major number.
        3 major: Option<u32>,
        /// `None`: every minor number.
        4 minor: Option<u32>,
        /// Any of `r`, `w`, `m`.
        5 access: String,
    }

    /// A device node in the container.
    pub struct DeviceNode {
        /// Absolute path in the container.
        1 path: PathBuf,
        /// `b`, `c`. As a character's code.
        2 kind: u32,
        /// Major number.
        3 major: u32,
        /// Minor number.
        4 minor: u32,
        /// Permission bits.
        5 mode: u32,
        /// Owner, as the host sees it.
        6 uid: u32,
        /// Group, as the host sees it.
        7 gid: u32,
    }

    /// A process: a container's init, or one exec'd in it.
    pub struct Process {
        /// Program and arguments; never empty. The program is looked up in PATH inside the container.
        1 args: Vec<OsString>,
        /// `NAME=value`. HOME is added from /etc/passwd where it is missing.
        2 env: Vec<OsString>,
        /// Absolute working directory in the container; made for a container's init where it is missing.
        3 cwd: PathBuf,
        /// Who runs it.
        4 user: User,
        /// Its capabilities.
        5 capabilities: Capabilities,
        /// PR_SET_NO_NEW_PRIVS.
        6 no_new_privileges: bool,
        /// Resource limits. What is not named is reset to the kernel's defaults, not inherited from the daemon.
        7 rlimits: Vec<Rlimit>,
        /// oom_score_adj; `None`: 0.
        8 oom_score_adj: Option<i32>,
        /// A seccomp filter as the array of `struct sock_filter`; empty: none.
        9 seccomp: Bytes,
        /// A terminal instead of pipes.
        10 terminal: bool,
        /// Columns and rows of the terminal at the start; 0: unset.
        11 terminal_size: (u16, u16),
        /// The lowest oom_score_adj that may be set is the current one: raise a lower value to it instead of failing.
        12 restrict_oom_score_adj: bool,
        /// SECCOMP_FILTER_FLAG_LOG: what the filter doesn't allow is written to the audit log.
        13 seccomp_log: bool,
        /// Without SECCOMP_FILTER_FLAG_SPEC_ALLOW: the filter brings the mitigation of speculative store bypass along.
        14 seccomp_mitigate: bool,
        /// AppArmor profile that execve changes to; empty: the one that execve itself chooses.
        15 apparmor: String,
        /// SELinux context that execve changes to, and of the process's keys; empty: what the policy's own transition gives.
        16 selinux: String,
    }

    /// Who a process runs as. Names are looked up in the container's own /etc/passwd and /etc/group, by the creator.
    pub struct User {
        /// A number; wins over `name`.
        1 uid: Option<u32>,
        /// A name, or a number as text as images have it; empty: root.
        2 name: String,
        /// A number; wins over `group`.
        3 gid: Option<u32>,
        /// A group's name, or a number as text; empty: the user's own group.
        4 group: String,
        /// Groups beside the primary one.
        5 supplemental: Vec<u32>,
        /// Whether groups of the image count.
        6 policy: GroupsPolicy,
    }

    /// The user that a name turned out to be; goes back to ContainerStatus.
    pub struct ResolvedUser {
        /// User id.
        1 uid: u32,
        /// Primary group id.
        2 gid: u32,
        /// All supplemental groups, the primary one included.
        3 groups: Vec<u32>,
        /// Home directory; `/` where /etc/passwd has none.
        4 home: PathBuf,
    }

    /// Capability sets as bit masks (capabilities(7)).
    pub struct Capabilities {
        /// Bounding set.
        1 bounding: u64,
        /// Permitted set.
        2 permitted: u64,
        /// Effective set.
        3 effective: u64,
        /// Inheritable set; empty by default (CVE-2022-29162).
        4 inheritable: u64,
        /// Ambient set.
        5 ambient: u64,
    }

    /// A resource limit (getrlimit(2)).
    pub struct Rlimit {
        /// RLIMIT_*.
        1 resource: u32,
        /// Soft limit; u64::MAX: none.
        2 soft: u64,
        /// Hard limit; u64::MAX: none.
        3 hard: u64,
    }

    /// Where a container's output goes.
    pub struct LogPlan {
        /// The pod's log directory on the host.
        1 dir: PathBuf,
        /// Path below `dir`, without `..` and symbolic links; empty: no log is written, output is drained.
        2 path: PathBuf,
        /// A line longer than this many bytes is cut into partial lines; 0: 16384.
        3 max_line: u32,
    }

    /// A process to run in a container that runs.
    pub struct ExecPlan {
        /// The process. Its seccomp filter, limits and capabilities are those of the container's init.
        1 process: Process,
        /// Milliseconds after which it and all it started are killed; 0: never.
        2 timeout_ms: u64,
    }
}

impl IdRange {
    /// The id of the host for one of the container; `None`: it has none.
    pub fn host_id(&self, container: u32) -> Option<u32> {
        let offset = container.checked_sub(self.container).filter(|offset| *offset < self.length)?;
        self.host.checked_add(offset)
    }
}

impl UserNamespace {
    /// User and group of the container's root on the host.
    pub fn root(&self) -> Option<(u32, u32)> {
        Some((self.uids.host_id(0)?, self.gids.host_id(0)?))
    }
}

impl Process {
    /// The value of an environment variable.
    pub fn env_var(&self, name: &str) -> Option<&std::ffi::OsStr> {
        use std::os::unix::ffi::OsStrExt;
        self.env.iter().find_map(|pair| {
            let rest = pair.as_bytes().strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            Some(std::ffi::OsStr::from_bytes(rest))
        })
    }
}
