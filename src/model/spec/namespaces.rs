//! Namespaces: what of the pod's a container joins, and whether what it asks for can be.

use super::SpecError;
use crate::model::container::{ContainerSpec, Propagation};
use crate::model::sandbox::{IdMapping, NamespaceMode, SandboxSpec};
use crate::plan::{Namespace, Namespaces};

pub(super) fn namespaces(spec: &ContainerSpec, pod: &SandboxSpec, cgroup_v2: bool) -> Result<Namespaces, SpecError> {
    check_user(spec, pod)?;
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

/// The user namespace is the pod's, the container's options must say so too, and nothing may be asked for that it has no id or no right for.
fn check_user(spec: &ContainerSpec, pod: &SandboxSpec) -> Result<(), SpecError> {
    let security = &spec.security;
    let bad = |field, value: String, reason| SpecError::Field { field, value, reason };
    let (own, pods) = (security.namespaces.user.mapping(), pod.namespaces.user.mapping());
    if own != pods {
        let shown = format!("{}, where the pod has {}", show(own), show(pods));
        return Err(bad("linux.security_context.namespace_options.userns_options", shown, "is another user namespace than the pod's"));
    }
    let Some(mapping) = pods else { return Ok(()) };
    if security.namespaces.pid == NamespaceMode::Node {
        let field = "linux.security_context.namespace_options.pid";
        return Err(bad(field, "NODE".into(), "is not possible together with a user namespace of the pod's own"));
    }
    let unmapped = "is outside of the mapping of the pod's user namespace";
    let single = [("linux.security_context.run_as_user", security.run_as_user), ("linux.security_context.run_as_group", security.run_as_group)];
    let groups = security.supplemental_groups.iter().map(|group| ("linux.security_context.supplemental_groups", Some(*group)));
    for (field, id) in single.into_iter().chain(groups) {
        if let Some(id) = id.filter(|id| mapping.host_id(*id).is_none()) {
            return Err(bad(field, id.to_string(), unmapped));
        }
    }
    // The kernel makes every mount a slave that a user namespace gets from outside of it.
    if let Some(mount) = spec.mounts.iter().find(|mount| mount.propagation == Propagation::Bidirectional) {
        let shown = format!("PROPAGATION_BIDIRECTIONAL of {}", mount.container_path.display());
        return Err(bad("mounts.propagation", shown, "is not possible in a user namespace of the pod's own: no mount made there reaches the node"));
    }
    Ok(())
}

fn show(mapping: Option<IdMapping>) -> String {
    mapping.map_or_else(|| "NODE".into(), |map| format!("POD with {}:{}:{}", map.container, map.host, map.length))
}

#[cfg(test)]
mod tests {
    use super::super::tests::base;
    use super::*;
    use crate::model::container::Mount;
    use crate::model::sandbox::UserNamespace;

    #[test]
    fn what_a_container_joins() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let check = |pod: NamespaceMode, own: NamespaceMode, want: Namespace| {
            let (mut spec, _) = base();
            spec.security.namespaces.pid = own;
            spec.security.namespaces.target_id = "t".into();
            let mut sandbox = SandboxSpec::default();
            sandbox.namespaces.pid = pod;
            assert_eq!(namespaces(&spec, &sandbox, true).unwrap().pid, want, "{pod:?} {own:?}");
        };
        check(Pod, Pod, Namespace::Pod);
        check(Node, Pod, Namespace::Host);
        check(Container, Pod, Namespace::Private);
        check(Pod, Container, Namespace::Private);
        check(Container, Node, Namespace::Host);
        check(Container, Target, Namespace::Container("t".into()));
        let mut host = SandboxSpec::default();
        (host.namespaces.network, host.namespaces.ipc) = (Node, Node);
        let (mut spec, _) = base();
        let joined = namespaces(&spec, &host, true).unwrap();
        assert_eq!((joined.net, joined.ipc, joined.uts, joined.cgroup), (Namespace::Host, Namespace::Host, Namespace::Host, Namespace::Private));
        assert_eq!(namespaces(&spec, &host, false).unwrap().cgroup, Namespace::Host);
        spec.security.privileged = true;
        assert_eq!(namespaces(&spec, &host, true).unwrap().cgroup, Namespace::Host);
    }

    #[test]
    fn what_a_user_namespace_refuses() {
        let mapping = IdMapping { container: 0, host: 100_000, length: 1000 };
        let check = |change: fn(&mut ContainerSpec), words: &[&str]| {
            let (mut spec, _) = base();
            spec.security.namespaces.user = UserNamespace::Pod(mapping);
            let mut sandbox = SandboxSpec::default();
            sandbox.namespaces.user = UserNamespace::Pod(mapping);
            change(&mut spec);
            let result = namespaces(&spec, &sandbox, true);
            match words {
                [] => assert!(result.is_ok(), "{result:?}"),
                words => {
                    let error = result.unwrap_err().to_string();
                    words.iter().for_each(|word| assert!(error.contains(word), "{error} lacks {word}"));
                }
            }
        };
        check(|_| {}, &[]);
        check(|spec| spec.security.run_as_user = Some(999), &[]);
        check(|spec| spec.security.namespaces.user = UserNamespace::Unset, &["userns_options", "NODE", "0:100000:1000"]);
        let other = |spec: &mut ContainerSpec| spec.security.namespaces.user = UserNamespace::Pod(IdMapping { container: 0, host: 1, length: 1000 });
        check(other, &["userns_options", "0:1:1000", "0:100000:1000"]);
        check(|spec| spec.security.namespaces.pid = NamespaceMode::Node, &["namespace_options.pid", "NODE"]);
        check(|spec| spec.security.run_as_user = Some(1000), &["run_as_user", "1000", "mapping"]);
        check(|spec| spec.security.run_as_group = Some(5000), &["run_as_group", "5000"]);
        check(|spec| spec.security.supplemental_groups = vec![1, 70000], &["supplemental_groups", "70000"]);
        let both = |spec: &mut ContainerSpec| spec.mounts = vec![Mount { propagation: Propagation::Bidirectional, ..Mount::default() }];
        check(both, &["mounts.propagation", "BIDIRECTIONAL"]);
    }
}
