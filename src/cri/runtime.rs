//! RuntimeService: one thin handler per RPC.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::chunks::{Streaming, chunked};
use super::{Cri, Reply, events, from_proto, later, metrics, rpc, status, to_proto};
use crate::api::{self, runtime_service_server::RuntimeService};
use crate::service::ServiceError;
use crate::store::record::{ContainerRecord, SandboxRecord};
use crate::stream::{AttachAsk, ExecAsk, PortForwardAsk};

/// The version of the API that `Version` names.
const API_VERSION: &str = "v1";

fn labels_match(selector: &HashMap<String, String>, labels: &std::collections::BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn sandbox_passes(filter: &api::PodSandboxFilter, record: &SandboxRecord) -> bool {
    record.id.as_str().starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|state| state.state == i32::from(to_proto::sandbox_state(record)))
        && labels_match(&filter.label_selector, &record.spec.labels)
}

fn container_passes(filter: &api::ContainerFilter, record: &ContainerRecord) -> bool {
    record.id.as_str().starts_with(&filter.id)
        && record.sandbox.as_str().starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|state| state.state == i32::from(to_proto::container_state(record)))
        && labels_match(&filter.label_selector, &record.spec.labels)
}

impl Cri {
    fn refuse(rpc: &'static str) -> impl FnOnce(ServiceError) -> Status {
        move |error| status(rpc, &error.remote())
    }

    /// The newest first.
    fn sandboxes(&self, filter: Option<api::PodSandboxFilter>) -> Vec<api::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let mut records: Vec<_> = self.service.sandboxes().iter().map(|sandbox| sandbox.record()).collect();
        records.retain(|record| sandbox_passes(&filter, record));
        records.sort_by_key(|record| std::cmp::Reverse(record.created_at));
        records.iter().map(|record| to_proto::sandbox(record)).collect()
    }

    /// The newest first.
    fn containers(&self, filter: Option<api::ContainerFilter>) -> Vec<api::Container> {
        let filter = filter.unwrap_or_default();
        let mut records: Vec<_> = self.service.containers().iter().map(|container| container.record()).collect();
        records.retain(|record| container_passes(&filter, record));
        records.sort_by_key(|record| std::cmp::Reverse(record.created_at));
        records.iter().map(|record| to_proto::container(record)).collect()
    }

    async fn container_usages(&self, filter: Option<api::ContainerStatsFilter>) -> Vec<api::ContainerStats> {
        let api::ContainerStatsFilter { id, pod_sandbox_id, label_selector } = filter.unwrap_or_default();
        let filter = api::ContainerFilter { id, pod_sandbox_id, label_selector, state: None };
        let mut chosen = self.service.containers();
        chosen.retain(|container| container_passes(&filter, &container.record()));
        self.service.container_usages(chosen).await.iter().map(to_proto::container_stats).collect()
    }

    async fn pod_usages(&self, filter: Option<api::PodSandboxStatsFilter>) -> Vec<api::PodSandboxStats> {
        let api::PodSandboxStatsFilter { id, label_selector } = filter.unwrap_or_default();
        let filter = api::PodSandboxFilter { id, label_selector, state: None };
        let mut chosen = self.service.sandboxes();
        chosen.retain(|sandbox| sandbox_passes(&filter, &sandbox.record()));
        self.service.pod_usages(chosen).await.iter().map(to_proto::sandbox_stats).collect()
    }

    async fn pod_metrics(&self) -> Vec<api::PodSandboxMetrics> {
        self.service.metrics().await.into_iter().map(metrics::pod).collect()
    }
}

