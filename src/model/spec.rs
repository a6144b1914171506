//! From what is asked for to what is done: a container, its pod and its image become a [`ContainerPlan`]. Pure.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::container::{ContainerSpec, GroupsPolicy, Propagation, SecurityProfile};
use super::sandbox::{NamespaceMode, SandboxSpec};
use crate::errchain::{Kind, Kinded};
use crate::plan::{
    self, Bind, Capabilities, CgroupPlan, ContainerPlan, DeviceNode, DeviceRule, LogPlan, Mount, MountKind, Namespace, Namespaces, Overlay, Process,
    Rlimit, Rootfs, User, capability,
};
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

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The mask of capabilities that a container has. `ALL` in either list is taken first, then single names.
pub fn capabilities(spec: &ContainerSpec, defaults: u64) -> Result<u64, SpecError> {
    let security = &spec.security;
    if security.privileged {
        return Ok(capability::ALL);
    }
    let parse = |names: &[String]| -> Result<(bool, u64), SpecError> {
        names.iter().try_fold((false, 0), |(all, mask), name| match capability::parse(name) {
            Some(capability::ALL) => Ok((true, mask)),
            Some(bit) => Ok((all, mask | bit)),
            None => Err(SpecError::Capability(name.clone())),
        })
    };
    let (add_all, add) = parse(&security.add_capabilities)?;
    let (drop_all, drop) = parse(&security.drop_capabilities)?;
    let mut mask = defaults;
    if add_all {
        mask = capability::ALL;
    }
    if drop_all {
        mask = 0;
    }
    Ok((mask | add) & !drop)
}

/// The whole plan.
pub fn plan(spec: &ContainerSpec, pod: &SandboxSpec, image: &ImageDefaults, around: Surroundings) -> Result<ContainerPlan, SpecError> {
    let security = &spec.security;
    let mask = capabilities(spec, around.default_capabilities)? & around.available_capabilities;
    let ambient = security
        .add_ambient_capabilities
        .iter()
        .try_fold(0, |sum, name| capability::parse(name).map(|bit| sum | bit).ok_or_else(|| SpecError::Capability(name.clone())))?
        & around.available_capabilities;
    let process = Process {
        args: args(spec, image)?,
        env: env(spec, image, &around.hostname),
        cwd: cwd(spec, image)?,
        user: user(spec, image)?,
        capabilities: Capabilities { bounding: mask | ambient, permitted: mask | ambient, effective: mask | ambient, inheritable: ambient, ambient },
        no_new_privileges: security.no_new_privs,
        rlimits: around.rlimits,
        oom_score_adj: Some(oom_score_adj(spec)?),
        seccomp: Bytes(around.seccomp),
        terminal: spec.tty,
        terminal_size: (0, 0),
        restrict_oom_score_adj: around.restrict_oom_score_adj,
    };
    let (masked, readonly) = if security.privileged { (Vec::new(), Vec::new()) } else { paths(spec)? };
    let mut devices = default_rules(security.privileged);
    for (node, access) in &around.devices {
        if !security.privileged {
            devices.push(DeviceRule { allow: true, kind: node.kind, major: Some(node.major), minor: Some(node.minor), access: access.clone() });
        }
    }
    Ok(ContainerPlan {
        id: around.id,
        rootfs: Rootfs::Overlay(around.rootfs),
        rootfs_readonly: security.readonly_rootfs,
        mounts: mounts(spec, pod, &around.pod_files)?,
        namespaces: namespaces(spec, pod, around.cgroup_v2)?,
        cgroup: CgroupPlan { path: around.cgroup, resources: resources(spec, around.pids_limit), devices },
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
    })
}

