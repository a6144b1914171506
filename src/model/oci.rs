//! A plan as an OCI runtime configuration (runtime-spec 1.3, config.json), for people and tools that know that form.
//!
//! One way only: it shows what a container was made with. The seccomp filter is left out, since a plan holds it compiled.

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::rlimit;
use crate::plan::{
    Capabilities, ContainerPlan, DeviceNode, DeviceRule, IdRange, Mount, MountKind, Namespace, Process, Propagation, ResolvedUser, Resources, Rootfs,
    capability,
};

/// The version of the specification that the configuration is written to.
pub const OCI_VERSION: &str = "1.3.0";

/// The configuration of a container: `plan` with the user that its names turned out to be, the pod's host name, and the
/// network namespace where that is pinned.
pub fn config(plan: &ContainerPlan, user: &ResolvedUser, hostname: &str, netns: Option<&Path>) -> Value {
    json!({
        "ociVersion": OCI_VERSION,
        "hostname": hostname,
        "root": { "path": root(&plan.rootfs), "readonly": plan.rootfs_readonly },
        "process": process(&plan.process, user),
        "mounts": plan.mounts.iter().map(mount).collect::<Vec<_>>(),
        "linux": {
            "namespaces": namespaces(plan, netns),
            "uidMappings": plan.user_namespace.iter().map(|map| mapping(&map.uids)).collect::<Vec<_>>(),
            "gidMappings": plan.user_namespace.iter().map(|map| mapping(&map.gids)).collect::<Vec<_>>(),
            "cgroupsPath": plan.cgroup.path,
            "resources": resources(&plan.cgroup.resources, &plan.cgroup.devices),
            "devices": plan.devices.iter().map(device).collect::<Vec<_>>(),
            "maskedPaths": plan.masked_paths,
            "readonlyPaths": plan.readonly_paths,
        },
    })
}

fn root(rootfs: &Rootfs) -> Value {
    match rootfs {
        Rootfs::None => Value::Null,
        // The overlay itself is mounted in the container alone; what it is made of stands in the snapshot.
        Rootfs::Overlay(overlay) => json!(overlay.upper),
        Rootfs::Directory(path) => json!(path),
    }
}

fn process(process: &Process, user: &ResolvedUser) -> Value {
    let texts = |list: &[OsString]| list.iter().map(|text| text.to_string_lossy().into_owned()).collect::<Vec<_>>();
    let Capabilities { bounding, permitted, effective, inheritable, ambient } = process.capabilities;
    let limits = process.rlimits.iter().map(|limit| json!({ "type": rlimit::name(limit.resource), "soft": limit.soft, "hard": limit.hard }));
    json!({
        "terminal": process.terminal,
        "args": texts(&process.args),
        "env": texts(&process.env),
        "cwd": process.cwd,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
        "capabilities": {
            "bounding": names(bounding), "permitted": names(permitted), "effective": names(effective),
            "inheritable": names(inheritable), "ambient": names(ambient),
        },
        "noNewPrivileges": process.no_new_privileges,
        "oomScoreAdj": process.oom_score_adj.unwrap_or_default(),
        "rlimits": limits.collect::<Vec<_>>(),
    })
}

fn names(mask: u64) -> Vec<String> {
    (0..).zip(capability::NAMES).filter(|(bit, _)| mask & (1_u64 << bit) != 0).map(|(_, name)| format!("CAP_{name}")).collect()
}

fn mount(mount: &Mount) -> Value {
    let (kind, source, mut options): (&str, String, Vec<String>) = match &mount.kind {
        MountKind::Bind(bind) => {
            let mut options = vec![if bind.recursive { "rbind" } else { "bind" }.to_string()];
            options.push(
                match (&bind.propagation, bind.recursive) {
                    (Propagation::Private, true) => "rprivate",
                    (Propagation::Private, false) => "private",
                    (Propagation::Slave, true) => "rslave",
                    (Propagation::Slave, false) => "slave",
                    (Propagation::Shared, true) => "rshared",
                    (Propagation::Shared, false) => "shared",
                }
                .into(),
            );
            if mount.readonly && bind.readonly_recursive {
                options.push("rro".into());
            }
            ("bind", bind.source.to_string_lossy().into_owned(), options)
        }
        MountKind::Tmpfs => ("tmpfs", "tmpfs".into(), Vec::new()),
        MountKind::Proc => ("proc", "proc".into(), Vec::new()),
        MountKind::Sysfs => ("sysfs", "sysfs".into(), Vec::new()),
        MountKind::Mqueue => ("mqueue", "mqueue".into(), Vec::new()),
        MountKind::Devpts => ("devpts", "devpts".into(), Vec::new()),
        MountKind::Cgroup => ("cgroup", "cgroup".into(), Vec::new()),
        MountKind::PodShm => ("bind", "shm".into(), vec!["rbind".into()]),
        MountKind::Image(image) => {
            let layers = image.layers.lower.iter().map(|name| image.layers.layers_dir.join(name).to_string_lossy().into_owned());
            ("overlay", "overlay".into(), vec![format!("lowerdir={}", layers.collect::<Vec<_>>().join(":"))])
        }
        MountKind::Volume(source) => ("bind", source.to_string_lossy().into_owned(), vec!["bind".into()]),
    };
    let flags = [(mount.nosuid, "nosuid"), (mount.nodev, "nodev"), (mount.noexec, "noexec"), (mount.noatime, "noatime")];
    options.extend(flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name.to_string()));
    options.push(if mount.readonly { "ro" } else { "rw" }.into());
    options.extend(mount.options.split(',').filter(|option| !option.is_empty()).map(String::from));
    json!({ "destination": mount.target, "type": kind, "source": source, "options": options })
}

