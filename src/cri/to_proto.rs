//! Answers: from records to generated types.

use std::collections::HashMap;

use crate::api;
use crate::image::Image;
use crate::model::container::{ContainerSpec, Propagation};
use crate::model::lifecycle::Phase;
use crate::model::sandbox::{IdMapping, NamespaceMode, NamespaceModes, UserNamespace};
use crate::service::stats::{ContainerUsage, PodUsage};
use crate::service::{ContainerEvent, EventKind};
use crate::store::record::{ContainerRecord, SandboxRecord};

fn map(from: &std::collections::BTreeMap<String, String>) -> HashMap<String, String> {
    from.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn sandbox_metadata(record: &SandboxRecord) -> api::PodSandboxMetadata {
    let name = &record.spec.name;
    api::PodSandboxMetadata { name: name.name.clone(), uid: name.uid.clone(), namespace: name.namespace.clone(), attempt: name.attempt }
}

/// A sandbox's state.
pub fn sandbox_state(record: &SandboxRecord) -> api::PodSandboxState {
    if record.ready() { api::PodSandboxState::SandboxReady } else { api::PodSandboxState::SandboxNotready }
}

/// A container's state.
pub fn container_state(record: &ContainerRecord) -> api::ContainerState {
    match record.phase() {
        Phase::Created => api::ContainerState::ContainerCreated,
        Phase::Running => api::ContainerState::ContainerRunning,
        Phase::Exited => api::ContainerState::ContainerExited,
    }
}

/// A sandbox in a list.
pub fn sandbox(record: &SandboxRecord) -> api::PodSandbox {
    api::PodSandbox {
        id: record.id.to_string(),
        metadata: Some(sandbox_metadata(record)),
        state: sandbox_state(record).into(),
        created_at: record.created_at as i64,
        labels: map(&record.spec.labels),
        annotations: map(&record.spec.annotations),
        runtime_handler: record.spec.runtime_handler.clone(),
    }
}

fn namespaces(modes: &NamespaceModes) -> api::NamespaceOption {
    let mode = |mode| match mode {
        NamespaceMode::Pod => api::NamespaceMode::Pod.into(),
        NamespaceMode::Container => api::NamespaceMode::Container.into(),
        NamespaceMode::Node => api::NamespaceMode::Node.into(),
        NamespaceMode::Target => api::NamespaceMode::Target.into(),
    };
    api::NamespaceOption {
        network: mode(modes.network),
        pid: mode(modes.pid),
        ipc: mode(modes.ipc),
        target_id: modes.target_id.clone(),
        userns_options: match &modes.user {
            UserNamespace::Unset => None,
            UserNamespace::Node => Some(api::UserNamespace { mode: api::NamespaceMode::Node.into(), ..Default::default() }),
            UserNamespace::Pod(map) => {
                Some(api::UserNamespace { mode: api::NamespaceMode::Pod.into(), uids: vec![mapping(map)], gids: vec![mapping(map)] })
            }
        },
    }
}

fn mapping(map: &IdMapping) -> api::IdMapping {
    api::IdMapping { host_id: map.host, container_id: map.container, length: map.length }
}

/// A sandbox's status.
pub fn sandbox_status(record: &SandboxRecord) -> api::PodSandboxStatus {
    let mut ips = record.ips.iter().map(ToString::to_string);
    api::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: Some(sandbox_metadata(record)),
        state: sandbox_state(record).into(),
        created_at: record.created_at as i64,
        network: Some(api::PodSandboxNetworkStatus { ip: ips.next().unwrap_or_default(), additional_ips: ips.map(|ip| api::PodIp { ip }).collect() }),
        linux: Some(api::LinuxPodSandboxStatus { namespaces: Some(api::Namespace { options: Some(namespaces(&record.spec.namespaces)) }) }),
        labels: map(&record.spec.labels),
        annotations: map(&record.spec.annotations),
        runtime_handler: record.spec.runtime_handler.clone(),
    }
}

fn container_metadata(spec: &ContainerSpec) -> api::ContainerMetadata {
    api::ContainerMetadata { name: spec.name.clone(), attempt: spec.attempt }
}

fn image_spec(spec: &ContainerSpec) -> api::ImageSpec {
    api::ImageSpec { image: spec.image.clone(), user_specified_image: spec.user_specified_image.clone(), ..Default::default() }
}

/// A container in a list.
pub fn container(record: &ContainerRecord) -> api::Container {
    api::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.sandbox.to_string(),
        metadata: Some(container_metadata(&record.spec)),
        image: Some(image_spec(&record.spec)),
        image_ref: record.image_id.clone(),
        image_id: record.image_id.clone(),
        state: container_state(record).into(),
        created_at: record.created_at as i64,
        labels: map(&record.spec.labels),
        annotations: map(&record.spec.annotations),
    }
}