fn args(spec: &ContainerSpec, image: &ImageDefaults) -> Result<Vec<OsString>, SpecError> {
    // As in Docker and both peers: a command of the request leaves the image's arguments out too.
    let (command, args) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (true, true) => (&image.entrypoint, &image.cmd),
        (true, false) => (&image.entrypoint, &spec.args),
        (false, _) => (&spec.command, &spec.args),
    };
    let all: Vec<OsString> = command.iter().chain(args).map(OsString::from).collect();
    if all.is_empty() || all[0].is_empty() { Err(SpecError::NoCommand { image: image.name.clone() }) } else { Ok(all) }
}

fn env(spec: &ContainerSpec, image: &ImageDefaults, hostname: &str) -> Vec<OsString> {
    let mut env: Vec<(&str, &[u8])> = vec![("PATH", DEFAULT_PATH)];
    if spec.tty {
        env.push(("TERM", b"xterm"));
    }
    env.push(("HOSTNAME", hostname.as_bytes()));
    let from_image = image.env.iter().filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name, value.as_bytes()));
    let from_request = spec.envs.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    for (name, value) in from_image.filter(|(name, _)| !name.is_empty()).chain(from_request) {
        match env.iter_mut().find(|(old, _)| *old == name) {
            Some(pair) => pair.1 = value,
            None => env.push((name, value)),
        }
    }
    env.into_iter().map(|(name, value)| OsString::from_vec([name.as_bytes(), b"=", value].concat())).collect()
}

fn cwd(spec: &ContainerSpec, image: &ImageDefaults) -> Result<PathBuf, SpecError> {
    let dir = [&spec.working_dir, &image.working_dir].into_iter().find(|dir| !dir.is_empty()).map_or("/", String::as_str);
    absolute("working_dir", dir)
}

fn user(spec: &ContainerSpec, image: &ImageDefaults) -> Result<User, SpecError> {
    let security = &spec.security;
    let (image_user, image_group) = image.user.split_once(':').unwrap_or((&image.user, ""));
    let from_request = security.run_as_user.is_some() || !security.run_as_username.is_empty();
    if security.run_as_group.is_some() && !from_request && image.user.is_empty() {
        return Err(SpecError::Field {
            field: "linux.security_context.run_as_group",
            value: security.run_as_group.unwrap_or_default().to_string(),
            reason: "is set without run_as_user or run_as_username, and the image names no user",
        });
    }
    let (name, group) = if from_request { (security.run_as_username.as_str(), "") } else { (image_user, image_group) };
    Ok(User {
        uid: security.run_as_user,
        name: name.into(),
        gid: security.run_as_group,
        group: group.into(),
        supplemental: security.supplemental_groups.clone(),
        policy: match security.groups_policy {
            GroupsPolicy::Merge => plan::GroupsPolicy::Merge,
            GroupsPolicy::Strict => plan::GroupsPolicy::Strict,
        },
    })
}

fn oom_score_adj(spec: &ContainerSpec) -> Result<i32, SpecError> {
    let value = spec.resources.oom_score_adj;
    i32::try_from(value).ok().filter(|n| (-1000..=1000).contains(n)).ok_or_else(|| SpecError::Field {
        field: "linux.resources.oom_score_adj",
        value: value.to_string(),
        reason: "is not -1000 to 1000",
    })
}

fn absolute(field: &'static str, path: &str) -> Result<PathBuf, SpecError> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(path.into())
    } else {
        Err(SpecError::Field { field, value: path.into(), reason: "is not an absolute path" })
    }
}

fn paths(spec: &ContainerSpec) -> Result<(Vec<PathBuf>, Vec<PathBuf>), SpecError> {
    let all = |field, list: &[String]| list.iter().map(|path| absolute(field, path)).collect::<Result<Vec<_>, _>>();
    Ok((
        all("linux.security_context.masked_paths", &spec.security.masked_paths)?,
        all("linux.security_context.readonly_paths", &spec.security.readonly_paths)?,
    ))
}