fn namespaces(plan: &ContainerPlan, netns: Option<&Path>) -> Vec<Value> {
    let spaces = &plan.namespaces;
    let all = [("pid", &spaces.pid), ("network", &spaces.net), ("ipc", &spaces.ipc), ("uts", &spaces.uts), ("cgroup", &spaces.cgroup)];
    let own = all.into_iter().filter(|(_, space)| **space != Namespace::Host).map(|(name, _)| match netns {
        Some(path) if name == "network" => json!({ "type": name, "path": path }),
        _ => json!({ "type": name }),
    });
    let user = plan.user_namespace.iter().map(|_| json!({ "type": "user" }));
    own.chain([json!({ "type": "mount" })]).chain(user).collect()
}

fn mapping(range: &IdRange) -> Value {
    json!({ "containerID": range.container, "hostID": range.host, "size": range.length })
}

fn resources(limits: &Resources, rules: &[DeviceRule]) -> Value {
    let some = |pairs: Vec<(&str, Option<Value>)>| -> Map<String, Value> {
        pairs.into_iter().filter_map(|(name, value)| value.map(|value| (name.to_string(), value))).collect()
    };
    let text = |text: &str| (!text.is_empty()).then(|| json!(text));
    let cpu = some(vec![
        ("shares", limits.cpu_shares.map(Value::from)),
        ("quota", limits.cpu_quota.map(Value::from)),
        ("period", limits.cpu_period.map(Value::from)),
        ("cpus", text(&limits.cpuset_cpus)),
        ("mems", text(&limits.cpuset_mems)),
    ]);
    let memory = some(vec![("limit", limits.memory_limit.map(Value::from)), ("swap", limits.memory_swap.map(Value::from))]);
    let hugepages = limits.hugepages.iter().map(|(size, limit)| json!({ "pageSize": size, "limit": limit }));
    json!({
        "cpu": cpu,
        "memory": memory,
        "pids": some(vec![("limit", limits.pids_limit.map(Value::from))]),
        "hugepageLimits": hugepages.collect::<Vec<_>>(),
        "unified": limits.unified.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "devices": rules.iter().map(rule).collect::<Vec<_>>(),
    })
}

fn kind(code: u32) -> String {
    char::from_u32(code).map(String::from).unwrap_or_default()
}

fn rule(rule: &DeviceRule) -> Value {
    json!({ "allow": rule.allow, "type": kind(rule.kind), "major": rule.major, "minor": rule.minor, "access": rule.access })
}

fn device(node: &DeviceNode) -> Value {
    json!({
        "path": node.path, "type": kind(node.kind), "major": node.major, "minor": node.minor,
        "fileMode": node.mode, "uid": node.uid, "gid": node.gid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Bind, Namespaces};

    #[test]
    fn a_plan_is_shown_in_the_specifications_words() {
        let bind = |target: &str, readonly, readonly_recursive, propagation| Mount {
            target: target.into(),
            kind: MountKind::Bind(Bind { source: "/h".into(), recursive: true, propagation, readonly_recursive, ..Bind::default() }),
            readonly,
            ..Mount::default()
        };
        let plan = ContainerPlan {
            mounts: vec![bind("/a", true, true, Propagation::Private), bind("/b", false, false, Propagation::Shared)],
            namespaces: Namespaces { net: Namespace::Pod, pid: Namespace::Host, ..Namespaces::default() },
            process: Process {
                args: vec!["sh".into()],
                capabilities: Capabilities { effective: 1 | 1 << 21, ..Capabilities::default() },
                ..Process::default()
            },
            ..ContainerPlan::default()
        };
        let user = ResolvedUser { uid: 5, gid: 6, groups: vec![6, 7], home: "/".into() };
        let config = config(&plan, &user, "h", Some(Path::new("/run/netns/x")));
        let check = |pointer: &str, want: Value| assert_eq!(config.pointer(pointer), Some(&want), "{pointer} of {config}");
        check("/ociVersion", json!(OCI_VERSION));
        check("/process/user", json!({ "uid": 5, "gid": 6, "additionalGids": [6, 7] }));
        check("/process/capabilities/effective", json!(["CAP_CHOWN", "CAP_SYS_ADMIN"]));
        check("/mounts/0/options", json!(["rbind", "rprivate", "rro", "ro"]));
        check("/mounts/1/options", json!(["rbind", "rshared", "rw"]));
        check("/linux/namespaces/0", json!({ "type": "network", "path": "/run/netns/x" }));
        check("/hostname", json!("h"));
    }
}