/// A container's status.
pub fn container_status(record: &ContainerRecord, pod: Option<&SandboxRecord>) -> api::ContainerStatus {
    let exit = record.exit.as_ref();
    let (uid, gid, groups) = &record.user;
    let user = api::LinuxContainerUser { uid: (*uid).into(), gid: (*gid).into(), supplemental_groups: groups.iter().map(|g| (*g).into()).collect() };
    api::ContainerStatus {
        id: record.id.to_string(),
        metadata: Some(container_metadata(&record.spec)),
        state: container_state(record).into(),
        created_at: record.created_at as i64,
        started_at: record.started_at.unwrap_or_default() as i64,
        finished_at: exit.map(|exit| exit.finished_at).unwrap_or_default() as i64,
        exit_code: exit.map(|exit| exit.code).unwrap_or_default(),
        image: Some(image_spec(&record.spec)),
        image_ref: record.image_id.clone(),
        image_id: record.image_id.clone(),
        reason: exit.map(|exit| exit.reason.clone()).unwrap_or_default(),
        message: exit.map(|exit| exit.message.clone()).unwrap_or_default(),
        labels: map(&record.spec.labels),
        annotations: map(&record.spec.annotations),
        mounts: mounts(record),
        log_path: pod.and_then(|pod| record.log_path(&pod.spec)).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        resources: Some(api::ContainerResources { linux: Some(resources(&record.spec)), windows: None }),
        user: Some(api::ContainerUser { linux: Some(user) }),
        stop_signal: signal(record.stop_signal).into(),
    }
}

fn signal(number: u32) -> api::Signal {
    let known = |candidate: &api::Signal| {
        let name = candidate.as_str_name().replace("PLUS", "+").replace("MINUS", "-");
        crate::model::signal::parse(&name) == Some(number)
    };
    (1..=65).filter_map(|n| api::Signal::try_from(n).ok()).find(known).unwrap_or(api::Signal::RuntimeDefault)
}

fn mounts(record: &ContainerRecord) -> Vec<api::Mount> {
    let mut images = record.image_volumes.iter();
    let ids = record.spec.mounts.iter().map(|mount| mount.image.as_ref().and_then(|_| images.next()).map(|image| image.id.as_str()));
    record.spec.mounts.iter().zip(ids).map(|(asked, id)| mount(asked, id.unwrap_or_default())).collect()
}

/// A mount as it was asked for; with an image the id of the one that is mounted (KEP-5365).
fn mount(mount: &crate::model::container::Mount, image_id: &str) -> api::Mount {
    let image = mount.image.as_ref().map(|image| api::ImageSpec {
        image: image.image.clone(),
        annotations: map(&image.annotations),
        user_specified_image: image.user_specified_image.clone(),
        runtime_handler: image.runtime_handler.clone(),
        image_ref: image_id.into(),
    });
    api::Mount {
        image_sub_path: mount.image.as_ref().map(|image| image.sub_path.to_string_lossy().into_owned()).unwrap_or_default(),
        image,
        container_path: mount.container_path.to_string_lossy().into_owned(),
        host_path: mount.host_path.to_string_lossy().into_owned(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: match mount.propagation {
            Propagation::Private => api::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => api::MountPropagation::PropagationHostToContainer,
            Propagation::Bidirectional => api::MountPropagation::PropagationBidirectional,
        }
        .into(),
        recursive_read_only: mount.recursive_read_only,
        uid_mappings: mount.idmap.iter().map(|(uids, _)| mapping(uids)).collect(),
        gid_mappings: mount.idmap.iter().map(|(_, gids)| mapping(gids)).collect(),
    }
}

fn resources(spec: &ContainerSpec) -> api::LinuxContainerResources {
    let r = &spec.resources;
    api::LinuxContainerResources {
        cpu_period: r.cpu_period,
        cpu_quota: r.cpu_quota,
        cpu_shares: r.cpu_shares,
        memory_limit_in_bytes: r.memory_limit,
        oom_score_adj: r.oom_score_adj,
        cpuset_cpus: r.cpuset_cpus.clone(),
        cpuset_mems: r.cpuset_mems.clone(),
        hugepage_limits: r.hugepages.iter().map(|(page_size, limit)| api::HugepageLimit { page_size: page_size.clone(), limit: *limit }).collect(),
        unified: map(&r.unified),
        memory_swap_limit_in_bytes: r.memory_swap,
    }
}

/// An image in a list or a status. A user that is a number is `uid`, any other `username`: kubelet runs neither a number out of
/// bounds nor a name where a pod must not run as root.
pub fn image(image: &Image) -> api::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let digits = !user.is_empty() && user.bytes().all(|b| b.is_ascii_digit());
    // u32::MAX means "as it is" to the kernel: no user has it.
    let uid = user.parse::<u32>().ok().filter(|uid| digits && *uid != u32::MAX);
    api::Image {
        id: image.id.clone(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        uid: uid.map(|uid| api::Int64Value { value: uid.into() }),
        username: if uid.is_some() { String::new() } else { user.into() },
        spec: Some(api::ImageSpec { image: image.id.clone(), annotations: map(&image.annotations), ..Default::default() }),
        pinned: image.pinned,
    }
}

/// One event.
pub fn event(event: &ContainerEvent) -> api::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => api::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => api::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => api::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => api::ContainerEventType::ContainerDeletedEvent,
    };
    api::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at as i64,
        pod_sandbox_status: event.sandbox.as_deref().map(sandbox_status),
        containers_statuses: event.containers.iter().map(|record| container_status(record, event.sandbox.as_deref())).collect(),
    }
}