#[tonic::async_trait]
impl RuntimeService for Cri {
    async fn version(&self, _: Request<api::VersionRequest>) -> Reply<api::VersionResponse> {
        Ok(Response::new(api::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "copepod".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: API_VERSION.into(),
        }))
    }

    async fn run_pod_sandbox(&self, req: Request<api::RunPodSandboxRequest>) -> Reply<api::RunPodSandboxResponse> {
        let req = req.into_inner();
        let spec = from_proto::sandbox(req.config, req.runtime_handler).map_err(|error| status("RunPodSandbox", &error))?;
        let service = self.service.clone();
        let id = rpc("RunPodSandbox", async move { service.run_sandbox(spec).await }).await?;
        Ok(Response::new(api::RunPodSandboxResponse { pod_sandbox_id: id.to_string() }))
    }

    async fn stop_pod_sandbox(&self, req: Request<api::StopPodSandboxRequest>) -> Reply<api::StopPodSandboxResponse> {
        let (service, id) = (self.service.clone(), req.into_inner().pod_sandbox_id);
        rpc("StopPodSandbox", async move { service.stop_sandbox(&id).await }).await?;
        Ok(Response::new(api::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, req: Request<api::RemovePodSandboxRequest>) -> Reply<api::RemovePodSandboxResponse> {
        let (service, id) = (self.service.clone(), req.into_inner().pod_sandbox_id);
        rpc("RemovePodSandbox", async move { service.remove_sandbox(&id).await }).await?;
        Ok(Response::new(api::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, req: Request<api::PodSandboxStatusRequest>) -> Reply<api::PodSandboxStatusResponse> {
        let req = req.into_inner();
        let sandbox = self.service.find_sandbox(&req.pod_sandbox_id).map_err(Self::refuse("PodSandboxStatus"))?;
        let record = sandbox.record();
        let containers = self.service.containers_of(&record.id);
        Ok(Response::new(api::PodSandboxStatusResponse {
            status: Some(to_proto::sandbox_status(&record)),
            info: verbose(req.verbose, || self.service.sandbox_info(&sandbox)),
            containers_statuses: containers.iter().map(|container| to_proto::container_status(&container.record(), Some(&record))).collect(),
            timestamp: crate::service::now() as i64,
        }))
    }

    async fn list_pod_sandbox(&self, req: Request<api::ListPodSandboxRequest>) -> Reply<api::ListPodSandboxResponse> {
        Ok(Response::new(api::ListPodSandboxResponse { items: self.sandboxes(req.into_inner().filter) }))
    }

    async fn create_container(&self, req: Request<api::CreateContainerRequest>) -> Reply<api::CreateContainerResponse> {
        let req = req.into_inner();
        let spec = from_proto::container(req.config).map_err(|error| status("CreateContainer", &error))?;
        let service = self.service.clone();
        let id = rpc("CreateContainer", async move { service.create_container(&req.pod_sandbox_id, spec).await }).await?;
        Ok(Response::new(api::CreateContainerResponse { container_id: id.to_string() }))
    }

    async fn start_container(&self, req: Request<api::StartContainerRequest>) -> Reply<api::StartContainerResponse> {
        let (service, id) = (self.service.clone(), req.into_inner().container_id);
        rpc("StartContainer", async move { service.start_container(&id).await }).await?;
        Ok(Response::new(api::StartContainerResponse {}))
    }

    async fn stop_container(&self, req: Request<api::StopContainerRequest>) -> Reply<api::StopContainerResponse> {
        let req = req.into_inner();
        let grace = Duration::from_secs(u64::try_from(req.timeout).unwrap_or(0));
        let service = self.service.clone();
        rpc("StopContainer", async move { service.stop_container(&req.container_id, grace).await }).await?;
        Ok(Response::new(api::StopContainerResponse {}))
    }

    async fn remove_container(&self, req: Request<api::RemoveContainerRequest>) -> Reply<api::RemoveContainerResponse> {
        let (service, id) = (self.service.clone(), req.into_inner().container_id);
        rpc("RemoveContainer", async move { service.remove_container(&id).await }).await?;
        Ok(Response::new(api::RemoveContainerResponse {}))
    }

    async fn list_containers(&self, req: Request<api::ListContainersRequest>) -> Reply<api::ListContainersResponse> {
        Ok(Response::new(api::ListContainersResponse { containers: self.containers(req.into_inner().filter) }))
    }

    async fn container_status(&self, req: Request<api::ContainerStatusRequest>) -> Reply<api::ContainerStatusResponse> {
        let req = req.into_inner();
        let container = self.service.find_container(&req.container_id).map_err(Self::refuse("ContainerStatus"))?;
        let record = container.record();
        let pod = self.service.find_sandbox(record.sandbox.as_str()).ok().map(|sandbox| sandbox.record());
        Ok(Response::new(api::ContainerStatusResponse {
            status: Some(to_proto::container_status(&record, pod.as_deref())),
            info: verbose(req.verbose, || self.service.container_info(&container)),
        }))
    }

    async fn update_container_resources(&self, req: Request<api::UpdateContainerResourcesRequest>) -> Reply<api::UpdateContainerResourcesResponse> {
        let mut req = req.into_inner();
        let change = from_proto::update(&mut req).map_err(|error| status("UpdateContainerResources", &error))?;
        let service = self.service.clone();
        // Annotations are for plugins; there is nothing of ours in them.
        rpc("UpdateContainerResources", async move { service.update_container(&req.container_id, change).await }).await?;
        Ok(Response::new(api::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(&self, req: Request<api::ReopenContainerLogRequest>) -> Reply<api::ReopenContainerLogResponse> {
        let (service, id) = (self.service.clone(), req.into_inner().container_id);
        rpc("ReopenContainerLog", async move { service.reopen_log(&id).await }).await?;
        Ok(Response::new(api::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, req: Request<api::ExecSyncRequest>) -> Reply<api::ExecSyncResponse> {
        let req = req.into_inner();
        let timeout = Duration::from_secs(u64::try_from(req.timeout).unwrap_or(0));
        let service = self.service.clone();
        // Dropped with this future when the client goes: the command is killed then.
        let (_here, cancelled) = oneshot::channel();
        let output = rpc("ExecSync", async move { service.exec_sync(&req.container_id, req.cmd, timeout, cancelled).await }).await?;
        Ok(Response::new(api::ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.code }))
    }

    async fn exec(&self, req: Request<api::ExecRequest>) -> Reply<api::ExecResponse> {
        let api::ExecRequest { container_id: container, cmd: command, tty, stdin, stdout, stderr } = req.into_inner();
        let mut ask = ExecAsk { container, command, stdin, stdout, stderr, tty };
        ask.container = self.service.admit_exec(&ask).map_err(Self::refuse("Exec"))?;
        let url = self.streaming.exec_url(ask).map_err(|error| status("Exec", &error.into()))?;
        Ok(Response::new(api::ExecResponse { url }))
    }

    async fn attach(&self, req: Request<api::AttachRequest>) -> Reply<api::AttachResponse> {
        let api::AttachRequest { container_id: container, stdin, tty, stdout, stderr } = req.into_inner();
        let mut ask = AttachAsk { container, stdin, stdout, stderr, tty };
        ask.container = self.service.admit_attach(&ask).map_err(Self::refuse("Attach"))?;
        let url = self.streaming.attach_url(ask).map_err(|error| status("Attach", &error.into()))?;
        Ok(Response::new(api::AttachResponse { url }))
    }

    async fn port_forward(&self, req: Request<api::PortForwardRequest>) -> Reply<api::PortForwardResponse> {
        let req = req.into_inner();
        let ports = from_proto::ports(&req.port).map_err(|error| status("PortForward", &error))?;
        let sandbox = self.service.admit_port_forward(&req.pod_sandbox_id).map_err(Self::refuse("PortForward"))?;
        let url = self.streaming.port_forward_url(PortForwardAsk { sandbox, ports }).map_err(|error| status("PortForward", &error.into()))?;
        Ok(Response::new(api::PortForwardResponse { url }))
    }

    async fn container_stats(&self, req: Request<api::ContainerStatsRequest>) -> Reply<api::ContainerStatsResponse> {
        let container = self.service.find_container(&req.into_inner().container_id).map_err(Self::refuse("ContainerStats"))?;
        let usage = self.service.container_usage(&container).await.map_err(Self::refuse("ContainerStats"))?;
        Ok(Response::new(api::ContainerStatsResponse { stats: Some(to_proto::container_stats(&usage)) }))
    }

    async fn list_container_stats(&self, req: Request<api::ListContainerStatsRequest>) -> Reply<api::ListContainerStatsResponse> {
        Ok(Response::new(api::ListContainerStatsResponse { stats: self.container_usages(req.into_inner().filter).await }))
    }

    async fn pod_sandbox_stats(&self, req: Request<api::PodSandboxStatsRequest>) -> Reply<api::PodSandboxStatsResponse> {
        let sandbox = self.service.find_sandbox(&req.into_inner().pod_sandbox_id).map_err(Self::refuse("PodSandboxStats"))?;
        let usage = self.service.pod_usage(&sandbox).await;
        Ok(Response::new(api::PodSandboxStatsResponse { stats: Some(to_proto::sandbox_stats(&usage)) }))
    }

    async fn list_pod_sandbox_stats(&self, req: Request<api::ListPodSandboxStatsRequest>) -> Reply<api::ListPodSandboxStatsResponse> {
        Ok(Response::new(api::ListPodSandboxStatsResponse { stats: self.pod_usages(req.into_inner().filter).await }))
    }

    async fn update_runtime_config(&self, _: Request<api::UpdateRuntimeConfigRequest>) -> Reply<api::UpdateRuntimeConfigResponse> {
        // The pod CIDR is the network plugins' business: there is nothing for us to change.
        Ok(Response::new(api::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, req: Request<api::StatusRequest>) -> Reply<api::StatusResponse> {
        let condition = |kind: &str, bad: Option<(&str, String)>| api::RuntimeCondition {
            r#type: kind.into(),
            status: bad.is_none(),
            reason: bad.as_ref().map(|(reason, _)| (*reason).into()).unwrap_or_default(),
            message: bad.map(|(_, message)| message).unwrap_or_default(),
        };
        let network = self.service.networks.ready().err().map(|not| ("NetworkPluginNotReady", not.to_string()));
        let runtime = self.service.check_runtime().err().map(|message| ("RuntimeNotReady", message));
        let info = match req.into_inner().verbose {
            true => self.service.runtime_info().into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            false => HashMap::new(),
        };
        let features = self.service.features;
        Ok(Response::new(api::StatusResponse {
            status: Some(api::RuntimeStatus { conditions: vec![condition("RuntimeReady", runtime), condition("NetworkReady", network)] }),
            info,
            runtime_handlers: vec![api::RuntimeHandler {
                name: String::new(),
                features: Some(api::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: features.recursive_read_only_mounts,
                    user_namespaces: features.user_namespaces,
                }),
            }],
            features: Some(api::RuntimeFeatures { supplemental_groups_policy: true, user_namespaces_host_network: features.user_namespaces }),
        }))
    }

    async fn checkpoint_container(&self, _: Request<api::CheckpointContainerRequest>) -> Reply<api::CheckpointContainerResponse> {
        Err(later("CheckpointContainer"))
    }

    type GetContainerEventsStream = Streaming<api::ContainerEventResponse>;

    async fn get_container_events(&self, _: Request<api::GetEventsRequest>) -> Reply<Self::GetContainerEventsStream> {
        let service = self.service.clone();
        Ok(Response::new(events::follow(self.service.subscribe(), move |n| service.events_lost(n))))
    }

    async fn list_metric_descriptors(&self, _: Request<api::ListMetricDescriptorsRequest>) -> Reply<api::ListMetricDescriptorsResponse> {
        Ok(Response::new(api::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(&self, _: Request<api::ListPodSandboxMetricsRequest>) -> Reply<api::ListPodSandboxMetricsResponse> {
        Ok(Response::new(api::ListPodSandboxMetricsResponse { pod_metrics: self.pod_metrics().await }))
    }

    async fn runtime_config(&self, _: Request<api::RuntimeConfigRequest>) -> Reply<api::RuntimeConfigResponse> {
        let driver = if self.service.uses_systemd() { api::CgroupDriver::Systemd } else { api::CgroupDriver::Cgroupfs };
        let linux = api::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(Response::new(api::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        req: Request<api::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<api::UpdatePodSandboxResourcesResponse> {
        let req = req.into_inner();
        let parse = |field, from| from_proto::pod_resources(field, from).map_err(|error| status("UpdatePodSandboxResources", &error));
        let (overhead, resources) = (parse("overhead", req.overhead)?, parse("resources", req.resources)?);
        let service = self.service.clone();
        rpc("UpdatePodSandboxResources", async move { service.update_sandbox(&req.pod_sandbox_id, overhead, resources).await }).await?;
        Ok(Response::new(api::UpdatePodSandboxResourcesResponse {}))
    }

    // The same lists, in bounded messages.
    type StreamPodSandboxesStream = Streaming<api::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(&self, req: Request<api::StreamPodSandboxesRequest>) -> Reply<Self::StreamPodSandboxesStream> {
        chunked(self.sandboxes(req.into_inner().filter), |pod_sandboxes| api::StreamPodSandboxesResponse { pod_sandboxes })
    }

    type StreamContainersStream = Streaming<api::StreamContainersResponse>;

    async fn stream_containers(&self, req: Request<api::StreamContainersRequest>) -> Reply<Self::StreamContainersStream> {
        chunked(self.containers(req.into_inner().filter), |containers| api::StreamContainersResponse { containers })
    }

    type StreamContainerStatsStream = Streaming<api::StreamContainerStatsResponse>;

    async fn stream_container_stats(&self, req: Request<api::StreamContainerStatsRequest>) -> Reply<Self::StreamContainerStatsStream> {
        chunked(self.container_usages(req.into_inner().filter).await, |container_stats| api::StreamContainerStatsResponse { container_stats })
    }

    type StreamPodSandboxStatsStream = Streaming<api::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(&self, req: Request<api::StreamPodSandboxStatsRequest>) -> Reply<Self::StreamPodSandboxStatsStream> {
        chunked(self.pod_usages(req.into_inner().filter).await, |pod_sandbox_stats| api::StreamPodSandboxStatsResponse { pod_sandbox_stats })
    }

    type StreamPodSandboxMetricsStream = Streaming<api::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(&self, _: Request<api::StreamPodSandboxMetricsRequest>) -> Reply<Self::StreamPodSandboxMetricsStream> {
        chunked(self.pod_metrics().await, |pod_sandbox_metrics| api::StreamPodSandboxMetricsResponse { pod_sandbox_metrics })
    }
}

/// What crictl shows as `info`, if it was asked for.
fn verbose(asked: bool, info: impl FnOnce() -> serde_json::Value) -> HashMap<String, String> {
    if asked { HashMap::from([("info".to_string(), info().to_string())]) } else { HashMap::new() }
}