fn resources(spec: &ContainerSpec, pids_limit: Option<i64>) -> plan::Resources {
    let r = &spec.resources;
    let set = |n: i64| (n != 0).then_some(n);
    plan::Resources {
        cpu_shares: u64::try_from(r.cpu_shares).ok().filter(|n| *n != 0),
        cpu_quota: set(r.cpu_quota),
        cpu_period: u64::try_from(r.cpu_period).ok().filter(|n| *n != 0),
        cpuset_cpus: r.cpuset_cpus.clone(),
        cpuset_mems: r.cpuset_mems.clone(),
        memory_limit: set(r.memory_limit),
        // Without a swap limit of its own a container with a memory limit gets no swap, as kubelet's NoSwap expects.
        memory_swap: set(r.memory_swap).or(set(r.memory_limit)),
        pids_limit,
        hugepages: r.hugepages.clone(),
        unified: r.unified.clone().into_iter().collect(),
    }
}

fn namespaces(spec: &ContainerSpec, pod: &SandboxSpec, cgroup_v2: bool) -> Result<Namespaces, SpecError> {
    let pod_or_host = |mode| if mode == NamespaceMode::Node { Namespace::Host } else { Namespace::Pod };
    let wanted = &spec.security.namespaces;
    let pid = match wanted.pid {
        NamespaceMode::Node => Namespace::Host,
        NamespaceMode::Pod if pod.namespaces.pid == NamespaceMode::Pod => Namespace::Pod,
        NamespaceMode::Pod if pod.namespaces.pid == NamespaceMode::Node => Namespace::Host,
        NamespaceMode::Pod | NamespaceMode::Container => Namespace::Private,
        NamespaceMode::Target => Namespace::Container(wanted.target_id.clone()),
    };
    Ok(Namespaces {
        net: pod_or_host(pod.namespaces.network),
        ipc: pod_or_host(pod.namespaces.ipc),
        // The host name belongs to the network: a pod on the node's network has the node's.
        uts: pod_or_host(pod.namespaces.network),
        pid,
        cgroup: if cgroup_v2 && !spec.security.privileged { Namespace::Private } else { Namespace::Host },
    })
}

fn default_rules(privileged: bool) -> Vec<DeviceRule> {
    let any = u32::from(b'a');
    let chr = u32::from(b'c');
    if privileged {
        return vec![DeviceRule { allow: true, kind: any, major: None, minor: None, access: "rwm".into() }];
    }
    let mut rules = vec![
        DeviceRule { allow: false, kind: any, major: None, minor: None, access: "rwm".into() },
        // mknod alone is harmless: what is made can't be opened.
        DeviceRule { allow: true, kind: chr, major: None, minor: None, access: "m".into() },
        DeviceRule { allow: true, kind: u32::from(b'b'), major: None, minor: None, access: "m".into() },
    ];
    // null, zero, full, random, urandom, tty, console, ptmx, the pty slaves (devices.txt of the kernel).
    for (major, minor) in
        [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(1)), (5, Some(2)), (136, None)]
    {
        rules.push(DeviceRule { allow: true, kind: chr, major: Some(major), minor, access: "rwm".into() });
    }
    rules
}