fn value(n: u64) -> Option<api::UInt64Value> {
    Some(api::UInt64Value { value: n })
}

fn psi(psi: Option<&crate::cgroup::Pressure>) -> Option<api::PsiStats> {
    // The kernel counts microseconds, the CRI nanoseconds.
    let line = |line: &crate::cgroup::PressureShare| api::PsiData {
        total: line.total_us.saturating_mul(1000),
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    psi.map(|psi| api::PsiStats { full: Some(line(&psi.full)), some: Some(line(&psi.some)) })
}

fn cpu(usage: &crate::service::stats::Usage) -> api::CpuUsage {
    api::CpuUsage {
        timestamp: usage.at as i64,
        usage_core_nano_seconds: value(usage.cpu_ns),
        usage_nano_cores: usage.nano_cores.and_then(value),
        psi: psi(usage.cpu_psi.as_ref()),
    }
}

fn memory(usage: &crate::service::stats::Usage) -> api::MemoryUsage {
    api::MemoryUsage {
        timestamp: usage.at as i64,
        working_set_bytes: value(usage.working_set),
        available_bytes: usage.available.and_then(value),
        usage_bytes: value(usage.memory),
        rss_bytes: value(usage.rss),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: psi(usage.memory_psi.as_ref()),
    }
}

fn attributes(record: &ContainerRecord) -> api::ContainerAttributes {
    api::ContainerAttributes {
        id: record.id.to_string(),
        metadata: Some(container_metadata(&record.spec)),
        labels: map(&record.spec.labels),
        annotations: map(&record.spec.annotations),
    }
}

/// A container's stats.
pub fn container_stats(from: &ContainerUsage) -> api::ContainerStats {
    let usage = from.usage.as_ref();
    api::ContainerStats {
        attributes: Some(attributes(&from.record)),
        cpu: usage.map(cpu),
        memory: usage.map(memory),
        writable_layer: from.layer.as_ref().map(|layer| api::FilesystemUsage {
            timestamp: layer.at as i64,
            fs_id: Some(api::FilesystemIdentifier { mountpoint: layer.filesystem.mountpoint.clone() }),
            used_bytes: value(layer.bytes),
            inodes_used: value(layer.inodes),
        }),
        swap: usage.map(|usage| api::SwapUsage {
            timestamp: usage.at as i64,
            swap_available_bytes: usage.swap_available.and_then(value),
            swap_usage_bytes: value(usage.swap),
        }),
        io: usage.and_then(|usage| Some(api::IoUsage { timestamp: usage.at as i64, psi: Some(psi(Some(usage.io_psi.as_ref()?))?) })),
    }
}

/// A sandbox's stats.
pub fn sandbox_stats(from: &PodUsage) -> api::PodSandboxStats {
    let record = &from.record;
    let usage = from.usage.as_ref();
    let interface = |net: &crate::net::stats::Interface| api::NetworkInterfaceUsage {
        name: net.name.clone(),
        rx_bytes: value(net.rx_bytes),
        rx_errors: value(net.rx_errors),
        tx_bytes: value(net.tx_bytes),
        tx_errors: value(net.tx_errors),
    };
    api::PodSandboxStats {
        attributes: Some(api::PodSandboxAttributes {
            id: record.id.to_string(),
            metadata: Some(sandbox_metadata(record)),
            labels: map(&record.spec.labels),
            annotations: map(&record.spec.annotations),
        }),
        linux: Some(api::LinuxPodSandboxStats {
            cpu: usage.map(cpu),
            memory: usage.map(memory),
            network: (!from.network.is_empty()).then(|| api::NetworkUsage {
                timestamp: from.at as i64,
                default_interface: from.network.iter().find(|net| net.name == "eth0").map(interface),
                interfaces: from.network.iter().filter(|net| net.name != "eth0").map(interface).collect(),
            }),
            process: usage.map(|usage| api::ProcessUsage { timestamp: from.at as i64, process_count: value(usage.processes) }),
            containers: from.containers.iter().map(container_stats).collect(),
            io: usage.and_then(|usage| Some(api::IoUsage { timestamp: usage.at as i64, psi: psi(Some(usage.io_psi.as_ref()?)) })),
        }),
        windows: None,
    }
}
