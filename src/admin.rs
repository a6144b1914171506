//! `copepod status` and `copepod drain`: the daemon asked over its own socket, as any client would.

use std::path::{Path, PathBuf};

use tonic::transport::Channel;

use crate::api;
use crate::api::runtime_service_client::RuntimeServiceClient;
use crate::client;
use crate::config::Config;

/// Why an administrative command failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// There is no async runtime.
    #[error("cannot start threads")]
    Threads(#[source] std::io::Error),
    /// Nobody serves the socket.
    #[error("cannot reach the daemon at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: tonic::transport::Error,
    },
    /// The daemon answered with an error.
    #[error("{rpc}: {}", source.message())]
    Rpc {
        /// The call.
        rpc: &'static str,
        /// What it said.
        source: Box<tonic::Status>,
    },
    /// Some pods could not be removed.
    #[error("{failed} of {all} pods could not be removed")]
    NotDrained {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
    },
}

/// Prints the daemon's conditions, and its pods with their containers.
pub fn status(config: &Config) -> Result<(), AdminError> {
    block_on(async {
        let mut client = connect(&config.listen).await?;
        let version = client.version(api::VersionRequest::default()).await.map_err(failed("Version"))?.into_inner();
        println!("{} {} at {}", version.runtime_name, version.runtime_version, config.listen.display());
        let status = client.status(api::StatusRequest::default()).await.map_err(failed("Status"))?.into_inner();
        for condition in status.status.unwrap_or_default().conditions {
            let state = if condition.status { "yes".into() } else { format!("no: {} ({})", condition.message, condition.reason) };
            println!("{}: {state}", condition.r#type);
        }
        let pods = client.list_pod_sandbox(api::ListPodSandboxRequest::default()).await.map_err(failed("ListPodSandbox"))?.into_inner().items;
        let containers =
            client.list_containers(api::ListContainersRequest::default()).await.map_err(failed("ListContainers"))?.into_inner().containers;
        println!("pods: {}, containers: {}", pods.len(), containers.len());
        for pod in &pods {
            let name = pod.metadata.clone().unwrap_or_default();
            println!("{}  {}/{}  {}", short(&pod.id), name.namespace, name.name, pod.state().as_str_name().trim_start_matches("SANDBOX_"));
            for container in containers.iter().filter(|container| container.pod_sandbox_id == pod.id) {
                let name = container.metadata.clone().unwrap_or_default().name;
                println!("  {}  {name}  {}", short(&container.id), container.state().as_str_name().trim_start_matches("CONTAINER_"));
            }
        }
        Ok(())
    })
}

/// Stops and removes every pod. Goes on after a failure, and says how many are left.
pub fn drain(config: &Config) -> Result<(), AdminError> {
    block_on(async {
        let mut client = connect(&config.listen).await?;
        let pods = client.list_pod_sandbox(api::ListPodSandboxRequest::default()).await.map_err(failed("ListPodSandbox"))?.into_inner().items;
        let mut left = 0;
        for pod in &pods {
            let request = api::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
            match client.remove_pod_sandbox(request).await {
                Ok(_) => println!("removed {}", short(&pod.id)),
                Err(status) => {
                    eprintln!("pod {}: {}", short(&pod.id), status.message());
                    left += 1;
                }
            }
        }
        if left == 0 { Ok(()) } else { Err(AdminError::NotDrained { failed: left, all: pods.len() }) }
    })
}

fn block_on<T>(work: impl Future<Output = Result<T, AdminError>>) -> Result<T, AdminError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AdminError::Threads)?.block_on(work)
}

async fn connect(path: &Path) -> Result<RuntimeServiceClient<Channel>, AdminError> {
    let channel = client::connect(path).await.map_err(|source| AdminError::Connect { path: path.into(), source })?;
    Ok(RuntimeServiceClient::new(channel))
}

fn failed(rpc: &'static str) -> impl FnOnce(tonic::Status) -> AdminError {
    move |source| AdminError::Rpc { rpc, source: Box::new(source) }
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
