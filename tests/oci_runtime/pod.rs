//! Sandboxes: namespaces that containers share, the pod's /dev/shm, the pause process.

use std::os::fd::AsFd;

use copepod::errchain::Kind;
use copepod::oci::create::PodFds;
use copepod::plan::*;

use super::driver::*;

pub const TESTS: &[super::Test] = &[
    ("containers_share_the_pods_namespaces", containers_share_the_pods_namespaces),
    ("a_pod_without_anything_of_its_own", a_pod_without_anything_of_its_own),
    ("pause_is_the_pods_init", pause_is_the_pods_init),
    ("a_container_joins_anothers_pid_namespace", a_container_joins_anothers_pid_namespace),
    ("sysctls_are_set_in_the_pod_alone", sysctls_are_set_in_the_pod_alone),
];

pub fn sandbox() -> SandboxPlan {
    SandboxPlan {
        id: "p".into(),
        hostname: "pod-1".into(),
        new_net: true,
        new_ipc: true,
        new_uts: true,
        shm_bytes: 8 << 20,
        ..SandboxPlan::default()
    }
}

/// A container of a pod, with its namespaces and /dev/shm.
pub fn in_pod(lab: &Lab, script: &str, pid: Namespace) -> ContainerPlan {
    let mut plan = lab.plan(script);
    plan.namespaces = Namespaces { net: Namespace::Pod, ipc: Namespace::Pod, uts: Namespace::Pod, pid, cgroup: plan.namespaces.cgroup };
    let shm = plan.mounts.iter_mut().find(|mount| mount.target.ends_with("shm")).unwrap();
    *shm = mount("/dev/shm", MountKind::PodShm);
    plan
}

fn containers_share_the_pods_namespaces(lab: &Lab) {
    let pod = lab.pod(&sandbox()).unwrap();
    let script = "hostname; for kind in net ipc uts; do readlink /proc/self/ns/$kind; done; ip addr show lo | grep -o 'inet 127.0.0.1/8'; \
                  stat -c %a /dev/shm; df -k /dev/shm | awk 'END { print $2 }'; cat /dev/shm/note; echo here >/dev/shm/note; echo $$";
    let first = lab.run_in(&pod.fds(), in_pod(lab, script, Namespace::Private)).unwrap();
    assert_eq!(first.lines()[0], "pod-1", "{}", first.stderr);
    assert_eq!(first.lines()[4..], ["inet 127.0.0.1/8", "1777", "8192", "1"], "{}", first.stderr);
    let second = lab.run_in(&pod.fds(), in_pod(lab, script, Namespace::Private)).unwrap();
    assert_eq!(second.lines()[..4], first.lines()[..4]);
    assert_eq!(second.lines()[7], "here");
    // Read-only in one container alone.
    let mut plan = in_pod(lab, "echo x >/dev/shm/x; cat /dev/shm/note", Namespace::Private);
    plan.mounts.last_mut().unwrap().readonly = true;
    let third = lab.run_in(&pod.fds(), plan).unwrap();
    assert_eq!(third.lines(), ["here"]);
    assert!(third.stderr.contains("Read-only"), "{}", third.stderr);
    let none = lab.run_in(&PodFds { staging: None, ..pod.fds() }, in_pod(lab, "true", Namespace::Private));
    fails(none, Kind::InvalidArgument, "no /dev/shm of its own");
}

fn a_pod_without_anything_of_its_own(lab: &Lab) {
    let pod = lab.pod(&SandboxPlan::default()).unwrap();
    let ns = &pod.namespaces;
    assert!(ns.net.is_none() && ns.ipc.is_none() && ns.uts.is_none() && ns.pid.is_none() && ns.staging.is_none() && ns.pause.is_none());
}

fn pause_is_the_pods_init(lab: &Lab) {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGKILL] {
        let pod = lab.pod(&SandboxPlan { shared_pid: true, ..sandbox() }).unwrap();
        let script = "cat /proc/1/comm; grep -E '^Cap|NoNewPrivs' /proc/1/status | tr -d '\\t'; (sleep 0.01 &); while ps -o comm | grep -q '^sleep'; do :; done; echo reaped; \
                      test $$ -ne 1 && echo not init";
        let output = lab.run_in(&pod.fds(), in_pod(lab, script, Namespace::Pod)).unwrap();
        let none = "0000000000000000";
        let want: Vec<String> = ["pause".to_string()]
            .into_iter()
            .chain(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| format!("{set}:{none}")))
            .chain(["NoNewPrivs:1".to_string(), "reaped".to_string(), "not init".to_string()])
            .collect();
        assert_eq!(output.lines(), want, "{}", output.stderr);
        let (pid, _) = pod.namespaces.pause.as_ref().unwrap();
        assert_eq!(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 0, "pause has descriptors");
        assert_eq!(std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0, "pause has a root");
        let ended = pod.stop(signal).unwrap();
        let killed = signal == libc::SIGKILL;
        assert_eq!(ended, Ended { code: if killed { 137 } else { 0 }, signal: if killed { 9 } else { 0 } });
    }
}

fn a_container_joins_anothers_pid_namespace(lab: &Lab) {
    let pod = lab.pod(&sandbox()).unwrap();
    let mut target = lab.create_in(&pod.fds(), in_pod(lab, "echo up; exec sleep 1000", Namespace::Private)).unwrap();
    target.start().unwrap();
    assert_eq!(target.line(), "up");
    let fds = PodFds { target: Some(target.init.pidfd.as_fd()), ..pod.fds() };
    let output = lab.run_in(&fds, in_pod(lab, "tr '\\0' ' ' </proc/1/cmdline", Namespace::Container("t".into()))).unwrap();
    assert_eq!(output.stdout, "sleep 1000 ");
    fails(lab.run_in(&pod.fds(), in_pod(lab, "true", Namespace::Container("t".into()))), Kind::FailedPrecondition, "of container t");
    lab.delete(target);
}

fn sysctls_are_set_in_the_pod_alone(lab: &Lab) {
    let set = |list: &[(&str, &str)]| SandboxPlan { sysctls: list.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(), ..sandbox() };
    let before = std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").unwrap();
    let pod = lab.pod(&set(&[("kernel.shm_rmid_forced", "1"), ("fs.mqueue.msg_max", "12"), ("net.ipv4.ip_local_port_range", "5000 6000")])).unwrap();
    let script = "cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max; cat net/ipv4/ip_local_port_range";
    let output = lab.run_in(&pod.fds(), in_pod(lab, script, Namespace::Private)).unwrap();
    assert_eq!(output.stdout, "1\n12\n5000\t6000\n", "{}", output.stderr);
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").unwrap(), before);
    for name in ["kernel.core_pattern", "vm.max_map_count", "net/../kernel/core_pattern", "kernel.shm_rmid_forced+kernel.core_pattern"] {
        fails(lab.pod(&set(&[(name, "x")])), Kind::InvalidArgument, "is no name of a sysctl");
    }
    fails(lab.pod(&SandboxPlan { new_net: false, ..set(&[("net.ipv4.ip_forward", "1")]) }), Kind::InvalidArgument, "net.ipv4.ip_forward");
    fails(lab.pod(&set(&[("net.ipv4.no_such_thing", "1")])), Kind::Internal, "cannot set sysctl net.ipv4.no_such_thing to \"1\"");
}
