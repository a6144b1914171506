//! What people and their tools see of pods, containers and the runtime itself beyond the CRI's fields: `crictl inspect`,
//! `inspectp` and `info`. Keys are those that other runtimes' users know, where they mean the same.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use super::{Container, Sandbox, Service};
use crate::errchain::Chain;
use crate::model::oci;
use crate::plan::{ResolvedUser, Rootfs, capability};

/// statfs(2)'s f_type of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

impl Service {
    /// Can containers run? What kubelet sees as RuntimeReady.
    pub fn check_runtime(&self) -> Result<(), String> {
        let monitor = &self.program.path;
        match std::fs::metadata(monitor) {
            Ok(meta) if meta.is_file() && meta.mode() & 0o111 != 0 => {}
            Ok(_) => return Err(format!("monitor program {} is not executable", monitor.display())),
            Err(error) => return Err(format!("monitor program {}: {error}", monitor.display())),
        }
        writable("state", &self.config.state)?;
        writable("root", &self.config.root)
    }

    /// A sandbox.
    pub fn sandbox_info(&self, sandbox: &Sandbox) -> Value {
        let record = sandbox.record();
        json!({
            "sandboxID": record.id,
            // Without a shared PID namespace there is no process that the pod's namespaces could be named by.
            "pid": record.pause.map_or(0, |pause| pause.pid),
            "monitorPid": record.monitor.pid,
            "monitorRuns": sandbox.monitor().is_some(),
            "netns": record.netns,
            "cniResult": record.cni_result,
            "cgroupPath": record.cgroup_parent,
            "runtimeHandler": record.spec.runtime_handler,
            "config": record.spec,
            "stoppedAt": record.stopped_at,
            "networkReleased": record.network_released,
        })
    }

    /// A container.
    pub fn container_info(&self, container: &Container) -> Value {
        let record = container.record();
        let pod = self.sandbox_of(&record).ok().map(|sandbox| sandbox.record());
        let (uid, gid, groups) = record.user.clone();
        let user = ResolvedUser { uid, gid, groups, ..ResolvedUser::default() };
        let hostname = pod.as_ref().map_or("", |pod| pod.spec.hostname.as_str());
        let netns = pod.as_ref().and_then(|pod| pod.netns.as_deref());
        let (spec, snapshot) = match self.plan_of(&record.id) {
            Ok(plan) => {
                let snapshot = match &plan.rootfs {
                    Rootfs::Overlay(overlay) => json!({
                        "upper": overlay.upper,
                        "work": overlay.work,
                        "lower": overlay.lower.iter().map(|layer| overlay.layers_dir.join(layer)).collect::<Vec<_>>(),
                    }),
                    Rootfs::Directory(_) | Rootfs::None => Value::Null,
                };
                (oci::config(&plan, &user, hostname, netns), snapshot)
            }
            // Shown instead of the configuration, so that the rest can be seen.
            Err(error) => (json!({ "error": Chain(&error).to_string() }), Value::Null),
        };
        json!({
            "sandboxID": record.sandbox,
            "pid": if record.exit.is_some() { 0 } else { record.pid },
            "cgroupPath": record.cgroup,
            "snapshotter": "overlayfs",
            "snapshotKey": record.id,
            "snapshot": snapshot,
            "image": record.image_id,
            "user": { "uid": record.user.0, "gid": record.user.1, "additionalGids": record.user.2 },
            "stopSignal": record.stop_signal,
            "privileged": record.spec.security.privileged,
            "config": record.spec,
            "runtimeType": "embedded",
            "runtimeSpec": spec,
            "exit": record.exit.as_ref().map(|exit| json!({
                "code": exit.code, "reason": exit.reason, "message": exit.message, "finishedAt": exit.finished_at,
            })),
        })
    }

    /// The runtime: one JSON text for each key.
    pub fn runtime_info(&self) -> Vec<(&'static str, Value)> {
        let network = match self.networks.ready() {
            Ok(()) => json!({ "ready": true }),
            Err(not) => json!({ "ready": false, "reason": not.to_string() }),
        };
        let capabilities = (0..).zip(capability::NAMES).filter(|(bit, _)| self.available_capabilities & (1_u64 << bit) != 0);
        vec![
            ("config", json!(self.config)),
            ("cni", json!({ "confDir": self.config.network.cni_conf_dir, "binDirs": self.config.network.cni_bin_dirs, "status": network })),
            (
                "node",
                json!({
                    "cgroupVersion": if self.hierarchy.is_v2() { 2 } else { 1 },
                    "capabilities": capabilities.map(|(_, name)| name).collect::<Vec<_>>(),
                    "restrictOomScoreAdj": self.restrict_oom_score_adj,
                    "stateOnTmpfs": rustix::fs::statfs(&self.config.state).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC),
                }),
            ),
            // What registries.conf said before is in force.
            ("registries", json!({ "problem": self.images.problem() })),
            ("counts", json!({ "sandboxes": self.sandboxes().len(), "containers": self.containers().len(), "eventsLost": self.n_events_lost() })),
        ]
    }
}

/// Whether a directory of ours is there and on a filesystem that can be written; one that turned read-only after an I/O
/// error says so here. Asks the mounted filesystem, and never its device.
fn writable(what: &str, dir: &Path) -> Result<(), String> {
    let mounted = rustix::fs::statvfs(dir).map_err(|error| format!("{what} directory {}: {error}", dir.display()))?;
    if mounted.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Err(format!("{what} directory {} is on a read-only filesystem", dir.display()));
    }
    Ok(())
}