fn mounts(spec: &ContainerSpec, pod: &SandboxSpec, pod_files: &[(PathBuf, PathBuf)]) -> Result<Vec<Mount>, SpecError> {
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

/// Which seccomp filter a container gets.
pub fn seccomp_profile(spec: &ContainerSpec) -> &SecurityProfile {
    if spec.security.privileged { &SecurityProfile::Unconfined } else { &spec.security.seccomp }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> (ContainerSpec, ImageDefaults) {
        let spec = ContainerSpec { command: vec!["sh".into()], ..ContainerSpec::default() };
        (spec, ImageDefaults { name: "img".into(), ..ImageDefaults::default() })
    }

    #[test]
    fn command_and_arguments_merge_as_docker_does() {
        let check = |command: &[&str], args_: &[&str], want: &[&str]| {
            let list = |l: &[&str]| l.iter().map(|s| s.to_string()).collect::<Vec<_>>();
            let spec = ContainerSpec { command: list(command), args: list(args_), ..ContainerSpec::default() };
            let image = ImageDefaults { entrypoint: list(&["e"]), cmd: list(&["c"]), ..ImageDefaults::default() };
            assert_eq!(args(&spec, &image).unwrap(), want.iter().map(OsString::from).collect::<Vec<_>>());
        };
        check(&[], &[], &["e", "c"]);
        check(&[], &["a"], &["e", "a"]);
        check(&["x"], &[], &["x"]);
        check(&["x"], &["a"], &["x", "a"]);
        let none = args(&ContainerSpec::default(), &ImageDefaults { name: "img".into(), ..ImageDefaults::default() });
        assert_eq!(none, Err(SpecError::NoCommand { image: "img".into() }));
    }

    #[test]
    fn capabilities_add_and_drop() {
        let bit = |name| capability::parse(name).unwrap();
        let check = |add: &[&str], drop: &[&str], want: u64| {
            let (mut spec, _) = base();
            spec.security.add_capabilities = add.iter().map(|s| s.to_string()).collect();
            spec.security.drop_capabilities = drop.iter().map(|s| s.to_string()).collect();
            assert_eq!(capabilities(&spec, bit("CHOWN") | bit("KILL")).unwrap(), want, "+{add:?} -{drop:?}");
        };
        check(&[], &[], bit("CHOWN") | bit("KILL"));
        check(&["NET_ADMIN"], &["CHOWN"], bit("KILL") | bit("NET_ADMIN"));
        check(&["ALL"], &["CHOWN"], capability::ALL & !bit("CHOWN"));
        check(&["CHOWN"], &["ALL"], bit("CHOWN"));
        check(&["ALL"], &["ALL"], 0);
        let (mut spec, _) = base();
        spec.security.add_capabilities = vec!["FLY".into()];
        assert_eq!(capabilities(&spec, 0), Err(SpecError::Capability("FLY".into())));
    }

    #[test]
    fn environment_is_overridden_in_order() {
        let (mut spec, mut image) = base();
        image.env = vec!["PATH=/i".into(), "A=image".into(), "=bad".into(), "bad".into()];
        spec.envs = vec![("A".into(), b"request=x".to_vec()), ("B".into(), Vec::new())];
        let env: Vec<_> = env(&spec, &image, "h").into_iter().map(|v| v.into_string().unwrap()).collect();
        assert_eq!(env, ["PATH=/i", "HOSTNAME=h", "A=request=x", "B="]);
    }

    #[test]
    fn users_come_from_the_request_or_the_image() {
        let (mut spec, mut image) = base();
        image.user = "web:data".into();
        let u = user(&spec, &image).unwrap();
        assert_eq!((u.name.as_str(), u.group.as_str(), u.uid), ("web", "data", None));
        spec.security.run_as_user = Some(5);
        let u = user(&spec, &image).unwrap();
        assert_eq!((u.name.as_str(), u.group.as_str(), u.uid), ("", "", Some(5)));
        let (mut spec, image) = base();
        spec.security.run_as_group = Some(5);
        assert!(user(&spec, &image).unwrap_err().to_string().contains("run_as_group"));
    }

    #[test]
    fn kubelets_mounts_replace_ours_and_are_ordered_by_depth() {
        let (mut spec, _) = base();
        let mount = |target: &str| super::super::container::Mount { container_path: target.into(), host_path: "/h".into(), ..Default::default() };
        spec.mounts = vec![mount("/a/b"), mount("/a"), mount("/etc/hosts")];
        let files = [(PathBuf::from("/etc/hosts"), PathBuf::from("/pod/hosts")), (PathBuf::from("/etc/hostname"), PathBuf::from("/pod/hostname"))];
        let all = mounts(&spec, &SandboxSpec::default(), &files).unwrap();
        let targets: Vec<_> = all.iter().map(|m| m.target.to_str().unwrap()).collect();
        assert_eq!(targets[targets.len() - 4..], ["/a", "/etc/hostname", "/a/b", "/etc/hosts"]);
    }
}
